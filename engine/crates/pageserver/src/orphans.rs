//! Orphans: layers in object storage that older owners uploaded and that nothing names.
//!
//! They come from owners that died between an upload and a manifest, or between a manifest and the removal of what it does not name
//! any more. Those of this owner are a later one's.

use std::{collections::BTreeSet, rc::Rc, time::Duration};

use layers::{LayerId, ShardGeneration};
use remote_storage::ShardError;

use crate::{flush::ownership_lost, owner::Owner};

/// How often they are looked for: an older owner that does not know that it is one may still upload.
const INTERVAL: Duration = Duration::from_secs(3600);

/// Pause before object storage is asked again.
const PAUSE: Duration = Duration::from_secs(60);

/// Objects that are removed at a time; the claims are listed before each removal.
const REMOVED_AT_A_TIME: usize = 1000;

/// Removes orphans once nobody reads by what an older owner granted, and now and then from there on, until the process ends.
pub async fn remove_orphans(owner: Rc<Owner>) {
    const TROUBLE: &str = "layers that older owners left stay for now";
    // Lengths are not known: the next start, with the lost layer put back, may see the shard otherwise.
    if owner.hold_uploads.get() || !owner.pause(owner.process.config.retention.lease_period).await {
        return;
    }
    loop {
        let pause = match owner.remove_orphans_once().await {
            Ok(()) => {
                owner.solved(TROUBLE);
                INTERVAL
            }
            Err(error) => {
                if let Some(failure) = ownership_lost(&error) {
                    return owner.fail(failure);
                }
                owner.report(TROUBLE, &error);
                PAUSE
            }
        };
        if !owner.pause(pause).await {
            return;
        }
    }
}

impl Owner {
    async fn remove_orphans_once(&self) -> Result<(), ShardError> {
        let listed = self.store.list_layers().await?;
        let orphans = || {
            let manifest = self.manifest();
            let named: BTreeSet<LayerId> = manifest.layers.iter().map(|layer| layer.id).collect();
            orphans(listed.iter().map(|(layer, _)| *layer), &named, self.generation())
        };
        if orphans().is_empty() {
            return Ok(());
        }
        // Only what a manifest does not name that this process has written may be removed.
        if !self.commit(|_| ()).await {
            return Ok(());
        }
        let orphans = orphans();
        for some in orphans.chunks(REMOVED_AT_A_TIME) {
            self.store.delete_layers(some).await?;
            self.process.metrics.orphans.inc_by(some.len() as u64);
        }
        tracing::info!(layers = orphans.len(), "removed layers that older owners left");
        Ok(())
    }
}

/// Layers that owners before `generation` left and that are not named. No owner will name them any more: older ones may still
/// write manifests, which do not count.
fn orphans(
    listed: impl Iterator<Item = LayerId>,
    named: &BTreeSet<LayerId>,
    generation: ShardGeneration,
) -> Vec<LayerId> {
    listed.filter(|layer| layer.generation < generation && !named.contains(layer)).collect()
}

#[cfg(test)]
mod tests {
    use layers::ShardId;

    use super::*;

    #[test]
    fn what_is_named_or_of_this_owner_or_a_later_one_is_no_orphan() {
        let layer = |generation, number| LayerId { shard: ShardId(1), generation: ShardGeneration(generation), number };
        let listed = [layer(1, 1), layer(1, 2), layer(2, 1), layer(3, 1), layer(4, 1)];
        let named = BTreeSet::from([layer(1, 2)]);
        assert_eq!(vec![layer(1, 1), layer(2, 1)], orphans(listed.into_iter(), &named, ShardGeneration(3)));
    }
}
