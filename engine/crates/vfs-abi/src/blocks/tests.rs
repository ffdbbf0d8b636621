//! One thread: what the map says after each step, its format, and its bounds. Threads are the model's
//! (`tests/interleavings.rs`).

#![allow(clippy::unwrap_used, reason = "clippy's own exception knows only functions marked as tests")]

use super::{
    layout::{CHUNK_EXTENTS, narrow, ring, slot, wide},
    *,
};
use core::sync::atomic::Ordering::SeqCst;
extern crate std;
use std::{cell::Cell, vec::Vec};

/// One thread never waits for another: a wait is a mistake. Wakes are counted.
#[derive(Default)]
struct Alone {
    wakes: Cell<u32>,
}

impl Signals for Alone {
    fn wait(&self, word: &AtomicU32, expected: u32) {
        panic!("waits for {:?}, which is {:#x}", Word(expected), word.load(SeqCst));
    }

    fn wake_all(&self, _: &AtomicU32) {
        self.wakes.set(self.wakes.get() + 1);
    }
}

struct Region {
    layout: Layout,
    wide: Vec<AtomicU64>,
    narrow: Vec<AtomicU32>,
}

const BASE: u64 = 0x100_0000;

impl Region {
    fn new(files: u32, chunks: u32) -> Region {
        let layout = Layout::new(files, chunks).unwrap();
        let region = Region {
            layout,
            wide: (0..layout.wide_words()).map(|_| AtomicU64::new(0)).collect(),
            narrow: (0..layout.narrow_words()).map(|_| AtomicU32::new(0)).collect(),
        };
        region.map().initialise(BASE, BASE);
        region
    }

    fn map(&self) -> BlockMap<'_> {
        BlockMap::from_raw(self.layout, &self.wide, &self.narrow)
    }
}

fn key(relation: u32) -> FileKey {
    FileKey { tablespace: 1663, database: 5, relation, fork: 0, segment: 0 }
}

fn fill(map: &BlockMap, file: FileRef, first: u32, end: u32) -> Vec<FillRequest> {
    let signals = Alone::default();
    map.request(file, first, end, Purpose::Read, &signals).unwrap();
    let requests: Vec<_> = core::iter::from_fn(|| map.poll_request(&signals)).collect();
    for request in &requests {
        assert!(map.begin_fill_write(request));
        map.finish_fill(request, &signals);
    }
    requests
}

fn write(map: &BlockMap, file: FileRef, block: u32, outcome: WriteOutcome) {
    let signals = Alone::default();
    assert_eq!(Ok(WriteClaim::Claimed), map.claim_write(file, block, block + 1, true, &signals));
    map.finish_write(file, block, outcome, &signals);
}

/// `docs/formats/block-map.md` lists the same numbers.
#[test]
fn numbers_are_those_of_the_format() {
    let layout = Layout::new(100, 10).unwrap();
    let table = [
        (144, wide::HEADER),
        (16, wide::HITS),
        (14, wide::PRESENT),
        (16, narrow::WAITERS),
        (32, narrow::EVICT_MODE),
        (48, narrow::RING_TAIL),
        (64, narrow::RING_HEAD),
        (66, narrow::AGENT_SLEEPS),
        (80, layout.ring()),
        (8, ring::WORDS),
        (32_848, layout.buckets()),
        (128, layout.bucket_count()),
        (32_976, layout.slots()),
        (16, slot::WORDS),
        (34_576, layout.directories()),
        (40_976, layout.chunk_heads()),
        (41_056, layout.blocks()),
        (61_536, layout.narrow_words()),
        (144 + 1280, layout.wide_words()),
        (128, CHUNK_EXTENTS as usize),
        (131_072, FILE_BLOCKS_MAX as usize),
    ];
    for (expected, actual) in table {
        assert_eq!(expected, actual);
    }
    assert_eq!(257_536, layout.region_bytes());
    assert_eq!(*b"LBBLK\0\0\x01", MAP_MAGIC.to_le_bytes());
    assert_eq!(0x2B, Word::of(Kind::Filling, 5).0);
}

