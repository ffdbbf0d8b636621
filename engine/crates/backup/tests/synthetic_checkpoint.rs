//! The synthetic checkpoint at every place of a page and of a segment: the log is whole afterwards, and the files agree with it.

use backup::{SyntheticCheckpoint, WalPageError};
use pgformat::{CHECKPOINT_BYTES, CheckPoint, WalLevel};
use pgtypes::{FrameSummary, Lsn, PgTimeline, SystemId};
use wal::{
    Decoder, LONG_PAGE_HEADER_BYTES, PAGE_BYTES, PageHeader, RECORD_BYTES_MAX, Record, RecordSpec, Scanner, WalWriter,
    main_data, page_header_bytes, rmgr, xlog_info,
};

const SEGMENT: u64 = 1 << 20;
const ORIGIN: Lsn = Lsn(16 * SEGMENT);
const SYSTEM: SystemId = SystemId(0x1122_3344_5566_7788);
const TIMELINE: PgTimeline = PgTimeline(3);
/// `XLOG_NOOP`.
const NOOP: u8 = 0x20;
/// Header, and that of the main data; 88 bytes of the checkpoint.
const RECORD_BYTES: u32 = 24 + 2 + CHECKPOINT_BYTES as u32;

fn counters() -> CheckPoint {
    CheckPoint {
        redo: Lsn(1),
        timeline: PgTimeline(1),
        previous_timeline: PgTimeline(1),
        full_page_writes: true,
        wal_level: WalLevel::Logical,
        next_full_xid: 5 << 32 | 1234,
        next_oid: 20_000,
        next_multi: 7,
        next_multi_offset: 99,
        oldest_xid: 800,
        oldest_xid_database: 1,
        oldest_multi: 2,
        oldest_multi_database: 5,
        time: 1_800_000_000,
        oldest_commit_ts_xid: 900,
        newest_commit_ts_xid: 1000,
        oldest_active_xid: 1200,
    }
}

/// A payload so that a record has `total` bytes, or up to 7 less.
fn payload(total: u64) -> Vec<u8> {
    for bytes in (total - 7..=total).rev() {
        for header in [2, 5] {
            let Some(data) = bytes.checked_sub(24 + header).filter(|data| *data > 0) else { continue };
            let payload = main_data(&vec![0xA5; data as usize]);
            if payload.len() as u64 == bytes - 24 {
                return payload;
            }
        }
    }
    panic!("no record of {total} bytes");
}

/// A log from the start of a segment that ends at `x`, the last record of which begins at least a page before; `None` when no
/// record can end there. The start of the last record beside it.
fn log_up_to(x: Lsn) -> (WalWriter, Lsn) {
    let mut writer = WalWriter::new(ORIGIN, Lsn(ORIGIN.0 - 0x50), SEGMENT, SYSTEM, TIMELINE);
    let noop = RecordSpec { rmgr: rmgr::XLOG, info: NOOP, ..RecordSpec::default() };
    writer.append(RecordSpec { payload: &payload(64), ..noop });
    let mut usable = x.bytes_since(writer.position());
    let mut page = writer.position().floor(PAGE_BYTES).advance(PAGE_BYTES);
    while page < x {
        usable -= page_header_bytes(page, SEGMENT) as u64;
        page = page.advance(PAGE_BYTES);
    }
    if usable > 0 {
        writer.append(RecordSpec { payload: &payload(usable), ..noop });
    }
    assert_eq!(x, writer.position());
    let last = writer.last_record();
    (writer, last)
}

fn decode(bytes: &[u8]) -> Vec<Record> {
    let scanner = Scanner::at_segment_start(ORIGIN, SEGMENT, 0, TIMELINE).with_system_id(SYSTEM);
    let mut decoder = Decoder::new(scanner, RECORD_BYTES_MAX);
    let (mut records, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let taken = decoder.feed(rest).expect("sound WAL");
        rest = &rest[taken..];
        records.extend(decoder.poll_record());
    }
    records
}

