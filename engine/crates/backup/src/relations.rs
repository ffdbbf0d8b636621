//! Files of relations.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};

use redo::Database;
use wal::{Fork, RelFileLocator};

/// Tablespace of databases without another one (`DEFAULTTABLESPACE_OID`).
pub(crate) const DEFAULT_TABLESPACE: u32 = 1663;
/// Tablespace of what all databases share (`GLOBALTABLESPACE_OID`).
pub(crate) const GLOBAL_TABLESPACE: u32 = 1664;

/// A file of a relation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RelationFile {
    /// Path in PGDATA.
    pub path: String,
    /// Whose.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// Which of the fork's files: begins with block `segment * Plan::segment_blocks`.
    pub segment: u32,
    /// Blocks in it.
    pub blocks: u32,
    /// Where its pages come from.
    pub pages: RelationPages,
}

/// Where the pages of a file come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RelationPages {
    /// The page service, under the file's relation and fork.
    Service,
    /// A local copy of the same blocks of the init fork: the relation is unlogged and begins empty (`reinit.c`). From here on
    /// it is local, and never fetched.
    CopyOfInit,
}

/// A relation cannot be placed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RelationError {
    /// Tablespaces never enter the log; the relation is not of one.
    #[error("relation {}/{}/{} is in a tablespace, which is not supported", .0.tablespace, .0.database, .0.relation)]
    Tablespace(RelFileLocator),
    /// Its database has no directory: metadata and lengths are not of one position, or a value was lost.
    #[error("relation {}/{}/{} is in a database that does not exist", .0.tablespace, .0.database, .0.relation)]
    Database(RelFileLocator),
    /// An unlogged relation's init fork does not fit into one file, where PostgreSQL's never exceeds a few blocks.
    #[error(
        "relation {}/{}/{} has an init fork of {blocks} blocks",
        relation.tablespace, relation.database, relation.relation
    )]
    InitFork {
        /// Which relation.
        relation: RelFileLocator,
        /// Length of its init fork.
        blocks: u32,
    },
}

/// Directory of a database, or of what is shared.
pub(crate) fn directory(database: Database) -> Option<String> {
    match (database.tablespace, database.database) {
        (GLOBAL_TABLESPACE, 0) => Some(String::from("global")),
        (DEFAULT_TABLESPACE, database @ 1..) => Some(format!("base/{database}")),
        _ => None,
    }
}

/// Files of all forks, in their order. Free-space maps are left out: they are rebuilt from nothing, and lie to nobody.
pub(crate) fn relation_files(
    forks: impl IntoIterator<Item = (RelFileLocator, Fork, u32)>,
    databases: &BTreeSet<Database>,
    segment_blocks: u32,
) -> Result<Vec<RelationFile>, RelationError> {
    let mut relations: BTreeMap<RelFileLocator, BTreeMap<Fork, u32>> = BTreeMap::new();
    for (relation, fork, blocks) in forks {
        if fork != Fork::FreeSpaceMap {
            relations.entry(relation).or_default().insert(fork, blocks);
        }
    }
    let mut files = Vec::new();
    for (relation, forks) in relations {
        let database = Database { tablespace: relation.tablespace, database: relation.database };
        let directory = directory(database).ok_or(RelationError::Tablespace(relation))?;
        if database.tablespace != GLOBAL_TABLESPACE && !databases.contains(&database) {
            return Err(RelationError::Database(relation));
        }
        let mut add = |fork, blocks, pages| {
            segments(blocks, segment_blocks).for_each(|(segment, blocks)| {
                let path = file_path(&directory, relation.relation, fork, segment);
                files.push(RelationFile { path, relation, fork, segment, blocks, pages });
            });
        };
        match forks.get(&Fork::Init) {
            Some(&blocks) if blocks > segment_blocks => return Err(RelationError::InitFork { relation, blocks }),
            Some(&blocks) => {
                add(Fork::Main, blocks, RelationPages::CopyOfInit);
                add(Fork::Init, blocks, RelationPages::Service);
            }
            None => forks.into_iter().for_each(|(fork, blocks)| add(fork, blocks, RelationPages::Service)),
        }
    }
    Ok(files)
}

/// Number and blocks of each file of a fork: full ones, then the last. An empty fork has one.
fn segments(blocks: u32, segment_blocks: u32) -> impl Iterator<Item = (u32, u32)> {
    let count = blocks.div_ceil(segment_blocks).max(1);
    (0..count).map(move |segment| (segment, (blocks - segment * segment_blocks).min(segment_blocks)))
}

