//! Resource manager Heap: rows are inserted, updated, deleted and locked.
//!
//! Source: `access/heapam_xlog.h`, `heap_redo` (`access/heap/heapam.c`). Read next: `heap2.rs`.

use wal::Record;

use crate::{
    Outcome, RedoError,
    page::{Page, page_flags},
    reader::Reader,
    touch::Site,
    tuple::{MOVED_PARTITIONS, TUPLE_BYTES_MAX, TUPLE_HEADER_BYTES, TupleFlags, TuplePlace},
    visibility_map::{self, ALL_BITS, ALL_FROZEN},
};

/// Kinds of records: `xl_info & 0x70`.
pub(crate) mod kind {
    pub const INSERT: u8 = 0x00;
    pub const DELETE: u8 = 0x10;
    pub const UPDATE: u8 = 0x20;
    pub const HOT_UPDATE: u8 = 0x40;
    pub const CONFIRM: u8 = 0x50;
    pub const LOCK: u8 = 0x60;
    pub const INPLACE: u8 = 0x70;
    pub const MASK: u8 = 0x70;
    /// The page is made anew (`XLOG_HEAP_INIT_PAGE`).
    pub const INIT_PAGE: u8 = 0x80;
}

mod insert_flags {
    pub const ALL_VISIBLE_CLEARED: u8 = 1 << 0;
}

mod update_flags {
    pub const OLD_ALL_VISIBLE_CLEARED: u8 = 1 << 0;
    pub const NEW_ALL_VISIBLE_CLEARED: u8 = 1 << 1;
    pub const PREFIX_FROM_OLD: u8 = 1 << 5;
    pub const SUFFIX_FROM_OLD: u8 = 1 << 6;
}

mod delete_flags {
    pub const ALL_VISIBLE_CLEARED: u8 = 1 << 0;
    pub const IS_SUPER: u8 = 1 << 3;
    pub const IS_PARTITION_MOVE: u8 = 1 << 4;
}

mod lock_flags {
    pub const ALL_FROZEN_CLEARED: u8 = 1 << 0;
}

/// Numbers of an update's block references.
const UPDATE_NEW: u8 = 0;
const UPDATE_OLD: u8 = 1;
const UPDATE_MAP_NEW: u8 = 2;
const UPDATE_MAP_OLD: u8 = 3;

/// Bits of the visibility map that a record of one heap block clears: its kinds other than update.
pub(crate) fn cleared_bits(record: &Record) -> Option<u8> {
    let data = record.main_data();
    let (flags_at, flag, bits) = match record.info.info & kind::MASK {
        kind::INSERT => (2, insert_flags::ALL_VISIBLE_CLEARED, ALL_BITS),
        kind::DELETE => (7, delete_flags::ALL_VISIBLE_CLEARED, ALL_BITS),
        kind::LOCK => (7, lock_flags::ALL_FROZEN_CLEARED, ALL_FROZEN),
        _ => return None,
    };
    (data.get(flags_at)? & flag != 0).then_some(bits)
}

/// Heap blocks whose bits an update clears: of the old row and of the new one.
pub(crate) fn update_cleared(record: &Record) -> [Option<u32>; 2] {
    let kind = record.info.info & kind::MASK;
    let Some(flags) = record.main_data().get(7).filter(|_| kind == kind::UPDATE || kind == kind::HOT_UPDATE) else {
        return [None; 2];
    };
    let block_of = |id| record.blocks.iter().find(|block| block.id == id).map(|block| block.block);
    let new = block_of(UPDATE_NEW);
    let old = block_of(UPDATE_OLD).or(new);
    [
        old.filter(|_| flags & update_flags::OLD_ALL_VISIBLE_CLEARED != 0),
        new.filter(|_| flags & update_flags::NEW_ALL_VISIBLE_CLEARED != 0),
    ]
}

/// `heap_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let kind = record.info.info & kind::MASK;
    match (kind, site.id) {
        (kind::INSERT, 0) => insert(record, site, page),
        (kind::DELETE, 0) => delete(record, site, page),
        (kind::LOCK, 0) => lock(record, site, page),
        (kind::INSERT | kind::DELETE | kind::LOCK, 1) => {
            let bits = cleared_bits(record).ok_or(RedoError::Record("it has a map's block but clears no bit"))?;
            clear_map(record, page, bits)
        }
        (kind::UPDATE, _) => update(record, site, page, false),
        (kind::HOT_UPDATE, _) => update(record, site, page, true),
        (kind::CONFIRM, 0) => confirm(record, site, page),
        (kind::INPLACE, 0) => inplace(record, site, page),
        // XLOG_HEAP_TRUNCATE is for logical decoding and has no blocks.
        _ => Err(RedoError::Record("it has a block that its kind does not have")),
    }
}

/// Clears the bits of the record's heap block in a registered page of the map (`heap_xlog_vm_clear`).
pub(crate) fn clear_map(record: &Record, map: &mut Page, bits: u8) -> Result<Outcome, RedoError> {
    let heap = record.blocks.first().filter(|block| block.id == 0);
    let heap = heap.ok_or(RedoError::Record("it has no heap block"))?;
    Ok(if visibility_map::clear(map, heap.block, bits) { Outcome::Changed } else { Outcome::Unchanged })
}

