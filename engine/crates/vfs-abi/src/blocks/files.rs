//! File slots and chunks: what the lock protects. Block words are not touched under it except by those who give a chunk
//! away.

use super::{
    BlockMap, Plant, Signals,
    layout::{CHUNK_BLOCKS, CHUNK_EXTENTS, FILE_BLOCKS_MAX, FILE_CHUNKS, chunk, narrow, slot, wide},
    sync::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
    word::{Kind, Word},
};

/// Fork number of init forks (`INIT_FORKNUM`, relpath.h).
const INIT_FORK: u32 = 3;

/// A relation file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileKey {
    /// 1663 `pg_default`, 1664 `pg_global`.
    pub tablespace: u32,
    /// Database; 0 for `global/`.
    pub database: u32,
    /// Number in the file's name (`relfilenode`).
    pub relation: u32,
    /// 0 main, 2 visibility map, 3 init. Forks of the free-space map (1) are not tracked.
    pub fork: u32,
    /// Number of the segment of 1 GiB.
    pub segment: u32,
}

/// A file in the map, for as long as it exists: a slot that was used again has another incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileRef {
    /// Number of the slot, below `files_max`.
    pub slot: u32,
    /// Odd.
    pub incarnation: u32,
}

/// The map has no room: the agent made it for fewer files or chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapFull {
    /// Every file slot is in use.
    #[error("the block map is full: {0} files")]
    Files(u32),
    /// Every chunk is in use.
    #[error("the block map is full: {0} chunks of 16 MiB")]
    Chunks(u32),
    /// The file is longer than a segment may be.
    #[error("a relation file of {0} blocks is longer than 1 GiB")]
    FileTooLong(u32),
}

impl FileKey {
    fn hash(&self) -> u32 {
        // Multiplication by odd numbers and folding: file numbers are consecutive, so low bits alone would do, too.
        let mut value = self.relation.wrapping_mul(0x9E37_79B1) ^ self.database.wrapping_mul(0x85EB_CA6B);
        value ^= self.segment.wrapping_mul(0xC2B2_AE35) ^ self.fork.wrapping_mul(0x27D4_EB2F) ^ self.tablespace;
        value ^ value >> 15
    }
}

/// The lock word: a futex with the usual three values.
struct Locked<'m, 'a, S: Signals> {
    map: &'m BlockMap<'a>,
    signals: &'m S,
}

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;

impl<S: Signals> Drop for Locked<'_, '_, S> {
    fn drop(&mut self) {
        let word = self.map.narrow(narrow::LOCK);
        if word.swap(FREE, SeqCst) == CONTENDED {
            self.signals.wake_all(word);
        }
    }
}

