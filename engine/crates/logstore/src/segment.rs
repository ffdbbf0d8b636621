//! Segments of a log on disk: names, sizes, and the trailer that seals one. Layout: `docs/formats/wal-segments.md`.
//!
//! Knows nothing about what WAL means. Segments here are the safekeeper's own, 16 MiB whatever the segment size of
//! PostgreSQL is, so that all logs of a process can share spares.

use alloc::{format, string::String};

use pgtypes::{BranchId, ClusterId, LogId, Lsn};
use thiserror::Error;

/// Bytes of WAL in a segment.
pub const SEGMENT_BYTES: u64 = 16 << 20;

/// Unit of direct I/O and of torn writes.
pub const BLOCK_BYTES: u64 = 4096;

/// Bytes of the trailer behind the WAL: one block.
pub const TRAILER_BYTES: u64 = BLOCK_BYTES;

/// Bytes of a segment file.
pub const SEGMENT_FILE_BYTES: u64 = SEGMENT_BYTES + TRAILER_BYTES;

/// Sizes of a log's files and writes. A product has [`Geometry::STANDARD`]; a simulation has small ones, so that the
/// rare things at the ends of segments and writes happen often.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of WAL in a segment: a power of two, at least two blocks.
    pub segment_bytes: u64,
    /// Largest write, in whole blocks.
    pub write_bytes_max: usize,
    /// How far ahead of the last byte a segment is taken, so that no write waits for a rename and a directory sync.
    pub take_ahead_bytes: u64,
    /// Distance of two record ends that are remembered as starts of a recovery scan.
    pub scan_step_bytes: u64,
}

impl Geometry {
    /// Segments of 16 MiB, writes of 1 MiB.
    pub const STANDARD: Geometry = Geometry {
        segment_bytes: SEGMENT_BYTES,
        write_bytes_max: crate::buffer::WRITE_BYTES_MAX,
        take_ahead_bytes: 4 << 20,
        scan_step_bytes: 256 << 10,
    };
}

const TRAILER_MAGIC: [u8; 8] = *b"LBWALSEG";
const TRAILER_VERSION: u32 = 1;
/// Bytes of the trailer that its own checksum covers; the checksum follows them, zeros fill the block.
const TRAILER_CHECKED_BYTES: usize = 72;

/// Name of the file that holds the WAL from `start_lsn` (a multiple of [`SEGMENT_BYTES`]) on: 16 hexadecimal digits.
pub fn segment_file_name(start_lsn: Lsn) -> String {
    format!("{:016X}", start_lsn.0)
}

/// The start that a segment's file name says; `None` when it is not such a name.
pub fn parse_segment_file_name(name: &str) -> Option<Lsn> {
    let digits = name.len() == 16 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    let start = Lsn(u64::from_str_radix(name, 16).ok().filter(|_| digits)?);
    (start.offset_in(SEGMENT_BYTES) == 0).then_some(start)
}

/// Written behind a segment's WAL once all of it is committed: proves later that the bytes are still the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    /// Whose WAL.
    pub log: LogId,
    /// Where the segment starts.
    pub start_lsn: Lsn,
    /// First byte of the log in it: `start_lsn`, or later when the log begins inside the segment.
    pub data_begin: Lsn,
    /// Bytes of WAL in the segment.
    pub segment_bytes: u64,
    /// CRC-32C of `[data_begin, start_lsn + segment_bytes)`.
    pub data_crc: u32,
}

/// Why a segment is not served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum SegmentError {
    /// The file or a part handed in has the wrong size.
    #[error("segment file has the wrong size")]
    Size,
    /// No trailer was written, or it is damaged.
    #[error("segment trailer is missing or damaged")]
    Trailer,
    /// The trailer's format is from another version of this program.
    #[error("segment trailer has format version {0}, this program knows 1")]
    Version(u32),
    /// The trailer is of another log or another segment: a recycled file.
    #[error("segment trailer belongs to {log} at {start_lsn}")]
    Foreign {
        /// Whose it is.
        log: LogId,
        /// Of which segment.
        start_lsn: Lsn,
    },
    /// The bytes are not the ones that were sealed.
    #[error("segment data has CRC {found:08X}, sealed with {expected:08X}")]
    Data {
        /// In the trailer.
        expected: u32,
        /// Of the bytes.
        found: u32,
    },
}

