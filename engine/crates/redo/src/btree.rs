//! Resource manager Btree.
//!
//! Source: `access/nbtxlog.h`, `access/nbtree.h`, `btree_redo` (`access/nbtree/nbtxlog.c`). Read next: `posting.rs`.

use wal::Record;

use crate::{
    Outcome, RedoError,
    index_tuple::{self, ALT_TID, INDEX_TUPLE_BYTES, TID_BYTES},
    page::{HEADER_BYTES, INDEX_ITEMS_MAX, Page, align8},
    posting::{self, Pending},
    reader::Reader,
    touch::Site,
};

/// Kinds of records: `xl_info & 0xF0`.
mod kind {
    pub const INSERT_LEAF: u8 = 0x00;
    pub const INSERT_UPPER: u8 = 0x10;
    pub const INSERT_META: u8 = 0x20;
    pub const SPLIT_LEFT: u8 = 0x30;
    pub const SPLIT_RIGHT: u8 = 0x40;
    pub const INSERT_POST: u8 = 0x50;
    pub const DEDUP: u8 = 0x60;
    pub const DELETE: u8 = 0x70;
    pub const UNLINK_PAGE: u8 = 0x80;
    pub const UNLINK_PAGE_META: u8 = 0x90;
    pub const NEW_ROOT: u8 = 0xA0;
    pub const MARK_PAGE_HALFDEAD: u8 = 0xB0;
    pub const VACUUM: u8 = 0xC0;
    pub const META_CLEANUP: u8 = 0xE0;
}

/// Flags of a page (`btpo_flags`).
pub(crate) mod flags {
    pub const LEAF: u16 = 1 << 0;
    pub const ROOT: u16 = 1 << 1;
    pub const DELETED: u16 = 1 << 2;
    pub const META: u16 = 1 << 3;
    pub const HALF_DEAD: u16 = 1 << 4;
    pub const SPLIT_END: u16 = 1 << 5;
    pub const HAS_GARBAGE: u16 = 1 << 6;
    pub const INCOMPLETE_SPLIT: u16 = 1 << 7;
    pub const HAS_FULL_XID: u16 = 1 << 8;
}

/// Bytes of the access method's part of a page (`BTPageOpaqueData`).
const OPAQUE_BYTES: usize = 16;
/// No block (`P_NONE`).
const NONE: u32 = 0;
/// The line pointer of the upper bound, on pages that have a right sibling (`P_HIKEY`).
const HIGH_KEY: u16 = 1;

const MAGIC: u32 = 0x0005_3162;

/// The access method's part of a page.
#[derive(Clone, Copy)]
pub(crate) struct Opaque(usize);

impl Opaque {
    pub fn of(page: &Page) -> Result<Opaque, RedoError> {
        page.special_of(OPAQUE_BYTES).map(Opaque)
    }

    /// Makes the page anew (`_bt_pageinit`).
    fn init(page: &mut Page, prev: u32, next: u32, level: u32, flags: u16) -> Opaque {
        page.init(OPAQUE_BYTES);
        let opaque = Opaque(page.special());
        opaque.set_prev(page, prev);
        opaque.set_next(page, next);
        page.set_u32(opaque.0 + 8, level);
        opaque.set_flags(page, flags);
        opaque
    }

    fn set_prev(self, page: &mut Page, block: u32) {
        page.set_u32(self.0, block);
    }

    fn next(self, page: &Page) -> u32 {
        page.u32(self.0 + 4)
    }

    fn set_next(self, page: &mut Page, block: u32) {
        page.set_u32(self.0 + 4, block);
    }

    pub fn flags(self, page: &Page) -> u16 {
        page.u16(self.0 + 12)
    }

    pub fn set_flags(self, page: &mut Page, flags: u16) {
        page.set_u16(self.0 + 12, flags);
    }

    pub fn set_cycle_id(self, page: &mut Page, id: u16) {
        page.set_u16(self.0 + 14, id);
    }

    fn clear_flag(self, page: &mut Page, flag: u16) {
        let flags = self.flags(page);
        self.set_flags(page, flags & !flag);
    }

    /// Number of the first entry behind the upper bound (`P_FIRSTDATAKEY`).
    fn first_entry(self, page: &Page) -> u16 {
        if self.next(page) == NONE { HIGH_KEY } else { HIGH_KEY + 1 }
    }
}