fn check(x: Lsn) {
    let (mut writer, last) = log_up_to(x);
    let mut log = writer.take_bytes();
    let page_before = log[log.len() - x.offset_in(PAGE_BYTES) as usize..].to_vec();
    let summary = FrameSummary {
        record_end: x,
        record_start: last,
        timeline: TIMELINE,
        max_full_xid: 5 << 32 | 1233,
        commit_timestamp: 0,
    };
    let made = SyntheticCheckpoint::new(&summary, counters(), SYSTEM, SEGMENT, &page_before).expect("a checkpoint");

    assert_eq!((x, x.advance(made.bytes.len() as u64)), (made.begin, made.end), "{x}");
    log.extend_from_slice(&made.bytes);
    let records = decode(&log);
    let record = records.last().expect("records");
    assert_eq!((made.record_start, made.end, last), (record.info.start, record.info.end, record.info.prev), "{x}");
    assert_eq!((rmgr::XLOG, xlog_info::CHECKPOINT_SHUTDOWN, 0), (record.info.rmgr, record.info.info, record.info.xid));
    assert_eq!((RECORD_BYTES, TIMELINE), (record.info.total_len, record.info.timeline));
    let expected = CheckPoint {
        redo: made.record_start,
        timeline: TIMELINE,
        previous_timeline: TIMELINE,
        full_page_writes: false,
        oldest_active_xid: 0,
        ..counters()
    };
    let main = record.main_data().first_chunk().expect("a checkpoint");
    assert_eq!((Ok(expected), expected), (CheckPoint::parse(main), made.checkpoint));
    check_files(x, &made, &log);
}

/// Whole pages of the files are those of the log; a segment that begins before X's page has its first header.
fn check_files(x: Lsn, made: &SyntheticCheckpoint, log: &[u8]) {
    let crosses = x.floor(SEGMENT) != Lsn(made.end.0 - 1).floor(SEGMENT);
    assert_eq!(if crosses { 2 } else { 1 }, made.files.len(), "{x}");
    for (file, number) in made.files.iter().zip(x.0 / SEGMENT..) {
        assert_eq!(format!("pg_wal/{}", pgformat::segment_file_name(TIMELINE, number, SEGMENT)), file.path);
        assert_eq!(SEGMENT, file.length);
        let segment_start = Lsn(number * SEGMENT);
        let mut contents = vec![0; SEGMENT as usize];
        for piece in &file.pieces {
            contents[piece.offset as usize..][..piece.bytes.len()].copy_from_slice(&piece.bytes);
        }
        let first = PageHeader::parse(&contents[..LONG_PAGE_HEADER_BYTES]).expect("a header");
        let long = first.long.expect("a long header");
        assert_eq!((segment_start, TIMELINE), (first.address, first.timeline));
        assert_eq!((SYSTEM, SEGMENT, PAGE_BYTES), (long.system_id, long.segment_bytes.into(), long.page_bytes.into()));
        // What the server reads and writes again, from X's page on, is the log; behind its end there is nothing.
        let begin = x.floor(PAGE_BYTES).max(segment_start);
        let end = made.end.min(segment_start.advance(SEGMENT));
        let in_log = |lsn: Lsn| lsn.bytes_since(ORIGIN) as usize;
        let in_file = |lsn: Lsn| lsn.bytes_since(segment_start) as usize;
        assert_eq!(log[in_log(begin)..in_log(end)], contents[in_file(begin)..in_file(end)], "{x}");
        assert!(contents[in_file(end)..].iter().all(|byte| *byte == 0), "{x}");
    }
}

/// Places of a page at which a record can end.
fn ends(page: Lsn) -> impl Iterator<Item = Lsn> {
    let header = page_header_bytes(page, SEGMENT) as u64;
    (0..PAGE_BYTES / 8)
        .map(|place| place * 8)
        .filter(move |offset| *offset == 0 || *offset > header)
        .map(move |offset| page.advance(offset))
}

/// A page within a segment, the last of a segment, and the first: 1,024 places each, those in a page's header apart.
#[test]
fn the_log_goes_on_at_every_place_of_a_page_and_of_a_segment() {
    let mut checked = 0;
    for page in [ORIGIN.advance(2 * PAGE_BYTES), ORIGIN.advance(SEGMENT - PAGE_BYTES), ORIGIN.advance(SEGMENT)] {
        for x in ends(page) {
            check(x);
            checked += 1;
        }
    }
    // 1,024 less 3 in a short header, 5 in a long one.
    assert_eq!(2 * 1021 + 1019, checked);
}

