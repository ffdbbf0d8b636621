//! Lengths of forks from lengths of stripes.

use std::collections::BTreeMap;

use layers::Striping;
use pgtypes::Lsn;
use wal::{Fork, RelFileLocator};
use wire::page::StripeLength;

/// Every fork of every relation that exists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ForkLengths {
    /// As of this position; the lowest of the shards' when the newest was asked for.
    pub lsn: Lsn,
    /// In order of relation and fork.
    pub forks: Vec<ForkLength>,
}

/// Length of a fork.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ForkLength {
    /// Whose.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// Blocks; 0 when it exists and is empty.
    pub blocks: u32,
}

/// Puts the lengths of all shards' stripes together: a fork ends where the last of its stripes that holds anything does.
///
/// # Errors
/// A stripe that is longer than a stripe, or ends beyond the last block that PostgreSQL has.
pub fn merge(entries: impl IntoIterator<Item = StripeLength>, striping: Striping) -> Result<Vec<ForkLength>, String> {
    let mut forks: BTreeMap<(RelFileLocator, Fork), u32> = BTreeMap::new();
    for entry in entries {
        let end = u64::from(entry.stripe) * u64::from(striping.stripe_blocks) + u64::from(entry.length);
        let end = match u32::try_from(end) {
            Ok(end) if entry.length <= striping.stripe_blocks => end,
            _ => return Err(format!("{entry:?} with stripes of {} blocks", striping.stripe_blocks)),
        };
        let blocks = forks.entry((entry.relation, entry.fork)).or_default();
        if entry.length > 0 {
            *blocks = (*blocks).max(end);
        }
    }
    Ok(forks.into_iter().map(|((relation, fork), blocks)| ForkLength { relation, fork, blocks }).collect())
}
