//! Free-space maps: how the page service keeps those of a compute, and the files that a later compute gets.
//!
//! A map is advisory: whoever takes a block from it looks at the block itself. So it may be old, but must not name blocks
//! behind the end of its relation, and its pages must be ones that PostgreSQL accepts. Therefore only what its leaves say is
//! kept, one byte a block in runs; upper levels and pages are made anew, which also mends a map that was read while it was
//! written. Layout: `src/backend/storage/freespace/README`, `freespace.c`, `fsmpage.c`. Ours: `docs/formats/free-space.md`.

use alloc::vec::Vec;

use pgformat::{PAGE_BYTES, set_page_checksum};
use wal::RelFileLocator;

use crate::relations::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};

/// Bytes of a page before its nodes: the header, and `fp_next_slot`.
const NODES_AT: usize = 28;
/// `NodesPerPage`.
const NODES: usize = PAGE_BYTES - NODES_AT;
/// `NonLeafNodesPerPage`.
const INNER_NODES: usize = PAGE_BYTES / 2 - 1;
/// `SlotsPerFSMPage`: blocks that a page of the lowest level describes, and pages below one of another level.
const SLOTS: usize = NODES - INNER_NODES;
/// `FSM_TREE_DEPTH`.
const LEVELS: usize = 3;

/// First byte of a compact map.
const VERSION: u8 = 1;
/// Equal bytes that are worth a run of their own: its length and the length of the literals behind it take two.
const RUN_MIN: usize = 4;

/// A compact map that is none. It is left out: nothing depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FreeSpaceError {
    /// Written by an engine that this one does not know.
    #[error("free-space map: version {0}, expected {VERSION}")]
    Version(u8),
    /// It ends too early, or holds a length that is impossible.
    #[error("free-space map: damaged")]
    Damaged,
}

/// Whose free-space map the file with this path in PGDATA is; none for any other file, for maps of temporary relations and
/// for all but the first file of a map, which begins with the 4 TB of a relation that no compact map describes.
pub fn free_space_map_of(path: &str) -> Option<RelFileLocator> {
    let (directory, file) = path.rsplit_once('/')?;
    let relation = number(file.strip_suffix("_fsm")?)?;
    match directory {
        "global" => Some(RelFileLocator { tablespace: GLOBAL_TABLESPACE, database: 0, relation }),
        _ => {
            let database = number(directory.strip_prefix("base/")?)?;
            Some(RelFileLocator { tablespace: DEFAULT_TABLESPACE, database, relation })
        }
    }
}

/// An OID as PostgreSQL writes it into a path.
fn number(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| is_plain)
}

/// What is kept of a map's file; empty when no block has free space. Bytes behind the last whole page are ignored.
pub fn compact_free_space(file: &[u8]) -> Vec<u8> {
    let (pages, _) = file.as_chunks::<PAGE_BYTES>();
    let mut blocks = Vec::new();
    for leaf in 0.. {
        let Some(page) = pages.get(position(0, leaf)) else { break };
        blocks.extend_from_slice(&page[NODES_AT + INNER_NODES..]);
    }
    let used = blocks.iter().rposition(|category| *category != 0).map_or(0, |last| last + 1);
    blocks.truncate(used);
    match blocks.is_empty() {
        true => Vec::new(),
        false => encode(&blocks),
    }
}

/// The file of a compact map, cut to the first `blocks` blocks of the relation; empty when none of them has free space.
///
/// # Errors
/// It is no compact map.
pub fn expand_free_space(compact: &[u8], blocks: u32) -> Result<Vec<u8>, FreeSpaceError> {
    let limit = usize::try_from(blocks).unwrap_or(usize::MAX);
    let mut categories = decode(compact, limit)?;
    let used = categories.iter().rposition(|category| *category != 0).map_or(0, |last| last + 1);
    categories.truncate(used);
    Ok(file_of(&categories))
}

/// Where page `number` of a level is in the file (`fsm_logical_to_physical`); level 0 is the lowest.
fn position(level: usize, number: usize) -> usize {
    let mut below = number * SLOTS.pow(u32::try_from(level).expect("below LEVELS"));
    let mut pages = 0;
    for _ in 0..LEVELS {
        pages += below + 1;
        below /= SLOTS;
    }
    pages - level - 1
}

/// Pages that say this about the first blocks of a relation. Page and upper levels as `fsm_rebuild_page` and
/// `fsm_set_and_search` leave them; pages without free space stay zero, which PostgreSQL takes for new ones.
fn file_of(categories: &[u8]) -> Vec<u8> {
    if categories.is_empty() {
        return Vec::new();
    }
    let last = position(0, (categories.len() - 1) / SLOTS);
    let mut pages = alloc::vec![[0; PAGE_BYTES]; last + 1];
    let mut values = categories.to_vec();
    for level in 0..LEVELS {
        let mut roots = Vec::new();
        for (number, slots) in values.chunks(SLOTS).enumerate() {
            let position = position(level, number);
            roots.push(fill_page(&mut pages[position], position, slots));
        }
        values = roots;
    }
    pages.into_flattened()
}

