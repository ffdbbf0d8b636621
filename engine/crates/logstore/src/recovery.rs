//! Finding out at the start of the process where a log ends.
//!
//! The control file names a durable record end; the scan goes on from there until the bytes are no continuation. What it
//! finds was written, but perhaps never synced: [`Log`] syncs it before anything is promised. Bytes behind the end are
//! cut off before the first append (`truncation.rs`).

use consensus::Acceptor;
use pgtypes::{DiskId, Instant, LogId, Lsn};
use thiserror::Error;
use wal::{Scanner, WalError};

use crate::{
    buffer::Buffer,
    command::{ReadFailed, SegmentReader},
    control::{ChosenCopy, ControlError, choose_copy},
    log::{Log, Start},
    segment::{BLOCK_BYTES, Geometry, TRAILER_BYTES, Trailer},
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
    /// The log was created with another size of the safekeeper's own segments.
    #[error("the log has segments of {0} bytes")]
    SegmentSize(u64),
    /// A segment that the log should hold does not exist.
    #[error("the segment at {0} is missing")]
    MissingSegment(Lsn),
    /// A sealed segment is not what was sealed: the log cannot end in it.
    #[error("the segment at {0} is sealed, but its WAL is damaged")]
    DamagedSegment(Lsn),
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
        Log::recover_with(Geometry::STANDARD, log, disk, [control_0, control_1], reader, now)
    }

    /// [`Log::recover`] with other sizes.
    ///
    /// # Errors
    /// As there.
    pub fn recover_with(
        geometry: Geometry,
        log: LogId,
        disk: DiskId,
        controls: [Option<&[u8]>; 2],
        reader: &mut impl SegmentReader,
        now: Instant,
    ) -> Result<Recovered, RecoverError> {
        let ChosenCopy { file, copy, differ } = choose_copy(controls).map_err(RecoverError::Control)?;
        if file.identity.log != log {
            return Err(RecoverError::OtherLog(file.identity.log));
        }
        if file.identity.disk != disk {
            return Err(RecoverError::OtherDisk(file.identity.disk));
        }
        if file.store_segment_bytes != geometry.segment_bytes {
            return Err(RecoverError::SegmentSize(file.store_segment_bytes));
        }
        let segment_bytes = geometry.segment_bytes;
        let mut starts = reader.starts()?;
        starts.sort_unstable();
        let scanner = Scanner::resume(file.scan_start, file.identity.segment_bytes);
        let mut scan = Scan { geometry, starts: &starts, scanner: scanner.with_system_id(file.identity.system) };
        let scan_end = scan.run(reader)?;
        let end = scan.scanner.summary();
        // In an open segment damage looks like the torn end of the log; in a sealed one it can be told apart.
        let mut at = end.record_end.floor(segment_bytes);
        while at <= scan.scanner.position() && starts.binary_search(&at).is_ok() {
            if has_trailer(reader, log, at, segment_bytes)? && at.advance(segment_bytes) > end.record_end {
                return Err(RecoverError::DamagedSegment(at));
            }
            at = at.advance(segment_bytes);
        }

        // Segments of the log are those that hold a byte of [oldest, end).
        let log_start = file.identity.start.record_end;
        let mut segments = SegmentList::new(segment_bytes, log_start, file.sealed_lsn);
        let mut next = file.oldest_lsn.floor(segment_bytes);
        // Trailers that the control file does not vouch for were perhaps never synced, as the end of the log.
        let mut unsynced_trailer = None;
        while next < end.record_end && end.record_end > file.oldest_lsn {
            if starts.binary_search(&next).is_err() {
                return Err(RecoverError::MissingSegment(next));
            }
            let complete = next.advance(segment_bytes) <= end.record_end;
            let found = complete && next >= file.sealed_lsn && has_trailer(reader, log, next, segment_bytes)?;
            if found {
                unsynced_trailer.get_or_insert(next);
            }
            let sealed = complete && (next < file.sealed_lsn || found);
            segments.push_found(next, sealed);
            next = next.advance(segment_bytes);
        }
        let orphans = starts.iter().copied().filter(|start| segments.get(*start).is_none()).collect();
        segments.truncate_checksums(end.record_end);

        let found = end.record_end > file.scan_start.record_end;
        let first_found = found.then(|| file.scan_start.record_end.floor(segment_bytes));
        let first = [first_found, unsynced_trailer].into_iter().flatten().min();
        let sync = first.map(|first| (first, Lsn(end.record_end.0 - 1).floor(segment_bytes)));
        let acceptor = Acceptor::new(file.identity, file.acceptor, end, now)?;
        let start = Start {
            geometry,
            acceptor,
            scan_start: file.scan_start,
            oldest_lsn: file.oldest_lsn,
            segments,
            consumers: file.consumers,
            shards: file.shards,
            control_sequence: file.sequence,
            control_copy: Some(copy),
            control_durable: !differ,
            sync,
            unsynced_trailer: unsynced_trailer.is_some(),
            orphans,
        };
        Ok(Recovered { log: Log::new(start, now), scan_end, control_repaired: differ })
    }
}

fn has_trailer(
    reader: &mut impl SegmentReader,
    log: LogId,
    start: Lsn,
    segment_bytes: u64,
) -> Result<bool, ReadFailed> {
    let mut block = Buffer::zeroed(TRAILER_BYTES as usize);
    reader.read(start, segment_bytes, block.as_bytes_mut())?;
    Ok(Trailer::decode(block.as_bytes(), log, start).is_ok())
}

struct Scan<'a> {
    geometry: Geometry,
    starts: &'a [Lsn],
    scanner: Scanner,
}

impl Scan<'_> {
    /// Feeds the scanner until it refuses or there is no more; returns why it refused.
    fn run(&mut self, reader: &mut impl SegmentReader) -> Result<Option<WalError>, ReadFailed> {
        let Geometry { segment_bytes, write_bytes_max, .. } = self.geometry;
        let begin = self.scanner.position();
        let mut next = begin.floor(BLOCK_BYTES);
        let mut buffer = Buffer::zeroed(write_bytes_max);
        let mut refused = None;
        // A short read first: most logs end within the first few blocks.
        let mut wanted = (16 * BLOCK_BYTES).min(write_bytes_max as u64);
        while refused.is_none() && self.starts.binary_search(&next.floor(segment_bytes)).is_ok() {
            let offset = next.offset_in(segment_bytes);
            let length = wanted.min(segment_bytes - offset) as usize;
            let bytes = &mut buffer.as_bytes_mut()[..length];
            reader.read(next.floor(segment_bytes), offset, bytes)?;
            let skipped = self.scanner.position().bytes_since(next) as usize;
            refused = self.scanner.feed(&bytes[skipped..], |_| {}).err();
            next = next.advance(length as u64);
            wanted = write_bytes_max as u64;
        }
        Ok(refused)
    }
}
