//! Header and trailer of a layer file. Bytes: `docs/formats/layers.md`.

use alloc::vec::Vec;

use pgtypes::{BranchId, ClusterId, LogId, Lsn};

use crate::{
    error::LayerError,
    identity::{LayerDescription, LayerId, LayerIdentity, LayerKind, LsnRange, ShardGeneration, ShardId},
    key::{KEY_BYTES, Key, KeyRange},
};

/// Version that is written, and the only one that is read.
pub const VERSION: u16 = 1;
/// Bytes of the header, at the beginning of the file.
pub const HEADER_BYTES: usize = 80;
/// Bytes of the trailer, at its end.
pub const TRAILER_BYTES: usize = 128;

const HEADER_MAGIC: &[u8; 8] = b"LBLAYER\0";
const TRAILER_MAGIC: &[u8; 8] = b"LBLAYEND";

/// A number as it is in files.
pub(crate) trait Number {
    fn append(self, bytes: &mut Vec<u8>);
}
macro_rules! number {
    ($($type:ty)*) => {
        $(impl Number for $type {
            fn append(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
        })*
    };
}
number!(u8 u16 u32 u64);

/// Appends a number, little-endian.
pub(crate) fn put(bytes: &mut Vec<u8>, number: impl Number) {
    number.append(bytes);
}

/// Takes numbers off the front of bytes.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], LayerError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(LayerError::Malformed("it ends early"))?;
        self.0 = rest;
        Ok(*array)
    }
    pub(crate) fn u8(&mut self) -> Result<u8, LayerError> {
        self.array().map(u8::from_le_bytes)
    }
    pub(crate) fn u32(&mut self) -> Result<u32, LayerError> {
        self.array().map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self) -> Result<u64, LayerError> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Persisted numbers of [`LayerKind`].
pub(crate) fn kind_number(kind: LayerKind) -> u8 {
    match kind {
        LayerKind::Delta => 1,
        LayerKind::Image => 2,
    }
}

pub(crate) fn kind_of_number(number: u8) -> Result<LayerKind, LayerError> {
    match number {
        1 => Ok(LayerKind::Delta),
        2 => Ok(LayerKind::Image),
        _ => Err(LayerError::Malformed("kind of layer")),
    }
}

/// The header of a layer, and the checksum that all others of the file begin with.
pub(crate) fn encode_header(identity: &LayerIdentity, kind: LayerKind) -> (Vec<u8>, u32) {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(HEADER_MAGIC);
    put(&mut bytes, VERSION);
    put(&mut bytes, kind_number(kind));
    put(&mut bytes, 0u8);
    put(&mut bytes, identity.id.shard.0);
    bytes.extend_from_slice(&identity.log.cluster.0);
    bytes.extend_from_slice(&identity.log.branch.0);
    put(&mut bytes, identity.id.generation.0);
    put(&mut bytes, identity.id.number);
    put(&mut bytes, identity.stripe_blocks);
    bytes.resize(HEADER_BYTES - 4, 0);
    let seed = wal::crc32c(0, &bytes);
    put(&mut bytes, seed);
    (bytes, seed)
}

fn check_frame(bytes: &[u8], what: &'static str, magic: &[u8; 8], length: usize, seed: u32) -> Result<u32, LayerError> {
    if bytes.len() != length {
        return Err(LayerError::Length { what, found: bytes.len() as u64, expected: length as u64 });
    }
    if &bytes[..8] != magic {
        return Err(LayerError::NotALayer);
    }
    // Before the checksum: a later version may have its checksum elsewhere.
    let found = u16::from_le_bytes([bytes[8], bytes[9]]);
    if found != VERSION {
        return Err(LayerError::UnknownVersion { found });
    }
    let crc = wal::crc32c(seed, &bytes[..length - 4]);
    if bytes[length - 4..] != crc.to_le_bytes() {
        return Err(LayerError::Checksum { what });
    }
    Ok(crc)
}

