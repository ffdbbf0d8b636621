//! From the configuration to a running process, and its orderly end.

use std::{io, sync::atomic::Ordering, thread, time::Duration};

use driver::{Listener, Signals, mpsc};
use identity::{Role, Tls, TlsError};
use pgtypes::LogId;
use prometheus_client::registry::Registry;
use remote_storage::{OpenError, RemoteStorage};
use wire::append::ErrorCode;

use crate::{
    admin_routes,
    archive::{Archive, ArchiveMetrics},
    config::Config,
    core::Core,
    data_dir::{DataDir, DataDirError},
    followers::{self, Admission, FollowerMetrics, SlotLimits},
    log_directory,
    metrics::Metrics,
    process::{JOBS_MAX, Job, Parts, Process},
    server,
    spares::Spares,
};

/// How long an ending process waits for its connections to send their last message.
const FAREWELL: Duration = Duration::from_millis(200);

/// Why a safekeeper did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The object store of the archive cannot be used.
    #[error("archive.object_storage: {0}")]
    Archive(#[from] OpenError),
    /// A port, a thread or the I/O driver cannot be had.
    #[error("{action}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn doing(action: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Io { action, source }
}

/// Runs a safekeeper until SIGTERM or SIGINT.
///
/// # Errors
/// [`StartError`].
pub fn run(config: Config) -> Result<(), StartError> {
    raise_descriptor_limit().map_err(doing("raise the limit of open files"))?;
    let driver = driver::probe().map_err(doing("start the I/O driver"))?;
    if driver == driver::DriverKind::Polling {
        tracing::warn!("io_uring is forbidden or absent here; using ordinary I/O, which costs more CPU per commit");
    }
    let tls = config.tls.files().map_err(StartError::Config)?.map(Tls::load).transpose()?;
    if let Some(tls) = &tls {
        tls.check_own(Role::Safekeeper, None)?;
    } else {
        tracing::warn!("TLS is off: anyone who reaches the ports can rewrite history");
    }
    let data_dir = DataDir::open(&config.data_dir)?;
    let logs = data_dir.list_logs()?;
    let append = driver::bind(&config.listen.append).map_err(doing("append port"))?;
    let port = |socket: &std::net::TcpListener| socket.local_addr().map(|address| address.port());
    let append_port = port(&append).map_err(doing("append port"))?;
    let replication = driver::bind(&config.listen.replication).map_err(doing("replication port"))?;
    let replication_port = port(&replication).map_err(doing("replication port"))?;
    driver::run_core(serve(config, driver, tls, data_dir, logs, append, append_port, replication, replication_port))
        .map_err(doing("start the I/O driver"))?
}

/// Allows as many open files as the system does: each log has a few, and the usual soft limit of 1,024 dates from `select`.
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

