//! Reading and writing of little-endian fields, shared by the messages of the append protocol.

use alloc::{string::String, vec::Vec};

use crate::append::WireError;

/// Takes fields from the front of a body; an error names the field that was cut short or out of range.
pub(crate) struct Taker<'a> {
    rest: &'a [u8],
}

impl<'a> Taker<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Taker { rest: bytes }
    }

    pub(crate) fn bytes(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        if count > self.rest.len() {
            return Err(WireError::Truncated { field });
        }
        let (taken, rest) = self.rest.split_at(count);
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N, field)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn i64(&mut self, field: &'static str) -> Result<i64, WireError> {
        Ok(i64::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::BadValue { field }),
        }
    }

    /// A count of entries of at least `entry_bytes` each: refused when the rest of the body cannot hold them, so that
    /// no allocation is made by a number that a peer invented.
    pub(crate) fn count(&mut self, entry_bytes: usize, field: &'static str) -> Result<usize, WireError> {
        let count = self.u32(field)? as usize;
        match count.checked_mul(entry_bytes) {
            Some(needed) if needed <= self.rest.len() => Ok(count),
            _ => Err(WireError::Truncated { field }),
        }
    }

    /// UTF-8 text of at most 65,535 bytes.
    pub(crate) fn text(&mut self, field: &'static str) -> Result<String, WireError> {
        let length = self.u16(field)? as usize;
        let text = core::str::from_utf8(self.bytes(length, field)?).map_err(|_| WireError::BadValue { field })?;
        Ok(String::from(text))
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.rest)
    }

    /// Refuses bytes behind the last field.
    pub(crate) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::TrailingBytes { count: self.rest.len() }) }
    }
}

/// Appends fields to a body.
pub(crate) trait Put {
    fn put(&mut self, bytes: &[u8]);
    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }
    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }
    fn put_i64(&mut self, value: i64) {
        self.put(&value.to_le_bytes());
    }
    fn put_count(&mut self, count: usize) {
        // A count that does not fit belongs to a body far above the frame limit, which the encoder refuses.
        self.put_u32(u32::try_from(count).unwrap_or(u32::MAX));
    }
    /// Text is cut at the last character that fits into 65,535 bytes: only error texts can be that long.
    fn put_text(&mut self, text: &str) {
        let mut length = text.len().min(u16::MAX as usize);
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        self.put_u16(length as u16);
        self.put(&text.as_bytes()[..length]);
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
