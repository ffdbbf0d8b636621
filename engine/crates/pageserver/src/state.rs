//! What can be read: the open layer, frozen ones, and the map of layer files with their indexes, at one moment.
//!
//! A read takes all that it needs of it at once ([`State::chain`]); what happens to layers afterwards does not concern it.
//! Knows nothing about files: `layer_files.rs`. Read next: `read.rs`.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use layers::{
    Edit, Index, Indexes, Key, KeyKind, KeyRange, LayerDescription, LayerId, LayerKind, LayerMap, MapError, OpenLayer,
    OpenValue, PlanError, PutError, ReadPlan, ValueKind,
};
use pgtypes::{FrameSummary, Lsn};

/// A layer that takes no more values and is not a file yet.
#[derive(Debug)]
pub struct Frozen {
    /// Its values.
    pub layer: OpenLayer,
    /// What the log adds up to at its end.
    pub summary: FrameSummary,
}

/// Turns of the clock of [`IndexTable::trim`] for which an index stays that was used: whoever loads one after the other for one
/// read must find the first when the last is there.
const KEPT_TURNS: u64 = 20;

/// Bytes of an index in memory for each key, value and block; `layers::Index` has a row for each.
const KEY_BYTES: u64 = 28;
const VALUE_BYTES: u64 = 24;
const BLOCK_BYTES: u64 = 24;

#[derive(Debug)]
struct Kept {
    index: Arc<Index>,
    bytes: u64,
    /// Turn of the clock at which it was used last.
    used: AtomicU64,
}

/// Indexes of layer files.
#[derive(Default, Debug)]
pub struct IndexTable {
    kept: HashMap<LayerId, Kept>,
    bytes: u64,
    turn: u64,
}

impl Indexes for IndexTable {
    fn index(&self, layer: LayerId) -> Option<&Index> {
        let kept = self.kept.get(&layer)?;
        kept.used.store(self.turn, Relaxed);
        Some(&kept.index)
    }
}

impl IndexTable {
    /// The index of a layer, shared.
    pub fn get(&self, layer: LayerId) -> Option<Arc<Index>> {
        let kept = self.kept.get(&layer)?;
        kept.used.store(self.turn, Relaxed);
        Some(kept.index.clone())
    }

    /// Adds one.
    pub fn insert(&mut self, layer: LayerId, index: Arc<Index>) {
        self.remove(layer);
        let rows = [index.key_count(), index.value_count(), index.block_count()].map(u64::from);
        let bytes = rows[0] * KEY_BYTES + rows[1] * VALUE_BYTES + rows[2] * BLOCK_BYTES;
        self.bytes += bytes;
        self.kept.insert(layer, Kept { index, bytes, used: AtomicU64::new(self.turn) });
    }

    /// Forgets one.
    pub fn remove(&mut self, layer: LayerId) {
        if let Some(kept) = self.kept.remove(&layer) {
            self.bytes -= kept.bytes;
        }
    }

    /// Memory of all of them.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A turn of the clock: forgets indexes beyond `bytes_max`, those used longest ago first, but none that was used lately.
    /// They are loaded again when they are needed.
    pub fn trim(&mut self, bytes_max: u64) {
        self.turn += 1;
        if self.bytes <= bytes_max {
            return;
        }
        let idle = |kept: &Kept| kept.used.load(Relaxed) + KEPT_TURNS < self.turn;
        let mut victims: Vec<_> = self.kept.iter().filter(|(_, kept)| idle(kept)).collect();
        victims.sort_by_key(|(_, kept)| kept.used.load(Relaxed));
        let victims: Vec<_> = victims.into_iter().map(|(layer, _)| *layer).collect();
        for layer in victims {
            if self.bytes <= bytes_max {
                return;
            }
            self.remove(layer);
        }
    }
}

/// The values that a read needs, newest first: those in memory, then those that the plan finds in files.
#[derive(Debug)]
pub struct Chain {
    /// From the open layer and frozen ones.
    pub memory: Vec<OpenValue>,
    /// The rest; empty when those in memory start the page.
    pub plan: ReadPlan,
    /// Layers that were asked, those in memory included.
    pub layers_visited: u32,
}

/// What can be read.
#[derive(Debug)]
pub struct State {
    open: OpenLayer,
    /// Oldest first; they and the open one follow each other without a gap.
    frozen: VecDeque<Arc<Frozen>>,
    /// Layer files: those of the manifest, and those that are not uploaded yet.
    map: LayerMap,
    indexes: IndexTable,
}

