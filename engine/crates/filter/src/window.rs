//! The newest records of a log, decoded once for all shards that follow it closely.

use alloc::collections::VecDeque;

use layers::Striping;
use pgtypes::{FrameSummary, Lsn};
use wal::WalError;

use crate::{
    cutter::Cutter,
    router::{Routed, Router},
};

/// Bytes of records that are kept for shards that lag: 8 MiB. Older ones go; a shard that wants them decodes the log for
/// itself until it reaches the window again.
pub const WINDOW_BYTES: usize = 8 << 20;

/// What a record takes beside its payload: references of blocks, route, summary.
const RECORD_OVERHEAD_BYTES: usize = 320;

/// Decoded and routed records from a position on.
///
/// Memory: [`WINDOW_BYTES`], what one call of [`Window::feed`] adds, one record of any length, and what was fed of the
/// record in progress.
#[derive(Debug)]
pub struct Window {
    router: Router,
    striping: Striping,
    /// All records that end above are here.
    begin: Lsn,
    records: VecDeque<Routed>,
    bytes: usize,
}

impl Window {
    /// An empty one behind `from`.
    ///
    /// # Panics
    /// As [`Router::new`].
    pub fn new(from: FrameSummary, segment_bytes: u64, striping: Striping) -> Window {
        let router = Router::new(from, segment_bytes, striping);
        Window { router, striping, begin: from.record_end, records: VecDeque::new(), bytes: 0 }
    }

    /// How relations were cut for the routes.
    pub fn striping(&self) -> Striping {
        self.striping
    }

    /// The next byte wanted.
    pub fn position(&self) -> Lsn {
        self.router.position()
    }

    /// Its end, and what the log adds up to there.
    pub fn summary(&self) -> FrameSummary {
        self.router.summary()
    }

    /// Whether a shard that has everything up to `lsn`, a record end, can go on from here.
    pub fn covers(&self, lsn: Lsn) -> bool {
        self.begin <= lsn && lsn <= self.router.summary().record_end
    }

    /// Bytes of records that are kept.
    pub fn kept_bytes(&self) -> usize {
        self.bytes
    }

    /// Takes all of `bytes`, which are committed WAL at [`Window::position`].
    ///
    /// # Errors
    /// The bytes are no WAL. The window is of no use for what follows.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), WalError> {
        let mut taken = 0;
        while taken < bytes.len() {
            taken += self.router.feed(&bytes[taken..])?;
            if let Some(routed) = self.router.poll() {
                self.bytes += size_of(&routed);
                self.records.push_back(routed);
            }
        }
        // One record stays whatever its length, or each shard would have to decode it again.
        while self.bytes > WINDOW_BYTES && self.records.len() > 1 {
            self.drop_first();
        }
        Ok(())
    }

    /// Gives a shard what follows the position that it has, until its batch is full or nothing is left.
    ///
    /// Nothing happens to one whose position the window does not cover.
    pub fn fill(&self, cutter: &mut Cutter) {
        if !self.covers(cutter.through()) {
            return;
        }
        let first = self.records.partition_point(|routed| routed.summary.record_end <= cutter.through());
        for routed in self.records.range(first..) {
            if cutter.is_full() {
                return;
            }
            cutter.push(routed);
        }
        cutter.advance(self.router.summary());
    }

    /// Nobody needs records that end at or below `lsn` again.
    pub fn forget(&mut self, lsn: Lsn) {
        while self.records.front().is_some_and(|routed| routed.summary.record_end <= lsn) {
            self.drop_first();
        }
        self.begin = self.begin.max(lsn.min(self.router.summary().record_end));
        if self.records.is_empty() {
            self.records = VecDeque::new();
        }
    }

    fn drop_first(&mut self) {
        if let Some(routed) = self.records.pop_front() {
            self.bytes -= size_of(&routed);
            self.begin = routed.summary.record_end;
        }
    }
}

fn size_of(routed: &Routed) -> usize {
    routed.record.payload().len() + RECORD_OVERHEAD_BYTES
}
