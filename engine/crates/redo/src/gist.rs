//! Resource manager Gist.
//!
//! Source: `access/gistxlog.h`, `access/gist.h`, `gist_redo` (`access/gist/gistxlog.c`).

use pgtypes::Lsn;
use wal::Record;

use crate::{
    Outcome, RedoError, index_tuple,
    page::{HEADER_BYTES, Page},
    reader::Reader,
    touch::Site,
};

/// Kinds of records: `xl_info & 0xF0`.
mod kind {
    pub const PAGE_UPDATE: u8 = 0x00;
    pub const DELETE: u8 = 0x10;
    pub const PAGE_SPLIT: u8 = 0x30;
    pub const PAGE_DELETE: u8 = 0x60;
}

/// Flags of a page.
pub(crate) mod flags {
    pub const LEAF: u16 = 1 << 0;
    pub const DELETED: u16 = 1 << 1;
    pub const TUPLES_DELETED: u16 = 1 << 2;
    pub const FOLLOW_RIGHT: u16 = 1 << 3;
    pub const HAS_GARBAGE: u16 = 1 << 4;
}

const OPAQUE_BYTES: usize = 16;
const PAGE_ID: u16 = 0xFF81;
const ROOT: u32 = 0;
const NO_BLOCK: u32 = u32::MAX;

/// The access method's part of a page (`GISTPageOpaqueData`).
#[derive(Clone, Copy)]
pub(crate) struct Opaque(usize);

impl Opaque {
    pub fn of(page: &Page) -> Result<Opaque, RedoError> {
        page.special_of(OPAQUE_BYTES).map(Opaque)
    }

    /// Makes the page anew (`gistinitpage`).
    fn init(page: &mut Page, flags: u16) -> Opaque {
        page.init(OPAQUE_BYTES);
        let opaque = Opaque(page.special());
        opaque.set_right(page, NO_BLOCK);
        page.set_u16(opaque.0 + 12, flags);
        page.set_u16(opaque.0 + 14, PAGE_ID);
        opaque
    }

    /// Sets the number of the last split, which is a position in WAL.
    pub fn set_nsn(self, page: &mut Page, nsn: Lsn) {
        page.set_u32(self.0, (nsn.0 >> 32) as u32);
        page.set_u32(self.0 + 4, nsn.0 as u32);
    }

    fn set_right(self, page: &mut Page, block: u32) {
        page.set_u32(self.0 + 8, block);
    }

    pub fn flags(self, page: &Page) -> u16 {
        page.u16(self.0 + 12)
    }

    pub fn set_flag(self, page: &mut Page, flag: u16, on: bool) {
        let flags = self.flags(page);
        page.set_u16(self.0 + 12, if on { flags | flag } else { flags & !flag });
    }
}

/// `gist_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    match (record.info.info & 0xF0, site.id) {
        (kind::PAGE_UPDATE, 0) => update(main, site.data, page)?,
        (kind::PAGE_UPDATE, 1) | (kind::PAGE_SPLIT, 0) => clear_follow_right(record.info.end, page)?,
        (kind::DELETE, 0) => {
            main.skip(4)?;
            let count = main.u16()?;
            main.skip(2)?;
            let opaque = Opaque::of(page)?;
            page.delete_items(main.u16s(usize::from(count))?)?;
            // PostgreSQL's recovery also sets F_TUPLES_DELETED here, which the writer (`gistprunepage`) does not and nobody
            // reads; a page is to be as its writer left it.
            opaque.set_flag(page, flags::HAS_GARBAGE, false);
        }
        (kind::PAGE_SPLIT, _) => split(record, main, site, page)?,
        (kind::PAGE_DELETE, 0) => {
            Opaque::of(page)?.set_flag(page, flags::DELETED, true);
            page.0[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(main.take(8)?);
            page.set_lower(HEADER_BYTES + 8);
            page.check_header()?;
        }
        (kind::PAGE_DELETE, 1) => {
            main.skip(8)?;
            page.delete_item(main.u16()?)?;
        }
        // XLOG_GIST_PAGE_REUSE and XLOG_GIST_ASSIGN_LSN have no blocks.
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(Outcome::Changed)
}

/// Whether a page that came as an image is changed all the same: the image does not have the record's own position.
pub(crate) fn changes_image(record: &Record, id: u8) -> bool {
    matches!((record.info.info & 0xF0, id), (kind::PAGE_UPDATE, 1) | (kind::PAGE_SPLIT, 0))
}

/// `gistRedoClearFollowRight`: the child whose split is completed.
fn clear_follow_right(end: Lsn, page: &mut Page) -> Result<(), RedoError> {
    let opaque = Opaque::of(page)?;
    opaque.set_nsn(page, end);
    opaque.set_flag(page, flags::FOLLOW_RIGHT, false);
    Ok(())
}

/// Takes an entry off the front.
fn take_entry<'a>(data: &mut Reader<'a>) -> Result<&'a [u8], RedoError> {
    data.take(index_tuple::size(data.rest()).ok_or(RedoError::Record("an entry is broken"))?)
}

/// `gistRedoPageUpdateRecord`.
fn update(mut main: Reader<'_>, data: &[u8], page: &mut Page) -> Result<(), RedoError> {
    let (deleted, inserted) = (main.u16()?, main.u16()?);
    let opaque = Opaque::of(page)?;
    let mut data = Reader::new(data);
    if deleted == 1 && inserted == 1 {
        let number = data.u16()?;
        page.overwrite_item(number, take_entry(&mut data)?)?;
    } else if deleted > 0 {
        page.delete_items(data.u16s(usize::from(deleted))?)?;
        if opaque.flags(page) & flags::LEAF != 0 {
            opaque.set_flag(page, flags::TUPLES_DELETED, true);
        }
    }
    while !data.rest().is_empty() {
        page.append_item(take_entry(&mut data)?)?;
    }
    Ok(())
}

/// `gistRedoPageSplitRecord`: blocks from 1 on are the pages that the old one became, in their order.
fn split(record: &Record, mut main: Reader<'_>, site: Site<'_>, page: &mut Page) -> Result<(), RedoError> {
    let right = main.u32()?;
    main.skip(4)?;
    let nsn = Lsn(u64::from(main.u32()?) | u64::from(main.u32()?) << 32);
    let is_leaf = main.u8()? != 0;
    main.skip(1)?;
    let pages = main.u16()?;
    let mark_follow_right = main.u8()? != 0;
    let block_of = |id: u8| record.blocks.iter().find(|block| block.id == id).map(|block| block.block);

    let is_root = site.block == ROOT;
    let opaque = Opaque::init(page, if is_leaf && !is_root { flags::LEAF } else { 0 });
    let mut data = Reader::new(site.data);
    for _ in 0..data.u32()? {
        page.append_item(take_entry(&mut data)?)?;
    }
    data.finish()?;
    opaque.set_nsn(page, nsn);
    if !is_root {
        let is_last = u16::from(site.id) >= pages;
        let next = if is_last { Some(right) } else { block_of(site.id + 1) };
        opaque.set_right(page, next.ok_or(RedoError::Record("it lacks a page of a split"))?);
        let root_is_split = block_of(1) == Some(ROOT);
        opaque.set_flag(page, flags::FOLLOW_RIGHT, !is_last && !root_is_split && mark_follow_right);
    }
    Ok(())
}
