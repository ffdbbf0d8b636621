//! From committed record ends to the WAL writes that PostgreSQL's flushes wait for.
//!
//! Pure. PostgreSQL waits until every *complete record* in the bytes that it has written so far is durable, and says only
//! how many writes that were; acceptors say where records end. This queue remembers, for the writes that the framer
//! has processed, the last record end in them.

use std::collections::VecDeque;

use pgtypes::{Instant, Lsn};

/// Entries kept at most. One entry per record end that PostgreSQL has written and the quorum does not have: with one
/// flush in flight there are a handful; a thousand appear only while no quorum answers.
const ENTRIES_MAX: usize = 1024;

/// The first `sequence` writes are settled once `record_end` is committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    sequence: u64,
    record_end: Lsn,
    since: Instant,
}

/// What a commit settles.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settled {
    /// The first so many writes.
    pub sequence: u64,
    /// When the oldest of them was processed.
    pub since: Instant,
}

/// The queue. Sequences and positions rise only.
#[derive(Clone, Debug, Default)]
pub struct SettledQueue {
    entries: VecDeque<Entry>,
    newest: u64,
}

impl SettledQueue {
    /// Nothing written, nothing settled.
    pub fn new() -> Self {
        Self { entries: VecDeque::with_capacity(ENTRIES_MAX), newest: 0 }
    }

    /// The framer has processed the first `sequence` writes; the last complete record in their bytes ends at `record_end`.
    ///
    /// At the bound, the youngest entries become one: their flushes wait for the later of the two, which is on its way.
    pub fn push(&mut self, sequence: u64, record_end: Lsn, now: Instant) {
        if sequence <= self.newest {
            return;
        }
        self.newest = sequence;
        let entry = Entry { sequence, record_end, since: now };
        let full = self.entries.len() == ENTRIES_MAX;
        match self.entries.back_mut() {
            Some(last) => {
                assert!(record_end >= last.record_end, "record ends rise with the bytes");
                if full || record_end == last.record_end {
                    *last = Entry { since: last.since, ..entry };
                } else {
                    self.entries.push_back(entry);
                }
            }
            None => self.entries.push_back(entry),
        }
    }

    /// What `commit_lsn` settles beyond what was settled before.
    pub fn commit(&mut self, commit_lsn: Lsn) -> Option<Settled> {
        let mut settled: Option<Settled> = None;
        while let Some(first) = self.entries.front()
            && first.record_end <= commit_lsn
        {
            let since = settled.map_or(first.since, |settled| settled.since);
            settled = Some(Settled { sequence: first.sequence, since });
            self.entries.pop_front();
        }
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(queue: &mut SettledQueue, commit_lsn: u64) -> Option<u64> {
        queue.commit(Lsn(commit_lsn)).map(|settled| settled.sequence)
    }

    #[test]
    fn writes_settle_when_their_last_record_is_committed() {
        let mut queue = SettledQueue::new();
        queue.push(1, Lsn(1900), Instant(0));
        queue.push(2, Lsn(2900), Instant(0));
        assert_eq!(None, commit(&mut queue, 1899));
        assert_eq!(Some(1), commit(&mut queue, 1900));
        assert_eq!(None, commit(&mut queue, 2000));
        assert_eq!(Some(2), commit(&mut queue, 5000));
        assert!(queue.entries.is_empty());
    }

    /// PostgreSQL flushes at segment ends and page ends, inside records: such a flush may not wait for the record's end.
    #[test]
    fn a_write_without_a_complete_record_settles_with_the_record_before() {
        let mut queue = SettledQueue::new();
        queue.push(1, Lsn(1900), Instant(0));
        queue.push(2, Lsn(1900), Instant(0));
        assert_eq!(Some(2), commit(&mut queue, 1900));
        queue.push(3, Lsn(1900), Instant(0));
        assert_eq!(Some(3), commit(&mut queue, 1900));
    }

    #[test]
    fn a_sequence_that_was_processed_before_changes_nothing() {
        let mut queue = SettledQueue::new();
        queue.push(5, Lsn(1900), Instant(0));
        queue.push(5, Lsn(1900), Instant(0));
        queue.push(4, Lsn(1400), Instant(0));
        assert_eq!(1, queue.entries.len());
        assert_eq!(Some(5), commit(&mut queue, 1900));
        queue.push(5, Lsn(9999), Instant(0));
        assert!(queue.entries.is_empty());
    }

    #[test]
    fn the_queue_is_bounded_and_never_settles_early() {
        let mut queue = SettledQueue::new();
        for i in 1..=5000u64 {
            queue.push(i, Lsn(i * 100), Instant(0));
        }
        assert_eq!(ENTRIES_MAX, queue.entries.len());
        let mut settled = 0;
        for i in 1..=5000u64 {
            if let Some(sequence) = commit(&mut queue, i * 100) {
                assert!(sequence <= i, "settled write {sequence} at the commit of write {i}");
                settled = sequence;
            }
        }
        assert_eq!(5000, settled);
    }
}
