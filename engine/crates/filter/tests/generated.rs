//! Filtering of made-up WAL: every record to whom it belongs, whatever way the WAL comes and whoever lags.

#[path = "../../wal/tests/payload/mod.rs"]
mod payload;
mod shards;

use filter::{BATCH_BYTES, Batch, Cutter, Item, Router, WINDOW_BYTES, WalFilter, Window};
use layers::HashRange;
use payload::payload;
use pgtypes::{FrameSummary, Lsn, PgTimeline, SystemId, Term};
use proptest::{collection::vec, prelude::*};
use shards::{STRIPING, assert_complete, joined, ranges};
use wal::{Decoder, RECORD_BYTES_MAX, Record, RecordSpec, Scanner, WalWriter, main_data};

const SEGMENT: u64 = 1 << 20;
const START: FrameSummary = FrameSummary {
    record_end: Lsn(16 * SEGMENT),
    record_start: Lsn(16 * SEGMENT - 0x50),
    timeline: PgTimeline(1),
    max_full_xid: 600,
    commit_timestamp: 0,
};
const TERM: Term = Term(3);
const LOGICAL_MESSAGE: u8 = 21;

fn writer() -> WalWriter {
    WalWriter::new(START.record_end, START.record_start, SEGMENT, SystemId(1), PgTimeline(1))
}

/// Resource managers whose records are not looked into, so that any payload will do.
fn wal() -> impl Strategy<Value = Vec<u8>> {
    let rmgr = prop_oneof![Just(11u8), Just(13), Just(14), Just(16), Just(17), Just(20), Just(LOGICAL_MESSAGE)];
    vec((rmgr, payload()), 1..40).prop_map(|records| {
        let mut writer = writer();
        for (rmgr, payload) in &records {
            writer.append(RecordSpec { rmgr: *rmgr, info: 0, xid: 700, payload });
        }
        writer.take_bytes()
    })
}

fn records(wal: &[u8]) -> Vec<(Record, FrameSummary)> {
    let mut decoder = Decoder::new(Scanner::resume(START, SEGMENT), RECORD_BYTES_MAX);
    let (mut records, mut rest) = (vec![], wal);
    while !rest.is_empty() {
        rest = &rest[decoder.feed(rest).expect("valid WAL")..];
        records.extend(decoder.poll_record().map(|record| (record, decoder.summary())));
    }
    records
}

/// Filters `wal` from `from` on for one shard, which is sent a batch after each slice.
fn filtered(wal: &[u8], from: FrameSummary, range: HashRange, slice_bytes: usize) -> Vec<Batch> {
    let mut filter = WalFilter::new(from, SEGMENT, range, STRIPING);
    let end = START.record_end.advance(wal.len() as u64);
    let mut batches = vec![];
    for slice in wal[from.record_end.bytes_since(START.record_end) as usize..].chunks(slice_bytes) {
        let mut taken = 0;
        while taken < slice.len() {
            taken += filter.feed(&slice[taken..]).expect("valid WAL");
            batches.extend(filter.take_batch(end, TERM));
        }
    }
    assert_eq!(end, filter.position());
    batches
}

proptest! {
    #[test]
    fn every_record_goes_to_whom_it_belongs(wal in wal(), count in 1..6u32, slice_bytes in 1..20_000usize) {
        let ranges = ranges(count);
        let shards: Vec<Vec<Item>> =
            ranges.iter().map(|range| joined(&filtered(&wal, START, *range, slice_bytes))).collect();
        for (record, _) in records(&wal) {
            let item_of = |items: &Vec<Item>| items.iter().find(|item| item.end == record.info.end).cloned();
            let items: Vec<_> = ranges.iter().copied().zip(shards.iter().map(item_of)).collect();
            match record.info.rmgr {
                LOGICAL_MESSAGE => prop_assert!(items.iter().all(|(_, item)| item.is_none())),
                _ => assert_complete(&record, &items),
            }
        }
    }

    /// A page server goes on from what it has, which is the end of any record.
    #[test]
    fn a_shard_resumes_at_the_end_of_any_record(wal in wal(), slice_bytes in 1..20_000usize) {
        let range = ranges(3)[1];
        let all = filtered(&wal, START, range, usize::MAX);
        let (items, last) = (joined(&all), all.last().map(|batch| batch.summary));
        for (_, summary) in records(&wal) {
            let rest = filtered(&wal, summary, range, slice_bytes);
            let behind: Vec<_> = items.iter().filter(|item| item.end > summary.record_end).cloned().collect();
            prop_assert_eq!(&behind, &joined(&rest));
            if let Some(batch) = rest.last() {
                prop_assert_eq!(last, Some(batch.summary));
            }
        }
    }

    /// Subscribers of a window get what they would have got alone, however they lag.
    #[test]
    fn a_window_gives_each_shard_what_a_filter_gives(
        wal in wal(), steps in vec((0..4usize, 1..10_000usize), 1..60), forgets: bool,
    ) {
        let ranges = ranges(4);
        let mut window = Window::new(START, SEGMENT, STRIPING);
        let mut cutters: Vec<_> = ranges.iter().map(|range| Cutter::new(START, *range, STRIPING)).collect();
        let mut batches = vec![vec![]; 4];
        let mut fed = 0;
        let everyone = (0..4).map(|shard| (shard, usize::MAX));
        for (shard, bytes) in steps.into_iter().chain(everyone) {
            let end = wal.len().min(fed + bytes.min(wal.len()));
            window.feed(&wal[fed..end]).expect("valid WAL");
            fed = end;
            prop_assert!(window.covers(cutters[shard].through()));
            window.fill(&mut cutters[shard]);
            batches[shard].extend(cutters[shard].take_batch(START.record_end.advance(wal.len() as u64), TERM));
            if forgets {
                window.forget(cutters.iter().map(Cutter::through).min().expect("four"));
            }
        }
        for (range, batches) in ranges.iter().zip(&batches) {
            prop_assert_eq!(joined(&filtered(&wal, START, *range, usize::MAX)), joined(batches));
        }
    }
}

