//! Decodes committed WAL once, for all shards.

use layers::Striping;
use pgtypes::{FrameSummary, Lsn};
use wal::{Decoder, RECORD_BYTES_MAX, Record, Scanner, WalError};

use crate::route::{Route, is_for_somebody};

/// A record that some shard needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routed {
    /// The whole record.
    pub record: Record,
    /// Who needs it.
    pub route: Route,
    /// What the log adds up to at its end.
    pub summary: FrameSummary,
}

/// Cuts WAL into records and says who needs each.
///
/// Memory: the record in progress if any shard could need it, never more than was fed of it.
#[derive(Debug)]
pub struct Router {
    decoder: Decoder,
    striping: Striping,
}

impl Router {
    /// Continues behind `from`.
    ///
    /// # Panics
    /// When `segment_bytes` is no valid segment size or `from.record_end` not aligned to 8 bytes: both are checked where they
    /// enter.
    pub fn new(from: FrameSummary, segment_bytes: u64, striping: Striping) -> Router {
        let scanner = Scanner::resume(from, segment_bytes);
        Router { decoder: Decoder::new(scanner, RECORD_BYTES_MAX).wanting(is_for_somebody), striping }
    }

    /// The next byte wanted.
    pub fn position(&self) -> Lsn {
        self.decoder.position()
    }

    /// What the complete records so far add up to.
    pub fn summary(&self) -> FrameSummary {
        self.decoder.summary()
    }

    /// Takes committed WAL at [`Router::position`] up to the end of a record that has to be polled, and returns how many
    /// bytes.
    ///
    /// # Errors
    /// The bytes are no WAL, for good: nobody may skip a record.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, WalError> {
        self.decoder.feed(bytes)
    }

    /// The record that the last [`Router::feed`] completed, if somebody needs it.
    pub fn poll(&mut self) -> Option<Routed> {
        let record = self.decoder.poll_record()?;
        let route = Route::of(&record, self.striping);
        (!route.is_empty()).then(|| Routed { record, route, summary: self.decoder.summary() })
    }

    /// Bytes set aside for the record in progress.
    pub fn buffered_bytes(&self) -> usize {
        self.decoder.buffered_bytes()
    }
}