impl Trailer {
    /// The block as written; [`TRAILER_BYTES`] long.
    pub fn encode(&self) -> [u8; TRAILER_BYTES as usize] {
        let mut block = [0u8; TRAILER_BYTES as usize];
        block[0..8].copy_from_slice(&TRAILER_MAGIC);
        block[8..12].copy_from_slice(&TRAILER_VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&self.data_crc.to_le_bytes());
        block[16..32].copy_from_slice(&self.log.cluster.0);
        block[32..48].copy_from_slice(&self.log.branch.0);
        block[48..56].copy_from_slice(&self.start_lsn.0.to_le_bytes());
        block[56..64].copy_from_slice(&self.data_begin.0.to_le_bytes());
        block[64..72].copy_from_slice(&self.segment_bytes.to_le_bytes());
        let crc = wal::crc32c(0, &block[..TRAILER_CHECKED_BYTES]);
        block[TRAILER_CHECKED_BYTES..TRAILER_CHECKED_BYTES + 4].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Reads the trailer of the segment of `log` at `start_lsn`.
    ///
    /// # Errors
    /// [`SegmentError::Trailer`] when the segment was never sealed: an open segment, no fault.
    /// [`SegmentError::Foreign`] for what a recycled file still carries; no fault on an open segment either.
    pub fn decode(block: &[u8], log: LogId, start_lsn: Lsn) -> Result<Trailer, SegmentError> {
        if block.len() as u64 != TRAILER_BYTES {
            return Err(SegmentError::Size);
        }
        let u32_at = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let id_at = |at: usize| core::array::from_fn(|i| block[at + i]);
        if block[..8] != TRAILER_MAGIC
            || u32_at(TRAILER_CHECKED_BYTES) != wal::crc32c(0, &block[..TRAILER_CHECKED_BYTES])
        {
            return Err(SegmentError::Trailer);
        }
        if u32_at(8) != TRAILER_VERSION {
            return Err(SegmentError::Version(u32_at(8)));
        }
        let trailer = Trailer {
            log: LogId { cluster: ClusterId(id_at(16)), branch: BranchId(id_at(32)) },
            start_lsn: Lsn(u64_at(48)),
            data_begin: Lsn(u64_at(56)),
            segment_bytes: u64_at(64),
            data_crc: u32_at(12),
        };
        if trailer.log != log || trailer.start_lsn != start_lsn {
            return Err(SegmentError::Foreign { log: trailer.log, start_lsn: trailer.start_lsn });
        }
        let inside =
            trailer.data_begin >= start_lsn && trailer.data_begin.bytes_since(start_lsn) < trailer.segment_bytes;
        if !inside {
            return Err(SegmentError::Trailer);
        }
        Ok(trailer)
    }
}

/// Checks a sealed segment, given its whole `data` and `trailer` block, before a byte of it is served.
///
/// # Errors
/// [`SegmentError`]: the segment must be reported and not be served.
pub fn verify_segment(data: &[u8], trailer: &[u8], log: LogId, start_lsn: Lsn) -> Result<Trailer, SegmentError> {
    let mut verifier = SegmentVerifier::new(trailer, log, start_lsn)?;
    verifier.feed(data);
    verifier.finish()
}

/// [`verify_segment`] in pieces, for a reader that does not want 16 MiB in memory at once.
#[derive(Clone, Copy, Debug)]
pub struct SegmentVerifier {
    trailer: Trailer,
    position: Lsn,
    crc: u32,
}

impl SegmentVerifier {
    /// Begins with the trailer block.
    ///
    /// # Errors
    /// As [`Trailer::decode`].
    pub fn new(trailer: &[u8], log: LogId, start_lsn: Lsn) -> Result<SegmentVerifier, SegmentError> {
        Ok(SegmentVerifier { trailer: Trailer::decode(trailer, log, start_lsn)?, position: start_lsn, crc: 0 })
    }

    /// Takes the next bytes of the segment, from its first on.
    pub fn feed(&mut self, data: &[u8]) {
        let skipped = self.trailer.data_begin.bytes_since(self.position).min(data.len() as u64) as usize;
        self.crc = wal::crc32c(self.crc, &data[skipped..]);
        self.position = self.position.advance(data.len() as u64);
    }

