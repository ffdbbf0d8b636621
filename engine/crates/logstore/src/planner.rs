//! Turns a stream of accepted bytes into few large aligned writes, and completed writes into durable positions.
//!
//! Knows nothing about records, segments that must be taken first, or who waits. Rules: at most
//! [`WRITES_IN_FLIGHT_MAX`] writes at once; no two writes in flight touch the same block, since a disk may carry them
//! out in any order; one sync at a time, which covers everything written before it began. A write that is alone, with
//! nothing before or behind it, is durable by itself and needs no sync: a lone commit pays for one operation, a stream
//! shares its syncs.

use alloc::{collections::VecDeque, vec::Vec};

use pgtypes::Lsn;

use crate::{
    buffer::{Buffer, Pool},
    command::OpId,
    segment::{BLOCK_BYTES, Geometry},
};

/// Writes in flight at once. Four of 1 MiB saturate an NVMe drive; more only lengthen the wait of the sync behind them.
pub const WRITES_IN_FLIGHT_MAX: usize = 4;

/// While other writes are in flight, a write of at least this many whole blocks leaves its last, partial block back:
/// had it taken it along, the next write (which repeats that block) would have to wait for this one.
const HOLD_BACK_BLOCKS_MIN: usize = 16;

/// A write to be issued: whole blocks.
#[derive(Debug)]
pub(crate) struct PlannedWrite {
    /// Position of the first byte of the buffer, a multiple of the block size.
    pub(crate) start: Lsn,
    pub(crate) buffer: Buffer,
    /// Durable when it ends: no sync follows.
    pub(crate) durable: bool,
}

/// A sync to be issued, for the segments that hold `[from, to)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PlannedSync {
    pub(crate) from: Lsn,
    pub(crate) to: Lsn,
}

#[derive(Debug)]
struct Pending {
    start: Lsn,
    buffer: Buffer,
}

impl Pending {
    fn end(&self) -> Lsn {
        self.start.advance(self.buffer.len() as u64)
    }

    /// Bytes that still fit, of which none lies in the next segment.
    fn room(&self, segment_bytes: u64) -> usize {
        let in_segment = segment_bytes - self.start.offset_in(segment_bytes);
        self.buffer.capacity().min(in_segment as usize) - self.buffer.len()
    }
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    op: OpId,
    /// Behind the last byte of WAL in it; padding is not counted.
    end: Lsn,
    done: bool,
    durable: bool,
}

/// The unwritten end of one log.
#[derive(Debug)]
pub(crate) struct Planner {
    pool: Pool,
    segment_bytes: u64,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
    /// Bytes of the block that holds `issued`, up to it: repeated at the head of the next write.
    tail: Vec<u8>,
    /// Behind the last byte handed in.
    end: Lsn,
    /// Behind the last byte in any write so far.
    issued: Lsn,
    in_flight: VecDeque<InFlight>,
    /// Everything below was written.
    written: Lsn,
    /// Everything below was written and synced, or written durably.
    durable: Lsn,
    sync: Option<(OpId, Lsn)>,
    /// A partial block waits for the next completion.
    held_back: bool,
}

impl Planner {
    /// Continues a log whose bytes up to `end` are durable. `tail`: those of them in the block of `end`.
    pub(crate) fn new(geometry: Geometry, end: Lsn, tail: Vec<u8>) -> Planner {
        Planner::with_pool(Pool::new(geometry.write_bytes_max), geometry.segment_bytes, end, tail)
    }

    fn with_pool(pool: Pool, segment_bytes: u64, end: Lsn, tail: Vec<u8>) -> Planner {
        debug_assert_eq!(end.offset_in(BLOCK_BYTES), tail.len() as u64);
        Planner {
            pool,
            segment_bytes,
            pending: VecDeque::new(),
            pending_bytes: 0,
            tail,
            end,
            issued: end,
            in_flight: VecDeque::new(),
            written: end,
            durable: end,
            sync: None,
            held_back: false,
        }
    }

    /// Where the next byte goes.
    pub(crate) fn end(&self) -> Lsn {
        self.end
    }

    /// Everything below is durable.
    pub(crate) fn durable(&self) -> Lsn {
        self.durable
    }

    /// Behind the last byte of any write so far, finished or not.
    pub(crate) fn issued(&self) -> Lsn {
        self.issued
    }

    /// Bytes that wait for a write, including those in flight.
    pub(crate) fn undurable_bytes(&self) -> u64 {
        self.end.bytes_since(self.durable)
    }

