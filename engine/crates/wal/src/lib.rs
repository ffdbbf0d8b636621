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
mod stored;
mod writer;

use crc_fast::{CrcAlgorithm, Digest};
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
pub use stored::STORED_HEADER_BYTES;
pub use writer::{RecordSpec, WalWriter, main_data};

/// CRC-32C (Castagnoli) of `bytes`, continued from `crc`; start with 0.
///
/// The polynomial and form of PostgreSQL's `pg_crc32c`. Uses the processor's instructions where it has them.
#[inline]
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    // The library keeps the sum before its final inversion.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::crc32c;

    /// RFC 3720, appendix B.4, and the check value of the polynomial.
    #[test]
    fn crc32c_of_published_examples() {
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        assert_eq!(0xE306_9283, crc32c(0, b"123456789"));
        assert_eq!(0x8A91_36AA, crc32c(0, &[0; 32]));
        assert_eq!(0x62A8_AB43, crc32c(0, &[0xFF; 32]));
        assert_eq!(0x46DD_794E, crc32c(0, &rising));
        assert_eq!(0x113F_DB5C, crc32c(0, &falling));
        assert_eq!(0, crc32c(0, &[]));
    }

    /// The library takes another way for each range of lengths.
    #[test]
    fn crc32c_continues_anywhere() {
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i * 7 + (i >> 8)) as u8).collect();
        let bitwise = |bytes: &[u8]| {
            !bytes.iter().fold(!0u32, |crc, byte| {
                (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 & 0u32.wrapping_sub(crc & 1)))
            })
        };
        for length in (0..300).chain([511, 1024, 2047, 4096, 5000]) {
            let whole = bitwise(&bytes[..length]);
            for at in [0, 1, length / 3, length / 2, length] {
                let at = at.min(length);
                assert_eq!(whole, crc32c(crc32c(0, &bytes[..at]), &bytes[at..length]), "{length} cut at {at}");
            }
        }
    }
}
