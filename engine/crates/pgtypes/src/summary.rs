//! The frame summary: what is known about the log up to a position.

use crate::{Lsn, PgTimeline};

/// What every record up to `record_end` adds up to. Part of every position that is stored or sent.
///
/// A cold start needs all of it, and none of it can be had from a filtered log
/// (`docs/design`: a transaction id may appear in no record that a shard sees).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FrameSummary {
    /// End of the last complete record, aligned to 8 bytes: the position itself.
    pub record_end: Lsn,
    /// Start of that record: `xl_prev` of the next one. [`Lsn::INVALID`] when no record was seen yet.
    pub record_start: Lsn,
    /// PostgreSQL timeline of the last record.
    pub timeline: PgTimeline,
    /// Largest transaction id seen, 64 bits with its epoch (`FullTransactionId`).
    pub max_full_xid: u64,
    /// Latest commit or abort time, microseconds since 2000-01-01 UTC (`TimestampTz`); 0 when none was seen.
    pub commit_timestamp: i64,
}
