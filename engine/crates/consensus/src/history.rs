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

/// Term history: ballots rise strictly, starts never fall. At most 1 entry per election that wrote something, and one
/// for the last.
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

    /// Where two logs with these histories part at the latest; `None` when the histories are equal.
    ///
    /// A ballot has one history, fixed when it was elected, so logs whose histories agree up to an entry agree up to
    /// the start of the first entry that one of them does not have.
    pub fn parts_from(&self, other: &TermHistory) -> Option<Lsn> {
        let same = self.0.iter().zip(&other.0).take_while(|(mine, theirs)| mine == theirs).count();
        [self.0.get(same), other.0.get(same)].into_iter().flatten().map(|entry| entry.start_lsn).min()
    }

    /// The history of the log that ends at `start_lsn` and is continued by `ballot` from there.
    ///
    /// Ballots that wrote nothing leave no entry, so the history grows with what was written, not with restarts.
    pub fn continued(&self, ballot: Ballot, start_lsn: Lsn) -> TermHistory {
        let wrote = |entry: &&TermEntry| entry.start_lsn < start_lsn;
        let mut entries: Vec<TermEntry> = self.0.iter().take_while(wrote).copied().collect();
        entries.push(TermEntry { ballot, start_lsn });
        TermHistory(entries)
    }

    /// Whether ballots rise strictly and starts never fall.
    pub fn is_ordered(&self) -> bool {
        self.0.windows(2).all(|pair| pair[0].ballot < pair[1].ballot && pair[0].start_lsn <= pair[1].start_lsn)
    }
}

impl TimelineHistory {
    /// Drops timelines that begin at or behind `end_lsn`, where the log ends; the first always stays.
    pub fn truncate(&mut self, end_lsn: Lsn) {
        let mut first = true;
        self.0.retain(|entry| core::mem::take(&mut first) || entry.start_lsn < end_lsn);
    }

    /// Whether timelines rise strictly and starts never fall.
    pub fn is_ordered(&self) -> bool {
        self.0.windows(2).all(|pair| pair[0].timeline < pair[1].timeline && pair[0].start_lsn <= pair[1].start_lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgtypes::{Attempt, PgTimeline, Term};

    fn history(entries: &[(u64, u64)]) -> TermHistory {
        TermHistory(
            entries.iter().map(|&(term, lsn)| TermEntry { ballot: ballot(term), start_lsn: Lsn(lsn) }).collect(),
        )
    }

    fn ballot(term: u64) -> Ballot {
        Ballot { term: Term(term), attempt: Attempt(1) }
    }

    #[test]
    fn last_ballot_is_the_last_that_starts_at_or_below_the_end() {
        let history = history(&[(1, 0), (2, 16), (3, 16), (4, 32)]);

        for (end, term) in [(0, 1), (8, 1), (16, 3), (24, 3), (32, 4), (99, 4)] {
            assert_eq!(ballot(term), history.ballot_at(Lsn(end)), "{end}");
        }
        assert_eq!(Ballot::default(), TermHistory::default().ballot_at(Lsn(8)));
    }

    #[test]
    fn logs_part_at_the_first_entry_that_one_does_not_have() {
        type Case = (&'static [(u64, u64)], &'static [(u64, u64)], Option<u64>);
        let cases: [Case; 6] = [
            (&[(1, 0)], &[(1, 0)], None),
            (&[], &[(1, 0)], Some(0)),
            (&[(1, 0)], &[(1, 0), (2, 16)], Some(16)),
            (&[(1, 0), (2, 16)], &[(1, 0)], Some(16)),
            (&[(1, 0), (2, 16), (3, 24)], &[(1, 0), (2, 16), (4, 40)], Some(24)),
            (&[(1, 0), (2, 40)], &[(1, 0), (3, 16)], Some(16)),
        ];
        for (mine, theirs, expected) in cases {
            assert_eq!(expected.map(Lsn), history(mine).parts_from(&history(theirs)), "{mine:?} {theirs:?}");
        }
    }

    #[test]
    fn ballots_that_wrote_nothing_leave_no_entry() {
        let before = history(&[(1, 0), (2, 16), (3, 40)]);

        assert_eq!(history(&[(1, 0), (2, 16), (5, 40)]), before.continued(ballot(5), Lsn(40)));
        assert_eq!(history(&[(1, 0), (5, 16)]), before.continued(ballot(5), Lsn(16)));
        assert_eq!(history(&[(1, 0), (2, 16), (3, 40), (5, 48)]), before.continued(ballot(5), Lsn(48)));
    }

    #[test]
    fn truncation_drops_timelines_without_bytes_but_the_first() {
        let entry =
            |n: u32, lsn| TimelineEntry { timeline: PgTimeline(n), start_lsn: Lsn(lsn), history_file: Vec::new() };
        let mut timelines = TimelineHistory([entry(1, 8), entry(2, 16), entry(3, 24)].into());

        timelines.truncate(Lsn(24));
        assert_eq!(2, timelines.0.len());
        timelines.truncate(Lsn(8));
        assert_eq!(1, timelines.0.len());
    }
}
