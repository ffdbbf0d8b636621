//! The length of a fork within one stripe: the value under a [`layers::KeyKind::StripeSize`] key.

use alloc::vec::Vec;

use layers::{Key, KeyKind, Striping};
use pgtypes::Lsn;

/// Bytes of a stripe's length: `length u32, floor u64`.
pub const STRIPE_SIZE_BYTES: usize = 12;

/// What there is of a fork in one stripe. A stripe without a value, or whose newest is `Absent`, has nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StripeSize {
    /// Blocks of the fork in this stripe, from its first on. 0 only in stripe 0, whose value says that the fork exists.
    pub length: u32,
    /// Changes at or before this position belong to an earlier relation of the name, or to blocks that were cut off.
    /// [`Lsn::INVALID`] if there was none.
    pub floor: Lsn,
}

/// The bytes are no length of a stripe.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("length of a stripe: {0} bytes instead of {STRIPE_SIZE_BYTES}")]
pub struct StripeSizeError(pub usize);

impl StripeSize {
    /// The value.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(STRIPE_SIZE_BYTES);
        bytes.extend_from_slice(&self.length.to_le_bytes());
        bytes.extend_from_slice(&self.floor.0.to_le_bytes());
        bytes
    }

    /// Reads the value.
    ///
    /// # Errors
    /// It has another length.
    pub fn from_bytes(value: &[u8]) -> Result<StripeSize, StripeSizeError> {
        let error = StripeSizeError(value.len());
        let (length, floor) = value.split_first_chunk::<4>().ok_or(error)?;
        let floor: [u8; 8] = floor.try_into().map_err(|_| error)?;
        Ok(StripeSize { length: u32::from_le_bytes(*length), floor: Lsn(u64::from_le_bytes(floor)) })
    }

    /// Whether the fork reaches to `block`, which lies in this stripe.
    pub fn has_block(self, striping: Striping, block: u32) -> bool {
        block % striping.stripe_blocks < self.length
    }
}

/// Where the length of the stripe that a block lies in is kept, and the block's number; `None` for other keys.
pub fn stripe_size_key_of(striping: Striping, key: Key) -> Option<(Key, u32)> {
    match key.kind() {
        Ok(KeyKind::Block { relation, fork, block }) => {
            Some((striping.stripe_size(relation, fork, striping.stripe_of(block)), block))
        }
        _ => None,
    }
}
