//! The files of a data directory that was shut down cleanly, in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use layers::Slru;
use metadata::{Counters, Origins, SLRU_PAGE_BYTES};
use pgformat::ControlFile;
use redo::Database;
use wal::{Fork, RelFileLocator};

const PAGE_BYTES: usize = 8192;
/// Blocks of a file of a relation (`RELSEG_SIZE`).
const SEGMENT_BLOCKS: usize = 131_072;

pub const SLRUS: [(Slru, metadata::Slru); 4] = [
    (Slru::TransactionStatus, metadata::Slru::TransactionStatus),
    (Slru::MultixactOffsets, metadata::Slru::MultixactOffsets),
    (Slru::MultixactMembers, metadata::Slru::MultixactMembers),
    (Slru::CommitTimestamps, metadata::Slru::CommitTimestamps),
];

/// What WAL describes of a data directory.
#[derive(Clone)]
pub struct Files {
    pub control: ControlFile,
    /// Without free-space maps, temporary relations, and what unlogged relations have beside their init forks.
    pub forks: BTreeMap<(RelFileLocator, Fork), Vec<u8>>,
    pub unlogged: BTreeSet<RelFileLocator>,
    pub maps: BTreeMap<Database, Vec<u8>>,
    pub slru_pages: BTreeMap<(Slru, u32), Vec<u8>>,
    pub two_phase: BTreeMap<u64, Vec<u8>>,
    pub origins: Origins,
}

/// Files of a fork, by number.
type Segments = Vec<(usize, Vec<u8>)>;

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name")).collect();
    names.sort();
    names
}

/// Relation, fork and segment of a file's name.
fn parse(name: &str) -> Option<(u32, Fork, usize)> {
    let (name, segment) = name.split_once('.').unwrap_or((name, "0"));
    let (relation, fork) = name.split_once('_').unwrap_or((name, ""));
    let fork = match fork {
        "" => Fork::Main,
        "fsm" => Fork::FreeSpaceMap,
        "vm" => Fork::VisibilityMap,
        "init" => Fork::Init,
        _ => return None,
    };
    Some((relation.parse().ok()?, fork, segment.parse().ok()?))
}

impl Files {
    pub fn load(data: &Path) -> Files {
        let control = fs::read(data.join("global/pg_control")).expect("a control file");
        let mut files = Files {
            control: ControlFile::parse(&control).expect("PostgreSQL 17"),
            forks: BTreeMap::new(),
            unlogged: BTreeSet::new(),
            maps: BTreeMap::new(),
            slru_pages: BTreeMap::new(),
            two_phase: BTreeMap::new(),
            origins: Origins::default(),
        };
        files.load_database(&data.join("global"), Database { tablespace: 1664, database: 0 });
        for name in names(&data.join("base")) {
            let Ok(database) = name.parse() else { continue };
            files.load_database(&data.join("base").join(name), Database { tablespace: 1663, database });
        }
        for (slru, of) in SLRUS {
            let directory = data.join(of.directory());
            for name in names(&directory) {
                let first = of.first_page(&name).expect("a file of an SLRU");
                let bytes = fs::read(directory.join(&name)).expect("a readable file");
                for (page, number) in bytes.chunks_exact(SLRU_PAGE_BYTES).zip(first..) {
                    files.slru_pages.insert((slru, number), page.to_vec());
                }
            }
        }
        for name in names(&data.join("pg_twophase")) {
            let full_xid = u64::from_str_radix(&name, 16).expect("a full transaction id");
            let state = fs::read(data.join("pg_twophase").join(name)).expect("a readable file");
            files.two_phase.insert(full_xid, state);
        }
        if let Ok(file) = fs::read(data.join("pg_logical/replorigin_checkpoint")) {
            files.origins = Origins::parse(&file).expect("a sound file");
            files.origins.0.retain(|_, lsn| lsn.is_valid());
        }
        files
    }

    fn load_database(&mut self, directory: &Path, database: Database) {
        let Database { tablespace, database: number } = database;
        let mut forks: BTreeMap<(RelFileLocator, Fork), Segments> = BTreeMap::new();
        for name in names(directory) {
            let Some((relation, fork, segment)) = parse(&name) else { continue };
            let relation = RelFileLocator { tablespace, database: number, relation };
            if fork == Fork::Init {
                self.unlogged.insert(relation);
            }
            if fork != Fork::FreeSpaceMap {
                let bytes = fs::read(directory.join(&name)).expect("a readable file");
                forks.entry((relation, fork)).or_default().push((segment, bytes));
            }
        }
        for ((relation, fork), mut segments) in forks {
            if self.unlogged.contains(&relation) && fork != Fork::Init {
                continue;
            }
            segments.sort_by_key(|(segment, _)| *segment);
            assert!(segments.iter().rev().skip(1).all(|(_, bytes)| bytes.len() == SEGMENT_BLOCKS * PAGE_BYTES));
            let bytes = segments.into_iter().flat_map(|(_, bytes)| bytes).collect();
            self.forks.insert((relation, fork), bytes);
        }
        let map = fs::read(directory.join("pg_filenode.map")).expect("a relation map");
        self.maps.insert(database, map);
    }

    pub fn counters(&self) -> Counters {
        Counters::from_control(&self.control)
    }
}
