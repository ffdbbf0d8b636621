//! The checkpoint of a clean stop that never happened: the record that makes a PGDATA as of X one that just starts.
//!
//! It begins at X, where the log ends, and becomes the log's next record: every standby replays it, as it would that of a
//! real stop. Transactions in progress at X are neither committed nor in progress any more, as after a crash.

use alloc::{format, string::String, vec, vec::Vec};

use pgformat::{CheckPoint, segment_file_name};
use pgtypes::{FrameSummary, Lsn, PgTimeline, SystemId};
use wal::{
    LongPageHeader, PAGE_BYTES, PAGE_MAGIC, PageHeader, RecordSpec, WalWriter, main_data, page_flags,
    page_header_bytes, rmgr, xlog_info,
};

/// The record, and WAL files that hold it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SyntheticCheckpoint {
    /// X: where the bytes begin. Not always where the record does: at a page's start its header is in front of it.
    pub begin: Lsn,
    /// Start of the record, which `pg_control` names.
    pub record_start: Lsn,
    /// S: its end, where PostgreSQL goes on.
    pub end: Lsn,
    /// What it says.
    pub checkpoint: CheckPoint,
    /// Bytes of the log from X to S, headers of pages included: what the new writer appends first.
    pub bytes: Vec<u8>,
    /// One file, or two when the record crosses the end of a segment.
    pub files: Vec<WalFile>,
}

/// A segment in `pg_wal`, mostly a hole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WalFile {
    /// Path in PGDATA.
    pub path: String,
    /// Length of the file. PostgreSQL reads whole pages.
    pub length: u64,
    /// What is in it; everything else is zero.
    pub pieces: Vec<WalPiece>,
}

/// Bytes in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WalPiece {
    /// Where.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The bytes in front of X in its page are not those that belong there. The caller's fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WalPageError {
    /// Their number is not that of bytes between the page's start and X.
    #[error("WAL in front of {x}: {found} bytes, expected {expected}")]
    Length {
        /// Where the log ends.
        x: Lsn,
        /// What there is.
        found: usize,
        /// What there should be.
        expected: usize,
    },
    /// They do not begin with the header of that page in that log.
    #[error("WAL in front of {0} does not begin with its page's header")]
    Header(Lsn),
    /// X is not a record's end.
    #[error("{0} is no end of a record")]
    Position(Lsn),
}

impl SyntheticCheckpoint {
    /// Writes the record behind the last one of `summary`.
    ///
    /// `checkpoint` gives the counters; positions, timelines and what a clean stop implies are set here. `page_before`: the
    /// true bytes of the log from the start of X's page to X, none when X is a page's start. PostgreSQL writes the whole
    /// page again when it goes on.
    ///
    /// # Errors
    /// `page_before` is not that.
    ///
    /// # Panics
    /// When `segment_bytes` is no valid segment size.
    pub fn new(
        summary: &FrameSummary,
        checkpoint: CheckPoint,
        system_id: SystemId,
        segment_bytes: u64,
        page_before: &[u8],
    ) -> Result<SyntheticCheckpoint, WalPageError> {
        let x = summary.record_end;
        if x.offset_in(8) != 0 || !x.is_valid() {
            return Err(WalPageError::Position(x));
        }
        let page_timeline = check_page_before(summary, system_id, segment_bytes, page_before)?;
        let record_start = match x.offset_in(PAGE_BYTES) {
            0 => x.advance(page_header_bytes(x, segment_bytes) as u64),
            _ => x,
        };
        let checkpoint = CheckPoint {
            redo: record_start,
            timeline: summary.timeline,
            previous_timeline: summary.timeline,
            full_page_writes: false,
            oldest_active_xid: 0,
            ..checkpoint
        };
        let mut writer = WalWriter::new(x, summary.record_start, segment_bytes, system_id, summary.timeline);
        let payload = main_data(&checkpoint.to_bytes());
        let (start, end) = writer.append(RecordSpec {
            rmgr: rmgr::XLOG,
            info: xlog_info::CHECKPOINT_SHUTDOWN,
            xid: 0,
            payload: &payload,
        });
        debug_assert_eq!(record_start, start);
        let bytes = writer.take_bytes();
        let first_header = |segment| first_header(segment, page_timeline, system_id, segment_bytes);
        let files = wal_files(x, &bytes, summary.timeline, segment_bytes, page_before, first_header);
        Ok(SyntheticCheckpoint { begin: x, record_start, end, checkpoint, bytes, files })
    }
}

/// The timeline that X's page began in. Not always that of X: a promotion goes on in the page where it was.
fn check_page_before(
    summary: &FrameSummary,
    system_id: SystemId,
    segment_bytes: u64,
    page_before: &[u8],
) -> Result<PgTimeline, WalPageError> {
    let x = summary.record_end;
    let expected = x.offset_in(PAGE_BYTES) as usize;
    if page_before.len() != expected {
        return Err(WalPageError::Length { x, found: page_before.len(), expected });
    }
    if expected == 0 {
        return Ok(summary.timeline);
    }
    let page = x.floor(PAGE_BYTES);
    let header = page_before.get(..page_header_bytes(page, segment_bytes)).and_then(PageHeader::parse);
    let fits = |header: &PageHeader| {
        header.magic == PAGE_MAGIC
            && header.address == page
            && header.timeline <= summary.timeline
            && header.long.is_none_or(|long| long.system_id == system_id)
    };
    header.filter(fits).map(|header| header.timeline).ok_or(WalPageError::Header(x))
}

/// Segments with `page_before` and `bytes`, which meet at X.
fn wal_files(
    x: Lsn,
    bytes: &[u8],
    timeline: PgTimeline,
    segment_bytes: u64,
    page_before: &[u8],
    first_header: impl Fn(Lsn) -> Vec<u8>,
) -> Vec<WalFile> {
    let mut files = Vec::new();
    let mut position = x.floor(PAGE_BYTES);
    let mut all = page_before.to_vec();
    all.extend_from_slice(bytes);
    let mut rest = &all[..];
    while !rest.is_empty() {
        let offset = position.offset_in(segment_bytes);
        let room = usize::try_from(segment_bytes - offset).unwrap_or(usize::MAX);
        let (now, later) = rest.split_at(rest.len().min(room));
        let mut pieces = vec![WalPiece { offset, bytes: now.to_vec() }];
        if offset != 0 {
            pieces.insert(0, WalPiece { offset: 0, bytes: first_header(position.floor(segment_bytes)) });
        }
        let name = segment_file_name(timeline, position.0 / segment_bytes, segment_bytes);
        files.push(WalFile { path: format!("pg_wal/{name}"), length: segment_bytes, pieces });
        position = position.advance(now.len() as u64);
        rest = later;
    }
    files
}

/// PostgreSQL looks at a segment's first header before it reads any other page of it (`ReadPageInternal`), and timelines of
/// pages may not fall (`XLogReaderValidatePageHeader`): it is given the one of the page that follows.
fn first_header(segment: Lsn, timeline: PgTimeline, system_id: SystemId, segment_bytes: u64) -> Vec<u8> {
    let long = LongPageHeader { system_id, segment_bytes: segment_bytes as u32, page_bytes: PAGE_BYTES as u32 };
    let mut header = Vec::new();
    PageHeader {
        magic: PAGE_MAGIC,
        flags: page_flags::LONG_HEADER,
        timeline,
        address: segment,
        remaining_bytes: 0,
        long: Some(long),
    }
    .write(&mut header);
    header
}
