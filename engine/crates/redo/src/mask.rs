//! Forgets what may differ between two correct copies of a page: hints, and bytes that nothing refers to.
//!
//! Two pages are the same when they are equal after masking. Source: `access/common/bufmask.c` and the `*_mask`
//! functions of the access methods; each function names the one that it follows.

use pgtypes::Lsn;
use wal::Fork;

use crate::{
    RedoError, brin,
    btree::{self, Opaque},
    gin, gist, hash,
    page::{HEADER_BYTES, ItemId, ItemState, PAGE_BYTES, Page, align8, page_flags},
    rmgr_id,
    tuple::{SPECULATIVE, infomask},
};

/// What masked bytes become (`MASK_MARKER` is 0, too).
const MARKER: u8 = 0;

/// Masks a page that a record of `rmgr` changed.
///
/// # Errors
/// The page is none of that resource manager, or the resource manager has no mask: its pages are only ever images.
pub fn mask(rmgr: u8, fork: Fork, block: u32, page: &mut Page) -> Result<(), RedoError> {
    if page.is_new() {
        return Ok(());
    }
    if fork == Fork::VisibilityMap {
        // Stricter than PostgreSQL, whose heap_mask takes the whole map for unused space.
        lsn_and_checksum(page);
        return Ok(());
    }
    match rmgr {
        rmgr_id::HEAP | rmgr_id::HEAP2 => heap(page, block),
        rmgr_id::BTREE => btree(page),
        rmgr_id::HASH => hash(page),
        rmgr_id::GIN => gin(page),
        rmgr_id::GIST => gist(page),
        rmgr_id::SPGIST => spgist(page),
        rmgr_id::BRIN => brin(page),
        rmgr_id::SEQUENCE | rmgr_id::GENERIC => sequence_or_generic(page),
        rmgr => Err(RedoError::Unsupported { rmgr, info: 0 }),
    }
}

/// `mask_page_lsn_and_checksum`.
fn lsn_and_checksum(page: &mut Page) {
    page.0[..10].fill(MARKER);
}

/// `mask_page_hint_bits`.
fn hint_bits(page: &mut Page) {
    page.set_prune_xid(0);
    page.set_flag(page_flags::PAGE_FULL | page_flags::HAS_FREE_LINES | page_flags::ALL_VISIBLE, false);
}

/// `mask_unused_space`.
fn unused_space(page: &mut Page) -> Result<(), RedoError> {
    let (lower, upper, special) = (page.lower(), page.upper(), page.special());
    if lower > upper || special < upper || lower < HEADER_BYTES || special > PAGE_BYTES {
        return Err(RedoError::Page("its header's places contradict each other"));
    }
    page.0[lower..upper].fill(MARKER);
    Ok(())
}

/// `heap_mask` (`access/heap/heapam.c`).
fn heap(page: &mut Page, block: u32) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    hint_bits(page);
    unused_space(page)?;
    for number in 1..=page.item_count() {
        let item: ItemId = page.item_id(number)?;
        if item.state() == ItemState::Normal {
            let tuple = page.tuple(number)?;
            let mask = tuple.infomask(page);
            let hints = if mask & infomask::XMIN_FROZEN == infomask::XMIN_FROZEN {
                infomask::XMAX_INVALID | infomask::XMAX_COMMITTED
            } else {
                infomask::XACT_MASK
            };
            tuple.set_infomask(page, mask & !hints);
            // Recovery sets the first command id.
            tuple.set_cid(page, 0);
            if tuple.ctid(page).1 == SPECULATIVE {
                tuple.set_ctid(page, (block, number));
            }
        }
        if item.has_storage() {
            let end = item.offset() + item.length();
            let padded = (item.offset() + align8(item.length())).min(PAGE_BYTES);
            page.0.get_mut(end..padded).ok_or(RedoError::Page("a line pointer leads nowhere"))?.fill(MARKER);
        }
    }
    Ok(())
}

