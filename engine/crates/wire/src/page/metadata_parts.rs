//! Cuts metadata into frames, and puts it together again.
//!
//! A value may be longer than a frame: the state of a prepared transaction has no bound but 1 GiB.

use alloc::vec::Vec;
use core::mem;

use layers::{KEY_BYTES, Key, VALUE_BYTES_MAX};
use pgtypes::Lsn;

use super::{MetadataPart, MetadataPiece};

/// Bytes of pieces in one part at most: with its fields it stays below the limit of a frame.
const PART_BYTES: usize = (1 << 20) - 1024;
/// Bytes that the values of one answer may have together, 4 GiB: as many prepared transactions as that need a machine
/// whose memory holds them anyway. Beyond it the server does not make sense.
const TOTAL_BYTES_MAX: u64 = 4 << 30;

/// The parts of an answer, in order; one at least. Each is within the limit of a frame.
pub fn metadata_parts<'a>(id: u64, lsn: Lsn, values: &[(Key, &'a [u8])]) -> Vec<MetadataPart<'a>> {
    let mut parts = Vec::new();
    let mut pieces = Vec::new();
    let mut room = PART_BYTES;
    for (key, value) in values {
        let mut rest = *value;
        loop {
            // A piece is not begun for a few bytes.
            if room < MetadataPiece::HEADER_BYTES + rest.len().min(PART_BYTES / 2) {
                parts.push(MetadataPart { id, lsn, pieces: mem::take(&mut pieces), last: false });
                room = PART_BYTES;
            }
            let (bytes, later) = rest.split_at(rest.len().min(room - MetadataPiece::HEADER_BYTES));
            room -= MetadataPiece::HEADER_BYTES + bytes.len();
            pieces.push(MetadataPiece { key: *key, continues: !later.is_empty(), bytes });
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
    }
    parts.push(MetadataPart { id, lsn, pieces, last: true });
    parts
}

/// The parts of an answer do not fit together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MetadataJoinError {
    /// A piece that goes on with another value than the one before.
    #[error("metadata: a value is broken off")]
    BrokenOff,
    /// Keys that do not rise.
    #[error("metadata: keys do not rise")]
    Unordered,
    /// Parts as of different positions.
    #[error("metadata: parts as of different positions")]
    Position,
    /// A value above 1 GiB, or all of them above 4 GiB.
    #[error("metadata: too long")]
    TooLong,
}

/// Puts the parts of one answer together.
#[derive(Debug, Default)]
pub struct MetadataJoin {
    values: Vec<(Key, Vec<u8>)>,
    continues: bool,
    lsn: Option<Lsn>,
    total_bytes: u64,
}

impl MetadataJoin {
    /// Adds the next part; returns position and values when it was the last one.
    ///
    /// # Errors
    /// The peer's fault; the answer is of no use then.
    #[expect(clippy::type_complexity, reason = "position and values")]
    pub fn add(&mut self, part: &MetadataPart<'_>) -> Result<Option<(Lsn, Vec<(Key, Vec<u8>)>)>, MetadataJoinError> {
        if *self.lsn.get_or_insert(part.lsn) != part.lsn {
            return Err(MetadataJoinError::Position);
        }
        for piece in &part.pieces {
            self.total_bytes += (piece.bytes.len() + KEY_BYTES) as u64;
            if self.total_bytes > TOTAL_BYTES_MAX {
                return Err(MetadataJoinError::TooLong);
            }
            match self.values.last_mut() {
                Some((key, value)) if self.continues => {
                    if *key != piece.key {
                        return Err(MetadataJoinError::BrokenOff);
                    }
                    if value.len() + piece.bytes.len() > VALUE_BYTES_MAX {
                        return Err(MetadataJoinError::TooLong);
                    }
                    value.extend_from_slice(piece.bytes);
                }
                Some((key, _)) if *key >= piece.key => return Err(MetadataJoinError::Unordered),
                _ => self.values.push((piece.key, piece.bytes.to_vec())),
            }
            self.continues = piece.continues;
        }
        if !part.last {
            return Ok(None);
        }
        if self.continues {
            return Err(MetadataJoinError::BrokenOff);
        }
        Ok(Some((part.lsn, mem::take(&mut self.values))))
    }
}
