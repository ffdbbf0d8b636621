//! Reads the WAL that PostgreSQL has written, finds where records end, and hands the bytes out.
//!
//! The bytes come from PostgreSQL's own files, through the page cache. What PostgreSQL has declared final is fed to the
//! scanner for good; the last page of a write may hold half-copied records and is scanned with a copy, whose failure is
//! the end of the WAL and not an error. Each byte is read once for all safekeepers; what a lagging one needs later is read
//! again from the file. Knows nothing about connections or votes.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use consensus::message::TimelineEntry;
use pgformat::{HistoryFile, history_file_name};
use pgtypes::{FrameSummary, Lsn, PgTimeline, SystemId};
use vfs_abi::Written;
use wal::{RecordInfo, Scanner, Unsupported, WalError, WalErrorKind};

use crate::base::{is_absent, segment_path};

/// Bytes read at once: after each such step the safekeepers are sent what was found.
const STEP_BYTES: u64 = 1 << 20;
/// Recent WAL kept in memory; a safekeeper that lags further behind is served from the file.
const WINDOW_BYTES: usize = 8 << 20;
/// Of it, what stays when the window is full and moves on.
const WINDOW_KEPT_BYTES: usize = 2 << 20;

/// What was found in one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Bytes below this will not change any more.
    pub sendable: Lsn,
    /// End of the last complete record in the bytes looked at.
    pub record_end: Lsn,
    /// Whether everything that was written has been looked at.
    pub done: bool,
}

/// Why PostgreSQL's WAL cannot be proposed. PostgreSQL must be killed.
#[derive(Debug, thiserror::Error)]
pub enum FramerError {
    /// A record that the engine must not take in.
    #[error("PostgreSQL wrote a {reason} at {lsn}, which the storage engine cannot apply")]
    Unsupported {
        /// Start of the record.
        lsn: Lsn,
        /// Which kind.
        reason: Unsupported,
    },
    /// Bytes that PostgreSQL declared final are no WAL.
    #[error("PostgreSQL's WAL cannot be read: {0}")]
    Wal(#[from] WalError),
    /// A WAL file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// PostgreSQL promoted itself where it must not.
    #[error("timeline {} of PostgreSQL: {message}", .timeline.0)]
    Timeline {
        /// The timeline.
        timeline: PgTimeline,
        /// What is wrong.
        message: String,
    },
}

/// Bytes are not here any more; the local WAL begins at this position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unavailable {
    /// First byte that may still be here.
    pub available_from: Lsn,
}

/// The WAL of one run of PostgreSQL from X on.
pub struct Framer {
    pgdata: PathBuf,
    start: Lsn,
    scanner: Scanner,
    record_end: Lsn,
    sendable: Lsn,
    timeline: Option<PgTimeline>,
    open: Option<Segment>,
    window: Window,
    scratch: Vec<u8>,
}

struct Segment {
    number: u64,
    path: PathBuf,
    file: File,
}

impl Framer {
    /// Continues the log that ends at `start` with what PostgreSQL writes to `pgdata`.
    pub fn new(pgdata: &Path, start: FrameSummary, segment_bytes: u64, system_id: SystemId) -> Self {
        Self {
            pgdata: pgdata.to_owned(),
            start: start.record_end,
            scanner: Scanner::resume(start, segment_bytes).with_system_id(system_id),
            record_end: start.record_end,
            sendable: start.record_end,
            timeline: None,
            open: None,
            window: Window::new(start.record_end),
            scratch: Vec::new(),
        }
    }

    /// First byte that is local: X.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// End of the last complete record found.
    pub fn record_end(&self) -> Lsn {
        self.record_end
    }

    /// Bytes below this will not change any more.
    pub fn sendable(&self) -> Lsn {
        self.sendable
    }

    /// Whether `written` reaches beyond what was fed to the scanner for good.
    pub fn is_news(&self, written: Written) -> bool {
        written.written_lsn > self.scanner.position().0
    }

