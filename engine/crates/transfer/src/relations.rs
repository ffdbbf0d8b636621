//! Which relations a PGDATA has: their forks, in files of 1 GiB.
//!
//! Source: `parse_filename_for_nontemp_relation` (`storage/file/reinit.c`), `mdnblocks` (`storage/smgr/md.c`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use wal::{Fork, RelFileLocator};

use crate::pgdata::{PgDataError, names};

/// Blocks of a file of a relation (`RELSEG_SIZE`), the same in every ordinary build.
pub const RELATION_SEGMENT_BLOCKS: u32 = 131_072;
/// Bytes of a block.
pub(crate) const BLOCK_BYTES: usize = 8192;

/// `pg_default`: `base/DATABASE`.
pub(crate) const DEFAULT_TABLESPACE: u32 = 1663;
/// `pg_global`: `global`.
pub(crate) const GLOBAL_TABLESPACE: u32 = 1664;

/// A fork of a relation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ForkFiles {
    /// Whose.
    pub relation: RelFileLocator,
    /// Which.
    pub fork: Fork,
    /// Its length. A file's incomplete last block does not count, nor do files behind one that is not full.
    pub blocks: u32,
}

impl ForkFiles {
    /// The file that has a block, relative to PGDATA.
    pub fn path(&self, block: u32) -> PathBuf {
        let directory = match self.relation.tablespace {
            GLOBAL_TABLESPACE => PathBuf::from("global"),
            _ => PathBuf::from("base").join(self.relation.database.to_string()),
        };
        let suffix = match self.fork {
            Fork::Main => "",
            Fork::FreeSpaceMap => "_fsm",
            Fork::VisibilityMap => "_vm",
            Fork::Init => "_init",
        };
        let number = self.relation.relation;
        match block / RELATION_SEGMENT_BLOCKS {
            0 => directory.join(format!("{number}{suffix}")),
            segment => directory.join(format!("{number}{suffix}.{segment}")),
        }
    }
}

/// Databases, without the global one. A directory without a relation map is none: what a crash within CREATE DATABASE leaves.
///
/// # Errors
/// The directory cannot be read, or has something else in it.
pub(crate) fn databases(pgdata: &Path) -> Result<Vec<u32>, PgDataError> {
    let base = pgdata.join("base");
    let mut databases = Vec::new();
    for name in names(&base)? {
        // Files of sorts that did not fit into memory; a clean stop may leave the directory.
        if name == "pgsql_tmp" {
            continue;
        }
        let database = number(&name).ok_or_else(|| PgDataError::Unexpected {
            path: base.join(&name),
            what: "not the number of a database".to_owned(),
        })?;
        if base.join(&name).join("pg_filenode.map").exists() {
            databases.push(database);
        }
    }
    databases.sort_unstable();
    Ok(databases)
}

/// All forks whose pages are kept, in their order: no free-space maps, no temporary relations, and of an unlogged relation
/// only what it is reset to.
///
/// # Errors
/// A directory cannot be read.
pub fn relation_forks(pgdata: &Path) -> Result<Vec<ForkFiles>, PgDataError> {
    let mut forks = Vec::new();
    let global = RelFileLocator { tablespace: GLOBAL_TABLESPACE, ..RelFileLocator::default() };
    forks_of_directory(&pgdata.join("global"), global, &mut forks)?;
    for database in databases(pgdata)? {
        let directory = pgdata.join("base").join(database.to_string());
        let place = RelFileLocator { tablespace: DEFAULT_TABLESPACE, database, relation: 0 };
        forks_of_directory(&directory, place, &mut forks)?;
    }
    forks.sort_unstable();
    Ok(forks)
}

