//! Plain WAL in, batches of one shard out.

use layers::{HashRange, Striping};
use pgtypes::{FrameSummary, Lsn, Term};
use wal::WalError;

use crate::{batch::Batch, cutter::Cutter, router::Router};

/// Filters a stream of committed WAL for one shard.
///
/// `loop { fed += filter.feed(&bytes[fed..])?; if let Some(batch) = filter.take_batch(..) { .. } }`: where batches are cut
/// is the caller's business, but a full one has to be taken.
///
/// Memory: a batch of [`crate::BATCH_BYTES`] and a record, and what was fed of the record in progress.
#[derive(Debug)]
pub struct WalFilter {
    router: Router,
    cutter: Cutter,
}

impl WalFilter {
    /// Continues behind `from`. The shard has the metadata if its range begins with 0.
    ///
    /// # Panics
    /// When `segment_bytes` is no valid segment size or `from.record_end` not aligned to 8 bytes: both are checked where they
    /// enter.
    pub fn new(from: FrameSummary, segment_bytes: u64, range: HashRange, striping: Striping) -> WalFilter {
        WalFilter { router: Router::new(from, segment_bytes, striping), cutter: Cutter::new(from, range, striping) }
    }

    /// The next byte wanted.
    pub fn position(&self) -> Lsn {
        self.router.position()
    }

    /// The last record end, and what the log adds up to there.
    pub fn summary(&self) -> FrameSummary {
        self.router.summary()
    }

    /// Takes committed WAL at [`WalFilter::position`] and returns how many bytes: fewer than given when the batch is full.
    ///
    /// # Errors
    /// The bytes are no WAL, for good: nobody may skip a record. What came before can still be taken.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, WalError> {
        let mut taken = 0;
        while taken < bytes.len() && !self.cutter.is_full() {
            let fed = self.router.feed(&bytes[taken..]);
            if let Some(routed) = self.router.poll() {
                self.cutter.push(&routed);
            }
            self.cutter.advance(self.router.summary());
            taken += fed?;
        }
        Ok(taken)
    }

    /// Whether [`WalFilter::feed`] takes nothing before the batch is taken.
    pub fn is_full(&self) -> bool {
        self.cutter.is_full()
    }

    /// Everything that the records so far say to the shard, since the last batch; `None` when no record has ended since.
    pub fn take_batch(&mut self, commit_lsn: Lsn, term: Term) -> Option<Batch> {
        self.cutter.take_batch(commit_lsn, term)
    }
}
