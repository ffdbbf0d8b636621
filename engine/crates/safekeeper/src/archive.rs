//! Committed WAL goes to the object store: segments that are sealed, one after the other, by every safekeeper for itself.
//!
//! How far this safekeeper is, is the position of a consumer of the log ([`ARCHIVE`]): WAL that is not archived stays on
//! the disk. The first safekeeper writes a segment, the others compare theirs with it: a difference is reported, and
//! nothing is removed here any more.

use std::rc::Rc;

use futures_util::StreamExt;
use logstore::{Reader, SEGMENT_BYTES};
use pgtypes::Lsn;
use prometheus_client::{
    metrics::counter::Counter,
    registry::{Registry, Unit},
};
use remote_storage::{ArchiveError, RemoteStorage, StorageError, WalArchive};

use crate::{core::Core, files::ReadError, log::LogDriver};

const _: () = assert!(SEGMENT_BYTES == remote_storage::ARCHIVE_SEGMENT_BYTES);

/// The consumer that keeps WAL until it is archived.
pub const ARCHIVE: &str = "archive";

/// A segment is sealed once in a while: looking for one more often finds nothing.
const INTERVAL: std::time::Duration = std::time::Duration::from_secs(1);
/// Logs of a core that upload at once; each holds a segment in memory, twice while it is compared.
const LOGS_AT_ONCE: usize = 2;
/// Segments of one log in a row, before the others have their turn.
const SEGMENTS_IN_A_ROW: usize = 8;
/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;

/// What the archive did, all cores together.
#[derive(Clone, Default)]
pub struct ArchiveMetrics {
    segments: Counter,
    bytes: Counter,
    failures: Counter,
}

impl ArchiveMetrics {
    /// Registers everything in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("lakebase_safekeeper");
        registry.register("archived_segments", "Segments that are in the archive", metrics.segments.clone());
        registry.register_with_unit("archived", "WAL that is in the archive", Unit::Bytes, metrics.bytes.clone());
        registry.register("archive_failures", "Segments that could not be archived yet", metrics.failures.clone());
        metrics
    }
}

/// The archive of this process.
#[derive(Clone)]
pub struct Archive {
    storage: RemoteStorage,
    metrics: ArchiveMetrics,
}

/// Why a segment is not archived now.
#[derive(Debug, thiserror::Error)]
enum NotArchived {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the position of the archive cannot be kept: {0}")]
    Consumer(#[from] logstore::ConsumerError),
    #[error("segment {0} is damaged here, and no other safekeeper has archived it yet")]
    Damaged(Lsn),
}

/// What is to be done with a log's next segment.
enum Next {
    /// It is not sealed yet.
    Nothing,
    /// Its WAL from `data_begin` on is to be archived; nothing of the log lies before.
    Archive { start: Lsn, data_begin: Lsn },
    /// This safekeeper came too late for its beginning: those who were there archive it.
    Skip { start: Lsn },
    /// It failed its checksum.
    Damaged { start: Lsn },
}

impl Archive {
    /// An archive in a store.
    pub fn new(storage: RemoteStorage, metrics: ArchiveMetrics) -> Self {
        Self { storage, metrics }
    }

    /// Archives what the logs of a core have, until the process is ending.
    pub async fn keep(self, core: Rc<Core>) {
        let stopping = std::pin::pin!(core.until_stopping());
        let rounds = std::pin::pin!(async {
            loop {
                let more = futures_util::stream::iter(core.logs())
                    .map(async |log| self.archive_some(&log).await)
                    .buffer_unordered(LOGS_AT_ONCE)
                    .fold(false, async |more, of_log| more || of_log)
                    .await;
                if !more {
                    driver::sleep(INTERVAL).await;
                }
            }
        });
        futures_util::future::select(stopping, rounds).await;
    }

    /// Archives some segments; whether there may be more.
    async fn archive_some(&self, log: &Rc<LogDriver>) -> bool {
        for _ in 0..SEGMENTS_IN_A_ROW {
            match self.archive_next(log).await {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) => {
                    self.metrics.failures.inc();
                    if log.process().notices.is_new(&format!("archive of {}", log.id()), driver::now()) {
                        tracing::error!(log = %log.id(), %error, "WAL is not archived, and stays on the disk until it is");
                    }
                    return false;
                }
            }
        }
        true
    }

    /// Archives the next segment; whether there was one.
    async fn archive_next(&self, log: &Rc<LogDriver>) -> Result<bool, NotArchived> {
        if log.is_closed() {
            return Ok(false);
        }
        let archive = WalArchive::new(self.storage.clone(), log.id());
        let start = match next(log)? {
            Next::Nothing => return Ok(false),
            Next::Skip { start } => start,
            // As long as the bytes are safe somewhere, the log goes on.
            Next::Damaged { start } if archive.contains(start).await? => start,
            Next::Damaged { start } => return Err(NotArchived::Damaged(start)),
            Next::Archive { start, data_begin } => {
                let segment = read_segment(log, start, data_begin).await?;
                archive.put_segment(start, segment).await?;
                self.metrics.segments.inc();
                self.metrics.bytes.inc_by(SEGMENT_BYTES);
                start
            }
        };
        if !log.is_closed() {
            log.set_consumer(ARCHIVE, start.advance(SEGMENT_BYTES))?;
        }
        Ok(true)
    }
}

/// Looks for the next segment. A log that the archive did not know keeps its WAL from now on.
fn next(log: &LogDriver) -> Result<Next, logstore::ConsumerError> {
    let (known, oldest, log_start) = log.with(|machine| {
        let known = machine.consumers().iter().find(|consumer| consumer.name == ARCHIVE);
        let identity = machine.acceptor().identity();
        (known.map(|consumer| consumer.confirmed_lsn), machine.oldest_lsn(), identity.start.record_end)
    });
    if known.is_none() {
        log.set_consumer(ARCHIVE, oldest)?;
    }
    let start = known.unwrap_or(oldest).floor(SEGMENT_BYTES);
    let end = start.advance(SEGMENT_BYTES);
    Ok(log.with(|machine| match machine.segment(start) {
        Some(segment) if segment.damaged => Next::Damaged { start },
        Some(segment) if segment.sealed => {
            let data_begin = start.max(log_start);
            if oldest > data_begin {
                return Next::Skip { start };
            }
            // After a start, a safekeeper knows only later that what it has sealed is committed.
            match machine.readable(data_begin, Reader::Anyone) {
                Ok(readable) if readable >= end => Next::Archive { start, data_begin },
                _ => Next::Nothing,
            }
        }
        _ => Next::Nothing,
    }))
}

/// The bytes of a sealed segment, zeros before the log's beginning. They are verified on the way.
async fn read_segment(log: &LogDriver, start: Lsn, data_begin: Lsn) -> Result<Vec<u8>, ReadError> {
    let mut segment = vec![0; data_begin.bytes_since(start) as usize];
    while (segment.len() as u64) < SEGMENT_BYTES {
        let bytes = log.read_wal(start.advance(segment.len() as u64), READ_BYTES).await?;
        let missing = SEGMENT_BYTES as usize - segment.len();
        segment.extend_from_slice(&bytes[..bytes.len().min(missing)]);
    }
    Ok(segment)
}
