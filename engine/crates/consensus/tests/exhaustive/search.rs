//! Visits every world that can be reached, depth first, on every core.

use std::{
    collections::HashSet,
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use crate::world::{Action, Bounds, World};

/// A fast 64-bit hash; with 10 million worlds the chance that two are taken for one is below 1 in 300,000.
#[derive(Clone, Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn write_u64(&mut self, value: u64) {
        // Multiply and fold, as wyhash does.
        let product = u128::from(self.0 ^ value ^ 0x9E37_79B9_7F4A_7C15) * 0xD6E8_FEB8_6659_FD93;
        self.0 = (product as u64) ^ ((product >> 64) as u64) ^ self.0.rotate_left(23);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

/// Keys are hashes already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only 64-bit keys");
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

const SHARDS: usize = 256;

/// Fingerprints seen, by all threads.
struct Seen(Vec<Mutex<HashSet<u64, BuildHasherDefault<Same>>>>);

impl Seen {
    fn new() -> Seen {
        Seen((0..SHARDS).map(|_| Mutex::default()).collect())
    }

    /// Whether it is new.
    fn insert(&self, key: u64) -> bool {
        self.0[(key >> 56) as usize % SHARDS].lock().expect("no panics while held").insert(key)
    }

    fn contains(&self, key: u64) -> bool {
        self.0[(key >> 56) as usize % SHARDS].lock().expect("no panics while held").contains(&key)
    }

    fn len(&self) -> usize {
        self.0.iter().map(|shard| shard.lock().expect("no panics while held").len()).sum()
    }
}

/// A history that breaks a property.
pub struct Found {
    pub what: String,
    pub path: Vec<Action>,
}

pub struct Outcome {
    pub states: usize,
    pub transitions: usize,
    pub depth: usize,
    pub found: Option<Found>,
}

struct Search {
    seen: Seen,
    recovers: Seen,
    transitions: AtomicUsize,
    depth: AtomicUsize,
    stop: AtomicBool,
    found: Mutex<Option<Found>>,
}

struct Frame {
    world: World,
    actions: Vec<Action>,
    taken: Option<Action>,
}

/// Visits all worlds within the bounds, or as many as it takes to find a broken property.
pub fn explore(name: &str, bounds: Bounds) -> Outcome {
    let begun = Instant::now();
    let search = Search {
        seen: Seen::new(),
        recovers: Seen::new(),
        transitions: AtomicUsize::new(0),
        depth: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        found: Mutex::new(None),
    };
    // Breadth first until there is work for every core.
    let mut level: Vec<(World, Vec<Action>)> = vec![(World::new(bounds), Vec::new())];
    while level.len() < 2000 && !level.is_empty() && !search.stop.load(Ordering::Relaxed) {
        let mut next = Vec::new();
        for (world, path) in level {
            for action in world.actions() {
                if let Some(after) = search.step(&world, action, || path.clone()) {
                    next.push((after, [&path[..], &[action]].concat()));
                }
            }
        }
        level = next;
    }
    let work = Mutex::new(level);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let limit = std::env::var("LIMIT").ok().and_then(|v| v.parse().ok()).unwrap_or(u64::MAX);
                while !search.stop.load(Ordering::Relaxed) {
                    let Some((world, path)) = work.lock().expect("no panics while held").pop() else { return };
                    search.depth_first(world, path, limit);
                }
            });
        }
    });
    let outcome = Outcome {
        states: search.seen.len(),
        transitions: search.transitions.into_inner(),
        depth: search.depth.into_inner(),
        found: search.found.into_inner().expect("threads ended"),
    };
    println!(
        "{name}: {} states, {} transitions, depth {}, {:.1} s; {bounds:?}",
        outcome.states,
        outcome.transitions,
        outcome.depth,
        begun.elapsed().as_secs_f64(),
    );
    if let Some(found) = &outcome.found {
        println!("found: {}", found.what);
        for (step, action) in found.path.iter().enumerate() {
            println!("{:4} {action:?}", step + 1);
        }
    }
    outcome
}

impl Search {
    fn depth_first(&self, world: World, path: Vec<Action>, limit: u64) {
        let actions = world.actions();
        let mut stack = vec![Frame { world, actions, taken: None }];
        while let Some(frame) = stack.last_mut() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            if self.transitions.load(Ordering::Relaxed) > limit as usize {
                self.stop.store(true, Ordering::Relaxed);
            }
            let Some(action) = frame.actions.pop() else {
                stack.pop();
                continue;
            };
            let world = frame.world.clone();
            let so_far = || path.iter().copied().chain(stack.iter().filter_map(|frame| frame.taken)).collect();
            let Some(after) = self.step(&world, action, so_far) else { continue };
            let actions = after.actions();
            stack.push(Frame { world: after, actions, taken: Some(action) });
            self.depth.fetch_max(path.len() + stack.len(), Ordering::Relaxed);
        }
    }

    /// The world after the action, if it is new and nothing is broken.
    fn step(&self, world: &World, action: Action, so_far: impl Fn() -> Vec<Action>) -> Option<World> {
        self.transitions.fetch_add(1, Ordering::Relaxed);
        let after = world.after(action);
        let what = match &after.violation {
            Some(what) => what.clone(),
            None if !self.seen.insert(after.fingerprint()) => return None,
            None if self.recovers(&after) => return Some(after),
            None => String::from("without further faults the end of the log is never served"),
        };
        self.stop.store(true, Ordering::Relaxed);
        let path = so_far().into_iter().chain([action]).collect();
        self.found.lock().expect("no panics while held").get_or_insert(Found { what, path });
        None
    }

    /// Whether everything comes to a good end from here if nothing fails any more.
    fn recovers(&self, world: &World) -> bool {
        let mut on_the_way = Vec::new();
        let good = world.recovers(|world| {
            let key = world.fingerprint();
            on_the_way.push(key);
            self.recovers.contains(key)
        });
        if good {
            on_the_way.into_iter().for_each(|key| {
                self.recovers.insert(key);
            });
        }
        good
    }
}