#[test]
fn header_is_read_back_or_refused() {
    let region = Region::new(7, 3);
    assert_eq!(Ok(region.layout), Layout::read(&region.wide));
    region.wide[wide::FILES_MAX].store(0, SeqCst);
    assert_eq!(Err(LayoutFault::Sizes { files: 0, chunks: 3 }), Layout::read(&region.wide));
    region.wide[wide::FILES_MAX].store(1 << 40, SeqCst);
    assert!(Layout::read(&region.wide).is_err());
    region.wide[wide::MAGIC].store(1, SeqCst);
    assert_eq!(Err(LayoutFault::Magic(1)), Layout::read(&region.wide));
    assert!(Layout::new(0, 1).is_err() && Layout::new(1, (1 << 22) + 1).is_err());
}

/// Rule V1: absent is only what the base backup said or an eviction made so.
#[test]
fn a_file_is_absent_up_to_its_length_in_the_base_backup() {
    let region = Region::new(10, 10);
    let map = region.map();
    let signals = Alone::default();
    let file = map.add_file(key(1), 3000, false, &signals).unwrap();
    let kinds = |blocks: [u32; 4]| blocks.map(|block| map.kind_of(file, block));
    let expected = [Kind::Absent, Kind::Absent, Kind::Pinned, Kind::Pinned];
    assert_eq!(expected, kinds([0, 2999, 3000, 131_071]));
    assert_eq!(None, map.stamp(file, 2990, 3001));
    assert_eq!(Some(0), map.stamp(file, 3000, 200_000));

    let requests = fill(&map, file, 2998, 3002);

    assert_eq!([2998, 2999], [requests[0].block, requests[1].block]);
    assert_eq!((2, key(1), BASE), (requests.len(), requests[0].key, requests[0].horizon));
    assert_eq!([Kind::Absent, Kind::Present, Kind::Pinned, Kind::Absent], kinds([2997, 2999, 3000, 0]));
    assert!(map.stamp(file, 2998, 3002).is_some());
    assert_eq!((2, 1), (map.present_blocks(), map.counters().chunks));
    assert_eq!(None, map.find_file(&key(2), &signals));
    let local = map.open_file(&key(2), true, || true, &signals).unwrap().unwrap();
    assert_eq!(Kind::Pinned, map.kind_of(local, 0));
}

/// A descriptor's file is known again by its incarnation, whoever has its slot now.
#[test]
fn slots_and_chunks_are_used_again() {
    let region = Region::new(2, 1);
    let map = region.map();
    let signals = Alone::default();
    let mut old = vec_of_files(&map, &signals);
    for round in 0..100 {
        let file = map.add_file(key(100 + round), 5, false, &signals).unwrap();
        assert!(old.iter().all(|old| *old != file && !map.is_current(*old)));
        let late = {
            map.request(file, 0, 2, Purpose::Read, &signals).unwrap();
            map.poll_request(&signals).unwrap()
        };
        assert_eq!(1, map.counters().chunks);
        map.remove_file(&key(100 + round), &signals, |known| assert!(known));
        assert!(!map.begin_fill_write(&late), "its block is gone");
        assert_eq!(0, map.counters().chunks);
        assert_eq!(None, map.poll_request(&signals), "nobody wants the other block");
        assert_eq!(Ok(WriteClaim::Gone), map.claim_write(file, 0, 1, true, &signals));
        old.push(file);
    }
    map.remove_file(&key(1), &signals, |known| assert!(!known));
}

fn vec_of_files(map: &BlockMap, signals: &Alone) -> Vec<FileRef> {
    let files: Vec<_> = (1..=2).map(|number| map.add_file(key(number), 1, false, signals).unwrap()).collect();
    assert_eq!(Err(MapFull::Files(2)), map.add_file(key(3), 1, false, signals));
    for number in 1..=2 {
        map.remove_file(&key(number), signals, |_| {});
    }
    files
}

