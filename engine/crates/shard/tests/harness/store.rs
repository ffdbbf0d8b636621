//! A shard that holds all its values in memory.

use std::collections::BTreeMap;

use filter::Batch;
use layers::{HashRange, Key, KeyKind, Metadata, Striping, ValueKind};
use pgtypes::{FrameSummary, Lsn};
use redo::Database;
use shard::{Ingest, IngestFault, RebuildError, Rebuilt, StripeSize, poison, rebuild, stripe_size_key_of};
use wal::RelFileLocator;

use super::files::Files;

pub struct Value {
    pub lsn: Lsn,
    pub kind: ValueKind,
    pub bytes: Vec<u8>,
}

/// Values by key, in the order of their LSNs.
pub struct Store {
    pub striping: Striping,
    pub range: HashRange,
    pub values: BTreeMap<Key, Vec<Value>>,
    pub through: Lsn,
}

impl Store {
    pub fn new(striping: Striping, range: HashRange) -> Store {
        Store { striping, range, values: BTreeMap::new(), through: Lsn::INVALID }
    }

    /// The rules of an open layer.
    pub fn put(&mut self, key: Key, lsn: Lsn, kind: ValueKind, bytes: Vec<u8>) {
        assert!(self.range.contains(key), "{key:?} of {lsn} is of another shard");
        assert!(lsn >= self.through, "{key:?} of {lsn} comes after {}", self.through);
        self.through = lsn;
        let values = self.values.entry(key).or_default();
        assert!(values.last().is_none_or(|last| last.lsn < lsn), "{key:?} has two values of {lsn}");
        values.push(Value { lsn, kind, bytes });
    }

    /// The values of a key, above `floor` and up to `lsn`.
    pub fn chain(&self, key: Key, floor: Lsn, lsn: Lsn) -> impl Iterator<Item = (Lsn, ValueKind, &[u8])> {
        let values = self.values.get(&key).map_or(&[][..], |values| &values[..]);
        let values = values.iter().filter(move |value| floor < value.lsn && value.lsn <= lsn);
        values.map(|value| (value.lsn, value.kind, &value.bytes[..]))
    }

    pub fn stripe_size(&self, key: Key, lsn: Lsn) -> Option<StripeSize> {
        let (_, kind, value) = self.chain(key, Lsn::INVALID, lsn).last()?;
        (kind == ValueKind::Image).then(|| StripeSize::from_bytes(value).expect("a length"))
    }

    /// As a page server reads: the stripe's length first, and the page above its floor.
    pub fn read(&self, key: Key, lsn: Lsn) -> Result<Rebuilt, RebuildError> {
        let floor = match stripe_size_key_of(self.striping, key) {
            Some((stripe, block)) => {
                let size = self.stripe_size(stripe, lsn);
                match size.filter(|size| size.has_block(self.striping, block)) {
                    Some(size) => size.floor,
                    None => return Ok(Rebuilt::Absent),
                }
            }
            None => Lsn::INVALID,
        };
        rebuild(key, self.chain(key, floor, lsn))
    }
}

/// A shard as its shell runs it.
pub struct Shard {
    pub ingest: Ingest,
    pub store: Store,
    pub faults: Vec<IngestFault>,
    pub copied_blocks: u64,
    /// Databases that were copied as files: where, from and to.
    pub copies: Vec<(Lsn, Database, Database)>,
}

impl Shard {
    /// Begins with the files of a server, as import does.
    pub fn import(files: &Files, at: Lsn, striping: Striping, range: HashRange) -> Shard {
        let mut store = Store::new(striping, range);
        let mut put = |key: Key, bytes: Vec<u8>| {
            if range.contains(key) {
                store.put(key, at, ValueKind::Image, bytes);
            }
        };
        for ((relation, fork), bytes) in &files.forks {
            import_fork(*relation, *fork, bytes, striping, &mut put);
        }
        for (Database { tablespace, database }, map) in &files.maps {
            let (tablespace, database) = (*tablespace, *database);
            put(Key::metadata(Metadata::RelationMap { tablespace, database }), map.clone());
            put(Key::metadata(Metadata::Database { tablespace, database }), Vec::new());
        }
        for ((slru, page), bytes) in &files.slru_pages {
            put(Key::slru(*slru, *page), bytes.clone());
        }
        for (full_xid, file) in &files.two_phase {
            put(Key::metadata(Metadata::TwoPhase(*full_xid)), file.clone());
        }
        for (id, lsn) in &files.origins.0 {
            put(Key::metadata(Metadata::Origin(*id)), lsn.0.to_le_bytes().to_vec());
        }
        put(Key::metadata(Metadata::Checkpoint), files.counters().to_bytes());
        Shard::attach(store, at)
    }

    /// Begins with the values of a store as of `at`.
    pub fn attach(store: Store, at: Lsn) -> Shard {
        let mut ingest = Ingest::new(store.striping, store.range);
        load(&store, at, &mut ingest);
        Shard { ingest, store, faults: Vec::new(), copied_blocks: 0, copies: Vec::new() }
    }

    pub fn batch(&mut self, batch: Batch) {
        let summary = self.items(batch);
        let store = &mut self.store;
        self.ingest.end_of_batch(&summary, &mut |key, lsn, kind, bytes| store.put(key, lsn, kind, bytes));
    }

    /// All but the batch's end.
    pub fn items(&mut self, batch: Batch) -> FrameSummary {
        for item in batch.items {
            let store = &mut self.store;
            let done = self.ingest.item(item.start, item.end, item.stored, &mut |key, lsn, kind, bytes| {
                store.put(key, lsn, kind, bytes);
            });
            self.faults.extend(done.fault);
            self.copies.extend(done.copy.iter().map(|copy| (copy.lsn, copy.from, copy.to)));
            for block in done.copy.iter().flat_map(|copy| copy.blocks()) {
                self.copied_blocks += 1;
                match rebuild(block.from, store.chain(block.from, block.floor, item.end)) {
                    Ok(Rebuilt::Page(page)) => store.put(block.to, item.end, ValueKind::Image, page.0.to_vec()),
                    Ok(_) => {}
                    Err(error) => {
                        store.put(block.to, item.end, ValueKind::Record, poison(&error.to_string()));
                    }
                }
            }
        }
        batch.summary
    }
}

/// What a page server tells a new ingest.
pub fn load(store: &Store, at: Lsn, ingest: &mut Ingest) {
    for key in store.values.keys() {
        let wanted = matches!(key.kind(), Ok(KeyKind::StripeSize { .. } | KeyKind::Metadata(_) | KeyKind::Slru(..)));
        let newest = store.chain(*key, Lsn::INVALID, at).last().filter(|_| wanted);
        if let Some((_, _, value)) = newest.filter(|(_, kind, _)| *kind != ValueKind::Absent) {
            ingest.load(*key, value).expect("values of this shard");
        }
    }
}

fn import_fork(
    relation: RelFileLocator,
    fork: wal::Fork,
    bytes: &[u8],
    striping: Striping,
    put: &mut dyn FnMut(Key, Vec<u8>),
) {
    let blocks = (bytes.len() / 8192) as u32;
    for (page, block) in bytes.chunks_exact(8192).zip(0..) {
        put(striping.block(relation, fork, block), page.to_vec());
    }
    for stripe in 0..blocks.div_ceil(striping.stripe_blocks).max(1) {
        let length = (blocks - stripe * striping.stripe_blocks).min(striping.stripe_blocks);
        let size = StripeSize { length, floor: Lsn::INVALID };
        put(striping.stripe_size(relation, fork, stripe), size.to_bytes());
    }
}
