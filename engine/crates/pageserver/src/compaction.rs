//! Compaction, images and garbage: what `layers` decides, carried out beside the core.
//!
//! One task does one thing at a time: read layers, write new ones, upload them, name them in the manifest, then forget the
//! old ones. Layers that are not uploaded yet take no part.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::FileExt,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use layers::{
    Choice, Edit, Entry, FinishedLayer, Index, Indexes, Key, KeyKind, KeyRange, LayerDescription, LayerError, LayerId,
    LayerIdentity, LayerMap, Limits, Merge, MergeTask, PlanError, ReadPlan, Retain, Split, SplitWriter, Striping,
    ValueKind, choose, collect, image_keys,
};
use pgtypes::Lsn;
use remote_storage::{ShardStore, block_on};
use shard::{Rebuilt, StripeSize, poison, rebuild, stripe_size_key_of};

use crate::{
    data_dir::layer_path,
    fault_point,
    flush::{LayerFileWriter, WriteError, ownership_lost},
    layer_files::LayerFault,
    metrics::ReasonLabels,
    owner::{NUMBERS_RESERVED, Owner},
    state::IndexTable,
};

/// How often the map is looked at when nothing has changed: garbage becomes due by the passing of time, too.
const INTERVAL: Duration = Duration::from_secs(5);

/// Pause after a compaction that failed: a lost layer stays lost, and object storage that is away comes back.
const PAUSE: Duration = Duration::from_secs(30);

/// The horizon is raised in steps of this part of the history that is kept: each step writes a manifest.
const HORIZON_STEPS: u64 = 16;

/// Keys of an image layer that are looked up at a time.
const KEYS_AT_A_TIME: usize = 1024;

/// A compaction was given up; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CompactionError {
    /// A layer cannot be read.
    #[error(transparent)]
    Layer(#[from] LayerFault),
    /// The new layer cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The map cannot answer.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A row of more layers than numbers were taken for.
    #[error("more than {NUMBERS_RESERVED} layers in one row")]
    TooManyLayers,
}

