//! The index of a layer: for every value its key, LSN, place, length and whether it starts a page. With it in memory a
//! read is planned without touching the layer's data.
//!
//! Memory: 26 bytes for each key and 32 for each value.

use alloc::vec::Vec;

use pgtypes::Lsn;

use crate::{
    block,
    error::LayerError,
    format::{ByteRange, Fields, HEADER_BYTES, LayerFile, put},
    identity::{LayerKind, LsnRange, ValueKind},
    key::{KEY_BYTES, Key},
};

/// Values of a layer, at most: bounds the index to about half a GiB in memory.
pub const VALUES_MAX: u32 = 1 << 24;

/// Bytes in the encoded index for each block, key and value, and before them.
const HEAD_BYTES: usize = 12;
const BLOCK_ENTRY_BYTES: usize = 12;
const KEY_ENTRY_BYTES: usize = KEY_BYTES + 4;
const VALUE_ENTRY_BYTES: usize = 13;

/// A value as the index knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ValueEntry {
    /// End of its record.
    pub lsn: Lsn,
    /// What it does.
    pub kind: ValueKind,
    /// Number of the block that holds it.
    pub block: u32,
    /// Where it begins in the decoded block.
    pub at: u32,
    /// Its length.
    pub bytes: u32,
}

/// A block as the index knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct BlockEntry {
    place: ByteRange,
    raw_bytes: u32,
    /// Values in this block and those before it.
    values: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct KeyEntry {
    key: Key,
    /// Number of its first value.
    first: u32,
}

/// The index of one layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Index {
    seed: u32,
    blocks: Vec<BlockEntry>,
    keys: Vec<KeyEntry>,
    values: Vec<ValueEntry>,
}

impl Index {
    pub(crate) fn new(seed: u32) -> Index {
        Index { seed, blocks: Vec::new(), keys: Vec::new(), values: Vec::new() }
    }

    /// Adds a value of the block that [`Index::end_block`] will end next.
    pub(crate) fn push(&mut self, key: Key, lsn: Lsn, kind: ValueKind, at: u32, bytes: u32) {
        if self.keys.last().is_none_or(|last| last.key != key) {
            self.keys.push(KeyEntry { key, first: self.values.len() as u32 });
        }
        self.values.push(ValueEntry { lsn, kind, block: self.blocks.len() as u32, at, bytes });
    }

    pub(crate) fn end_block(&mut self, place: ByteRange, raw_bytes: u32) {
        self.blocks.push(BlockEntry { place, raw_bytes, values: self.values.len() as u32 });
    }

    /// Values of the layer.
    pub fn value_count(&self) -> u32 {
        self.values.len() as u32
    }

    /// Keys of the layer.
    pub fn key_count(&self) -> u32 {
        self.keys.len() as u32
    }

    /// Blocks of the layer, in file order.
    pub fn block_count(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Where block `number` lies in the file; `None` if there is no such block.
    pub fn block_place(&self, number: u32) -> Option<ByteRange> {
        self.blocks.get(number as usize).map(|block| block.place)
    }

    /// The values of `key`, oldest first.
    pub fn values_of(&self, key: Key) -> &[ValueEntry] {
        match self.keys.binary_search_by_key(&key, |entry| entry.key) {
            Ok(at) => self.values_at(at),
            Err(_) => &[],
        }
    }

    fn values_at(&self, at: usize) -> &[ValueEntry] {
        let end = self.keys.get(at + 1).map_or(self.values.len(), |next| next.first as usize);
        &self.values[self.keys[at].first as usize..end]
    }

    /// The keys from `begin` on in order, each with its values, oldest first.
    pub fn keys_from(&self, begin: Key) -> impl Iterator<Item = (Key, &[ValueEntry])> + Clone + '_ {
        let first = self.keys.partition_point(|entry| entry.key < begin);
        (first..self.keys.len()).map(|at| (self.keys[at].key, self.values_at(at)))
    }

