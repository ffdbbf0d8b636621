//! Leaves of Gin's posting trees: lists of rows, compressed in segments.
//!
//! A row is a number of 43 bits, block and offset; a segment is its first row and the differences to the next ones, in 7
//! bits per byte. Source: `access/gin/ginpostinglist.c`, `ginRedoRecompress` (`access/gin/ginxlog.c`).

use crate::{
    RedoError,
    gin::{DATA_START, Opaque, flags},
    page::Page,
    reader::Reader,
};

const TID_BYTES: usize = 6;
/// Bytes in front of a segment's differences (`GinPostingList`): the first row and the length.
const SEGMENT_HEADER_BYTES: usize = 8;
const OFFSET_BITS: u32 = 11;
/// Bytes of the longest difference.
const DIFFERENCE_BYTES_MAX: usize = 7;

/// What is done to a segment.
mod action {
    pub const DELETE: u8 = 1;
    pub const INSERT: u8 = 2;
    pub const REPLACE: u8 = 3;
    pub const ADD_ITEMS: u8 = 4;
}

const BROKEN: RedoError = RedoError::Page("a segment of rows is broken");
const NO_ROOM: RedoError = RedoError::Page("it has no room for its rows");

fn row(tid: &[u8]) -> u64 {
    let word = |at: usize| u64::from(u16::from_le_bytes([tid[at], tid[at + 1]]));
    (word(0) << 16 | word(2)) << OFFSET_BITS | word(4) & ((1 << OFFSET_BITS) - 1)
}

fn tid(row: u64) -> [u8; TID_BYTES] {
    let block = (row >> OFFSET_BITS) as u32;
    let [hi0, hi1] = ((block >> 16) as u16).to_le_bytes();
    let [lo0, lo1] = (block as u16).to_le_bytes();
    let [offset0, offset1] = ((row & ((1 << OFFSET_BITS) - 1)) as u16).to_le_bytes();
    [hi0, hi1, lo0, lo1, offset0, offset1]
}

/// Takes a segment off the front, padded to a multiple of 2.
fn take_segment<'a>(segments: &mut Reader<'a>) -> Result<&'a [u8], RedoError> {
    let header = segments.rest().get(..SEGMENT_HEADER_BYTES).ok_or(BROKEN)?;
    let length = usize::from(u16::from_le_bytes([header[6], header[7]]));
    segments.take(SEGMENT_HEADER_BYTES + length + length % 2)
}

/// The rows of a segment (`ginPostingListDecode`); nothing behind a difference that is too long.
struct Rows<'a> {
    first: Option<u64>,
    last: u64,
    differences: &'a [u8],
}

impl<'a> Rows<'a> {
    fn of(segment: &'a [u8]) -> Rows<'a> {
        let length = usize::from(u16::from_le_bytes([segment[6], segment[7]]));
        let first = row(segment);
        Rows { first: Some(first), last: first, differences: &segment[SEGMENT_HEADER_BYTES..][..length] }
    }
}

impl Iterator for Rows<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        let length = self.differences.iter().position(|byte| byte & 0x80 == 0)? + 1;
        let (difference, rest) = self.differences.split_at(length);
        if length > DIFFERENCE_BYTES_MAX {
            return None;
        }
        let difference = difference.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7F));
        self.differences = rest;
        self.last = self.last.wrapping_add(difference);
        Some(self.last)
    }
}

/// Two ascending sequences as one, without doubles (`ginMergeItemPointers`).
struct Merged<A: Iterator<Item = u64>, B: Iterator<Item = u64>>(core::iter::Peekable<A>, core::iter::Peekable<B>);

impl<A: Iterator<Item = u64>, B: Iterator<Item = u64>> Iterator for Merged<A, B> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        match (self.0.peek(), self.1.peek()) {
            (Some(a), Some(b)) if a == b => {
                self.0.next();
                self.1.next()
            }
            (Some(a), Some(b)) if a > b => self.1.next(),
            (Some(_), _) => self.0.next(),
            (None, _) => self.1.next(),
        }
    }
}

