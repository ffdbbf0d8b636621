//! Every interleaving of the two halves of the block map, under `loom`: `cargo test -p vfs-abi --features loom`.
//!
//! Each rule is run as it is, and with mistakes planted that break it: a model that does not find them looks at nothing.
//! The file is a mutex, as the kernel's inode is one; waiting is yielding, so lost wake-ups are not modelled (loom takes
//! sequentially consistent accesses for acquire and release ones).
#![allow(clippy::unwrap_used, reason = "clippy's own exception knows only functions marked as tests")]

use loom::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64},
    },
    thread,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use vfs_abi::blocks::{
    BlockMap, FileKey, FileRef, FillRequest, Kind, Layout, Plant, Purpose, Signals, WriteClaim, WriteOutcome,
};

/// Waiting gives the turn away.
struct Yield;

impl Signals for Yield {
    fn wait(&self, _: &AtomicU32, _: u32) {
        thread::yield_now();
    }

    fn wake_all(&self, _: &AtomicU32) {}
}

const COMMIT_LSN: u64 = 5;
/// What the page service has of a block, and what PostgreSQL writes.
const OLD: u32 = 7;
const NEW: u32 = 9;
const FILE: FileKey = key(16384);
const OTHER: FileKey = key(16385);

const fn key(relation: u32) -> FileKey {
    FileKey { tablespace: 1663, database: 5, relation, fork: 0, segment: 0 }
}

/// The shared memory, and two files of one block on a disk; 0 is a hole.
struct World {
    layout: Layout,
    wide: Vec<AtomicU64>,
    narrow: Vec<AtomicU32>,
    disk: [Mutex<Vec<u32>>; 2],
    plant: Option<Plant>,
}

impl World {
    /// A world whose first file has one absent block.
    fn new(plant: Option<Plant>) -> (Arc<World>, FileRef) {
        let layout = Layout::new(2, 1).unwrap();
        let world = World {
            layout,
            wide: (0..layout.wide_words()).map(|_| AtomicU64::new(0)).collect(),
            narrow: (0..layout.narrow_words()).map(|_| AtomicU32::new(0)).collect(),
            disk: [Mutex::new(vec![0]), Mutex::new(vec![0])],
            plant,
        };
        let map = world.map();
        map.initialise(0, COMMIT_LSN);
        let file = map.add_file(FILE, 1, false, &Yield).unwrap();
        (Arc::new(world), file)
    }

    fn map(&self) -> BlockMap<'_> {
        BlockMap::from_raw(self.layout, &self.wide, &self.narrow).with_plant(self.plant)
    }

    fn get(&self, file: usize) -> u32 {
        self.disk[file].lock().unwrap().first().copied().unwrap_or(0)
    }

    /// As `pwrite` of the block: the file grows if it has to.
    fn put(&self, file: usize, value: u32) {
        *self.disk[file].lock().unwrap() = vec![value];
    }

    fn claim(&self, file: FileRef) -> FillRequest {
        self.map().request(file, 0, 1, Purpose::Read, &Yield).unwrap();
        self.map().poll_request(&Yield).unwrap()
    }

    fn fill(&self, request: &FillRequest) {
        if self.map().begin_fill_write(request) {
            self.put(0, OLD);
            self.map().finish_fill(request, &Yield);
        }
    }

    fn write(&self, disk: usize, file: FileRef, horizon: u64) {
        let claim = self.map().claim_write(file, 0, 1, true, &Yield).unwrap();
        self.put(disk, NEW);
        if claim == WriteClaim::Claimed {
            self.map().finish_write(file, 0, WriteOutcome::Evictable { horizon }, &Yield);
        }
    }

    fn evict(&self, disk: usize, file: FileRef) {
        let punch = || {
            self.put(disk, 0);
            true
        };
        self.map().evict_block(file, 0, punch, &Yield);
    }

    fn truncate(&self, file: FileRef) {
        self.map().truncate(file, 0, &Yield);
        self.disk[0].lock().unwrap().clear();
    }
}

/// Runs a rule in every interleaving with at most `preemptions` forced switches.
fn explore(preemptions: usize, rule: fn(Option<Plant>), plant: Option<Plant>) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.check(move || rule(plant));
}

/// The rule holds, and does not with each of the mistakes.
fn holds_unless(preemptions: usize, rule: fn(Option<Plant>), mistakes: &[Plant]) {
    explore(preemptions, rule, None);
    for plant in mistakes {
        let found = catch_unwind(AssertUnwindSafe(|| explore(preemptions, rule, Some(*plant)))).is_err();
        assert!(found, "the model does not find {plant:?}");
    }
}

/// Finding A3.1: a reader that saw the block must not take the zeros of a hole for it.
#[test]
fn reader_never_takes_a_hole_for_a_page() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        world.fill(&world.claim(file));
        let evictor = {
            let world = world.clone();
            thread::spawn(move || world.evict(0, file))
        };
        let map = world.map();
        // A block that is not there would be asked for: no page is read, so none is wrong.
        if let Some(stamp) = map.stamp(file, 0, 1) {
            let page = world.get(0);
            if map.is_unchanged(file, 0, 1, stamp) {
                assert_eq!(OLD, page);
            }
        }
        evictor.join().unwrap();
    }
    holds_unless(6, rule, &[Plant::EvictKeepsVersion, Plant::NoVersions]);
}

