//! Finds record ends in a stream of WAL, with a state of fixed size.
//!
//! A record's payload is checksummed as it streams by; of the rest only the 24 bytes of its header are kept, because
//! the checksum covers the payload first. The same machine frames records for the decoder, see [`Sink`].

use core::{fmt, ops::ControlFlow};

use pgtypes::{FrameSummary, Lsn, PgTimeline, SystemId};

use crate::{
    PageFault, RecordFault, WalError, WalErrorKind, crc32c,
    facts::{Facts, widen_xid},
    format::{
        LONG_PAGE_HEADER_BYTES, PAGE_BYTES, PAGE_MAGIC, PageHeader, RECORD_BYTES_MAX, RECORD_HEADER_BYTES,
        RecordHeader, page_flags, page_header_bytes, rmgr, segment_bytes_valid, u32_at,
    },
};

/// A complete record with a valid checksum, without its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordInfo {
    /// First byte of its header.
    pub start: Lsn,
    /// Behind its last byte, aligned to 8 bytes; after `XLOG_SWITCH` the segment's end.
    pub end: Lsn,
    /// `xl_tot_len`, header included.
    pub total_len: u32,
    /// Start of the record before.
    pub prev: Lsn,
    /// Resource manager (`xl_rmid`).
    pub rmgr: u8,
    /// `xl_info`.
    pub info: u8,
    /// `xl_xid`, 0 for none.
    pub xid: u32,
    /// Timeline that it belongs to.
    pub timeline: PgTimeline,
    pub(crate) tablespace_location: bool,
}

/// Why the engine must refuse a record although PostgreSQL could replay it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unsupported {
    /// Only the extension that owns this resource manager can replay it.
    CustomResourceManager(u8),
    /// `CREATE TABLESPACE` with a location outside the data directory.
    TablespaceLocation,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unsupported::CustomResourceManager(rmgr) => {
                write!(f, "record of custom resource manager {rmgr}, which belongs to an extension")
            }
            Unsupported::TablespaceLocation => {
                write!(
                    f,
                    "record of resource manager {} (Tablespace): CREATE TABLESPACE with a location",
                    rmgr::TABLESPACE
                )
            }
        }
    }
}

impl RecordInfo {
    /// Why this record must not enter the log, if so.
    pub fn unsupported(&self) -> Option<Unsupported> {
        if self.rmgr >= rmgr::CUSTOM_FIRST {
            Some(Unsupported::CustomResourceManager(self.rmgr))
        } else if self.tablespace_location {
            Some(Unsupported::TablespaceLocation)
        } else {
            None
        }
    }
}

/// What the framing machine tells about the records it goes through.
pub(crate) trait Sink {
    /// A record begins; its header is plausible, its checksum not yet known.
    fn begin(&mut self, header: &[u8; RECORD_HEADER_BYTES]);
    /// The next bytes of its payload.
    fn payload(&mut self, bytes: &[u8]);
    /// The record in progress was broken off by a crash and is not part of the log.
    fn broken_off(&mut self);
    /// The payload is complete and its checksum matches; refusing it makes it an error of the stream.
    fn check(&mut self) -> Result<(), RecordFault>;
    /// The record is complete; `Break` stops the feeding right behind it.
    fn end(&mut self, record: &RecordInfo) -> ControlFlow<()>;
}

struct Each<F>(F);

impl<F: FnMut(&RecordInfo)> Sink for Each<F> {
    #[inline]
    fn begin(&mut self, _: &[u8; RECORD_HEADER_BYTES]) {}
    #[inline]
    fn payload(&mut self, _: &[u8]) {}
    #[inline]
    fn broken_off(&mut self) {}
    #[inline]
    fn check(&mut self) -> Result<(), RecordFault> {
        Ok(())
    }
    #[inline]
    fn end(&mut self, record: &RecordInfo) -> ControlFlow<()> {
        (self.0)(record);
        ControlFlow::Continue(())
    }
}

/// What the next byte is, page headers aside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// First byte of a record.
    Start,
    /// Inside a record header.
    Header,
    /// Inside a record's payload.
    Payload,
    /// Between a record's last byte and the next multiple of 8. `record`: not that of a skipped continuation.
    Padding { record: bool },
    /// In the unused rest of a segment, which has no page headers.
    SwitchRest,
    /// In the rest of a record that began before the log did.
    Continuation { remaining: u32 },
}