    /// Looks at the next bytes of what was written; to be repeated until the step says done.
    ///
    /// # Errors
    /// See [`FramerError`]; the framer is of no further use.
    pub fn step(&mut self, written: Written) -> Result<Step, FramerError> {
        let cursor = self.scanner.position();
        if !self.is_news(written) {
            // Of before X: the WAL receiver's, which came from the safekeepers.
            return Ok(Step { sendable: self.sendable, record_end: self.record_end, done: true });
        }
        let timeline = PgTimeline(written.timeline);
        let previous = *self.timeline.get_or_insert(timeline);
        if previous != timeline {
            let message = format!("it follows timeline {}, although no promotion was asked for", previous.0);
            return Err(FramerError::Timeline { timeline, message });
        }
        let segment_bytes = self.scanner.segment_bytes();
        let segment_left = segment_bytes - cursor.offset_in(segment_bytes);
        let end = Lsn(written.written_lsn.min(cursor.0 + segment_left.min(STEP_BYTES)));
        let final_end = Lsn(written.final_lsn).clamp(cursor, end);
        self.read_into_window(timeline, cursor, end)?;

        let mut unsupported = None;
        let mut note = |record: &RecordInfo| {
            if let Some(reason) = record.unsupported() {
                unsupported.get_or_insert((record.start, reason));
            }
        };
        self.scanner.feed(self.window.slice(cursor, final_end), &mut note)?;
        let mut ahead = self.scanner;
        let refused = ahead.feed(self.window.slice(final_end, end), &mut note).err();
        if let Some((lsn, reason)) = unsupported {
            return Err(FramerError::Unsupported { lsn, reason });
        }
        if let Some(error) = refused.filter(|error| !may_be_unfinished(error.kind)) {
            return Err(error.into());
        }
        self.record_end = self.record_end.max(ahead.summary().record_end);
        self.sendable = self.sendable.max(final_end).max(self.record_end);
        // Without final bytes ahead the rest is the last page, which was looked at.
        let done = end.0 >= written.written_lsn || final_end == cursor;
        Ok(Step { sendable: self.sendable, record_end: self.record_end, done })
    }

    fn read_into_window(&mut self, timeline: PgTimeline, begin: Lsn, end: Lsn) -> Result<(), FramerError> {
        let segment_bytes = self.scanner.segment_bytes();
        let number = begin.0 / segment_bytes;
        if self.open.as_ref().is_none_or(|segment| segment.number != number) {
            let path = segment_path(&self.pgdata, timeline, begin, segment_bytes);
            let file = File::open(&path).map_err(|source| FramerError::Io { path: path.clone(), source })?;
            self.open = Some(Segment { number, path, file });
        }
        let Some(segment) = &self.open else { unreachable!("opened above") };
        let buffer = self.window.room(begin, end.bytes_since(begin) as usize);
        segment
            .file
            .read_exact_at(buffer, begin.offset_in(segment_bytes))
            .map_err(|source| FramerError::Io { path: segment.path.clone(), source })
    }

    /// The bytes `[begin, end)`, which must be sendable and no more than one append holds.
    ///
    /// # Errors
    /// They are of before X, or PostgreSQL has recycled their segment.
    pub fn bytes(&mut self, begin: Lsn, end: Lsn) -> Result<&[u8], Unavailable> {
        if begin < self.start {
            return Err(Unavailable { available_from: self.start });
        }
        if self.window.holds(begin, end) {
            return Ok(self.window.slice(begin, end));
        }
        self.read_again(begin, end)?;
        Ok(&self.scratch)
    }

