//! The frame around everything between header and trailer of a layer file: codec, length, checksum.

use alloc::vec::Vec;

use crate::{error::LayerError, format::put};

/// Bytes of a frame beside its payload: codec, 3 zeros, u32 raw length in front, CRC-32C behind.
pub const FRAME_BYTES: usize = 12;
const HEAD_BYTES: usize = 8;

/// Persisted numbers of codecs.
const PLAIN: u8 = 0;
const LZ4: u8 = 1;

/// An upper bound of lz4: one byte of input stands for at most 255 of output. Bounds what a decoder allocates.
const LZ4_RATIO_MAX: usize = 255;

/// Frames `raw` for `offset` of the file whose header has the checksum `seed`. Compressed where it saves an eighth.
pub fn encode(seed: u32, offset: u64, raw: &[u8]) -> Vec<u8> {
    let compressed = lz4_flex::block::compress(raw);
    let pays = compressed.len() < raw.len() - raw.len() / 8;
    let (codec, payload) = if pays { (LZ4, &compressed[..]) } else { (PLAIN, raw) };
    let mut bytes = Vec::with_capacity(payload.len() + FRAME_BYTES);
    bytes.extend_from_slice(&[codec, 0, 0, 0]);
    put(&mut bytes, raw.len() as u32);
    bytes.extend_from_slice(payload);
    let crc = checksum(seed, offset, &bytes);
    put(&mut bytes, crc);
    bytes
}

/// What [`encode`] framed.
///
/// # Errors
/// The checksum does not match: damage, or another file, or another place. Allocates at most 255 times what it was given.
pub fn decode(what: &'static str, seed: u32, offset: u64, bytes: &[u8]) -> Result<Vec<u8>, LayerError> {
    let short = LayerError::Length { what, found: bytes.len() as u64, expected: FRAME_BYTES as u64 };
    let (framed, crc) = bytes.split_last_chunk::<4>().ok_or(short)?;
    let (head, payload) = framed.split_first_chunk::<HEAD_BYTES>().ok_or(short)?;
    if u32::from_le_bytes(*crc) != checksum(seed, offset, framed) {
        return Err(LayerError::Checksum { what });
    }
    let [codec, 0, 0, 0, a, b, c, d] = *head else { return Err(LayerError::Malformed("block: reserved bytes")) };
    let raw_bytes = u32::from_le_bytes([a, b, c, d]) as usize;
    match codec {
        PLAIN if raw_bytes == payload.len() => Ok(payload.to_vec()),
        LZ4 if raw_bytes <= payload.len().saturating_mul(LZ4_RATIO_MAX) => {
            let raw = lz4_flex::block::decompress(payload, raw_bytes);
            raw.ok().filter(|raw| raw.len() == raw_bytes).ok_or(LayerError::Malformed("block: lz4"))
        }
        PLAIN | LZ4 => Err(LayerError::Malformed("block: length")),
        _ => Err(LayerError::Malformed("block: codec")),
    }
}

fn checksum(seed: u32, offset: u64, framed: &[u8]) -> u32 {
    wal::crc32c(wal::crc32c(wal::crc32c(0, &seed.to_le_bytes()), &offset.to_le_bytes()), framed)
}
