//! Committed WAL in the object store: segments of 16 MiB, as safekeepers have them, whatever PostgreSQL's segment size.

use bytes::Bytes;
use pgtypes::{LogId, Lsn};
use thiserror::Error;

use crate::{
    error::StorageError,
    keys,
    storage::{PutNew, RemoteStorage},
};

/// Bytes of a segment of the archive; a segment begins at a multiple of it.
pub const ARCHIVE_SEGMENT_BYTES: u64 = 16 << 20;

/// A segment was not archived or read.
#[derive(Debug, Error)]
pub enum ArchiveError {
    /// The object store did not do it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A segment with other bytes is there: two histories claim the same position, or one copy is damaged. Nothing was
    /// changed. An operator has to find out which one the log is.
    #[error("{key} is there with other bytes: two logs have one name, or a segment is damaged")]
    Differs {
        /// The object.
        key: String,
    },
    /// The caller's segment does not begin at a multiple of [`ARCHIVE_SEGMENT_BYTES`], or an object has another length.
    #[error("{key}: {what}")]
    Malformed {
        /// The object.
        key: String,
        /// What is wrong.
        what: &'static str,
    },
}

/// The archive of one log.
#[derive(Clone, Debug)]
pub struct WalArchive {
    storage: RemoteStorage,
    log: LogId,
}

impl WalArchive {
    /// The log's part of a store. Reads nothing yet.
    pub fn new(storage: RemoteStorage, log: LogId) -> WalArchive {
        WalArchive { storage, log }
    }

    fn check(&self, key: &str, start: Lsn, bytes: u64) -> Result<(), ArchiveError> {
        let what = if !start.0.is_multiple_of(ARCHIVE_SEGMENT_BYTES) {
            "no segment begins there"
        } else if bytes != ARCHIVE_SEGMENT_BYTES {
            "it is not 16 MiB long"
        } else {
            return Ok(());
        };
        Err(ArchiveError::Malformed { key: key.to_owned(), what })
    }

    /// Archives the segment that begins at `start`: bytes of committed WAL, zeros before the log's beginning. Every
    /// safekeeper may do that for the same segment; the first one writes it.
    ///
    /// # Errors
    /// One with other bytes is there ([`ArchiveError::Differs`]), the caller broke a rule, or see [`StorageError`].
    pub async fn put_segment(&self, start: Lsn, bytes: impl Into<Bytes>) -> Result<(), ArchiveError> {
        let (key, bytes) = (keys::segment(self.log, start), bytes.into());
        self.check(&key, start, bytes.len() as u64)?;
        match self.storage.put_new(&key, bytes).await? {
            PutNew::Created | PutNew::AlreadyThere { same: true } => Ok(()),
            PutNew::AlreadyThere { same: false } => Err(ArchiveError::Differs { key }),
        }
    }

    /// The segment that begins at `start`.
    ///
    /// # Errors
    /// It is not there or has another length, or see [`StorageError`].
    pub async fn get_segment(&self, start: Lsn) -> Result<Bytes, ArchiveError> {
        let key = keys::segment(self.log, start);
        let bytes = self.storage.get_large(&key).await?;
        self.check(&key, start, bytes.len() as u64)?;
        Ok(bytes)
    }

    /// Whether the segment that begins at `start` is archived.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn contains(&self, start: Lsn) -> Result<bool, StorageError> {
        match self.storage.get_range(&keys::segment(self.log, start), 0..1).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Starts of the segments that are archived, rising. There may be gaps: three safekeepers archive at their own pace.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn list(&self) -> Result<Vec<Lsn>, StorageError> {
        let segments = self.storage.list(&keys::wal(self.log)).await?;
        Ok(segments.iter().filter_map(|segment| keys::number(keys::name(&segment.key))).map(Lsn).collect())
    }
}
