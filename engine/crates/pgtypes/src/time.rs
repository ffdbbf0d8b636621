//! Time as the pure machines see it: a number that the shell hands in.

use core::time::Duration;

/// A moment of a clock that never goes back and also runs while the machine is suspended (`CLOCK_BOOTTIME`).
///
/// Nanoseconds since an arbitrary start; moments of two machines cannot be compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Instant(pub u64);

impl Instant {
    /// The moment `duration` later.
    #[must_use]
    pub const fn after(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(duration.as_nanos() as u64))
    }

    /// Time from `earlier` to this moment; zero if `earlier` is later.
    pub const fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
