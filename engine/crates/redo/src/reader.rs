//! Little-endian numbers out of a record's data, in order, never past its end.

use crate::RedoError;

/// What is left of a record's data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub fn take(&mut self, length: usize) -> Result<&'a [u8], RedoError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(RedoError::Record("its data end too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub fn u8(&mut self) -> Result<u8, RedoError> {
        Ok(self.take(1)?[0])
    }

    pub fn u16(&mut self) -> Result<u16, RedoError> {
        let bytes = self.take(2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    pub fn u32(&mut self) -> Result<u32, RedoError> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub fn skip(&mut self, length: usize) -> Result<(), RedoError> {
        self.take(length).map(|_| ())
    }

    /// An array of `count` numbers.
    pub fn u16s(&mut self, count: usize) -> Result<U16s<'a>, RedoError> {
        Ok(U16s(self.take(2 * count)?))
    }

    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// # Errors
    /// When something is left.
    pub fn finish(&self) -> Result<(), RedoError> {
        if self.0.is_empty() { Ok(()) } else { Err(RedoError::Record("its data are too long")) }
    }
}

/// An array of 16-bit numbers that need not be aligned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct U16s<'a>(&'a [u8]);

impl<'a> U16s<'a> {
    pub fn new(bytes: &'a [u8]) -> U16s<'a> {
        U16s(bytes)
    }

    pub fn len(&self) -> usize {
        self.0.len() / 2
    }

    /// The number at `index`; `None` behind the end.
    pub fn get(&self, index: usize) -> Option<u16> {
        let bytes = self.0.get(2 * index..2 * index + 2)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u16> {
        self.0.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }
}