#[test]
fn files_of_one_bucket_are_told_apart() {
    let region = Region::new(64, 1);
    let map = region.map();
    let signals = Alone::default();
    let keys: Vec<_> = (0..64)
        .map(|number| FileKey { segment: number % 4, fork: number % 2 * 2, database: number % 3, ..key(number / 8) })
        .collect();
    let files: Vec<_> = keys.iter().map(|key| map.add_file(*key, 1, false, &signals).unwrap()).collect();
    for removed in (0..64).step_by(2) {
        map.remove_file(&keys[removed], &signals, |known| assert!(known));
    }
    for (number, key) in keys.iter().enumerate() {
        let expected = (number % 2 == 1).then_some(files[number]);
        assert_eq!(expected, map.find_file(key, &signals), "{key:?}");
    }
}

/// Without a free chunk an absent block cannot be asked for, but local ones are read and written.
#[test]
fn full_map_says_so() {
    let region = Region::new(2, 1);
    let map = region.map();
    let signals = Alone::default();
    let file = map.add_file(key(1), 2049, false, &signals).unwrap();
    fill(&map, file, 0, 1);
    assert_eq!(Err(MapFull::Chunks(1)), map.request(file, 2048, 2049, Purpose::Read, &signals));
    assert_eq!(Err(MapFull::Chunks(1)), map.claim_write(file, 2048, 2049, true, &signals));
    assert_eq!(Ok(WriteClaim::Claimed), map.claim_write(file, 9000, 9001, true, &signals));
    map.finish_write(file, 9000, WriteOutcome::Evictable { horizon: 1 }, &signals);
    assert_eq!(Kind::Pinned, map.kind_of(file, 9000));
    assert_eq!(Err(MapFull::FileTooLong(131_073)), map.add_file(key(2), 131_073, false, &signals));
}

/// The ring takes as many requests as it has entries; prefetches leave a quarter of it. Positions wrap.
#[test]
fn ring_is_bounded_and_wraps() {
    let region = Region::new(2, 10);
    let map = region.map();
    let signals = Alone::default();
    // Two laps before positions wrap.
    for word in [narrow::RING_TAIL, narrow::RING_HEAD] {
        region.narrow[word].store(u32::MAX - 2 * RING_ENTRIES + 1, SeqCst);
    }
    let file = map.add_file(key(1), 20_000, false, &signals).unwrap();
    for _ in 0..5 {
        let requested = map.request(file, 0, 10_000, Purpose::Prefetch, &signals).unwrap();
        assert!(requested.ring_full.is_some() && !requested.ring);
        let requested = map.request(file, 10_000, 20_000, Purpose::Read, &signals).unwrap();
        assert!(requested.ring_full.is_some());
        let requests: Vec<_> = core::iter::from_fn(|| map.poll_request(&signals)).collect();
        let waiting = requests.iter().filter(|request| !request.prefetch).count();
        assert_eq!((RING_ENTRIES as usize / 4, RING_ENTRIES as usize), (waiting, requests.len()));
        assert_eq!(Kind::Absent, map.kind_of(file, 9_999));
        for request in &requests {
            map.fail_fill(request, &signals);
        }
        assert_eq!(Kind::Failed, map.kind_of(file, 0));
    }
    assert_eq!((5, 5 * u64::from(RING_ENTRIES)), (map.counters().prefetches_dropped, map.counters().failures));
}

/// One call for each sleep, and none for an agent that is awake.
#[test]
fn doorbell_rings_for_a_sleeping_agent() {
    let region = Region::new(2, 1);
    let map = region.map();
    let signals = Alone::default();
    let file = map.add_file(key(1), 10, false, &signals).unwrap();
    let rings = |block: u32| map.request(file, block, block + 1, Purpose::Read, &signals).unwrap().ring;
    assert!(!rings(0), "awake");
    assert!(!map.prepare_sleep(), "a request is there");
    assert!(map.poll_request(&signals).is_some());
    assert!(map.prepare_sleep());
    assert!(!rings(0), "asked for already");
    assert!(rings(1));
    assert!(!rings(2));
}

