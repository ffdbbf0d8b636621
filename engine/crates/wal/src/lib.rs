//! PostgreSQL 17's write-ahead log, read and written as bytes.
//!
//! [`Scanner`] finds record ends and the frame summary in a stream, with a state of fixed size and at the speed of the
//! checksum: it sits on the commit path. [`Decoder`] yields whole records with their block references and page images.
//! [`WalWriter`] lays records out on pages.
//!
//! Knows nothing about files, sockets or what a record does to a page. The layout is that of a little-endian PostgreSQL
//! (x86-64, aarch64) with 8 KiB WAL pages. Read next: `scanner.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod decoder;
mod error;
mod facts;
mod format;
mod image;
mod pglz;
mod record;
mod scanner;
mod writer;

pub use decoder::Decoder;
pub use error::{PageFault, RecordFault, WalError, WalErrorKind};
pub use format::{
    LONG_PAGE_HEADER_BYTES, LongPageHeader, PAGE_BYTES, PAGE_MAGIC, PageHeader, RECORD_BYTES_MAX, RECORD_HEADER_BYTES,
    RecordHeader, SHORT_PAGE_HEADER_BYTES, page_flags, page_header_bytes, rmgr, rmgr_name, segment_bytes_valid,
    xact_info, xlog_info,
};
pub use image::{BlockImage, Compression, ImageError, restore_image};
pub use record::{BlockRef, Fork, Record, RelFileLocator};
pub use scanner::{RecordInfo, Scanner, Unsupported};
pub use writer::{RecordSpec, WalWriter, main_data};

/// CRC-32C (Castagnoli) of `bytes`, continued from `crc`; start with 0.
///
/// The polynomial and form of PostgreSQL's `pg_crc32c`. Uses the processor's instruction where it has one.
#[inline]
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}
