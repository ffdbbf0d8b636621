//! The open layer: what arrived since the last freeze, in memory. The safekeepers keep its WAL until it is uploaded.

use alloc::{collections::BTreeMap, vec::Vec};

use pgtypes::Lsn;

use crate::{
    error::PutError,
    identity::{LayerIdentity, LsnRange, ValueKind},
    key::{Key, KeyRange},
    writer::{LayerWriter, VALUE_BYTES_MAX},
};

/// What a value costs in memory beside its bytes: its entry, and its share of the map. An estimate.
const VALUE_OVERHEAD_BYTES: u64 = 64;

/// A value in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenValue {
    /// End of its record.
    pub lsn: Lsn,
    /// What it does.
    pub kind: ValueKind,
    /// WAL record or page.
    pub value: Vec<u8>,
}

/// An open layer; frozen it stays readable until its delta layer is.
#[derive(Clone, Debug)]
pub struct OpenLayer {
    keys: KeyRange,
    lsns: LsnRange,
    values: BTreeMap<Key, Vec<OpenValue>>,
    bytes: u64,
}

impl OpenLayer {
    /// An empty layer for records that end after `after`.
    pub fn new(keys: KeyRange, after: Lsn) -> OpenLayer {
        OpenLayer { keys, lsns: LsnRange { after, through: after }, values: BTreeMap::new(), bytes: 0 }
    }

    /// Adds a value. LSNs never fall; a record has one value for each key.
    ///
    /// # Errors
    /// Out of order, of another shard, or too large. Nothing was added.
    pub fn put(&mut self, key: Key, lsn: Lsn, kind: ValueKind, value: Vec<u8>) -> Result<(), PutError> {
        if !self.keys.contains(key) {
            return Err(PutError::OutOfRange);
        }
        if lsn < self.lsns.through || lsn <= self.lsns.after {
            return Err(PutError::OutOfOrder);
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(PutError::TooLarge(value.len()));
        }
        let values = self.values.entry(key).or_default();
        if values.last().is_some_and(|last| last.lsn == lsn) {
            return Err(PutError::OutOfOrder);
        }
        self.bytes += value.len() as u64 + VALUE_OVERHEAD_BYTES;
        values.push(OpenValue { lsn, kind, value });
        self.lsns.through = lsn;
        Ok(())
    }

    /// Says that nothing else of this shard happened up to `lsn`. Idle shards move by it.
    pub fn advance(&mut self, lsn: Lsn) {
        self.lsns.through = self.lsns.through.max(lsn);
    }

    /// What it answers for so far.
    pub fn lsns(&self) -> LsnRange {
        self.lsns
    }

    /// Memory that it takes, about.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it holds no value.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// What a read of `key` at `lsn` needs of it, newest first, and whether that starts the page. If not, the read
    /// goes on at [`LsnRange::after`].
    pub fn read(&self, key: Key, lsn: Lsn) -> (Vec<&OpenValue>, bool) {
        let values = self.values.get(&key).map_or(&[][..], |values| values);
        let mut found = Vec::new();
        for value in values[..values.partition_point(|value| value.lsn <= lsn)].iter().rev() {
            found.push(value);
            if value.kind.starts_page() {
                return (found, true);
            }
        }
        (found, false)
    }

    /// Its values as the delta layer holds them: by key, then LSN.
    pub fn values(&self) -> impl Iterator<Item = (Key, &OpenValue)> + '_ {
        self.values.iter().flat_map(|(key, values)| values.iter().map(|value| (*key, value)))
    }

    /// Begins the delta layer of this layer, and the layer that follows. Push [`OpenLayer::values`] into the writer
    /// and finish it with the end of the shard's keys.
    ///
    /// `None` while it answers for no position: a delta layer has at least one.
    pub fn freeze(&self, identity: LayerIdentity) -> Option<(LayerWriter, OpenLayer)> {
        if self.lsns.after == self.lsns.through {
            return None;
        }
        let writer = LayerWriter::delta(identity, 0, self.keys.begin, self.lsns);
        Some((writer, OpenLayer::new(self.keys, self.lsns.through)))
    }
}
