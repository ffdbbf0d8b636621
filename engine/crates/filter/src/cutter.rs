//! Makes the batches of one shard.

use alloc::vec::Vec;

use layers::{HashRange, Striping};
use pgtypes::{FrameSummary, Lsn, Term};
use wal::Fork;

use crate::{
    batch::{Batch, Item},
    route::{has_hash, hash_of},
    router::Routed,
};

/// A batch is full with this many bytes of items: 1 MiB. Its last item may be longer than that.
pub const BATCH_BYTES: usize = 1 << 20;

/// What an item counts beside its stored bytes.
pub const ITEM_OVERHEAD_BYTES: usize = 48;

/// Collects what one shard needs.
#[derive(Debug)]
pub struct Cutter {
    range: HashRange,
    striping: Striping,
    /// End of the batch before.
    after: Lsn,
    summary: FrameSummary,
    items: Vec<Item>,
    bytes: usize,
}

impl Cutter {
    /// Begins behind `from`, which the shard has.
    pub fn new(from: FrameSummary, range: HashRange, striping: Striping) -> Cutter {
        Cutter { range, striping, after: from.record_end, summary: from, items: Vec::new(), bytes: 0 }
    }

    /// The record end up to which records were seen.
    pub fn through(&self) -> Lsn {
        self.summary.record_end
    }

    /// What the log adds up to there.
    pub fn summary(&self) -> FrameSummary {
        self.summary
    }

    /// Whether the batch is to be taken before more is pushed.
    pub fn is_full(&self) -> bool {
        self.bytes >= BATCH_BYTES
    }

    /// Bytes that wait in the batch.
    pub fn waiting_bytes(&self) -> usize {
        self.bytes
    }

    /// Takes what the shard needs of the next record.
    pub fn push(&mut self, routed: &Routed) {
        let Routed { record, route, summary } = routed;
        if route.concerns(self.range) {
            let stored = record.to_stored(|block| {
                let tag = redo::BlockTag { relation: block.relation, fork: block.fork, block: block.block };
                block.fork != Fork::FreeSpaceMap && has_hash(self.range, hash_of(tag, self.striping))
            });
            self.bytes += stored.len() + ITEM_OVERHEAD_BYTES;
            self.items.push(Item { start: record.info.start, end: record.info.end, stored });
        }
        self.advance(*summary);
    }

    /// No record up to `summary` concerns the shard but those that were pushed.
    pub fn advance(&mut self, summary: FrameSummary) {
        debug_assert!(summary.record_end >= self.summary.record_end);
        self.summary = summary;
    }

    /// Everything since the last batch; `None` when no record has ended since.
    pub fn take_batch(&mut self, commit_lsn: Lsn, term: Term) -> Option<Batch> {
        let through = self.summary.record_end;
        if through == self.after {
            return None;
        }
        let after = core::mem::replace(&mut self.after, through);
        self.bytes = 0;
        let items = core::mem::take(&mut self.items);
        Some(Batch { after, through, term, commit_lsn: commit_lsn.max(through), summary: self.summary, items })
    }
}