/// What is built in place of the old segments.
struct Writer<'a> {
    page: &'a mut Page,
    at: usize,
    end: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), RedoError> {
        let end = self.at + bytes.len();
        if end > self.end {
            return Err(NO_ROOM);
        }
        self.page.0[self.at..end].copy_from_slice(bytes);
        self.at = end;
        Ok(())
    }

    /// Writes a segment of these rows (`ginCompressPostingList`).
    fn put_rows(&mut self, mut rows: impl Iterator<Item = u64>) -> Result<(), RedoError> {
        let first = rows.next().ok_or(BROKEN)?;
        let length_at = self.at + TID_BYTES;
        self.put(&tid(first))?;
        self.put(&[0, 0])?;
        let start = self.at;
        let mut last = first;
        for row in rows {
            let mut difference = row.checked_sub(last).filter(|difference| *difference > 0).ok_or(BROKEN)?;
            while difference > 0x7F {
                self.put(&[0x80 | (difference & 0x7F) as u8])?;
                difference >>= 7;
            }
            self.put(&[difference as u8])?;
            last = row;
        }
        let length = self.at - start;
        self.page.set_u16(length_at, length as u16);
        if !length.is_multiple_of(2) {
            self.put(&[0])?;
        }
        Ok(())
    }
}

/// Changes segments of a leaf by their numbers, which ascend (`ginRedoRecompress`).
pub(crate) fn recompress(page: &mut Page, data: &[u8]) -> Result<(), RedoError> {
    let opaque = Opaque::of(page)?;
    let old = page.clone();
    let mut old_rest = Reader::new(old.0.get(DATA_START..old.lower()).ok_or(BROKEN)?);
    let end = page.special();
    let mut written = Writer { page, at: DATA_START, end };
    let mut converted = None;
    if opaque.flags(&old) & flags::COMPRESSED == 0 {
        // A leaf of PostgreSQL before 9.4: plain rows, which become the only segment.
        let rows = usize::from(opaque.count(&old)) * TID_BYTES;
        let rows = old.0.get(DATA_START..DATA_START + rows).ok_or(BROKEN)?;
        if !rows.is_empty() {
            written.put_rows(rows.chunks_exact(TID_BYTES).map(row))?;
        }
        opaque.set_flag(written.page, flags::COMPRESSED, true);
        opaque.set_count(written.page, 0);
        let copy = written.page.clone();
        converted = Some((copy, written.at));
        written.at = DATA_START;
    }
    if let Some((copy, end)) = &converted {
        old_rest = Reader::new(&copy.0[DATA_START..*end]);
    }

    let mut data = Reader::new(data);
    let mut number = 0;
    for _ in 0..data.u16()? {
        let (segment, action) = (data.u8()?, data.u8()?);
        while number < segment {
            written.put(take_segment(&mut old_rest)?)?;
            number += 1;
        }
        match action {
            action::DELETE => drop(take_segment(&mut old_rest)?),
            action::INSERT => written.put(take_segment(&mut data)?)?,
            action::REPLACE => {
                written.put(take_segment(&mut data)?)?;
                take_segment(&mut old_rest)?;
            }
            action::ADD_ITEMS => {
                let count = usize::from(data.u16()?);
                let added = data.take(count * TID_BYTES)?.chunks_exact(TID_BYTES).map(row);
                let rows = Rows::of(take_segment(&mut old_rest)?);
                written.put_rows(Merged(added.peekable(), rows.peekable()))?;
            }
            _ => return Err(RedoError::Record("it does something unknown to a segment")),
        }
        if action != action::INSERT {
            number = number.checked_add(1).ok_or(BROKEN)?;
        }
    }
    written.put(old_rest.rest())?;
    let lower = written.at;
    page.set_lower(lower);
    Ok(())
}
