//! Decides what to compact. The work itself is the shell's: [`crate::Merge`], [`crate::SplitWriter`], redo.
//!
//! *Level 0*: frozen layers with all keys of the shard. They are merged and cut at the bounds of the image layers, the
//! *tiles*, so that the compacted layers of a tile (its *bands*) have the same keys. When a tile has too many bands,
//! they are merged into one while they are small beside its image; otherwise a new image is made. Either way, a value
//! is written again for at most about as many bytes as came in. What is hidden then goes with [`crate::collect`].

use alloc::{collections::BTreeSet, vec::Vec};

use pgtypes::Lsn;

use crate::{
    identity::{LayerDescription, LayerId, LayerKind, LsnRange},
    key::{Key, KeyRange},
    map::LayerMap,
    plan::{Indexes, PlanError},
};

/// When to compact.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Layers of level 0 that are not merged yet, at least 1: a read visits them all.
    pub level0_max: u32,
    /// Compacted delta layers above a tile's image, at least 1: a read visits them all.
    pub bands_max: u32,
    /// Values of a key that a read needs from compacted layers; where a merge finds more it puts an image.
    pub chain_max: u32,
    /// Layers that one merge reads.
    pub merge_layers_max: u32,
}

impl Limits {
    /// A read visits at most 4 + 4 + 1 layers.
    pub const DEFAULT: Limits = Limits { level0_max: 4, bands_max: 4, chain_max: 16, merge_layers_max: 16 };
}

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Nothing.
    Nothing,
    /// Write the values of these delta layers as a row of new ones, which replace them.
    Merge(MergeTask),
    /// Write the pages of `keys` as of `lsn` as a row of image layers. They replace nothing.
    Images {
        /// A tile.
        keys: KeyRange,
        /// The end of its newest band.
        lsn: Lsn,
    },
}

/// Delta layers to merge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergeTask {
    /// Oldest first; together they answer for exactly `keys` and `lsns`.
    pub layers: Vec<LayerId>,
    /// What the new layers answer for.
    pub keys: KeyRange,
    /// What the new layers answer for.
    pub lsns: LsnRange,
    /// Where the new layers begin, beside the beginning of `keys`.
    pub cuts: BTreeSet<Key>,
    /// [`Limits::chain_max`].
    pub chain_max: u32,
}

/// Decides what to compact next. Without effect until the map is edited: ask again after each edit.
///
/// A tile with too many bands comes before level 0: then even after a backlog, and at old positions, no more than
/// [`Limits::bands_max`] + 1 bands lie between two images.
pub fn choose(map: &LayerMap, limits: &Limits) -> Choice {
    let tile = tiles(map).find_map(|tile| tile.task(map, limits));
    tile.or_else(|| level0_task(map, limits).map(Choice::Merge)).unwrap_or(Choice::Nothing)
}

fn level0_task(map: &LayerMap, limits: &Limits) -> Option<MergeTask> {
    let is_level0 = |layer: &&LayerDescription| layer.kind == LayerKind::Delta && layer.level == 0;
    let mut layers: Vec<&LayerDescription> = map.layers().filter(is_level0).collect();
    if layers.len() <= limits.level0_max as usize {
        return None;
    }
    layers.sort_by_key(|layer| layer.lsns);
    // Layers of a former shard have other keys, or leave a gap: they are merged for themselves.
    let keys = layers[0].keys;
    let run = layers.windows(2).take_while(|pair| pair[1].keys == keys && pair[0].lsns.through == pair[1].lsns.after);
    let count = (1 + run.count()).min(limits.merge_layers_max.max(2) as usize);
    let lsns = LsnRange { after: layers[0].lsns.after, through: layers[count - 1].lsns.through };
    let layers = layers[..count].iter().map(|layer| layer.id).collect();
    let keys = keys.intersection(&map.keys());
    let cuts = tiles(map).map(|tile| tile.keys.begin).filter(|cut| keys.contains(*cut) && *cut > keys.begin).collect();
    Some(MergeTask { layers, keys, lsns, cuts, chain_max: limits.chain_max })
}

/// Neighbouring partitions with the same newest image.
struct Tile<'a> {
    keys: KeyRange,
    image: &'a LayerDescription,
    /// Compacted delta layers above the image, of any partition.
    bands: BTreeSet<(Lsn, LayerId)>,
    /// The position that all partitions have bands up to.
    through: Lsn,
    /// The most bands of one partition.
    height: usize,
}

