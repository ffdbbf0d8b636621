//! Followers: read what safekeepers serve as committed, and compare it with what is.

use logstore::{Reader, SegmentVerifier, TRAILER_BYTES};
use pgtypes::Lsn;

use crate::{
    checker::Broken,
    event::{Event, MILLISECOND},
    world::{GEOMETRY, LOG_START, Phase, World, log_id},
};

/// Most bytes read at once.
const READ_BYTES: u64 = 24 << 10;

/// Someone who reads.
pub struct Follower {
    /// What it needs next.
    position: Lsn,
}

impl Default for Follower {
    fn default() -> Follower {
        Follower { position: LOG_START }
    }
}

impl World {
    pub(crate) fn follow(&mut self, follower: usize) -> Broken {
        let index = self.random.below(self.safekeepers.len() as u64) as usize;
        let begin = self.followers[follower].position;
        let end = self.follow_piece(index, begin, READ_BYTES)?;
        self.followers[follower].position = end;
        if self.phase != Phase::Done {
            let wait = self.random.range(20 * MILLISECOND, 200 * MILLISECOND);
            self.schedule.at(self.now + wait, Event::Follow { follower });
        }
        Ok(())
    }

    /// Reads all that a safekeeper serves from `begin` on.
    pub(crate) fn follow_safekeeper(&mut self, index: usize, begin: Lsn) -> Broken {
        let mut position = begin;
        loop {
            let end = self.follow_piece(index, position, READ_BYTES)?;
            if end == position {
                return Ok(());
            }
            position = end;
        }
    }

    /// Reads a piece; returns where it ended, `begin` when there was nothing.
    fn follow_piece(&mut self, index: usize, begin: Lsn, most: u64) -> Result<Lsn, String> {
        let safekeeper = &mut self.safekeepers[index];
        let Some(process) = &safekeeper.process else { return Ok(begin) };
        let Ok(end) = process.log.readable(begin, Reader::Anyone) else { return Ok(begin) };
        if end <= begin {
            return Ok(begin);
        }
        let cut = end.min(begin.advance(most));
        // In front of a damaged segment the bytes end where they must.
        let is_position = cut == end && process.log.readable(end, Reader::Anyone).is_ok();
        let Some(bytes) = safekeeper.read_wal(begin, cut) else { return Ok(begin) };
        let is_position = is_position && bytes.len() as u64 == cut.bytes_since(begin);
        self.checker.followed(begin, &bytes, is_position).map_err(|rule| format!("safekeeper {index}: {rule}"))?;
        Ok(begin.advance(bytes.len() as u64))
    }
}

impl crate::safekeeper::Safekeeper {
    /// The bytes `[begin, end)`, as the shell reads them: a sealed segment is verified first. Fewer bytes, or none, when
    /// a segment is damaged.
    pub(crate) fn read_wal(&mut self, begin: Lsn, end: Lsn) -> Option<Vec<u8>> {
        let process = self.process.as_mut()?;
        let mut bytes = Vec::with_capacity(end.bytes_since(begin) as usize);
        let mut at = begin;
        while at < end {
            let segment = process.log.segment(at)?;
            if segment.sealed {
                let data = self.disk.bytes(segment.start, 0, GEOMETRY.segment_bytes as usize)?;
                let trailer = self.disk.bytes(segment.start, GEOMETRY.segment_bytes, TRAILER_BYTES as usize)?;
                let verified = SegmentVerifier::new(trailer, log_id(), segment.start).and_then(|mut verifier| {
                    verifier.feed(data);
                    verifier.finish()
                });
                if let Err(error) = verified {
                    assert!(
                        self.disk.has_rotted(segment.start),
                        "member {}: sound segment {} fails its verification: {error}",
                        self.member.0,
                        segment.start
                    );
                    process.log.handle_damaged(segment.start);
                    process.damaged += 1;
                    return Some(bytes).filter(|bytes| !bytes.is_empty());
                }
            }
            let until = end.min(segment.start.advance(GEOMETRY.segment_bytes));
            let offset = at.bytes_since(segment.start);
            bytes.extend_from_slice(self.disk.bytes(segment.start, offset, until.bytes_since(at) as usize)?);
            at = until;
        }
        Some(bytes)
    }
}