/// Records of a block each, all for one shard of two; `length` bytes of data.
fn one_sided_wal(count: u32, length: usize) -> (Vec<u8>, HashRange, HashRange) {
    let relation = [1663u32, 5, 16384];
    let mut writer = writer();
    for _ in 0..count {
        let mut payload = vec![0, 0x20];
        payload.extend((length as u16).to_le_bytes());
        payload.extend(relation.iter().chain(&[3]).flat_map(|word| word.to_le_bytes()));
        payload.extend(vec![7; length]);
        writer.append(RecordSpec { rmgr: 11, info: 0, xid: 700, payload: &payload });
    }
    let [left, right] = [HashRange::even_part(0, 2), HashRange::even_part(1, 2)];
    let hash = u64::from(layers::stripe_hash(relation[2], 0));
    let (owner, other) = if hash < left.end { (left, right) } else { (right, left) };
    (writer.take_bytes(), owner, other)
}

#[test]
fn batches_are_cut_at_their_size_and_shards_without_records_are_told_how_far_the_log_is() {
    let (wal, owner, other) = one_sided_wal(300, 20_000);
    let end = START.record_end.advance(wal.len() as u64);
    let batches = filtered(&wal, START, owner, usize::MAX);
    let sizes: Vec<usize> =
        batches.iter().map(|batch| batch.items.iter().map(|item| item.stored.len()).sum()).collect();
    assert!(sizes.len() >= 5 && sizes.iter().all(|size| *size < BATCH_BYTES + 21_000), "{sizes:?}");
    assert_eq!(300, joined(&batches).len());

    let silent = filtered(&wal, START, other, usize::MAX);
    assert_eq!(1, silent.len());
    assert_eq!((0, end, end), (silent[0].items.len(), silent[0].through, silent[0].commit_lsn));
}

/// A subscriber that does not read must not make the safekeeper hold the log in memory.
#[test]
fn a_window_is_bounded_and_lets_go_of_those_who_lag() {
    let (wal, owner, _) = one_sided_wal(1000, 30_000);
    let mut window = Window::new(START, SEGMENT, STRIPING);
    let mut laggard = Cutter::new(START, owner, STRIPING);
    for slice in wal.chunks(100_000) {
        window.feed(slice).expect("valid WAL");
        assert!(window.kept_bytes() <= WINDOW_BYTES, "{}", window.kept_bytes());
    }
    assert!(window.kept_bytes() > WINDOW_BYTES / 2);
    assert!(!window.covers(START.record_end));
    window.fill(&mut laggard);
    assert_eq!((START.record_end, None), (laggard.through(), laggard.take_batch(Lsn::MAX, TERM)));

    window.forget(window.summary().record_end);
    assert_eq!(0, window.kept_bytes());
    assert!(window.covers(window.summary().record_end));
}

/// PostgreSQL allows records of 1 GiB.
#[test]
fn records_for_nobody_take_no_memory() {
    let mut writer = writer();
    let payload = main_data(&vec![7; 8 << 20]);
    writer.append(RecordSpec { rmgr: LOGICAL_MESSAGE, info: 0, xid: 701, payload: &payload });
    let wal = writer.take_bytes();
    let mut router = Router::new(START, SEGMENT, STRIPING);
    for slice in wal.chunks(100_000) {
        let mut taken = 0;
        while taken < slice.len() {
            taken += router.feed(&slice[taken..]).expect("valid WAL");
            assert_eq!((None, 0), (router.poll(), router.buffered_bytes()));
        }
    }
    assert_eq!(START.record_end.advance(wal.len() as u64), router.summary().record_end);
}

/// Committed WAL that is none ends the feed: no shard may skip a record.
#[test]
fn damaged_wal_ends_the_filter_and_what_came_before_is_taken() {
    let (mut wal, owner, _) = one_sided_wal(10, 1000);
    let middle = wal.len() / 2;
    wal[middle] ^= 1;
    let mut filter = WalFilter::new(START, SEGMENT, owner, STRIPING);
    let mut taken = 0;
    let error = loop {
        match filter.feed(&wal[taken..]) {
            Ok(fed) => taken += fed,
            Err(error) => break error,
        }
    };
    let batch = filter.take_batch(Lsn::MAX, TERM).expect("the records before");
    assert!(batch.items.len() >= 4 && batch.through == error.lsn, "{error} {}", batch.through);
    assert_eq!(Err(error), filter.feed(&wal[taken..]));
}