    fn read_again(&mut self, begin: Lsn, end: Lsn) -> Result<(), Unavailable> {
        let segment_bytes = self.scanner.segment_bytes();
        self.scratch.resize(end.bytes_since(begin) as usize, 0);
        let mut at = begin;
        while at < end {
            let segment_end = Lsn(at.floor(segment_bytes).0 + segment_bytes);
            let upto = end.min(segment_end);
            let target = at.bytes_since(begin) as usize..upto.bytes_since(begin) as usize;
            let read = self.timeline.map(|timeline| {
                let path = segment_path(&self.pgdata, timeline, at, segment_bytes);
                read_unless_recycled(&path, &mut self.scratch[target], at.offset_in(segment_bytes))
            });
            match read {
                Some(Ok(true)) => at = upto,
                Some(Ok(false)) | None => return Err(Unavailable { available_from: segment_end }),
                Some(Err(error)) => {
                    tracing::warn!(%error, lsn = %at, "cannot read WAL again; a safekeeper will fetch it from another");
                    return Err(Unavailable { available_from: segment_end });
                }
            }
        }
        Ok(())
    }

    /// The timeline that PostgreSQL writes, when it began behind `known`, the newest of the log; `None` otherwise.
    ///
    /// # Errors
    /// Its history file is missing or wrong, or it does not begin at or behind X.
    pub fn timeline_entry(
        &self,
        timeline: PgTimeline,
        known: PgTimeline,
    ) -> Result<Option<TimelineEntry>, FramerError> {
        if timeline <= known {
            return Ok(None);
        }
        let path = self.pgdata.join("pg_wal").join(history_file_name(timeline));
        let history_file = fs::read(&path).map_err(|source| FramerError::Io { path: path.clone(), source })?;
        let wrong = |message: String| FramerError::Timeline { timeline, message };
        let history = HistoryFile::parse(timeline, &history_file).map_err(|error| wrong(error.to_string()))?;
        let start_lsn = history.entries.last().map(|parent| parent.end_lsn);
        let start_lsn = start_lsn.ok_or_else(|| wrong("its history file names no parent".into()))?;
        if start_lsn < self.start {
            return Err(wrong(format!("begins at {start_lsn}, before the end of the log at {}", self.start)));
        }
        Ok(Some(TimelineEntry { timeline, start_lsn, history_file }))
    }
}

/// Whether a record that PostgreSQL has not finished looks like this: a part of it is zeros still, or, behind `XLOG_SWITCH`,
/// not zeros yet. A page's header is complete before the page is written, and so is a record whose checksum matches: if these
/// are refused, a flush may wait for what is not understood, and must not be told that there was nothing. A back-link to
/// another place is a record of another history, such as a base backup's that ends where the log does.
fn may_be_unfinished(kind: WalErrorKind) -> bool {
    match kind {
        WalErrorKind::EndOfWal
        | WalErrorKind::RecordLength(_)
        | WalErrorKind::ResourceManager(_)
        | WalErrorKind::Crc
        | WalErrorKind::SwitchRest
        | WalErrorKind::Padding => true,
        WalErrorKind::PrevLink { found, .. } => !found.is_valid(),
        WalErrorKind::PageHeader(_) | WalErrorKind::Record(_) => false,
    }
}

