//! Garbage: which positions must stay readable, and which layers no read of them needs.

use alloc::collections::BTreeMap;
use core::time::Duration;

use pgtypes::{Instant, Lsn};
use thiserror::Error;

use crate::{
    identity::{LayerDescription, LayerKind},
    map::{Edit, LayerMap},
};

/// Readers with a lease, at most; more are refused.
pub const LEASES_MAX: usize = 10_000;

/// A lease was not granted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum LeaseRefused {
    /// What it asks for was given up.
    #[error("{lsn} is no longer kept: the oldest position is {horizon}")]
    BelowHorizon {
        /// That was asked for.
        lsn: Lsn,
        /// The oldest that can be read.
        horizon: Lsn,
    },
    /// [`LEASES_MAX`] readers have one.
    #[error("too many readers have a lease")]
    TooMany,
}

/// What readers (replicas, base backups, exports) need to stay readable, and for how long.
#[derive(Clone, Debug)]
pub struct Leases {
    period: Duration,
    /// Leases that an earlier owner granted are unknown: until here their readers may come back.
    quiet_until: Instant,
    readers: BTreeMap<u64, (Lsn, Instant)>,
}

impl Leases {
    /// No leases are known, just after a start or an attach at `now`; each lasts `period`.
    pub fn new(now: Instant, period: Duration) -> Leases {
        Leases { period, quiet_until: now.after(period), readers: BTreeMap::new() }
    }

    /// Grants or renews the lease of `reader` for `lsn` and everything behind it. `horizon` is the map's.
    ///
    /// # Errors
    /// The position is gone, or there are too many readers.
    pub fn handle_lease(&mut self, reader: u64, lsn: Lsn, horizon: Lsn, now: Instant) -> Result<(), LeaseRefused> {
        if lsn < horizon {
            return Err(LeaseRefused::BelowHorizon { lsn, horizon });
        }
        self.readers.retain(|_, (_, until)| *until > now);
        if self.readers.len() >= LEASES_MAX && !self.readers.contains_key(&reader) {
            return Err(LeaseRefused::TooMany);
        }
        self.readers.insert(reader, (lsn, now.after(self.period)));
        Ok(())
    }

    /// Ends a lease.
    pub fn handle_release(&mut self, reader: u64) {
        self.readers.remove(&reader);
    }

    /// The oldest position that must stay readable: that of the retention window, `retained`, or of an older lease.
    /// `None` in the first period, when nothing may be given up.
    pub fn horizon(&self, retained: Lsn, now: Instant) -> Option<Lsn> {
        let held = self.readers.values().filter(|(_, until)| *until > now).map(|(lsn, _)| *lsn);
        (now >= self.quiet_until).then(|| held.fold(retained, Lsn::min))
    }
}

/// The layers that no read at the map's horizon or later needs.
///
/// An image layer at or below the horizon hides what is older, for the keys that it answers for.
pub fn collect(map: &LayerMap) -> Edit {
    let hidden = |layer: &&LayerDescription| {
        let lowest = match layer.kind {
            LayerKind::Delta => layer.lsns.through,
            LayerKind::Image => Lsn(layer.lsns.through.0.saturating_add(1)),
        };
        let mut partitions = map.partitions_in(layer.keys.intersection(&map.keys()));
        lowest <= map.horizon()
            && partitions.all(|partition| partition.images.range(lowest..=map.horizon()).next().is_some())
    };
    Edit { remove: map.layers().filter(hidden).map(|layer| layer.id).collect(), add: Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// A replica that held a lease of the owner before has not come back yet.
    #[test]
    fn nothing_is_given_up_in_the_first_lease_period() {
        let leases = Leases::new(Instant(5 * SECOND), Duration::from_secs(10));
        assert_eq!(None, leases.horizon(Lsn(100), Instant(14 * SECOND)));
        assert_eq!(Some(Lsn(100)), leases.horizon(Lsn(100), Instant(15 * SECOND)));
    }

    #[test]
    fn a_lease_holds_its_position_until_it_ends() {
        let mut leases = Leases::new(Instant(0), Duration::from_secs(10));
        leases.handle_lease(1, Lsn(50), Lsn(40), Instant(9 * SECOND)).unwrap();
        leases.handle_lease(2, Lsn(60), Lsn(40), Instant(9 * SECOND)).unwrap();
        assert_eq!(Some(Lsn(50)), leases.horizon(Lsn(100), Instant(10 * SECOND)));
        leases.handle_release(1);
        assert_eq!(Some(Lsn(60)), leases.horizon(Lsn(100), Instant(10 * SECOND)));
        assert_eq!(Some(Lsn(30)), leases.horizon(Lsn(30), Instant(10 * SECOND)));
        assert_eq!(Some(Lsn(100)), leases.horizon(Lsn(100), Instant(19 * SECOND)));
    }

    #[test]
    fn a_lease_below_the_horizon_is_refused() {
        let mut leases = Leases::new(Instant(0), Duration::from_secs(10));
        let refused = Err(LeaseRefused::BelowHorizon { lsn: Lsn(39), horizon: Lsn(40) });
        assert_eq!(refused, leases.handle_lease(1, Lsn(39), Lsn(40), Instant(0)));
    }
}
