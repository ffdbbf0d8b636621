//! The agent's half: answers requests, evicts, counts.

use super::{
    BlockMap, Counters, Plant, Signals,
    files::{FileKey, FileRef},
    layout::{CHUNK_BLOCKS, CHUNK_EXTENTS, EXTENT_BLOCKS, HIT_LANES, MAP_MAGIC, chunk, narrow, slot, wide},
    sync::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
    word::{Kind, Word},
};

/// Blocks of one run of eviction at most: 2 MiB, so that a write waits for one short hole punch.
const RUN_BLOCKS_MAX: u32 = 256;

/// A block that PostgreSQL wants. Its page must hold everything up to `horizon`, and be as of a position that is chosen
/// *after* this request was taken from the ring (finding A3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillRequest {
    /// The file.
    pub file: FileRef,
    /// Its name.
    pub key: FileKey,
    /// Number of the block in its file; `key.segment` x 131,072 more is that of PostgreSQL.
    pub block: u32,
    /// `not_modified_since`: at or above every change of the block that this compute has made and evicted, and committed:
    /// nobody has to wait for WAL of neighbours in the extent that were written since.
    pub horizon: u64,
    /// Nobody waits for it.
    pub prefetch: bool,
    version: u32,
    chunk: u32,
}

/// Blocks that may be evicted, if nothing happened to them since. All in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    chunk: u32,
    index: u32,
    end: u32,
}

/// Blocks that are being evicted: between [`BlockMap::begin_evict`] and [`BlockMap::finish_evict`] their holes are punched
/// (`FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvictRun {
    /// The file.
    pub file: FileRef,
    /// Its name.
    pub key: FileKey,
    /// First block, numbered in the file.
    pub first_block: u32,
    /// Number of blocks, at least 1.
    pub blocks: u32,
    chunk: u32,
}

/// Where the clock of eviction stands.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClockHand {
    chunk: u32,
    extent: u32,
}

impl<'a> BlockMap<'a> {
    /// Fills a zeroed region; the magic number comes last. `base_horizon`: the position of the base backup.
    pub fn initialise(&self, base_horizon: u64, commit_lsn: u64) {
        self.wide(wide::FILES_MAX).store(self.layout.files_max().into(), Relaxed);
        self.wide(wide::CHUNKS_MAX).store(self.layout.chunks_max().into(), Relaxed);
        self.wide(wide::BASE_HORIZON).store(base_horizon, Relaxed);
        self.wide(wide::COMMIT_LSN).store(commit_lsn, Relaxed);
        self.wide(wide::MAGIC).store(MAP_MAGIC, Release);
    }

    /// WAL below `commit_lsn` is durable on a quorum (on a replica: replayed). Rises only.
    pub fn set_commit_lsn(&self, commit_lsn: u64) {
        self.wide(wide::COMMIT_LSN).fetch_max(commit_lsn, SeqCst);
    }

    /// Chooses who evicts: [`super::EVICT_BY_AGENT`] or [`super::EVICT_ALWAYS`].
    pub fn set_evict_mode(&self, mode: u32) {
        self.narrow(narrow::EVICT_MODE).store(mode, Relaxed);
    }

    /// Takes a request. One thread only. Requests whose block was truncated or written meanwhile are left out.
    pub fn poll_request(&self, signals: &impl Signals) -> Option<FillRequest> {
        while let Some(entry) = self.pop(signals) {
            let file = FileRef { slot: entry.slot, incarnation: entry.incarnation };
            let key = self.key_of(entry.slot);
            let index = entry.block % CHUNK_BLOCKS;
            let horizon = self.horizon_to_ask_for(entry.chunk, index);
            // Last: while the claim stands, the chunk is its file's, and what was read above is true.
            if self.chunk_block(entry.chunk, index).load(SeqCst) == Word::of(Kind::Filling, entry.version).0 {
                return Some(FillRequest {
                    file,
                    key,
                    block: entry.block,
                    horizon,
                    prefetch: entry.prefetch,
                    version: entry.version,
                    chunk: entry.chunk,
                });
            }
        }
        None
    }

