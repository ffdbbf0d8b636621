//! Entries of a B-tree that list many rows of one key (posting lists).
//!
//! Source: `access/nbtree/nbtdedup.c`, `access/nbtree.h`.

use core::ops::Range;

use crate::{
    RedoError,
    index_tuple::{self, ALT_TID, INDEX_TUPLE_BYTES, TID_BYTES},
    page::{Page, align8},
    reader::U16s,
};

/// Longest entry of a leaf (`BTMaxItemSizeNoHeapTid`).
const ENTRY_BYTES_MAX: usize = 2712;
/// Set in the offset number of a posting list, which is otherwise the number of rows (`BT_IS_POSTING`).
const IS_POSTING: u16 = 0x2000;
const COUNT_MASK: u16 = 0x0FFF;

const BROKEN: RedoError = RedoError::Page("an entry is broken");

/// The key's length and the list of rows of an entry; an entry of one row has its address in front of the key.
fn parts(entry: &[u8]) -> Result<(usize, Range<usize>), RedoError> {
    let size = index_tuple::size(entry).filter(|size| *size <= entry.len()).ok_or(BROKEN)?;
    let posting = index_tuple::offset(entry).filter(|offset| offset & IS_POSTING != 0);
    let is_alternative = index_tuple::info(entry).is_some_and(|info| info & ALT_TID != 0);
    let Some(count) = posting.filter(|_| is_alternative) else { return Ok((size, 0..TID_BYTES)) };
    let start = index_tuple::block(entry).ok_or(BROKEN)? as usize;
    let length = usize::from(count & COUNT_MASK) * TID_BYTES;
    if start < INDEX_TUPLE_BYTES || start > size || start + length > size || length == 0 {
        return Err(BROKEN);
    }
    Ok((start, start..start + length))
}

/// Length of an entry that lists `count` rows.
fn posting_size(key_size: usize, count: usize) -> usize {
    if count > 1 { align8(key_size + count * TID_BYTES) } else { key_size }
}

/// Writes an entry of `key` that lists `tids` into a place of [`posting_size`] (`_bt_form_posting`).
fn write(entry: &mut [u8], key: &[u8], tids: &[u8]) -> Result<(), RedoError> {
    let count = tids.len() / TID_BYTES;
    if key.len() < INDEX_TUPLE_BYTES || count == 0 || count > usize::from(COUNT_MASK) {
        return Err(BROKEN);
    }
    entry.fill(0);
    entry[..key.len()].copy_from_slice(key);
    let info = index_tuple::info_with_size(index_tuple::info(key).ok_or(BROKEN)?, entry.len());
    if count > 1 {
        index_tuple::set_info(entry, info | ALT_TID);
        index_tuple::set_block(entry, key.len() as u32);
        index_tuple::set_offset(entry, count as u16 | IS_POSTING);
        entry[key.len()..key.len() + tids.len()].copy_from_slice(tids);
    } else {
        index_tuple::set_info(entry, info & !ALT_TID);
        entry[..TID_BYTES].copy_from_slice(tids);
    }
    Ok(())
}

/// Puts a row into the middle of a posting list, and takes its last one out (`_bt_swap_posting`).
///
/// Returns the row that was taken out.
pub(crate) fn swap(page: &mut Page, number: u16, position: u16, tid: &[u8]) -> Result<[u8; TID_BYTES], RedoError> {
    let range = page.item_range(number)?;
    let entry = &mut page.0[range];
    let (_, list) = parts(entry)?;
    let at = list.start + usize::from(position) * TID_BYTES;
    let last = list.end - TID_BYTES;
    if position == 0 || list.start == 0 || at > last || tid.len() < TID_BYTES {
        return Err(RedoError::Page("a posting list cannot be split there"));
    }
    let mut taken = [0; TID_BYTES];
    taken.copy_from_slice(&entry[last..list.end]);
    entry.copy_within(at..last, at + TID_BYTES);
    entry[at..at + TID_BYTES].copy_from_slice(&tid[..TID_BYTES]);
    Ok(taken)
}

/// Takes rows out of a posting list by their positions, which ascend (`_bt_update_posting`).
pub(crate) fn remove(page: &mut Page, number: u16, positions: U16s<'_>) -> Result<(), RedoError> {
    let mut buffer = [0; ENTRY_BYTES_MAX];
    let mut tids = [0; ENTRY_BYTES_MAX];
    let entry = page.item(number)?;
    let (key_size, list) = parts(entry)?;
    let (mut next, mut length) = (0, 0);
    for (position, tid) in entry[list].chunks_exact(TID_BYTES).enumerate() {
        if positions.get(next).is_some_and(|removed| usize::from(removed) == position) {
            next += 1;
            continue;
        }
        tids.get_mut(length..length + TID_BYTES).ok_or(BROKEN)?.copy_from_slice(tid);
        length += TID_BYTES;
    }
    if next != positions.len() || length == 0 {
        return Err(RedoError::Record("it removes rows that a posting list does not have"));
    }
    let updated = buffer.get_mut(..posting_size(key_size, length / TID_BYTES)).ok_or(BROKEN)?;
    write(updated, &entry[..key_size], &tids[..length])?;
    page.overwrite_item(number, updated)
}

/// Entries of one key that are about to become one.
pub(crate) struct Pending {
    tids: [u8; ENTRY_BYTES_MAX],
    length: usize,
    /// The first one's number.
    pub base: u16,
    /// How many.
    pub items: u16,
}

impl Pending {
    pub fn new() -> Pending {
        Pending { tids: [0; ENTRY_BYTES_MAX], length: 0, base: 0, items: 0 }
    }

    /// Begins with an entry of `from`.
    pub fn start(&mut self, from: &Page, number: u16) -> Result<(), RedoError> {
        self.length = 0;
        self.base = number;
        self.items = 0;
        self.add(from, number)
    }

    /// Adds the rows of an entry.
    pub fn add(&mut self, from: &Page, number: u16) -> Result<(), RedoError> {
        let entry = from.item(number)?;
        let (_, list) = parts(entry)?;
        let end = self.length + list.len();
        let place = self.tids.get_mut(self.length..end).ok_or(RedoError::Page("a posting list would be too long"))?;
        place.copy_from_slice(&entry[list]);
        self.length = end;
        self.items += 1;
        Ok(())
    }

    /// Adds what came together to the page `to` (`_bt_dedup_finish_pending`).
    pub fn finish(&self, from: &Page, to: &mut Page) -> Result<(), RedoError> {
        let base = from.item(self.base)?;
        let (key_size, _) = parts(base)?;
        if self.items == 1 {
            let size = index_tuple::size(base).ok_or(BROKEN)?;
            return to.append_item(&base[..size]);
        }
        let tids = &self.tids[..self.length];
        let size = posting_size(key_size, tids.len() / TID_BYTES);
        let place = to.append_place(size)?;
        write(&mut to.0[place..place + size], &base[..key_size], tids)
    }
}
