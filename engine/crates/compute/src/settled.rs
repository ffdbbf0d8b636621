//! From committed record ends to the WAL writes that PostgreSQL's flushes wait for.
//!
//! Pure. PostgreSQL waits until every *complete record* in the bytes that it has written so far is durable, and says only
//! how many writes that were; acceptors say where records end. This queue remembers, for the writes that the framer
//! has processed, the last record end in them.

use std::collections::VecDeque;

use pgtypes::Lsn;

/// Entries kept at most. One entry per record end that PostgreSQL has written and the quorum does not have: with one
/// flush in flight there are a handful; a thousand appear only while no quorum answers.
const ENTRIES_MAX: usize = 1024;

/// The first `sequence` writes are settled once `record_end` is committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    sequence: u64,
    record_end: Lsn,
}

/// The queue. Sequences and positions rise only.
#[derive(Clone, Debug, Default)]
pub struct SettledQueue {
    entries: VecDeque<Entry>,
    settled: u64,
    newest: u64,
}

impl SettledQueue {
    /// Nothing written, nothing settled.
    pub fn new() -> Self {
        Self { entries: VecDeque::with_capacity(ENTRIES_MAX), settled: 0, newest: 0 }
    }

    /// The framer has processed the first `sequence` writes; the last complete record in their bytes ends at `record_end`.
    ///
    /// At the bound, the youngest entries become one: their flushes wait for the later of the two, which is on its way.
    pub fn push(&mut self, sequence: u64, record_end: Lsn) {
        if sequence <= self.newest {
            return;
        }
        self.newest = sequence;
        let entry = Entry { sequence, record_end };
        let full = self.entries.len() == ENTRIES_MAX;
        match self.entries.back_mut() {
            Some(last) => {
                assert!(record_end >= last.record_end, "record ends rise with the bytes");
                if full || record_end == last.record_end { *last = entry } else { self.entries.push_back(entry) }
            }
            None => self.entries.push_back(entry),
        }
    }

    /// The number of writes that `commit_lsn` settles, if it moved.
    pub fn commit(&mut self, commit_lsn: Lsn) -> Option<u64> {
        let before = self.settled;
        while let Some(first) = self.entries.front()
            && first.record_end <= commit_lsn
        {
            self.settled = first.sequence;
            self.entries.pop_front();
        }
        (self.settled > before).then_some(self.settled)
    }

    /// Whether some processed writes are not settled yet.
    pub fn is_waiting(&self) -> bool {
        !self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_settle_when_their_last_record_is_committed() {
        let mut queue = SettledQueue::new();
        queue.push(1, Lsn(1900));
        queue.push(2, Lsn(2900));
        assert_eq!(None, queue.commit(Lsn(1899)));
        assert_eq!(Some(1), queue.commit(Lsn(1900)));
        assert_eq!(None, queue.commit(Lsn(2000)));
        assert_eq!(Some(2), queue.commit(Lsn(5000)));
        assert!(!queue.is_waiting());
    }

    /// PostgreSQL flushes at segment ends and page ends, inside records: such a flush may not wait for the record's end.
    #[test]
    fn a_write_without_a_complete_record_settles_with_the_record_before() {
        let mut queue = SettledQueue::new();
        queue.push(1, Lsn(1900));
        queue.push(2, Lsn(1900));
        assert_eq!(Some(2), queue.commit(Lsn(1900)));
        queue.push(3, Lsn(1900));
        assert_eq!(Some(3), queue.commit(Lsn(1900)));
    }

    #[test]
    fn a_sequence_that_was_processed_before_changes_nothing() {
        let mut queue = SettledQueue::new();
        queue.push(5, Lsn(1900));
        queue.push(5, Lsn(1900));
        queue.push(4, Lsn(1400));
        assert_eq!(1, queue.entries.len());
        assert_eq!(Some(5), queue.commit(Lsn(1900)));
        queue.push(5, Lsn(9999));
        assert!(!queue.is_waiting());
    }

    #[test]
    fn the_queue_is_bounded_and_never_settles_early() {
        let mut queue = SettledQueue::new();
        for i in 1..=5000u64 {
            queue.push(i, Lsn(i * 100));
        }
        assert_eq!(ENTRIES_MAX, queue.entries.len());
        let mut settled = 0;
        for i in 1..=5000u64 {
            if let Some(sequence) = queue.commit(Lsn(i * 100)) {
                assert!(sequence <= i, "settled write {sequence} at the commit of write {i}");
                settled = sequence;
            }
        }
        assert_eq!(5000, settled);
    }
}