/// `xl_heap_header`.
fn tuple_flags(data: &mut Reader<'_>) -> Result<TupleFlags, RedoError> {
    Ok(TupleFlags { infomask2: data.u16()?, infomask: data.u16()?, hoff: data.u8()? })
}

/// Adds a row whose data are at hand (the common part of insert and multi-insert).
pub(crate) fn add_tuple(
    page: &mut Page,
    number: u16,
    flags: TupleFlags,
    data: &[u8],
    xmin: u32,
    block: u32,
) -> Result<(), RedoError> {
    let length = TUPLE_HEADER_BYTES + data.len();
    if length > TUPLE_BYTES_MAX {
        return Err(RedoError::Record("a row is too long"));
    }
    let place = page.place_heap_item(number, length)?;
    TuplePlace::new(place).write(page, flags, xmin, 0, (block, number));
    page.0[place + TUPLE_HEADER_BYTES..place + length].copy_from_slice(data);
    Ok(())
}

/// `heap_xlog_insert`.
fn insert(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let (number, flags) = (main.u16()?, main.u8()?);
    if record.info.info & kind::INIT_PAGE != 0 {
        page.init(0);
    }
    let mut data = Reader::new(site.data);
    let tuple = tuple_flags(&mut data)?;
    add_tuple(page, number, tuple, data.rest(), record.info.xid, site.block)?;
    if flags & insert_flags::ALL_VISIBLE_CLEARED != 0 {
        page.set_flag(page_flags::ALL_VISIBLE, false);
    }
    Ok(Outcome::Changed)
}

/// `PageSetPrunable`: the oldest transaction whose end may make a row of the page removable.
fn set_prunable(page: &mut Page, xid: u32) {
    let before = page.prune_xid();
    let both_normal = xid >= 3 && before >= 3;
    let precedes = if both_normal { (xid.wrapping_sub(before) as i32) < 0 } else { xid < before };
    if before == 0 || precedes {
        page.set_prune_xid(xid);
    }
}

/// `heap_xlog_delete`.
fn delete(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let (xmax, number, infobits, flags) = (main.u32()?, main.u16()?, main.u8()?, main.u8()?);
    let tuple = page.tuple(number)?;
    tuple.set_infobits(page, infobits);
    tuple.set_hot_updated(page, false);
    if flags & delete_flags::IS_SUPER == 0 {
        tuple.set_xmax(page, xmax);
    } else {
        tuple.set_xmin(page, 0);
    }
    tuple.clear_cmax(page);
    set_prunable(page, record.info.xid);
    if flags & delete_flags::ALL_VISIBLE_CLEARED != 0 {
        page.set_flag(page_flags::ALL_VISIBLE, false);
    }
    let moved = flags & delete_flags::IS_PARTITION_MOVE != 0;
    tuple.set_ctid(page, if moved { MOVED_PARTITIONS } else { (site.block, number) });
    Ok(Outcome::Changed)
}

/// `xl_heap_update`.
struct Update {
    old_xmax: u32,
    old_number: u16,
    old_infobits: u8,
    flags: u8,
    new_xmax: u32,
    new_number: u16,
    hot: bool,
    old_block: u32,
    new_block: u32,
}

/// `heap_xlog_update`, that part of it which concerns one of its up to four blocks.
fn update(record: &Record, site: Site<'_>, page: &mut Page, hot: bool) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let block_of = |id| record.blocks.iter().find(|block| block.id == id).map(|block| block.block);
    let new_block = block_of(UPDATE_NEW).ok_or(RedoError::Record("it has no block of the new row"))?;
    let update = Update {
        old_xmax: main.u32()?,
        old_number: main.u16()?,
        old_infobits: main.u8()?,
        flags: main.u8()?,
        new_xmax: main.u32()?,
        new_number: main.u16()?,
        hot,
        old_block: block_of(UPDATE_OLD).unwrap_or(new_block),
        new_block,
    };
    match site.id {
        UPDATE_NEW if block_of(UPDATE_OLD).is_none() => {
            let old = update.mark_old(record, page)?;
            update.add_new(record, site.data, page, Some(old))
        }
        UPDATE_NEW => {
            if record.info.info & kind::INIT_PAGE != 0 {
                page.init(0);
            }
            update.add_new(record, site.data, page, None)
        }
        UPDATE_OLD => update.mark_old(record, page).map(|_| Outcome::Changed),
        UPDATE_MAP_NEW | UPDATE_MAP_OLD => Ok(update.clear_map(site, page)),
        _ => Err(RedoError::Record("it has a block that its kind does not have")),
    }
}

