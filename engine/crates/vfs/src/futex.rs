//! Waiting on a 32-bit word of the shared area, and the clock of the lease.
#![allow(unsafe_code)]

use core::sync::atomic::AtomicU32;

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The word had changed, somebody woke us, or the time is over: look again.
    LookAgain,
    /// The time is over.
    TimedOut,
    /// A signal handler ran.
    Interrupted,
}

/// Sleeps until `word` is woken, unless it differs from `expected`, for at most `timeout_ms`.
///
/// The futex is shared, since agent and backends are different processes. With a timeout the kernel does not restart
/// the call after a signal handler, whatever `SA_RESTART` says, so handlers' flags are seen.
pub fn wait(word: &AtomicU32, expected: u32, timeout_ms: u32) -> Wait {
    let timeout =
        libc::timespec { tv_sec: i64::from(timeout_ms / 1000), tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000 };
    // SAFETY: `word` outlives the call; the kernel only reads it and `timeout`.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const timeout) };
    if result == 0 {
        return Wait::LookAgain;
    }
    match errno() {
        libc::ETIMEDOUT => Wait::TimedOut,
        libc::EINTR => Wait::Interrupted,
        _ => Wait::LookAgain,
    }
}

/// Wakes everybody who sleeps on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: the kernel keeps no reference; the futex is shared as in `wait`.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Sleeps for `us` microseconds (below one second), or until a signal handler has run.
pub fn sleep_us(us: u32) {
    let time = libc::timespec { tv_sec: 0, tv_nsec: i64::from(us) * 1000 };
    // SAFETY: the kernel only reads `time`.
    unsafe { libc::nanosleep(&raw const time, core::ptr::null_mut()) };
}

/// Nanoseconds of `CLOCK_BOOTTIME`, which also runs while the machine is suspended. A vDSO call, about 25 ns.
pub fn boottime_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable; the clock exists since Linux 2.6.39.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    assert_eq!(0, result, "clock_gettime(CLOCK_BOOTTIME) cannot fail with a valid pointer");
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The calling thread's `errno`.
pub fn errno() -> i32 {
    // SAFETY: glibc returns a valid pointer to the thread's own word.
    unsafe { *libc::__errno_location() }
}

/// Sets the calling thread's `errno`.
pub fn set_errno(value: i32) {
    // SAFETY: as in `errno`.
    unsafe { *libc::__errno_location() = value }
}

/// Restores `errno` when dropped: our own calls must not change what the caller sees.
pub struct KeepErrno(i32);

impl KeepErrno {
    /// Remembers `errno`.
    #[expect(clippy::new_without_default, reason = "reading errno is an effect, not a default")]
    pub fn new() -> Self {
        KeepErrno(errno())
    }
}

impl Drop for KeepErrno {
    fn drop(&mut self) {
        set_errno(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_word_is_not_waited_for() {
        assert_eq!(Wait::LookAgain, wait(&AtomicU32::new(1), 0, 60_000));
    }

    #[test]
    fn a_wait_ends_after_its_timeout() {
        let before = boottime_ns();
        assert_eq!(Wait::TimedOut, wait(&AtomicU32::new(0), 0, 20));
        assert!(boottime_ns() - before >= 20_000_000);
    }

    #[test]
    fn errno_survives_our_own_calls() {
        set_errno(libc::ENOSPC);
        {
            let _keep = KeepErrno::new();
            wait(&AtomicU32::new(0), 0, 1);
            assert_eq!(libc::ETIMEDOUT, errno());
        }
        assert_eq!(libc::ENOSPC, errno());
    }
}
