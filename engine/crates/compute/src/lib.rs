//! The compute agent: runs an unmodified PostgreSQL 17 whose WAL goes to a quorum of safekeepers.
//!
//! Read in this order: `agent.rs` (the steps from a grant to a running server), `session.rs` (the path of a commit),
//! `framer.rs` (PostgreSQL's WAL as records), `recovery.rs` (where PGDATA comes from), `isolation.rs` (how every process of
//! PostgreSQL is ended). `docs/compute.md` is for users.

mod advisory;
mod agent;
mod area;
mod backpressure;
mod base;
mod cache;
mod cold_start;
mod config;
mod core;
mod data_dir;
mod framer;
mod free_space;
pub mod isolation;
mod link;
mod metrics;
mod page_service_config;
mod pages;
pub mod postgres;
mod postgres_log;
mod process_tree;
mod recovery;
mod restore;
mod routes;
mod session;
mod settings;
mod settled;
mod shard_map;
mod shared_memory;
mod sparse;
mod status;
mod wal_tail;

use std::{io, path::Path, path::PathBuf, sync::Arc};

use identity::{Role, Tls, TlsFiles};
use prometheus_client::registry::Registry;

use crate::{
    agent::{Agent, AgentError, Event, Mailbox, Settings, Source},
    core::Core,
    data_dir::{DataDir, DataDirError},
    isolation::{User, find_user, isolation_name},
    link::Greeting,
    metrics::{CoreView, Metrics},
    pages::Pages,
    session::Surroundings,
    status::{Identity, Status},
};
pub use crate::{
    base::{Base, BaseError, inspect as inspect_base},
    config::{Config, ConfigError, IsolationChoice, LogFormat, PostgresLog},
    isolation::init_main,
};

/// Major version of PostgreSQL that this engine knows.
const POSTGRES_MAJOR: u32 = 17;
/// Minor versions that it was tested with. A minor release may change WAL records (17.11 did).
const TESTED_MINORS: &[u32] = &[11, 12];

