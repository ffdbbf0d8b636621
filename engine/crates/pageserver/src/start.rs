//! From the configuration to a running process, and its orderly end.

use std::{
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use driver::{Listener, Signals, mpsc};
use futures_util::{StreamExt, future::Either};
use identity::{Role, Tls, TlsError};
use prometheus_client::registry::Registry;
use remote_storage::RemoteStorage;

use crate::{
    attach, compaction,
    config::Config,
    data_dir::{DataDir, DataDirError},
    feed, flush,
    metrics::Metrics,
    orphans,
    owner::Owner,
    process::{JOBS_MAX, Job, Process},
    progress, routes, server,
};

/// How long an ending process waits for its connections to send their last message.
const FAREWELL: Duration = Duration::from_millis(200);

/// Why a page server did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(DataDirError),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Object storage cannot be used.
    #[error("object_storage: {0}")]
    Storage(String),
    /// What object storage has of the shard cannot be used.
    #[error("{0}")]
    Manifest(String),
    /// A newer owner has the shard.
    #[error("the shard has another owner: {0}")]
    Superseded(String),
    /// A port, a thread or the I/O driver cannot be had.
    #[error("{action}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A fault of this program; a restart begins from what is durable.
    #[error("{0}")]
    Internal(String),
    /// It was told to end before it had begun.
    #[error("stopped")]
    Stopped,
}

fn doing(action: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Io { action, source }
}

/// Runs a page server until SIGTERM or SIGINT.
///
/// # Errors
/// [`StartError`].
pub fn run(config: Config) -> Result<(), StartError> {
    raise_descriptor_limit().map_err(doing("raise the limit of open files"))?;
    let driver = driver::probe().map_err(doing("start the I/O driver"))?;
    if driver == driver::DriverKind::Polling {
        tracing::warn!("io_uring is forbidden or absent here; using ordinary I/O, which costs more CPU per page");
    }
    let tls = config.tls.files().map_err(StartError::Config)?.map(Tls::load).transpose()?;
    if let Some(tls) = &tls {
        tls.check_own(Role::PageServer, Some(config.cluster))?;
    } else {
        tracing::warn!("TLS is off: anyone who reaches the ports can read all pages");
    }
    if config.ingest.test_ingest_delay_ms > 0 {
        tracing::warn!(milliseconds = config.ingest.test_ingest_delay_ms, "WAL is delayed at random, for a test");
    }
    let data_dir = DataDir::open(&config.data_dir, config.log(), config.shard()).map_err(StartError::DataDir)?;
    let storage =
        RemoteStorage::open(&config.object_storage).map_err(|error| StartError::Storage(error.to_string()))?;
    let pages = driver::bind(&config.listen.pages).map_err(doing("page port"))?;
    driver::run_core(serve(config, driver, tls, data_dir, storage, pages)).map_err(doing("start the I/O driver"))?
}

/// Allows as many open files as the system does: layers have one each, and the usual soft limit of 1,024 dates from `select`.
fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writing and reading, and the calls keep no reference to it.
    let result = unsafe {
        match libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) {
            0 => {
                limit.rlim_cur = limit.rlim_max;
                libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
            }
            failed => failed,
        }
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

async fn serve(
    config: Config,
    driver: driver::DriverKind,
    tls: Option<Tls>,
    data_dir: DataDir,
    storage: RemoteStorage,
    pages: std::net::TcpListener,
) -> Result<(), StartError> {
    // First of all, so that a signal during the attach ends the process in order, too.
    let mut signals = Signals::catch(&[libc::SIGTERM, libc::SIGINT]).map_err(doing("catch signals"))?;
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    metrics.set_driver(driver);
    let pages_port = pages.local_addr().map_err(doing("page port"))?.port();
    let (jobs, waiting) = mpsc::channel::<Job>(JOBS_MAX);
    let process = Arc::new(Process {
        tls: tls.clone(),
        driver,
        pages_port,
        metrics,
        notices: Arc::default(),
        stopping: AtomicBool::new(false),
        jobs,
        config,
    });
    // Before the attach, which may wait for object storage: whoever looks after the process sees that it lives.
    let figures = admin::serve_metrics(&process.config.listen.metrics, registry).map_err(doing("metrics port"))?;
    let owner = {
        let attach = std::pin::pin!(attach::attach(&process, storage, &data_dir));
        let signal = std::pin::pin!(signals.wait());
        match futures_util::future::select(attach, signal).await {
            Either::Left((owner, _)) => owner?,
            Either::Right((caught, _)) => {
                tracing::info!(signals = ?caught.map_err(doing("wait for signals"))?, "stopped before the shard was attached");
                return Ok(());
            }
        }
    };
    let admin = admin::serve(&process.config.listen.admin, tls, routes::router(process.clone()))
        .map_err(doing("admin port"))?;
    let listener = Listener::attach(pages).map_err(doing("page port"))?;
    driver::spawn(server::accept(owner.clone(), listener));
    driver::spawn(feed::follow(owner.clone()));
    driver::spawn(progress::tell_others(owner.clone()));
    driver::spawn(flush::watch_age(owner.clone()));
    driver::spawn(flush::write(owner.clone()));
    driver::spawn(flush::upload(owner.clone()));
    driver::spawn(compaction::tend(owner.clone()));
    driver::spawn(orphans::remove_orphans(owner.clone()));
    driver::spawn(run_jobs(owner.clone(), waiting));
    tracing::info!(
        shard = process.config.shard,
        generation = process.config.generation,
        %driver,
        pages_port,
        admin = %admin.address(),
        metrics = %figures.address(),
        "page server is ready"
    );
    {
        let signal = std::pin::pin!(signals.wait());
        let failed = std::pin::pin!(owner.until_stopping());
        match futures_util::future::select(signal, failed).await {
            Either::Left((caught, _)) => {
                tracing::info!(signals = ?caught.map_err(doing("wait for signals"))?, "stopping");
            }
            Either::Right(_) => tracing::info!("stopping, because it may not or cannot go on"),
        }
    }
    owner.stop();
    driver::unblock(move || {
        admin.stop();
        figures.stop();
    })
    .await;
    driver::sleep(FAREWELL).await;
    tracing::info!("stopped");
    // The lock of the directory is held up to here.
    drop(data_dir);
    owner.take_failure().map_or(Ok(()), Err)
}

/// Carries out what other threads ask, until the process is ending.
async fn run_jobs(owner: Rc<Owner>, mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.next().await {
        if owner.process.stopping.load(Ordering::Acquire) {
            return;
        }
        job(&owner);
    }
}