impl State {
    /// The layers of a manifest, and an empty open layer behind `through`.
    pub fn new(map: LayerMap, through: Lsn) -> State {
        let open = OpenLayer::new(map.keys(), through);
        State { open, frozen: VecDeque::new(), map, indexes: IndexTable::default() }
    }

    /// Layer files.
    pub fn map(&self) -> &LayerMap {
        &self.map
    }

    /// Indexes of layer files.
    pub fn indexes(&self) -> &IndexTable {
        &self.indexes
    }

    /// Forgets indexes beyond `bytes_max`; see [`IndexTable::trim`].
    pub fn trim_indexes(&mut self, bytes_max: u64) {
        self.indexes.trim(bytes_max);
    }

    /// Adds the index of a layer of the map.
    pub fn add_index(&mut self, layer: LayerId, index: Arc<Index>) {
        if self.map.layer(layer).is_some() {
            self.indexes.insert(layer, index);
        }
    }

    /// The open layer.
    pub fn open(&self) -> &OpenLayer {
        &self.open
    }

    /// Layers that wait to become files, oldest first.
    pub fn frozen(&self) -> &VecDeque<Arc<Frozen>> {
        &self.frozen
    }

    /// Adds a value to the open layer.
    ///
    /// # Errors
    /// As [`OpenLayer::put`].
    pub fn put(&mut self, key: Key, lsn: Lsn, kind: ValueKind, value: Vec<u8>) -> Result<(), PutError> {
        self.open.put(key, lsn, kind, value)
    }

    /// Says that all is said up to `lsn`.
    pub fn advance(&mut self, lsn: Lsn) {
        self.open.advance(lsn);
    }

    /// Memory of values.
    pub fn memory_bytes(&self) -> u64 {
        self.open.bytes() + self.frozen.iter().map(|frozen| frozen.layer.bytes()).sum::<u64>()
    }

    /// Freezes the open layer, which ends at `summary`; `false` when it answers for no position yet.
    pub fn freeze(&mut self, summary: FrameSummary) -> bool {
        let lsns = self.open.lsns();
        debug_assert!(lsns.through == summary.record_end, "layers end between batches");
        if lsns.after == lsns.through {
            return false;
        }
        let next = OpenLayer::new(self.map.keys(), lsns.through);
        let layer = std::mem::replace(&mut self.open, next);
        self.frozen.push_back(Arc::new(Frozen { layer, summary }));
        true
    }

    /// The oldest frozen layer is a file now.
    ///
    /// # Errors
    /// It does not follow the map: a fault of this program.
    pub fn frozen_is_written(&mut self, layer: LayerDescription, index: Arc<Index>) -> Result<(), MapError> {
        self.map.apply(&Edit { remove: Vec::new(), add: vec![layer] })?;
        self.indexes.insert(layer.id, index);
        self.frozen.pop_front();
        Ok(())
    }

    /// Replaces layers by others, whose indexes come along.
    ///
    /// # Errors
    /// The edit does not fit; nothing was changed.
    pub fn apply(&mut self, edit: &Edit, indexes: &[(LayerId, Arc<Index>)]) -> Result<(), MapError> {
        self.map.apply(edit)?;
        for layer in &edit.remove {
            self.indexes.remove(*layer);
        }
        for (layer, index) in indexes {
            self.indexes.insert(*layer, index.clone());
        }
        Ok(())
    }

    /// Gives up what is older.
    pub fn raise_horizon(&mut self, horizon: Lsn) {
        self.map.raise_horizon(horizon);
    }

    /// What a read of `key` as of `lsn` needs. Values at or before `floor` are not of this relation.
    ///
    /// # Errors
    /// As [`LayerMap::plan_read`].
    pub fn chain(&self, key: Key, lsn: Lsn, floor: Lsn) -> Result<Chain, PlanError> {
        let horizon = self.map.horizon();
        if lsn < horizon {
            return Err(PlanError::BelowHorizon { lsn, horizon });
        }
        if !self.map.keys().contains(key) {
            return Err(PlanError::OtherShard);
        }
        let plan = ReadPlan { reads: Vec::new(), starts_page: false, layers_visited: 0 };
        let mut chain = Chain { memory: Vec::new(), plan, layers_visited: 0 };
        let mut cursor = lsn;
        let frozen = self.frozen.iter().rev().map(|frozen| &frozen.layer);
        for layer in std::iter::once(&self.open).chain(frozen) {
            let after = layer.lsns().after;
            if cursor <= after {
                continue;
            }
            chain.layers_visited += 1;
            let (values, started) = layer.read(key, cursor);
            let newer = values.into_iter().take_while(|value| value.lsn > floor).cloned();
            chain.memory.extend(newer);
            if started || after <= floor {
                chain.plan.starts_page = started;
                return Ok(chain);
            }
            cursor = after;
        }
        chain.plan = self.map.plan_read(key, cursor, floor, &self.indexes)?;
        chain.layers_visited += chain.plan.layers_visited;
        Ok(chain)
    }