/// Makes a page of these slots; returns the value of its root.
fn fill_page(page: &mut [u8; PAGE_BYTES], position: usize, slots: &[u8]) -> u8 {
    let nodes = &mut page[NODES_AT..];
    nodes[INNER_NODES..][..slots.len()].copy_from_slice(slots);
    for node in (0..INNER_NODES).rev() {
        let child = |side: usize| nodes.get(2 * node + side).copied().unwrap_or(0);
        nodes[node] = child(1).max(child(2));
    }
    let root = nodes[0];
    if root != 0 {
        // `PageInit` with no special space: lower, upper, special, size and version of the layout.
        let size = u16::try_from(PAGE_BYTES).expect("8192");
        for (at, value) in [(12, 24), (14, size), (16, size), (18, size | 4)] {
            page[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        set_page_checksum(page, u32::try_from(position).expect("a relation has fewer than 2^32 blocks"));
    }
    root
}

/// Runs: a length, doubled and 1 more for equal bytes, as LEB128; then that byte, or the bytes.
fn encode(categories: &[u8]) -> Vec<u8> {
    let mut out = alloc::vec![VERSION];
    let mut literals: &[u8] = &[];
    let mut rest = categories;
    while let Some(first) = rest.first() {
        let run = rest.iter().take_while(|category| *category == first).count();
        if run < RUN_MIN {
            let before = categories.len() - rest.len() - literals.len();
            literals = &categories[before..before + literals.len() + run];
        } else {
            put_literals(&mut out, literals);
            literals = &[];
            put_length(&mut out, run << 1 | 1);
            out.push(*first);
        }
        rest = &rest[run..];
    }
    put_literals(&mut out, literals);
    out
}

fn put_literals(out: &mut Vec<u8>, literals: &[u8]) {
    if !literals.is_empty() {
        put_length(out, literals.len() << 1);
        out.extend_from_slice(literals);
    }
}

fn put_length(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The first `limit` categories.
fn decode(compact: &[u8], limit: usize) -> Result<Vec<u8>, FreeSpaceError> {
    let (version, mut rest) = compact.split_first().ok_or(FreeSpaceError::Damaged)?;
    if *version != VERSION {
        return Err(FreeSpaceError::Version(*version));
    }
    let mut categories = Vec::new();
    while !rest.is_empty() && categories.len() < limit {
        let token = take_length(&mut rest).ok_or(FreeSpaceError::Damaged)?;
        let length = token >> 1;
        let wanted = length.min(limit - categories.len());
        match token & 1 {
            1 => {
                let (category, behind) = rest.split_first().ok_or(FreeSpaceError::Damaged)?;
                categories.resize(categories.len() + wanted, *category);
                rest = behind;
            }
            _ => {
                let (literals, behind) = rest.split_at_checked(length).ok_or(FreeSpaceError::Damaged)?;
                categories.extend_from_slice(&literals[..wanted]);
                rest = behind;
            }
        }
    }
    Ok(categories)
}

/// At most 5 bytes: more blocks than a relation can have are no length.
fn take_length(rest: &mut &[u8]) -> Option<usize> {
    let mut value = 0;
    for shift in [0, 7, 14, 21, 28] {
        let (byte, behind) = rest.split_first()?;
        *rest = behind;
        value |= usize::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use super::*;

    /// 4,069 blocks a page; below 8 the last level has one page for each of them.
    fn categories(blocks: usize) -> Vec<u8> {
        (0..blocks).map(|block| if block % 1000 < 700 { 0 } else { (block / 3 % 255) as u8 + 1 }).collect()
    }

    fn pages(file: &[u8]) -> &[[u8; PAGE_BYTES]] {
        file.as_chunks().0
    }

    #[test]
    fn only_maps_of_permanent_relations_have_a_place() {
        let table = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
        let shared = RelFileLocator { tablespace: 1664, database: 0, relation: 1262 };
        assert_eq!(Some(table), free_space_map_of("base/5/16384_fsm"));
        assert_eq!(Some(shared), free_space_map_of("global/1262_fsm"));
        for path in [
            "base/5/16384",
            "base/5/16384_vm",
            "base/5/16384_fsm.1",
            "base/5/t3_16384_fsm",
            "base/05/16384_fsm",
            "base/5/016384_fsm",
            "base/5/0_fsm",
            "base/5/+1_fsm",
            "base/5/_fsm",
            "base/5/99999999999_fsm",
            "base//16384_fsm",
            "base/../5/1_fsm",
            "base/5/../1_fsm",
            "base/16384_fsm",
            "global/5/1_fsm",
            "16384_fsm",
            "/global/1_fsm",
            "",
        ] {
            assert_eq!(None, free_space_map_of(path), "{path}");
        }
    }

    #[test]
    fn the_positions_are_postgresqls() {
        // The root, the first page of the middle, then leaves; behind 4,069 leaves comes the next page of the middle.
        assert_eq!([0, 1, 2, 3], [position(2, 0), position(1, 0), position(0, 0), position(0, 1)]);
        assert_eq!([4070, 4071, 4072], [position(0, 4068), position(1, 1), position(0, 4069)]);
        assert_eq!(4069, SLOTS);
    }

    #[test]
    fn what_the_leaves_say_survives_and_upper_levels_lead_to_it() {
        for blocks in [1, 700, 1000, SLOTS, SLOTS + 1, 3 * SLOTS + 999, 300_000] {
            let mut wanted = categories(blocks);
            let used = wanted.iter().rposition(|category| *category != 0).map_or(0, |last| last + 1);
            wanted.truncate(used);
            let file = file_of(&wanted);
            let compact = compact_free_space(&file);
            if wanted.is_empty() {
                assert!(file.is_empty() && compact.is_empty());
                continue;
            }
            assert_eq!(Ok(file.clone()), expand_free_space(&compact, u32::MAX), "{blocks}");
            assert_eq!(wanted, decode(&compact, usize::MAX).expect("valid"), "{blocks}");
            let highest = wanted.iter().copied().max();
            let pages = pages(&file);
            assert_eq!(highest, Some(pages[0][NODES_AT]), "{blocks}: the root knows the best block");
            assert_eq!(highest, Some(pages[1][NODES_AT]), "{blocks}");
            // Downwards from the root each node is one of its children.
            for page in pages {
                let nodes = &page[NODES_AT..];
                for node in 0..INNER_NODES {
                    let child = |side: usize| nodes.get(2 * node + side).copied().unwrap_or(0);
                    assert_eq!(nodes[node], child(1).max(child(2)));
                }
            }
        }
    }

    #[test]
    fn a_map_never_names_a_block_behind_the_end_of_its_relation() {
        let compact = compact_free_space(&file_of(&vec![200; 3 * SLOTS]));
        assert_eq!(Ok(Vec::new()), expand_free_space(&compact, 0));
        for blocks in [1, 5, SLOTS, SLOTS + 7] {
            let file = expand_free_space(&compact, u32::try_from(blocks).expect("few")).expect("valid");
            assert_eq!(position(0, (blocks - 1) / SLOTS) + 1, pages(&file).len());
            assert_eq!(vec![200; blocks], decode(&compact_free_space(&file), usize::MAX).expect("valid"));
        }
    }

    #[test]
    fn a_map_of_a_small_or_uniform_table_is_small() {
        assert!(compact_free_space(&file_of(&[0, 0, 0, 0, 0, 240])).len() < 10);
        assert!(compact_free_space(&file_of(&vec![64; 1_000_000])).len() < 10);
        let worst: Vec<u8> = (0..100_000).map(|block| 1 + (block % 2) as u8).collect();
        assert!(compact_free_space(&file_of(&worst)).len() < 100_010);
    }

    /// The examples of `docs/formats/free-space.md`.
    #[test]
    fn compact_maps_are_these_bytes() {
        assert_eq!(vec![1, 0x0B, 0, 2, 200], decode_and_encode(&[1, 0x0B, 0, 3, 200], &[0, 0, 0, 0, 0, 200]));
        let mixed = [1, 4, 0, 200, 0x0D, 64];
        assert_eq!(mixed.to_vec(), decode_and_encode(&mixed, &[0, 200, 64, 64, 64, 64, 64, 64]));
    }

    fn decode_and_encode(compact: &[u8], categories: &[u8]) -> Vec<u8> {
        assert_eq!(Ok(categories.to_vec()), decode(compact, usize::MAX));
        encode(categories)
    }

    #[test]
    fn damage_is_refused_and_costs_no_memory() {
        assert_eq!(Err(FreeSpaceError::Damaged), expand_free_space(&[], 10));
        assert_eq!(Err(FreeSpaceError::Version(2)), expand_free_space(&[2, 3, 1], 10));
        for damaged in [&[1, 3][..], &[1, 0x80], &[1, 8, 1, 2], &[1, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1]] {
            assert_eq!(Err(FreeSpaceError::Damaged), expand_free_space(damaged, 10), "{damaged:?}");
        }
        let endless = [1, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 9];
        assert_eq!(3 * PAGE_BYTES, expand_free_space(&endless, 100).expect("cut").len());
    }

    #[test]
    fn bytes_that_are_no_map_are_taken_for_one_without_free_space_or_for_some_map() {
        assert!(compact_free_space(&[7; 100]).is_empty());
        assert!(compact_free_space(&vec![0; 5 * PAGE_BYTES]).is_empty());
        let wild = compact_free_space(&vec![0xA5; 3 * PAGE_BYTES]);
        assert!(expand_free_space(&wild, 50).is_ok());
    }
}
