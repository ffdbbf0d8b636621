//! The library's half: what a read, a write and a truncation of a relation file do to the words of its blocks.
//!
//! A range of blocks is half-open: `first..end`. Blocks at and beyond [`FILE_BLOCKS_MAX`] do not exist in PostgreSQL's
//! builds and are left alone.

use super::{
    BlockMap, Plant, Signals,
    files::{FileRef, MapFull},
    layout::{CHUNK_BLOCKS, EXTENT_BLOCKS, FILE_BLOCKS_MAX, HIT_LANES, RING_ENTRIES, chunk, narrow, wide},
    ring::RingEntry,
    sync::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, SeqCst},
    },
    word::{Kind, Word},
};

/// Why blocks are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Somebody waits.
    Read,
    /// Somebody may want it later. Leaves a quarter of the ring to those who wait.
    Prefetch,
}

/// What [`BlockMap::request`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requested {
    /// The agent sleeps: ring its doorbell, or nobody answers.
    pub ring: bool,
    /// Not every absent block could be asked for; the number is for [`BlockMap::wait_for_ring`].
    pub ring_full: Option<u32>,
}

/// What stands in the way of a read.
#[derive(Clone, Copy)]
pub enum Blocked<'a> {
    /// Wait for a change of this word.
    Word(&'a AtomicU32, u32),
    /// Not asked for yet.
    Unclaimed,
    /// The last fill failed.
    Failed(&'a AtomicU32, u32),
}

/// Whether a write may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteClaim {
    /// Every block of the range is ours until [`BlockMap::finish_write`].
    Claimed,
    /// The file is gone: the descriptor leads to a file without a name, which nobody tracks.
    Gone,
    /// Part of a block would be written, whose other part is absent: read it first.
    NeedsBlocks,
}

/// How the write of one block went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// All of it was written; it may be evicted when `horizon` is committed.
    Evictable {
        /// WAL position at or above every change in it.
        horizon: u64,
    },
    /// All of it was written; nobody else has it.
    Pinned,
    /// Not, or not all of it.
    NotWritten,
}