    /// The most values that a read of one key needs of this layer.
    pub fn chain_max(&self) -> u32 {
        let chain = |values: &[ValueEntry]| {
            let started = values.iter().rev().position(|value| value.kind.starts_page());
            started.map_or(values.len(), |newer| newer + 1) as u32
        };
        self.keys_from(Key::MIN).map(|(_, values)| chain(values)).max().unwrap_or(0)
    }

    /// Checks and unpacks block `number`, whose bytes were read from [`Index::block_place`].
    ///
    /// # Errors
    /// The bytes are not that block: damaged, or of another place or file.
    pub fn decode_block(&self, number: u32, bytes: &[u8]) -> Result<Vec<u8>, LayerError> {
        const WHAT: &str = "layer block";
        let entry = self.blocks.get(number as usize).ok_or(LayerError::Malformed("no such block"))?;
        if bytes.len() as u64 != u64::from(entry.place.bytes) {
            let (found, expected) = (bytes.len() as u64, u64::from(entry.place.bytes));
            return Err(LayerError::Length { what: WHAT, found, expected });
        }
        let raw = block::decode(WHAT, self.seed, entry.place.offset, bytes)?;
        if raw.len() != entry.raw_bytes as usize {
            return Err(LayerError::Malformed("block: length differs from the index"));
        }
        Ok(raw)
    }