/// `btree_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let main = Reader::new(record.main_data());
    match (record.info.info & 0xF0, site.id) {
        (kind::INSERT_LEAF | kind::INSERT_UPPER | kind::INSERT_META, 0) => insert(main, site.data, page),
        (kind::INSERT_UPPER | kind::INSERT_META, 1) => clear_incomplete_split(page),
        (kind::INSERT_META, 2) => restore_meta(site.data, page),
        (kind::INSERT_POST, 0) => insert_into_posting(main, site.data, page),
        (kind::SPLIT_LEFT, _) => split(record, site, page, true),
        (kind::SPLIT_RIGHT, _) => split(record, site, page, false),
        (kind::DEDUP, 0) => dedup(main, site.data, page),
        (kind::VACUUM, 0) => remove(main, site.data, page),
        (kind::DELETE, 0) => {
            let mut main = main;
            main.skip(4)?;
            remove(main, site.data, page)
        }
        (kind::MARK_PAGE_HALFDEAD, _) => mark_half_dead(main, site, page),
        (kind::UNLINK_PAGE | kind::UNLINK_PAGE_META, 0..=3) => unlink(main, site, page),
        (kind::UNLINK_PAGE_META, 4) => restore_meta(site.data, page),
        (kind::NEW_ROOT, 0) => new_root(main, site, page),
        (kind::NEW_ROOT, 1) => clear_incomplete_split(page),
        (kind::NEW_ROOT, 2) => restore_meta(site.data, page),
        (kind::META_CLEANUP, 0) => restore_meta(site.data, page),
        // XLOG_BTREE_REUSE_PAGE only cancels queries of a standby and has no blocks.
        _ => Err(RedoError::Record("it has a block that its kind does not have")),
    }
}

/// `_bt_clear_incomplete_split`.
fn clear_incomplete_split(page: &mut Page) -> Result<Outcome, RedoError> {
    Opaque::of(page)?.clear_flag(page, flags::INCOMPLETE_SPLIT);
    Ok(Outcome::Changed)
}

/// `_bt_restore_meta`.
fn restore_meta(data: &[u8], page: &mut Page) -> Result<Outcome, RedoError> {
    let mut data = Reader::new(data);
    Opaque::init(page, 0, 0, 0, flags::META);
    page.set_u32(HEADER_BYTES, MAGIC);
    // Version, root, level, fast root, its level, deleted pages at the last cleanup.
    for field in 0..6 {
        page.set_u32(HEADER_BYTES + 4 + 4 * field, data.u32()?);
    }
    page.set_u64(HEADER_BYTES + 32, (-1.0f64).to_bits());
    page.0[HEADER_BYTES + 40] = data.u8()?;
    page.set_lower(HEADER_BYTES + 48);
    Ok(Outcome::Changed)
}

/// `btree_xlog_insert`.
fn insert(mut main: Reader<'_>, data: &[u8], page: &mut Page) -> Result<Outcome, RedoError> {
    page.insert_item(main.u16()?, data)?;
    Ok(Outcome::Changed)
}

/// `btree_xlog_insert` of a row that falls into the middle of a posting list: it goes into the list, and the list's
/// last row becomes the new entry.
fn insert_into_posting(mut main: Reader<'_>, data: &[u8], page: &mut Page) -> Result<Outcome, RedoError> {
    let number = main.u16()?;
    let mut data = Reader::new(data);
    let position = data.u16()?;
    let list = number.checked_sub(1).ok_or(RedoError::Record("an entry has no number"))?;
    Opaque::of(page)?;
    let taken = posting::swap(page, list, position, data.rest())?;
    page.insert_item(number, data.rest())?;
    set_tid(page, number, taken)?;
    Ok(Outcome::Changed)
}

fn set_tid(page: &mut Page, number: u16, tid: [u8; TID_BYTES]) -> Result<(), RedoError> {
    let start = page.item_range(number)?.start;
    page.0.get_mut(start..start + TID_BYTES).ok_or(RedoError::Page("an entry is broken"))?.copy_from_slice(&tid);
    Ok(())
}

/// Takes an entry off the front, padded as in the page.
fn take_entry<'a>(data: &mut Reader<'a>) -> Result<&'a [u8], RedoError> {
    let size = index_tuple::size(data.rest()).ok_or(RedoError::Record("an entry is broken"))?;
    data.take(align8(size))
}