/// Reads from the segment at `path`; false when PostgreSQL has removed or recycled it (renamed it to a later segment's name)
/// meanwhile. Recycling renames before anything is overwritten, so bytes read before a look at the name are true.
fn read_unless_recycled(path: &Path, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    let opened = file.metadata()?;
    file.read_exact_at(buffer, offset)?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The most recent bytes, contiguous in memory.
struct Window {
    buffer: Box<[u8]>,
    /// Position of `buffer[0]`.
    start: Lsn,
    filled: usize,
}

impl Window {
    fn new(start: Lsn) -> Self {
        Self { buffer: vec![0; WINDOW_BYTES].into_boxed_slice(), start, filled: 0 }
    }

    fn end(&self) -> Lsn {
        self.start.advance(self.filled as u64)
    }

    fn holds(&self, begin: Lsn, end: Lsn) -> bool {
        self.start <= begin && end <= self.end()
    }

    fn slice(&self, begin: Lsn, end: Lsn) -> &[u8] {
        &self.buffer[begin.bytes_since(self.start) as usize..end.bytes_since(self.start) as usize]
    }

    /// Memory for `count` bytes from `begin` on, which must lie inside the window or at its end.
    fn room(&mut self, begin: Lsn, count: usize) -> &mut [u8] {
        assert!(self.holds(begin, begin), "{begin} is not in [{}, {}]", self.start, self.end());
        let mut at = begin.bytes_since(self.start) as usize;
        if at + count > self.buffer.len() {
            let dropped = at.saturating_sub(WINDOW_KEPT_BYTES);
            self.buffer.copy_within(dropped..at, 0);
            self.start = self.start.advance(dropped as u64);
            at -= dropped;
        }
        self.filled = at + count;
        &mut self.buffer[at..at + count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wal::{RecordSpec, WalWriter, main_data, rmgr, xlog_info};

    const SEGMENT: u64 = 1 << 20;
    const PAGE: u64 = 8192;
    const SYSTEM: SystemId = SystemId(77);

    /// A PGDATA whose WAL is written as PostgreSQL does.
    struct Server {
        pgdata: PathBuf,
        writer: WalWriter,
        written: Written,
    }

    impl Server {
        fn new(name: &str) -> Self {
            let pgdata = std::env::temp_dir().join(format!("lakebase-framer-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&pgdata);
            fs::create_dir_all(pgdata.join("pg_wal")).expect("created");
            let writer = WalWriter::new(Lsn(SEGMENT), Lsn(SEGMENT - 100), SEGMENT, SYSTEM, PgTimeline(1));
            Self { pgdata, writer, written: Written { sequence: 0, written_lsn: 0, final_lsn: 0, timeline: 1 } }
        }

        fn framer(&self) -> Framer {
            let start = FrameSummary {
                record_end: Lsn(SEGMENT),
                record_start: Lsn(SEGMENT - 100),
                timeline: PgTimeline(1),
                ..FrameSummary::default()
            };
            Framer::new(&self.pgdata, start, SEGMENT, SYSTEM)
        }

        fn append(&mut self, rmgr: u8, bytes: usize) -> Lsn {
            let payload = main_data(&vec![7; bytes]);
            let info = if rmgr == rmgr::XLOG { xlog_info::NOOP } else { 0 };
            self.writer.append(RecordSpec { rmgr, info, xid: 0, payload: &payload }).1
        }

        /// Writes whole pages up to the one that holds `upto`, with garbage behind `upto`.
        fn write(&mut self, upto: Lsn) {
            let bytes = self.writer.bytes();
            let end = Lsn(upto.0.div_ceil(PAGE) * PAGE);
            let mut image = vec![0xEE; end.bytes_since(Lsn(SEGMENT)) as usize];
            let known = upto.bytes_since(Lsn(SEGMENT)) as usize;
            image[..known].copy_from_slice(&bytes[..known]);
            for (number, segment) in image.chunks(SEGMENT as usize).enumerate() {
                let lsn = Lsn(SEGMENT * (number as u64 + 1));
                let path = segment_path(&self.pgdata, PgTimeline(1), lsn, SEGMENT);
                let mut whole = vec![0; SEGMENT as usize];
                whole[..segment.len()].copy_from_slice(segment);
                fs::write(path, whole).expect("written");
            }
            self.written.sequence += 1;
            self.written.written_lsn = end.0;
            self.written.final_lsn = (end.0 - 1) / PAGE * PAGE;
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.pgdata).expect("removed");
        }
    }

    fn steps(framer: &mut Framer, written: Written) -> Result<Step, FramerError> {
        loop {
            let step = framer.step(written)?;
            if step.done {
                return Ok(step);
            }
        }
    }

    /// The same last page is written again with each commit: only complete records may be sent.
    #[test]
    fn the_last_page_is_sent_up_to_its_last_complete_record() {
        let mut server = Server::new("tail");
        let mut framer = server.framer();
        let first = server.append(rmgr::XLOG, 500);
        let second = server.append(rmgr::XLOG, 900);
        server.write(first);
        let step = framer.step(server.written).expect("valid");
        assert_eq!(Step { sendable: first, record_end: first, done: true }, step);
        server.write(Lsn(second.0 - 40));
        assert_eq!(first, framer.step(server.written).expect("valid").record_end, "half a record is none");
        server.write(second);
        assert_eq!(second, framer.step(server.written).expect("valid").sendable);
        let expected = server.writer.bytes()[..second.bytes_since(Lsn(SEGMENT)) as usize].to_vec();
        assert_eq!(Ok(&expected[..]), framer.bytes(Lsn(SEGMENT), second));
    }

    /// A record of many pages: its final pages are sent before its end exists.
    #[test]
    fn final_pages_of_an_unfinished_record_are_sent_early() {
        let mut server = Server::new("long");
        let mut framer = server.framer();
        let first = server.append(rmgr::XLOG, 500);
        let end = server.append(rmgr::XLOG, 300_000);
        server.write(Lsn(SEGMENT + 100_000));
        let step = steps(&mut framer, server.written).expect("valid");
        assert_eq!(first, step.record_end);
        assert_eq!(Lsn(server.written.final_lsn), step.sendable);
        server.write(end);
        assert_eq!(end, steps(&mut framer, server.written).expect("valid").record_end);
    }

    #[test]
    fn several_segments_are_framed_in_bounded_steps() {
        let mut server = Server::new("segments");
        let mut framer = server.framer();
        let mut end = Lsn(SEGMENT);
        while end < Lsn(12 * SEGMENT) {
            end = server.append(rmgr::XLOG, 50_000);
        }
        server.write(end);
        let step = steps(&mut framer, server.written).expect("valid");
        assert_eq!(end, step.record_end);
        // The window has moved on: the first bytes come from the file.
        assert!(!framer.window.holds(Lsn(SEGMENT), Lsn(SEGMENT + 100)));
        let expected = server.writer.bytes()[..SEGMENT as usize].to_vec();
        assert_eq!(Ok(&expected[..]), framer.bytes(Lsn(SEGMENT), Lsn(2 * SEGMENT)));
        let crossing = server.writer.bytes()[(SEGMENT - 100) as usize..(SEGMENT + 100) as usize].to_vec();
        assert_eq!(Ok(&crossing[..]), framer.bytes(Lsn(2 * SEGMENT - 100), Lsn(2 * SEGMENT + 100)));
    }

    /// PostgreSQL recycles a segment by renaming it: the bytes under the old name are gone, and must not be guessed.
    #[test]
    fn a_recycled_segment_is_noticed() {
        let mut server = Server::new("recycled");
        let mut framer = server.framer();
        let mut end = Lsn(SEGMENT);
        while end < Lsn(12 * SEGMENT) {
            end = server.append(rmgr::XLOG, 50_000);
        }
        server.write(end);
        steps(&mut framer, server.written).expect("valid");
        let path = |lsn| segment_path(&server.pgdata, PgTimeline(1), Lsn(lsn), SEGMENT);
        fs::rename(path(SEGMENT), path(40 * SEGMENT)).expect("renamed");
        let unavailable = Unavailable { available_from: Lsn(2 * SEGMENT) };
        assert_eq!(Err(unavailable), framer.bytes(Lsn(SEGMENT + 5), Lsn(SEGMENT + 10)));
        assert!(framer.bytes(Lsn(2 * SEGMENT), Lsn(2 * SEGMENT + 10)).is_ok());
        assert_eq!(Err(Unavailable { available_from: Lsn(SEGMENT) }), framer.bytes(Lsn(5), Lsn(10)));
    }

    #[test]
    fn a_record_of_an_unknown_resource_manager_is_refused() {
        let mut server = Server::new("unsupported");
        let mut framer = server.framer();
        server.append(rmgr::XLOG, 500);
        let end = server.append(200, 100);
        server.write(end);
        let error = framer.step(server.written).expect_err("refused").to_string();
        assert!(error.contains("custom resource manager 200"), "{error}");
    }

    #[test]
    fn garbage_in_final_bytes_is_an_error() {
        let mut server = Server::new("garbage");
        let mut framer = server.framer();
        let end = server.append(rmgr::XLOG, 500);
        server.write(end);
        server.written.final_lsn = server.written.written_lsn;
        assert!(matches!(framer.step(server.written), Err(FramerError::Wal(_))));
    }

    /// Its checksum matches, so it is complete, and a flush may wait for it: not understood is not the same as not there.
    #[test]
    fn a_complete_record_that_is_not_understood_is_an_error_in_the_last_page_too() {
        let mut server = Server::new("misunderstood");
        let mut framer = server.framer();
        let first = server.append(rmgr::XLOG, 500);
        // A commit that ends inside its time (`xl_xact_commit`).
        let payload = main_data(&[7; 4]);
        let spec = RecordSpec { rmgr: rmgr::XACT, info: 0, xid: 3, payload: &payload };
        let end = server.writer.append(spec).1;
        server.write(first);
        assert_eq!(first, framer.step(server.written).expect("valid").record_end);
        server.write(end);
        assert!(matches!(framer.step(server.written), Err(FramerError::Wal(_))));
    }

    /// A PGDATA that ends at X, too, but is not what the log says.
    #[test]
    fn a_record_that_follows_another_history_is_an_error_in_the_last_page_too() {
        let mut server = Server::new("history");
        let mut framer = server.framer();
        server.writer = WalWriter::new(Lsn(SEGMENT), Lsn(SEGMENT - 200), SEGMENT, SYSTEM, PgTimeline(1));
        let end = server.append(rmgr::XLOG, 500);
        server.write(end);
        assert!(matches!(framer.step(server.written), Err(FramerError::Wal(_))));
    }

    /// The header of a page is complete before the page is written.
    #[test]
    fn a_bad_header_of_the_last_page_is_an_error() {
        let mut server = Server::new("header");
        let mut framer = server.framer();
        let end = server.append(rmgr::XLOG, 9_000);
        server.write(end);
        let path = segment_path(&server.pgdata, PgTimeline(1), Lsn(SEGMENT), SEGMENT);
        let mut bytes = fs::read(&path).expect("read");
        bytes[PAGE as usize + 8] ^= 1;
        fs::write(&path, bytes).expect("written");
        assert!(matches!(framer.step(server.written), Err(FramerError::Wal(_))));
    }

    /// During a replay the WAL receiver writes what the safekeepers sent: it is the log already.
    #[test]
    fn wal_before_the_start_is_ignored() {
        let server = Server::new("replay");
        let mut framer = server.framer();
        let written = Written { sequence: 3, written_lsn: SEGMENT - 8, final_lsn: SEGMENT - PAGE, timeline: 1 };
        let expected = Step { sendable: Lsn(SEGMENT), record_end: Lsn(SEGMENT), done: true };
        assert_eq!(expected, framer.step(written).expect("nothing to read"));
    }

    #[test]
    fn a_new_timeline_is_read_from_its_history_file() {
        let server = Server::new("timeline");
        let framer = server.framer();
        assert!(matches!(framer.timeline_entry(PgTimeline(1), PgTimeline(1)), Ok(None)));
        assert!(framer.timeline_entry(PgTimeline(2), PgTimeline(1)).is_err(), "no file");
        let path = server.pgdata.join("pg_wal/00000002.history");
        fs::write(&path, "1\t0/100000\tpromoted\n").expect("written");
        let entry = framer.timeline_entry(PgTimeline(2), PgTimeline(1)).expect("valid").expect("new");
        assert_eq!((PgTimeline(2), Lsn(SEGMENT)), (entry.timeline, entry.start_lsn));
        fs::write(&path, "1\t0/FFFF8\tpromoted\n").expect("written");
        assert!(framer.timeline_entry(PgTimeline(2), PgTimeline(1)).is_err(), "before X");
    }
}