    /// A value of a block that [`Index::decode_block`] unpacked; `None` if it is an entry of another layer.
    pub fn value<'a>(&self, entry: &ValueEntry, block: &'a [u8]) -> Option<&'a [u8]> {
        block.get(entry.at as usize..)?.get(..entry.bytes as usize)
    }

    /// Everything in block `number`, in order: key, entry.
    pub fn entries_of_block(&self, number: u32) -> impl Iterator<Item = (Key, &ValueEntry)> + '_ {
        let ends = |number: u32| self.blocks.get(number as usize).map_or(self.values.len(), |b| b.values as usize);
        let begin = number.checked_sub(1).map_or(0, ends);
        let first_key = self.keys.partition_point(|entry| entry.first as usize <= begin).saturating_sub(1);
        let mut key_at = first_key;
        (begin..ends(number)).map(move |at| {
            while self.keys.get(key_at + 1).is_some_and(|next| next.first as usize <= at) {
                key_at += 1;
            }
            (self.keys[key_at].key, &self.values[at])
        })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(
            HEAD_BYTES
                + self.blocks.len() * BLOCK_ENTRY_BYTES
                + self.keys.len() * KEY_ENTRY_BYTES
                + self.values.len() * VALUE_ENTRY_BYTES,
        );
        put(&mut bytes, self.block_count());
        put(&mut bytes, self.key_count());
        put(&mut bytes, self.value_count());
        let mut before = 0;
        for block in &self.blocks {
            put(&mut bytes, block.place.bytes);
            put(&mut bytes, block.raw_bytes);
            put(&mut bytes, block.values - before);
            before = block.values;
        }
        for (key, values) in self.keys_from(Key::MIN) {
            bytes.extend_from_slice(&key.to_bytes());
            put(&mut bytes, values.len() as u32);
        }
        for value in &self.values {
            put(&mut bytes, value.lsn.0);
            put(&mut bytes, value.bytes);
            put(&mut bytes, value.kind as u8);
        }
        bytes
    }

    /// Reads the index of `file` from the bytes at [`LayerFile::index`].
    ///
    /// # Errors
    /// Damaged, or it does not fit header and trailer. Nothing of an index is believed before all of it was checked.
    pub fn decode(file: &LayerFile, bytes: &[u8]) -> Result<Index, LayerError> {
        const WHAT: &str = "layer index";
        const MALFORMED: LayerError = LayerError::Malformed("layer index");
        if bytes.len() as u64 != u64::from(file.index.bytes) {
            let (found, expected) = (bytes.len() as u64, u64::from(file.index.bytes));
            return Err(LayerError::Length { what: WHAT, found, expected });
        }
        let raw = block::decode(WHAT, file.seed, file.index.offset, bytes)?;
        let mut fields = Fields(&raw);
        let [blocks, keys, values] = [fields.u32()?, fields.u32()?, fields.u32()?].map(u64::from);
        let expected = HEAD_BYTES as u64
            + blocks * BLOCK_ENTRY_BYTES as u64
            + keys * KEY_ENTRY_BYTES as u64
            + values * VALUE_ENTRY_BYTES as u64;
        // From here on the counts are bounded by the bytes that are there.
        if expected != raw.len() as u64
            || values > u64::from(VALUES_MAX)
            || values != file.description.values
            || keys != u64::from(file.keys)
        {
            return Err(MALFORMED);
        }
        let mut index = Index::new(file.seed);
        index.blocks.reserve_exact(blocks as usize);
        index.keys.reserve_exact(keys as usize);
        index.values.reserve_exact(values as usize);

        let (mut offset, mut count) = (HEADER_BYTES as u64, 0u64);
        for _ in 0..blocks {
            let [bytes, raw_bytes, of_block] = [fields.u32()?, fields.u32()?, fields.u32()?];
            count += u64::from(of_block);
            if of_block == 0 || count > values {
                return Err(MALFORMED);
            }
            let place = ByteRange { offset, bytes };
            index.blocks.push(BlockEntry { place, raw_bytes, values: count as u32 });
            offset += u64::from(bytes);
        }
        if count != values || offset != file.index.offset {
            return Err(MALFORMED);
        }
        let mut first = 0u64;
        for _ in 0..keys {
            let key = Key::from_bytes(fields.array()?);
            let of_key = u64::from(fields.u32()?);
            let rises = index.keys.last().is_none_or(|last| last.key < key);
            if of_key == 0 || !rises || !file.description.keys.contains(key) || first + of_key > values {
                return Err(MALFORMED);
            }
            index.keys.push(KeyEntry { key, first: first as u32 });
            first += of_key;
        }
        if first != values {
            return Err(MALFORMED);
        }
        index.decode_values(&mut fields, file.description.kind, file.description.lsns)?;
        if index.chain_max() != file.description.chain_max {
            return Err(MALFORMED);
        }
        Ok(index)
    }

    fn decode_values(&mut self, fields: &mut Fields<'_>, kind: LayerKind, lsns: LsnRange) -> Result<(), LayerError> {
        const MALFORMED: LayerError = LayerError::Malformed("layer index: values");
        let (mut block, mut at) = (0usize, 0u32);
        let count = self.blocks.last().map_or(0, |block| block.values);
        let mut next_key = 0usize;
        let mut last = Lsn::INVALID;
        for number in 0..count {
            if self.keys.get(next_key).is_some_and(|entry| entry.first == number) {
                next_key += 1;
                last = Lsn::INVALID;
            }
            let (lsn, bytes) = (Lsn(fields.u64()?), fields.u32()?);
            let value_kind = ValueKind::from_number(fields.u8()?).ok_or(MALFORMED)?;
            let fits = match kind {
                LayerKind::Delta => lsns.contains(lsn),
                LayerKind::Image => lsn == lsns.through && value_kind == ValueKind::Image,
            };
            if !fits || lsn <= last {
                return Err(MALFORMED);
            }
            last = lsn;
            let end = at.checked_add(bytes).ok_or(MALFORMED)?;
            self.values.push(ValueEntry { lsn, kind: value_kind, block: block as u32, at, bytes });
            at = end;
            if number + 1 == self.blocks[block].values {
                if at != self.blocks[block].raw_bytes {
                    return Err(MALFORMED);
                }
                (block, at) = (block + 1, 0);
            }
        }
        Ok(())
    }
}
