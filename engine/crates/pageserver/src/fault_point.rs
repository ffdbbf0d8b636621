//! Places where a test can make the process die, between two steps of which a crash must not see half.
//!
//! Nothing in product builds: behind the feature `faults`.

/// Dies like a process that is killed when the environment variable `LAKEBASE_DIE_AT` has this name, from its
/// `LAKEBASE_DIE_AFTER`th pass on (default: the first).
#[cfg(feature = "faults")]
pub fn pass(name: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static PASSES: AtomicU32 = AtomicU32::new(0);
    if std::env::var("LAKEBASE_DIE_AT").is_ok_and(|wanted| wanted == name) {
        let after = std::env::var("LAKEBASE_DIE_AFTER").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
        if PASSES.fetch_add(1, Ordering::Relaxed) + 1 >= after {
            // SAFETY: no pointers; the process ends.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}

/// Nothing.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn pass(_: &str) {}