#[derive(Clone, Copy, Debug)]
struct Current {
    start: Lsn,
    header: [u8; RECORD_HEADER_BYTES],
    header_filled: u8,
    remaining: u32,
    crc: u32,
    timeline: PgTimeline,
    facts: Option<Facts>,
}

/// Follows a stream of WAL from record to record and sums it up.
///
/// `Copy` and of fixed size: keep a copy to look ahead, and go back to it when the bytes turn out to be no WAL.
#[derive(Clone, Copy, Debug)]
pub struct Scanner {
    segment_bytes: u64,
    record_bytes_max: u32,
    system_id: Option<SystemId>,
    position: Lsn,
    summary: FrameSummary,
    phase: Phase,
    page_timeline: PgTimeline,
    page_header: [u8; LONG_PAGE_HEADER_BYTES],
    page_header_filled: u8,
    page_header_wanted: u8,
    record: Current,
    broken_off: Lsn,
    failed: Option<WalError>,
}

impl Scanner {
    /// Starts at the start of a segment, of whose history nothing is known but what the arguments say.
    ///
    /// The rest of a record that began in an earlier segment is skipped; `summary().record_end` stays at `lsn` until the
    /// first complete record.
    ///
    /// # Panics
    /// When `segment_bytes` is no valid segment size or `lsn` no start of a segment: both are checked where they enter.
    pub fn at_segment_start(lsn: Lsn, segment_bytes: u64, max_full_xid: u64, timeline: PgTimeline) -> Scanner {
        let summary =
            FrameSummary { record_end: lsn, record_start: Lsn::INVALID, timeline, max_full_xid, commit_timestamp: 0 };
        assert!(
            segment_bytes_valid(segment_bytes) && lsn.offset_in(segment_bytes) == 0,
            "{lsn} does not start a segment of {segment_bytes} bytes"
        );
        Scanner::resume(summary, segment_bytes)
    }

    /// Continues at `summary.record_end`.
    ///
    /// With an invalid `record_start` (a log that holds no complete record yet) this is [`Scanner::at_segment_start`].
    ///
    /// # Panics
    /// When `segment_bytes` is no valid segment size, or the position is not aligned to 8 bytes.
    pub fn resume(summary: FrameSummary, segment_bytes: u64) -> Scanner {
        assert!(segment_bytes_valid(segment_bytes), "{segment_bytes} is no segment size");
        assert!(summary.record_end.offset_in(8) == 0, "{} is no end of a record", summary.record_end);
        Scanner {
            segment_bytes,
            record_bytes_max: RECORD_BYTES_MAX,
            system_id: None,
            position: summary.record_end,
            summary,
            phase: Phase::Start,
            page_timeline: summary.timeline,
            page_header: [0; LONG_PAGE_HEADER_BYTES],
            page_header_filled: 0,
            page_header_wanted: 0,
            record: Current {
                start: Lsn::INVALID,
                header: [0; RECORD_HEADER_BYTES],
                header_filled: 0,
                remaining: 0,
                crc: 0,
                timeline: summary.timeline,
                facts: None,
            },
            broken_off: Lsn::INVALID,
            failed: None,
        }
    }

    /// Also checks the system identifier of each segment.
    #[must_use]
    pub fn with_system_id(mut self, system_id: SystemId) -> Scanner {
        self.system_id = Some(system_id);
        self
    }

    /// Also refuses records longer than this.
    #[must_use]
    pub(crate) fn with_record_bytes_max(mut self, record_bytes_max: u32) -> Scanner {
        self.record_bytes_max = record_bytes_max.min(RECORD_BYTES_MAX);
        self
    }

    /// Whether no record is in progress.
    pub(crate) fn is_between_records(&self) -> bool {
        matches!(self.phase, Phase::Start | Phase::Continuation { .. } | Phase::Padding { record: false })
    }

    /// The next byte wanted; after an error, where the refused page or record starts.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// What the complete records so far add up to; `record_end <= position()`.
    pub fn summary(&self) -> FrameSummary {
        self.summary
    }