impl Update {
    /// Ends the old row.
    fn mark_old(&self, record: &Record, page: &mut Page) -> Result<TuplePlace, RedoError> {
        let tuple = page.tuple(self.old_number)?;
        tuple.set_infobits(page, self.old_infobits);
        tuple.set_hot_updated(page, self.hot);
        tuple.set_xmax(page, self.old_xmax);
        tuple.clear_cmax(page);
        tuple.set_ctid(page, (self.new_block, self.new_number));
        set_prunable(page, record.info.xid);
        if self.flags & update_flags::OLD_ALL_VISIBLE_CLEARED != 0 {
            page.set_flag(page_flags::ALL_VISIBLE, false);
        }
        Ok(tuple)
    }

    /// Adds the new row. Its first and last bytes may be those of the old one, when that is in the same page.
    fn add_new(
        &self,
        record: &Record,
        data: &[u8],
        page: &mut Page,
        old: Option<TuplePlace>,
    ) -> Result<Outcome, RedoError> {
        let mut data = Reader::new(data);
        let prefix = if self.flags & update_flags::PREFIX_FROM_OLD != 0 { usize::from(data.u16()?) } else { 0 };
        let suffix = if self.flags & update_flags::SUFFIX_FROM_OLD != 0 { usize::from(data.u16()?) } else { 0 };
        let flags = tuple_flags(&mut data)?;
        // Between the header and the data are the null bitmap and padding. They come before the prefix.
        let bitmap_length = if prefix > 0 {
            usize::from(flags.hoff).checked_sub(TUPLE_HEADER_BYTES).ok_or(RedoError::Record("a row has no header"))?
        } else {
            0
        };
        let bitmap = data.take(bitmap_length)?;
        let rest = data.rest();
        let length = TUPLE_HEADER_BYTES + bitmap.len() + prefix + rest.len() + suffix;
        if length > TUPLE_BYTES_MAX {
            return Err(RedoError::Record("a row is too long"));
        }
        let (prefix_from, suffix_from) = match old {
            Some(old) if prefix + suffix > 0 => {
                let range = page.item_range(self.old_number)?;
                let prefix_from = old.start() + old.hoff(page);
                let suffix_from = range.end.saturating_sub(suffix);
                if prefix_from + prefix > range.end || suffix_from < range.start {
                    return Err(RedoError::Page("the old row is shorter than what the new one takes from it"));
                }
                (prefix_from, suffix_from)
            }
            None if prefix + suffix > 0 => return Err(RedoError::Record("a row takes bytes from another page")),
            _ => (0, 0),
        };

        let place = page.place_heap_item(self.new_number, length)?;
        let ctid = (self.new_block, self.new_number);
        TuplePlace::new(place).write(page, flags, record.info.xid, self.new_xmax, ctid);
        let mut at = place + TUPLE_HEADER_BYTES;
        page.0[at..at + bitmap.len()].copy_from_slice(bitmap);
        at += bitmap.len();
        page.0.copy_within(prefix_from..prefix_from + prefix, at);
        at += prefix;
        page.0[at..at + rest.len()].copy_from_slice(rest);
        at += rest.len();
        page.0.copy_within(suffix_from..suffix_from + suffix, at);
        if self.flags & update_flags::NEW_ALL_VISIBLE_CLEARED != 0 {
            page.set_flag(page_flags::ALL_VISIBLE, false);
        }
        Ok(Outcome::Changed)
    }

    /// Clears the bits of the old and the new block that this page of the map has. When both are in one page, only the
    /// new row's reference is there.
    fn clear_map(&self, site: Site<'_>, map: &mut Page) -> Outcome {
        let mut cleared = false;
        let old_cleared = self.flags & update_flags::OLD_ALL_VISIBLE_CLEARED != 0;
        if old_cleared && visibility_map::map_block(self.old_block) == site.block {
            cleared |= visibility_map::clear(map, self.old_block, ALL_BITS);
        }
        if site.id == UPDATE_MAP_NEW {
            cleared |= visibility_map::clear(map, self.new_block, ALL_BITS);
        }
        if cleared { Outcome::Changed } else { Outcome::Unchanged }
    }
}

/// `heap_xlog_confirm`: a row that was inserted on trial stays.
fn confirm(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let number = Reader::new(record.main_data()).u16()?;
    let tuple = page.tuple(number)?;
    tuple.set_ctid(page, (site.block, number));
    Ok(Outcome::Changed)
}

/// `heap_xlog_lock`.
fn lock(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let (xmax, number, infobits) = (main.u32()?, main.u16()?, main.u8()?);
    let tuple = page.tuple(number)?;
    tuple.set_infobits(page, infobits);
    if tuple.is_locked_only(page) {
        tuple.set_hot_updated(page, false);
        tuple.set_ctid(page, (site.block, number));
    }
    tuple.set_xmax(page, xmax);
    tuple.clear_cmax(page);
    Ok(Outcome::Changed)
}

/// `heap_xlog_inplace`: a row's data are overwritten by as many bytes.
fn inplace(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let number = Reader::new(record.main_data()).u16()?;
    let tuple = page.tuple(number)?;
    let range = page.item_range(number)?;
    let start = tuple.start() + tuple.hoff(page);
    if start + site.data.len() != range.end {
        return Err(RedoError::Page("the row has another length"));
    }
    page.0[start..range.end].copy_from_slice(site.data);
    Ok(Outcome::Changed)
}
