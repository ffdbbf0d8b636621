//! Relation files: a read returns blocks that are on the local disk, a write makes them so.
//!
//! Rules V1-V3 and V5; the protocol is in `vfs-abi::blocks`, both halves of it. Here are the system calls between its
//! steps, the waiting, and what happens to a read whose block does not come. Knows no page server.
#![allow(unsafe_code)]

use crate::{
    backend::Backend,
    futex::{self, KeepErrno, Wait, set_errno},
    real, report,
    server::{Server, ring},
    wal::AGENT_CHECK_MS,
};
use core::{ffi::c_int, sync::atomic::AtomicU32, sync::atomic::Ordering::SeqCst};
use libc::{off_t, ssize_t};
use vfs_abi::blocks::{
    BLOCK_BYTES, BlockMap, Blocked, EVICT_ALWAYS, FILE_BLOCKS_MAX, FileKey, FileRef, Kind, MapFull, Purpose, Signals,
    Word, WriteClaim, WriteOutcome,
};

/// The relation half of a server.
pub struct Relations {
    /// The map, mapped for the life of the process.
    pub map: BlockMap<'static>,
    /// Eventfd that wakes the agent for requests.
    pub doorbell: c_int,
    /// What PostgreSQL is asked.
    pub backend: Backend,
    /// Pages whose own LSN lies below this were never logged: no WAL exists before the first segment's end. 0 and 1 are
    /// what index builds and unlogged relations write.
    pub pinned_below: u64,
}

/// A range of blocks of one file, half-open.
#[derive(Clone, Copy)]
struct Range {
    file: FileRef,
    first: u32,
    end: u32,
}

impl Range {
    /// The blocks that `count` bytes at `offset` touch; none if there are none that the map could know.
    #[inline]
    fn of(file: FileRef, offset: off_t, count: u64) -> Option<Range> {
        let offset = u64::try_from(offset).ok()?;
        let end = offset.saturating_add(count).div_ceil(BLOCK_BYTES).min(u64::from(FILE_BLOCKS_MAX)) as u32;
        let first = (offset / BLOCK_BYTES).min(u64::from(FILE_BLOCKS_MAX)) as u32;
        (first < end).then_some(Range { file, first, end })
    }
}

/// Waits of this process: shared futexes, and a look after the agent now and then.
struct Futexes<'a>(&'a Server);

impl Signals for Futexes<'_> {
    fn wait(&self, word: &AtomicU32, expected: u32) {
        if futex::wait(word, expected, AGENT_CHECK_MS) == Wait::TimedOut {
            self.0.end_if_agent_is_gone();
        }
        self.0.end_if_fenced();
    }

    fn wake_all(&self, word: &AtomicU32) {
        futex::wake_all(word);
    }
}

impl Relations {
    /// The file that PostgreSQL has just opened, in the map.
    ///
    /// # Errors
    /// The `errno` to fail with: the map has no room.
    pub fn opened(&self, server: &Server, key: &FileKey, fd: c_int, flags: c_int) -> Result<Option<FileRef>, c_int> {
        let _keep = KeepErrno::new();
        let created = flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL;
        let opened = self.map.open_file(key, created, || has_name(fd), &Futexes(server)).map_err(|full| {
            report::line(format_args!("cannot open a relation file: {full}"));
            libc::ENFILE
        })?;
        if let Some(file) = opened.filter(|_| flags & libc::O_TRUNC != 0) {
            // Once more, now that no fill can make the file long again. PostgreSQL itself opens no relation like this.
            // SAFETY: integer arguments; the file has just been opened and truncated.
            self.truncate(server, file, 0, || unsafe { real::ftruncate(fd, 0) });
        }
        Ok(opened)
    }

    /// Reads `count` bytes at `offset` through `call`, when all blocks are there. All of them up to the end of the file, or
    /// an error.
    #[inline]
    pub fn read(
        &self,
        server: &Server,
        fd: c_int,
        file: FileRef,
        offset: off_t,
        count: u64,
        mut call: impl FnMut() -> ssize_t,
    ) -> ssize_t {
        let Some(range) = Range::of(file, offset, count) else { return call() };
        loop {
            // A file that was unlinked is nobody's: whoever still has it open reads what is there.
            if !self.map.is_current(file) {
                return call();
            }
            let stamp = match self.map.stamp(file, range.first, range.end) {
                Some(stamp) => stamp,
                None => match self.bring(server, range) {
                    Ok(Some(stamp)) => stamp,
                    Ok(None) => continue,
                    Err(errno) => {
                        set_errno(errno);
                        return -1;
                    }
                },
            };
            let result = call();
            if result < 0 {
                return result;
            }
            if self.map.is_unchanged(file, range.first, range.end, stamp) {
                self.map.note_hits(file, range.first, range.end, processor());
                self.evict_if_always(server, fd, range);
                return result;
            }
        }
    }

