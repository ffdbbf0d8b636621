//! The agent's side of the block map: memory, descriptors, futexes.
//!
//! `vfs_abi::blocks` says what the words mean; this file owns the mapping.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    ptr::NonNull,
    sync::Arc,
};

use driver::EventFd;
use vfs_abi::blocks::{AtomicU32, AtomicU64, BlockMap, ENV_BLOCKS, ENV_BLOCKS_DOORBELL, Layout, Signals};

use crate::area::owned;

/// The block map of one start of PostgreSQL. Cheap to clone; may go to other threads.
#[derive(Clone)]
pub struct SharedBlocks(Arc<Inner>);

struct Inner {
    memory: NonNull<u8>,
    layout: Layout,
    file: OwnedFd,
    doorbell: EventFd,
}

// SAFETY: the memory holds atomics only, and lives until the last owner drops it.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: mapped with this length by `SharedBlocks::create`, and nobody can refer to it any more.
        let result = unsafe { libc::munmap(self.memory.as_ptr().cast(), bytes(self.layout)) };
        debug_assert_eq!(0, result);
    }
}

/// Bytes of the region.
fn bytes(layout: Layout) -> usize {
    // The engine runs on 64-bit machines, and a layout's limits keep it far below an address space.
    layout.region_bytes() as usize
}

impl SharedBlocks {
    /// Zeroed memory for a map of these sizes. Only what is touched takes memory.
    ///
    /// # Errors
    /// Out of memory, address space or descriptors.
    pub fn create(layout: Layout) -> io::Result<Self> {
        let doorbell = EventFd::new()?;
        // SAFETY: a constant string with its closing zero byte.
        let file = owned(unsafe { libc::memfd_create(c"lakebase-vfs-blocks".as_ptr(), libc::MFD_CLOEXEC) })?;
        // SAFETY: no pointers.
        if unsafe { libc::ftruncate(file.as_raw_fd(), bytes(layout) as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping of a file of this length; the kernel chooses the address.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes(layout),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self(Arc::new(Inner { memory, layout, file, doorbell })))
    }

    /// The map.
    pub fn map(&self) -> BlockMap<'_> {
        let Inner { memory, layout, .. } = &*self.0;
        let wide_words = layout.wide_words();
        // SAFETY: the mapping begins at a page and is at least as long as these words, which are atomics, so that all-zero bytes
        // and other processes' stores are valid; it lives as long as `self`.
        let wide = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<AtomicU64>(), wide_words) };
        // SAFETY: as above; words of 64 bits before them keep them aligned.
        let narrow = unsafe {
            let start = memory.as_ptr().cast::<AtomicU64>().add(wide_words);
            std::slice::from_raw_parts(start.cast::<AtomicU32>(), layout.narrow_words())
        };
        BlockMap::from_raw(*layout, wide, narrow)
    }

    /// Rung by PostgreSQL when it asks for blocks while the agent sleeps.
    pub fn doorbell(&self) -> &EventFd {
        &self.0.doorbell
    }

    /// What PostgreSQL must inherit, with the environment variables that name it.
    pub fn inherited(&self) -> [(&'static str, RawFd); 2] {
        [(ENV_BLOCKS, self.0.file.as_raw_fd()), (ENV_BLOCKS_DOORBELL, self.0.doorbell.as_raw_fd())]
    }
}

impl std::fmt::Debug for SharedBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedBlocks").finish_non_exhaustive()
    }
}

/// Waits and wakes by futexes that other processes see.
#[derive(Clone, Copy, Debug, Default)]
pub struct Futex;

/// Longest sleep on a word: a process that is killed between a change and its wake-up must not leave the agent asleep.
static SLEEP_MAX: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };

impl Signals for Futex {
    fn wait(&self, word: &AtomicU32, expected: u32) {
        // SAFETY: the word's address and the timeout are valid during the call. Not FUTEX_PRIVATE: the waker is another process.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const SLEEP_MAX) };
    }

    fn wake_all(&self, word: &AtomicU32) {
        // SAFETY: the word's address is valid; FUTEX_WAKE keeps no reference.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }
}
