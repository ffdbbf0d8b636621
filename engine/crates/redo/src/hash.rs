//! Resource manager Hash.
//!
//! Source: `access/hash_xlog.h`, `access/hash.h`, `hash_redo` (`access/hash/hash_xlog.c`).

use wal::Record;

use crate::{
    Outcome, RedoError, index_tuple,
    page::{HEADER_BYTES, Page, align8},
    reader::{Reader, U16s},
    touch::Site,
};

/// Kinds of records: `xl_info & 0xF0`.
mod kind {
    pub const INIT_META_PAGE: u8 = 0x00;
    pub const INIT_BITMAP_PAGE: u8 = 0x10;
    pub const INSERT: u8 = 0x20;
    pub const ADD_OVERFLOW_PAGE: u8 = 0x30;
    pub const SPLIT_ALLOCATE_PAGE: u8 = 0x40;
    pub const SPLIT_COMPLETE: u8 = 0x60;
    pub const MOVE_PAGE_CONTENTS: u8 = 0x70;
    pub const SQUEEZE_PAGE: u8 = 0x80;
    pub const DELETE: u8 = 0x90;
    pub const SPLIT_CLEANUP: u8 = 0xA0;
    pub const UPDATE_META_PAGE: u8 = 0xB0;
    pub const VACUUM_ONE_PAGE: u8 = 0xC0;
}

/// Flags of a page (`hasho_flag`).
pub(crate) mod flags {
    pub const OVERFLOW: u16 = 1 << 0;
    pub const BUCKET: u16 = 1 << 1;
    pub const BITMAP: u16 = 1 << 2;
    pub const META: u16 = 1 << 3;
    pub const TYPE_MASK: u16 = OVERFLOW | BUCKET | BITMAP | META;
    pub const NEEDS_SPLIT_CLEANUP: u16 = 1 << 6;
    pub const HAS_DEAD_TUPLES: u16 = 1 << 7;
}

/// Places in the first page (`HashMetaPageData`).
mod meta {
    use crate::page::HEADER_BYTES;

    pub const MAGIC: usize = HEADER_BYTES;
    pub const VERSION: usize = HEADER_BYTES + 4;
    pub const TUPLES: usize = HEADER_BYTES + 8;
    pub const FILL_FACTOR: usize = HEADER_BYTES + 16;
    pub const BITMAP_BYTES_MAX: usize = HEADER_BYTES + 18;
    pub const BITMAP_BYTES: usize = HEADER_BYTES + 20;
    pub const BITMAP_SHIFT: usize = HEADER_BYTES + 22;
    pub const BUCKET_MAX: usize = HEADER_BYTES + 24;
    pub const HIGH_MASK: usize = HEADER_BYTES + 28;
    pub const LOW_MASK: usize = HEADER_BYTES + 32;
    pub const OVERFLOW_POINT: usize = HEADER_BYTES + 36;
    pub const FIRST_FREE: usize = HEADER_BYTES + 40;
    pub const MAPS: usize = HEADER_BYTES + 44;
    pub const PROCEDURE: usize = HEADER_BYTES + 48;
    pub const SPARES: usize = HEADER_BYTES + 52;
    /// `HASH_MAX_SPLITPOINTS`.
    pub const SPARES_MAX: u32 = 98;
    pub const MAP: usize = SPARES + 4 * SPARES_MAX as usize;
    /// `HASH_MAX_BITMAPS`.
    pub const MAPS_MAX: u32 = 1024;
    /// Padded to a multiple of 8.
    pub const END: usize = HEADER_BYTES + 4544;
}

const OPAQUE_BYTES: usize = 16;
const PAGE_ID: u16 = 0xFF80;
const MAGIC: u32 = 0x0644_0640;
const VERSION: u32 = 4;
/// No block, no bucket.
const NONE: u32 = u32::MAX;
/// Splitpoint groups of one phase each, and the logarithm of the number of phases of the others.
const GROUPS_OF_ONE_PHASE: u32 = 10;
const PHASE_BITS: u32 = 2;
const PHASE_MASK: u32 = 3;

/// The access method's part of a page (`HashPageOpaqueData`).
#[derive(Clone, Copy)]
pub(crate) struct Opaque(usize);

impl Opaque {
    pub fn of(page: &Page) -> Result<Opaque, RedoError> {
        page.special_of(OPAQUE_BYTES).map(Opaque)
    }

