//! The shared area of the virtual disk, from the agent's side: memory, descriptors, wake-ups.
//!
//! `vfs-abi` says what the words mean and in which order they change; this file owns the mapping and the futexes.

use std::{
    io,
    ops::Deref,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{
            AtomicU32,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use driver::EventFd;
use vfs_abi::{AREA_BYTES, Area, ROLE_WRITER};

/// One start of PostgreSQL: its area, and what it inherits beside it. Cheap to clone; may go to other threads.
#[derive(Clone)]
pub struct SharedArea(Arc<Inner>);

struct Inner {
    memory: Mapping,
    file: OwnedFd,
    doorbell: EventFd,
    agent_gone: OwnedFd,
    _agent_lives: OwnedFd,
}

/// The mapping of the memfd.
struct Mapping(NonNull<Area>);

// SAFETY: every word of the area is atomic, and the mapping lives until the last owner drops it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length by `SharedArea::create`, and nobody can refer to it any more.
        let result = unsafe { libc::munmap(self.0.as_ptr().cast(), AREA_BYTES) };
        debug_assert_eq!(0, result);
    }
}

impl SharedArea {
    /// A fresh area in the role of writer, nothing written, nothing settled, no lease.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn create(segment_bytes: u64, lease_wait_timeout_ms: u32) -> io::Result<Self> {
        // SAFETY: a constant string with its closing zero byte.
        let file = owned(unsafe { libc::memfd_create(c"lakebase-vfs-area".as_ptr(), libc::MFD_CLOEXEC) })?;
        // SAFETY: no pointers.
        if unsafe { libc::ftruncate(file.as_raw_fd(), AREA_BYTES as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping of a file of this length; the kernel chooses the address.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                AREA_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = Mapping(NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?);
        let (agent_gone, agent_lives) = pipe()?;
        let doorbell = EventFd::new()?;
        let area = Self(Arc::new(Inner { memory, file, doorbell, agent_gone, _agent_lives: agent_lives }));
        area.initialise(segment_bytes, std::process::id(), ROLE_WRITER, lease_wait_timeout_ms);
        Ok(area)
    }

    /// Rung by PostgreSQL when it has written WAL while the agent slept.
    pub fn doorbell(&self) -> &EventFd {
        &self.0.doorbell
    }

    /// What PostgreSQL must inherit, with the environment variables that name it.
    pub fn inherited(&self) -> [(&'static str, RawFd); 3] {
        [
            (vfs_abi::ENV_AREA, self.0.file.as_raw_fd()),
            (vfs_abi::ENV_DOORBELL, self.0.doorbell.as_raw_fd()),
            (vfs_abi::ENV_AGENT_FD, self.0.agent_gone.as_raw_fd()),
        ]
    }

    /// The first `sequence` WAL writes are durable on a quorum.
    pub fn settle_writes(&self, sequence: u64) {
        if self.settle(sequence) {
            wake_all(&self.settled_futex);
        }
    }

    /// The read lease ends at `until_ns` of `CLOCK_BOOTTIME`.
    pub fn renew(&self, until_ns: u64) {
        if self.renew_lease(until_ns) {
            wake_all(&self.lease_futex);
        }
    }

    /// Each WAL flush takes so much longer, because the page service lags.
    pub fn delay_flushes(&self, delay: Duration) {
        // Bounded by `backpressure::DELAY_MAX`.
        self.flush_delay_us.store(delay.as_micros() as u32, Relaxed);
    }

    /// This writer is fenced: no wait in PostgreSQL returns any more.
    pub fn fence_writer(&self) {
        self.fence();
        wake_all(&self.settled_futex);
        wake_all(&self.lease_futex);
    }
}

impl Deref for SharedArea {
    type Target = Area;

    fn deref(&self) -> &Area {
        // SAFETY: the mapping is as long as an `Area` at least (asserted in vfs-abi), aligned to a page, zero or set by
        // atomics, and lives as long as `self`.
        unsafe { self.0.memory.0.as_ref() }
    }
}

fn wake_all(word: &AtomicU32) {
    // SAFETY: the word's address is valid; FUTEX_WAKE keeps no reference. Not FUTEX_PRIVATE: the waiters are other processes.
    let woken = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    debug_assert!(woken >= 0, "FUTEX_WAKE of {}: {}", word.load(SeqCst), io::Error::last_os_error());
}

/// A pipe: read end, write end, both closed in programs that this process executes.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((owned(ends[0])?, owned(ends[1])?))
}

/// Takes over what a system call returned.
pub fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_area_is_a_writers_with_nothing_settled() {
        let area = SharedArea::create(16 << 20, 60_000).expect("memory");
        assert_eq!(vfs_abi::MAGIC, area.magic.load(SeqCst));
        assert!(area.is_writer());
        assert_eq!(0, area.flush_target());
        assert_eq!(0, area.lease_until_ns.load(SeqCst));
        area.publish_write(1, 8192);
        assert!(!area.is_settled(area.flush_target()));
        area.settle_writes(1);
        assert!(area.is_settled(area.flush_target()));
        area.fence_writer();
        assert!(area.is_fenced());
    }
}