    /// Bytes of a segment.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Takes the bytes at [`Scanner::position`], in slices of any size, and tells of each record that they complete.
    ///
    /// # Errors
    /// At the first byte from which it is certain that no record follows. `summary()` then ends with the last good
    /// record, and every later call fails in the same way: go back to a copy, or [`Scanner::resume`].
    pub fn feed(&mut self, bytes: &[u8], on_record: impl FnMut(&RecordInfo)) -> Result<(), WalError> {
        let consumed = self.feed_sink(bytes, &mut Each(on_record))?;
        debug_assert_eq!(bytes.len(), consumed);
        Ok(())
    }

    /// As [`Scanner::feed`]; returns how many bytes were taken, fewer than given when the sink broke.
    pub(crate) fn feed_sink(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize, WalError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.run(bytes, sink).inspect_err(|error| {
            self.failed = Some(*error);
            self.position = error.lsn;
        })
    }

    fn run(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize, WalError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.phase == Phase::SwitchRest {
                let left = self.segment_bytes - self.position.offset_in(self.segment_bytes);
                let (zeros, behind) = rest.split_at(rest.len().min(left as usize));
                if zeros.iter().fold(0, |all, byte| all | byte) != 0 {
                    return Err(WalError { lsn: self.record.start, kind: WalErrorKind::SwitchRest });
                }
                rest = behind;
                self.position = self.position.advance(zeros.len() as u64);
                if zeros.len() as u64 == left && self.end_record(sink).is_break() {
                    break;
                }
                continue;
            }

            let page_offset = self.position.offset_in(PAGE_BYTES) as usize;
            if page_offset == 0 {
                self.page_header_wanted = page_header_bytes(self.position, self.segment_bytes) as u8;
                self.page_header_filled = 0;
            }
            if self.page_header_filled < self.page_header_wanted {
                rest = self.take_page_header(rest, sink)?;
                continue;
            }
            let in_page = rest.len().min(PAGE_BYTES as usize - page_offset);

            match self.phase {
                Phase::SwitchRest => {}
                Phase::Start => {
                    self.record.start = self.position;
                    self.record.header_filled = 0;
                    self.record.timeline = self.page_timeline;
                    self.phase = Phase::Header;
                }
                Phase::Header => {
                    let filled = usize::from(self.record.header_filled);
                    let taken = (RECORD_HEADER_BYTES - filled).min(in_page);
                    self.record.header[filled..filled + taken].copy_from_slice(&rest[..taken]);
                    self.record.header_filled += taken as u8;
                    rest = &rest[taken..];
                    self.position = self.position.advance(taken as u64);
                    if filled < 4 && filled + taken >= 4 {
                        self.check_record_length()?;
                    }
                    if filled + taken == RECORD_HEADER_BYTES {
                        self.begin_payload(sink)?;
                        if self.record.remaining == 0 && self.end_payload(sink)?.is_break() {
                            break;
                        }
                    }
                }
                Phase::Payload => {
                    let taken = in_page.min(self.record.remaining as usize);
                    let (payload, behind) = rest.split_at(taken);
                    self.record.crc = crc32c(self.record.crc, payload);
                    if let Some(facts) = &mut self.record.facts
                        && !facts.is_done()
                    {
                        facts.payload(payload);
                    }
                    sink.payload(payload);
                    rest = behind;
                    self.position = self.position.advance(taken as u64);
                    self.record.remaining -= taken as u32;
                    if self.record.remaining == 0 && self.end_payload(sink)?.is_break() {
                        break;
                    }
                }
                Phase::Padding { record } => {
                    let left = self.position.align8().bytes_since(self.position) as usize;
                    let taken = left.min(in_page);
                    if rest[..taken].iter().any(|byte| *byte != 0) {
                        // The word that the padding is in, when the record's start was not seen.
                        let lsn = if record { self.record.start } else { self.position.floor(8) };
                        return Err(WalError { lsn, kind: WalErrorKind::Padding });
                    }
                    rest = &rest[taken..];
                    self.position = self.position.advance(taken as u64);
                    if taken == left {
                        self.phase = Phase::Start;
                        if record && self.end_record(sink).is_break() {
                            break;
                        }
                    }
                }
                Phase::Continuation { remaining } => {
                    let taken = in_page.min(remaining as usize);
                    rest = &rest[taken..];
                    self.position = self.position.advance(taken as u64);
                    self.phase = match remaining - taken as u32 {
                        0 if self.position.offset_in(8) == 0 => Phase::Start,
                        0 => Phase::Padding { record: false },
                        remaining => Phase::Continuation { remaining },
                    };
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }

    fn take_page_header<'a>(&mut self, bytes: &'a [u8], sink: &mut impl Sink) -> Result<&'a [u8], WalError> {
        let (filled, wanted) = (usize::from(self.page_header_filled), usize::from(self.page_header_wanted));
        let taken = (wanted - filled).min(bytes.len());
        self.page_header[filled..filled + taken].copy_from_slice(&bytes[..taken]);
        self.page_header_filled += taken as u8;
        self.position = self.position.advance(taken as u64);
        if filled + taken == wanted {
            let page = self.position.floor(PAGE_BYTES);
            self.check_page(page, sink).map_err(|kind| WalError { lsn: page, kind })?;
        }
        Ok(&bytes[taken..])
    }