/// Waiters are woken where there are some, and only there.
#[test]
fn waiters_are_woken() {
    let region = Region::new(2, 1);
    let map = region.map();
    let signals = Alone::default();
    let file = map.add_file(key(1), 10, false, &signals).unwrap();
    map.request(file, 0, 3, Purpose::Read, &signals).unwrap();
    let requests: Vec<_> = core::iter::from_fn(|| map.poll_request(&signals)).collect();
    assert!(map.begin_fill_write(&requests[0]));
    map.finish_fill(&requests[0], &signals);
    assert_eq!(0, signals.wakes.get());
    region.narrow[narrow::WAITERS].store(1, SeqCst);
    map.fail_fill(&requests[1], &signals);
    map.truncate(file, 2, &signals);
    assert_eq!(2, signals.wakes.get());
    assert!(!map.begin_fill_write(&requests[2]));
}

/// Rule V3: not before its horizon is committed, and asked for again with it.
#[test]
fn written_block_goes_when_its_horizon_is_committed() {
    let region = Region::new(2, 1);
    let map = region.map();
    let signals = Alone::default();
    let file = map.add_file(key(1), 100, false, &signals).unwrap();
    write(&map, file, 17, WriteOutcome::Evictable { horizon: BASE + 8 });
    let evict = || map.evict_block(file, 17, || true, &signals);
    assert!(!evict());
    map.set_commit_lsn(BASE + 7);
    assert!(!evict());
    map.set_commit_lsn(BASE + 8);
    map.set_commit_lsn(BASE);
    assert!(evict());
    assert_eq!((Kind::Absent, 0), (map.kind_of(file, 17), map.present_blocks()));
    // All blocks of the extent have the horizon of the youngest, as far as it is committed: no reader waits for the WAL of
    // a neighbour.
    write(&map, file, 18, WriteOutcome::Evictable { horizon: BASE + 500 });
    assert_eq!(BASE + 500, map.horizon_of(file, 17));
    let horizons: Vec<u64> = fill(&map, file, 15, 18).iter().map(|request| request.horizon).collect();
    assert_eq!(std::vec![BASE, BASE + 8, BASE + 8], horizons);
    assert_eq!((3, 1, 4), (map.counters().fills, map.counters().evictions, map.present_blocks()));
}

#[test]
fn what_was_never_logged_stays() {
    let region = Region::new(8, 8);
    let map = region.map();
    let signals = Alone::default();
    map.set_commit_lsn(u64::MAX);
    let evict = |file, block| map.evict_block(file, block, || panic!("punched"), &signals);
    let file = map.add_file(key(1), 100, false, &signals).unwrap();
    write(&map, file, 3, WriteOutcome::Pinned);
    assert!(!evict(file, 3));
    // A relation turns out to be unlogged after its main fork was written.
    let main = map.open_file(&key(2), true, || true, &signals).unwrap().unwrap();
    let second = map.open_file(&FileKey { segment: 1, ..key(2) }, true, || true, &signals).unwrap().unwrap();
    for file in [main, second] {
        write(&map, file, 0, WriteOutcome::Evictable { horizon: BASE });
        assert_eq!(Kind::Present, map.kind_of(file, 0));
    }
    map.open_file(&FileKey { fork: 3, ..key(2) }, true, || true, &signals).unwrap();
    assert!(!evict(main, 0) && !evict(second, 0));
    let map_fork = map.open_file(&FileKey { fork: 2, ..key(2) }, true, || true, &signals).unwrap().unwrap();
    write(&map, map_fork, 0, WriteOutcome::Evictable { horizon: BASE });
    assert_eq!(Kind::Pinned, map.kind_of(map_fork, 0));
    assert_eq!(None, clock(&map, true).first());
    assert_eq!(0, map.present_blocks());
}

