//! The shards that page servers read the log for: the newest owner of each, and what it has on object storage.
//!
//! WAL that a shard lacks is kept for it for ever: unlike a follower, a shard that lost WAL could not be built again.

use alloc::vec::Vec;

use layers::{ShardGeneration, ShardId};
use pgtypes::Lsn;

/// Most shards of one log: 4,096 of 100 GB would be 400 TB.
pub const SHARDS_MAX: usize = 4096;

/// A shard, as a safekeeper knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shard {
    /// Which.
    pub shard: ShardId,
    /// The highest generation that registered: owners of lower ones are refused.
    pub generation: ShardGeneration,
    /// It needs nothing below.
    pub durable_lsn: Lsn,
}

/// A shard's owner was refused; nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShardError {
    /// The shard has a newer owner.
    #[error("shard {} has an owner of generation {}", .known.shard.0, .known.generation.0)]
    StaleGeneration {
        /// As it is known.
        known: Shard,
    },
    /// It never registered, or was removed since.
    #[error("shard {} is not registered", .0.0)]
    Unknown(ShardId),
    /// [`SHARDS_MAX`] exist.
    #[error("the log has {SHARDS_MAX} shards already")]
    TooMany,
}

/// How soon a change has to be durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Urgency {
    /// Nothing changed.
    Never,
    /// When lost, more WAL is kept.
    Soon,
    /// A promise depends on it.
    AtOnce,
}

/// All shards of a log, sorted by number.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Shards(pub(crate) Vec<Shard>);

impl Shards {
    fn find(&self, shard: ShardId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&shard, |known| known.shard)
    }

    /// The shard of that number.
    pub(crate) fn get(&self, shard: ShardId) -> Option<Shard> {
        self.find(shard).ok().map(|at| self.0[at])
    }

    /// Registers an owner; a shard that is new here needs everything from `oldest_lsn` on.
    pub(crate) fn register(
        &mut self,
        shard: ShardId,
        generation: ShardGeneration,
        oldest_lsn: Lsn,
    ) -> Result<Urgency, ShardError> {
        match self.find(shard) {
            Ok(at) if self.0[at].generation > generation => Err(ShardError::StaleGeneration { known: self.0[at] }),
            Ok(at) if self.0[at].generation == generation => Ok(Urgency::Never),
            Ok(at) => {
                self.0[at].generation = generation;
                Ok(Urgency::AtOnce)
            }
            Err(_) if self.0.len() >= SHARDS_MAX => Err(ShardError::TooMany),
            Err(at) => {
                self.0.insert(at, Shard { shard, generation, durable_lsn: oldest_lsn });
                Ok(Urgency::AtOnce)
            }
        }
    }

    /// Moves what a shard has on object storage; never back.
    pub(crate) fn confirm(
        &mut self,
        shard: ShardId,
        generation: ShardGeneration,
        durable_lsn: Lsn,
    ) -> Result<Urgency, ShardError> {
        let at = self.find(shard).map_err(|_| ShardError::Unknown(shard))?;
        let known = &mut self.0[at];
        if known.generation != generation {
            return Err(ShardError::StaleGeneration { known: *known });
        }
        if known.durable_lsn >= durable_lsn {
            return Ok(Urgency::Never);
        }
        known.durable_lsn = durable_lsn;
        Ok(Urgency::Soon)
    }

    /// Forgets a shard; `Never` when there is none.
    pub(crate) fn remove(&mut self, shard: ShardId) -> Urgency {
        match self.find(shard) {
            Ok(at) => {
                self.0.remove(at);
                Urgency::Soon
            }
            Err(_) => Urgency::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(7);

    fn generation(number: u64) -> ShardGeneration {
        ShardGeneration(number)
    }

    /// Two owners may run at a time: the older one must neither be fed nor let go of WAL.
    #[test]
    fn an_older_owner_is_refused() {
        let mut shards = Shards::default();
        assert_eq!(Ok(Urgency::AtOnce), shards.register(SHARD, generation(2), Lsn(100)));
        assert_eq!(Ok(Urgency::Never), shards.register(SHARD, generation(2), Lsn(300)));
        assert_eq!(Ok(Urgency::Soon), shards.confirm(SHARD, generation(2), Lsn(200)));
        assert_eq!(Ok(Urgency::AtOnce), shards.register(SHARD, generation(5), Lsn(300)));

        let known = Shard { shard: SHARD, generation: generation(5), durable_lsn: Lsn(200) };
        let stale = Err(ShardError::StaleGeneration { known });
        assert_eq!(stale, shards.register(SHARD, generation(4), Lsn(300)));
        assert_eq!(stale, shards.confirm(SHARD, generation(2), Lsn(900)));
        assert_eq!(known, shards.0[0]);
    }

    #[test]
    fn what_is_durable_never_moves_back() {
        let mut shards = Shards::default();
        assert_eq!(Err(ShardError::Unknown(SHARD)), shards.confirm(SHARD, generation(1), Lsn(100)));
        assert_eq!(Ok(Urgency::AtOnce), shards.register(SHARD, generation(1), Lsn(100)));
        assert_eq!(Ok(Urgency::Soon), shards.confirm(SHARD, generation(1), Lsn(200)));
        assert_eq!(Ok(Urgency::Never), shards.confirm(SHARD, generation(1), Lsn(150)));
        assert_eq!(Lsn(200), shards.0[0].durable_lsn);
        assert_eq!(Urgency::Soon, shards.remove(SHARD));
        assert_eq!(Urgency::Never, shards.remove(SHARD));
    }

    #[test]
    fn shards_stay_sorted_and_within_their_bound() {
        let mut shards = Shards::default();
        for number in (0..SHARDS_MAX as u32).rev() {
            assert_eq!(Ok(Urgency::AtOnce), shards.register(ShardId(number), generation(1), Lsn(8)));
        }
        assert!(shards.0.is_sorted_by_key(|shard| shard.shard));
        assert_eq!(Err(ShardError::TooMany), shards.register(ShardId(9_999), generation(1), Lsn(8)));
    }
}
