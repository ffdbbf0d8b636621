//! Writes one stream of values as a row of layers that leave no key out.

use alloc::{
    boxed::Box,
    collections::{BTreeSet, VecDeque},
    vec::Vec,
};

use pgtypes::Lsn;

use crate::{
    error::PutError,
    identity::{LayerId, LayerIdentity, LayerKind, LsnRange, ValueKind},
    key::{Key, KeyRange},
    writer::{FinishedLayer, LayerWriter},
};

/// What a [`SplitWriter`] made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LayerOutput {
    /// The next bytes of a layer's file.
    Bytes(LayerId, Vec<u8>),
    /// The last bytes of the file that the bytes before began, and what it is.
    Finished(Box<FinishedLayer>),
}

/// Where a row of layers is cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Split {
    /// The keys that the row answers for, together.
    pub keys: KeyRange,
    /// A layer begins at each of these keys.
    pub cuts: BTreeSet<Key>,
    /// A layer also ends with the key that takes it to this size.
    pub layer_bytes_target: u64,
}

/// Writes a row of layers. The numbers of its layers follow each other.
#[derive(Debug)]
pub struct SplitWriter {
    split: Split,
    kind: LayerKind,
    lsns: LsnRange,
    next: LayerIdentity,
    writer: LayerWriter,
    outputs: VecDeque<LayerOutput>,
}

impl SplitWriter {
    /// Delta layers of level 1; the first is `first`, the others have the numbers behind it.
    pub fn deltas(first: LayerIdentity, split: Split, lsns: LsnRange) -> SplitWriter {
        SplitWriter::new(first, split, LayerKind::Delta, lsns)
    }

    /// Image layers at `lsn`.
    pub fn images(first: LayerIdentity, split: Split, lsn: Lsn) -> SplitWriter {
        SplitWriter::new(first, split, LayerKind::Image, LsnRange { after: lsn, through: lsn })
    }

    fn new(first: LayerIdentity, mut split: Split, kind: LayerKind, lsns: LsnRange) -> SplitWriter {
        let keys = split.keys;
        split.cuts.retain(|cut| keys.begin < *cut && *cut < keys.end);
        let writer = begin(first, kind, keys.begin, lsns);
        SplitWriter { split, kind, lsns, next: after(first), writer, outputs: VecDeque::new() }
    }

    /// Adds a value; the rules are those of [`LayerWriter::push`].
    ///
    /// # Errors
    /// Out of order, of another range, too large. The row is then of no use.
    pub fn push(&mut self, key: Key, lsn: Lsn, kind: ValueKind, value: &[u8]) -> Result<(), PutError> {
        if !self.split.keys.contains(key) {
            return Err(PutError::OutOfRange);
        }
        while self.split.cuts.first().is_some_and(|cut| *cut <= key) {
            if let Some(cut) = self.split.cuts.pop_first() {
                self.cut(cut)?;
            }
        }
        let is_full = self.writer.bytes() >= self.split.layer_bytes_target || self.writer.is_full();
        if is_full && self.writer.last_key().is_some_and(|last| last < key) {
            self.cut(key)?;
        }
        self.writer.push(key, lsn, kind, value)?;
        let bytes = self.writer.take_output();
        if !bytes.is_empty() {
            self.outputs.push_back(LayerOutput::Bytes(self.writer.id(), bytes));
        }
        Ok(())
    }

    /// Ends the layer before `key` and begins the one from it on.
    fn cut(&mut self, key: Key) -> Result<(), PutError> {
        let following = begin(self.next, self.kind, key, self.lsns);
        self.next = after(self.next);
        let finished = core::mem::replace(&mut self.writer, following).finish(key)?;
        self.outputs.push_back(LayerOutput::Finished(Box::new(finished)));
        Ok(())
    }

    /// What can be written to files; to be taken after each [`SplitWriter::push`], which else makes it grow.
    pub fn poll_output(&mut self) -> Option<LayerOutput> {
        self.outputs.pop_front()
    }

    /// Ends the row, and with it the last layers.
    ///
    /// # Errors
    /// Never, if every push succeeded.
    pub fn finish(mut self) -> Result<VecDeque<LayerOutput>, PutError> {
        while let Some(cut) = self.split.cuts.pop_first() {
            self.cut(cut)?;
        }
        let finished = self.writer.finish(self.split.keys.end)?;
        self.outputs.push_back(LayerOutput::Finished(Box::new(finished)));
        Ok(self.outputs)
    }
}

fn begin(identity: LayerIdentity, kind: LayerKind, begin: Key, lsns: LsnRange) -> LayerWriter {
    match kind {
        LayerKind::Delta => LayerWriter::delta(identity, 1, begin, lsns),
        LayerKind::Image => LayerWriter::image(identity, begin, lsns.through),
    }
}

fn after(identity: LayerIdentity) -> LayerIdentity {
    LayerIdentity { id: LayerId { number: identity.id.number + 1, ..identity.id }, ..identity }
}
