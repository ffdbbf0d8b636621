//! A page server in memory around the crate: layer files as byte vectors, and a redo that appends.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use layers::{
    Choice, Edit, Entry, FinishedLayer, HEADER_BYTES, HashRange, Index, Indexes, Key, LayerDescription, LayerError,
    LayerFile, LayerId, LayerIdentity, LayerMap, LayerOutput, LayerWriter, Limits, Merge, OpenLayer, PlanError,
    ReadPlan, Retain, ShardGeneration, ShardId, Split, SplitWriter, Striping, TRAILER_BYTES, ValueKind, choose,
    collect, image_keys,
};
use pgtypes::{BranchId, ClusterId, LogId, Lsn};
use wal::{Fork, RelFileLocator};

/// Where the history of these tests begins: an import.
pub const ORIGIN: Lsn = Lsn(100);

/// Records make pages no longer than this.
const PAGE_BYTES_MAX: usize = 1024;

/// A page of the toy redo: `None` where nothing is.
pub type Page = Option<Vec<u8>>;

/// What a value does to a page.
pub fn redo(page: Page, kind: ValueKind, value: &[u8]) -> Page {
    match kind {
        ValueKind::Absent => None,
        ValueKind::Image | ValueKind::InitRecord => Some(value.to_vec()),
        ValueKind::Record => {
            let mut page = page.unwrap_or_default();
            page.extend_from_slice(value);
            page.drain(..page.len().saturating_sub(PAGE_BYTES_MAX));
            Some(page)
        }
    }
}

/// Block `number` of relation `number % 5`, spread over the hash space.
pub fn key(number: u32) -> Key {
    let relation = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 + number % 5 };
    Striping { stripe_blocks: 4 }.block(relation, Fork::Main, number)
}

/// Indexes in memory.
#[derive(Default)]
pub struct IndexMap(pub BTreeMap<LayerId, Index>);

impl Indexes for IndexMap {
    fn index(&self, layer: LayerId) -> Option<&Index> {
        self.0.get(&layer)
    }
}

/// A shard.
pub struct Shard {
    pub map: LayerMap,
    pub open: OpenLayer,
    pub indexes: IndexMap,
    pub files: BTreeMap<LayerId, Vec<u8>>,
    pub next_number: u64,
    /// Layers of a row end at this size.
    pub layer_bytes_target: u64,
    /// Merges of level 0, merges of bands, rows of images.
    pub tasks: [usize; 3],
    /// Bytes of all layers that were ever made.
    pub written_bytes: u64,
}

/// Identity of layer `number` of the one shard of these tests.
pub fn identity(number: u64) -> LayerIdentity {
    let log = LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) };
    let id = LayerId { shard: ShardId(3), generation: ShardGeneration(4), number };
    LayerIdentity { log, id, stripe_blocks: 4 }
}

/// Reads a file as a page server does: header and trailer, then the index.
pub fn open_file(bytes: &[u8]) -> Result<(LayerFile, Index), LayerError> {
    let header = &bytes[..HEADER_BYTES.min(bytes.len())];
    let trailer = &bytes[bytes.len().saturating_sub(TRAILER_BYTES)..];
    let file = LayerFile::decode(header, trailer, bytes.len() as u64)?;
    let at = file.index.offset as usize;
    let index = Index::decode(&file, &bytes[at..at + file.index.bytes as usize])?;
    Ok((file, index))
}

impl Shard {
    /// A shard with all keys and an empty image at [`ORIGIN`].
    pub fn new() -> Shard {
        let keys = HashRange::ALL.keys();
        let mut shard = Shard {
            map: LayerMap::new(keys, ORIGIN),
            open: OpenLayer::new(keys, ORIGIN),
            indexes: IndexMap::default(),
            files: BTreeMap::new(),
            next_number: 1,
            layer_bytes_target: 2000,
            tasks: [0; 3],
            written_bytes: 0,
        };
        let identity = shard.new_identity();
        let writer = LayerWriter::image(identity, keys.begin, ORIGIN);
        let layer = shard.keep(Vec::new(), writer.finish(keys.end).unwrap());
        shard.map.apply(&Edit { remove: vec![], add: vec![layer] }).unwrap();
        shard
    }