#[expect(clippy::too_many_arguments, reason = "called once, with what the lines above it have opened")]
async fn serve(
    config: Config,
    driver: driver::DriverKind,
    tls: Option<Tls>,
    data_dir: DataDir,
    logs: Vec<LogId>,
    append: std::net::TcpListener,
    append_port: u16,
    replication: std::net::TcpListener,
    replication_port: u16,
) -> Result<(), StartError> {
    // First of all, so that a signal during recovery ends the process in order, too.
    let mut signals = Signals::catch(&[libc::SIGTERM, libc::SIGINT]).map_err(doing("catch signals"))?;
    let direct_io = driver::direct_io_works(data_dir.root()).await.map_err(doing("write to the data directory"))?;
    if !direct_io {
        tracing::warn!("the data directory's file system has no direct I/O: WAL goes through the page cache");
    }
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    metrics.set_driver(driver);
    let archive = match &config.archive {
        Some(archive) => {
            Some(Archive::new(RemoteStorage::open(&archive.object_storage)?, ArchiveMetrics::register(&mut registry)))
        }
        None => None,
    };
    let disk = config.disk;
    let spares = Spares::open(data_dir.spares(), direct_io, disk.spare_segments.into(), disk.headroom, metrics.clone())
        .map_err(doing("take stock of the spare segments"))?;
    let channels = (0..config.cores).map(|_| mpsc::channel::<Job>(JOBS_MAX));
    let (senders, receivers): (Vec<_>, Vec<_>) = channels.unzip();
    let limits =
        SlotLimits { lag_bytes_max: config.replication.slot_lag_max, silence_max: config.replication.slot_silence_max };
    let users_file = config.replication.users_file.clone();
    let admission = Admission::new(tls.clone(), users_file, limits, FollowerMetrics::register(&mut registry))
        .map_err(doing("draw random numbers"))?;
    let (admin_address, metrics_address) = (config.listen.admin.clone(), config.listen.metrics.clone());
    let process = Process::new(Parts {
        config,
        data_dir,
        tls: tls.clone(),
        driver,
        direct_io,
        append_port,
        replication_port,
        metrics,
        spares,
        admission,
        cores: senders,
    });

    let (ready, mut all_ready) = mpsc::channel::<()>(receivers.len());
    let mut ports = Some((append, replication));
    let mut threads = Vec::new();
    for (index, jobs) in receivers.into_iter().enumerate() {
        let (process, logs, ports, mut ready) = (process.clone(), logs.clone(), ports.take(), ready.clone());
        let archive = archive.clone();
        let thread = driver::start_core(&format!("core-{index}"), move || async move {
            let core = Core::new(process, index);
            log_directory::recover_all(&core, &logs);
            driver::spawn(core.clone().run_timers());
            driver::spawn(core.clone().close_idle_files());
            driver::spawn(followers::keep_slots(core.clone()));
            if let Some(archive) = archive {
                driver::spawn(archive.keep(core.clone()));
            }
            if let Some((append, replication)) = ports {
                driver::spawn(server::accept(core.clone(), Listener::attach(append)?));
                driver::spawn(followers::accept(core.clone(), Listener::attach(replication)?));
            }
            // Fails only when nobody waits any more.
            let _ = ready.try_send(());
            drop(ready);
            core.run_jobs(jobs).await;
            core.followers.stop().await;
            for log in core.logs() {
                log.close(ErrorCode::Stopping, "this safekeeper is stopping").await;
            }
            driver::sleep(FAREWELL).await;
            Ok(())
        });
        threads.push(thread.map_err(doing("start a core"))?);
    }
    drop(ready);
    for _ in 0..threads.len() {
        if futures_util::StreamExt::next(&mut all_ready).await.is_none() {
            // A core ended before it was ready: its result says why.
            return join(threads).await;
        }
    }
    let admin =
        admin::serve(&admin_address, tls, admin_routes::router(process.clone())).map_err(doing("admin port"))?;
    let figures = admin::serve_metrics(&metrics_address, registry).map_err(doing("metrics port"))?;
    tracing::info!(
        member = process.member().0,
        disk = %process.disk(),
        %driver,
        direct_io,
        append_port,
        replication_port,
        admin = %admin.address(),
        metrics = %figures.address(),
        logs = logs.len(),
        "safekeeper is ready"
    );
    let keeper = driver::spawn(process.spares.clone().keep(process.notices.clone()));
    let caught = {
        let keeper = std::pin::pin!(keeper);
        let signal = std::pin::pin!(signals.wait());
        match futures_util::future::select(signal, keeper).await {
            futures_util::future::Either::Left((caught, _)) => caught.map_err(doing("wait for signals"))?,
            futures_util::future::Either::Right((result, _)) => {
                return result.map_err(doing("keep spare segments"));
            }
        }
    };
    tracing::info!(signals = ?caught, "stopping");
    driver::unblock(move || {
        admin.stop();
        figures.stop();
    })
    .await;
    process.stopping.store(true, Ordering::Release);
    for core in 0..process.core_count() {
        // A full queue wakes the core, too.
        let _ = process.send(core, |_| ());
    }
    let result = join(threads).await;
    tracing::info!("stopped");
    result
}

type CoreThread = thread::JoinHandle<io::Result<io::Result<()>>>;

async fn join(threads: Vec<CoreThread>) -> Result<(), StartError> {
    driver::unblock(move || {
        for thread in threads {
            // A panic ends the process before it gets here: tasks abort, and the core's own future is joined last.
            let ended = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            ended.and_then(|result| result).map_err(doing("run a core"))?;
        }
        Ok(())
    })
    .await
}