    /// The verdict, after all bytes.
    ///
    /// # Errors
    /// As [`verify_segment`].
    pub fn finish(self) -> Result<Trailer, SegmentError> {
        if self.position.bytes_since(self.trailer.start_lsn) != self.trailer.segment_bytes {
            return Err(SegmentError::Size);
        }
        if self.crc != self.trailer.data_crc {
            return Err(SegmentError::Data { expected: self.trailer.data_crc, found: self.crc });
        }
        Ok(self.trailer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{vec, vec::Vec};

    fn log() -> LogId {
        LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) }
    }

    fn data() -> Vec<u8> {
        (0..SEGMENT_BYTES).map(|i| ((i * 31) >> 3) as u8).collect()
    }

    fn sealed(data: &[u8], data_begin: u64) -> [u8; 4096] {
        Trailer {
            log: log(),
            start_lsn: Lsn(SEGMENT_BYTES),
            data_begin: Lsn(SEGMENT_BYTES + data_begin),
            segment_bytes: SEGMENT_BYTES,
            data_crc: wal::crc32c(0, &data[data_begin as usize..]),
        }
        .encode()
    }

    #[test]
    fn file_names_round_trip_and_others_are_refused() {
        assert_eq!("0000000302000000", segment_file_name(Lsn(0x3_0200_0000)));
        assert_eq!(Some(Lsn(0x3_0200_0000)), parse_segment_file_name("0000000302000000"));
        for name in
            ["", "0000000302000001", "000000030200000", "00000003020000000", "000000030200000g", "+000000302000000"]
        {
            assert_eq!(None, parse_segment_file_name(name), "{name}");
        }
    }

    #[test]
    fn sealed_segment_verifies_until_one_bit_changes() {
        let mut data = data();
        let trailer = sealed(&data, 0);
        assert!(verify_segment(&data, &trailer, log(), Lsn(SEGMENT_BYTES)).is_ok());
        data[12_345_678] ^= 1;
        assert!(matches!(verify_segment(&data, &trailer, log(), Lsn(SEGMENT_BYTES)), Err(SegmentError::Data { .. })));
    }

    /// A log starts at a segment of PostgreSQL, which may be smaller than ours; what a spare holds before is not WAL.
    #[test]
    fn bytes_before_the_log_are_not_covered() {
        let mut data = data();
        let trailer = sealed(&data, 1 << 20);
        data[(1 << 20) - 1] ^= 1;
        assert!(verify_segment(&data, &trailer, log(), Lsn(SEGMENT_BYTES)).is_ok());
        data[1 << 20] ^= 1;
        assert!(verify_segment(&data, &trailer, log(), Lsn(SEGMENT_BYTES)).is_err());
    }

    #[test]
    fn every_changed_bit_of_a_trailer_is_noticed() {
        let trailer = sealed(&vec![0; SEGMENT_BYTES as usize], 0);
        for byte in 0..TRAILER_CHECKED_BYTES + 4 {
            let mut changed = trailer;
            changed[byte] ^= 0x10;
            assert_eq!(Err(SegmentError::Trailer), Trailer::decode(&changed, log(), Lsn(SEGMENT_BYTES)), "byte {byte}");
        }
    }

    #[test]
    fn trailer_of_another_log_or_segment_or_version_is_refused() {
        let trailer = sealed(&vec![0; SEGMENT_BYTES as usize], 0);
        let other = LogId { cluster: ClusterId([9; 16]), ..log() };
        assert!(matches!(Trailer::decode(&trailer, other, Lsn(SEGMENT_BYTES)), Err(SegmentError::Foreign { .. })));
        assert!(matches!(Trailer::decode(&trailer, log(), Lsn(0)), Err(SegmentError::Foreign { .. })));
        let mut newer = trailer;
        newer[8] = 2;
        let crc = wal::crc32c(0, &newer[..TRAILER_CHECKED_BYTES]);
        newer[TRAILER_CHECKED_BYTES..TRAILER_CHECKED_BYTES + 4].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Err(SegmentError::Version(2)), Trailer::decode(&newer, log(), Lsn(SEGMENT_BYTES)));
        assert_eq!(Err(SegmentError::Size), Trailer::decode(&trailer[1..], log(), Lsn(SEGMENT_BYTES)));
    }
}
