//! Resource manager Heap2: pages are pruned and frozen, marked as visible, filled with many rows.
//!
//! Source: `access/heapam_xlog.h`, `heap2_redo` (`access/heap/heapam.c`), `heap_page_prune_execute`
//! (`access/heap/pruneheap.c`).

use wal::Record;

use crate::{
    Context, Outcome, RedoError,
    heap::{add_tuple, clear_map, kind::INIT_PAGE},
    page::{HEAP_ITEMS_MAX, ItemId, Page, page_flags},
    reader::{Reader, U16s},
    touch::Site,
    tuple::TupleFlags,
    visibility_map::{self, ALL_BITS, ALL_FROZEN},
};

/// Kinds of records: `xl_info & 0x70`.
pub(crate) mod kind {
    pub const PRUNE_ON_ACCESS: u8 = 0x10;
    pub const PRUNE_VACUUM_SCAN: u8 = 0x20;
    pub const PRUNE_VACUUM_CLEANUP: u8 = 0x30;
    pub const VISIBLE: u8 = 0x40;
    pub const MULTI_INSERT: u8 = 0x50;
    pub const LOCK_UPDATED: u8 = 0x60;
    pub const MASK: u8 = 0x70;
}

/// `xl_heap_prune.flags`.
mod prune_flags {
    pub const CLEANUP_LOCK: u8 = 1 << 2;
    pub const HAS_CONFLICT_HORIZON: u8 = 1 << 3;
    pub const HAS_FREEZE_PLANS: u8 = 1 << 4;
    pub const HAS_REDIRECTIONS: u8 = 1 << 5;
    pub const HAS_DEAD_ITEMS: u8 = 1 << 6;
    pub const HAS_NOW_UNUSED_ITEMS: u8 = 1 << 7;
}

mod insert_flags {
    pub const ALL_VISIBLE_CLEARED: u8 = 1 << 0;
    pub const ALL_FROZEN_SET: u8 = 1 << 5;
}

mod freeze_flags {
    pub const FREEZE_XVAC: u8 = 0x02;
    pub const INVALID_XVAC: u8 = 0x04;
}

/// Bits of the visibility map that a record clears.
pub(crate) fn cleared_bits(record: &Record) -> Option<u8> {
    let data = record.main_data();
    let (flags_at, flag, bits) = match record.info.info & kind::MASK {
        kind::MULTI_INSERT => (0, insert_flags::ALL_VISIBLE_CLEARED, ALL_BITS),
        // XLH_LOCK_ALL_FROZEN_CLEARED.
        kind::LOCK_UPDATED => (7, 1, ALL_FROZEN),
        _ => return None,
    };
    (data.get(flags_at)? & flag != 0).then_some(bits)
}

/// `heap2_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page, context: &Context) -> Result<Outcome, RedoError> {
    match (record.info.info & kind::MASK, site.id) {
        (kind::PRUNE_ON_ACCESS | kind::PRUNE_VACUUM_SCAN | kind::PRUNE_VACUUM_CLEANUP, 0) => {
            prune_and_freeze(record, site, page)
        }
        (kind::VISIBLE, 0) => set_map(record, page),
        (kind::VISIBLE, 1) => {
            page.set_flag(page_flags::ALL_VISIBLE, true);
            Ok(if context.hint_bits_logged { Outcome::Changed } else { Outcome::ChangedWithoutLsn })
        }
        (kind::MULTI_INSERT, 0) => multi_insert(record, site, page),
        (kind::LOCK_UPDATED, 0) => lock_updated(record, page),
        (kind::MULTI_INSERT | kind::LOCK_UPDATED, 1) => {
            let bits = cleared_bits(record).ok_or(RedoError::Record("it has a map's block but clears no bit"))?;
            clear_map(record, page, bits)
        }
        // XLOG_HEAP2_NEW_CID names a row for logical decoding, without a block reference; XLOG_HEAP2_REWRITE is a file
        // of logical decoding.
        _ => Err(RedoError::Record("it has a block that its kind does not have")),
    }
}

/// An array with its length in front (`xlhp_prune_items`); empty when the flag is not set.
fn prune_items<'a>(data: &mut Reader<'a>, flags: u8, flag: u8, each: usize) -> Result<U16s<'a>, RedoError> {
    let count = if flags & flag != 0 { usize::from(data.u16()?) } else { 0 };
    data.u16s(count * each)
}

