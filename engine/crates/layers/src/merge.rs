//! Merges the decoded values of several layers, and leaves out what no read needs any more.

use alloc::{collections::VecDeque, vec::Vec};
use core::iter::Peekable;

use pgtypes::Lsn;

use crate::{identity::Entry, key::Key};

/// The entries of several sources, each in the order of (key, LSN), in that order. Ends with the first error.
pub struct Merge<I: Iterator> {
    sources: Vec<Peekable<I>>,
}

impl<I: Iterator> Merge<I> {
    /// A merge of a handful of sources: each step looks at all of them.
    pub fn new(sources: impl IntoIterator<Item = I>) -> Merge<I> {
        Merge { sources: sources.into_iter().map(Iterator::peekable).collect() }
    }
}

impl<E, I: Iterator<Item = Result<Entry, E>>> Iterator for Merge<I> {
    type Item = Result<Entry, E>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut first: Option<(usize, Option<(Key, Lsn)>)> = None;
        for (at, source) in self.sources.iter_mut().enumerate() {
            // An error sorts before every entry.
            let Some(place) = source.peek().map(|entry| entry.as_ref().ok().map(|entry| (entry.key, entry.lsn))) else {
                continue;
            };
            if first.is_none_or(|(_, least)| place < least) {
                first = Some((at, place));
            }
        }
        let (at, place) = first?;
        let entry = self.sources[at].next();
        if place.is_none() {
            self.sources.clear();
        }
        entry
    }
}

/// Leaves out the values of a key that are older than one at or below the horizon that starts the page.
///
/// Holds in memory the values of one key up to the horizon, back to one that starts the page: a chain.
pub struct Retain<E, I: Iterator<Item = Result<Entry, E>>> {
    source: I,
    horizon: Lsn,
    held: VecDeque<Entry>,
    next: Option<Result<Entry, E>>,
}

impl<E, I: Iterator<Item = Result<Entry, E>>> Retain<E, I> {
    /// What of `source` is needed by reads at `horizon` or later.
    pub fn new(source: I, horizon: Lsn) -> Retain<E, I> {
        Retain { source, horizon, held: VecDeque::new(), next: None }
    }
}

impl<E, I: Iterator<Item = Result<Entry, E>>> Iterator for Retain<E, I> {
    type Item = Result<Entry, E>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next.is_none() {
            match self.source.next() {
                Some(Ok(entry)) if entry.lsn <= self.horizon => {
                    if self.held.front().is_some_and(|held| held.key != entry.key) {
                        self.next = Some(Ok(entry));
                        break;
                    }
                    if entry.kind.starts_page() {
                        self.held.clear();
                    }
                    self.held.push_back(entry);
                }
                Some(other) => self.next = Some(other),
                None => break,
            }
        }
        if let Some(entry) = self.held.pop_front() {
            return Some(Ok(entry));
        }
        match self.next.take()? {
            // The first of another key: what is left out of it is not known yet.
            Ok(entry) if entry.lsn <= self.horizon => {
                self.held.push_back(entry);
                self.next()
            }
            other => Some(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::{
        ValueKind,
        ValueKind::{Image, Record},
    };

    fn entry(key: u32, lsn: u64, kind: ValueKind) -> Result<Entry, ()> {
        Ok(Entry { key: Key::first_of_hash(key), lsn: Lsn(lsn), kind, value: vec![] })
    }

    #[test]
    fn a_merge_is_in_the_order_of_key_and_position() {
        let left = vec![entry(1, 5, Record), entry(3, 1, Record)];
        let right = vec![entry(1, 2, Record), entry(2, 9, Record), entry(3, 7, Record)];
        let merged: Result<Vec<_>, ()> = Merge::new([left.into_iter(), right.into_iter()]).collect();
        let places: Vec<_> = merged.unwrap().iter().map(|entry| (entry.key.hash(), entry.lsn.0)).collect();
        assert_eq!(vec![(1, 2), (1, 5), (2, 9), (3, 1), (3, 7)], places);
    }

    /// Half a layer must not pass for a whole one.
    #[test]
    fn a_merge_ends_with_the_first_error() {
        let left = vec![entry(1, 5, Record), Err(()), entry(3, 1, Record)];
        let right = vec![entry(2, 2, Record)];
        let merged: Vec<_> = Merge::new([left.into_iter(), right.into_iter()]).collect();
        assert_eq!(vec![entry(1, 5, Record), Err(())], merged);
    }

    #[test]
    fn values_below_the_newest_start_at_the_horizon_are_left_out() {
        let entries = vec![
            entry(1, 1, Image),
            entry(1, 2, Record),
            entry(1, 3, Image),
            entry(1, 4, Record),
            entry(1, 6, Image),
            entry(2, 1, Image),
            entry(2, 2, Record),
            entry(3, 7, Record),
            entry(4, 2, Image),
            entry(4, 5, Image),
            entry(4, 6, Image),
        ];
        let kept: Vec<_> = Retain::new(entries.into_iter(), Lsn(5))
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.key.hash(), entry.lsn.0))
            .collect();
        assert_eq!(vec![(1, 3), (1, 4), (1, 6), (2, 1), (2, 2), (3, 7), (4, 5), (4, 6)], kept);
    }
}
