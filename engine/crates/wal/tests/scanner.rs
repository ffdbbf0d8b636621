//! The scanner over handcrafted WAL: what it accepts, where records end, what they add up to, what it refuses.

use pgtypes::{FrameSummary, Lsn, PgTimeline, SystemId};
use proptest::prelude::*;
use wal::{
    PageFault, RecordFault, RecordInfo, RecordSpec, Scanner, Unsupported, WalError, WalErrorKind, WalWriter, main_data,
    rmgr, xact_info, xlog_info,
};

const SEGMENT: u64 = 1 << 20;
const SYSTEM: SystemId = SystemId(0x6543_2100_1234_5678);
const ORIGIN: Lsn = Lsn(16 * SEGMENT);
const TIMELINE: PgTimeline = PgTimeline(1);

fn writer() -> WalWriter {
    WalWriter::new(ORIGIN, Lsn(ORIGIN.0 - 0x50), SEGMENT, SYSTEM, TIMELINE)
}

fn scanner() -> Scanner {
    Scanner::at_segment_start(ORIGIN, SEGMENT, 700, TIMELINE).with_system_id(SYSTEM)
}

fn noop(payload: &[u8]) -> RecordSpec<'_> {
    RecordSpec { rmgr: rmgr::XLOG, info: xlog_info::NOOP, xid: 0, payload }
}

/// Feeds everything at once.
fn scan(scanner: &mut Scanner, bytes: &[u8]) -> (Vec<RecordInfo>, Result<(), WalError>) {
    let mut records = Vec::new();
    let result = scanner.feed(bytes, |record| records.push(*record));
    (records, result)
}

fn scan_good(wal: &WalWriter) -> (Vec<RecordInfo>, FrameSummary) {
    let mut scanner = scanner();
    let (records, result) = scan(&mut scanner, wal.bytes());
    assert_eq!(Ok(()), result);
    assert_eq!(wal.position(), scanner.position());
    (records, scanner.summary())
}

fn scan_bad(bytes: &[u8]) -> (WalError, FrameSummary) {
    let mut scanner = scanner();
    let (_, result) = scan(&mut scanner, bytes);
    let error = result.expect_err("these bytes are no WAL");
    assert_eq!(Err(error), scanner.feed(&[0], |_| ()), "a failed scanner stays failed");
    (error, scanner.summary())
}