impl<'a> BlockMap<'a> {
    /// Takes the lock. Held for microseconds, or for one unlink; a holder that is killed ends the whole server, and the
    /// map with it.
    fn lock<'m, S: Signals>(&'m self, signals: &'m S) -> Locked<'m, 'a, S> {
        let word = self.narrow(narrow::LOCK);
        if word.compare_exchange(FREE, HELD, SeqCst, Relaxed).is_err() {
            while word.swap(CONTENDED, SeqCst) != FREE {
                signals.wait(word, CONTENDED);
            }
        }
        Locked { map: self, signals }
    }

    pub(super) fn slot_word(&self, slot: u32, field: usize) -> &'a AtomicU32 {
        self.narrow(self.layout.slots() + slot as usize * slot::WORDS + field)
    }

    pub(super) fn chunk_word(&self, chunk: u32, field: usize) -> &'a AtomicU32 {
        self.narrow(self.layout.chunk_heads() + chunk as usize * chunk::WORDS + field)
    }

    /// The word of block `index` of a chunk.
    pub(super) fn chunk_block(&self, chunk: u32, index: u32) -> &'a AtomicU32 {
        self.narrow(self.layout.blocks() + chunk as usize * CHUNK_BLOCKS as usize + index as usize)
    }

    fn directory(&self, slot: u32, ordinal: u32) -> &'a AtomicU32 {
        self.narrow(self.layout.directories() + slot as usize * FILE_CHUNKS as usize + ordinal as usize)
    }

    fn bucket(&self, key: &FileKey) -> &'a AtomicU32 {
        let index = key.hash() as usize & (self.layout.bucket_count() - 1);
        self.narrow(self.layout.buckets() + index)
    }

    /// The chunk that holds `block` of a file, if it has one. `block` is below [`FILE_BLOCKS_MAX`].
    pub(super) fn chunk_of(&self, file: FileRef, block: u32) -> Option<u32> {
        self.directory(file.slot, block / CHUNK_BLOCKS).load(Acquire).checked_sub(1)
    }

    /// Whether `file` is still the file that it was when the reference was made.
    pub fn is_current(&self, file: FileRef) -> bool {
        self.slot_word(file.slot, slot::INCARNATION).load(Acquire) == file.incarnation
    }

    /// Which file a slot holds. Meaningful while the caller knows by other means that it does.
    pub(super) fn key_of(&self, slot: u32) -> FileKey {
        let field = |field| self.slot_word(slot, field).load(Acquire);
        FileKey {
            tablespace: field(slot::TABLESPACE),
            database: field(slot::DATABASE),
            relation: field(slot::RELATION),
            fork: field(slot::FORK),
            segment: field(slot::SEGMENT),
        }
    }

    pub(super) fn is_pinned(&self, slot: u32) -> bool {
        self.slot_word(slot, slot::PINNED).load(Acquire) != 0
    }

    /// Adds a file whose blocks below `absent_below` are not local. `pinned`: no block of it is ever evicted.
    ///
    /// A file that is in the map already gets these values; it must not be in use then.
    ///
    /// # Errors
    /// No free slot, or `absent_below` above [`FILE_BLOCKS_MAX`].
    pub fn add_file(
        &self,
        key: FileKey,
        absent_below: u32,
        pinned: bool,
        signals: &impl Signals,
    ) -> Result<FileRef, MapFull> {
        if absent_below > FILE_BLOCKS_MAX {
            return Err(MapFull::FileTooLong(absent_below));
        }
        let locked = self.lock(signals);
        if let Some(old) = locked.find(&key) {
            locked.forget(&key, old);
        }
        locked.insert(&key, absent_below, pinned)
    }

    /// The file of this name.
    pub fn find_file(&self, key: &FileKey, signals: &impl Signals) -> Option<FileRef> {
        self.lock(signals).find(key)
    }

    /// The file of this name, which PostgreSQL has just opened. One that the map does not have is local, and is added if
    /// `still_exists` says that it has not been unlinked since.
    ///
    /// `created`: the open made it (`O_CREAT | O_EXCL`), so whatever the map said of an earlier file is over.
    /// `Ok(None)`: unlinked since.
    ///
    /// # Errors
    /// No free slot.
    pub fn open_file(
        &self,
        key: &FileKey,
        created: bool,
        still_exists: impl FnOnce() -> bool,
        signals: &impl Signals,
    ) -> Result<Option<FileRef>, MapFull> {
        let locked = self.lock(signals);
        match locked.find(key) {
            Some(file) if !created => return Ok(Some(file)),
            Some(file) => locked.forget(key, file),
            None => {}
        }
        if !still_exists() {
            return Ok(None);
        }
        locked.insert(key, 0, false).map(Some)
    }

    /// Takes a file out of the map and calls `unlink`, which removes it from the disk and is told whether the map had it.
    ///
    /// Nobody can open, fill or evict the file in between: fills and evictions that are being written are waited for
    /// (local work), later ones find a new version. Whoever still has it open is not tracked any more.
    pub fn remove_file<R>(&self, key: &FileKey, signals: &impl Signals, unlink: impl FnOnce(bool) -> R) -> R {
        let locked = self.lock(signals);
        let file = locked.find(key);
        if let Some(file) = file {
            locked.forget(key, file);
        }
        unlink(file.is_some())
    }

    /// The chunk that holds `block`, taken now if the file has none there; none if the file is gone.
    ///
    /// # Errors
    /// No free chunk.
    pub(super) fn take_chunk(&self, file: FileRef, block: u32, signals: &impl Signals) -> Result<Option<u32>, MapFull> {
        if let Some(chunk) = self.chunk_of(file, block) {
            return Ok(Some(chunk));
        }
        let locked = self.lock(signals);
        if self.is_current(file) { locked.take_chunk(file, block / CHUNK_BLOCKS).map(Some) } else { Ok(None) }
    }

    /// Whether `block`, which lies in no chunk, is absent.
    pub(super) fn is_absent_without_chunk(&self, file: FileRef, block: u32) -> bool {
        block < self.slot_word(file.slot, slot::ABSENT_BELOW).load(Acquire)
    }

    /// Lowers the length up to which a file's blocks are absent where it has no chunk.
    pub(super) fn lower_absent_below(&self, file: FileRef, blocks: u32, signals: &impl Signals) {
        // Under the lock: a chunk that is being taken reads it.
        let _locked = self.lock(signals);
        if self.is_current(file) {
            self.slot_word(file.slot, slot::ABSENT_BELOW).fetch_min(blocks, SeqCst);
        }
    }
}