impl From<layers::PutError> for CompactionError {
    fn from(error: layers::PutError) -> CompactionError {
        CompactionError::Write(error.into())
    }
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tended {
    /// There was nothing to do.
    Nothing,
    /// Layers were merged, imaged or removed.
    Something,
    /// The process is ending.
    Stopping,
}

/// Compacts and collects until the process ends.
pub async fn tend(owner: Rc<Owner>) {
    const TROUBLE: &str = "compaction was given up for now";
    while !owner.is_stopping() {
        let seen = owner.manifest().sequence;
        match owner.tend_once(&Limits::DEFAULT).await {
            Ok(Tended::Stopping) => return,
            Ok(Tended::Something) => owner.solved(TROUBLE),
            Ok(Tended::Nothing) => {
                owner.solved(TROUBLE);
                let change =
                    owner.moved.until(|| (owner.is_stopping() || owner.manifest().sequence != seen).then_some(()));
                // Either way the map is looked at again.
                let _ = driver::timeout(INTERVAL, change).await;
            }
            Err(error) => {
                owner.report(TROUBLE, &error);
                owner.pause(PAUSE).await;
            }
        }
    }
}

impl Owner {
    /// Does the next thing that is due, if any.
    ///
    /// # Errors
    /// [`CompactionError`].
    pub async fn tend_once(self: &Rc<Self>, limits: &Limits) -> Result<Tended, CompactionError> {
        let _turn = self.begin_tending().await;
        let map = self.durable_map();
        let (kind, keys, inputs) = match choose(&map, limits) {
            Choice::Nothing => return Ok(self.collect_garbage().await),
            Choice::Merge(task) => {
                let is_level0 = task.layers.first().and_then(|id| map.layer(*id)).is_some_and(|layer| layer.level == 0);
                let kind = if is_level0 { "level 0" } else { "bands" };
                (kind, task.keys, Work::Merge(task))
            }
            Choice::Images { keys, lsn } => ("images", keys, Work::Images { keys, lsn }),
        };
        let removed = match &inputs {
            Work::Merge(task) => task.layers.clone(),
            Work::Images { .. } => Vec::new(),
        };
        let mut pins = Vec::new();
        for layer in &removed {
            pins.push(self.files.pin(*layer).await?);
        }
        // Everything that lies under the keys may be asked, and under the lengths of their stripes, which come first in a hash.
        let asked = KeyRange { begin: Key::first_of_hash(keys.begin.hash()), end: keys.end };
        let below: Vec<_> =
            map.layers().filter(|layer| !layer.keys.intersection(&asked).is_empty()).map(|layer| layer.id).collect();
        // Kept from here on: loading all of them may take longer than an index stays that does not fit into its memory.
        let mut indexes = IndexTable::default();
        for layer in &below {
            if self.state.borrow().indexes().index(*layer).is_none() {
                match self.need_index(*layer).await {
                    // Reads that need it say so; most need nothing so old.
                    Ok(()) | Err(LayerFault::Lost { .. }) => {}
                    Err(fault) => return Err(fault.into()),
                }
            }
            if let Some(index) = self.state.borrow().indexes().get(*layer) {
                indexes.insert(*layer, index);
            }
        }
        let first = self.identity(self.take_numbers(NUMBERS_RESERVED));
        let job = Job {
            source: Source {
                directory: self.files.directory().to_owned(),
                store: (**self.store).clone(),
                indexes,
                map,
                striping: self.striping,
                files: RefCell::default(),
                blocks: RefCell::default(),
                stripe: RefCell::default(),
            },
            first,
            layer_bytes_target: self.process.config.ingest.layer_bytes_target,
        };
        let begun = driver::now();
        let made = driver::unblock(move || job.run(inputs)).await;
        drop(pins);
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                if let CompactionError::Layer(LayerFault::Lost { layer, cause }) = &error {
                    self.files.report_damage(*layer, cause);
                }
                if let CompactionError::Write(error) = &error
                    && error.is_disk_full()
                {
                    self.files.evict(self.process.config.ingest.layer_bytes_target);
                }
                self.remove_leftovers(first.id);
                return Err(error);
            }
        };
        tracing::info!(
            kind,
            layers = removed.len(),
            made = made.len(),
            seconds = driver::now().since(begun).as_secs_f64(),
            "compacted"
        );
        fault_point::pass("compacted layers written");
        let done = self.replace(removed, made).await;
        if done {
            self.process.metrics.compactions.get_or_create(&ReasonLabels { reason: kind }).inc();
        }
        Ok(if done { Tended::Something } else { Tended::Stopping })
    }

    /// Removes the files that a compaction finished before it was given up: their numbers follow each other.
    fn remove_leftovers(&self, first: LayerId) {
        for number in first.number.. {
            let path = layer_path(self.files.directory(), LayerId { number, ..first });
            // Missing: there are no more. Anything else: the next start removes it.
            if fs::remove_file(path).is_err() {
                return;
            }
        }
    }

    /// Puts new layers, whose files lie here, into the place of others.
    async fn replace(&self, removed: Vec<LayerId>, made: Vec<(LayerDescription, Arc<Index>)>) -> bool {
        for (layer, _) in &made {
            self.files.add_written(layer);
        }
        for (layer, _) in &made {
            if !self.upload_layer(layer.id, layer.file_bytes).await {
                return false;
            }
            self.files.set_uploaded(layer.id);
            fault_point::pass("compacted layer uploaded");
        }
        let edit = Edit { remove: removed, add: made.iter().map(|(layer, _)| *layer).collect() };
        let indexes: Vec<_> = made.into_iter().map(|(layer, index)| (layer.id, index)).collect();
        self.commit_edit(edit, indexes).await
    }

    /// Makes an edit durable, carries it out, and removes what it leaves over.
    async fn commit_edit(&self, edit: Edit, indexes: Vec<(LayerId, Arc<Index>)>) -> bool {
        let gone: BTreeSet<LayerId> = edit.remove.iter().copied().collect();
        let horizon = self.horizon();
        let committed = self
            .commit(|manifest| {
                manifest.layers.retain(|layer| !gone.contains(&layer.id));
                manifest.layers.extend(&edit.add);
                // The map's, so that it cannot pass the end of what is durable.
                manifest.horizon = manifest.horizon.max(horizon.min(manifest.through.record_end));
            })
            .await;
        if !committed {
            return false;
        }
        fault_point::pass("compaction in the manifest");
        if let Err(error) = self.state.borrow_mut().apply(&edit, &indexes) {
            self.fail(crate::start::StartError::Internal(format!("compacted layers do not fit: {error}")));
            return false;
        }
        for layer in &edit.remove {
            self.files.remove(*layer);
        }
        self.files.make_room(0);
        self.remove_objects(&edit.remove).await;
        fault_point::pass("objects removed");
        self.process.metrics.collected.inc_by(edit.remove.len() as u64);
        self.moved.set();
        true
    }

    /// Removes objects that the durable manifest does not name. What fails stays: an orphan that a later owner may remove.
    async fn remove_objects(&self, layers: &[LayerId]) {
        const TROUBLE: &str = "objects of removed layers stay for now";
        if layers.is_empty() {
            return;
        }
        match self.store.delete_layers(layers).await {
            Ok(()) => self.solved(TROUBLE),
            Err(error) => match ownership_lost(&error) {
                Some(failure) => self.fail(failure),
                None => self.report(TROUBLE, &error),
            },
        }
    }

    /// Gives up history that nobody needs, and the layers that only it needed.
    async fn collect_garbage(&self) -> Tended {
        let history = self.process.config.retention.history_bytes;
        let retained = Lsn(self.durable().0.saturating_sub(history));
        let Some(horizon) = self.leases.borrow().horizon(retained, driver::now()) else { return Tended::Nothing };
        let before = self.manifest().horizon;
        let is_due = horizon.bytes_since(before) > history / HORIZON_STEPS;
        let mut map = self.durable_map();
        if is_due {
            // Leases are granted against the map's horizon from here on.
            self.state.borrow_mut().raise_horizon(horizon);
        }
        map.raise_horizon(self.horizon().max(before));
        let edit = collect(&map);
        if edit.remove.is_empty() && !is_due {
            return Tended::Nothing;
        }
        if !edit.remove.is_empty() {
            tracing::info!(layers = edit.remove.len(), horizon = %map.horizon(), "removing layers");
        }
        match self.commit_edit(edit, Vec::new()).await {
            true => Tended::Something,
            false => Tended::Stopping,
        }
    }
}