    /// The checks of `XLogReaderValidatePageHeader` and of the continuation (`access/transam/xlogreader.c`).
    fn check_page(&mut self, page: Lsn, sink: &mut impl Sink) -> Result<(), WalErrorKind> {
        let bytes = &self.page_header[..usize::from(self.page_header_wanted)];
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(WalErrorKind::EndOfWal);
        }
        let header = PageHeader::parse(bytes).expect("the length is that of a short or a long header");
        let fault = |fault| Err(WalErrorKind::PageHeader(fault));
        if header.magic != PAGE_MAGIC {
            return fault(PageFault::Magic(header.magic));
        }
        let is_long = header.flags & page_flags::LONG_HEADER != 0;
        if header.flags & !page_flags::ALL != 0 || is_long != header.long.is_some() {
            return fault(PageFault::Flags(header.flags));
        }
        if header.address != page {
            return fault(PageFault::Address(header.address));
        }
        if let Some(long) = header.long {
            if u64::from(long.segment_bytes) != self.segment_bytes {
                return fault(PageFault::SegmentSize(long.segment_bytes));
            }
            if u64::from(long.page_bytes) != PAGE_BYTES {
                return fault(PageFault::PageSize(long.page_bytes));
            }
            if let Some(expected) = self.system_id
                && expected != long.system_id
            {
                return fault(PageFault::SystemId { expected: expected.0, found: long.system_id.0 });
            }
        }
        // A record can begin a timeline in the middle of a page, the header of which keeps the old one.
        let timeline = self.page_timeline.max(self.summary.timeline);
        if header.timeline < timeline {
            return fault(PageFault::Timeline { previous: timeline.0, found: header.timeline.0 });
        }

