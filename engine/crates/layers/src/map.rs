//! The layer map: which layers answer for a key at a position.
//!
//! The keys are cut into *partitions* at every bound of a layer; each lists its layers by LSN. For a key, delta layers
//! never overlap in LSN, and they leave no gap down to an image layer: so a missing layer is noticed, never read as
//! "nothing there". Knows nothing about files. Read next: `plan.rs`.

use alloc::{collections::BTreeMap, vec::Vec};

use pgtypes::Lsn;
use thiserror::Error;

use crate::{
    identity::{LayerDescription, LayerId, LayerKind, LsnRange},
    key::{Key, KeyRange},
};

/// A change of the set of live layers, made at once.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Edit {
    /// Layers that are no longer needed. Their objects may go when the manifest without them is durable.
    pub remove: Vec<LayerId>,
    /// Layers that are there, durable.
    pub add: Vec<LayerDescription>,
}

/// An edit does not fit the map: the program that made it, or the manifest, is wrong. The map is unchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum MapError {
    /// A layer to add is in the map.
    #[error("layer {0} is in the map twice")]
    Duplicate(LayerId),
    /// A layer to remove is not.
    #[error("layer {0} is not in the map")]
    Unknown(LayerId),
    /// Two delta layers would answer for the same key and position, or two image layers for the same position.
    #[error("layers {0} and {1} overlap")]
    Overlap(LayerId, LayerId),
    /// The layer answers for none of the shard's keys, or for no position.
    #[error("layer {0} answers for nothing")]
    Empty(LayerId),
}

/// The layers of the keys up to the next partition.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Partition {
    /// By `through`; never overlapping.
    pub deltas: BTreeMap<Lsn, (Lsn, LayerId)>,
    pub images: BTreeMap<Lsn, LayerId>,
}

impl Partition {
    /// The delta layer that answers for `lsn`, with its range.
    pub fn delta_at(&self, lsn: Lsn) -> Option<(LsnRange, LayerId)> {
        let (through, (after, id)) = self.deltas.range(lsn..).next()?;
        (*after < lsn).then_some((LsnRange { after: *after, through: *through }, *id))
    }

    /// The newest image layer at or below `lsn`.
    pub fn image_at(&self, lsn: Lsn) -> Option<(Lsn, LayerId)> {
        self.images.range(..=lsn).next_back().map(|(lsn, id)| (*lsn, *id))
    }
}

/// The live layers of a shard.
#[derive(Clone, Debug)]
pub struct LayerMap {
    keys: KeyRange,
    horizon: Lsn,
    layers: BTreeMap<LayerId, LayerDescription>,
    /// By first key; the first begins with the shard's first key.
    partitions: BTreeMap<Key, Partition>,
}

impl LayerMap {
    /// A map without layers for the keys of a shard; reads below `horizon` are refused.
    pub fn new(keys: KeyRange, horizon: Lsn) -> LayerMap {
        let partitions = BTreeMap::from([(keys.begin, Partition::default())]);
        LayerMap { keys, horizon, layers: BTreeMap::new(), partitions }
    }

    /// The shard's keys.
    pub fn keys(&self) -> KeyRange {
        self.keys
    }

    /// The oldest position that can be read.
    pub fn horizon(&self) -> Lsn {
        self.horizon
    }

    /// Gives up what is older: only then [`crate::collect`] finds layers to remove. It never goes back, and stays at or
    /// before the end of the layers, from where reads of later positions go on.
    pub fn raise_horizon(&mut self, horizon: Lsn) {
        self.horizon = self.horizon.max(horizon.min(self.through()));
    }

    /// The last position that a layer answers for.
    pub fn through(&self) -> Lsn {
        self.layers.values().map(|layer| layer.lsns.through).max().unwrap_or(self.horizon)
    }