/// `heap_xlog_prune_freeze`.
fn prune_and_freeze(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let (_reason, flags) = (main.u8()?, main.u8()?);
    if flags & prune_flags::HAS_CONFLICT_HORIZON != 0 {
        main.skip(4)?;
    }

    // Freeze plans come first, but the rows that they are for come last.
    let mut data = Reader::new(site.data);
    let mut plans = Reader::new(&[]);
    let mut plan_count = 0;
    if flags & prune_flags::HAS_FREEZE_PLANS != 0 {
        plan_count = data.u16()?;
        // The plans are aligned to 4 bytes.
        data.skip(2)?;
        plans = Reader::new(data.take(usize::from(plan_count) * 12)?);
    }
    let redirected = prune_items(&mut data, flags, prune_flags::HAS_REDIRECTIONS, 2)?;
    let dead = prune_items(&mut data, flags, prune_flags::HAS_DEAD_ITEMS, 1)?;
    let unused = prune_items(&mut data, flags, prune_flags::HAS_NOW_UNUSED_ITEMS, 1)?;

    if redirected.len() + dead.len() + unused.len() > 0 {
        prune(page, redirected, dead, unused, flags & prune_flags::CLEANUP_LOCK == 0)?;
    }
    for _ in 0..plan_count {
        let (xmax, infomask2, infomask) = (plans.u32()?, plans.u16()?, plans.u16()?);
        let (freeze_flags, _padding, rows) = (plans.u8()?, plans.u8()?, plans.u16()?);
        for number in data.u16s(usize::from(rows))?.iter() {
            let tuple = page.tuple(number)?;
            tuple.set_xmax(page, xmax);
            if freeze_flags & freeze_flags::FREEZE_XVAC != 0 {
                tuple.set_cid(page, 2);
            }
            if freeze_flags & freeze_flags::INVALID_XVAC != 0 {
                tuple.set_cid(page, 0);
            }
            tuple.set_infomask(page, infomask);
            tuple.set_infomask2(page, infomask2);
        }
    }
    data.finish()?;
    Ok(Outcome::Changed)
}

/// `heap_page_prune_execute`. Without the lock that lets rows move, only line pointers that were dead already go.
fn prune(
    page: &mut Page,
    redirected: U16s<'_>,
    dead: U16s<'_>,
    unused: U16s<'_>,
    keep_rows: bool,
) -> Result<(), RedoError> {
    page.check_header()?;
    for pair in 0..redirected.len() / 2 {
        if let (Some(from), Some(to)) = (redirected.get(2 * pair), redirected.get(2 * pair + 1)) {
            page.item_id(from)?;
            page.set_item_id(from, ItemId::redirect(to));
        }
    }
    for (numbers, item) in [(dead, ItemId::DEAD), (unused, ItemId::UNUSED)] {
        for number in numbers.iter() {
            page.item_id(number)?;
            page.set_item_id(number, item);
        }
    }
    if keep_rows { page.truncate_line_pointers() } else { page.repair_fragmentation() }
}

/// `heap_xlog_visible`, the map's side.
fn set_map(record: &Record, map: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    main.skip(4)?;
    let bits = main.u8()? & ALL_BITS;
    let heap = record.blocks.iter().find(|block| block.id == 1);
    let heap = heap.ok_or(RedoError::Record("it has no heap block"))?;
    Ok(if visibility_map::set(map, heap.block, bits) { Outcome::Changed } else { Outcome::Unchanged })
}

/// `heap_xlog_multi_insert`.
fn multi_insert(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let (flags, _padding, count) = (main.u8()?, main.u8()?, main.u16()?);
    let init = record.info.info & INIT_PAGE != 0;
    if count > HEAP_ITEMS_MAX {
        return Err(RedoError::Record("it has more rows than a page"));
    }
    let numbers = main.u16s(if init { 0 } else { usize::from(count) })?;
    if init {
        page.init(0);
    }
    let mut data = Reader::new(site.data);
    for index in 0..count {
        let number = numbers.get(usize::from(index)).unwrap_or(index + 1);
        // Each row is aligned to 2 bytes.
        if !(site.data.len() - data.rest().len()).is_multiple_of(2) {
            data.skip(1)?;
        }
        let length = usize::from(data.u16()?);
        let tuple = TupleFlags { infomask2: data.u16()?, infomask: data.u16()?, hoff: data.u8()? };
        add_tuple(page, number, tuple, data.take(length)?, record.info.xid, site.block)?;
    }
    data.finish()?;
    if flags & insert_flags::ALL_VISIBLE_CLEARED != 0 {
        page.set_flag(page_flags::ALL_VISIBLE, false);
    }
    if flags & insert_flags::ALL_FROZEN_SET != 0 {
        page.set_flag(page_flags::ALL_VISIBLE, true);
    }
    Ok(Outcome::Changed)
}

/// `heap_xlog_lock_updated`: a later version of a row is locked.
fn lock_updated(record: &Record, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let (xmax, number, infobits) = (main.u32()?, main.u16()?, main.u8()?);
    let tuple = page.tuple(number)?;
    tuple.set_infobits(page, infobits);
    tuple.set_xmax(page, xmax);
    Ok(Outcome::Changed)
}
