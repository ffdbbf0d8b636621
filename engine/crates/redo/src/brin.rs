//! Resource manager BRIN.
//!
//! Source: `access/brin_xlog.h`, `access/brin_page.h`, `brin_redo` (`access/brin/brin_xlog.c`).

use wal::Record;

use crate::{
    Outcome, RedoError,
    page::{HEADER_BYTES, PAGE_BYTES, Page},
    reader::Reader,
    touch::Site,
};

/// Kinds of records: `xl_info & 0x70`.
mod kind {
    pub const CREATE_INDEX: u8 = 0x00;
    pub const INSERT: u8 = 0x10;
    pub const UPDATE: u8 = 0x20;
    pub const SAME_PAGE_UPDATE: u8 = 0x30;
    pub const REVMAP_EXTEND: u8 = 0x40;
    pub const DESUMMARIZE: u8 = 0x50;
    pub const MASK: u8 = 0x70;
    /// The page is made anew (`XLOG_BRIN_INIT_PAGE`).
    pub const INIT_PAGE: u8 = 0x80;
}

/// What a page is: the last two bytes of it.
pub(crate) mod page_type {
    pub const META: u16 = 0xF091;
    pub const REVMAP: u16 = 0xF092;
    pub const REGULAR: u16 = 0xF093;
}

/// Bytes of the access method's part of a page (`BrinSpecialSpace`).
const SPECIAL_BYTES: usize = 8;
/// Place of the page's flags (`BrinPageFlags`), which are hints.
pub(crate) const FLAGS: usize = PAGE_BYTES - 4;
/// Place of the page's type (`BrinPageType`).
pub(crate) const TYPE: usize = PAGE_BYTES - 2;
const MAGIC: u32 = 0xA810_9CFA;
/// Addresses in a page of the map from ranges to entries (`REVMAP_PAGE_MAXITEMS`).
const REVMAP_ITEMS: u32 = 1360;
const TID_BYTES: usize = 6;
/// The address of a range without entry.
const INVALID_TID: (u32, u16) = (u32::MAX, 0);

/// `brin_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let kind = record.info.info & kind::MASK;
    match (kind, site.id) {
        (kind::CREATE_INDEX, 0) => create(main, page)?,
        (kind::UPDATE, 2) => page.delete_item_keeping_numbers(main.u16()?)?,
        (kind::INSERT | kind::UPDATE, 0 | 1) => {
            if kind == kind::UPDATE {
                main.skip(4)?;
            }
            insert(record, main, site, page)?;
        }
        (kind::SAME_PAGE_UPDATE, 0) => page.overwrite_item(main.u16()?, site.data)?,
        (kind::REVMAP_EXTEND, 0) => {
            check_type(page, page_type::META)?;
            page.set_u32(HEADER_BYTES + 12, main.u32()?);
            page.set_lower(HEADER_BYTES + 16);
        }
        (kind::REVMAP_EXTEND, 1) => init(page, page_type::REVMAP),
        (kind::DESUMMARIZE, 0) => {
            let (pages_per_range, heap_block) = (main.u32()?, main.u32()?);
            set_address(page, pages_per_range, heap_block, INVALID_TID)?;
        }
        (kind::DESUMMARIZE, 1) => {
            main.skip(8)?;
            page.delete_item_keeping_numbers(main.u16()?)?;
        }
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(Outcome::Changed)
}

/// `brin_page_init`.
fn init(page: &mut Page, page_type: u16) {
    page.init(SPECIAL_BYTES);
    page.set_u16(TYPE, page_type);
}

fn check_type(page: &Page, page_type: u16) -> Result<(), RedoError> {
    if page.u16(TYPE) == page_type { Ok(()) } else { Err(RedoError::Page("it is not of this access method")) }
}

/// `brin_metapage_init`.
fn create(mut main: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    let (pages_per_range, version) = (main.u32()?, main.u16()?);
    init(page, page_type::META);
    for (field, value) in [MAGIC, u32::from(version), pages_per_range, 0].into_iter().enumerate() {
        page.set_u32(HEADER_BYTES + 4 * field, value);
    }
    page.set_lower(HEADER_BYTES + 16);
    Ok(())
}

/// `brin_xlog_insert_update`: the entry, and where the map finds it.
fn insert(record: &Record, mut main: Reader<'_>, site: Site<'_>, page: &mut Page) -> Result<(), RedoError> {
    let (heap_block, pages_per_range, number) = (main.u32()?, main.u32()?, main.u16()?);
    if site.id == 1 {
        let entry = record.blocks.iter().find(|block| block.id == 0);
        let entry = entry.ok_or(RedoError::Record("it has no block of its entry"))?.block;
        return set_address(page, pages_per_range, heap_block, (entry, number));
    }
    if record.info.info & kind::INIT_PAGE != 0 {
        init(page, page_type::REGULAR);
    }
    let place = page.place_unused_item(number, site.data.len())?;
    page.0[place..place + site.data.len()].copy_from_slice(site.data);
    Ok(())
}

/// `brinSetHeapBlockItemptr`.
fn set_address(
    page: &mut Page,
    pages_per_range: u32,
    heap_block: u32,
    (block, number): (u32, u16),
) -> Result<(), RedoError> {
    check_type(page, page_type::REVMAP)?;
    let range = heap_block.checked_div(pages_per_range).ok_or(RedoError::Record("its ranges have no pages"))?;
    let at = HEADER_BYTES + (range % REVMAP_ITEMS) as usize * TID_BYTES;
    page.set_u16(at, (block >> 16) as u16);
    page.set_u16(at + 2, block as u16);
    page.set_u16(at + 4, number);
    Ok(())
}