    /// All layers: with [`LayerMap::horizon`] what a manifest holds.
    pub fn layers(&self) -> impl Iterator<Item = &LayerDescription> + '_ {
        self.layers.values()
    }

    /// One layer.
    pub fn layer(&self, id: LayerId) -> Option<&LayerDescription> {
        self.layers.get(&id)
    }

    /// Carries out an edit, whole or not at all.
    ///
    /// # Errors
    /// It does not fit.
    pub fn apply(&mut self, edit: &Edit) -> Result<(), MapError> {
        let mut changed = self.clone();
        edit.remove.iter().try_for_each(|id| changed.remove(*id))?;
        edit.add.iter().try_for_each(|layer| changed.add(layer))?;
        changed.join_partitions();
        *self = changed;
        Ok(())
    }

    fn add(&mut self, layer: &LayerDescription) -> Result<(), MapError> {
        let keys = layer.keys.intersection(&self.keys);
        let is_delta = layer.kind == LayerKind::Delta;
        if keys.is_empty() || is_delta && layer.lsns.after >= layer.lsns.through {
            return Err(MapError::Empty(layer.id));
        }
        if self.layers.insert(layer.id, *layer).is_some() {
            return Err(MapError::Duplicate(layer.id));
        }
        self.cut(keys.begin);
        self.cut(keys.end);
        for partition in self.partitions.range_mut(keys.begin..keys.end).map(|(_, partition)| partition) {
            let LsnRange { after, through } = layer.lsns;
            let other = if is_delta {
                let next = partition.deltas.range(Lsn(after.0 + 1)..).next();
                let other = next.filter(|(_, (other, _))| *other < through).map(|(_, (_, id))| *id);
                partition.deltas.insert(through, (after, layer.id));
                other
            } else {
                partition.images.insert(through, layer.id)
            };
            if let Some(other) = other {
                return Err(MapError::Overlap(other, layer.id));
            }
        }
        Ok(())
    }

    fn remove(&mut self, id: LayerId) -> Result<(), MapError> {
        let layer = self.layers.remove(&id).ok_or(MapError::Unknown(id))?;
        let keys = layer.keys.intersection(&self.keys);
        for partition in self.partitions.range_mut(keys.begin..keys.end).map(|(_, partition)| partition) {
            match layer.kind {
                LayerKind::Delta => drop(partition.deltas.remove(&layer.lsns.through)),
                LayerKind::Image => drop(partition.images.remove(&layer.lsns.through)),
            }
        }
        Ok(())
    }

    /// Makes `key` the first of a partition, if it is the shard's.
    fn cut(&mut self, key: Key) {
        if self.keys.contains(key) && !self.partitions.contains_key(&key) {
            let partition = self.partition_of(key).cloned().unwrap_or_default();
            self.partitions.insert(key, partition);
        }
    }

    /// Joins neighbours that have the same layers, so that bounds go with the layers that made them.
    fn join_partitions(&mut self) {
        let mut last: Option<Partition> = None;
        self.partitions.retain(|_, partition| {
            let differs = last.as_ref() != Some(partition);
            if differs {
                last = Some(partition.clone());
            }
            differs
        });
    }

    /// The partition of a key; `None` for another shard's.
    pub(crate) fn partition_of(&self, key: Key) -> Option<&Partition> {
        let partition = self.partitions.range(..=key).next_back().map(|(_, partition)| partition);
        partition.filter(|_| self.keys.contains(key))
    }

    /// All partitions with their keys, in order.
    pub(crate) fn partitions(&self) -> impl Iterator<Item = (KeyRange, &Partition)> + '_ {
        let ends = self.partitions.keys().skip(1).copied().chain([self.keys.end]);
        self.partitions.iter().zip(ends).map(|((begin, partition), end)| (KeyRange { begin: *begin, end }, partition))
    }

    /// The partitions that have keys of `keys`, in order.
    pub(crate) fn partitions_in(&self, keys: KeyRange) -> impl Iterator<Item = &Partition> + '_ {
        let first = self.partitions.range(..=keys.begin).next_back().map_or(keys.begin, |(key, _)| *key);
        let keys = if first < keys.end { first..keys.end } else { keys.end..keys.end };
        self.partitions.range(keys).map(|(_, partition)| partition)
    }
}
