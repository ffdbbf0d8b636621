//! Finding out at the start of the process where a log ends.
//!
//! The control file names a durable record end; the scan goes on from there until the bytes are no continuation. What it
//! finds was written, but perhaps never synced: [`Log`] syncs it before anything is promised. Bytes behind the end are
//! cut off before the first append (`truncation.rs`).

use alloc::{vec, vec::Vec};

use consensus::Acceptor;
use pgtypes::{DiskId, Instant, LogId, Lsn};
use thiserror::Error;
use wal::{Scanner, WalError};

use crate::{
    buffer::{Buffer, WRITE_BYTES_MAX},
    command::{ReadFailed, SegmentReader},
    control::{ChosenCopy, ControlError, choose_copy},
    log::{Log, Start},
    segment::{BLOCK_BYTES, SEGMENT_BYTES, TRAILER_BYTES, Trailer},
    segment_list::SegmentList,
};

/// A log that is back.
#[derive(Debug)]
pub struct Recovered {
    /// Goes on from where it was.
    pub log: Log,
    /// Why the scan ended, for the shell's log; `None` when the segments were full to the last byte. Not a fault: the
    /// end of every log looks like this.
    pub scan_end: Option<WalError>,
    /// One copy of the control file was missing, damaged or old; it is written again.
    pub control_repaired: bool,
}

/// Why a log cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum RecoverError {
    /// Neither copy of the control file is valid: what the log promised is lost.
    #[error("both copies of the control file are unusable: {}; {}", .0[0], .0[1])]
    Control([ControlError; 2]),
    /// The control file is of another log: the directory was copied or renamed.
    #[error("the control file belongs to log {0}")]
    OtherLog(LogId),
    /// The control file was written by another disk: the directory was copied.
    #[error("the control file belongs to disk {0}")]
    OtherDisk(DiskId),
    /// A segment that the log should hold does not exist.
    #[error("the segment at {0} is missing")]
    MissingSegment(Lsn),
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadFailed),
    /// The disk lost WAL.
    #[error(transparent)]
    Acceptor(#[from] consensus::RecoveryError),
}

impl Log {
    /// The log `log` on `disk`, with what its directory holds: both copies of the control file, as far as they exist, and
    /// its segments.
    ///
    /// # Errors
    /// [`RecoverError`]: the log must be refused and reported; all but [`RecoverError::Read`] need a person.
    pub fn recover(
        log: LogId,
        disk: DiskId,
        control_0: Option<&[u8]>,
        control_1: Option<&[u8]>,
        reader: &mut impl SegmentReader,
        now: Instant,
    ) -> Result<Recovered, RecoverError> {
        let ChosenCopy { file, copy, differ } = choose_copy([control_0, control_1]).map_err(RecoverError::Control)?;
        if file.identity.log != log {
            return Err(RecoverError::OtherLog(file.identity.log));
        }
        if file.identity.disk != disk {
            return Err(RecoverError::OtherDisk(file.identity.disk));
        }
        let mut starts = reader.starts()?;
        starts.sort_unstable();
        let scanner = Scanner::resume(file.scan_start, file.identity.segment_bytes);
        let mut scan =
            Scan { starts: &starts, scanner: scanner.with_system_id(file.identity.system), tail: Vec::new() };
        let scan_end = scan.run(reader)?;
        let end = scan.scanner.summary();
        let tail = scan.tail;

        // Segments of the log are those that hold a byte of [oldest, end).
        let log_start = file.identity.start.record_end;
        let mut segments = SegmentList::new(log_start, file.sealed_lsn.max(log_start.floor(SEGMENT_BYTES)));
        let mut next = file.oldest_lsn.floor(SEGMENT_BYTES);
        while next < end.record_end && end.record_end > file.oldest_lsn {
            if starts.binary_search(&next).is_err() {
                return Err(RecoverError::MissingSegment(next));
            }
            let complete = next.advance(SEGMENT_BYTES) <= end.record_end;
            let sealed = complete && (next < file.sealed_lsn || has_trailer(reader, log, next)?);
            segments.push_found(next, sealed);
            next = next.advance(SEGMENT_BYTES);
        }
        let orphans = starts.iter().copied().filter(|start| segments.get(*start).is_none()).collect();
        segments.truncate_checksums(end.record_end);

        let found = end.record_end > file.scan_start.record_end;
        let first = file.scan_start.record_end.floor(SEGMENT_BYTES);
        let sync = found.then(|| (first, Lsn(end.record_end.0 - 1).floor(SEGMENT_BYTES)));
        let acceptor = Acceptor::new(file.identity, file.acceptor, end, now)?;
        let start = Start {
            acceptor,
            scan_start: file.scan_start,
            oldest_lsn: file.oldest_lsn,
            segments,
            consumers: file.consumers,
            control_sequence: file.sequence,
            control_copy: Some(copy),
            control_durable: !differ,
            tail,
            sync,
            orphans,
        };
        Ok(Recovered { log: Log::new(start, now), scan_end, control_repaired: differ })
    }
}

fn has_trailer(reader: &mut impl SegmentReader, log: LogId, start: Lsn) -> Result<bool, ReadFailed> {
    let mut block = Buffer::zeroed(TRAILER_BYTES as usize);
    reader.read(start, SEGMENT_BYTES, block.as_bytes_mut())?;
    Ok(Trailer::decode(block.as_bytes(), log, start).is_ok())
}

struct Scan<'a> {
    starts: &'a [Lsn],
    scanner: Scanner,
    /// Bytes of the block of the last record end, up to it.
    tail: Vec<u8>,
}

impl Scan<'_> {
    /// Feeds the scanner until it refuses or there is no more; returns why it refused.
    fn run(&mut self, reader: &mut impl SegmentReader) -> Result<Option<WalError>, ReadFailed> {
        let begin = self.scanner.position();
        let mut next = begin.floor(BLOCK_BYTES);
        let mut buffer = Buffer::zeroed(WRITE_BYTES_MAX);
        let mut refused = None;
        // A short read first: most logs end within the first few blocks.
        let mut wanted = 16 * BLOCK_BYTES;
        while refused.is_none() && self.starts.binary_search(&next.floor(SEGMENT_BYTES)).is_ok() {
            let offset = next.offset_in(SEGMENT_BYTES);
            let length = wanted.min(SEGMENT_BYTES - offset) as usize;
            let bytes = &mut buffer.as_bytes_mut()[..length];
            reader.read(next.floor(SEGMENT_BYTES), offset, bytes)?;
            let skipped = self.scanner.position().bytes_since(next) as usize;
            refused = self.scanner.feed(&bytes[skipped..], |_| {}).err();
            next = next.advance(length as u64);
            wanted = WRITE_BYTES_MAX as u64;
        }
        let end = self.scanner.summary().record_end;
        let block = end.floor(BLOCK_BYTES);
        self.tail = vec![0; end.bytes_since(block) as usize];
        if !self.tail.is_empty() && self.starts.binary_search(&end.floor(SEGMENT_BYTES)).is_ok() {
            let bytes = &mut buffer.as_bytes_mut()[..BLOCK_BYTES as usize];
            reader.read(end.floor(SEGMENT_BYTES), block.offset_in(SEGMENT_BYTES), bytes)?;
            self.tail.copy_from_slice(&bytes[..end.bytes_since(block) as usize]);
        }
        Ok(refused)
    }
}