impl<S: Signals> Locked<'_, '_, S> {
    fn find(&self, key: &FileKey) -> Option<FileRef> {
        let map = self.map;
        let mut next = map.bucket(key).load(Relaxed);
        while let Some(slot) = next.checked_sub(1) {
            if map.key_of(slot) == *key {
                return Some(FileRef { slot, incarnation: map.slot_word(slot, slot::INCARNATION).load(Relaxed) });
            }
            next = map.slot_word(slot, slot::NEXT).load(Relaxed);
        }
        None
    }

    /// Takes an entry from the free list, or one that was never used.
    fn take(&self, free: usize, high: usize, max: u32, next_of: impl Fn(u32) -> u32) -> Option<u32> {
        let map = self.map;
        if let Some(index) = map.narrow(free).load(Relaxed).checked_sub(1) {
            map.narrow(free).store(next_of(index), Relaxed);
            return Some(index);
        }
        let index = map.narrow(high).load(Relaxed);
        if index >= max {
            return None;
        }
        // Whoever goes through all entries up to here finds zeroes in this one, which say that it is free.
        map.narrow(high).store(index + 1, Release);
        Some(index)
    }

    fn insert(&self, key: &FileKey, absent_below: u32, pinned: bool) -> Result<FileRef, MapFull> {
        let map = self.map;
        let files_max = map.layout.files_max();
        let next_of = |slot| map.slot_word(slot, slot::NEXT).load(Relaxed);
        let slot =
            self.take(narrow::FILES_FREE, narrow::FILES_HIGH, files_max, next_of).ok_or(MapFull::Files(files_max))?;
        let set = |field, value| map.slot_word(slot, field).store(value, Release);
        set(slot::TABLESPACE, key.tablespace);
        set(slot::DATABASE, key.database);
        set(slot::RELATION, key.relation);
        set(slot::FORK, key.fork);
        set(slot::SEGMENT, key.segment);
        set(slot::ABSENT_BELOW, absent_below);
        let init = FileKey { fork: INIT_FORK, segment: 0, ..*key };
        set(slot::PINNED, u32::from(pinned || key.fork == INIT_FORK || self.find(&init).is_some()));
        let bucket = map.bucket(key);
        set(slot::NEXT, bucket.load(Relaxed));
        bucket.store(slot + 1, Relaxed);
        // Odd: in use. Last, so that an old reference is never taken for the new file.
        let incarnation = map.slot_word(slot, slot::INCARNATION).load(Relaxed).wrapping_add(1);
        map.slot_word(slot, slot::INCARNATION).store(incarnation, SeqCst);
        if key.fork == INIT_FORK {
            self.pin_relation(key);
        }
        Ok(FileRef { slot, incarnation })
    }

    /// A relation that gets an init fork is unlogged: its pages are in no WAL (finding B3).
    fn pin_relation(&self, init: &FileKey) {
        for fork in [0, 2] {
            for segment in 0.. {
                let Some(file) = self.find(&FileKey { fork, segment, ..*init }) else { break };
                self.map.slot_word(file.slot, slot::PINNED).store(1, SeqCst);
            }
        }
    }

    /// Takes a file out of the table and gives its chunks back.
    fn forget(&self, key: &FileKey, file: FileRef) {
        let map = self.map;
        // First: writes and evictions that claim a block afterwards look at it and let go.
        map.slot_word(file.slot, slot::INCARNATION).store(file.incarnation.wrapping_add(1), SeqCst);
        let next = map.slot_word(file.slot, slot::NEXT).load(Relaxed);
        let mut link = map.bucket(key);
        while link.load(Relaxed) != file.slot + 1 {
            let before = link.load(Relaxed).checked_sub(1).expect("a slot in use is in its bucket");
            link = map.slot_word(before, slot::NEXT);
        }
        link.store(next, Relaxed);
        for ordinal in 0..FILE_CHUNKS {
            let directory = map.directory(file.slot, ordinal);
            if let Some(chunk) = directory.load(Relaxed).checked_sub(1) {
                for index in 0..CHUNK_BLOCKS {
                    map.settle(map.chunk_block(chunk, index), self.signals);
                }
                directory.store(0, Release);
                self.give_chunk(chunk);
            }
        }
        map.slot_word(file.slot, slot::NEXT).store(map.narrow(narrow::FILES_FREE).load(Relaxed), Relaxed);
        map.narrow(narrow::FILES_FREE).store(file.slot + 1, Relaxed);
    }