/// Summary of one record with this main data, and the record.
fn scan_one(rmgr: u8, info: u8, xid: u32, data: &[u8]) -> (RecordInfo, FrameSummary) {
    let mut wal = writer();
    wal.append(RecordSpec { rmgr, info, xid, payload: &main_data(data) });
    let (records, summary) = scan_good(&wal);
    (records[0], summary)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn record_ends_are_aligned_and_link_back() {
    let mut wal = writer();
    let (first, first_end) = wal.append(noop(&main_data(b"abc")));
    let (second, second_end) = wal.append(noop(&main_data(b"")));

    let (records, summary) = scan_good(&wal);

    assert_eq!(Lsn(ORIGIN.0 + 40), first);
    assert_eq!(
        vec![(first, first_end, 29), (second, second_end, 24)],
        records.iter().map(|r| (r.start, r.end, r.total_len)).collect::<Vec<_>>()
    );
    assert_eq!(first, records[1].prev);
    assert_eq!((second, second_end), (summary.record_start, summary.record_end));
    assert_eq!((TIMELINE, 700, 0), (summary.timeline, summary.max_full_xid, summary.commit_timestamp));
}

/// The end of a record whose last byte fills a page is the page's end, not the first record of the next page.
#[test]
fn record_that_fills_its_page_ends_there() {
    let mut wal = writer();
    wal.append(noop(&main_data(&vec![7; 8192 - 40 - 24 - 5])));
    assert_eq!(Lsn(ORIGIN.0 + 8192), wal.position());
    let (_, summary) = scan_good(&wal);
    assert_eq!(Lsn(ORIGIN.0 + 8192), summary.record_end);

    wal.append(noop(&[]));
    let (records, _) = scan_good(&wal);
    assert_eq!(Lsn(ORIGIN.0 + 8192 + 24), records[1].start);
}

#[test]
fn record_across_pages_and_segments_is_one() {
    let mut wal = writer();
    wal.append(noop(&main_data(&vec![1; 3 * SEGMENT as usize])));
    wal.append(noop(&[]));
    let (records, _) = scan_good(&wal);
    assert_eq!([3 * SEGMENT as u32 + 29, 24], [records[0].total_len, records[1].total_len]);
}

#[test]
fn record_is_complete_only_with_its_padding() {
    let mut wal = writer();
    wal.append(noop(&main_data(b"abc")));
    let mut scanner = scanner();
    let bytes = wal.bytes();
    assert!(scan(&mut scanner, &bytes[..bytes.len() - 1]).0.is_empty());
    assert_eq!(ORIGIN, scanner.summary().record_end);
    assert_eq!(1, scan(&mut scanner, &bytes[bytes.len() - 1..]).0.len());
    assert_eq!(scanner.position(), scanner.summary().record_end);
}

/// A torn write over a recycled segment left a complete record with other bytes behind it: the logs of two safekeepers
/// would have differed there.
#[test]
fn padding_behind_a_record_must_be_zero() {
    let mut wal = writer();
    let (_, before) = wal.append(noop(&[]));
    wal.append(noop(&[1, 2, 3]));
    let mut bytes = wal.bytes().to_vec();
    *bytes.last_mut().unwrap() = 1;
    let (error, summary) = scan_bad(&bytes);
    assert_eq!(WalError { lsn: before, kind: WalErrorKind::Padding }, error);
    assert_eq!(before, summary.record_end);
}

#[test]
fn switch_record_ends_with_the_segment() {
    let mut wal = writer();
    let (start, _) = wal.append(noop(&[]));
    wal.switch_segment();
    wal.append(noop(&[]));

    let (records, _) = scan_good(&wal);

    assert_eq!(Lsn(ORIGIN.0 + SEGMENT), records[1].end);
    assert_eq!(start, records[1].prev);
    assert_eq!(Lsn(ORIGIN.0 + SEGMENT + 40), records[2].start);
}

#[test]
fn switch_record_is_incomplete_before_the_segment_is() {
    let mut wal = writer();
    let (_, before) = wal.append(noop(&[]));
    wal.switch_segment();
    let mut scanner = scanner();
    assert_eq!(Ok(()), scan(&mut scanner, &wal.bytes()[..SEGMENT as usize - 1]).1);
    assert_eq!(before, scanner.summary().record_end);
}

#[test]
fn rest_of_a_switched_segment_must_be_zero() {
    let mut wal = writer();
    let (_, before) = wal.append(noop(&[]));
    wal.switch_segment();
    let mut bytes = wal.bytes().to_vec();
    bytes[SEGMENT as usize - 1] = 1;
    let (error, summary) = scan_bad(&bytes);
    assert_eq!(WalError { lsn: before, kind: WalErrorKind::SwitchRest }, error);
    assert_eq!(before, summary.record_end);
}

/// A log may begin in the middle of a record: what it adds up to begins with the record behind.
#[test]
fn continuation_at_the_start_of_a_log_is_skipped() {
    for length in [10, 5000, SEGMENT as usize + 8192 * 3] {
        let before = Lsn(ORIGIN.0 - 64);
        let mut wal = WalWriter::new(before, Lsn(before.0 - 0x50), SEGMENT, SYSTEM, TIMELINE);
        wal.append(noop(&main_data(&vec![1; 64 + length])));
        let (start, end) = wal.append(noop(&[]));

        let mut scanner = scanner();
        let (records, result) = scan(&mut scanner, &wal.bytes()[64..]);

        assert_eq!(Ok(()), result, "{length}");
        assert_eq!(vec![(start, end)], records.iter().map(|r| (r.start, r.end)).collect::<Vec<_>>());
    }
}

#[test]
fn continuation_elsewhere_is_refused() {
    let mut wal = writer();
    wal.append(noop(&main_data(&vec![7; 8192 - 40 - 24 - 5])));
    wal.append(noop(&[]));
    let mut bytes = wal.bytes().to_vec();
    bytes[8192 + 2] |= 1;
    bytes[8192 + 16] = 9;
    let (error, summary) = scan_bad(&bytes);
    let kind = WalErrorKind::PageHeader(PageFault::Continuation { expected: 0, found: 9 });
    assert_eq!(WalError { lsn: Lsn(ORIGIN.0 + 8192), kind }, error);
    assert_eq!(Lsn(ORIGIN.0 + 8192), summary.record_end);
}

/// A crash can leave the first half of a record; the server that recovered from it marks the page behind.
#[test]
fn broken_off_record_is_dropped() {
    let mut wal = writer();
    let (before, before_end) = wal.append(noop(&[]));
    wal.append(noop(&main_data(&[1; 9000])));
    wal.break_off_last_record(before);
    wal.append(noop(&[]));

    let (records, _) = scan_good(&wal);

    let summary: Vec<_> = records.iter().map(|r| (r.start, r.prev, r.info)).collect();
    let page = Lsn(ORIGIN.0 + 8192);
    assert_eq!((before, before_end), (records[0].start, records[0].end));
    assert_eq!((page.advance(24), before, xlog_info::OVERWRITE_CONTRECORD), summary[1]);
    assert_eq!((summary[1].0, xlog_info::NOOP), (summary[2].1, summary[2].2));
}

#[test]
fn overwriting_another_record_than_the_broken_one_is_refused() {
    let mut wal = writer();
    let (before, before_end) = wal.append(noop(&[]));
    wal.append(noop(&main_data(&[1; 9000])));
    let mut broken = wal.clone();
    broken.break_off_last_record(before);
    // The first page holds a record in another place, so the mark behind it names none of its records.
    let mut other = writer();
    let (other_before, _) = other.append(noop(&main_data(&[0; 100])));
    let (expected, _) = other.append(noop(&main_data(&[1; 9000])));
    let mut bytes = other.bytes()[..8192].to_vec();
    bytes.extend_from_slice(&broken.bytes()[8192..]);
    assert_eq!(before, other_before, "so that the back-link fits");

    let (error, _) = scan_bad(&bytes);
    let fault = RecordFault::Overwritten { expected, found: before_end };
    assert_eq!(WalErrorKind::Record(fault), error.kind);
}

#[test]
fn zeros_are_the_end() {
    let mut wal = writer();
    let (_, end) = wal.append(noop(&main_data(&[3; 100])));
    let mut bytes = wal.bytes().to_vec();
    bytes.resize(3 * 8192, 0);
    let (error, summary) = scan_bad(&bytes);
    assert_eq!(WalError { lsn: end, kind: WalErrorKind::EndOfWal }, error);
    assert_eq!(end, summary.record_end);
    // A page that was not written, behind a page that is full.
    let mut wal = writer();
    wal.append(noop(&main_data(&vec![7; 8192 - 40 - 24 - 5])));
    let mut bytes = wal.bytes().to_vec();
    bytes.resize(2 * 8192, 0);
    assert_eq!(WalError { lsn: Lsn(ORIGIN.0 + 8192), kind: WalErrorKind::EndOfWal }, scan_bad(&bytes).0);
    // ... and in the middle of a record.
    let mut wal = writer();
    wal.append(noop(&main_data(&[7; 9000])));
    let mut bytes = wal.bytes()[..8192].to_vec();
    bytes.resize(2 * 8192, 0);
    assert_eq!(WalError { lsn: Lsn(ORIGIN.0 + 8192), kind: WalErrorKind::EndOfWal }, scan_bad(&bytes).0);
}

/// Each row: which byte of a page or record header is changed to what, and the error that must follow.
#[test]
fn damaged_headers_are_refused() {
    let mut wal = writer();
    let (start, end) = wal.append(noop(&main_data(&[3; 9000])));
    wal.append(noop(&main_data(&[3; 8])));
    let record = end.bytes_since(ORIGIN) as usize;
    let second_page = 8192;
    let page = |fault| WalErrorKind::PageHeader(fault);
    let rows = [
        (0, 0x15, 0, page(PageFault::Magic(0xD115))),
        (second_page + 3, 0x10, 1, page(PageFault::Flags(0x1001))),
        (2, 0, 0, page(PageFault::Flags(0))),
        (second_page + 2, 3, 1, page(PageFault::Flags(3))),
        (second_page + 4, 0, 1, page(PageFault::Timeline { previous: 1, found: 0 })),
        (second_page + 15, 0x80, 1, page(PageFault::Address(Lsn((1 << 63) | (ORIGIN.0 + 8192))))),
        (second_page + 2, 0, 1, page(PageFault::Continuation { expected: 9000 + 29 - 8152, found: 0 })),
        (24, 0, 0, page(PageFault::SystemId { expected: SYSTEM.0, found: SYSTEM.0 & !0xFF })),
        (34, 0, 0, page(PageFault::SegmentSize(0))),
        (37, 0, 0, page(PageFault::PageSize(0))),
        (record, 23, 2, WalErrorKind::RecordLength(23)),
        (record + 3, 0xFF, 2, WalErrorKind::RecordLength(0xFF00_0022)),
        (record + 17, 22, 2, WalErrorKind::ResourceManager(22)),
        (record + 17, 127, 2, WalErrorKind::ResourceManager(127)),
        (record + 8, 0, 2, WalErrorKind::PrevLink { expected: start, found: Lsn(start.0 & !0xFF) }),
        (record + 4, 1, 2, WalErrorKind::Crc),
        (record + 20, 1, 2, WalErrorKind::Crc),
        (record + 30, 1, 2, WalErrorKind::Crc),
    ];
    for (at, value, place, kind) in rows {
        let mut bytes = wal.bytes().to_vec();
        assert_ne!(bytes[at], value, "byte {at} would not change");
        bytes[at] = value;
        let lsn = [ORIGIN, Lsn(ORIGIN.0 + 8192), end][place];
        let (error, summary) = scan_bad(&bytes);
        assert_eq!(WalError { lsn, kind }, error, "byte {at}");
        assert_eq!(if place == 2 { end } else { ORIGIN }, summary.record_end);
    }
}

/// With nothing before it, a record's back-link must still lead back.
#[test]
fn first_record_must_link_to_an_earlier_place() {
    let mut wal = WalWriter::new(ORIGIN, Lsn(ORIGIN.0 + 40), SEGMENT, SYSTEM, TIMELINE);
    wal.append(noop(&[]));
    let kind = WalErrorKind::PrevLink { expected: Lsn::INVALID, found: Lsn(ORIGIN.0 + 40) };
    assert_eq!(kind, scan_bad(wal.bytes()).0.kind);
}

#[test]
fn timeline_rises_with_pages_and_recovery_records() {
    // END_OF_RECOVERY: time, new timeline, old timeline, wal_level.
    let mut data = vec![0; 8];
    data.extend(words(&[3, 1, 1]));
    assert_eq!(PgTimeline(3), scan_one(rmgr::XLOG, xlog_info::END_OF_RECOVERY, 0, &data).1.timeline);

    let mut wal = writer();
    wal.append(noop(&main_data(&vec![7; 8192 - 40 - 24 - 5])));
    wal.set_timeline(PgTimeline(2));
    wal.append(noop(&[]));
    let (records, summary) = scan_good(&wal);
    assert_eq!([TIMELINE, PgTimeline(2)], [records[0].timeline, records[1].timeline]);
    assert_eq!(PgTimeline(2), summary.timeline);
}

/// A scanner that came through the record and one that was resumed behind it must judge the next page alike.
#[test]
fn page_of_an_older_timeline_is_refused_behind_a_recovery_record() {
    let mut data = vec![0; 8];
    data.extend(words(&[3, 1, 1]));
    let mut wal = writer();
    wal.append(RecordSpec { rmgr: rmgr::XLOG, info: xlog_info::END_OF_RECOVERY, xid: 0, payload: &main_data(&data) });
    let behind = wal.position();
    wal.append(noop(&main_data(&[7; 9000])));
    let (error, summary) = scan_bad(wal.bytes());
    let kind = WalErrorKind::PageHeader(PageFault::Timeline { previous: 3, found: 1 });
    assert_eq!(WalError { lsn: Lsn(ORIGIN.0 + 8192), kind }, error);
    let mut resumed = Scanner::resume(summary, SEGMENT);
    assert_eq!(Err(error), scan(&mut resumed, &wal.bytes()[behind.bytes_since(ORIGIN) as usize..]).1);
}

fn checkpoint(timeline: u32, next_full_xid: u64) -> Vec<u8> {
    let mut data = vec![0; 88];
    data[8..12].copy_from_slice(&timeline.to_le_bytes());
    data[12..16].copy_from_slice(&timeline.to_le_bytes());
    data[24..32].copy_from_slice(&next_full_xid.to_le_bytes());
    data
}

#[test]
fn checkpoint_tells_timeline_and_full_xid() {
    for info in [xlog_info::CHECKPOINT_ONLINE, xlog_info::CHECKPOINT_SHUTDOWN] {
        let (_, summary) = scan_one(rmgr::XLOG, info, 0, &checkpoint(5, 0x7_0000_0003));
        assert_eq!((PgTimeline(5), 0x7_0000_0002), (summary.timeline, summary.max_full_xid));
        let (_, summary) = scan_one(rmgr::XLOG, info, 0, &checkpoint(1, 600));
        assert_eq!((PgTimeline(1), 700), (summary.timeline, summary.max_full_xid));
    }
}

#[test]
fn every_record_counts_its_xid() {
    let (record, summary) = scan_one(10, 0, 1234, b"heap");
    assert_eq!((1234, 1234), (record.xid, summary.max_full_xid));
}

/// Commit and abort records in all their forms: (operation, flag word, what follows it, expected largest xid).
#[test]
fn commit_and_abort_count_subtransactions_and_time() {
    let dbinfo = words(&[1, 2]);
    let subxacts = words(&[3, 710, 730, 720]);
    let relations = words(&[2, 1, 2, 3, 4, 5, 6]);
    let stats = words(&[1, 9000, 9001, 9002]);
    let invals = words(&[1, 8000, 8001, 8002, 8003]);
    let prepared = words(&[740]);
    let rows = [
        (xact_info::COMMIT, 0, vec![], 705),
        (xact_info::ABORT, 1 << 1, vec![&subxacts], 730),
        (xact_info::COMMIT, 1 << 0 | 1 << 1, vec![&dbinfo, &subxacts], 730),
        (xact_info::COMMIT, 1 << 0 | 1 << 2 | 1 << 3, vec![&dbinfo, &relations, &invals], 705),
        (xact_info::COMMIT_PREPARED, 1 << 4, vec![&prepared], 740),
        (xact_info::COMMIT_PREPARED, 0x11F, vec![&dbinfo, &subxacts, &relations, &stats, &invals, &prepared], 740),
        (xact_info::ABORT_PREPARED, 0x117, vec![&dbinfo, &subxacts, &relations, &stats, &prepared], 740),
        (xact_info::ABORT_PREPARED, 0x110, vec![&stats, &prepared], 740),
    ];
    for (operation, flags, parts, expected) in rows {
        let mut data = 77_777_i64.to_le_bytes().to_vec();
        let has_info = if flags == 0 { 0 } else { xact_info::HAS_INFO };
        if flags != 0 {
            data.extend(u32::to_le_bytes(flags));
        }
        parts.into_iter().for_each(|part| data.extend(part));
        let (_, summary) = scan_one(rmgr::XACT, operation | has_info, 705, &data);
        assert_eq!((expected, 77_777), (summary.max_full_xid, summary.commit_timestamp), "{operation:x} {flags:x}");
    }
}

#[test]
fn other_records_that_mention_transactions_count() {
    // xl_xact_prepare with 2 subtransactions and a global id of 5 bytes, then the id padded to 8, then the xids.
    let mut prepare = vec![0; 72];
    prepare[28..32].copy_from_slice(&2_u32.to_le_bytes());
    prepare[54..56].copy_from_slice(&5_u16.to_le_bytes());
    prepare.extend(b"name\0\0\0\0");
    prepare.extend(words(&[801, 800, 99_999]));
    let assignment = words(&[790, 2, 801, 799]);
    // xl_running_xacts: xcnt, subxcnt, subxid_overflow, nextXid, ...
    let running = words(&[0, 0, 0, 802, 700, 700]);
    // xl_multixact_create: mid, moff, nmembers, (xid, status) of each.
    let multixact = words(&[1, 1, 2, 801, 9999, 705, 9999]);
    for (rmgr, info, data) in [
        (rmgr::XACT, xact_info::PREPARE, prepare),
        (rmgr::XACT, xact_info::ASSIGNMENT, assignment),
        (rmgr::STANDBY, 0x10, running),
        (rmgr::MULTIXACT, 0x20, multixact),
    ] {
        let (_, summary) = scan_one(rmgr, info, 0, &data);
        assert_eq!((801, 0), (summary.max_full_xid, summary.commit_timestamp), "{rmgr} {info:x}");
    }
}

#[test]
fn parts_before_the_main_data_are_passed_over() {
    let mut payload = vec![253, 1, 0, 252, 0xFF, 0xFF, 0, 0];
    payload.extend(main_data(&5_i64.to_le_bytes()));
    let mut wal = writer();
    wal.append(RecordSpec { rmgr: rmgr::XACT, info: xact_info::COMMIT, xid: 701, payload: &payload });
    let (_, summary) = scan_good(&wal);
    assert_eq!((701, 5), (summary.max_full_xid, summary.commit_timestamp));
}

/// Its transaction ids could not be known, so the log must not go on behind it.
#[test]
fn record_too_short_for_its_kind_is_refused() {
    let mut wal = writer();
    wal.append(RecordSpec { rmgr: rmgr::XACT, info: xact_info::COMMIT, xid: 701, payload: &main_data(b"short") });
    assert_eq!(WalErrorKind::Record(RecordFault::Length), scan_bad(wal.bytes()).0.kind);
    let mut wal = writer();
    wal.append(RecordSpec { rmgr: rmgr::XACT, info: xact_info::COMMIT, xid: 701, payload: &[0; 20] });
    assert_eq!(WalErrorKind::Record(RecordFault::Id(0)), scan_bad(wal.bytes()).0.kind);
}

#[test]
fn unsupported_records_are_told_apart() {
    let (custom, _) = scan_one(140, 0, 0, b"x");
    assert_eq!(Some(Unsupported::CustomResourceManager(140)), custom.unsupported());
    assert!(custom.unsupported().is_some_and(|reason| reason.to_string().contains("140")));
    let (located, _) = scan_one(rmgr::TABLESPACE, 0, 0, b"\x01\0\0\0/mnt/x\0");
    assert_eq!(Some(Unsupported::TablespaceLocation), located.unsupported());
    let (in_place, _) = scan_one(rmgr::TABLESPACE, 0, 0, b"\x01\0\0\0\0");
    assert_eq!(None, in_place.unsupported());
}

/// WAL with records of many lengths and kinds, a switch and a broken-off record.
fn varied_wal(lengths: &[usize]) -> WalWriter {
    let mut wal = writer();
    let (mut before, _) = wal.append(noop(&[]));
    for (i, length) in lengths.iter().enumerate() {
        let xid = 701 + i as u32;
        match i % 7 {
            3 => {
                let mut data = (i as i64).to_le_bytes().to_vec();
                data.extend(words(&[1 << 1, 3, 701, 900 + i as u32, 702]));
                let info = xact_info::COMMIT | xact_info::HAS_INFO;
                wal.append(RecordSpec { rmgr: rmgr::XACT, info, xid, payload: &main_data(&data) });
            }
            5 if length % 3 == 0 => wal.switch_segment(),
            6 => {
                before = wal.append(noop(&[])).0;
                let (start, end) = wal.append(noop(&main_data(&vec![9; 8192])));
                if end.offset_in(8192) != 0 && start.floor(8192) != end.floor(8192) {
                    wal.break_off_last_record(before);
                }
            }
            _ => drop(wal.append(RecordSpec { rmgr: 10, info: 0, xid, payload: &main_data(&vec![i as u8; *length]) })),
        }
    }
    let _ = before;
    wal
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the slices, the records and the summary are the same; and a scanner resumed at any record end goes on
    /// as the one that came from the start.
    #[test]
    fn slicing_makes_no_difference(
        lengths in prop::collection::vec(0_usize..20_000, 1..30),
        slices in prop::collection::vec(1_usize..9000, 1..50),
        damage in prop::option::of((any::<prop::sample::Index>(), 1_u8..)),
        whole_tail in 0_usize..300,
    ) {
        let wal = varied_wal(&lengths);
        let mut bytes = wal.bytes().to_vec();
        bytes.resize(bytes.len() + whole_tail, 0);
        if let Some((at, change)) = damage {
            let at = at.index(bytes.len());
            bytes[at] ^= change;
        }
        let mut whole = scanner();
        let (records, result) = scan(&mut whole, &bytes);
        if damage.is_none() && whole_tail < 4 {
            prop_assert_eq!(Ok(()), result);
        }

        let mut sliced = scanner();
        let mut sliced_records = Vec::new();
        let mut sliced_result = Ok(());
        let mut rest = &bytes[..];
        for length in slices.iter().cycle() {
            let (now, later) = rest.split_at((*length).min(rest.len()));
            sliced_result = sliced.feed(now, |record| sliced_records.push(*record));
            prop_assert!(sliced.summary().record_end <= sliced.position());
            rest = later;
            if rest.is_empty() || sliced_result.is_err() {
                break;
            }
        }
        prop_assert_eq!(result, sliced_result);
        prop_assert_eq!(&records, &sliced_records);
        prop_assert_eq!(whole.summary(), sliced.summary());
        prop_assert_eq!(whole.position(), sliced.position());

        if let Some(middle) = records.get(records.len() / 2) {
            let split = middle.end.bytes_since(ORIGIN) as usize;
            let mut first = scanner();
            scan(&mut first, &bytes[..split]).1.expect("the first half is good");
            prop_assert_eq!(middle.end, first.summary().record_end);
            let mut second = Scanner::resume(first.summary(), SEGMENT).with_system_id(SYSTEM);
            let (_, resumed) = scan(&mut second, &bytes[split..]);
            prop_assert_eq!(result, resumed);
            prop_assert_eq!(whole.summary(), second.summary());
        }
    }

    /// One byte at a time is the hardest slicing; short logs, because it is slow.
    #[test]
    fn one_byte_at_a_time_makes_no_difference(lengths in prop::collection::vec(0_usize..700, 1..60)) {
        let wal = varied_wal(&lengths.iter().map(|length| if length % 3 == 0 { length + 1 } else { *length }).collect::<Vec<_>>());
        let (records, summary) = scan_good(&wal);
        let mut scanner = scanner();
        let mut sliced = Vec::new();
        for byte in wal.bytes() {
            scanner.feed(core::slice::from_ref(byte), |record| sliced.push(*record)).expect("good WAL");
        }
        prop_assert_eq!((records, summary), (sliced, scanner.summary()));
    }

    /// Bytes that nobody wrote are refused and never panic.
    #[test]
    fn random_bytes_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 64..2000), with_header in any::<bool>()) {
        if with_header {
            let mut wal = writer();
            wal.append(noop(&[]));
            bytes[..40].copy_from_slice(&wal.bytes()[..40]);
        }
        prop_assert!(scan(&mut scanner(), &bytes).0.is_empty());
    }
}