/// `GetRelationPath` and `_mdfd_segpath`.
fn file_path(directory: &str, relation: u32, fork: Fork, segment: u32) -> String {
    let fork = match fork {
        Fork::Main => "",
        Fork::FreeSpaceMap => "_fsm",
        Fork::VisibilityMap => "_vm",
        Fork::Init => "_init",
    };
    match segment {
        0 => format!("{directory}/{relation}{fork}"),
        _ => format!("{directory}/{relation}{fork}.{segment}"),
    }
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use super::*;

    const SEGMENT_BLOCKS: u32 = 131_072;
    const TABLE: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
    const SHARED: RelFileLocator = RelFileLocator { tablespace: 1664, database: 0, relation: 1262 };

    fn files(forks: &[(RelFileLocator, Fork, u32)]) -> Result<Vec<RelationFile>, RelationError> {
        let databases = BTreeSet::from([Database { tablespace: 1663, database: 5 }]);
        relation_files(forks.iter().copied(), &databases, SEGMENT_BLOCKS)
    }

    fn paths(forks: &[(RelFileLocator, Fork, u32)]) -> Vec<(String, u32)> {
        files(forks).expect("a plan").into_iter().map(|file| (file.path, file.blocks)).collect()
    }

    #[test]
    fn a_fork_is_cut_into_files_of_a_gibibyte() {
        let table = [
            (0, vec![("base/5/16384", 0)]),
            (1, vec![("base/5/16384", 1)]),
            (SEGMENT_BLOCKS, vec![("base/5/16384", SEGMENT_BLOCKS)]),
            (SEGMENT_BLOCKS + 1, vec![("base/5/16384", SEGMENT_BLOCKS), ("base/5/16384.1", 1)]),
            (
                3 * SEGMENT_BLOCKS,
                vec![
                    ("base/5/16384", SEGMENT_BLOCKS),
                    ("base/5/16384.1", SEGMENT_BLOCKS),
                    ("base/5/16384.2", SEGMENT_BLOCKS),
                ],
            ),
        ];
        for (blocks, expected) in table {
            let expected: Vec<_> = expected.into_iter().map(|(path, blocks)| (String::from(path), blocks)).collect();
            assert_eq!(expected, paths(&[(TABLE, Fork::Main, blocks)]));
        }
        let last = paths(&[(TABLE, Fork::Main, u32::MAX)]).pop().expect("files");
        assert_eq!((String::from("base/5/16384.32767"), SEGMENT_BLOCKS - 1), last);
    }

    #[test]
    fn forks_have_their_names_and_free_space_maps_are_left_out() {
        let forks = [
            (SHARED, Fork::Main, 1),
            (TABLE, Fork::VisibilityMap, 2),
            (TABLE, Fork::FreeSpaceMap, 3),
            (TABLE, Fork::Main, 4),
        ];
        let expected = [("base/5/16384", 4), ("base/5/16384_vm", 2), ("global/1262", 1)];
        assert_eq!(expected.map(|(path, blocks)| (String::from(path), blocks)).to_vec(), paths(&forks));
    }

    /// B3: without a main fork each access fails; with one of another time rows come back.
    #[test]
    fn an_unlogged_relation_begins_with_a_copy_of_its_init_fork_and_nothing_else() {
        let forks = [(TABLE, Fork::Main, 70), (TABLE, Fork::VisibilityMap, 1), (TABLE, Fork::Init, 1)];
        let files = files(&forks).expect("a plan");
        let [main, init] = &files[..] else { panic!("{files:?}") };
        assert_eq!(("base/5/16384", Fork::Main, 1), (&*main.path, main.fork, main.blocks));
        assert_eq!(RelationPages::CopyOfInit, main.pages);
        assert_eq!(("base/5/16384_init", Fork::Init, 1), (&*init.path, init.fork, init.blocks));
        assert_eq!(RelationPages::Service, init.pages);
    }

    #[test]
    fn relations_without_a_place_are_refused() {
        let elsewhere = RelFileLocator { tablespace: 20_000, ..TABLE };
        let lost = RelFileLocator { database: 6, ..TABLE };
        assert_eq!(Err(RelationError::Tablespace(elsewhere)), files(&[(elsewhere, Fork::Main, 1)]));
        assert_eq!(Err(RelationError::Database(lost)), files(&[(lost, Fork::Main, 1)]));
        let huge = SEGMENT_BLOCKS + 1;
        assert_eq!(Err(RelationError::InitFork { relation: TABLE, blocks: huge }), files(&[(TABLE, Fork::Init, huge)]));
    }
}
