//! Histories of a log: which ballot wrote, and which PostgreSQL timeline covers, which part.

use alloc::vec::Vec;

use pgtypes::{Ballot, Lsn};

use crate::message::TimelineEntry;

/// From `start_lsn` on the log was written by `ballot`, until the next entry's start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TermEntry {
    /// Who.
    pub ballot: Ballot,
    /// Since where: the end of the log when it was elected.
    pub start_lsn: Lsn,
}

/// Term history: ballots rise strictly, starts never fall. At most 1 entry per election.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct TermHistory(pub Vec<TermEntry>);

/// PostgreSQL timelines of the log in order of their start.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct TimelineHistory(pub Vec<TimelineEntry>);

impl TermHistory {
    /// The ballot that an acceptor whose log ends at `flush_lsn` votes with: the last whose start is at or below it.
    pub fn ballot_at(&self, flush_lsn: Lsn) -> Ballot {
        self.0.iter().rev().find(|entry| entry.start_lsn <= flush_lsn).map_or(Ballot::default(), |entry| entry.ballot)
    }
}
