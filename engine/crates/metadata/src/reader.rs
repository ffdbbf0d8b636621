//! Little-endian numbers out of a record's data, in order, never past its end.

use crate::MetadataError;

/// What is left of a record's data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub fn take(&mut self, length: usize) -> Result<&'a [u8], MetadataError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(MetadataError::Record("its data end too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub fn skip(&mut self, length: usize) -> Result<(), MetadataError> {
        self.take(length).map(|_| ())
    }

    /// Passes over an array: its count, and so many items of `item_bytes`.
    pub fn skip_array(&mut self, item_bytes: usize) -> Result<(), MetadataError> {
        let count = self.u32()? as usize;
        self.skip(count.saturating_mul(item_bytes))
    }

    pub fn bool(&mut self) -> Result<bool, MetadataError> {
        Ok(self.take(1)?[0] != 0)
    }

    pub fn u16(&mut self) -> Result<u16, MetadataError> {
        self.take(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    pub fn u32(&mut self) -> Result<u32, MetadataError> {
        self.take(4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub fn u64(&mut self) -> Result<u64, MetadataError> {
        Ok(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }

    /// Number of an SLRU page, 64 bits in WAL since PostgreSQL 17 although none is above 32.
    pub fn page(&mut self) -> Result<u32, MetadataError> {
        u32::try_from(self.u64()?).map_err(|_| MetadataError::Record("there is no such page"))
    }

    /// Passes over a string and its terminator.
    pub fn skip_string(&mut self) -> Result<(), MetadataError> {
        let length = self.0.iter().position(|byte| *byte == 0);
        self.skip(length.ok_or(MetadataError::Record("a string has no end"))? + 1)
    }
}

/// The 32-bit numbers of an array.
pub(crate) fn u32s(bytes: &[u8]) -> impl DoubleEndedIterator<Item = u32> + ExactSizeIterator {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}