        // Only at the very start of a log may a page continue, or overwrite, a record that was not seen.
        let at_log_start =
            self.phase == Phase::Start && !self.summary.record_start.is_valid() && page == self.summary.record_end;
        let expected = self.lacking();
        let continues = header.flags & page_flags::FIRST_IS_CONTRECORD != 0;
        let overwrites = header.flags & page_flags::FIRST_IS_OVERWRITE_CONTRECORD != 0;
        let found = if continues { header.remaining_bytes } else { 0 };
        if overwrites && !continues && (expected != 0 || at_log_start) {
            if matches!(self.phase, Phase::Header | Phase::Payload) {
                self.broken_off = self.record.start;
                sink.broken_off();
            }
            self.phase = Phase::Start;
        } else if continues && at_log_start && (1..=RECORD_BYTES_MAX).contains(&found) {
            self.phase = Phase::Continuation { remaining: found };
        } else if found != expected || continues != (expected != 0) {
            return fault(PageFault::Continuation { expected, found });
        }
        self.page_timeline = header.timeline;
        Ok(())
    }

    /// Bytes that the record in progress lacks, 0 when there is none.
    fn lacking(&self) -> u32 {
        match self.phase {
            // A record starts 8 bytes or more before the end of a page, so its length is known there.
            Phase::Header => u32_at(&self.record.header, 0) - u32::from(self.record.header_filled),
            Phase::Payload => self.record.remaining,
            Phase::Continuation { remaining } => remaining,
            Phase::Start | Phase::Padding { .. } | Phase::SwitchRest => 0,
        }
    }

    fn refuse<T>(&self, kind: WalErrorKind) -> Result<T, WalError> {
        Err(WalError { lsn: self.record.start, kind })
    }

    fn check_record_length(&self) -> Result<(), WalError> {
        match u32_at(&self.record.header, 0) {
            0 => self.refuse(WalErrorKind::EndOfWal),
            length if length < RECORD_HEADER_BYTES as u32 || length > self.record_bytes_max => {
                self.refuse(WalErrorKind::RecordLength(length))
            }
            _ => Ok(()),
        }
    }

    /// The checks of `ValidXLogRecordHeader`.
    fn begin_payload(&mut self, sink: &mut impl Sink) -> Result<(), WalError> {
        let header = RecordHeader::parse(&self.record.header);
        if header.rmgr > rmgr::BUILTIN_LAST && header.rmgr < rmgr::CUSTOM_FIRST {
            return self.refuse(WalErrorKind::ResourceManager(header.rmgr));
        }
        let expected = self.summary.record_start;
        let linked = if expected.is_valid() { header.prev == expected } else { header.prev < self.record.start };
        if !linked {
            return self.refuse(WalErrorKind::PrevLink { expected, found: header.prev });
        }
        self.record.remaining = header.total_len - RECORD_HEADER_BYTES as u32;
        self.record.crc = 0;
        self.record.facts = Facts::begin(&header, self.summary.max_full_xid);
        self.phase = Phase::Payload;
        sink.begin(&self.record.header);
        Ok(())
    }

    /// Checks the record whose last byte was taken, and ends it unless padding or the rest of a segment follows.
    fn end_payload(&mut self, sink: &mut impl Sink) -> Result<ControlFlow<()>, WalError> {
        let header = RecordHeader::parse(&self.record.header);
        let crc = crc32c(self.record.crc, &self.record.header[..RecordHeader::CRC_OFFSET]);
        if crc != header.crc {
            return self.refuse(WalErrorKind::Crc);
        }
        if let Some(facts) = &self.record.facts {
            facts.finish().or_else(|fault| self.refuse(WalErrorKind::Record(fault)))?;
            if let Some(found) = facts.overwritten
                && self.broken_off.is_valid()
                && self.broken_off != found
            {
                let expected = self.broken_off;
                return self.refuse(WalErrorKind::Record(RecordFault::Overwritten { expected, found }));
            }
        }
        sink.check().or_else(|fault| self.refuse(WalErrorKind::Record(fault)))?;
        if header.is_switch() && self.position.offset_in(self.segment_bytes) != 0 {
            self.phase = Phase::SwitchRest;
            Ok(ControlFlow::Continue(()))
        } else if self.position.offset_in(8) != 0 {
            self.phase = Phase::Padding { record: true };
            Ok(ControlFlow::Continue(()))
        } else {
            Ok(self.end_record(sink))
        }
    }

    fn end_record(&mut self, sink: &mut impl Sink) -> ControlFlow<()> {
        let header = RecordHeader::parse(&self.record.header);
        self.phase = Phase::Start;
        self.broken_off = Lsn::INVALID;
        self.summary.record_start = self.record.start;
        self.summary.record_end = self.position;
        self.summary.timeline = self.summary.timeline.max(self.record.timeline);
        let mut tablespace_location = false;
        if let Some(facts) = &self.record.facts {
            self.summary.max_full_xid = facts.max_full_xid;
            self.summary.timeline = facts.timeline.unwrap_or_default().max(self.summary.timeline);
            self.summary.commit_timestamp =
                facts.commit_timestamp.unwrap_or_default().max(self.summary.commit_timestamp);
            tablespace_location = facts.tablespace_location;
        } else {
            self.summary.max_full_xid = widen_xid(self.summary.max_full_xid, header.xid);
        }
        sink.end(&RecordInfo {
            start: self.summary.record_start,
            end: self.summary.record_end,
            total_len: header.total_len,
            prev: header.prev,
            rmgr: header.rmgr,
            info: header.info,
            xid: header.xid,
            timeline: self.summary.timeline,
            tablespace_location,
        })
    }
}