    /// No operation is in flight.
    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight.is_empty() && self.sync.is_none()
    }

    /// Nothing is left to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_quiet() && self.pending.is_empty() && self.durable == self.end
    }

    /// Whether memory could be given back.
    pub(crate) fn holds_memory(&self) -> bool {
        !self.pool.is_empty()
    }

    /// Gives all unused memory back.
    pub(crate) fn release_memory(&mut self) {
        self.pool.clear();
        self.pending.shrink_to_fit();
        self.in_flight.shrink_to_fit();
    }

    /// Appends a copy of `bytes`: the only one made of them.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.pending.back().is_none_or(|last| last.room(self.segment_bytes) == 0) {
                self.begin_buffer(bytes.len());
            }
            let Some(last) = self.pending.back_mut() else { return };
            let fits = last.room(self.segment_bytes).min(bytes.len());
            last.buffer.extend(&bytes[..fits]);
            self.end = last.end();
            self.pending_bytes += fits;
            bytes = &bytes[fits..];
        }
    }

    fn begin_buffer(&mut self, wanted: usize) {
        let start = self.end.floor(BLOCK_BYTES);
        let mut buffer = self.pool.take(wanted + BLOCK_BYTES as usize);
        // The block is partial only when everything before was issued: a full buffer ends with a block.
        buffer.extend(&self.tail[..self.end.bytes_since(start) as usize]);
        self.pending.push_back(Pending { start, buffer });
    }

    /// Start of the next write, if one may be issued; its segment must exist.
    pub(crate) fn next_write_start(&self) -> Option<Lsn> {
        let first = self.pending.front()?;
        let running = self.in_flight.iter().filter(|write| !write.done).count();
        if running >= WRITES_IN_FLIGHT_MAX {
            return None;
        }
        let same_block = |write: &InFlight| !write.done && write.end > first.start;
        if self.in_flight.back().is_some_and(same_block) {
            return None;
        }
        let only_partial = first.buffer.len() < BLOCK_BYTES as usize;
        if self.held_back && only_partial && running > 0 {
            return None;
        }
        Some(first.start)
    }

    /// The write that [`Planner::next_write_start`] announced; `op` will be completed by [`Planner::handle_written`].
    pub(crate) fn issue_write(&mut self, op: OpId) -> Option<PlannedWrite> {
        self.next_write_start()?;
        let mut first = self.pending.pop_front()?;
        let block = BLOCK_BYTES as usize;
        let partial = first.buffer.len() % block;
        let whole = first.buffer.len() - partial;
        let busy = self.in_flight.iter().any(|write| !write.done);
        if partial != 0 && whole / block >= HOLD_BACK_BLOCKS_MIN && busy {
            let mut rest = self.pool.take(block);
            rest.extend(&first.buffer.as_bytes()[whole..]);
            self.pending.push_front(Pending { start: first.start.advance(whole as u64), buffer: rest });
            first.buffer.truncate(whole);
            self.held_back = true;
        } else if partial != 0 {
            self.tail.clear();
            self.tail.extend_from_slice(&first.buffer.as_bytes()[whole..]);
        } else {
            self.tail.clear();
        }
        let end = first.end();
        self.pending_bytes = self.end.bytes_since(end) as usize;
        self.issued = self.issued.max(end);
        let alone = self.is_quiet() && self.written == self.durable && self.pending.is_empty();
        self.in_flight.push_back(InFlight { op, end, done: false, durable: alone });
        first.buffer.pad();
        Some(PlannedWrite { start: first.start, buffer: first.buffer, durable: alone })
    }

    /// A write has succeeded; [`Planner::durable`] may have risen. Returns whether `op` was one of this planner.
    pub(crate) fn handle_written(&mut self, op: OpId, buffer: Buffer) -> bool {
        let Some(write) = self.in_flight.iter_mut().find(|write| write.op == op) else { return false };
        write.done = true;
        self.pool.give(buffer);
        self.held_back = false;
        while let Some(write) = self.in_flight.front().filter(|write| write.done) {
            if write.durable {
                // It was issued when everything before it was durable.
                debug_assert_eq!(self.written, self.durable);
                self.durable = self.durable.max(write.end);
            }
            self.written = self.written.max(write.end);
            self.in_flight.pop_front();
        }
        true
    }

    /// A write will not be carried out: [`Planner::restart`] follows, and nothing of it becomes durable.
    pub(crate) fn handle_abandoned(&mut self, op: OpId, buffer: Buffer) {
        if let Some(write) = self.in_flight.iter_mut().find(|write| write.op == op) {
            write.durable = false;
        }
        self.handle_written(op, buffer);
    }

    /// The next sync, if something is written that no sync covers and none is running.
    pub(crate) fn issue_sync(&mut self, op: OpId) -> Option<PlannedSync> {
        if self.sync.is_some() || self.written <= self.durable {
            return None;
        }
        self.sync = Some((op, self.written));
        Some(PlannedSync { from: self.durable, to: self.written })
    }

    /// Whether [`Planner::issue_sync`] would return one.
    pub(crate) fn wants_sync(&self) -> bool {
        self.sync.is_none() && self.written > self.durable
    }

    /// A sync has succeeded. Returns whether `op` was this planner's.
    pub(crate) fn handle_synced(&mut self, op: OpId) -> bool {
        match self.sync {
            Some((running, to)) if running == op => {
                self.sync = None;
                self.durable = self.durable.max(to);
                true
            }
            _ => false,
        }
    }

    /// Drops what was not handed to the disk yet.
    pub(crate) fn drop_pending(&mut self) {
        while let Some(pending) = self.pending.pop_front() {
            self.pool.give(pending.buffer);
        }
        self.pending_bytes = 0;
        self.end = self.issued;
        self.held_back = false;
    }

    /// Starts again at `end`, whose bytes are durable, after [`Planner::is_quiet`]. `tail` as in [`Planner::new`].
    pub(crate) fn restart(&mut self, end: Lsn, tail: Vec<u8>) {
        debug_assert!(self.is_quiet() && self.pending.is_empty());
        let empty = Pool::new(self.pool.capacity_max());
        let pool = core::mem::replace(&mut self.pool, empty);
        *self = Planner::with_pool(pool, self.segment_bytes, end, tail);
    }

    /// Bytes of the block of [`Planner::issued`] up to it.
    pub(crate) fn tail(&self) -> &[u8] {
        &self.tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::SEGMENT_BYTES;
    use alloc::vec;

    fn planner() -> Planner {
        Planner::new(Geometry::STANDARD, Lsn(SEGMENT_BYTES), Vec::new())
    }

    fn issue(planner: &mut Planner, op: u64) -> Option<(u64, usize)> {
        planner.issue_write(OpId(op)).map(|write| (write.start.0 - SEGMENT_BYTES, write.buffer.len()))
    }

    fn written(planner: &mut Planner, op: u64) {
        assert!(planner.handle_written(OpId(op), Buffer::with_capacity(1)));
    }

    #[test]
    fn small_append_is_written_at_once_with_its_partial_block() {
        let mut planner = planner();
        planner.push(&[1; 100]);
        let write = planner.issue_write(OpId(1)).unwrap();
        assert_eq!(4096, write.buffer.len());
        assert_eq!([1; 100], write.buffer.as_bytes()[..100]);
        assert!(write.buffer.as_bytes()[100..].iter().all(|&b| b == 0));
    }

    /// The disk may carry out two writes of one block in either order.
    #[test]
    fn block_in_flight_is_not_written_again_before_the_first_write_ended() {
        let mut planner = planner();
        planner.push(&[1; 100]);
        assert_eq!(Some((0, 4096)), issue(&mut planner, 1));
        planner.push(&[2; 5000]);
        assert_eq!(None, issue(&mut planner, 2));

        written(&mut planner, 1);

        let write = planner.issue_write(OpId(2)).unwrap();
        assert_eq!(8192, write.buffer.len());
        assert_eq!([1; 100], write.buffer.as_bytes()[..100]);
        assert_eq!([2; 5000], write.buffer.as_bytes()[100..5100]);
    }

    #[test]
    fn whole_blocks_are_written_side_by_side_up_to_the_bound() {
        let mut planner = planner();
        for op in 0..4 {
            planner.push(&[1; 65536]);
            assert_eq!(Some((op * 65536, 65536)), issue(&mut planner, op));
        }
        planner.push(&[1; 65536]);
        assert_eq!(None, issue(&mut planner, 4));
        written(&mut planner, 2);
        assert_eq!(Some((4 * 65536, 65536)), issue(&mut planner, 4));
    }

    #[test]
    fn partial_block_of_a_large_write_stays_back_while_others_are_in_flight() {
        let mut planner = planner();
        planner.push(&[1; 65536]);
        assert_eq!(Some((0, 65536)), issue(&mut planner, 1));
        planner.push(&[2; 70000]);
        assert_eq!(Some((65536, 69632)), issue(&mut planner, 2));
        assert_eq!(None, issue(&mut planner, 3));
        planner.push(&[3; 70000]);
        assert_eq!(Some((135168, 69632)), issue(&mut planner, 3));
        written(&mut planner, 1);
        assert_eq!(Some((204800, 4096)), issue(&mut planner, 4));
        assert_eq!(planner.end(), planner.issued());
    }

    #[test]
    fn one_sync_at_a_time_covers_all_that_is_written_without_gap() {
        let mut planner = planner();
        for op in 0..3 {
            planner.push(&[1; 8192]);
            issue(&mut planner, op);
        }
        written(&mut planner, 1);
        assert_eq!(None, planner.issue_sync(OpId(10)));
        written(&mut planner, 0);
        let start = Lsn(SEGMENT_BYTES);
        // The first write was alone when it began.
        assert_eq!(start.advance(8192), planner.durable());
        let sync = PlannedSync { from: start.advance(8192), to: start.advance(16384) };
        assert_eq!(Some(sync), planner.issue_sync(OpId(10)));
        written(&mut planner, 2);
        assert_eq!(None, planner.issue_sync(OpId(11)));
        assert_eq!(start.advance(8192), planner.durable());
        assert!(planner.handle_synced(OpId(10)));
        assert_eq!(start.advance(16384), planner.durable());
        assert_eq!(
            Some(PlannedSync { from: start.advance(16384), to: start.advance(24576) }),
            planner.issue_sync(OpId(11))
        );
    }

    #[test]
    fn write_that_is_alone_is_durable_by_itself() {
        let mut planner = planner();
        for op in 0..3 {
            planner.push(&[1; 100]);
            assert!(planner.issue_write(OpId(op)).unwrap().durable);
            assert!(planner.durable() < planner.end());
            written(&mut planner, op);
            assert_eq!(planner.end(), planner.durable());
            assert_eq!(None, planner.issue_sync(OpId(10)));
        }
    }

    /// `O_DSYNC` makes one write durable, not those before it.
    #[test]
    fn write_with_others_before_or_behind_it_waits_for_a_sync() {
        let mut planner = planner();
        // More behind it.
        planner.push(&vec![1; 3 << 20]);
        assert!(!planner.issue_write(OpId(0)).unwrap().durable);
        assert!(!planner.issue_write(OpId(1)).unwrap().durable);
        // Another one before it.
        assert!(!planner.issue_write(OpId(2)).unwrap().durable);
        for op in 0..3 {
            written(&mut planner, op);
        }
        assert_eq!(Lsn(SEGMENT_BYTES), planner.durable());
        // Something before it that is written and not synced.
        planner.push(&[1; 4096]);
        assert!(planner.issue_sync(OpId(10)).is_some());
        assert!(!planner.issue_write(OpId(4)).unwrap().durable);
        assert!(planner.handle_synced(OpId(10)));
        written(&mut planner, 4);
        planner.push(&[1; 4096]);
        assert!(!planner.issue_write(OpId(5)).unwrap().durable);
    }

    #[test]
    fn abandoned_write_makes_nothing_durable() {
        let mut planner = planner();
        planner.push(&[1; 100]);
        assert!(planner.issue_write(OpId(1)).unwrap().durable);
        planner.handle_abandoned(OpId(1), Buffer::with_capacity(1));
        assert_eq!(Lsn(SEGMENT_BYTES), planner.durable());
    }

    #[test]
    fn write_ends_with_its_segment() {
        let mut planner = Planner::new(Geometry::STANDARD, Lsn(2 * SEGMENT_BYTES - 8192), Vec::new());
        planner.push(&[1; 12288]);
        assert_eq!(Some((SEGMENT_BYTES - 8192, 8192)), issue(&mut planner, 1));
        assert_eq!(Some((SEGMENT_BYTES, 4096)), issue(&mut planner, 2));
    }

    #[test]
    fn long_stream_is_cut_into_writes_of_the_largest_size() {
        let mut planner = planner();
        planner.push(&vec![1; 3 << 20]);
        assert_eq!(Some((0, 1 << 20)), issue(&mut planner, 1));
        assert_eq!(Some((1 << 20, 1 << 20)), issue(&mut planner, 2));
        assert_eq!(3 << 20, planner.undurable_bytes());
    }

    #[test]
    fn dropped_bytes_are_not_written_and_the_next_ones_follow_what_was() {
        let mut planner = planner();
        planner.push(&[1; 100]);
        issue(&mut planner, 1);
        planner.push(&[2; 100]);
        planner.drop_pending();
        assert_eq!(Lsn(SEGMENT_BYTES + 100), planner.end());
        written(&mut planner, 1);
        assert!(planner.is_idle());
        planner.push(&[3; 10]);
        let write = planner.issue_write(OpId(3)).unwrap();
        assert_eq!([1; 100], write.buffer.as_bytes()[..100]);
        assert_eq!([3; 10], write.buffer.as_bytes()[100..110]);
    }
}
