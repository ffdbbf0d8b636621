//! What a shard is sent.

use alloc::vec::Vec;

use pgtypes::{FrameSummary, Lsn, Term};

/// Everything that a stretch of committed WAL says to one shard.
///
/// Batches follow each other without a gap: a shard that has `after` and gets this has `through`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    /// `through` of the batch before.
    pub after: Lsn,
    /// The record end up to which all is said; equal to `after` in a heartbeat.
    pub through: Lsn,
    /// The highest term that the sender was fenced to or voted for: a page server refuses writers of lower ones.
    pub term: Term,
    /// Committed, as far as the sender knows; at or above `through`.
    pub commit_lsn: Lsn,
    /// What the whole log, not only this shard's part of it, adds up to at `through`.
    pub summary: FrameSummary,
    /// The shard's records, in order.
    pub items: Vec<Item>,
}

/// A record, as a shard needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// Start of the record.
    pub start: Lsn,
    /// Its end: the LSN of every value that comes from it.
    pub end: Lsn,
    /// [`wal::Record::to_stored`]: with data and images of the shard's own blocks only.
    pub stored: Vec<u8>,
}

impl Batch {
    /// A batch that says nothing new but term and commit position. `summary` is that of the position that the shard has.
    pub fn heartbeat(summary: FrameSummary, commit_lsn: Lsn, term: Term) -> Batch {
        let at = summary.record_end;
        Batch { after: at, through: at, term, commit_lsn: commit_lsn.max(at), summary, items: Vec::new() }
    }
}