/// After an import the log is empty and begins with this record, as after `pg_resetwal`.
#[test]
fn the_first_record_of_a_log_has_none_before() {
    let summary = FrameSummary { record_end: ORIGIN, timeline: TIMELINE, ..FrameSummary::default() };
    let made = SyntheticCheckpoint::new(&summary, counters(), SYSTEM, SEGMENT, &[]).expect("a checkpoint");
    let records = decode(&made.bytes);
    let [record] = &records[..] else { panic!("{records:?}") };
    assert_eq!((ORIGIN.advance(40), Lsn::INVALID), (record.info.start, record.info.prev));
}

/// A promotion goes on in the page where it was; pages' timelines may not fall, or PostgreSQL finds no checkpoint.
#[test]
fn the_first_header_of_a_segment_is_of_the_timeline_of_the_page_that_follows() {
    let x = ORIGIN.advance(2 * PAGE_BYTES + 800);
    let (mut writer, last) = log_up_to(x);
    let log = writer.take_bytes();
    let before = &log[log.len() - 800..];
    let summary = |timeline| FrameSummary { record_end: x, record_start: last, timeline, ..FrameSummary::default() };
    let make = |timeline| SyntheticCheckpoint::new(&summary(timeline), counters(), SYSTEM, SEGMENT, before);
    let promoted = PgTimeline(TIMELINE.0 + 1);
    let made = make(promoted).expect("a checkpoint");
    let [file] = &made.files[..] else { panic!("{:?}", made.files) };
    assert_eq!(format!("pg_wal/{}", pgformat::segment_file_name(promoted, x.0 / SEGMENT, SEGMENT)), file.path);
    let first = PageHeader::parse(&file.pieces[0].bytes).expect("a header");
    assert_eq!((TIMELINE, promoted), (first.timeline, made.checkpoint.timeline));
    assert_eq!(Err(WalPageError::Header(x)), make(PgTimeline(TIMELINE.0 - 1)), "a page of a later timeline");
}

#[test]
fn bytes_that_are_not_those_in_front_of_x_are_refused() {
    let x = ORIGIN.advance(2 * PAGE_BYTES + 800);
    let (mut writer, last) = log_up_to(x);
    let log = writer.take_bytes();
    let before = &log[log.len() - 800..];
    let summary = |x| FrameSummary { record_end: x, record_start: last, timeline: TIMELINE, ..FrameSummary::default() };
    let refused = |x, system, before: &[u8]| {
        SyntheticCheckpoint::new(&summary(x), counters(), system, SEGMENT, before).expect_err("not accepted")
    };
    let length = |found, expected| WalPageError::Length { x, found, expected };
    assert_eq!(length(799, 800), refused(x, SYSTEM, &before[1..]));
    assert_eq!(length(0, 800), refused(x, SYSTEM, &[]));
    assert_eq!(WalPageError::Header(x), refused(x, SYSTEM, &[0; 800]));
    assert_eq!(WalPageError::Header(x), refused(x, SYSTEM, &log[PAGE_BYTES as usize..][..800]));
    let inside_header = x.floor(PAGE_BYTES).advance(16);
    assert_eq!(WalPageError::Header(inside_header), refused(inside_header, SYSTEM, &before[..16]));
    assert_eq!(WalPageError::Position(Lsn(x.0 + 4)), refused(Lsn(x.0 + 4), SYSTEM, before));
    assert_eq!(WalPageError::Position(Lsn::INVALID), refused(Lsn::INVALID, SYSTEM, &[]));

    let x = ORIGIN.advance(800);
    let (mut writer, last) = log_up_to(x);
    let before = writer.take_bytes();
    let summary = FrameSummary { record_end: x, record_start: last, timeline: TIMELINE, ..FrameSummary::default() };
    let stranger = SyntheticCheckpoint::new(&summary, counters(), SystemId(9), SEGMENT, &before);
    assert_eq!(Err(WalPageError::Header(x)), stranger, "a segment of another cluster");
}
