//! Resource manager Gin.
//!
//! Source: `access/ginxlog.h`, `access/ginblock.h`, `gin_redo` (`access/gin/ginxlog.c`). Read next: `gin_segments.rs`.

use wal::Record;

use crate::{
    Outcome, RedoError, gin_segments, index_tuple,
    page::{HEADER_BYTES, Page},
    reader::Reader,
    touch::Site,
};

/// Kinds of records: `xl_info & 0xF0`.
mod kind {
    pub const CREATE_POSTING_TREE: u8 = 0x10;
    pub const INSERT: u8 = 0x20;
    pub const SPLIT: u8 = 0x30;
    pub const DELETE_PAGE: u8 = 0x50;
    pub const UPDATE_META_PAGE: u8 = 0x60;
    pub const INSERT_LIST_PAGE: u8 = 0x70;
    pub const DELETE_LIST_PAGE: u8 = 0x80;
    pub const VACUUM_DATA_LEAF_PAGE: u8 = 0x90;
}

/// Flags of a page.
pub(crate) mod flags {
    pub const DATA: u16 = 1 << 0;
    pub const LEAF: u16 = 1 << 1;
    pub const DELETED: u16 = 1 << 2;
    pub const META: u16 = 1 << 3;
    pub const LIST: u16 = 1 << 4;
    pub const LIST_FULL_ROW: u16 = 1 << 5;
    pub const INCOMPLETE_SPLIT: u16 = 1 << 6;
    pub const COMPRESSED: u16 = 1 << 7;
}

const INSERT_IS_DATA: u16 = 0x01;
const INSERT_IS_LEAF: u16 = 0x02;

const OPAQUE_BYTES: usize = 8;
const NO_BLOCK: u32 = u32::MAX;
/// Bytes of the first page's contents (`GinMetaPageData`).
const META_BYTES: usize = 56;
/// Bytes of an entry of an inner page of a posting tree (`PostingItem`): a block number and a row.
const POSTING_ITEM_BYTES: usize = 10;
/// Where the data of a page of a posting tree begin: behind its right bound.
pub(crate) const DATA_START: usize = HEADER_BYTES + 8;

/// The access method's part of a page (`GinPageOpaqueData`).
#[derive(Clone, Copy)]
pub(crate) struct Opaque(usize);

impl Opaque {
    pub fn of(page: &Page) -> Result<Opaque, RedoError> {
        page.special_of(OPAQUE_BYTES).map(Opaque)
    }

    /// Makes the page anew (`GinInitPage`).
    fn init(page: &mut Page, flags: u16) -> Opaque {
        page.init(OPAQUE_BYTES);
        let opaque = Opaque(page.special());
        opaque.set_right(page, NO_BLOCK);
        page.set_u16(opaque.0 + 6, flags);
        opaque
    }

    fn set_right(self, page: &mut Page, block: u32) {
        page.set_u32(self.0, block);
    }

    /// Entries of an inner page of a posting tree, or rows of a page of the pending list.
    pub fn count(self, page: &Page) -> u16 {
        page.u16(self.0 + 4)
    }

    pub fn set_count(self, page: &mut Page, count: u16) {
        page.set_u16(self.0 + 4, count);
    }

    pub fn flags(self, page: &Page) -> u16 {
        page.u16(self.0 + 6)
    }

    pub fn set_flag(self, page: &mut Page, flag: u16, on: bool) {
        let flags = self.flags(page);
        page.set_u16(self.0 + 6, if on { flags | flag } else { flags & !flag });
    }
}

/// `gin_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    match (record.info.info & 0xF0, site.id) {
        (kind::CREATE_POSTING_TREE, 0) => {
            let size = main.u32()? as usize;
            let segments = main.take(size)?;
            Opaque::init(page, flags::DATA | flags::LEAF | flags::COMPRESSED);
            set_data(page, segments)?;
        }
        (kind::INSERT, 0) => insert(main, site.data, page)?,
        (kind::INSERT, 1) | (kind::SPLIT, 3) => Opaque::of(page)?.set_flag(page, flags::INCOMPLETE_SPLIT, false),
        (kind::VACUUM_DATA_LEAF_PAGE, 0) => gin_segments::recompress(page, site.data)?,
        (kind::DELETE_PAGE, _) => delete_page(main, site.id, page)?,
        (kind::UPDATE_META_PAGE, 0) => {
            // The relation's name and padding.
            main.skip(16)?;
            restore_meta(main, page)?;
        }
        (kind::UPDATE_META_PAGE, 1) => {
            main.skip(16 + META_BYTES + 4)?;
            let (right, tuples) = (main.u32()?, main.u32()? as i32);
            let opaque = Opaque::of(page)?;
            if tuples > 0 {
                append_entries(page, site.data)?;
                opaque.set_count(page, opaque.count(page).wrapping_add(1));
            } else {
                opaque.set_right(page, right);
            }
        }
        (kind::INSERT_LIST_PAGE, 0) => {
            let right = main.u32()?;
            let opaque = Opaque::init(page, flags::LIST);
            opaque.set_right(page, right);
            // The last page of a list has the rest of one row.
            if right == NO_BLOCK {
                opaque.set_flag(page, flags::LIST_FULL_ROW, true);
                opaque.set_count(page, 1);
            }
            append_entries(page, site.data)?;
        }
        (kind::DELETE_LIST_PAGE, 0) => restore_meta(main, page)?,
        (kind::DELETE_LIST_PAGE, _) => drop(Opaque::init(page, flags::DELETED)),
        // XLOG_GIN_SPLIT and XLOG_GIN_VACUUM_PAGE always carry their pages.
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(Outcome::Changed)
}

