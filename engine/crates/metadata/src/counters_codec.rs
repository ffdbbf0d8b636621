//! Counters as bytes: the value that a page server keeps of them.
//!
//! Version 1, little-endian: `version u16, flags u16 (1: wal_log_hints, 2: track_commit_timestamp), wal_level u32,
//! max_connections i32, max_worker_processes i32, max_wal_senders i32, max_prepared_transactions i32,
//! max_locks_per_transaction i32, 4 zero bytes, checkpoint_lsn u64`, then PostgreSQL's 88 bytes of a checkpoint.

use alloc::vec::Vec;

use pgformat::{CHECKPOINT_BYTES, CheckPoint, ServerSettings, WalLevel};
use pgtypes::Lsn;

use crate::{Counters, MetadataError, reader::Reader};

/// The version that is written, and the only one that is read.
const VERSION: u16 = 1;
/// Bytes in front of the checkpoint.
const HEAD_BYTES: usize = 40;
const WAL_LOG_HINTS: u16 = 1;
const TRACK_COMMIT_TIMESTAMP: u16 = 2;

/// The bytes are no counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CountersError {
    /// A later engine wrote them.
    #[error("counters of version {0}, and this engine knows version {VERSION} only")]
    Version(u16),
    /// They have another length, or a field is out of its range.
    #[error("counters are damaged")]
    Damaged,
}

impl From<MetadataError> for CountersError {
    fn from(_: MetadataError) -> CountersError {
        CountersError::Damaged
    }
}

impl Counters {
    /// The value, the same for equal counters.
    pub fn to_bytes(&self) -> Vec<u8> {
        let settings = &self.settings;
        let mut flags = if settings.wal_log_hints { WAL_LOG_HINTS } else { 0 };
        flags |= if settings.track_commit_timestamp { TRACK_COMMIT_TIMESTAMP } else { 0 };
        let mut bytes = Vec::with_capacity(HEAD_BYTES + CHECKPOINT_BYTES);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        for number in [
            settings.wal_level as i32,
            settings.max_connections,
            settings.max_worker_processes,
            settings.max_wal_senders,
            settings.max_prepared_transactions,
            settings.max_locks_per_transaction,
            0,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.checkpoint_lsn.0.to_le_bytes());
        bytes.extend_from_slice(&self.checkpoint.to_bytes());
        bytes
    }

    /// Reads the value.
    ///
    /// # Errors
    /// It is damaged, or of another version.
    pub fn from_bytes(value: &[u8]) -> Result<Counters, CountersError> {
        let mut reader = Reader::new(value);
        let version = reader.u16()?;
        if version != VERSION {
            return Err(CountersError::Version(version));
        }
        if value.len() != HEAD_BYTES + CHECKPOINT_BYTES {
            return Err(CountersError::Damaged);
        }
        let flags = reader.u16()?;
        let level = reader.u32()?;
        let levels = [WalLevel::Minimal, WalLevel::Replica, WalLevel::Logical];
        let wal_level = levels.into_iter().find(|known| *known as u32 == level).ok_or(CountersError::Damaged)?;
        let mut number = || reader.u32().map(|number| number as i32);
        let settings = ServerSettings {
            wal_level,
            wal_log_hints: flags & WAL_LOG_HINTS != 0,
            max_connections: number()?,
            max_worker_processes: number()?,
            max_wal_senders: number()?,
            max_prepared_transactions: number()?,
            max_locks_per_transaction: number()?,
            track_commit_timestamp: flags & TRACK_COMMIT_TIMESTAMP != 0,
        };
        reader.skip(4)?;
        let checkpoint_lsn = Lsn(reader.u64()?);
        let checkpoint = reader.take(CHECKPOINT_BYTES)?.first_chunk().ok_or(CountersError::Damaged)?;
        let checkpoint = CheckPoint::parse(checkpoint).map_err(|_| CountersError::Damaged)?;
        Ok(Counters { checkpoint, checkpoint_lsn, settings })
    }
}