fn tiles(map: &LayerMap) -> impl Iterator<Item = Tile<'_>> + '_ {
    let mut partitions = map.partitions().peekable();
    core::iter::from_fn(move || {
        let mut tile: Option<Tile<'_>> = None;
        loop {
            let newest = |partition: &crate::map::Partition| partition.images.last_key_value().map(|(_, id)| *id);
            let (keys, partition) = partitions.peek()?;
            let id = newest(partition);
            if tile.as_ref().is_some_and(|tile| Some(tile.image.id) != id) {
                return tile;
            }
            if let Some(image) = id.and_then(|id| map.layer(id)) {
                let above = partition
                    .deltas
                    .range((core::ops::Bound::Excluded(image.lsns.through), core::ops::Bound::Unbounded));
                let above: Vec<_> = above
                    .map(|(through, (_, id))| (*through, *id))
                    .filter(|(_, id)| map.layer(*id).is_some_and(|layer| layer.level > 0))
                    .collect();
                let through = above.last().map_or(image.lsns.through, |(through, _)| *through);
                let tile = tile.get_or_insert(Tile { keys: *keys, image, bands: BTreeSet::new(), through, height: 0 });
                tile.keys.end = keys.end;
                tile.through = tile.through.min(through);
                tile.height = tile.height.max(above.len());
                tile.bands.extend(above);
            }
            partitions.next();
            if partitions.peek().is_none() {
                return tile;
            }
        }
    })
}

impl Tile<'_> {
    fn task(&self, map: &LayerMap, limits: &Limits) -> Option<Choice> {
        if self.height <= limits.bands_max as usize || self.through <= self.image.lsns.through {
            return None;
        }
        let bands: Vec<_> = self.bands.iter().filter_map(|(_, id)| map.layer(*id)).collect();
        let aligned = bands.iter().all(|band| band.keys.intersection(&map.keys()) == self.keys);
        let connected = bands.windows(2).all(|pair| pair[0].lsns.through == pair[1].lsns.after);
        let band_bytes: u64 = bands.iter().map(|band| band.file_bytes).sum();
        let few = bands.len() <= limits.merge_layers_max as usize;
        if aligned && connected && few && band_bytes < self.image.file_bytes {
            return Some(Choice::Merge(MergeTask {
                layers: bands.iter().map(|band| band.id).collect(),
                keys: self.keys,
                lsns: LsnRange { after: bands[0].lsns.after, through: bands[bands.len() - 1].lsns.through },
                cuts: BTreeSet::new(),
                chain_max: limits.chain_max,
            }));
        }
        Some(Choice::Images { keys: self.keys, lsn: self.through })
    }
}

impl MergeTask {
    /// The positions at which the merged layers hold an image of `key` instead of a record, oldest first: where else a
    /// read would need more than [`Limits::chain_max`] values. Read the page there ([`LayerMap::plan_read`]).
    ///
    /// # Errors
    /// As of planning; the horizon does not matter.
    pub fn images_due(&self, map: &LayerMap, key: Key, indexes: &impl Indexes) -> Result<Vec<Lsn>, PlanError> {
        let below = map.plan_kept(key, self.lsns.after, Lsn::INVALID, indexes)?;
        let mut chain = below.value_count() as u32;
        let mut due = Vec::new();
        for layer in &self.layers {
            let index = indexes.index(*layer).ok_or(PlanError::IndexNeeded(*layer))?;
            for value in index.values_of(key) {
                chain = if value.kind.starts_page() { 1 } else { chain + 1 };
                if chain > self.chain_max.max(1) {
                    due.push(value.lsn);
                    chain = 1;
                }
            }
        }
        Ok(due)
    }
}

/// At most `count_max` keys of `keys` that may have a value at `lsn`, in order: the pages of an image layer. Those
/// that turn out to be absent are left out of it. Ask again with `keys.begin` behind the last one.
///
/// # Errors
/// An index is not in memory.
pub fn image_keys(
    map: &LayerMap,
    keys: KeyRange,
    lsn: Lsn,
    count_max: usize,
    indexes: &impl Indexes,
) -> Result<Vec<Key>, PlanError> {
    let mut layers = BTreeSet::new();
    for partition in map.partitions_in(keys) {
        let image = partition.image_at(lsn);
        layers.extend(image.map(|(_, id)| id));
        let after = image.map_or(Lsn::INVALID, |(lsn, _)| lsn);
        let above = partition.deltas.range((core::ops::Bound::Excluded(after), core::ops::Bound::Unbounded));
        layers.extend(above.filter(|(_, (after, _))| *after < lsn).map(|(_, (_, id))| *id));
    }
    let mut found = BTreeSet::new();
    for layer in layers {
        let index = indexes.index(layer).ok_or(PlanError::IndexNeeded(layer))?;
        let mine = map.layer(layer).map_or(keys, |layer| layer.keys.intersection(&keys));
        let here = index.keys_from(mine.begin).take_while(|(key, _)| *key < mine.end);
        found.extend(here.filter(|(_, values)| values[0].lsn <= lsn).map(|(key, _)| key).take(count_max));
        while found.len() > count_max {
            found.pop_last();
        }
    }
    Ok(found.into_iter().collect())
}
