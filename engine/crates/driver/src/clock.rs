//! Time: the clock of leases, and timers.

use std::time::Duration;

use pgtypes::Instant;

/// The present moment of `CLOCK_BOOTTIME`, which also runs while the process is stopped or the machine is suspended.
///
/// Leases are counted with it: a frozen writer must find its lease expired when it thaws.
pub fn now() -> Instant {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing, and the call keeps no reference to it.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert!(result == 0, "CLOCK_BOOTTIME exists since Linux 2.6.39");
    Instant(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Waits for `duration`, or longer when the machine is busy or was suspended.
pub async fn sleep(duration: Duration) {
    compio::time::sleep(duration).await;
}

/// Waits until [`now`] is at or after `moment`.
pub async fn sleep_until(moment: Instant) {
    loop {
        let left = moment.since(now());
        if left.is_zero() {
            return;
        }
        sleep(left).await;
    }
}

/// The output of `future`, or `None` when `duration` passed first; `future` is dropped then.
///
/// Not for a [`crate::Reader::read`] on a connection that will be read again.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Option<F::Output> {
    compio::time::timeout(duration, future).await.ok()
}