    /// Brings the absent blocks of a range. `Ok` holds the stamp of the range; none if the file is gone meanwhile.
    ///
    /// # Errors
    /// `EIO`: a block does not come, or the process is told to end while it waits. Only where PostgreSQL can bear it.
    #[cold]
    fn bring(&self, server: &Server, range: Range) -> Result<Option<u64>, c_int> {
        let _keep = KeepErrno::new();
        let Range { file, first, end } = range;
        let signals = Futexes(server);
        self.map.note_wait();
        loop {
            if !self.map.is_current(file) {
                return Ok(None);
            }
            let requested = match self.map.request(file, first, end, Purpose::Read, &signals) {
                Ok(requested) => requested,
                Err(full) => return self.no_room(full),
            };
            if requested.ring {
                ring(self.doorbell);
            }
            if let Some(stamp) = self.map.stamp(file, first, end) {
                return Ok(Some(stamp));
            }
            if self.backend.is_told_to_die() && self.backend.may_fail() {
                return Err(libc::EIO);
            }
            let (word, seen) = match self.map.blocked(file, first, end) {
                Some((_, Blocked::Word(word, seen))) => (word, seen),
                // It failed between our request and this look.
                Some((_, Blocked::Failed(word, seen))) if requested.ring_full.is_none() => (word, seen),
                Some((_, Blocked::Unclaimed | Blocked::Failed(..))) => {
                    if let Some(head) = requested.ring_full {
                        self.map.wait_for_ring(head, &signals);
                    }
                    continue;
                }
                None => continue,
            };
            if Word(seen).kind() != Kind::Failed {
                self.map.wait_for(word, seen, &signals);
            }
            let now = word.load(SeqCst);
            if Word(now).kind() == Kind::Failed && Word(now).version() == Word(seen).version() {
                if self.backend.may_fail() {
                    return Err(libc::EIO);
                }
                // Asked for again after a while: this process cannot go on without the block.
                self.map.wait_for(word, now, &signals);
            }
        }
    }

    /// The map is too small for an absent block.
    fn no_room<T>(&self, full: MapFull) -> Result<T, c_int> {
        report::line(format_args!("cannot read a relation file: {full}"));
        if self.backend.may_fail() {
            return Err(libc::EIO);
        }
        report::end(format_args!("the process cannot go on without this block: it ends"));
    }

    /// Writes `count` bytes at `offset` through `call`. `page_lsn` gives the LSN in the page that starts so many bytes into
    /// the write; without it everything written is pinned (`write`: copies of databases and init forks, in no WAL).
    #[expect(clippy::too_many_arguments, reason = "the arguments of the intercepted call, and what it is made through")]
    pub fn write(
        &self,
        server: &Server,
        fd: c_int,
        file: FileRef,
        offset: off_t,
        count: u64,
        page_lsn: Option<&dyn Fn(u64) -> u64>,
        call: impl FnOnce() -> ssize_t,
    ) -> ssize_t {
        let Some(range) = Range::of(file, offset, count) else { return call() };
        let signals = Futexes(server);
        let whole = (offset as u64).is_multiple_of(BLOCK_BYTES) && count.is_multiple_of(BLOCK_BYTES);
        loop {
            match self.map.claim_write(file, range.first, range.end, whole, &signals) {
                Ok(WriteClaim::Claimed) => break,
                Ok(WriteClaim::Gone) => return call(),
                Ok(WriteClaim::NeedsBlocks) => {
                    if let Err(errno) = self.bring(server, range) {
                        set_errno(errno);
                        return -1;
                    }
                }
                Err(full) => {
                    report::line(format_args!("cannot write a relation file: {full}"));
                    set_errno(libc::ENOSPC);
                    return -1;
                }
            }
        }
        let result = call();
        let _keep = KeepErrno::new();
        let written_end = offset as u64 + u64::try_from(result).unwrap_or(0);
        // After the claim: what is in the pages was inserted before PostgreSQL called.
        let horizon = if page_lsn.is_some() { self.backend.horizon() } else { 0 };
        for block in range.first..range.end {
            let start = u64::from(block) * BLOCK_BYTES;
            let outcome = if written_end < (start + BLOCK_BYTES).min(offset as u64 + count) {
                WriteOutcome::NotWritten
            } else {
                match page_lsn {
                    // Only for a block that was written from its start on is there an LSN to look at.
                    Some(page_lsn) if whole && page_lsn(start - offset as u64) >= self.pinned_below => {
                        WriteOutcome::Evictable { horizon }
                    }
                    _ => WriteOutcome::Pinned,
                }
            };
            self.map.finish_write(file, block, outcome, &signals);
        }
        self.evict_if_always(server, fd, range);
        result
    }