    /// Whether a read at `lsn` may need the layer: no newer images answer for all of its keys.
    pub fn is_needed(&self, layer: LayerId, lsn: Lsn) -> bool {
        let images = self.images_at(lsn);
        let keys = |layer: &LayerDescription| layer.keys.intersection(&self.map.keys());
        self.map.layer(layer).is_some_and(|layer| !is_hidden(layer, keys(layer), &images))
    }

    /// Image layers up to `lsn`, in the order of keys.
    fn images_at(&self, lsn: Lsn) -> Vec<&LayerDescription> {
        let is_image = |layer: &&LayerDescription| layer.kind == LayerKind::Image && layer.lsns.through <= lsn;
        let mut images: Vec<_> = self.map.layers().filter(is_image).collect();
        images.sort_by_key(|image| image.keys.begin);
        images
    }

    /// Keys of `keys` that may have a value at `lsn`: every one that a layer names which a newer image does not hide.
    /// Layers that `skip` names are left out.
    ///
    /// # Errors
    /// The index of a layer is not in memory.
    pub fn keys_at(
        &self,
        keys: KeyRange,
        lsn: Lsn,
        wanted: Wanted,
        skip: impl Fn(LayerId) -> bool,
    ) -> Result<Vec<Key>, PlanError> {
        let keys = keys.intersection(&self.map.keys());
        let mut found = BTreeSet::new();
        for layer in std::iter::once(&self.open).chain(self.frozen.iter().map(|frozen| &frozen.layer)) {
            if layer.lsns().after < lsn {
                let here = layer.values().map(|(key, _)| key);
                found.extend(here.filter(|key| keys.contains(*key) && wanted.has(*key)));
            }
        }
        let images = self.images_at(lsn);
        for layer in self.map.layers() {
            let mine = layer.keys.intersection(&keys);
            let is_later = match layer.kind {
                LayerKind::Delta => layer.lsns.after >= lsn,
                LayerKind::Image => layer.lsns.through > lsn,
            };
            if mine.is_empty() || is_later || is_hidden(layer, mine, &images) || skip(layer.id) {
                continue;
            }
            let index = self.indexes.index(layer.id).ok_or(PlanError::IndexNeeded(layer.id))?;
            wanted.collect(index, mine, &mut found);
        }
        Ok(found.into_iter().collect())
    }
}

/// Whether newer images, which are in the order of their keys, answer for all of `keys`.
fn is_hidden(layer: &LayerDescription, keys: KeyRange, images: &[&LayerDescription]) -> bool {
    let is_newer = |image: &&&LayerDescription| match layer.kind {
        LayerKind::Delta => image.lsns.through >= layer.lsns.through,
        LayerKind::Image => image.lsns.through > layer.lsns.through,
    };
    let mut covered = keys.begin;
    for image in images.iter().filter(is_newer).take_while(|image| image.keys.begin < keys.end) {
        if image.keys.begin > covered {
            return false;
        }
        covered = covered.max(image.keys.end);
    }
    covered >= keys.end
}

/// Which keys an enumeration is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Lengths of stripes.
    StripeSizes,
    /// Metadata and pages of SLRUs.
    Metadata,
}

impl Wanted {
    fn has(self, key: Key) -> bool {
        match key.kind() {
            Ok(KeyKind::StripeSize { .. }) => self == Wanted::StripeSizes,
            Ok(KeyKind::Metadata(_) | KeyKind::Slru(..)) => self == Wanted::Metadata,
            Ok(KeyKind::Block { .. }) | Err(_) => false,
        }
    }

    /// Adds the keys that an index has. Blocks, of which there are many, are jumped over: within a hash they come last.
    fn collect(self, index: &Index, keys: KeyRange, found: &mut BTreeSet<Key>) {
        let mut begin = keys.begin;
        loop {
            let mut jump = None;
            for (key, _) in index.keys_from(begin).take_while(|(key, _)| *key < keys.end) {
                if self.has(key) {
                    found.insert(key);
                } else if matches!(key.kind(), Ok(KeyKind::Block { .. })) {
                    jump = key.hash().checked_add(1).map(Key::first_of_hash);
                    break;
                }
            }
            match jump {
                Some(next) if next < keys.end => begin = next,
                _ => return,
            }
        }
    }
}
