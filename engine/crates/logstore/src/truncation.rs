//! Cutting the end of a log off, so that nothing that was behind it can ever be taken for a part of it.
//!
//! Old records would be: a record's only link is the position of the one before, and the record that a new writer
//! puts in front may have the length of the old one. So everything from the cut to the highest byte ever written is
//! zeroed and synced, and later segments are removed, before the first new byte is accepted.

use alloc::{boxed::Box, vec::Vec};

use pgtypes::{FrameSummary, Lsn};
use wal::Scanner;

use crate::{
    buffer::Buffer,
    command::OpId,
    segment::{BLOCK_BYTES, Geometry},
};

/// What is done at present.
#[derive(Debug)]
pub(crate) enum Step {
    /// Operations that were begun before end first.
    Quiesce,
    /// Reads from a known record end up to the cut: what the records before it add up to must be known.
    Scan { scanner: Box<Scanner>, next: Lsn },
    /// Reads the block of the cut, the first bytes of which stay.
    ReadTail,
    /// Writes the block of the cut, and zeros from `next` on.
    Zero { next: Lsn, tail_written: bool },
    /// Removes the segments behind.
    Remove,
    /// Syncs the segment of the cut.
    Sync,
    /// All of it is durable.
    Done,
}

#[derive(Debug)]
pub(crate) struct Truncation {
    pub(crate) to: Lsn,
    pub(crate) step: Step,
    /// The operation under way.
    pub(crate) op: Option<OpId>,
    /// Known at the end.
    pub(crate) summary: Option<FrameSummary>,
    /// Bytes of the block of the cut before it, once known.
    pub(crate) tail: Option<Vec<u8>>,
    /// Zeros are needed up to here.
    pub(crate) zero_until: Lsn,
    /// Nobody knows what is behind: read before zeroing, most of it is zero already.
    pub(crate) look_first: bool,
    /// Something was written, so a sync is needed.
    pub(crate) wrote: bool,
}

impl Truncation {
    pub(crate) fn new(to: Lsn) -> Truncation {
        Truncation {
            to,
            step: Step::Quiesce,
            op: None,
            summary: None,
            tail: None,
            zero_until: to,
            look_first: false,
            wrote: false,
        }
    }

    /// First block that is zeroed as a whole.
    pub(crate) fn first_zero_block(&self) -> Lsn {
        Lsn(self.to.0.next_multiple_of(BLOCK_BYTES))
    }

    /// Length of the piece at `next`, which ends with its segment and with `until` rounded up to a block.
    pub(crate) fn piece(geometry: Geometry, next: Lsn, until: Lsn) -> usize {
        let wanted = until.bytes_since(next).next_multiple_of(BLOCK_BYTES);
        let in_segment = geometry.segment_bytes - next.offset_in(geometry.segment_bytes);
        wanted.min(in_segment).min(geometry.write_bytes_max as u64) as usize
    }

    /// The block of the cut as it has to be: what stays, then zeros.
    pub(crate) fn tail_block(&self) -> Option<Buffer> {
        self.tail.as_ref().filter(|tail| !tail.is_empty()).map(|tail| Buffer::padded(tail))
    }
}