impl<'a> BlockMap<'a> {
    /// The word of a block, if its chunk has been taken.
    fn word(&self, file: FileRef, block: u32) -> Option<&'a AtomicU32> {
        self.chunk_of(file, block).map(|chunk| self.chunk_block(chunk, block % CHUNK_BLOCKS))
    }

    fn clamp(first: u32, end: u32) -> core::ops::Range<u32> {
        first..end.min(FILE_BLOCKS_MAX)
    }

    /// A stamp of the range if all its blocks are local, to be compared with the stamp after the read: if they are equal,
    /// the bytes read are those of the blocks. It is the sum of versions, each of which only rises.
    #[inline]
    pub fn stamp(&self, file: FileRef, first: u32, end: u32) -> Option<u64> {
        let mut sum = 0u64;
        for block in Self::clamp(first, end) {
            match self.word(file, block) {
                Some(word) => {
                    let word = Word(word.load(Acquire));
                    if !word.kind().is_readable() {
                        return None;
                    }
                    sum += u64::from(word.version());
                }
                None if self.is_absent_without_chunk(file, block) => return None,
                None => {}
            }
        }
        Some(sum)
    }

    /// Whether the blocks read since `stamp` are still those: no version moved. A write that is going on or is over does
    /// not count: it stands beside the read as it would on a plain file.
    #[inline]
    pub fn is_unchanged(&self, file: FileRef, first: u32, end: u32, stamp: u64) -> bool {
        let mut sum = 0u64;
        for block in Self::clamp(first, end) {
            if let Some(word) = self.word(file, block) {
                sum += u64::from(Word(word.load(Acquire)).version());
            }
        }
        sum == stamp
    }

    /// Counts `blocks` as read without waiting, and tells the clock of eviction. `lane` spreads them: the processor's number.
    #[inline]
    pub fn note_hits(&self, file: FileRef, first: u32, end: u32, lane: u32) {
        self.wide(wide::HITS + (lane as usize % HIT_LANES) * 8).fetch_add(u64::from(end - first), Relaxed);
        let mut block = first;
        while block < end.min(FILE_BLOCKS_MAX) {
            if let Some(chunk) = self.chunk_of(file, block) {
                let extent = block % CHUNK_BLOCKS / EXTENT_BLOCKS;
                let word = self.chunk_word(chunk, chunk::REFERENCED + extent as usize / 32);
                let bit = 1 << (extent % 32);
                // Mostly set already: a load that shares its line instead of a store that takes it.
                if word.load(Relaxed) & bit == 0 {
                    word.fetch_or(bit, Relaxed);
                }
            }
            block += EXTENT_BLOCKS - block % EXTENT_BLOCKS;
        }
    }

    /// Counts a wait.
    pub fn note_wait(&self) {
        self.count(wide::WAITS, 1);
    }

    /// Claims the absent blocks of the range and asks the agent for them. Returns at once.
    ///
    /// # Errors
    /// No free chunk for an absent block.
    pub fn request(
        &self,
        file: FileRef,
        first: u32,
        end: u32,
        purpose: Purpose,
        signals: &impl Signals,
    ) -> Result<Requested, MapFull> {
        let mut pushed = 0;
        let mut full = None;
        let reserve = if purpose == Purpose::Prefetch { RING_ENTRIES / 4 } else { 0 };
        for block in Self::clamp(first, end) {
            if self.chunk_of(file, block).is_none() && !self.is_absent_without_chunk(file, block) {
                continue;
            }
            let Some(chunk) = self.take_chunk(file, block, signals)? else { break };
            let word = self.chunk_block(chunk, block % CHUNK_BLOCKS);
            let old = Word(word.load(Acquire));
            if !old.kind().is_claimable() {
                continue;
            }
            let keeps = self.planted(Plant::ClaimKeepsVersion);
            let claimed = if keeps { old.with(Kind::Filling) } else { old.next(Kind::Filling) };
            if self.planted(Plant::ClaimWithoutSwap) {
                word.store(claimed.0, SeqCst);
            } else if word.compare_exchange(old.0, claimed.0, SeqCst, Relaxed).is_err() {
                continue;
            }
            let request = RingEntry {
                slot: file.slot,
                incarnation: file.incarnation,
                chunk,
                block,
                version: claimed.version(),
                prefetch: purpose == Purpose::Prefetch,
            };
            if let Err(head) = self.push(request, reserve) {
                // Nobody was asked under this version, so it may stay.
                let given_back = claimed.with(Kind::Absent);
                if word.compare_exchange(claimed.0, given_back.0, SeqCst, Relaxed).is_ok() {
                    self.wake_block(word, signals);
                }
                full = Some(head);
                if purpose == Purpose::Prefetch {
                    self.count(wide::PREFETCHES_DROPPED, 1);
                }
                break;
            }
            pushed += 1;
        }
        if purpose == Purpose::Prefetch && pushed > 0 {
            self.count(wide::PREFETCHES, pushed);
        }
        // The agent is called for a full ring, too: it may have gone to sleep between two looks of ours.
        let sleeps = self.narrow(narrow::AGENT_SLEEPS);
        let ring = (pushed > 0 || full.is_some()) && sleeps.load(SeqCst) == 1 && sleeps.swap(0, SeqCst) == 1;
        Ok(Requested { ring, ring_full: full })
    }

    /// The first block of the range that stands in the way of a read; none if all are local now.
    pub fn blocked(&self, file: FileRef, first: u32, end: u32) -> Option<(u32, Blocked<'a>)> {
        for block in Self::clamp(first, end) {
            let Some(word) = self.word(file, block) else {
                if self.is_absent_without_chunk(file, block) {
                    return Some((block, Blocked::Unclaimed));
                }
                continue;
            };
            let seen = word.load(SeqCst);
            return Some(match Word(seen).kind() {
                Kind::Pinned | Kind::Present => continue,
                Kind::Failed => (block, Blocked::Failed(word, seen)),
                Kind::Absent => (block, Blocked::Unclaimed),
                Kind::Filling | Kind::Writing | Kind::Overwriting | Kind::Evicting => {
                    (block, Blocked::Word(word, seen))
                }
            });
        }
        None
    }

    /// Takes charge of the blocks of the range for a write, in ascending order. Waits for local work only. `whole`: every
    /// block of the range will be written from its first byte to its last.
    ///
    /// # Errors
    /// No free chunk for an absent block. A local block that lies in no chunk and finds none free is written untracked
    /// and stays pinned.
    pub fn claim_write(
        &self,
        file: FileRef,
        first: u32,
        end: u32,
        whole: bool,
        signals: &impl Signals,
    ) -> Result<WriteClaim, MapFull> {
        let range = Self::clamp(first, end);
        // Chunks before claims: the lock's holder may wait for claims.
        let mut block = range.start;
        while block < range.end {
            match self.take_chunk(file, block, signals) {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(WriteClaim::Gone),
                Err(full) if self.is_absent_without_chunk(file, block) => return Err(full),
                Err(_) => {}
            }
            block += CHUNK_BLOCKS - block % CHUNK_BLOCKS;
        }
        for block in range.clone() {
            let Some(word) = self.word(file, block) else { continue };
            loop {
                let old = Word(word.load(Acquire));
                let claimed = match old.kind() {
                    Kind::Pinned | Kind::Present => old.with(Kind::Writing),
                    Kind::Absent | Kind::Filling | Kind::Failed if !whole => {
                        self.release_write(file, range.start, block, signals);
                        return Ok(WriteClaim::NeedsBlocks);
                    }
                    Kind::Absent | Kind::Failed => old.next(Kind::Overwriting),
                    // A fill that is under way keeps the old version, and is dropped.
                    Kind::Filling if self.planted(Plant::WriteKeepsVersion) => old.with(Kind::Overwriting),
                    Kind::Filling => old.next(Kind::Overwriting),
                    Kind::Overwriting if self.planted(Plant::WriteIgnoresFill) => old.next(Kind::Overwriting),
                    Kind::Writing | Kind::Overwriting | Kind::Evicting => {
                        self.wait_for(word, old.0, signals);
                        continue;
                    }
                };
                if word.compare_exchange(old.0, claimed.0, SeqCst, Relaxed).is_ok() {
                    if old.kind() == Kind::Present {
                        self.wide(wide::PRESENT).fetch_sub(1, Relaxed);
                    }
                    break;
                }
            }
        }
        // Whoever removes the file raises the incarnation first and then waits for our claims: either it is seen here, or
        // the removal comes after our write.
        if self.is_current(file) {
            return Ok(WriteClaim::Claimed);
        }
        self.release_write(file, range.start, range.end, signals);
        Ok(WriteClaim::Gone)
    }

    fn release_write(&self, file: FileRef, first: u32, end: u32, signals: &impl Signals) {
        for block in first..end {
            self.finish_write(file, block, WriteOutcome::NotWritten, signals);
        }
    }

    /// Ends the claim on one block, after its write.
    pub fn finish_write(&self, file: FileRef, block: u32, outcome: WriteOutcome, signals: &impl Signals) {
        if block >= FILE_BLOCKS_MAX {
            return;
        }
        let Some(chunk) = self.chunk_of(file, block) else { return };
        let index = block % CHUNK_BLOCKS;
        let word = self.chunk_block(chunk, index);
        let old = Word(word.load(Relaxed));
        if !matches!(old.kind(), Kind::Writing | Kind::Overwriting) {
            // Not claimed, since its chunk was taken only afterwards.
            return;
        }
        let new = match outcome {
            WriteOutcome::Evictable { horizon } => {
                // Before the state: whoever sees the block present must see how young it is.
                let raise = || self.horizon(chunk, index / EXTENT_BLOCKS).fetch_max(horizon, SeqCst);
                let pinned = self.is_pinned(file.slot);
                if self.planted(Plant::HorizonLate) {
                    word.store(old.with(Kind::Present).0, SeqCst);
                    raise();
                    return;
                }
                raise();
                old.with(if pinned { Kind::Pinned } else { Kind::Present })
            }
            WriteOutcome::Pinned => old.with(Kind::Pinned),
            WriteOutcome::NotWritten if old.kind() == Kind::Overwriting => old.next(Kind::Absent),
            // Part of it may be written, with a horizon that nobody knows.
            WriteOutcome::NotWritten => old.with(Kind::Pinned),
        };
        if new.kind() == Kind::Present {
            self.wide(wide::PRESENT).fetch_add(1, Relaxed);
        }
        word.store(new.0, SeqCst);
        self.wake_block(word, signals);
    }

    /// Cuts the file off at `blocks`, before the real call: what lies beyond is pinned, under new versions, and so neither
    /// filled nor evicted, whether the file grows again or not. Waits for local work only.
    pub fn truncate(&self, file: FileRef, blocks: u32, signals: &impl Signals) {
        self.lower_absent_below(file, blocks, signals);
        let mut block = blocks;
        while block < FILE_BLOCKS_MAX {
            match self.word(file, block) {
                Some(word) => {
                    self.settle(word, signals);
                    block += 1;
                }
                None => block += CHUNK_BLOCKS - block % CHUNK_BLOCKS,
            }
        }
    }

    /// Test mode [`super::EVICT_ALWAYS`]: evicts one block if it is clean; `punch` gives its bytes back and says whether
    /// it did.
    pub fn evict_block(&self, file: FileRef, block: u32, punch: impl FnOnce() -> bool, signals: &impl Signals) -> bool {
        if block >= FILE_BLOCKS_MAX {
            return false;
        }
        let Some(chunk) = self.chunk_of(file, block) else { return false };
        let index = block % CHUNK_BLOCKS;
        if !self.claim_evict(chunk, index, Some(file), signals) {
            return false;
        }
        let punched = punch();
        self.release_evict(chunk, index, punched, signals);
        punched
    }
}