enum Work {
    Merge(MergeTask),
    Images { keys: KeyRange, lsn: Lsn },
}

/// A compaction on a thread beside the core.
struct Job {
    source: Source,
    first: LayerIdentity,
    layer_bytes_target: u64,
}

type Made = Vec<(LayerDescription, Arc<Index>)>;

impl Job {
    fn run(self, work: Work) -> Result<Made, CompactionError> {
        let mut files = LayerFileWriter::new(&self.source.directory);
        match work {
            Work::Merge(task) => self.merge(&task, &mut files),
            Work::Images { keys, lsn } => self.images(keys, lsn, &mut files),
        }
    }

    fn merge(&self, task: &MergeTask, files: &mut LayerFileWriter) -> Result<Made, CompactionError> {
        let split = Split { keys: task.keys, cuts: task.cuts.clone(), layer_bytes_target: self.layer_bytes_target };
        let mut writer = SplitWriter::deltas(self.first, split, task.lsns);
        let mut made = Vec::new();
        let mut due: Option<(Key, Vec<Lsn>)> = None;
        let merged = Merge::new(task.layers.iter().map(|layer| self.source.entries(*layer, task.keys)));
        let with_images = merged.map(|entry| {
            let mut entry = entry?;
            if due.as_ref().is_none_or(|(key, _)| *key != entry.key) {
                due = Some((entry.key, task.images_due(&self.source.map, entry.key, &self.source.indexes)?));
            }
            let is_due = due.as_ref().is_some_and(|(_, lsns)| lsns.contains(&entry.lsn));
            // A page that cannot be made stays what it is: a chain that is too long, and an error for who reads it.
            if is_due && let Some(image) = self.source.image(entry.key, entry.lsn)?.sound() {
                (entry.kind, entry.value) = (ValueKind::Image, image);
            }
            Ok::<Entry, CompactionError>(entry)
        });
        for entry in Retain::new(with_images, self.source.map.horizon()) {
            let entry = entry?;
            writer.push(entry.key, entry.lsn, entry.kind, &entry.value)?;
            while let Some(output) = writer.poll_output() {
                self.keep(files.take(output)?, &mut made)?;
            }
        }
        for output in writer.finish()? {
            self.keep(files.take(output)?, &mut made)?;
        }
        Ok(made)
    }