    /// What a page of an absent block must hold. The extent's horizon may have risen since by writes of other blocks, up to
    /// WAL that is not committed, and for which a reader must not wait: its own transaction may have to go on first. What
    /// was evicted was committed, so nothing above `commit_lsn` is in this block.
    fn horizon_to_ask_for(&self, chunk: u32, index: u32) -> u64 {
        let horizon = self.horizon(chunk, index / EXTENT_BLOCKS).load(SeqCst);
        horizon.min(self.commit_lsn().max(self.base_horizon()))
    }

    /// Announces that the agent goes to sleep on the doorbell. False: a request is there, it must not sleep.
    pub fn prepare_sleep(&self) -> bool {
        self.narrow(narrow::AGENT_SLEEPS).store(1, SeqCst);
        if self.ring_has_request() {
            self.narrow(narrow::AGENT_SLEEPS).store(0, SeqCst);
            return false;
        }
        true
    }

    /// Claims a block after a requested one, `ahead` blocks further in the same chunk, so that one answer may bring many
    /// (PostgreSQL 17 announces no sequential scans). `None`: it is not absent, or in another chunk.
    ///
    /// `request` must be one that [`BlockMap::begin_fill_write`] has not yet refused or taken.
    pub fn read_ahead(&self, request: &FillRequest, ahead: u32, signals: &impl Signals) -> Option<FillRequest> {
        let block = request.block.checked_add(ahead)?;
        if block / CHUNK_BLOCKS != request.block / CHUNK_BLOCKS {
            return None;
        }
        let word = self.chunk_block(request.chunk, block % CHUNK_BLOCKS);
        let old = Word(word.load(Acquire));
        if old.kind() != Kind::Absent {
            return None;
        }
        let claimed = old.next(Kind::Filling);
        if word.compare_exchange(old.0, claimed.0, SeqCst, Relaxed).is_err() {
            return None;
        }
        let ahead = FillRequest {
            block,
            horizon: self.horizon_to_ask_for(request.chunk, block % CHUNK_BLOCKS),
            prefetch: true,
            version: claimed.version(),
            ..*request
        };
        // Looked at after the claim: while that of the request stood, the chunk was its file's, and so it is now.
        if self.requested(request).load(SeqCst) == Word::of(Kind::Filling, request.version).0 {
            self.count(wide::PREFETCHES, 1);
            return Some(ahead);
        }
        if word.compare_exchange(claimed.0, claimed.with(Kind::Absent).0, SeqCst, Relaxed).is_ok() {
            self.wake_block(word, signals);
        }
        None
    }