    pub fn new_identity(&mut self) -> LayerIdentity {
        self.next_number += 1;
        identity(self.next_number - 1)
    }

    /// Stores a finished layer, and reads it back.
    pub fn keep(&mut self, mut bytes: Vec<u8>, finished: FinishedLayer) -> LayerDescription {
        bytes.extend_from_slice(&finished.output);
        let (file, index) = open_file(&bytes).unwrap();
        assert_eq!((finished.file, &finished.index), (file, &index));
        let description = file.description;
        assert_eq!(bytes.len() as u64, description.file_bytes);
        self.written_bytes += description.file_bytes;
        self.indexes.0.insert(description.id, index);
        self.files.insert(description.id, bytes);
        description
    }

    pub fn freeze(&mut self) {
        let identity = self.new_identity();
        let Some((mut writer, next)) = self.open.freeze(identity) else { return };
        let mut bytes = Vec::new();
        for (key, value) in self.open.values() {
            writer.push(key, value.lsn, value.kind, &value.value).unwrap();
            bytes.extend(writer.take_output());
        }
        let layer = self.keep(bytes, writer.finish(self.map.keys().end).unwrap());
        self.map.apply(&Edit { remove: vec![], add: vec![layer] }).unwrap();
        self.open = next;
    }

    /// A page as GetPage answers it: the open layer, then the map.
    pub fn read(&self, key: Key, lsn: Lsn) -> Result<Page, PlanError> {
        if lsn < self.map.horizon() {
            return Err(PlanError::BelowHorizon { lsn, horizon: self.map.horizon() });
        }
        let (newest, started) = self.open.read(key, lsn);
        let mut values: Vec<_> = newest.into_iter().map(|value| (value.kind, value.value.clone())).collect();
        if !started {
            values.extend(self.read_layers(key, lsn.min(self.open.lsns().after))?);
        }
        Ok(values.into_iter().rev().fold(None, |page, (kind, value)| redo(page, kind, &value)))
    }

    /// The values that the map plans, newest first.
    pub fn read_layers(&self, key: Key, lsn: Lsn) -> Result<Vec<(ValueKind, Vec<u8>)>, PlanError> {
        let plan = self.map.plan_read(key, lsn, Lsn::INVALID, &self.indexes)?;
        Ok(self.fetch(&plan))
    }

    fn fetch(&self, plan: &ReadPlan) -> Vec<(ValueKind, Vec<u8>)> {
        let mut values = Vec::new();
        for read in &plan.reads {
            let index = &self.indexes.0[&read.layer];
            let at = read.place.offset as usize;
            let bytes = &self.files[&read.layer][at..at + read.place.bytes as usize];
            let block = index.decode_block(read.block, bytes).unwrap();
            values.extend(read.values.iter().map(|v| (v.kind, index.value(v, &block).unwrap().to_vec())));
        }
        values
    }

    /// The page for compaction, horizon or not.
    fn page(&self, key: Key, lsn: Lsn) -> Page {
        let plan = self.map.plan_kept(key, lsn, Lsn::INVALID, &self.indexes).unwrap();
        self.fetch(&plan).into_iter().rev().fold(None, |page, (kind, value)| redo(page, kind, &value))
    }

