//! What a cleanly shut down PGDATA is: a base backup, or the agent's own after a clean stop.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use pgformat::{ControlFile, DatabaseState, WalLevel, segment_file_name};
use pgtypes::{FrameSummary, Lsn, PgTimeline};
use wal::{LONG_PAGE_HEADER_BYTES, PageHeader, Scanner, WalError};

/// WAL read at once.
const READ_BYTES: usize = 256 << 10;

/// A cleanly shut down PGDATA.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Base {
    /// Its `pg_control`.
    pub control: ControlFile,
    /// S: the end of its shutdown checkpoint's record, with the summary of the WAL up to there.
    pub end: FrameSummary,
    /// Start of the WAL segment that holds S: where a log that begins with this PGDATA starts.
    pub start_lsn: Lsn,
    /// PostgreSQL timeline of the first WAL page of that segment.
    pub start_timeline: PgTimeline,
}

/// The directory is not a PGDATA that a lakebase can begin with. The text names the file and says why.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct BaseError {
    path: String,
    message: String,
}

fn error(path: &Path, message: impl ToString) -> BaseError {
    BaseError { path: path.display().to_string(), message: message.to_string() }
}

impl Base {
    /// WAL segment size, bytes.
    pub fn segment_bytes(&self) -> u64 {
        u64::from(self.control.segment_bytes)
    }

    /// PostgreSQL timeline of its end.
    pub fn timeline(&self) -> PgTimeline {
        self.control.checkpoint.timeline
    }
}

/// Largest transaction id assigned before the checkpoint (`nextXid` less one).
fn max_full_xid(control: &ControlFile) -> u64 {
    control.checkpoint.next_full_xid.saturating_sub(1)
}

/// Reads `pg_control` of `pgdata`.
///
/// # Errors
/// It cannot be read or fails PostgreSQL's checks.
pub fn read_control(pgdata: &Path) -> Result<ControlFile, BaseError> {
    let path = pgdata.join("global/pg_control");
    let bytes = fs::read(&path).map_err(|e| error(&path, e))?;
    ControlFile::parse(&bytes).map_err(|e| error(&path, e))
}

/// Looks whether a lakebase can begin with `pgdata`, and where its WAL ends.
///
/// # Errors
/// It is not of PostgreSQL 17, was not shut down cleanly, has tablespaces, was written with `wal_level = minimal`, or its
/// last WAL segment is missing or damaged.
pub fn inspect(pgdata: &Path) -> Result<Base, BaseError> {
    let version_path = pgdata.join("PG_VERSION");
    let version = fs::read_to_string(&version_path).map_err(|e| error(&version_path, e))?;
    if version.trim() != "17" {
        return Err(error(&version_path, format!("PostgreSQL {}, expected 17", version.trim())));
    }
    if pgdata.join("postmaster.pid").exists() {
        return Err(error(pgdata, "a server runs on it (postmaster.pid exists)"));
    }
    if pgdata.join("backup_label").exists() {
        return Err(error(pgdata, "an online backup; expected a cleanly shut down data directory"));
    }
    let tablespaces = pgdata.join("pg_tblspc");
    if fs::read_dir(&tablespaces).map_err(|e| error(&tablespaces, e))?.next().is_some() {
        return Err(error(&tablespaces, "tablespaces are not supported"));
    }
    let control = read_control(pgdata)?;
    if control.state != DatabaseState::ShutDown {
        return Err(error(pgdata, format!("not cleanly shut down: pg_control says {:?}", control.state)));
    }
    if control.settings.wal_level == WalLevel::Minimal {
        return Err(error(pgdata, "was written with wal_level = minimal; start and stop it once with replica"));
    }
    let end = end_of_checkpoint(pgdata, &control)?;
    let segment_bytes = u64::from(control.segment_bytes);
    let start_lsn = end.record_end.floor(segment_bytes);
    let timeline = control.checkpoint.timeline;
    let start_timeline = if start_lsn == end.record_end {
        timeline
    } else {
        first_page_timeline(&segment_path(pgdata, timeline, start_lsn, segment_bytes))?
    };
    Ok(Base { control, end, start_lsn, start_timeline })
}

/// Path of the segment that holds `lsn`.
pub fn segment_path(pgdata: &Path, timeline: PgTimeline, lsn: Lsn, segment_bytes: u64) -> std::path::PathBuf {
    pgdata.join("pg_wal").join(segment_file_name(timeline, lsn.0 / segment_bytes, segment_bytes))
}

fn first_page_timeline(path: &Path) -> Result<PgTimeline, BaseError> {
    let mut page = [0; LONG_PAGE_HEADER_BYTES];
    let file = File::open(path).map_err(|e| error(path, e))?;
    file.read_exact_at(&mut page, 0).map_err(|e| error(path, e))?;
    let header = PageHeader::parse(&page).ok_or_else(|| error(path, "no WAL page header"))?;
    Ok(header.timeline)
}

/// Scans the checkpoint's segment up to the end of its record.
fn end_of_checkpoint(pgdata: &Path, control: &ControlFile) -> Result<FrameSummary, BaseError> {
    let segment_bytes = u64::from(control.segment_bytes);
    let timeline = control.checkpoint.timeline;
    let begin = control.checkpoint_lsn.floor(segment_bytes);
    let first = segment_path(pgdata, timeline, begin, segment_bytes);
    let mut scanner =
        Scanner::at_segment_start(begin, segment_bytes, max_full_xid(control), first_page_timeline(&first)?)
            .with_system_id(control.system_id);
    let mut buffer = vec![0; READ_BYTES];
    let mut end = None;
    loop {
        let position = scanner.position();
        let path = segment_path(pgdata, timeline, position, segment_bytes);
        let file = File::open(&path).map_err(|e| error(&path, e))?;
        loop {
            let position = scanner.position();
            let left = segment_bytes - position.offset_in(segment_bytes);
            let wanted = left.min(READ_BYTES as u64) as usize;
            file.read_exact_at(&mut buffer[..wanted], position.offset_in(segment_bytes))
                .map_err(|e| error(&path, e))?;
            let before = scanner;
            let result = scanner.feed(&buffer[..wanted], |record| {
                if record.start == control.checkpoint_lsn {
                    end = Some(record.end);
                }
            });
            if let Some(end) = end {
                return summary_at(before, &buffer[..wanted], end).map_err(|e| error(&path, e));
            }
            result
                .map_err(|e| error(&path, format!("the checkpoint at {} is not found: {e}", control.checkpoint_lsn)))?;
            if wanted as u64 == left {
                break;
            }
        }
    }
}

/// The summary at the record end `end`, which lies in `bytes`.
fn summary_at(mut scanner: Scanner, bytes: &[u8], end: Lsn) -> Result<FrameSummary, WalError> {
    let upto = end.bytes_since(scanner.position()) as usize;
    scanner.feed(&bytes[..upto], |_| {})?;
    Ok(scanner.summary())
}

/// Whether an I/O error means that there is no such file.
pub fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