    fn images(&self, keys: KeyRange, lsn: Lsn, files: &mut LayerFileWriter) -> Result<Made, CompactionError> {
        let split = Split { keys, cuts: BTreeSet::new(), layer_bytes_target: self.layer_bytes_target };
        let mut writer = SplitWriter::images(self.first, split, lsn);
        let mut made = Vec::new();
        let mut rest = keys;
        loop {
            let some = image_keys(&self.source.map, rest, lsn, KEYS_AT_A_TIME, &self.source.indexes)?;
            let Some(last) = some.last() else { break };
            rest.begin = last.next();
            for key in some {
                let Some(value) = self.source.image(key, lsn)?.value() else { continue };
                writer.push(key, lsn, ValueKind::Image, &value)?;
                while let Some(output) = writer.poll_output() {
                    self.keep(files.take(output)?, &mut made)?;
                }
            }
        }
        for output in writer.finish()? {
            self.keep(files.take(output)?, &mut made)?;
        }
        Ok(made)
    }

    fn keep(&self, finished: Option<FinishedLayer>, made: &mut Made) -> Result<(), CompactionError> {
        if let Some(layer) = finished {
            if layer.file.description.id.number >= self.first.id.number + NUMBERS_RESERVED {
                return Err(CompactionError::TooManyLayers);
            }
            made.push((layer.file.description, Arc::new(layer.index)));
        }
        Ok(())
    }
}

/// A value as a compaction makes it.
enum Image {
    Sound(Vec<u8>),
    /// It cannot be made.
    Poisoned(String),
    Absent,
}

impl Image {
    /// The value, unless there is none or it cannot be made.
    fn sound(self) -> Option<Vec<u8>> {
        match self {
            Image::Sound(value) => Some(value),
            Image::Poisoned(_) | Image::Absent => None,
        }
    }

    /// What an image layer holds: of a page that cannot be made something that is no page, so that it does not pass for one
    /// that was never written.
    fn value(self) -> Option<Vec<u8>> {
        match self {
            Image::Sound(value) => Some(value),
            Image::Poisoned(cause) => Some(poison(&cause)),
            Image::Absent => None,
        }
    }
}

/// Number of a block, and what is in it.
type NumberedBlock = (u32, Arc<Vec<u8>>);

/// Reads layers from a thread beside the core: local files, or object storage where there is none.
struct Source {
    directory: PathBuf,
    store: ShardStore,
    map: LayerMap,
    indexes: IndexTable,
    striping: Striping,
    files: RefCell<HashMap<LayerId, Option<Arc<fs::File>>>>,
    /// The last block of each layer: the next read of a layer is mostly of the same one.
    blocks: RefCell<BTreeMap<LayerId, NumberedBlock>>,
    /// The stripe that was asked last, and when: its blocks follow each other.
    stripe: RefCell<Option<(Key, Lsn, Option<StripeSize>)>>,
}

impl Source {
    fn block(&self, layer: LayerId, index: &Index, number: u32) -> Result<Arc<Vec<u8>>, CompactionError> {
        if let Some((last, block)) = self.blocks.borrow().get(&layer)
            && *last == number
        {
            return Ok(block.clone());
        }
        let lost = |cause: String| LayerFault::Lost { layer, cause };
        let place = index.block_place(number).ok_or_else(|| lost("no such block".to_owned()))?;
        let local = self.file(layer).and_then(|file| {
            let mut bytes = vec![0; place.bytes as usize];
            file.read_exact_at(&mut bytes, place.offset).ok()?;
            index.decode_block(number, &bytes).ok()
        });
        let block = match local {
            Some(block) => block,
            None => {
                let range = place.offset..place.offset + u64::from(place.bytes);
                let bytes =
                    block_on(self.store.get_layer_range(layer, range)).map_err(|error| match error.is_not_found() {
                        true => lost("object storage has no such object".to_owned()),
                        false => LayerFault::Unavailable { layer, cause: error.to_string() },
                    })?;
                let damaged = |error: LayerError| lost(format!("its object is damaged: {error}"));
                index.decode_block(number, &bytes).map_err(damaged)?
            }
        };
        let block = Arc::new(block);
        self.blocks.borrow_mut().insert(layer, (number, block.clone()));
        Ok(block)
    }

