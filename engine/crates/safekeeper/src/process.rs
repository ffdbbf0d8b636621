//! What all cores share.

use std::{
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use admin::Notices;
use driver::{DriverKind, mpsc, oneshot};
use identity::{Caller, NotAllowed, Tls};
use pgtypes::{ClusterId, DiskId, Instant, LogId, MemberId};

use crate::{
    api::DamagedLog, config::Config, core::Core, data_dir::DataDir, followers::Admission, metrics::Metrics,
    spares::Spares,
};

/// Requests from other threads that wait for a core. At the bound the caller is told to try again.
pub const JOBS_MAX: usize = 1024;

/// Something to be done on a core.
pub type Job = Box<dyn FnOnce(&Rc<Core>) + Send>;

/// The core does not take requests: it has too many, or the process is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this safekeeper is overloaded or stopping; try again")]
pub struct Unavailable;

/// What all cores share.
pub struct Process {
    /// As read at the start.
    pub config: Config,
    /// The data disk.
    pub data_dir: DataDir,
    /// Certificates; `None` when TLS is switched off.
    pub tls: Option<Tls>,
    /// How I/O reaches the kernel.
    pub driver: DriverKind,
    /// Whether segments are written past the page cache.
    pub direct_io: bool,
    /// Ports as bound.
    pub append_port: u16,
    /// Ports as bound.
    pub replication_port: u16,
    /// Figures.
    pub metrics: Metrics,
    /// Problems that were logged.
    pub notices: Arc<Notices>,
    /// Pre-zeroed segments.
    pub spares: Arc<Spares>,
    /// How stock followers are let in.
    pub admission: Arc<Admission>,
    /// Bound of what is fetched from peers.
    pub catch_up_rate: RateLimit,
    /// Logs that could not be opened.
    pub damaged: Mutex<Vec<DamagedLog>>,
    /// The process is ending.
    pub stopping: AtomicBool,
    cores: Vec<mpsc::Sender<Job>>,
    next_connection: AtomicU64,
}

/// What a process is made of; the rest begins empty.
pub struct Parts {
    /// See [`Process`].
    pub config: Config,
    /// See [`Process`].
    pub data_dir: DataDir,
    /// See [`Process`].
    pub tls: Option<Tls>,
    /// See [`Process`].
    pub driver: DriverKind,
    /// See [`Process`].
    pub direct_io: bool,
    /// See [`Process`].
    pub append_port: u16,
    /// See [`Process`].
    pub replication_port: u16,
    /// See [`Process`].
    pub metrics: Metrics,
    /// See [`Process`].
    pub spares: Arc<Spares>,
    /// See [`Process`].
    pub admission: Arc<Admission>,
    /// One for each core.
    pub cores: Vec<mpsc::Sender<Job>>,
}

impl Process {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts {
            config,
            data_dir,
            tls,
            driver,
            direct_io,
            append_port,
            replication_port,
            metrics,
            spares,
            admission,
            cores,
        } = parts;
        Arc::new(Self {
            catch_up_rate: RateLimit::new(config.catch_up.rate),
            config,
            data_dir,
            tls,
            driver,
            direct_io,
            append_port,
            replication_port,
            metrics,
            notices: Arc::default(),
            spares,
            admission,
            damaged: Mutex::default(),
            stopping: AtomicBool::new(false),
            cores,
            next_connection: AtomicU64::new(1),
        })
    }

    /// Number of this safekeeper.
    pub fn member(&self) -> MemberId {
        self.config.member
    }

    /// Identity of its disk.
    pub fn disk(&self) -> DiskId {
        self.data_dir.disk()
    }

    /// The core that owns a log.
    pub fn core_of(&self, log: LogId) -> usize {
        // FNV-1a over the identity: the same in every run, which nothing depends on, and even.
        let bytes = log.cluster.0.iter().chain(&log.branch.0);
        let hash =
            bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
        (hash % self.cores.len() as u64) as usize
    }

    /// Hands `job` to a core.
    ///
    /// # Errors
    /// [`Unavailable`].
    pub fn send(&self, core: usize, job: impl FnOnce(&Rc<Core>) + Send + 'static) -> Result<(), Unavailable> {
        self.cores[core].clone().try_send(Box::new(job)).map_err(|_| Unavailable)
    }

    /// Runs `ask` on a core; it answers through the sender it gets.
    ///
    /// # Errors
    /// [`Unavailable`], also when the core drops the question because it ends.
    pub async fn ask<T, F>(&self, core: usize, ask: F) -> Result<T, Unavailable>
    where
        T: Send + 'static,
        F: FnOnce(&Rc<Core>, oneshot::Sender<T>) + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        self.send(core, move |core| ask(core, sender))?;
        receiver.await.map_err(|_| Unavailable)
    }

    /// Number of cores.
    pub fn core_count(&self) -> usize {
        self.cores.len()
    }

    /// A number that no other connection of this run has.
    pub fn next_connection(&self) -> u64 {
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether the process is ending.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Logs that could not be opened.
    pub fn damaged(&self) -> MutexGuard<'_, Vec<DamagedLog>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lakebase that this safekeeper's own certificate belongs to; `None` without TLS.
    pub fn own_cluster(&self) -> Option<ClusterId> {
        self.tls.as_ref().map(|tls| tls.own().cluster)
    }

    /// Who opened the connection.
    ///
    /// # Errors
    /// TLS is required and the certificate names nobody.
    pub fn caller(&self, certificate: Option<&[u8]>) -> Result<Caller, NotAllowed> {
        match &self.tls {
            None => Ok(Caller::Unchecked),
            Some(_) => Caller::of_certificate(certificate),
        }
    }
}

/// Bytes per second, for all cores together; unused ones are saved up for a quarter of a second.
pub struct RateLimit {
    bytes_per_second: u64,
    /// When the bytes granted so far have been paid for.
    paid_until: Mutex<Instant>,
}

impl RateLimit {
    /// A limit that has not been used yet.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, paid_until: Mutex::new(Instant(0)) }
    }

    /// Counts `bytes` at `now`; returns how long the caller has to wait before it goes on.
    pub fn spend(&self, bytes: u64, now: Instant) -> Duration {
        const SAVED: Duration = Duration::from_millis(250);
        let cost = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second)) as u64);
        let mut paid_until = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = Instant(now.0.saturating_sub(SAVED.as_nanos() as u64));
        *paid_until = (*paid_until).max(earliest).after(cost);
        paid_until.since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_kept_over_time_and_idle_time_is_saved_up_to_a_bound() {
        let limit = RateLimit::new(1 << 20);
        let start = Instant(3_600_000_000_000);
        assert_eq!(Duration::ZERO, limit.spend(256 << 10, start));
        assert_eq!(Duration::from_secs(1), limit.spend(1 << 20, start));
        assert_eq!(Duration::from_secs(2), limit.spend(1 << 20, start));
        assert_eq!(Duration::from_millis(1000), limit.spend(1 << 20, start.after(Duration::from_secs(2))));
        assert_eq!(Duration::from_millis(750), limit.spend(1 << 20, start.after(Duration::from_secs(3600))));
    }
}