    /// Cuts the file off at `length` bytes through `call`.
    pub fn truncate(&self, server: &Server, file: FileRef, length: off_t, call: impl FnOnce() -> c_int) -> c_int {
        if let Ok(length) = u64::try_from(length) {
            let blocks = length.div_ceil(BLOCK_BYTES).min(u64::from(FILE_BLOCKS_MAX)) as u32;
            self.map.truncate(file, blocks, &Futexes(server));
        }
        let result = call();
        if result != 0 && self.map.is_current(file) && futex::errno() != libc::EINTR {
            // The map already says that the blocks are gone, and absent ones among them would be read as zeros.
            let error = std::io::Error::last_os_error();
            report::end(format_args!("cannot truncate a relation file: {error}; the process ends"));
        }
        result
    }

    /// As [`Relations::truncate`], by name.
    pub fn truncate_path(&self, server: &Server, key: &FileKey, length: off_t, call: impl FnOnce() -> c_int) -> c_int {
        match self.map.find_file(key, &Futexes(server)) {
            Some(file) => self.truncate(server, file, length, call),
            None => call(),
        }
    }

    /// Removes the file through `call`.
    pub fn unlink(&self, server: &Server, key: &FileKey, call: impl FnOnce() -> c_int) -> c_int {
        let mut known = false;
        let result = self.map.remove_file(key, &Futexes(server), |found| {
            known = found;
            call()
        });
        if result != 0 && known && futex::errno() != libc::ENOENT {
            let error = std::io::Error::last_os_error();
            report::end(format_args!("cannot remove a relation file: {error}; the process ends"));
        }
        result
    }

    /// Asks for the absent blocks of a range without waiting. Returns whether all of it is local, so that the kernel's own
    /// read-ahead is of use.
    pub fn prefetch(&self, server: &Server, file: FileRef, offset: off_t, count: off_t) -> bool {
        let Some(range) = u64::try_from(count).ok().and_then(|count| Range::of(file, offset, count)) else {
            return true;
        };
        if !self.map.is_current(file) || self.map.stamp(file, range.first, range.end).is_some() {
            return true;
        }
        let _keep = KeepErrno::new();
        // A map without room says so to the read that follows.
        let requested = self.map.request(file, range.first, range.end, Purpose::Prefetch, &Futexes(server));
        if requested.is_ok_and(|requested| requested.ring) {
            ring(self.doorbell);
        }
        false
    }

    /// The test mode that gives every clean block back after each access.
    #[inline]
    fn evict_if_always(&self, server: &Server, fd: c_int, range: Range) {
        if self.map.evict_mode() == EVICT_ALWAYS {
            self.evict(server, fd, range);
        }
    }

    #[cold]
    fn evict(&self, server: &Server, fd: c_int, range: Range) {
        let _keep = KeepErrno::new();
        for block in range.first..range.end {
            let punch = || {
                let offset = (u64::from(block) * BLOCK_BYTES) as off_t;
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: integer arguments. It fails for descriptors that are open for reading only: the block stays.
                unsafe { libc::fallocate(fd, mode, offset, BLOCK_BYTES as off_t) == 0 }
            };
            self.map.evict_block(range.file, block, punch, &Futexes(server));
        }
    }
}

/// Number of the processor that this runs on, or was a moment ago: spreads counters. No system call (glibc reads it from
/// the area that the kernel keeps for restartable sequences).
fn processor() -> u32 {
    // SAFETY: no arguments.
    unsafe { libc::sched_getcpu() }.unsigned_abs()
}

/// Whether an open file still has a name.
fn has_name(fd: c_int) -> bool {
    let mut status = core::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: room for the result, which is looked at only after success.
    unsafe { libc::fstat(fd, status.as_mut_ptr()) == 0 && status.assume_init().st_nlink > 0 }
}