    /// Makes the page anew (`_hash_pageinit`, `_hash_initbuf`).
    fn init(page: &mut Page, prev: u32, bucket: u32, flags: u16) {
        page.init(OPAQUE_BYTES);
        let opaque = Opaque(page.special());
        opaque.set_prev(page, prev);
        opaque.set_next(page, NONE);
        page.set_u32(opaque.0 + 8, bucket);
        opaque.set_flags(page, flags);
        page.set_u16(opaque.0 + 14, PAGE_ID);
    }

    fn set_prev(self, page: &mut Page, block: u32) {
        page.set_u32(self.0, block);
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

    pub fn clear_flag(self, page: &mut Page, flag: u16) {
        let flags = self.flags(page);
        self.set_flags(page, flags & !flag);
    }
}

/// `hash_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut main = Reader::new(record.main_data());
    let data = Reader::new(site.data);
    match (record.info.info & 0xF0, site.id) {
        (kind::INIT_META_PAGE, 0) => init_meta(main, page)?,
        (kind::INIT_BITMAP_PAGE, 0) => init_bitmap(main.u16()?, page)?,
        (kind::INIT_BITMAP_PAGE, 1) => {
            check_meta(page)?;
            let buckets = page.u32(meta::BUCKET_MAX).wrapping_add(1);
            add_map(page, buckets.wrapping_add(1))?;
        }
        (kind::INSERT, 0) => page.insert_item(main.u16()?, site.data)?,
        (kind::INSERT, 1) => change_tuples(page, 1.0)?,
        (kind::ADD_OVERFLOW_PAGE, id) => add_overflow_page(record, main, id, data, page)?,
        (kind::SPLIT_ALLOCATE_PAGE, id) => split_allocate(main, id, data, page)?,
        (kind::SPLIT_COMPLETE, id @ (0 | 1)) => {
            main.skip(usize::from(id) * 2)?;
            Opaque::of(page)?.set_flags(page, main.u16()?);
        }
        // The bucket's first page is only there to be locked.
        (kind::MOVE_PAGE_CONTENTS | kind::SQUEEZE_PAGE | kind::DELETE, 0) => return Ok(Outcome::Unchanged),
        (kind::MOVE_PAGE_CONTENTS, 1) => insert_items(main.u16()?, data, page)?,
        (kind::MOVE_PAGE_CONTENTS, 2) => delete_all(data, page)?,
        (kind::SQUEEZE_PAGE, _) => return squeeze(main, site, page),
        (kind::DELETE, 1) => {
            let opaque = Opaque::of(page)?;
            delete_all(data, page)?;
            if main.u8()? != 0 {
                opaque.clear_flag(page, flags::HAS_DEAD_TUPLES);
            }
        }
        (kind::SPLIT_CLEANUP, 0) => Opaque::of(page)?.clear_flag(page, flags::NEEDS_SPLIT_CLEANUP),
        (kind::UPDATE_META_PAGE, 0) => {
            check_meta(page)?;
            page.0[meta::TUPLES..meta::TUPLES + 8].copy_from_slice(main.take(8)?);
        }
        (kind::VACUUM_ONE_PAGE, 0) => {
            main.skip(4)?;
            let count = main.u16()?;
            main.skip(2)?;
            let opaque = Opaque::of(page)?;
            page.delete_items(main.u16s(usize::from(count))?)?;
            opaque.clear_flag(page, flags::HAS_DEAD_TUPLES);
        }
        (kind::VACUUM_ONE_PAGE, 1) => {
            main.skip(4)?;
            change_tuples(page, -f64::from(main.u16()?))?;
        }
        // XLOG_HASH_SPLIT_PAGE always carries its page.
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(Outcome::Changed)
}

/// Whether a page that came as an image is changed all the same: the image was taken before its flags were set.
pub(crate) fn changes_image(record: &Record, id: u8) -> bool {
    matches!((record.info.info & 0xF0, id), (kind::SPLIT_ALLOCATE_PAGE, 0) | (kind::SPLIT_COMPLETE, 0 | 1))
}

fn check_meta(page: &Page) -> Result<(), RedoError> {
    Opaque::of(page)?;
    if page.u32(meta::MAGIC) == MAGIC { Ok(()) } else { Err(RedoError::Page("it is not the first of a hash index")) }
}

/// `_hash_spareindex`: the splitpoint phase that a bucket belongs to.
fn spare_index(buckets: u32) -> u32 {
    let group = if buckets < 2 { 0 } else { (buckets - 1).ilog2() + 1 };
    if group < GROUPS_OF_ONE_PHASE {
        return group;
    }
    let phase = (buckets - 1) >> (group - (PHASE_BITS + 1)) & PHASE_MASK;
    GROUPS_OF_ONE_PHASE + ((group - GROUPS_OF_ONE_PHASE) << PHASE_BITS) + phase
}

/// `_hash_get_totalbuckets`: buckets up to the end of a splitpoint phase.
fn total_buckets(phase: u32) -> u32 {
    if phase < GROUPS_OF_ONE_PHASE {
        return 1 << phase;
    }
    let group = GROUPS_OF_ONE_PHASE + ((phase - GROUPS_OF_ONE_PHASE) >> PHASE_BITS);
    let before = 1 << (group - 1);
    before + (before >> PHASE_BITS) * (((phase - GROUPS_OF_ONE_PHASE) & PHASE_MASK) + 1)
}

/// `_hash_init_metabuffer`.
fn init_meta(mut main: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    const BUCKETS_MAX: u32 = 0x4000_0000;
    /// What a page has room for, and the largest power of two in it with its shift from bits.
    const BITMAP_BYTES: (u16, u16, u16) = (8152, 4096, 15);
    let tuples = f64::from_bits(u64::from(main.u32()?) | u64::from(main.u32()?) << 32);
    let (procedure, fill_factor) = (main.u32()?, main.u16()?);
    let wanted = tuples / f64::from(fill_factor);
    let buckets = if wanted >= f64::from(BUCKETS_MAX) {
        BUCKETS_MAX
    } else if wanted > 2.0 {
        total_buckets(spare_index(wanted as u32))
    } else {
        2
    };
    let spare = spare_index(buckets);
    let high_mask = (buckets + 1).next_power_of_two() - 1;

    Opaque::init(page, NONE, NONE, flags::META);
    page.set_u32(meta::MAGIC, MAGIC);
    page.set_u32(meta::VERSION, VERSION);
    page.set_u16(meta::FILL_FACTOR, fill_factor);
    page.set_u16(meta::BITMAP_BYTES_MAX, BITMAP_BYTES.0);
    page.set_u16(meta::BITMAP_BYTES, BITMAP_BYTES.1);
    page.set_u16(meta::BITMAP_SHIFT, BITMAP_BYTES.2);
    page.set_u32(meta::PROCEDURE, procedure);
    page.set_u32(meta::BUCKET_MAX, buckets - 1);
    page.set_u32(meta::HIGH_MASK, high_mask);
    page.set_u32(meta::LOW_MASK, high_mask >> 1);
    page.set_u32(meta::SPARES + 4 * spare as usize, 1);
    page.set_u32(meta::OVERFLOW_POINT, spare);
    page.set_lower(meta::END);
    Ok(())
}

/// `_hash_initbitmapbuffer`.
fn init_bitmap(bytes: u16, page: &mut Page) -> Result<(), RedoError> {
    Opaque::init(page, NONE, NONE, flags::BITMAP);
    let end = HEADER_BYTES + usize::from(bytes);
    if end > page.special() {
        return Err(RedoError::Record("a bitmap is longer than a page"));
    }
    page.0[HEADER_BYTES..end].fill(0xFF);
    page.set_lower(end);
    Ok(())
}

fn set_bit(page: &mut Page, bit: u32, on: bool) -> Result<(), RedoError> {
    let opaque = Opaque::of(page)?;
    // Words of 32 bits, which is the same as bytes on a little-endian machine.
    let at = HEADER_BYTES + (bit / 8) as usize;
    if at >= opaque.0 {
        return Err(RedoError::Record("a bit is not in the bitmap"));
    }
    page.0[at] = if on { page.0[at] | 1 << (bit % 8) } else { page.0[at] & !(1 << (bit % 8)) };
    Ok(())
}

fn change_tuples(page: &mut Page, change: f64) -> Result<(), RedoError> {
    check_meta(page)?;
    let tuples = f64::from_bits(u64::from(page.u32(meta::TUPLES)) | u64::from(page.u32(meta::TUPLES + 4)) << 32);
    page.set_u64(meta::TUPLES, (tuples + change).to_bits());
    Ok(())
}

/// Notes a new bitmap page in the first page.
fn add_map(page: &mut Page, block: u32) -> Result<(), RedoError> {
    check_meta(page)?;
    let maps = page.u32(meta::MAPS);
    if maps >= meta::MAPS_MAX {
        return Err(RedoError::Page("it has too many bitmaps"));
    }
    page.set_u32(meta::MAP + 4 * maps as usize, block);
    page.set_u32(meta::MAPS, maps + 1);
    Ok(())
}

fn spare_place(point: u32) -> Result<usize, RedoError> {
    if point < meta::SPARES_MAX {
        Ok(meta::SPARES + 4 * point as usize)
    } else {
        Err(RedoError::Page("its splitpoint is out of range"))
    }
}

/// `hash_xlog_add_ovfl_page`: blocks are the new page, the one in front of it, the bitmap that has a free bit, a new
/// bitmap, and the first page.
fn add_overflow_page(
    record: &Record,
    mut main: Reader<'_>,
    id: u8,
    mut data: Reader<'_>,
    page: &mut Page,
) -> Result<(), RedoError> {
    let (bitmap_bytes, bitmap_found) = (main.u16()?, main.u8()? != 0);
    let block_of = |id| record.blocks.iter().find(|block| block.id == id).map(|block| block.block);
    let no_block = RedoError::Record("it lacks a block that its kind has");
    match id {
        0 => Opaque::init(page, block_of(1).ok_or(no_block)?, data.u32()?, flags::OVERFLOW),
        1 => Opaque::of(page)?.set_next(page, block_of(0).ok_or(no_block)?),
        2 => set_bit(page, data.u32()?, true)?,
        3 => init_bitmap(bitmap_bytes, page)?,
        4 => {
            check_meta(page)?;
            page.set_u32(meta::FIRST_FREE, data.u32()?);
            if !bitmap_found {
                let spare = spare_place(page.u32(meta::OVERFLOW_POINT))?;
                let mut pages = page.u32(spare).wrapping_add(1);
                if let Some(map) = block_of(3) {
                    add_map(page, map)?;
                    pages = pages.wrapping_add(1);
                }
                page.set_u32(spare, pages);
            }
        }
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(())
}

/// `hash_xlog_split_allocate_page`: blocks are the old bucket, the new one, and the first page.
fn split_allocate(mut main: Reader<'_>, id: u8, mut data: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    const UPDATE_MASKS: u8 = 1 << 0;
    const UPDATE_SPLITPOINT: u8 = 1 << 1;
    let (new_bucket, old_flags, new_flags, flags) = (main.u32()?, main.u16()?, main.u16()?, main.u8()?);
    match id {
        0 => {
            let opaque = Opaque::of(page)?;
            opaque.set_flags(page, old_flags);
            opaque.set_prev(page, new_bucket);
        }
        1 => Opaque::init(page, new_bucket, new_bucket, new_flags),
        2 => {
            check_meta(page)?;
            page.set_u32(meta::BUCKET_MAX, new_bucket);
            if flags & UPDATE_MASKS != 0 {
                page.set_u32(meta::LOW_MASK, data.u32()?);
                page.set_u32(meta::HIGH_MASK, data.u32()?);
            }
            if flags & UPDATE_SPLITPOINT != 0 {
                let (point, pages) = (data.u32()?, data.u32()?);
                page.set_u32(spare_place(point)?, pages);
                page.set_u32(meta::OVERFLOW_POINT, point);
            }
        }
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(())
}

/// Adds entries, the numbers of which come first.
fn insert_items(count: u16, mut data: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    for number in data.u16s(usize::from(count))?.iter() {
        let size = index_tuple::size(data.rest()).ok_or(RedoError::Record("an entry is broken"))?;
        page.insert_item(number, data.take(align8(size))?)?;
    }
    data.finish()
}

/// Removes the entries whose numbers are all of the data.
fn delete_all(mut data: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    let numbers: U16s<'_> = data.u16s(data.rest().len() / 2)?;
    if numbers.len() > 0 { page.delete_items(numbers) } else { Ok(()) }
}

/// `hash_xlog_squeeze_page`: blocks are the bucket's first page, the one that gets the entries, the one that becomes
/// free, its neighbours, the bitmap, and the first page of the index.
fn squeeze(mut main: Reader<'_>, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let (prev, next, count) = (main.u32()?, main.u32()?, main.u16()?);
    let (_, is_prev_written) = (main.u8()?, main.u8()? != 0);
    let mut data = Reader::new(site.data);
    match site.id {
        1 => {
            if count > 0 {
                insert_items(count, data, page)?;
            }
            if is_prev_written {
                Opaque::of(page)?.set_next(page, next);
            }
            if count == 0 && !is_prev_written {
                return Ok(Outcome::Unchanged);
            }
        }
        2 => Opaque::init(page, NONE, NONE, 0),
        3 => Opaque::of(page)?.set_next(page, next),
        4 => Opaque::of(page)?.set_prev(page, prev),
        5 => set_bit(page, data.u32()?, false)?,
        6 => {
            check_meta(page)?;
            page.set_u32(meta::FIRST_FREE, data.u32()?);
        }
        _ => return Err(RedoError::Record("it has a block that its kind does not have")),
    }
    Ok(Outcome::Changed)
}
