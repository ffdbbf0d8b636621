//! Writes a layer file as a stream of bytes.

use alloc::vec::Vec;

use pgtypes::Lsn;

use crate::{
    block,
    error::PutError,
    format::{ByteRange, HEADER_BYTES, LayerFile, TRAILER_BYTES, encode_header, encode_trailer},
    identity::{LayerDescription, LayerId, LayerIdentity, LayerKind, LsnRange, ValueKind},
    index::{Index, VALUES_MAX},
    key::{Key, KeyRange},
};

/// Longest value: the longest record of PostgreSQL, with room for what is kept beside it.
pub const VALUE_BYTES_MAX: usize = 1 << 30;

/// A block of a delta layer ends with the key that takes it to this size, so that a read of one key is one block;
const BLOCK_BYTES_SOFT: usize = 8 << 10;
/// and within a key at this size, so that a hot page does not make it grow without bound.
const BLOCK_BYTES_HARD: usize = 32 << 10;

/// What a layer becomes once its last value is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FinishedLayer {
    /// As [`LayerFile::decode`] would read it.
    pub file: LayerFile,
    /// Its index, as [`Index::decode`] would read it.
    pub index: Index,
    /// The bytes behind those taken before.
    pub output: Vec<u8>,
}

/// Writes a layer: values in, bytes out. Holds one block and the index in memory, and what was not taken yet.
#[derive(Debug)]
pub struct LayerWriter {
    identity: LayerIdentity,
    kind: LayerKind,
    level: u8,
    begin: Key,
    lsns: LsnRange,
    seed: u32,
    /// Bytes of the file that are in `output` or were taken.
    offset: u64,
    output: Vec<u8>,
    block: Vec<u8>,
    index: Index,
    last: Option<(Key, Lsn)>,
}

impl LayerWriter {
    /// Begins a delta layer of `level` whose keys begin at `begin`.
    pub fn delta(identity: LayerIdentity, level: u8, begin: Key, lsns: LsnRange) -> LayerWriter {
        LayerWriter::new(identity, LayerKind::Delta, level, begin, lsns)
    }

    /// Begins an image layer at `lsn` whose keys begin at `begin`.
    pub fn image(identity: LayerIdentity, begin: Key, lsn: Lsn) -> LayerWriter {
        LayerWriter::new(identity, LayerKind::Image, 1, begin, LsnRange { after: lsn, through: lsn })
    }

    fn new(identity: LayerIdentity, kind: LayerKind, level: u8, begin: Key, lsns: LsnRange) -> LayerWriter {
        let (output, seed) = encode_header(&identity, kind);
        LayerWriter {
            identity,
            kind,
            level,
            begin,
            lsns,
            seed,
            offset: HEADER_BYTES as u64,
            output,
            block: Vec::new(),
            index: Index::new(seed),
            last: None,
        }
    }

    /// Adds a value. In an image layer `lsn` is the layer's and `kind` an image.
    ///
    /// # Errors
    /// Not behind the value before (by key, then LSN), outside of the layer, too large, too many. Nothing was added.
    pub fn push(&mut self, key: Key, lsn: Lsn, kind: ValueKind, value: &[u8]) -> Result<(), PutError> {
        let fits = match self.kind {
            LayerKind::Delta => self.lsns.contains(lsn),
            LayerKind::Image => lsn == self.lsns.through && kind == ValueKind::Image,
        };
        if !fits || key < self.begin || key == Key::MAX {
            return Err(PutError::OutOfRange);
        }
        if self.last.is_some_and(|last| (key, lsn) <= last) {
            return Err(PutError::OutOfOrder);
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(PutError::TooLarge(value.len()));
        }
        if self.index.value_count() == VALUES_MAX {
            return Err(PutError::Full);
        }
        let same_key = self.last.is_some_and(|(last, _)| last == key);
        let full = match self.kind {
            // One page, one read.
            LayerKind::Image => !self.block.is_empty(),
            LayerKind::Delta if same_key => self.block.len() + value.len() > BLOCK_BYTES_HARD,
            LayerKind::Delta => self.block.len() >= BLOCK_BYTES_SOFT,
        };
        if full && self.last.is_some() {
            self.end_block();
        }
        self.index.push(key, lsn, kind, self.block.len() as u32, value.len() as u32);
        self.block.extend_from_slice(value);
        self.last = Some((key, lsn));
        Ok(())
    }

    fn end_block(&mut self) {
        let bytes = block::encode(self.seed, self.offset, &self.block);
        let place = ByteRange { offset: self.offset, bytes: bytes.len() as u32 };
        self.index.end_block(place, self.block.len() as u32);
        self.offset += bytes.len() as u64;
        self.output.extend_from_slice(&bytes);
        self.block.clear();
    }

    /// The bytes of the file since the last call, in order.
    pub fn take_output(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.output)
    }

    /// Length of the file so far, without its index; what decides when to begin the next.
    pub fn bytes(&self) -> u64 {
        self.offset + self.block.len() as u64
    }

    /// Which layer it writes.
    pub fn id(&self) -> LayerId {
        self.identity.id
    }

    /// Whether it takes no more values.
    pub fn is_full(&self) -> bool {
        self.index.value_count() == VALUES_MAX
    }

    /// The key of the last value.
    pub fn last_key(&self) -> Option<Key> {
        self.last.map(|(key, _)| key)
    }

    /// Ends the layer, which answers for keys up to `end`.
    ///
    /// # Errors
    /// `end` is not behind the last key and the begin.
    pub fn finish(mut self, end: Key) -> Result<FinishedLayer, PutError> {
        let keys = KeyRange { begin: self.begin, end };
        if keys.is_empty() || self.last.is_some_and(|(key, _)| key >= end) {
            return Err(PutError::OutOfRange);
        }
        if self.index.entries_of_block(self.index.block_count()).next().is_some() {
            self.end_block();
        }
        let framed = block::encode(self.seed, self.offset, &self.index.encode());
        let place = ByteRange { offset: self.offset, bytes: framed.len() as u32 };
        let description = LayerDescription {
            id: self.identity.id,
            kind: self.kind,
            level: self.level,
            keys,
            lsns: self.lsns,
            file_bytes: self.offset + framed.len() as u64 + TRAILER_BYTES as u64,
            values: u64::from(self.index.value_count()),
            chain_max: self.index.chain_max(),
        };
        let key_count = self.index.key_count();
        self.output.extend_from_slice(&framed);
        self.output.extend_from_slice(&encode_trailer(self.seed, &description, place, key_count));
        let file = LayerFile { identity: self.identity, description, index: place, keys: key_count, seed: self.seed };
        Ok(FinishedLayer { file, index: self.index, output: self.output })
    }
}
