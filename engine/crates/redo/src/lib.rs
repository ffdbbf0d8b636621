//! Replays WAL records on pages, one page at a time, as PostgreSQL 17's recovery does.
//!
//! [`blocks_of`] names the blocks that a record touches, [`apply`] does to one page what the record says, and [`events_of`]
//! names what happens to whole relations and databases. All are functions of their arguments: nothing here knows where
//! pages come from, in which order shards see records, or what time it is. [`mask`] forgets what may differ between two
//! correct copies of a page. Nothing is allocated, except by the decompression of page images.
//!
//! Done are all resource managers of PostgreSQL 17 whose records refer to blocks: XLOG (page images), Heap, Heap2, Btree,
//! Hash, Gin, Gist, Sequence, SPGist, BRIN and Generic, and the visibility map, which records also change by implication.
//! Those of extensions are answered with [`RedoError::Unsupported`] unless the record carries the page. State without
//! blocks (transactions, multixacts, relation maps, databases) is not here, and neither is the free-space map.
//!
//! The judge is PostgreSQL itself: `tests/consistency.rs` compares every page with the image that
//! `wal_consistency_checking` puts into each record. Read next: `touch.rs`, `heap.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod brin;
mod btree;
mod error;
mod event;
mod generic;
mod gin;
mod gin_segments;
mod gist;
mod hash;
mod heap;
mod heap2;
mod index_tuple;
mod items;
pub mod mask;
mod page;
mod posting;
mod reader;
mod sequence;
mod spgist;
mod touch;
mod tuple;
mod visibility_map;

pub use error::RedoError;
pub use event::{Database, Event, Truncation, events_of};
pub use page::{PAGE_BYTES, Page};
use touch::Site;
pub use touch::{BlockTag, Reason, Touch, blocks_of};
use wal::{BlockRef, Record, restore_image, rmgr};

/// Numbers of the resource managers whose records refer to blocks, beside `XLOG` (`access/rmgrlist.h`).
pub(crate) mod rmgr_id {
    pub const HEAP2: u8 = 9;
    pub const HEAP: u8 = 10;
    pub const BTREE: u8 = 11;
    pub const HASH: u8 = 12;
    pub const GIN: u8 = 13;
    pub const GIST: u8 = 14;
    pub const SEQUENCE: u8 = 15;
    pub const SPGIST: u8 = 16;
    pub const BRIN: u8 = 17;
    pub const GENERIC: u8 = 20;
}

/// Kinds of records of resource manager XLOG that refer to blocks.
mod xlog_kind {
    pub const FPI_FOR_HINT: u8 = 0xA0;
    pub const FPI: u8 = 0xB0;
}

/// Facts about the cluster that records do not carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Context {
    /// Data checksums or `wal_log_hints` are on: then marking a heap page as visible moves its LSN
    /// (`XLogHintBitIsNeeded`).
    pub hint_bits_logged: bool,
}

/// What became of the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Applied {
    /// It was changed, or made anew.
    Changed,
    /// The record says nothing about its contents: a hint whose image was left out, a bit that was clear already.
    Unchanged,
    /// Its LSN says that it contains the record.
    AlreadyThere,
}

/// What a resource manager did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// The page's LSN becomes the record's end.
    Changed,
    /// The page's LSN stays.
    ChangedWithoutLsn,
    /// Nothing.
    Unchanged,
}

/// Replays on `page` what `record` does to one of its [`blocks_of`].
///
/// `page` is the block as the records before left it, or [`Page::ZERO`] where nothing was ever written. A page whose
/// LSN is at or behind the record's end is left alone, unless the record carries the page or makes it anew; that does
/// not hold for changes that leave no LSN ([`Reason`]), so a caller replays records in order and from an image on. The
/// LSN of a changed page is set, its checksum is not.
///
/// # Errors
/// Record and page do not fit, or the record is not supported. `page` is then of no use.
pub fn apply(record: &Record, touch: &Touch, page: &mut Page, context: &Context) -> Result<Applied, RedoError> {
    match touch.reason {
        Reason::Registered(id) => {
            let block = record.blocks.iter().find(|block| block.id == id).ok_or(RedoError::NotTouched)?;
            apply_registered(record, block, page, context)
        }
        Reason::ClearVisibility { heap_block, bits } => {
            let cleared = visibility_map::clear(page, heap_block, bits);
            Ok(if cleared { Applied::Changed } else { Applied::Unchanged })
        }
        Reason::TruncateVisibility { heap_blocks } => {
            visibility_map::truncate(page, heap_blocks);
            Ok(Applied::Changed)
        }
    }
}

/// `XLogReadBufferForRedoExtended` and the call of the resource manager.
fn apply_registered(
    record: &Record,
    block: &BlockRef,
    page: &mut Page,
    context: &Context,
) -> Result<Applied, RedoError> {
    let end = record.info.end;
    let site = Site { id: block.id, block: block.block, data: record.block_data(block) };
    if let Some(image) = record.block_image(block).filter(|image| image.apply) {
        page.0 = restore_image(&image)?;
        if !page.is_new() {
            page.set_lsn(end);
        }
        match record.info.rmgr {
            rmgr_id::HASH if hash::changes_image(record, block.id) => drop(hash::apply(record, site, page)?),
            rmgr_id::GIST if gist::changes_image(record, block.id) => drop(gist::apply(record, site, page)?),
            _ => {}
        }
        return Ok(Applied::Changed);
    }
    if block.will_init {
        page.0.fill(0);
    } else if page.lsn() >= end {
        return Ok(Applied::AlreadyThere);
    }

    let kind = record.info.info & 0xF0;
    let outcome = match record.info.rmgr {
        rmgr::XLOG if kind == xlog_kind::FPI_FOR_HINT => Outcome::Unchanged,
        rmgr::XLOG if kind == xlog_kind::FPI => return Err(RedoError::Record("it has no image")),
        rmgr_id::HEAP => heap::apply(record, site, page)?,
        rmgr_id::HEAP2 => heap2::apply(record, site, page, context)?,
        rmgr_id::BTREE => btree::apply(record, site, page)?,
        rmgr_id::HASH => hash::apply(record, site, page)?,
        rmgr_id::GIN => gin::apply(record, site, page)?,
        rmgr_id::GIST => gist::apply(record, site, page)?,
        rmgr_id::SEQUENCE => sequence::apply(record, site, page)?,
        rmgr_id::SPGIST => spgist::apply(record, site, page)?,
        rmgr_id::BRIN => brin::apply(record, site, page)?,
        rmgr_id::GENERIC => generic::apply(site, page)?,
        rmgr => return Err(RedoError::Unsupported { rmgr, info: kind }),
    };
    Ok(match outcome {
        Outcome::Changed => {
            page.set_lsn(end);
            Applied::Changed
        }
        Outcome::ChangedWithoutLsn => Applied::Changed,
        Outcome::Unchanged => Applied::Unchanged,
    })
}