/// The running program, also after its file was replaced by a newer one.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Why the agent does not start, or ended. The text is for the person who started it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The base backup.
    #[error("base_backup: {0}")]
    Base(#[from] BaseError),
    /// PostgreSQL's program.
    #[error("postgres.bin_dir: {0}")]
    Program(io::Error),
    /// Its version.
    #[error("PostgreSQL {major}.{minor} is not supported: expected {POSTGRES_MAJOR}")]
    Major {
        /// Found.
        major: u32,
        /// Found.
        minor: u32,
    },
    /// Its minor version.
    #[error(
        "PostgreSQL {POSTGRES_MAJOR}.{minor} was not tested with this engine (tested: {}); allow_untested_minor = true runs it \
         all the same",
        tested_minors()
    )]
    Minor {
        /// Found.
        minor: u32,
    },
    /// The user for PostgreSQL.
    #[error("postgres.user: {0}")]
    User(String),
    /// The library.
    #[error("postgres.vfs_library: {path}: {source}")]
    Library {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Certificates.
    #[error("tls: {0}")]
    Tls(#[from] identity::TlsError),
    /// The agent's directory.
    #[error("data_dir: {0}")]
    DataDir(#[from] DataDirError),
    /// A port, a thread, a system call.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// While it ran.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

fn tested_minors() -> String {
    let minors: Vec<String> = TESTED_MINORS.iter().map(|minor| format!("{POSTGRES_MAJOR}.{minor}")).collect();
    minors.join(", ")
}

/// Reads `config_path` and runs the agent until SIGTERM, SIGINT or `POST /v1/stop`.
///
/// Must be called on the process's main thread, before others exist: PostgreSQL's death signal is tied to it.
///
/// # Errors
/// What is wrong, for the person who started it.
pub fn run(config_path: &Path) -> Result<(), Error> {
    run_config(Config::load(config_path)?)
}

/// As [`run`], with a configuration that was read before.
///
/// # Errors
/// As [`run`].
pub fn run_config(config: Config) -> Result<(), Error> {
    let program = config.postgres.bin_dir.join("postgres");
    let (major, minor) = postgres::version(&program).map_err(Error::Program)?;
    check_version(major, minor, config.allow_untested_minor)?;
    let library = &config.postgres.vfs_library;
    std::fs::metadata(library).map_err(|source| Error::Library { path: library.clone(), source })?;
    let user = postgres_user(config.postgres.user.as_deref())?;
    let tls = match (config.tls.mode, config.tls.files()) {
        (config::TlsMode::Required, Some((ca, certificate, key))) => {
            let files = TlsFiles { ca: ca.to_owned(), certificate: certificate.to_owned(), key: key.to_owned() };
            let tls = Tls::load(files)?;
            tls.check_own(Role::Compute, Some(config.cluster))?;
            Some(tls)
        }
        _ => {
            tracing::info!("TLS is off: anyone who reaches the ports may act for the operator");
            None
        }
    };
    let source = match &config.base_backup {
        Some(base_backup) => Source::BaseBackup(Box::new(base::inspect(base_backup)?)),
        // One of the two is given: the configuration was checked.
        None => Source::PageService(config.page_service.clone().expect("one source is given")),
    };
    let data_dir = DataDir::open(&config.data_dir)?;
    let helper = PathBuf::from(OWN_PROGRAM);
    let isolation = postgres::choose_isolation(&helper, config.postgres.isolation)
        .map_err(io_error("choose how PostgreSQL's processes are held together"))?;
    let driver = driver::probe().map_err(io_error("start the I/O driver"))?;
    tracing::info!(
        writer = %config.writer,
        log = %config.log_id(),
        postgres = format!("{major}.{minor}"),
        isolation = isolation_name(isolation),
        driver = driver.as_str(),
        source = source.as_str(),
        "compute agent"
    );

    let view = Arc::new(CoreView::default());
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry, view.clone());
    let identity = Identity {
        cluster: config.cluster.to_string(),
        branch: config.branch.to_string(),
        writer: config.writer.to_string(),
        postgres_version: format!("{major}.{minor}"),
        isolation: isolation_name(isolation),
        driver: driver.as_str(),
    };
    let status = Status::new(identity, view.clone(), metrics.clone());
    let (mailbox, events) = Mailbox::new();
    let post = |mailbox: &Mailbox| {
        let mailbox = mailbox.clone();
        Arc::new(move |event| mailbox.post(event))
    };
    let (from_core, from_signals, from_routes) = (post(&mailbox), post(&mailbox), post(&mailbox));
    let surroundings = Surroundings {
        greeting: Greeting { log: config.log_id(), system_id: source.system_id(), tls: tls.clone() },
        on_event: Arc::new(move |session, event| from_core(Event::Core(session, event))),
        view,
        metrics: metrics.clone(),
    };
    let core = Core::start(surroundings, Arc::new(move || from_signals(Event::Signal)))
        .map_err(io_error("start the proposer's thread"))?;
    let routes =
        routes::routes(config.cluster, status.clone(), Arc::new(move |request| from_routes(Event::Request(request))));
    let tls_of_agent = tls.clone();
    let admin_server = admin::serve(&config.listen.admin, tls, routes).map_err(io_error("listen.admin"))?;
    let metrics_server = admin::serve_metrics(&config.listen.metrics, registry).map_err(io_error("listen.metrics"))?;

    let pages = match &source {
        Source::BaseBackup(_) => None,
        Source::PageService(_) => Some(Pages::start().map_err(io_error("start the pages' thread"))?),
    };
    let settings = Settings { config, source, tls: tls_of_agent, helper, isolation, user };
    let result = Agent::new(settings, data_dir, core, pages, (mailbox, events), status, metrics).and_then(Agent::run);
    admin_server.stop();
    metrics_server.stop();
    Ok(result?)
}

fn check_version(major: u32, minor: u32, allow_untested: bool) -> Result<(), Error> {
    if major != POSTGRES_MAJOR {
        return Err(Error::Major { major, minor });
    }
    if !TESTED_MINORS.contains(&minor) && !allow_untested {
        return Err(Error::Minor { minor });
    }
    Ok(())
}

/// Whom PostgreSQL runs as: `None` for the agent's own user.
fn postgres_user(name: Option<&str>) -> Result<Option<User>, Error> {
    // SAFETY: no pointers.
    let own = unsafe { libc::geteuid() };
    let Some(name) = name else {
        return match own {
            0 => Err(Error::User("required when the agent runs as root, because PostgreSQL refuses root".into())),
            _ => Ok(None),
        };
    };
    let user = find_user(name).map_err(|error| Error::User(format!("look up {name:?}: {error}")))?;
    let user = user.ok_or_else(|| Error::User(format!("there is no system user {name:?}")))?;
    match (own, user.uid) {
        (_, 0) => Err(Error::User(format!("{name:?} is root, and PostgreSQL refuses root"))),
        (0, _) => Ok(Some(user)),
        (own, uid) if own == uid => Ok(None),
        (own, _) => Err(Error::User(format!("only root can run PostgreSQL as {name:?}; the agent runs as user {own}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untested_versions_are_refused_unless_allowed() {
        assert!(check_version(17, 11, false).is_ok());
        assert!(matches!(check_version(17, 99, false), Err(Error::Minor { minor: 99 })));
        assert!(check_version(17, 99, true).is_ok());
        assert!(matches!(check_version(18, 0, true), Err(Error::Major { .. })));
    }

    #[test]
    fn postgresql_never_runs_as_root() {
        assert!(postgres_user(Some("root")).is_err());
        assert!(postgres_user(Some("no-such-user-here")).is_err());
    }
}