#[test]
fn failed_write_leaves_what_was_there() {
    let region = Region::new(2, 1);
    let map = region.map();
    let signals = Alone::default();
    let file = map.add_file(key(1), 10, false, &signals).unwrap();
    fill(&map, file, 0, 1);
    for (block, expected) in [(0, Kind::Pinned), (1, Kind::Absent), (50, Kind::Pinned)] {
        write(&map, file, block, WriteOutcome::NotWritten);
        assert_eq!(expected, map.kind_of(file, block), "{block}");
    }
    assert_eq!(0, map.present_blocks());
    // Part of a block cannot be written while the rest of it is away.
    assert_eq!(Ok(WriteClaim::NeedsBlocks), map.claim_write(file, 0, 3, false, &signals));
    assert_eq!([Kind::Pinned, Kind::Absent], [map.kind_of(file, 0), map.kind_of(file, 1)]);
}

/// A file that was cut off and grows again is new in the cut part, whatever was known of it.
#[test]
fn truncated_blocks_are_local_when_the_file_grows_again() {
    let region = Region::new(2, 4);
    let map = region.map();
    let signals = Alone::default();
    map.set_commit_lsn(u64::MAX);
    let file = map.add_file(key(1), 5000, false, &signals).unwrap();
    fill(&map, file, 90, 110);
    let stamp = map.stamp(file, 100, 105).unwrap();
    map.truncate(file, 100, &signals);
    assert!(!map.is_unchanged(file, 100, 105, stamp));
    let kinds = [89, 90, 100, 111, 4000, 5000].map(|block| map.kind_of(file, block));
    assert_eq!([Kind::Absent, Kind::Present, Kind::Pinned, Kind::Pinned, Kind::Pinned, Kind::Pinned], kinds);
    assert_eq!(10, map.present_blocks());
    assert!(!map.evict_block(file, 100, || panic!("punched"), &signals));
}

/// Runs the clock once around and evicts what it names, as (first block, blocks).
fn clock(map: &BlockMap, hurry: bool) -> Vec<(u32, u32)> {
    let signals = Alone::default();
    let mut hand = ClockHand::default();
    let mut runs = Vec::new();
    while let Some(mut candidate) = map.next_candidate(&mut hand, hurry) {
        while let Some(run) = map.begin_evict(&mut candidate, &signals) {
            map.finish_evict(&run, true, &signals);
            runs.push((run.first_block, run.blocks));
        }
    }
    runs
}

#[test]
fn clock_takes_cold_runs_and_spares_what_was_read() {
    let region = Region::new(2, 4);
    let map = region.map();
    let file = map.add_file(key(1), 6000, false, &Alone::default()).unwrap();
    fill(&map, file, 2048, 2048 + 600);
    fill(&map, file, 5, 7);
    write(&map, file, 2100, WriteOutcome::Pinned);
    write(&map, file, 2200, WriteOutcome::Evictable { horizon: BASE + 100 });
    map.note_hits(file, 2400, 2401, 3);

    let runs = clock(&map, false);

    // 2100 is pinned, the extent of 2200 is uncommitted, the one of 2400 was read and goes in the second turn; runs have
    // 256 blocks at most.
    assert_eq!(std::vec![(2048, 52), (2101, 91), (2208, 192), (2416, 232), (5, 2), (2400, 16)], runs);
    assert_eq!(Kind::Present, map.kind_of(file, 2200));
    assert_eq!(16, map.present_blocks());
    assert_eq!(1, map.counters().hits);
}

#[test]
fn read_ahead_claims_what_follows() {
    let region = Region::new(2, 4);
    let map = region.map();
    let signals = Alone::default();
    let file = map.add_file(key(1), 3000, false, &signals).unwrap();
    fill(&map, file, 12, 13);
    map.request(file, 10, 11, Purpose::Read, &signals).unwrap();
    let request = map.poll_request(&signals).unwrap();
    let blocks: Vec<u32> =
        (1..5).filter_map(|ahead| map.read_ahead(&request, ahead, &signals)).map(|ahead| ahead.block).collect();
    assert_eq!(std::vec![11, 13, 14], blocks);
    assert_eq!(None, map.read_ahead(&request, 2048, &signals), "another chunk");
    map.truncate(file, 0, &signals);
    let other = map.add_file(key(2), 3000, false, &signals).unwrap();
    assert_eq!(None, map.read_ahead(&request, 5, &signals), "cut off");
    assert_eq!(Kind::Absent, map.kind_of(other, 0));
}