/// The first page of the index is written whole.
fn restore_meta(mut main: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    let contents = main.take(META_BYTES)?;
    Opaque::init(page, flags::META);
    page.0[HEADER_BYTES..HEADER_BYTES + META_BYTES].copy_from_slice(contents);
    page.set_lower(HEADER_BYTES + META_BYTES);
    Ok(())
}

/// Fills a page of a posting tree.
fn set_data(page: &mut Page, data: &[u8]) -> Result<(), RedoError> {
    let end = DATA_START + data.len();
    if end > page.special() {
        return Err(RedoError::Record("its data are longer than a page"));
    }
    page.0[DATA_START..end].copy_from_slice(data);
    page.set_lower(end);
    Ok(())
}

/// Adds all entries of the data.
fn append_entries(page: &mut Page, data: &[u8]) -> Result<(), RedoError> {
    let mut data = Reader::new(data);
    while !data.rest().is_empty() {
        let size = index_tuple::size(data.rest()).ok_or(RedoError::Record("an entry is broken"))?;
        page.append_item(data.take(size)?)?;
    }
    Ok(())
}

/// `BlockIdData`: the upper half comes first.
fn block_id(data: &mut Reader<'_>) -> Result<u32, RedoError> {
    Ok(u32::from(data.u16()?) << 16 | u32::from(data.u16()?))
}

/// `ginRedoInsert`.
fn insert(mut main: Reader<'_>, data: &[u8], page: &mut Page) -> Result<(), RedoError> {
    let flags = main.u16()?;
    let right_child = if flags & INSERT_IS_LEAF == 0 {
        block_id(&mut main)?;
        Some(block_id(&mut main)?)
    } else {
        None
    };
    match (flags & INSERT_IS_DATA != 0, right_child) {
        (false, right_child) => insert_entry(data, right_child, page),
        (true, None) => gin_segments::recompress(page, data),
        (true, Some(right_child)) => insert_posting_item(data, right_child, page),
    }
}

/// `ginRedoInsertEntry`.
fn insert_entry(data: &[u8], right_child: Option<u32>, page: &mut Page) -> Result<(), RedoError> {
    let mut data = Reader::new(data);
    let (number, is_delete, _padding) = (data.u16()?, data.u8()? != 0, data.u8()?);
    Opaque::of(page)?;
    if let Some(block) = right_child {
        let range = page.item_range(number)?;
        let entry = page.0[range].get_mut(..index_tuple::INDEX_TUPLE_BYTES);
        let entry = entry.ok_or(RedoError::Page("an entry is broken"))?;
        index_tuple::set_block(entry, block);
        index_tuple::set_offset(entry, 0);
    }
    if is_delete {
        page.delete_item(number)?;
    }
    let size = index_tuple::size(data.rest()).ok_or(RedoError::Record("an entry is broken"))?;
    page.insert_item(number, data.take(size)?)
}

/// Place of an entry of an inner page of a posting tree that has `count` of them.
fn posting_item_place(page: &Page, number: u16, count: u16) -> Result<usize, RedoError> {
    let end = DATA_START + usize::from(count) * POSTING_ITEM_BYTES;
    if number == 0 || number > count || end > page.special() {
        return Err(RedoError::Page("it has no entry of that number"));
    }
    Ok(DATA_START + (usize::from(number) - 1) * POSTING_ITEM_BYTES)
}

fn set_posting_items(page: &mut Page, opaque: Opaque, count: u16) {
    opaque.set_count(page, count);
    page.set_lower(DATA_START + usize::from(count) * POSTING_ITEM_BYTES);
}

/// `ginRedoInsertData` above the leaves: the entry that is there leads to the right half of what was split, and a new one
/// in front of it to the left half.
fn insert_posting_item(data: &[u8], right_child: u32, page: &mut Page) -> Result<(), RedoError> {
    let mut data = Reader::new(data);
    let number = data.u16()?;
    let item = data.take(POSTING_ITEM_BYTES)?;
    let opaque = Opaque::of(page)?;
    let count = opaque.count(page);
    let at = posting_item_place(page, number, count)?;
    page.set_u16(at, (right_child >> 16) as u16);
    page.set_u16(at + 2, right_child as u16);
    let count = count.checked_add(1).ok_or(RedoError::Page("it has too many entries"))?;
    posting_item_place(page, number, count)?;
    let end = DATA_START + usize::from(count - 1) * POSTING_ITEM_BYTES;
    page.0.copy_within(at..end, at + POSTING_ITEM_BYTES);
    page.0[at..at + POSTING_ITEM_BYTES].copy_from_slice(item);
    set_posting_items(page, opaque, count);
    Ok(())
}

/// `ginRedoDeletePage`: blocks are the page, its parent, and its left neighbour.
fn delete_page(mut main: Reader<'_>, id: u8, page: &mut Page) -> Result<(), RedoError> {
    let (number, _padding, right, xid) = (main.u16()?, main.u16()?, main.u32()?, main.u32()?);
    let opaque = Opaque::of(page)?;
    match id {
        0 => {
            opaque.set_flag(page, flags::DELETED, true);
            page.set_prune_xid(xid);
        }
        1 => {
            let count = opaque.count(page);
            let at = posting_item_place(page, number, count)?;
            let end = DATA_START + usize::from(count) * POSTING_ITEM_BYTES;
            page.0.copy_within(at + POSTING_ITEM_BYTES..end, at);
            set_posting_items(page, opaque, count - 1);
        }
        2 => opaque.set_right(page, right),
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(())
}
