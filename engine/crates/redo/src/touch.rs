//! Which blocks a record touches: those that it refers to, and those that it only implies.
//!
//! Knows nothing about pages. The free-space map is advisory: what PostgreSQL's recovery notes in it about pages that
//! it happens to hold is not replayed (`docs/glossary.md`).

use wal::{BlockRef, Fork, Record, RelFileLocator, rmgr};

use crate::{heap, heap2, rmgr_id, visibility_map};

/// A block of a relation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockTag {
    /// Whose block.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// Block number.
    pub block: u32,
}

/// What a record does to one block: the unit of [`crate::apply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Touch {
    /// The block.
    pub tag: BlockTag,
    /// Why it is touched.
    pub reason: Reason,
}

/// Why a record touches a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// The record refers to it, under this number.
    Registered(u8),
    /// A page of the visibility map loses bits of this heap block. Only WAL of 17.10 and older implies it where bits
    /// are set; 17.11 refers to the page. PostgreSQL sets no LSN.
    ClearVisibility {
        /// Whose bits.
        heap_block: u32,
        /// Which of its two.
        bits: u8,
    },
    /// A page of the visibility map loses the bits of all heap blocks from this one on. PostgreSQL sets no LSN, and
    /// does nothing where the map has no such page.
    TruncateVisibility {
        /// Length that the heap is cut to.
        heap_blocks: u32,
    },
}

/// A registered block, as the resource managers see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site<'a> {
    /// Number of the reference.
    pub id: u8,
    /// Block number.
    pub block: u32,
    /// The block's own data in the record.
    pub data: &'a [u8],
}

/// Every block that the record touches, registered ones first and in the order of their numbers.
///
/// Not among them: blocks that vanish with a relation, a fork or its end ([`truncation_of`] and the records of
/// transactions and databases), and blocks that are copied with a whole database.
pub fn blocks_of(record: &Record) -> impl Iterator<Item = Touch> + '_ {
    let registered =
        record.blocks.iter().map(|block| Touch { tag: tag_of(block), reason: Reason::Registered(block.id) });
    registered.chain(implied(record).into_iter().flatten())
}

pub(crate) fn tag_of(block: &BlockRef) -> BlockTag {
    BlockTag { relation: block.relation, fork: block.fork, block: block.block }
}

fn implied(record: &Record) -> [Option<Touch>; 2] {
    let kind = record.info.info & heap::kind::MASK;
    let is_update = kind == heap::kind::UPDATE || kind == heap::kind::HOT_UPDATE;
    match record.info.rmgr {
        rmgr_id::HEAP if is_update => {
            if record.blocks.iter().any(|block| block.id >= 2) {
                return [None; 2];
            }
            heap::update_cleared(record).map(|block| cleared(record, block?, visibility_map::ALL_BITS))
        }
        rmgr_id::HEAP => [implied_of_one(record, heap::cleared_bits(record)), None],
        rmgr_id::HEAP2 => [implied_of_one(record, heap2::cleared_bits(record)), None],
        rmgr::SMGR => [truncated(record), None],
        _ => [None; 2],
    }
}

/// The map's page of a record with one heap block, unless it is registered.
fn implied_of_one(record: &Record, bits: Option<u8>) -> Option<Touch> {
    let bits = bits?;
    match &record.blocks[..] {
        [heap] => cleared(record, heap.block, bits),
        _ => None,
    }
}

fn cleared(record: &Record, heap_block: u32, bits: u8) -> Option<Touch> {
    let relation = record.blocks.first()?.relation;
    let tag = BlockTag { relation, fork: Fork::VisibilityMap, block: visibility_map::map_block(heap_block) };
    Some(Touch { tag, reason: Reason::ClearVisibility { heap_block, bits } })
}

fn truncated(record: &Record) -> Option<Touch> {
    let Truncation { relation, heap_blocks, visibility_map: true, .. } = truncation_of(record)? else { return None };
    let tag = BlockTag { relation, fork: Fork::VisibilityMap, block: visibility_map::map_block(heap_blocks) };
    let touch = Touch { tag, reason: Reason::TruncateVisibility { heap_blocks } };
    visibility_map::cuts_page(heap_blocks).then_some(touch)
}

/// A relation that is cut off (`xl_smgr_truncate`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Truncation {
    /// Whose files.
    pub relation: RelFileLocator,
    /// Length that the main fork is cut to, in blocks.
    pub heap_blocks: u32,
    /// The main fork is cut.
    pub main: bool,
    /// The visibility map is cut accordingly.
    pub visibility_map: bool,
    /// The free-space map is cut accordingly.
    pub free_space_map: bool,
}

impl Truncation {
    /// Blocks that the visibility map keeps; the last of them may lose bits ([`Reason::TruncateVisibility`]).
    pub fn visibility_map_blocks(&self) -> u32 {
        let last = visibility_map::map_block(self.heap_blocks);
        if visibility_map::cuts_page(self.heap_blocks) { last + 1 } else { last }
    }
}

/// What the record cuts off; it concerns all shards of the relation.
pub fn truncation_of(record: &Record) -> Option<Truncation> {
    const XLOG_SMGR_TRUNCATE: u8 = 0x20;
    if record.info.rmgr != rmgr::SMGR || record.info.info & 0xF0 != XLOG_SMGR_TRUNCATE {
        return None;
    }
    let word = |at: usize| {
        let bytes = record.main_data().get(at..at + 4)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let relation = RelFileLocator { tablespace: word(4)?, database: word(8)?, relation: word(12)? };
    let flags = word(16)?;
    Some(Truncation {
        relation,
        heap_blocks: word(0)?,
        main: flags & 1 != 0,
        visibility_map: flags & 2 != 0,
        free_space_map: flags & 4 != 0,
    })
}

/// The fork that the record creates, empty (`xl_smgr_create`): blocks of an earlier relation of that number are gone.
pub fn creation_of(record: &Record) -> Option<(RelFileLocator, Fork)> {
    const XLOG_SMGR_CREATE: u8 = 0x10;
    if record.info.rmgr != rmgr::SMGR || record.info.info & 0xF0 != XLOG_SMGR_CREATE {
        return None;
    }
    let word = |at: usize| {
        let bytes = record.main_data().get(at..at + 4)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let relation = RelFileLocator { tablespace: word(0)?, database: word(4)?, relation: word(8)? };
    let fork = match word(12)? {
        0 => Fork::Main,
        1 => Fork::FreeSpaceMap,
        2 => Fork::VisibilityMap,
        3 => Fork::Init,
        _ => return None,
    };
    Some((relation, fork))
}