fn decode_header(bytes: &[u8]) -> Result<(LayerIdentity, LayerKind, u32), LayerError> {
    let seed = check_frame(bytes, "layer header", HEADER_MAGIC, HEADER_BYTES, 0)?;
    let mut fields = Fields(&bytes[10..]);
    let kind = kind_of_number(fields.u8()?)?;
    let _reserved = fields.u8()?;
    let shard = ShardId(fields.u32()?);
    let log = LogId { cluster: ClusterId(fields.array()?), branch: BranchId(fields.array()?) };
    let id = LayerId { shard, generation: ShardGeneration(fields.u64()?), number: fields.u64()? };
    let identity = LayerIdentity { log, id, stripe_blocks: fields.u32()? };
    Ok((identity, kind, seed))
}

/// A run of bytes of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
}

/// A layer file whose header and trailer were read: enough to read its index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerFile {
    /// Whose it is.
    pub identity: LayerIdentity,
    /// What it holds.
    pub description: LayerDescription,
    /// Where its index lies.
    pub index: ByteRange,
    /// Keys in the index.
    pub keys: u32,
    pub(crate) seed: u32,
}

impl LayerFile {
    /// Reads the first [`HEADER_BYTES`] and the last [`TRAILER_BYTES`] of a file.
    ///
    /// # Errors
    /// It is damaged, of a later version, cut off, or its trailer is another file's.
    pub fn decode(header: &[u8], trailer: &[u8], file_bytes: u64) -> Result<LayerFile, LayerError> {
        let (identity, kind, seed) = decode_header(header)?;
        check_frame(trailer, "layer trailer", TRAILER_MAGIC, TRAILER_BYTES, seed)?;
        let mut fields = Fields(&trailer[10..]);
        let trailer_kind = kind_of_number(fields.u8()?)?;
        let level = fields.u8()?;
        let chain_max = fields.u32()?;
        let expected = fields.u64()?;
        let index = ByteRange { offset: fields.u64()?, bytes: fields.u32()? };
        let keys = fields.u32()?;
        let values = fields.u64()?;
        let lsns = LsnRange { after: Lsn(fields.u64()?), through: Lsn(fields.u64()?) };
        let range = KeyRange { begin: key(&mut fields)?, end: key(&mut fields)? };
        if expected != file_bytes {
            return Err(LayerError::Length { what: "layer file", found: file_bytes, expected });
        }
        let index_end = index.offset.checked_add(u64::from(index.bytes) + TRAILER_BYTES as u64);
        if trailer_kind != kind || index.offset < HEADER_BYTES as u64 || index_end != Some(file_bytes) {
            return Err(LayerError::Malformed("layer trailer"));
        }
        if range.is_empty() || !(lsns.after < lsns.through || kind == LayerKind::Image && lsns.after == lsns.through) {
            return Err(LayerError::Malformed("layer trailer: ranges"));
        }
        let description =
            LayerDescription { id: identity.id, kind, level, keys: range, lsns, file_bytes, values, chain_max };
        Ok(LayerFile { identity, description, index, keys, seed })
    }
}

fn key(fields: &mut Fields<'_>) -> Result<Key, LayerError> {
    fields.array::<KEY_BYTES>().map(Key::from_bytes)
}

pub(crate) fn encode_trailer(seed: u32, description: &LayerDescription, index: ByteRange, keys: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(TRAILER_BYTES);
    bytes.extend_from_slice(TRAILER_MAGIC);
    put(&mut bytes, VERSION);
    put(&mut bytes, kind_number(description.kind));
    put(&mut bytes, description.level);
    put(&mut bytes, description.chain_max);
    put(&mut bytes, description.file_bytes);
    put(&mut bytes, index.offset);
    put(&mut bytes, index.bytes);
    put(&mut bytes, keys);
    put(&mut bytes, description.values);
    put(&mut bytes, description.lsns.after.0);
    put(&mut bytes, description.lsns.through.0);
    bytes.extend_from_slice(&description.keys.begin.to_bytes());
    bytes.extend_from_slice(&description.keys.end.to_bytes());
    bytes.resize(TRAILER_BYTES - 4, 0);
    let crc = wal::crc32c(seed, &bytes);
    put(&mut bytes, crc);
    bytes
}
