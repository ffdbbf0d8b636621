//! When and in which order the copies of the control file are written.
//!
//! Knows nothing about what is in them. Both copies are always written, one after the other: the one that is not known
//! to be good first.

use pgtypes::{FrameSummary, Lsn};

use crate::{buffer::Buffer, command::OpId};

/// What a write of both copies makes durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Contents {
    /// Of the acceptor's state.
    pub(crate) acceptor_sequence: u64,
    pub(crate) scan_start: FrameSummary,
    pub(crate) oldest_lsn: Lsn,
    pub(crate) sealed_lsn: Lsn,
    pub(crate) consumers_version: u64,
}

#[derive(Debug)]
struct Writing {
    op: OpId,
    copy: u8,
    contents: Contents,
    /// Copies written with these contents so far.
    done: u8,
}

#[derive(Debug)]
pub(crate) struct ControlWriter {
    /// Of the file as last begun.
    sequence: u64,
    /// Durable in both copies; `None` while they are not known to be equal.
    durable: Option<Contents>,
    /// The copy to write first.
    first_copy: u8,
    writing: Option<Writing>,
    /// Handed back because the disk was full.
    stalled: Option<Buffer>,
    /// To be written at once, not lazily.
    urgent: bool,
}

impl ControlWriter {
    /// `good_copy`: the one that counts, if any; `durable`: contents of both if they are equal.
    pub(crate) fn new(sequence: u64, good_copy: Option<u8>, durable: Option<Contents>) -> ControlWriter {
        let first_copy = good_copy.map_or(0, |copy| 1 - copy);
        ControlWriter { sequence, durable, first_copy, writing: None, stalled: None, urgent: durable.is_none() }
    }

    pub(crate) fn durable(&self) -> Option<&Contents> {
        self.durable.as_ref()
    }

    /// Contents are to be written as soon as no write is running.
    pub(crate) fn demand(&mut self) {
        self.urgent = true;
    }

    pub(crate) fn wants_write(&self) -> bool {
        self.urgent && self.writing.is_none()
    }

    pub(crate) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Sequence of the next file.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.sequence + 1
    }

    /// Begins a write of `contents`; returns which copy is first.
    pub(crate) fn begin(&mut self, op: OpId, contents: Contents) -> u8 {
        self.sequence += 1;
        self.urgent = false;
        let copy = self.first_copy;
        self.writing = Some(Writing { op, copy, contents, done: 0 });
        copy
    }

    /// A copy is durable. Returns the other copy, if it is still to be written (as `next_op`).
    pub(crate) fn handle_written(&mut self, next_op: OpId) -> Option<u8> {
        let writing = self.writing.as_mut()?;
        writing.done += 1;
        if writing.done < 2 {
            writing.copy = 1 - writing.copy;
            writing.op = next_op;
            return Some(writing.copy);
        }
        self.durable = Some(writing.contents);
        self.writing = None;
        None
    }

    /// The disk was full: the same copy is written again later.
    pub(crate) fn stall(&mut self, buffer: Buffer) {
        self.stalled = Some(buffer);
    }

    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// What is to be written again: the operation, the copy, its contents.
    pub(crate) fn take_stalled(&mut self) -> Option<(OpId, u8, Buffer)> {
        let writing = self.writing.as_ref()?;
        let buffer = self.stalled.take()?;
        Some((writing.op, writing.copy, buffer))
    }
}