fn forks_of_directory(directory: &Path, place: RelFileLocator, forks: &mut Vec<ForkFiles>) -> Result<(), PgDataError> {
    let mut blocks: BTreeMap<(u32, Fork), BTreeMap<u32, u32>> = BTreeMap::new();
    let mut unlogged = BTreeSet::new();
    for name in names(directory)? {
        let Some((relation, fork, segment)) = parse_file_name(&name) else { continue };
        match fork {
            Fork::FreeSpaceMap => continue,
            Fork::Init => drop(unlogged.insert(relation)),
            Fork::Main | Fork::VisibilityMap => {}
        }
        let path = directory.join(&name);
        let bytes = fs::metadata(&path).map_err(PgDataError::io(&path))?.len();
        let length = u32::try_from(bytes / BLOCK_BYTES as u64).ok().filter(|n| *n <= RELATION_SEGMENT_BLOCKS);
        let length = length.ok_or_else(|| PgDataError::Unexpected {
            path,
            what: format!("{bytes} bytes, and a file of a relation has at most 1 GiB"),
        })?;
        blocks.entry((relation, fork)).or_default().insert(segment, length);
    }
    for ((relation, fork), segments) in blocks {
        if unlogged.contains(&relation) && fork != Fork::Init {
            continue;
        }
        // Files behind one that is not full are left from a truncation; without the first, nothing of the fork counts.
        let mut length: u32 = 0;
        for segment in 0.. {
            let Some(in_segment) = segments.get(&segment) else { break };
            length = length.saturating_add(*in_segment);
            if *in_segment < RELATION_SEGMENT_BLOCKS {
                break;
            }
        }
        if segments.contains_key(&0) {
            forks.push(ForkFiles { relation: RelFileLocator { relation, ..place }, fork, blocks: length });
        }
    }
    Ok(())
}

/// Relation, fork and number of the file: `NUMBER[_fsm|_vm|_init][.SEGMENT]`. None for everything else, such as `PG_VERSION`
/// or the file of a temporary relation (`tBACKEND_NUMBER`).
fn parse_file_name(name: &str) -> Option<(u32, Fork, u32)> {
    let (stem, segment) = match name.split_once('.') {
        Some((stem, segment)) => (stem, number(segment).filter(|segment| *segment > 0)?),
        None => (name, 0),
    };
    let (relation, fork) = match stem.split_once('_') {
        None => (stem, Fork::Main),
        Some((relation, "fsm")) => (relation, Fork::FreeSpaceMap),
        Some((relation, "vm")) => (relation, Fork::VisibilityMap),
        Some((relation, "init")) => (relation, Fork::Init),
        Some(_) => return None,
    };
    Some((number(relation)?, fork, segment))
}

/// A number above 0 as PostgreSQL writes it: without sign or leading zeros.
fn number(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    if is_plain { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_relation_files() {
        for (name, expected) in [
            ("16384", Some((16384, Fork::Main, 0))),
            ("16384.12", Some((16384, Fork::Main, 12))),
            ("16384_fsm", Some((16384, Fork::FreeSpaceMap, 0))),
            ("16384_vm.3", Some((16384, Fork::VisibilityMap, 3))),
            ("16384_init", Some((16384, Fork::Init, 0))),
            ("4294967295", Some((u32::MAX, Fork::Main, 0))),
            ("4294967296", None),
            ("0", None),
            ("016384", None),
            ("16384.0", None),
            ("16384_tmp", None),
            ("t3_16384", None),
            ("t3_16384_fsm", None),
            ("PG_VERSION", None),
            ("pg_filenode.map", None),
            ("pg_internal.init", None),
            ("pgsql_tmp", None),
            ("", None),
        ] {
            assert_eq!(expected, parse_file_name(name), "{name}");
        }
    }

    #[test]
    fn a_block_has_its_file() {
        let files = |tablespace, database, fork| ForkFiles {
            relation: RelFileLocator { tablespace, database, relation: 16384 },
            fork,
            blocks: 0,
        };
        for (files, block, path) in [
            (files(DEFAULT_TABLESPACE, 5, Fork::Main), 131_071, "base/5/16384"),
            (files(DEFAULT_TABLESPACE, 5, Fork::VisibilityMap), 131_072, "base/5/16384_vm.1"),
            (files(GLOBAL_TABLESPACE, 0, Fork::Init), 0, "global/16384_init"),
        ] {
            assert_eq!(Path::new(path), files.path(block));
        }
    }
}
