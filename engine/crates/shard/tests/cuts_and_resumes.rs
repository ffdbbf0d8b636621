//! Property: a shard's values are a function of the log. Where batches are cut, and where an owner ends and the next one
//! attaches, changes nothing, except which transaction ids the checkpoint's values have heard of.

mod harness;
#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
mod workload;

use std::{collections::BTreeMap, sync::OnceLock};

use filter::{Batch, Routed};
use harness::{
    capture::{Capture, STRIPING, batches},
    judge::ranges,
    store::{Shard, Store, load},
};
use layers::{HashRange, Key, Metadata, ValueKind};
use metadata::Counters;
use pgtypes::{FrameSummary, Lsn};
use shard::{Ingest, Rebuilt, rebuild};

/// Owners of each shard that are tried, one after the other.
const RESUMES: usize = 12;

type Sequence = Vec<(Key, Lsn, ValueKind, Vec<u8>)>;

/// A generator of numbers that are random enough (Knuth's MMIX).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }
}

fn capture() -> &'static (Capture, Vec<Routed>) {
    static CAPTURE: OnceLock<(Capture, Vec<Routed>)> = OnceLock::new();
    CAPTURE.get_or_init(|| {
        let capture = Capture::take(workload::SETTINGS, &[workload::youth, workload::age]);
        let records = capture.records();
        (capture, records)
    })
}

/// Puts what `batch` says into `sequence`; pages of copied databases are read from `store`.
fn ingest_items(ingest: &mut Ingest, store: &Store, batch: Batch, sequence: &mut Sequence) -> FrameSummary {
    for item in batch.items {
        let done = ingest.item(item.start, item.end, item.stored, &mut |key, lsn, kind, bytes| {
            sequence.push((key, lsn, kind, bytes));
        });
        assert_eq!(None, done.fault);
        for block in done.copy.iter().flat_map(|copy| copy.blocks()) {
            let page = rebuild(block.from, store.chain(block.from, block.floor, item.end)).expect("a sound page");
            if let Rebuilt::Page(page) = page {
                sequence.push((block.to, item.end, ValueKind::Image, page.0.to_vec()));
            }
        }
    }
    batch.summary
}

/// Everything as one owner puts it, and the store that it comes to.
fn one_owner(range: HashRange) -> (Store, Sequence) {
    let (capture, records) = capture();
    let mut shard = Shard::import(&capture.base, capture.from.record_end, STRIPING, range);
    let mut sequence = Sequence::new();
    batches(
        capture.from,
        records,
        range,
        || true,
        |batch| {
            let before = sequence.len();
            ingest_items(&mut shard.ingest, &shard.store, batch, &mut sequence);
            for (key, lsn, kind, bytes) in &sequence[before..] {
                shard.store.put(*key, *lsn, *kind, bytes.clone());
            }
        },
    );
    (shard.store, sequence)
}

fn assert_same(ours: &Sequence, theirs: &[(Key, Lsn, ValueKind, Vec<u8>)], what: &str) {
    for (at, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        assert!(
            ours == theirs,
            "{what}: value {at} differs: {:?} {:?}",
            (ours.0, ours.1, ours.2),
            (theirs.0, theirs.1, theirs.2)
        );
    }
    assert_eq!(ours.len(), theirs.len(), "{what}");
}

#[test]
fn an_owner_that_attaches_anywhere_puts_what_the_one_before_would_have_put() {
    let (capture, records) = capture();
    let mut random = Random(1);
    for range in ranges(2) {
        let (store, sequence) = one_owner(range);
        assert!(sequence.len() > 100_000);
        for _ in 0..RESUMES {
            let at = random.below(records.len());
            let from = records[at].summary;
            let mut ingest = Ingest::new(STRIPING, range);
            load(&store, from.record_end, &mut ingest);
            let mut resumed = Sequence::new();
            let is_cut = || random.below(300) == 0;
            batches(from, &records[at + 1..], range, is_cut, |batch| {
                ingest_items(&mut ingest, &store, batch, &mut resumed);
            });
            let rest = sequence.partition_point(|(_, lsn, ..)| *lsn <= from.record_end);
            assert_same(&resumed, &sequence[rest..], &format!("from {} on", from.record_end));
        }
    }
    assert!(!capture.moments.is_empty());
}

/// Ends of batches add values of the checkpoint, and ids to those that there are: never one that was not given out yet.
#[test]
fn ends_of_batches_change_nothing_but_the_next_transaction_id() {
    let (capture, records) = capture();
    let checkpoint = Key::metadata(Metadata::Checkpoint);
    let range = HashRange { begin: 0, end: 1 << 31 };
    let (store, sequence) = one_owner(range);
    let seen: BTreeMap<Lsn, u64> =
        records.iter().map(|record| (record.summary.record_end, record.summary.max_full_xid)).collect();
    let counters = |bytes: &[u8]| Counters::from_bytes(bytes).expect("counters");
    let without_ids = |mut counters: Counters| {
        counters.checkpoint.next_full_xid = 0;
        counters
    };

    for (seed, batch_records) in [(1, 1), (2, 10), (3, 1000), (4, 50_000)] {
        let mut random = Random(seed);
        let mut ingest = Ingest::new(STRIPING, range);
        load(&store, capture.from.record_end, &mut ingest);
        let mut ours = Sequence::new();
        let mut ends = 0;
        batches(
            capture.from,
            records,
            range,
            || random.below(batch_records) == 0,
            |batch| {
                let summary = ingest_items(&mut ingest, &store, batch, &mut ours);
                ingest.end_of_batch(&summary, &mut |key, lsn, kind, bytes| {
                    ends += 1;
                    assert_eq!((checkpoint, summary.record_end), (key, lsn));
                    ours.push((key, lsn, kind, bytes));
                });
            },
        );
        let (ids, ours): (Sequence, Sequence) = ours.into_iter().partition(|(key, ..)| *key == checkpoint);
        let (ids_of_one, theirs): (Sequence, Sequence) =
            sequence.clone().into_iter().partition(|(key, ..)| *key == checkpoint);
        assert_same(&ours, &theirs, "beside the checkpoint");

        let ids: BTreeMap<Lsn, Counters> = ids.iter().map(|(_, lsn, _, bytes)| (*lsn, counters(bytes))).collect();
        let mut last = 0;
        for (lsn, ours) in &ids {
            let next = ours.checkpoint.next_full_xid;
            assert!(last <= next && next <= seen[lsn].max(2_000_000 - 1) + 1, "{lsn}: {next} after {last}");
            last = next;
        }
        for (_, lsn, _, bytes) in &ids_of_one {
            let theirs = counters(bytes);
            assert!(theirs.checkpoint.next_full_xid <= ids[lsn].checkpoint.next_full_xid);
            assert_eq!(without_ids(theirs), without_ids(ids[lsn].clone()), "{lsn}");
        }
        assert_eq!(ids.len(), ids_of_one.len() + ends, "a value where there was one already");
        println!("batches of {batch_records}: {} values of the checkpoint, {ends} at ends", ids.len());
    }
}