/// Adds entries that are stored from the last to the first (`_bt_restore_page`).
fn restore_entries(page: &mut Page, data: &[u8]) -> Result<(), RedoError> {
    let mut starts = [0u16; INDEX_ITEMS_MAX];
    let mut count = 0;
    let mut rest = Reader::new(data);
    while !rest.rest().is_empty() {
        let start = data.len() - rest.rest().len();
        *starts.get_mut(count).ok_or(RedoError::Record("it has more entries than a page"))? = start as u16;
        count += 1;
        take_entry(&mut rest)?;
    }
    let mut end = data.len();
    for start in starts[..count].iter().rev().map(|start| usize::from(*start)) {
        page.append_item(&data[start..end])?;
        end = start;
    }
    Ok(())
}

/// `xl_btree_split`.
#[derive(Clone, Copy)]
struct Split {
    level: u32,
    first_right: u16,
    new_item: u16,
    posting_position: u16,
    new_item_left: bool,
}

/// `btree_xlog_split`: blocks are the old (left) page, the new right one, the one behind it, and, above leaves, the
/// child whose split this one completes.
fn split(record: &Record, site: Site<'_>, page: &mut Page, new_item_left: bool) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let split = Split {
        level: main.u32()?,
        first_right: main.u16()?,
        new_item: main.u16()?,
        posting_position: main.u16()?,
        new_item_left,
    };
    let block_of = |id| record.blocks.iter().find(|block| block.id == id).map(|block| block.block);
    let (left, right) = block_of(0).zip(block_of(1)).ok_or(RedoError::Record("a split has less than two pages"))?;
    match site.id {
        0 => split_left(split, site.data, right, page)?,
        1 => {
            let leaf = if split.level == 0 { flags::LEAF } else { 0 };
            Opaque::init(page, left, block_of(2).unwrap_or(NONE), split.level, leaf);
            restore_entries(page, site.data)?;
        }
        2 => Opaque::of(page)?.set_prev(page, right),
        3 => return clear_incomplete_split(page),
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(Outcome::Changed)
}

/// Rebuilds the left page without the entries that went right.
fn split_left(split: Split, data: &[u8], right: u32, page: &mut Page) -> Result<(), RedoError> {
    let opaque = Opaque::of(page)?;
    let mut data = Reader::new(data);
    let new_entry = if split.new_item_left || split.posting_position != 0 { take_entry(&mut data)? } else { &[] };
    let high_key = take_entry(&mut data)?;
    data.finish()?;

    let old = page.clone();
    let first = opaque.first_entry(&old);
    page.init(OPAQUE_BYTES);
    page.0[opaque.0..].copy_from_slice(&old.0[opaque.0..]);
    page.append_item(high_key)?;
    // The list that the new row falls into is in front of the new entry.
    let mut taken = None;
    let list = if split.posting_position != 0 { split.new_item.checked_sub(1) } else { None };
    for number in first..split.first_right {
        if split.new_item_left && number == split.new_item {
            add_new_entry(page, new_entry, taken)?;
        }
        page.append_item(old.item(number)?)?;
        if list == Some(number) {
            taken = Some(posting::swap(page, page.item_count(), split.posting_position, new_entry)?);
        }
    }
    if split.new_item_left && split.new_item >= split.first_right.max(first) {
        add_new_entry(page, new_entry, taken)?;
    }
    let leaf = if split.level == 0 { flags::LEAF } else { 0 };
    opaque.set_flags(page, flags::INCOMPLETE_SPLIT | leaf);
    opaque.set_next(page, right);
    opaque.set_cycle_id(page, 0);
    Ok(())
}

fn add_new_entry(page: &mut Page, entry: &[u8], tid: Option<[u8; TID_BYTES]>) -> Result<(), RedoError> {
    page.append_item(entry)?;
    tid.map_or(Ok(()), |tid| set_tid(page, page.item_count(), tid))
}

/// `btree_xlog_dedup`: runs of entries of one key become posting lists.
fn dedup(mut main: Reader<'_>, data: &[u8], page: &mut Page) -> Result<Outcome, RedoError> {
    let mut data = Reader::new(data);
    let intervals = data.u16s(usize::from(main.u16()?) * 2)?;
    let opaque = Opaque::of(page)?;
    let old = page.clone();
    page.init(OPAQUE_BYTES);
    page.0[opaque.0..].copy_from_slice(&old.0[opaque.0..]);
    let first = opaque.first_entry(&old);
    if first > HIGH_KEY {
        page.append_item(old.item(HIGH_KEY)?)?;
    }
    let mut pending = Pending::new();
    let mut interval = 0;
    for number in first..=old.item_count() {
        let (base, items) = (intervals.get(2 * interval), intervals.get(2 * interval + 1));
        if number == first {
            pending.start(&old, number)?;
        } else if base == Some(pending.base) && items.is_some_and(|items| pending.items < items) {
            pending.add(&old, number)?;
        } else {
            pending.finish(&old, page)?;
            interval += usize::from(pending.items > 1);
            pending.start(&old, number)?;
        }
    }
    if pending.items > 0 {
        pending.finish(&old, page)?;
    }
    opaque.clear_flag(page, flags::HAS_GARBAGE);
    Ok(Outcome::Changed)
}