/// `mask_lp_flags`.
fn line_pointer_flags(page: &mut Page) -> Result<(), RedoError> {
    for number in 1..=page.item_count() {
        let item = page.item_id(number)?;
        page.set_item_id(number, item.without_flags());
    }
    Ok(())
}

/// `btree_mask` (`access/nbtree/nbtxlog.c`).
fn btree(page: &mut Page) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    hint_bits(page);
    unused_space(page)?;
    let opaque = Opaque::of(page)?;
    let flags = opaque.flags(page);
    if flags & btree::flags::LEAF != 0 {
        // Entries are marked as dead without a record.
        line_pointer_flags(page)?;
    }
    opaque.set_flags(page, flags & !(btree::flags::HAS_GARBAGE | btree::flags::SPLIT_END));
    opaque.set_cycle_id(page, 0);
    Ok(())
}

/// `seq_mask` (`commands/sequence.c`) and `generic_mask` (`access/transam/generic_xlog.c`).
fn sequence_or_generic(page: &mut Page) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    unused_space(page)
}

/// `brin_mask` (`access/brin/brin_xlog.c`).
fn brin(page: &mut Page) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    hint_bits(page);
    let page_type = page.u16(brin::TYPE);
    if page_type == brin::page_type::REGULAR || page_type == brin::page_type::META && page.lower() > HEADER_BYTES {
        unused_space(page)?;
    }
    // BRIN_EVACUATE_PAGE is set without a record.
    let flags = page.u16(brin::FLAGS);
    page.set_u16(brin::FLAGS, flags & !1);
    Ok(())
}

/// `hash_mask` (`access/hash/hash_xlog.c`).
fn hash(page: &mut Page) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    hint_bits(page);
    unused_space(page)?;
    let opaque = hash::Opaque::of(page)?;
    match opaque.flags(page) & hash::flags::TYPE_MASK {
        0 => {
            page_content(page);
            return Ok(());
        }
        // Entries are marked as dead without a record.
        hash::flags::BUCKET | hash::flags::OVERFLOW => line_pointer_flags(page)?,
        _ => {}
    }
    opaque.clear_flag(page, hash::flags::HAS_DEAD_TUPLES);
    Ok(())
}

/// `mask_page_content`.
fn page_content(page: &mut Page) {
    page.0[HEADER_BYTES..].fill(MARKER);
    page.set_lower(0);
    page.set_upper(0);
}

/// `gist_mask` (`access/gist/gistxlog.c`).
fn gist(page: &mut Page) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    hint_bits(page);
    unused_space(page)?;
    let opaque = gist::Opaque::of(page)?;
    // The number of a split is a position of WAL, and compared like one; a page that waits for its parent's entry may
    // get it without a record.
    opaque.set_nsn(page, Lsn(0));
    opaque.set_flag(page, gist::flags::FOLLOW_RIGHT, true);
    if opaque.flags(page) & gist::flags::LEAF != 0 {
        line_pointer_flags(page)?;
    }
    opaque.set_flag(page, gist::flags::HAS_GARBAGE, false);
    // More than PostgreSQL masks: VACUUM set it up to 17.11 and does not from 17.12 on, records do not say who wrote them,
    // and nobody reads it.
    opaque.set_flag(page, gist::flags::TUPLES_DELETED, false);
    Ok(())
}

/// `gin_mask` (`access/gin/ginxlog.c`).
fn gin(page: &mut Page) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    let flags = gin::Opaque::of(page)?.flags(page);
    hint_bits(page);
    if flags & gin::flags::DELETED != 0 {
        page_content(page);
    } else if page.lower() > HEADER_BYTES {
        unused_space(page)?;
    }
    Ok(())
}

/// `spg_mask` (`access/spgist/spgxlog.c`).
fn spgist(page: &mut Page) -> Result<(), RedoError> {
    lsn_and_checksum(page);
    hint_bits(page);
    if page.lower() >= HEADER_BYTES { unused_space(page) } else { Ok(()) }
}
