//! The ring of requests: many producers (PostgreSQL's processes), one consumer (a thread of the agent). Bounded.

use super::{
    BlockMap, Signals,
    layout::{RING_ENTRIES, narrow, ring},
    sync::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
};

/// A request as it travels: which block was claimed, under which version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingEntry {
    pub slot: u32,
    pub incarnation: u32,
    pub chunk: u32,
    /// Number of the block in its file.
    pub block: u32,
    pub version: u32,
    pub prefetch: bool,
}

/// What a filled entry of position `position` holds as its turn. Zeroed memory is no filled entry of any lap: turns are
/// odd, and count laps modulo what fits.
fn turn(position: u32) -> u32 {
    (position / RING_ENTRIES) << 1 | 1
}

impl<'a> BlockMap<'a> {
    fn entry(&self, position: u32, field: usize) -> &'a AtomicU32 {
        let index = (position % RING_ENTRIES) as usize;
        self.narrow(self.layout.ring() + index * ring::WORDS + field)
    }

    /// Puts a request into the ring, unless fewer than `reserve` entries would be left. `Err` holds the consumer's
    /// position, to wait for its change.
    pub(super) fn push(&self, request: RingEntry, reserve: u32) -> Result<(), u32> {
        let tail = self.narrow(narrow::RING_TAIL);
        let mut position = tail.load(Relaxed);
        loop {
            let head = self.narrow(narrow::RING_HEAD).load(SeqCst);
            let used = position.wrapping_sub(head);
            if used > RING_ENTRIES {
                // The consumer has overtaken our stale position.
                position = tail.load(Acquire);
                continue;
            }
            if used + reserve >= RING_ENTRIES {
                let now = tail.load(Acquire);
                if now == position {
                    return Err(head);
                }
                position = now;
                continue;
            }
            match tail.compare_exchange(position, position.wrapping_add(1), SeqCst, Acquire) {
                Ok(_) => break,
                Err(now) => position = now,
            }
        }
        self.entry(position, ring::SLOT).store(request.slot, Relaxed);
        self.entry(position, ring::INCARNATION).store(request.incarnation, Relaxed);
        self.entry(position, ring::CHUNK).store(request.chunk, Relaxed);
        self.entry(position, ring::BLOCK).store(request.block, Relaxed);
        self.entry(position, ring::VERSION).store(request.version, Relaxed);
        self.entry(position, ring::PREFETCH).store(u32::from(request.prefetch), Relaxed);
        self.entry(position, ring::TURN).store(turn(position), SeqCst);
        Ok(())
    }

    /// Takes the oldest request. One thread only.
    pub(super) fn pop(&self, signals: &impl Signals) -> Option<RingEntry> {
        let head = self.narrow(narrow::RING_HEAD);
        let position = head.load(Relaxed);
        if self.entry(position, ring::TURN).load(SeqCst) != turn(position) {
            return None;
        }
        let field = |field| self.entry(position, field).load(Relaxed);
        let request = RingEntry {
            slot: field(ring::SLOT),
            incarnation: field(ring::INCARNATION),
            chunk: field(ring::CHUNK),
            block: field(ring::BLOCK),
            version: field(ring::VERSION),
            prefetch: field(ring::PREFETCH) != 0,
        };
        // Not a filled entry any more, whatever the lap: the count of laps wraps.
        self.entry(position, ring::TURN).store(0, Release);
        head.store(position.wrapping_add(1), SeqCst);
        if self.narrow(narrow::RING_WAITERS).load(SeqCst) != 0 {
            signals.wake_all(head);
        }
        Some(request)
    }

    /// Whether a request waits. Consumer only.
    pub(super) fn ring_has_request(&self) -> bool {
        let position = self.narrow(narrow::RING_HEAD).load(Relaxed);
        self.entry(position, ring::TURN).load(SeqCst) == turn(position)
    }

    /// Sleeps until the consumer has moved on from `head`, which [`super::Requested::ring_full`] named.
    pub fn wait_for_ring(&self, head: u32, signals: &impl Signals) {
        let waiters = self.narrow(narrow::RING_WAITERS);
        waiters.fetch_add(1, SeqCst);
        let word = self.narrow(narrow::RING_HEAD);
        if word.load(SeqCst) == head {
            signals.wait(word, head);
        }
        waiters.fetch_sub(1, SeqCst);
    }
}