/// `btree_xlog_vacuum` and `btree_xlog_delete`: first rows out of posting lists, then whole entries.
fn remove(mut main: Reader<'_>, data: &[u8], page: &mut Page) -> Result<Outcome, RedoError> {
    let (deleted, updated) = (main.u16()?, main.u16()?);
    let mut data = Reader::new(data);
    let deleted = data.u16s(usize::from(deleted))?;
    let updated = data.u16s(usize::from(updated))?;
    let opaque = Opaque::of(page)?;
    for number in updated.iter() {
        let count = usize::from(data.u16()?);
        posting::remove(page, number, data.u16s(count)?)?;
    }
    if deleted.len() > 0 {
        page.delete_items(deleted)?;
    }
    opaque.clear_flag(page, flags::HAS_GARBAGE);
    Ok(Outcome::Changed)
}

/// The only entry of a page that is about to leave the tree: it leads to the top of the branch that goes with it.
fn add_top_parent(page: &mut Page, top_parent: u32) -> Result<(), RedoError> {
    let mut entry = [0; INDEX_TUPLE_BYTES];
    index_tuple::set_block(&mut entry, top_parent);
    index_tuple::set_info(&mut entry, INDEX_TUPLE_BYTES as u16 | ALT_TID);
    page.append_item(&entry)
}

/// `btree_xlog_mark_page_halfdead`.
fn mark_half_dead(mut main: Reader<'_>, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let number = main.u16()?;
    main.skip(2)?;
    let (_leaf, left, right, top_parent) = (main.u32()?, main.u32()?, main.u32()?, main.u32()?);
    match site.id {
        0 => {
            Opaque::init(page, left, right, 0, flags::HALF_DEAD | flags::LEAF);
            add_top_parent(page, top_parent)?;
        }
        1 => {
            Opaque::of(page)?;
            let next = number.checked_add(1).ok_or(RedoError::Record("an entry has no number"))?;
            let broken = RedoError::Page("an entry is broken");
            let downlink = index_tuple::block(page.item(next)?).ok_or(broken)?;
            let range = page.item_range(number)?;
            let entry = page.0[range].get_mut(..INDEX_TUPLE_BYTES).ok_or(broken)?;
            index_tuple::set_block(entry, downlink);
            page.delete_item(next)?;
        }
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(Outcome::Changed)
}

/// `btree_xlog_unlink_page`.
fn unlink(mut main: Reader<'_>, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let (left, right, level) = (main.u32()?, main.u32()?, main.u32()?);
    main.skip(4)?;
    let (safe_xid_low, safe_xid_high) = (main.u32()?, main.u32()?);
    let (leaf_left, leaf_right, leaf_top_parent) = (main.u32()?, main.u32()?, main.u32()?);
    match site.id {
        0 => {
            let leaf = if level == 0 { flags::LEAF } else { 0 };
            Opaque::init(page, left, right, level, flags::DELETED | flags::HAS_FULL_XID | leaf);
            page.set_u32(HEADER_BYTES, safe_xid_low);
            page.set_u32(HEADER_BYTES + 4, safe_xid_high);
            page.set_lower(HEADER_BYTES + 8);
        }
        1 => Opaque::of(page)?.set_next(page, right),
        2 => Opaque::of(page)?.set_prev(page, left),
        _ => {
            Opaque::init(page, leaf_left, leaf_right, 0, flags::HALF_DEAD | flags::LEAF);
            add_top_parent(page, leaf_top_parent)?;
        }
    }
    Ok(Outcome::Changed)
}

/// `btree_xlog_newroot`.
fn new_root(mut main: Reader<'_>, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let (_root, level) = (main.u32()?, main.u32()?);
    let leaf = if level == 0 { flags::LEAF } else { 0 };
    Opaque::init(page, NONE, NONE, level, flags::ROOT | leaf);
    if level > 0 {
        restore_entries(page, site.data)?;
    }
    Ok(Outcome::Changed)
}