    /// All entries of a layer, as a compaction reads it: block by block.
    fn entries(&self, layer: LayerId) -> impl Iterator<Item = Result<Entry, LayerError>> + '_ {
        let (index, file) = (&self.indexes.0[&layer], &self.files[&layer]);
        (0..index.block_count()).flat_map(move |number| {
            let place = index.block_place(number).unwrap();
            let bytes = &file[place.offset as usize..][..place.bytes as usize];
            let block = index.decode_block(number, bytes).unwrap();
            let entries = index.entries_of_block(number).map(|(key, entry)| {
                let value = index.value(entry, &block).unwrap().to_vec();
                Ok(Entry { key, lsn: entry.lsn, kind: entry.kind, value })
            });
            entries.collect::<Vec<_>>()
        })
    }

    /// Does what [`choose`] says, once; false if that is nothing.
    pub fn compact(&mut self, limits: &Limits) -> bool {
        let first = identity(self.next_number);
        match choose(&self.map, limits) {
            Choice::Nothing => return false,
            Choice::Merge(task) => {
                assert!(task.layers.len() > 1);
                self.tasks[usize::from(self.map.layer(task.layers[0]).unwrap().level)] += 1;
                let split =
                    Split { keys: task.keys, cuts: task.cuts.clone(), layer_bytes_target: self.layer_bytes_target };
                let mut writer = SplitWriter::deltas(first, split, task.lsns);
                let merge = Merge::new(task.layers.iter().map(|layer| self.entries(*layer)));
                let with_images = merge.map(|entry| {
                    let mut entry = entry?;
                    let due = task.images_due(&self.map, entry.key, &self.indexes).unwrap();
                    if due.contains(&entry.lsn) {
                        (entry.kind, entry.value) = (ValueKind::Image, self.page(entry.key, entry.lsn).unwrap());
                    }
                    Ok(entry)
                });
                let mut outputs = Vec::new();
                for entry in Retain::new(with_images, self.map.horizon()) {
                    let entry: Entry = entry.unwrap_or_else(|error: LayerError| panic!("{error}"));
                    writer.push(entry.key, entry.lsn, entry.kind, &entry.value).unwrap();
                    outputs.extend(std::iter::from_fn(|| writer.poll_output()));
                }
                outputs.extend(writer.finish().unwrap());
                let add = self.keep_row(outputs);
                self.replace(&Edit { remove: task.layers, add });
            }
            Choice::Images { keys, lsn } => {
                self.tasks[2] += 1;
                let split = Split { keys, cuts: BTreeSet::new(), layer_bytes_target: self.layer_bytes_target };
                let mut writer = SplitWriter::images(first, split, lsn);
                let mut outputs = Vec::new();
                let mut rest = keys;
                loop {
                    let some = image_keys(&self.map, rest, lsn, 7, &self.indexes).unwrap();
                    let Some(last) = some.last() else { break };
                    rest.begin = last.next();
                    for key in some {
                        if let Some(page) = self.page(key, lsn) {
                            writer.push(key, lsn, ValueKind::Image, &page).unwrap();
                            outputs.extend(std::iter::from_fn(|| writer.poll_output()));
                        }
                    }
                }
                outputs.extend(writer.finish().unwrap());
                let add = self.keep_row(outputs);
                self.map.apply(&Edit { remove: vec![], add }).unwrap();
            }
        }
        true
    }

    fn keep_row(&mut self, outputs: Vec<LayerOutput>) -> Vec<LayerDescription> {
        let mut bytes = Vec::new();
        let mut layers = Vec::new();
        for output in outputs {
            match output {
                LayerOutput::Bytes(_, more) => bytes.extend(more),
                LayerOutput::Finished(layer) => {
                    self.next_number = layer.file.description.id.number + 1;
                    layers.push(self.keep(std::mem::take(&mut bytes), *layer));
                }
            }
        }
        assert!(bytes.is_empty());
        layers
    }

    /// Gives up positions below `horizon`, and the files that nobody needs then.
    pub fn collect(&mut self, horizon: Lsn) -> usize {
        self.map.raise_horizon(horizon);
        let edit = collect(&self.map);
        self.replace(&edit);
        edit.remove.len()
    }

    fn replace(&mut self, edit: &Edit) {
        self.map.apply(edit).unwrap();
        for layer in &edit.remove {
            self.files.remove(layer).unwrap();
            self.indexes.0.remove(layer).unwrap();
        }
    }
}
