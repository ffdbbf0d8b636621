//! Which blocks a record touches: those that it refers to, and those that it only implies.
//!
//! Knows nothing about pages. The free-space map is advisory: what PostgreSQL's recovery notes in it about pages that
//! it happens to hold is not replayed, nor is the tail of its last page cleared by a truncation. Read next: `event.rs`.

use wal::{BlockRef, Fork, Record, RelFileLocator, rmgr};

use crate::{
    event::{Truncation, truncation_of},
    heap, heap2, rmgr_id, visibility_map,
};

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
/// Not among them: blocks that come, vanish or are copied with a whole relation or database ([`crate::events_of`]).
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