    fn give_chunk(&self, chunk: u32) {
        let map = self.map;
        map.chunk_word(chunk, chunk::INCARNATION).store(0, SeqCst);
        map.chunk_word(chunk, chunk::NEXT).store(map.narrow(narrow::CHUNKS_FREE).load(Relaxed), Relaxed);
        map.narrow(narrow::CHUNKS_FREE).store(chunk + 1, Relaxed);
        map.narrow(narrow::CHUNKS_USED).fetch_sub(1, Relaxed);
    }

    fn take_chunk(&self, file: FileRef, ordinal: u32) -> Result<u32, MapFull> {
        let map = self.map;
        let directory = map.directory(file.slot, ordinal);
        if let Some(chunk) = directory.load(Acquire).checked_sub(1) {
            return Ok(chunk);
        }
        let chunks_max = map.layout.chunks_max();
        let next_of = |chunk| map.chunk_word(chunk, chunk::NEXT).load(Relaxed);
        let chunk = self
            .take(narrow::CHUNKS_FREE, narrow::CHUNKS_HIGH, chunks_max, next_of)
            .ok_or(MapFull::Chunks(chunks_max))?;
        map.narrow(narrow::CHUNKS_USED).fetch_add(1, Relaxed);
        let first = ordinal * CHUNK_BLOCKS;
        let absent_below = map.slot_word(file.slot, slot::ABSENT_BELOW).load(SeqCst);
        for index in 0..CHUNK_BLOCKS {
            // Versions go on where the chunk's last owner left them: late replies to that one stay late.
            let kind = if first + index < absent_below { Kind::Absent } else { Kind::Pinned };
            let word = map.chunk_block(chunk, index);
            let old = Word(word.load(Relaxed));
            if old.kind() != kind {
                word.store(old.next(kind).0, Relaxed);
            }
        }
        let base_horizon = map.base_horizon();
        for extent in 0..CHUNK_EXTENTS {
            map.horizon(chunk, extent).store(base_horizon, Relaxed);
        }
        for word in 0..CHUNK_EXTENTS.div_ceil(32) {
            map.chunk_word(chunk, chunk::REFERENCED + word as usize).store(0, Relaxed);
        }
        map.chunk_word(chunk, chunk::SLOT).store(file.slot, Relaxed);
        map.chunk_word(chunk, chunk::ORDINAL).store(ordinal, Relaxed);
        map.chunk_word(chunk, chunk::INCARNATION).store(file.incarnation, SeqCst);
        directory.store(chunk + 1, Release);
        Ok(chunk)
    }
}

impl<'a> BlockMap<'a> {
    /// The horizon of an extent of a chunk.
    pub(super) fn horizon(&self, chunk: u32, extent: u32) -> &'a super::AtomicU64 {
        self.wide(self.layout.horizons() + chunk as usize * CHUNK_EXTENTS as usize + extent as usize)
    }

    /// Ends whatever goes on with a block that is being cut off: it becomes pinned under a new version. Waits for local
    /// work only.
    pub(super) fn settle(&self, word: &AtomicU32, signals: &impl Signals) {
        loop {
            let old = Word(word.load(Acquire));
            if old.kind().is_local_work() && !self.planted(Plant::TruncateIgnoresFill) {
                self.wait_for(word, old.0, signals);
                continue;
            }
            let keeps = self.planted(Plant::TruncateKeepsVersion);
            let new = if keeps { old.with(Kind::Pinned) } else { old.next(Kind::Pinned) };
            if word.compare_exchange(old.0, new.0, SeqCst, Relaxed).is_ok() {
                if old.kind() == Kind::Present {
                    self.wide(wide::PRESENT).fetch_sub(1, Relaxed);
                }
                if old.kind() == Kind::Filling {
                    self.wake_block(word, signals);
                }
                return;
            }
        }
    }

    /// Sleeps while the word of a block is `seen`; returns now and then without a reason.
    pub fn wait_for(&self, word: &AtomicU32, seen: u32, signals: &impl Signals) {
        let waiters = self.narrow(narrow::WAITERS);
        waiters.fetch_add(1, SeqCst);
        // After the count: whoever changes the word from here on sees it.
        if word.load(SeqCst) == seen {
            signals.wait(word, seen);
        }
        waiters.fetch_sub(1, SeqCst);
    }
}