/// Finding A3.2: a late fill makes a truncated file long again, with old rows.
#[test]
fn late_fill_does_not_bring_a_truncated_block_back() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        let request = world.claim(file);
        let agent = {
            let world = world.clone();
            thread::spawn(move || world.fill(&request))
        };
        world.truncate(file);
        agent.join().unwrap();
        assert_eq!(Vec::<u32>::new(), *world.disk[0].lock().unwrap());
    }
    holds_unless(6, rule, &[Plant::FillWithoutSwap, Plant::TruncateIgnoresFill]);
}

/// A page that PostgreSQL writes is newer than any that is on its way.
#[test]
fn fill_never_overwrites_a_write() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        let request = world.claim(file);
        let agent = {
            let world = world.clone();
            thread::spawn(move || world.fill(&request))
        };
        world.write(0, file, COMMIT_LSN + 1);
        agent.join().unwrap();
        assert_eq!((NEW, Kind::Present), (world.get(0), world.map().kind_of(file, 0)));
    }
    holds_unless(6, rule, &[Plant::FillWithoutSwap, Plant::WriteIgnoresFill]);
}

/// A fill that fails while PostgreSQL writes the block does not take the block from it.
#[test]
fn failing_fill_does_not_disturb_a_write() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        let request = world.claim(file);
        let agent = {
            let world = world.clone();
            thread::spawn(move || world.map().fail_fill(&request, &Yield))
        };
        world.write(0, file, COMMIT_LSN + 1);
        agent.join().unwrap();
        assert_eq!((NEW, Kind::Present), (world.get(0), world.map().kind_of(file, 0)));
    }
    holds_unless(6, rule, &[Plant::WriteKeepsVersion]);
}

/// Of two readers of an absent block one asks for it.
#[test]
fn a_block_is_asked_for_once() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        let reader = {
            let world = world.clone();
            thread::spawn(move || world.map().request(file, 0, 1, Purpose::Read, &Yield).unwrap())
        };
        world.map().request(file, 0, 1, Purpose::Read, &Yield).unwrap();
        reader.join().unwrap();
        let first = world.map().poll_request(&Yield).unwrap();
        assert_eq!(None, world.map().poll_request(&Yield));
        world.fill(&first);
        assert_eq!(Kind::Present, world.map().kind_of(file, 0));
    }
    holds_unless(5, rule, &[Plant::ClaimWithoutSwap]);
}

/// The word has come back to the same state meanwhile: truncated, extended, written, evicted, asked for again. The reply
/// to the first request is not taken for one to the second.
#[test]
fn late_fill_is_not_taken_for_a_new_one() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        let request = world.claim(file);
        let agent = {
            let world = world.clone();
            thread::spawn(move || world.fill(&request))
        };
        world.truncate(file);
        world.write(0, file, COMMIT_LSN);
        world.evict(0, file);
        let again = world.claim(file);
        agent.join().unwrap();
        // The second request is still open, so nothing may be there.
        assert_eq!((0, Kind::Filling), (world.get(0), world.map().kind_of(file, 0)));
        assert_eq!(COMMIT_LSN, again.horizon);
    }
    holds_unless(6, rule, &[Plant::NoVersions, Plant::FillWithoutSwap]);
}

/// Finding A1: what is written while the evictor thinks is not evicted before its WAL is committed.
#[test]
fn eviction_never_takes_an_uncommitted_write() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        world.fill(&world.claim(file));
        let evictor = {
            let world = world.clone();
            thread::spawn(move || world.evict(0, file))
        };
        world.write(0, file, COMMIT_LSN + 1);
        evictor.join().unwrap();
        assert_eq!((NEW, Kind::Present), (world.get(0), world.map().kind_of(file, 0)));
        assert_eq!(COMMIT_LSN + 1, world.map().horizon_of(file, 0));
    }
    holds_unless(6, rule, &[Plant::HorizonOnce, Plant::HorizonLate]);
}

/// A file is dropped and its slot and chunk come to another one, while somebody evicts a block of the first: no block of
/// the second is declared absent without being punched.
#[test]
fn eviction_of_a_dropped_file_leaves_its_successor_alone() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        world.fill(&world.claim(file));
        let evictor = {
            let world = world.clone();
            thread::spawn(move || world.evict(0, file))
        };
        let map = world.map();
        map.remove_file(&FILE, &Yield, |_| world.put(0, 0));
        let other = map.add_file(OTHER, 0, false, &Yield).unwrap();
        world.write(1, other, COMMIT_LSN);
        evictor.join().unwrap();
        assert_eq!((NEW, Kind::Present), (world.get(1), map.kind_of(other, 0)));
    }
    holds_unless(5, rule, &[Plant::OwnerUnchecked]);
}

/// The agent's own eviction learns which file it works on after its claim, and so never punches the wrong one.
#[test]
fn agents_eviction_punches_the_file_that_it_claimed() {
    fn rule(plant: Option<Plant>) {
        let (world, file) = World::new(plant);
        world.fill(&world.claim(file));
        let evictor = {
            let world = world.clone();
            thread::spawn(move || {
                let map = world.map();
                let Some(mut candidate) = map.next_candidate(&mut Default::default(), true) else { return };
                while let Some(run) = map.begin_evict(&mut candidate, &Yield) {
                    world.put(usize::from(run.key == OTHER), 0);
                    map.finish_evict(&run, true, &Yield);
                }
            })
        };
        let map = world.map();
        map.remove_file(&FILE, &Yield, |_| world.put(0, 0));
        let other = map.add_file(OTHER, 0, false, &Yield).unwrap();
        world.write(1, other, COMMIT_LSN);
        evictor.join().unwrap();
        let state = (world.get(1), map.kind_of(other, 0));
        assert!(matches!(state, (NEW, Kind::Present) | (0, Kind::Absent)), "{state:?}");
    }
    holds_unless(5, rule, &[]);
}