    fn requested(&self, request: &FillRequest) -> &'a AtomicU32 {
        self.chunk_block(request.chunk, request.block % CHUNK_BLOCKS)
    }

    /// Takes charge of the block, since its page has arrived. False: the page is not wanted any more, drop it.
    ///
    /// True: the file is the one that has this name on disk, and stays until [`BlockMap::finish_fill`] or
    /// [`BlockMap::fail_fill`], which must follow without waiting for anything but the local disk.
    #[must_use]
    pub fn begin_fill_write(&self, request: &FillRequest) -> bool {
        let expected = Word::of(Kind::Filling, request.version);
        let word = self.requested(request);
        if self.planted(Plant::FillWithoutSwap) {
            word.store(expected.with(Kind::Overwriting).0, SeqCst);
            return true;
        }
        word.compare_exchange(expected.0, expected.with(Kind::Overwriting).0, SeqCst, Relaxed).is_ok()
    }

    /// The page is written: readers go on.
    pub fn finish_fill(&self, request: &FillRequest, signals: &impl Signals) {
        let word = self.requested(request);
        let kind = if self.is_pinned(request.file.slot) { Kind::Pinned } else { Kind::Present };
        self.count(wide::FILLS, 1);
        if kind == Kind::Present {
            self.count(wide::PRESENT, 1);
        }
        word.store(Word::of(kind, request.version).0, SeqCst);
        self.wake_block(word, signals);
    }

    /// The page will not come, or could not be written: those who wait get an I/O error, later readers ask again. The
    /// agent has logged why.
    pub fn fail_fill(&self, request: &FillRequest, signals: &impl Signals) {
        let word = self.requested(request);
        let failed = Word::of(Kind::Failed, request.version);
        let from = |kind: Kind| word.compare_exchange(failed.with(kind).0, failed.0, SeqCst, Relaxed).is_ok();
        if from(Kind::Filling) || from(Kind::Overwriting) {
            self.count(wide::FAILURES, 1);
            self.wake_block(word, signals);
        }
    }

    /// `not_modified_since` of a block: at or above every change of it that was ever written here.
    pub fn horizon_of(&self, file: FileRef, block: u32) -> u64 {
        match self.chunk_of(file, block) {
            Some(chunk) => self.horizon(chunk, block % CHUNK_BLOCKS / EXTENT_BLOCKS).load(SeqCst),
            None => self.base_horizon(),
        }
    }

    /// State of a block, for tests and for people.
    pub fn kind_of(&self, file: FileRef, block: u32) -> Kind {
        match self.chunk_of(file, block) {
            Some(chunk) => Word(self.chunk_block(chunk, block % CHUNK_BLOCKS).load(SeqCst)).kind(),
            None if self.is_absent_without_chunk(file, block) => Kind::Absent,
            None => Kind::Pinned,
        }
    }

    /// Blocks that eviction could give back, were their horizons committed.
    pub fn present_blocks(&self) -> u64 {
        self.wide(wide::PRESENT).load(Relaxed)
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        let get = |index: usize| self.wide(index).load(Relaxed);
        Counters {
            hits: (0..HIT_LANES).map(|lane| get(wide::HITS + 8 * lane)).sum(),
            fills: get(wide::FILLS),
            evictions: get(wide::EVICTIONS),
            waits: get(wide::WAITS),
            prefetches: get(wide::PREFETCHES),
            prefetches_dropped: get(wide::PREFETCHES_DROPPED),
            failures: get(wide::FAILURES),
            present: get(wide::PRESENT),
            chunks: self.narrow(narrow::CHUNKS_USED).load(Relaxed).into(),
        }
    }

    /// The next blocks that were not read since the clock came by and whose horizon is committed. `None` after one turn
    /// without any; a second turn finds those that the first one only passed over. `hurry` takes recently read ones, too.
    pub fn next_candidate(&self, hand: &mut ClockHand, hurry: bool) -> Option<Candidate> {
        let chunks = self.narrow(narrow::CHUNKS_HIGH).load(Acquire).min(self.layout.chunks_max());
        let commit_lsn = self.commit_lsn();
        let mut extents_left = u64::from(chunks) * u64::from(CHUNK_EXTENTS);
        while extents_left > 0 {
            if hand.extent >= CHUNK_EXTENTS {
                *hand = ClockHand { chunk: hand.chunk + 1, extent: 0 };
            }
            if hand.chunk >= chunks {
                *hand = ClockHand::default();
            }
            let (chunk, extent) = (hand.chunk, hand.extent);
            if extent == 0 && self.chunk_word(chunk, chunk::INCARNATION).load(Acquire) == 0 {
                extents_left = extents_left.saturating_sub(CHUNK_EXTENTS.into());
                hand.extent = CHUNK_EXTENTS;
                continue;
            }
            if !self.is_cold(chunk, extent, commit_lsn, hurry) {
                extents_left -= 1;
                hand.extent += 1;
                continue;
            }
            // Neighbours go along: small holes make a file of many fragments.
            let mut end = extent + 1;
            hand.extent = end;
            while end < CHUNK_EXTENTS && (end - extent) * EXTENT_BLOCKS < RUN_BLOCKS_MAX {
                // One that is not taken has been looked at: its mark is gone, and it must not be found without one at once.
                hand.extent = end + 1;
                if !self.is_cold(chunk, end, commit_lsn, hurry) {
                    break;
                }
                end += 1;
            }
            return Some(Candidate { chunk, index: extent * EXTENT_BLOCKS, end: end * EXTENT_BLOCKS });
        }
        None
    }

    /// Whether an extent holds something to evict and was not read lately; takes its mark away.
    fn is_cold(&self, chunk: u32, extent: u32, commit_lsn: u64, hurry: bool) -> bool {
        if self.horizon(chunk, extent).load(Acquire) > commit_lsn {
            return false;
        }
        let first = extent * EXTENT_BLOCKS;
        let present = |index| Word(self.chunk_block(chunk, index).load(Relaxed)).kind() == Kind::Present;
        if !(first..first + EXTENT_BLOCKS).any(present) {
            return false;
        }
        let marks = self.chunk_word(chunk, chunk::REFERENCED + extent as usize / 32);
        let bit = 1 << (extent % 32);
        if hurry || marks.load(Relaxed) & bit == 0 {
            return true;
        }
        marks.fetch_and(!bit, Relaxed);
        false
    }

    /// Takes charge of the next run of blocks of a candidate, which shrinks by it. `None`: nothing is left of it.
    pub fn begin_evict(&self, candidate: &mut Candidate, signals: &impl Signals) -> Option<EvictRun> {
        let chunk = candidate.chunk;
        while candidate.index < candidate.end {
            let first = candidate.index;
            candidate.index += 1;
            if !self.claim_evict(chunk, first, None, signals) {
                continue;
            }
            let mut end = first + 1;
            while end < candidate.end && self.claim_evict(chunk, end, None, signals) {
                end += 1;
            }
            candidate.index = end;
            // True while the claim stands: whoever takes the chunk away waits for it.
            let slot = self.chunk_word(chunk, chunk::SLOT).load(Acquire);
            let file = FileRef { slot, incarnation: self.chunk_word(chunk, chunk::INCARNATION).load(Acquire) };
            let first_block = self.chunk_word(chunk, chunk::ORDINAL).load(Acquire) * CHUNK_BLOCKS + first;
            return Some(EvictRun { file, key: self.key_of(slot), first_block, blocks: end - first, chunk });
        }
        None
    }

    /// The holes are punched, or could not be (`punched` false): the blocks are absent, or stay.
    pub fn finish_evict(&self, run: &EvictRun, punched: bool, signals: &impl Signals) {
        for block in run.first_block..run.first_block + run.blocks {
            self.release_evict(run.chunk, block % CHUNK_BLOCKS, punched, signals);
        }
    }

    /// Present to Evicting, if the horizon is committed and the file is still `file`.
    pub(super) fn claim_evict(&self, chunk: u32, index: u32, file: Option<FileRef>, signals: &impl Signals) -> bool {
        let word = self.chunk_block(chunk, index);
        let horizon = self.horizon(chunk, index / EXTENT_BLOCKS);
        let old = Word(word.load(Acquire));
        if old.kind() != Kind::Present || horizon.load(SeqCst) > self.commit_lsn() {
            return false;
        }
        let keeps = self.planted(Plant::EvictKeepsVersion);
        // The version rises before the bytes go: a reader that is under way notices.
        let claimed = if keeps { old.with(Kind::Evicting) } else { old.next(Kind::Evicting) };
        if word.compare_exchange(old.0, claimed.0, SeqCst, Relaxed).is_err() {
            return false;
        }
        // Looked at again under the claim. A write since our look has raised the horizon; the version of an unchanged
        // word says nothing about that, since writes keep it. A chunk may have come to another file.
        let slot = self.chunk_word(chunk, chunk::SLOT).load(Acquire);
        let incarnation = self.slot_word(slot, slot::INCARNATION).load(Acquire);
        let owner = FileRef { slot, incarnation: self.chunk_word(chunk, chunk::INCARNATION).load(Acquire) };
        let ours = owner.incarnation == incarnation && file.is_none_or(|file| file == owner)
            || self.planted(Plant::OwnerUnchecked);
        let committed = self.planted(Plant::HorizonOnce) || horizon.load(SeqCst) <= self.commit_lsn();
        let pinned = ours && self.is_pinned(slot);
        if ours && committed && !pinned {
            return true;
        }
        if pinned {
            // The file was found to be unlogged after this block was written: it is no candidate any more.
            self.wide(wide::PRESENT).fetch_sub(1, Relaxed);
        }
        word.store(claimed.with(if pinned { Kind::Pinned } else { Kind::Present }).0, SeqCst);
        self.wake_block(word, signals);
        false
    }

    pub(super) fn release_evict(&self, chunk: u32, index: u32, punched: bool, signals: &impl Signals) {
        let word = self.chunk_block(chunk, index);
        let old = Word(word.load(Relaxed));
        debug_assert_eq!(Kind::Evicting, old.kind(), "only its evictor takes a block out of this state");
        if punched {
            self.wide(wide::PRESENT).fetch_sub(1, Relaxed);
            self.count(wide::EVICTIONS, 1);
            word.store(old.with(Kind::Absent).0, SeqCst);
        } else {
            word.store(old.with(Kind::Present).0, SeqCst);
        }
        self.wake_block(word, signals);
    }
}
