//! The segments that a log holds: which exist, which are sealed, and the running checksum of those being filled.
//!
//! Knows nothing about disk operations; `log.rs` asks it what to do next.

use alloc::{collections::VecDeque, vec::Vec};

use pgtypes::Lsn;

/// A segment as a reader needs to know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentView {
    /// Where it starts; also its file name.
    pub start: Lsn,
    /// It has a trailer: to be verified before the first byte of it is served.
    pub sealed: bool,
    /// It failed a verification: nothing of it is served.
    pub damaged: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) start: Lsn,
    /// Where the next one starts.
    pub(crate) end: Lsn,
    /// First byte of the log in it.
    pub(crate) data_begin: Lsn,
    /// The file exists.
    pub(crate) taken: bool,
    pub(crate) sealed: bool,
    pub(crate) damaged: bool,
    /// Checksum of `[data_begin, crc_end)`; unknown while `crc_end` is invalid.
    crc: u32,
    crc_end: Lsn,
}

impl Segment {
    /// Checksum of all its data, if it is complete and its bytes passed through this process.
    pub(crate) fn data_crc(&self) -> Option<u32> {
        (self.crc_end == self.end).then_some(self.crc)
    }
}

#[derive(Debug)]
pub(crate) struct SegmentList {
    /// Without gaps.
    segments: VecDeque<Segment>,
    segment_bytes: u64,
    /// Where the log begins on this acceptor.
    log_start: Lsn,
    /// No segment below needs a trailer any more.
    seal_next: Lsn,
}

impl SegmentList {
    /// `sealed_lsn`: no segment below needs a trailer.
    pub(crate) fn new(segment_bytes: u64, log_start: Lsn, sealed_lsn: Lsn) -> SegmentList {
        let seal_next = sealed_lsn.max(log_start.floor(segment_bytes));
        SegmentList { segments: VecDeque::new(), segment_bytes, log_start, seal_next }
    }

    /// Start of the segment that holds `lsn`, and the offset in it.
    pub(crate) fn place(&self, lsn: Lsn) -> (Lsn, u64) {
        (lsn.floor(self.segment_bytes), lsn.offset_in(self.segment_bytes))
    }

    pub(crate) fn len(&self) -> usize {
        self.segments.iter().filter(|segment| segment.taken).count()
    }

    pub(crate) fn first(&self) -> Option<&Segment> {
        self.segments.front()
    }

    pub(crate) fn damaged(&self) -> Vec<Lsn> {
        self.segments.iter().filter(|segment| segment.damaged).map(|segment| segment.start).collect()
    }

    /// Start of the first damaged segment that holds a byte of `[begin, end)`.
    pub(crate) fn first_damaged(&self, begin: Lsn, end: Lsn) -> Option<Lsn> {
        let inside = |segment: &&Segment| segment.damaged && segment.start < end && segment.end > begin;
        self.segments.iter().find(inside).map(|segment| segment.start)
    }

    fn index(&self, lsn: Lsn) -> Option<usize> {
        let first = self.segments.front()?.start;
        let distance = lsn.0.checked_sub(first.0)?;
        Some((distance / self.segment_bytes) as usize).filter(|&index| index < self.segments.len())
    }

    pub(crate) fn get(&self, lsn: Lsn) -> Option<&Segment> {
        self.segments.get(self.index(lsn)?)
    }

    pub(crate) fn get_mut(&mut self, lsn: Lsn) -> Option<&mut Segment> {
        let index = self.index(lsn)?;
        self.segments.get_mut(index)
    }

    /// A segment found at the start of the process; its checksum is not known.
    pub(crate) fn push_found(&mut self, start: Lsn, sealed: bool) {
        let mut segment = self.fresh(start);
        segment.taken = true;
        segment.sealed = sealed;
        segment.crc_end = Lsn::INVALID;
        self.segments.push_back(segment);
    }

    fn fresh(&self, start: Lsn) -> Segment {
        let data_begin = start.max(self.log_start);
        let end = start.advance(self.segment_bytes);
        Segment { start, end, data_begin, taken: false, sealed: false, damaged: false, crc: 0, crc_end: data_begin }
    }

    /// Asks for the segments of `[from, to)`; `from` is where the log ends.
    pub(crate) fn want(&mut self, from: Lsn, to: Lsn) {
        let mut next = self.segments.back().map_or(from.floor(self.segment_bytes), |last| last.end);
        while next < to {
            self.segments.push_back(self.fresh(next));
            next = next.advance(self.segment_bytes);
        }
    }

    /// Sums up bytes accepted at `begin`.
    pub(crate) fn checksum(&mut self, begin: Lsn, bytes: &[u8]) {
        let (mut at, mut rest) = (begin, bytes);
        while !rest.is_empty() {
            let room = self.segment_bytes - at.offset_in(self.segment_bytes);
            let (here, behind) = rest.split_at(rest.len().min(room as usize));
            if let Some(segment) = self.get_mut(at)
                && segment.crc_end == at
            {
                segment.crc = wal::crc32c(segment.crc, here);
                segment.crc_end = at.advance(here.len() as u64);
            }
            at = at.advance(here.len() as u64);
            rest = behind;
        }
    }

    /// The log ends at `end`: forgets checksums of what was behind.
    pub(crate) fn truncate_checksums(&mut self, end: Lsn) {
        if let Some(segment) = self.get_mut(end) {
            if segment.data_begin == end {
                (segment.crc, segment.crc_end) = (0, end);
            } else if segment.crc_end != end {
                segment.crc_end = Lsn::INVALID;
            }
        }
    }

    /// Takes off the last segment if it begins at or behind `end`.
    pub(crate) fn pop_behind(&mut self, end: Lsn) -> Option<Segment> {
        let behind = self.segments.back().is_some_and(|segment| segment.start >= end);
        if behind { self.segments.pop_back() } else { None }
    }

    /// The first segment that is wanted and not there yet.
    pub(crate) fn next_to_take(&self) -> Option<Lsn> {
        // At most a few at the end are not there.
        let mut wanted = None;
        for segment in self.segments.iter().rev().take_while(|segment| !segment.taken) {
            wanted = Some(segment.start);
        }
        wanted
    }

    /// The next segment to be sealed when everything below `committed` may be.
    pub(crate) fn next_to_seal(&mut self, committed: Lsn) -> Option<Segment> {
        loop {
            if let Some(first) = self.segments.front() {
                self.seal_next = self.seal_next.max(first.start);
            }
            let segment = *self.get(self.seal_next)?;
            if segment.end > committed {
                return None;
            }
            if !segment.sealed && !segment.damaged {
                return Some(segment);
            }
            self.seal_next = segment.end;
        }
    }

    /// No segment below needs a trailer.
    pub(crate) fn sealed_lsn(&self) -> Lsn {
        self.seal_next
    }

    /// Takes off the first segment if it ends at or below `oldest`.
    pub(crate) fn pop_below(&mut self, oldest: Lsn) -> Option<Segment> {
        let below = self.segments.front().is_some_and(|segment| segment.taken && segment.end <= oldest);
        if below { self.segments.pop_front() } else { None }
    }
}