    fn file(&self, layer: LayerId) -> Option<Arc<fs::File>> {
        let open = || fs::File::open(layer_path(&self.directory, layer)).ok().map(Arc::new);
        self.files.borrow_mut().entry(layer).or_insert_with(open).clone()
    }

    /// The entries of a layer within `keys`, in order; a block is in memory at a time.
    fn entries(&self, layer: LayerId, keys: KeyRange) -> impl Iterator<Item = Result<Entry, CompactionError>> + '_ {
        let index = self.indexes.get(layer);
        let blocks = index.as_ref().map_or(0, |index| index.block_count());
        let missing = index.is_none().then_some(Err(PlanError::IndexNeeded(layer).into()));
        let all = (0..blocks).flat_map(move |number| {
            let Some(index) = &index else { return Vec::new() };
            match self.block(layer, index, number) {
                Ok(block) => index
                    .entries_of_block(number)
                    .filter(|(key, _)| keys.contains(*key))
                    .map(|(key, entry)| {
                        let value = index.value(entry, &block).unwrap_or_default().to_vec();
                        Ok(Entry { key, lsn: entry.lsn, kind: entry.kind, value })
                    })
                    .collect(),
                Err(error) => vec![Err(error)],
            }
        });
        missing.into_iter().chain(all)
    }

    /// What `key` comes to at `lsn`, horizon or not.
    fn rebuilt(&self, key: Key, lsn: Lsn, floor: Lsn) -> Result<Result<Rebuilt, String>, CompactionError> {
        let plan: ReadPlan = self.map.plan_kept(key, lsn, floor, &self.indexes)?;
        let mut blocks = Vec::with_capacity(plan.reads.len());
        for read in &plan.reads {
            let index = self.indexes.get(read.layer).ok_or(PlanError::IndexNeeded(read.layer))?;
            blocks.push((self.block(read.layer, &index, read.block)?, index, &read.values));
        }
        let chain = blocks.iter().rev().flat_map(|(block, index, values)| {
            values.iter().rev().map(|entry| (entry.lsn, entry.kind, index.value(entry, block).unwrap_or_default()))
        });
        Ok(rebuild(key, chain).map_err(|error| error.to_string()))
    }

    /// The value of `key` at `lsn`, by the rules of relations if it is a block: beyond a fork's end there is nothing, whatever an
    /// older relation left there.
    fn image(&self, key: Key, lsn: Lsn) -> Result<Image, CompactionError> {
        let floor = match (key.kind(), stripe_size_key_of(self.striping, key)) {
            (Ok(KeyKind::Block { block, .. }), Some((stripe, _))) => match self.stripe(stripe, lsn)? {
                Ok(Some(size)) if size.has_block(self.striping, block) => size.floor,
                Ok(_) => return Ok(Image::Absent),
                Err(cause) => return Ok(Image::Poisoned(cause)),
            },
            _ => Lsn::INVALID,
        };
        Ok(match self.rebuilt(key, lsn, floor)? {
            Ok(Rebuilt::Page(page)) => Image::Sound(page.0.to_vec()),
            Ok(Rebuilt::Bytes(bytes)) => Image::Sound(bytes),
            Ok(Rebuilt::Absent) => Image::Absent,
            Err(cause) => Image::Poisoned(cause),
        })
    }

    fn stripe(&self, key: Key, lsn: Lsn) -> Result<Result<Option<StripeSize>, String>, CompactionError> {
        if let Some((last, at, size)) = &*self.stripe.borrow()
            && (*last, *at) == (key, lsn)
        {
            return Ok(Ok(*size));
        }
        let size = match self.rebuilt(key, lsn, Lsn::INVALID)? {
            Ok(Rebuilt::Bytes(bytes)) => match StripeSize::from_bytes(&bytes) {
                Ok(size) => Some(size),
                Err(error) => return Ok(Err(error.to_string())),
            },
            Ok(Rebuilt::Absent) => None,
            Ok(Rebuilt::Page(_)) => return Ok(Err("a page instead of a length".to_owned())),
            Err(cause) => return Ok(Err(cause)),
        };
        self.stripe.replace(Some((key, lsn, size)));
        Ok(Ok(size))
    }
}
