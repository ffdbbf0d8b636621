//! Which free-space maps a PGDATA gets.

use alloc::{collections::BTreeMap, string::String, vec::Vec};

use shard::Advisory;
use wal::{Fork, RelFileLocator};

use crate::{
    free_space::{expand_free_space, free_space_map_of},
    plan::SmallFile,
};

/// Bytes of maps in one PGDATA: what describes 256 GiB of relations. A start must not depend on the size of the database;
/// relations behind the bound grow a little before VACUUM finds their free space again.
const MAP_BYTES_MAX: usize = 64 << 20;

/// What became of the maps that the page service keeps.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FreeSpaceFiles {
    /// Those of relations that exist, no longer than these.
    pub files: Vec<SmallFile>,
    /// Paths of those that are worth nothing any more: their relation is gone, empty or unlogged, or they are damaged.
    pub useless: Vec<String>,
    /// Paths of those for which there is no room.
    pub left_out: Vec<String>,
}

/// Sorts out the maps among the files outside WAL.
pub fn free_space_files(advisory: &[Advisory], forks: &[(RelFileLocator, Fork, u32)]) -> FreeSpaceFiles {
    let mut lengths: BTreeMap<RelFileLocator, u32> = forks
        .iter()
        .filter(|(_, fork, _)| *fork == Fork::Main)
        .map(|(relation, _, blocks)| (*relation, *blocks))
        .collect();
    // They begin empty, whatever their map said before.
    for (relation, ..) in forks.iter().filter(|(_, fork, _)| *fork == Fork::Init) {
        lengths.remove(relation);
    }
    let mut sorted = FreeSpaceFiles::default();
    let mut bytes = 0;
    for file in advisory {
        let Some(relation) = free_space_map_of(&file.name) else { continue };
        let blocks = lengths.get(&relation).copied().unwrap_or(0);
        let contents = expand_free_space(&file.contents, blocks).unwrap_or_default();
        if contents.is_empty() {
            sorted.useless.push(file.name.clone());
        } else if bytes + contents.len() > MAP_BYTES_MAX {
            sorted.left_out.push(file.name.clone());
        } else {
            bytes += contents.len();
            sorted.files.push(SmallFile { path: file.name.clone(), contents });
        }
    }
    sorted
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn map(name: &str, contents: &[u8]) -> Advisory {
        Advisory { name: name.into(), contents: contents.to_vec() }
    }

    #[test]
    fn maps_of_relations_that_are_gone_empty_or_unlogged_are_useless() {
        let relation = |relation| RelFileLocator { tablespace: 1663, database: 5, relation };
        let forks = [
            (relation(1), Fork::Main, 10),
            (relation(2), Fork::Main, 0),
            (relation(3), Fork::Main, 10),
            (relation(3), Fork::Init, 1),
            (relation(5), Fork::Main, 10),
            (relation(6), Fork::Main, 2),
        ];
        // Two blocks without free space, then one with.
        let late = [1, 4, 0, 0, 3, 200];
        let names = |range: core::ops::RangeInclusive<u32>| -> Vec<String> {
            range.map(|number| alloc::format!("base/5/{number}_fsm")).collect()
        };
        let mut advisory: Vec<Advisory> = names(1..=4).iter().map(|name| map(name, &[1, 3, 200])).collect();
        advisory.push(map("base/5/5_fsm", b"\x01\x80"));
        advisory.push(map("base/5/6_fsm", &late));
        advisory.push(map("postgresql.conf", b"work_mem = '1MB'"));

        let sorted = free_space_files(&advisory, &forks);

        assert_eq!(names(2..=6), sorted.useless);
        assert_eq!(vec!["base/5/1_fsm"], sorted.files.iter().map(|file| &*file.path).collect::<Vec<_>>());
        assert!(sorted.left_out.is_empty());
    }

    #[test]
    fn maps_of_a_huge_database_do_not_fill_memory() {
        let relation = |relation| RelFileLocator { tablespace: 1663, database: 5, relation };
        let forks: Vec<_> = (1..=4).map(|number| (relation(number), Fork::Main, u32::MAX)).collect();
        // 12 million blocks of the same free space: 25 MB of pages.
        let advisory: Vec<_> = (1..=4)
            .map(|number| map(&alloc::format!("base/5/{number}_fsm"), &[1, 0x81, 0xEC, 0xB7, 0x0B, 90]))
            .collect();
        let sorted = free_space_files(&advisory, &forks);
        assert_eq!((2, 2), (sorted.files.len(), sorted.left_out.len()));
    }
}
