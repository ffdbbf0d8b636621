//! A lakebase as of a moment becomes an ordinary PGDATA.
//!
//! Pages, lengths and metadata come from the page servers as of X. The directory looks as after a clean stop whose checkpoint
//! is the first record of the WAL segment behind X, as `pg_resetwal` leaves one: no byte of the log is needed, and no LSN in
//! a page is ahead of it. `pg_control` is written last, so that PostgreSQL refuses what is not complete.

mod directory;
mod fetch;
mod moment;
mod next_xid;

use std::{
    io,
    path::{Path, PathBuf},
    pin::pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use backup::{Plan, PlanError, RelationPages, Source};
use futures_util::future::{Either, select};
use metadata::CountersError;
use pageclient::{ClientConfig, PageClient, PageError as ServiceError, ShardMapError};
use pgtypes::{FrameSummary, Lsn, PgTimeline};
use wire::page::PageProgress;

pub use self::moment::{Moment, ParseMomentError};
use self::{
    directory::{TargetDirectory, sync_tree},
    fetch::{RelationFile, fetch},
    next_xid::last_full_xid,
};
use crate::{
    page::{PageError, PageRules},
    progress::Progress,
    relations::BLOCK_BYTES,
};

/// A page server that restarts, and fetches its layers from object storage, is back within this.
const DEADLINE: Duration = Duration::from_secs(120);
/// One that is there answers within this: from then on the user hears what is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// Page servers are this far behind the log at most, while all is well.
const LAG_MAX: Duration = Duration::from_secs(10);
/// How long page servers keep what the export reads, from each renewal on;
const LEASE_SECONDS: u32 = 600;
/// renewed so often.
const LEASE_RENEWAL: Duration = Duration::from_secs(120);

/// What to export, and where to.
#[derive(Clone)]
pub struct Export {
    /// The directory: empty, or not there yet.
    pub to: PathBuf,
    /// As of when; without it the newest position that all shards have.
    pub at: Option<Moment>,
    /// Whose pages, and where the page servers are.
    pub client: ClientConfig,
    /// Bytes of a WAL segment.
    pub segment_bytes: u64,
    /// PostgreSQL timeline.
    pub timeline: PgTimeline,
    /// Whether pages have checksums.
    pub has_checksums: bool,
    /// Reads of up to 64 pages in flight at once, above 0.
    pub requests_max: usize,
}

/// What was exported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exported {
    /// X: everything that ends at or before this position is in it.
    pub at: Lsn,
    /// Files of relations.
    pub files: u64,
    /// Pages that are not all zero.
    pub pages: u64,
}

/// No directory that PostgreSQL would start was left.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The directory holds something.
    #[error("{}: not empty; export writes into an empty directory, or one that does not exist yet", .0.display())]
    NotEmpty(PathBuf),
    /// A file or directory.
    #[error("{}: {cause}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The shards do not divide the pages among them.
    #[error(transparent)]
    Shards(#[from] ShardMapError),
    /// A page server.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// Not all page servers answer.
    #[error("not all page servers answer: {0}")]
    NotConnected(String),
    /// The moment is over.
    #[error("{at} is before the history that page servers keep, which begins at {horizon}")]
    BeforeHorizon {
        /// What was asked for.
        at: Lsn,
        /// What is there.
        horizon: Lsn,
    },
    /// The moment is yet to come.
    #[error("{at} is not there yet: page servers have the log up to {ingested}")]
    NotYet {
        /// What was asked for.
        at: Lsn,
        /// What is there.
        ingested: Lsn,
    },
    /// Something is in a tablespace, which has no place in a data directory: nothing is left out silently.
    #[error("{0}: tablespaces are not supported; drop it, or move it to pg_default, and export a later moment")]
    Tablespace(String),
    /// Metadata and lengths make no data directory.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The counters that page servers gave are damaged.
    #[error("page servers: {0}")]
    Counters(#[from] CountersError),
    /// A page is damaged.
    #[error("{0}: page servers gave a damaged page")]
    Page(#[from] PageError),
    /// By the user.
    #[error("interrupted")]
    Interrupted,
}

impl ExportError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> ExportError {
        let path = path.to_owned();
        move |cause| ExportError::Io { path, cause }
    }
}

/// Exports, on a core of `driver`. After an error the directory is as it was before.
///
/// # Errors
/// See [`ExportError`].
pub async fn run(export: &Export, progress: &dyn Progress) -> Result<Exported, ExportError> {
    let client = PageClient::new(export.client.clone())?;
    let service = progress_of(&client, progress).await?;
    let at = position(&client, export.at, service).await?;
    let target = TargetDirectory::create(&export.to)?;
    let exported = {
        let work = pin!(write(export, &client, at, progress));
        let lease = pin!(hold_lease(&client, at));
        match select(work, lease).await {
            Either::Left((exported, _)) => exported?,
            Either::Right((never, _)) => return Err(never),
        }
    };
    target.keep();
    Ok(exported)
}

/// Where the page servers are, once all are connected.
async fn progress_of(client: &PageClient, progress: &dyn Progress) -> Result<PageProgress, ExportError> {
    client.connect();
    let began = driver::now();
    let mut was_told = false;
    loop {
        if progress.is_interrupted() {
            return Err(ExportError::Interrupted);
        }
        // A shard that connects rings; a signal is looked for now and then.
        let known = client.progressed().until(|| client.progress());
        if let Some(known) = driver::timeout(Duration::from_millis(200), known).await {
            return Ok(known);
        }
        let waited = driver::now().since(began);
        let is_late = waited >= DEADLINE;
        if is_late || (waited >= PATIENCE && !was_told) {
            // Asked of every shard, for as long as those that are there need to answer: the error says whom and why.
            let asked = client.sizes(Lsn::MAX, driver::now().after(Duration::from_secs(2))).await;
            let trouble = asked.err().map_or_else(String::new, |error| error.to_string());
            if is_late {
                return Err(ExportError::NotConnected(trouble));
            }
            was_told = true;
            if !trouble.is_empty() {
                progress.wait(&format!("waiting for page servers, up to {} s: {trouble}", DEADLINE.as_secs()));
            }
        }
    }
}

/// X, once all page servers have it.
async fn position(client: &PageClient, at: Option<Moment>, service: PageProgress) -> Result<Lsn, ExportError> {
    let PageProgress { ingested_lsn: ingested, horizon_lsn: horizon, .. } = service;
    let at = match at {
        None => ingested,
        Some(Moment::Position(at)) => at,
        Some(Moment::Time(time)) => client.find_lsn(time, driver::now().after(DEADLINE)).await?.0,
    };
    if at < horizon {
        return Err(ExportError::BeforeHorizon { at, horizon });
    }
    let ingested = || client.progress().map_or(ingested, |progress| progress.ingested_lsn);
    let arrived = client.progressed().until(|| (at <= ingested()).then_some(()));
    match driver::timeout(LAG_MAX, arrived).await {
        Some(()) => Ok(at),
        None => Err(ExportError::NotYet { at, ingested: ingested() }),
    }
}

/// Ends with an error only.
async fn hold_lease(client: &PageClient, at: Lsn) -> ExportError {
    loop {
        if let Err(error) = client.take_lease(at, LEASE_SECONDS, driver::now().after(DEADLINE)).await {
            return error.into();
        }
        driver::sleep(LEASE_RENEWAL).await;
    }
}

async fn write(
    export: &Export,
    client: &PageClient,
    at: Lsn,
    progress: &dyn Progress,
) -> Result<Exported, ExportError> {
    // From the first byte on: the one that is held beside this work may come later.
    client.take_lease(at, LEASE_SECONDS, driver::now().after(DEADLINE)).await?;
    let plan = plan_at(export, client, at).await?;
    directory::write_all_but_pages(&export.to, &plan)?;
    let of_service = |file: &&backup::RelationFile| file.pages == RelationPages::Service;
    let files: Vec<RelationFile> = plan
        .relations
        .iter()
        .filter(of_service)
        .map(|file| RelationFile {
            path: PathBuf::from(&file.path),
            relation: file.relation,
            fork: file.fork,
            first_block: file.segment * plan.segment_blocks,
            blocks: file.blocks,
        })
        .collect();
    let bytes = files.iter().map(|file| u64::from(file.blocks) * BLOCK_BYTES as u64).sum();
    progress.begin("export", bytes);
    let rules = PageRules { has_checksums: export.has_checksums, end_bound: plan.begin() };
    let pages = fetch(client, &export.to, &files, at, rules, export.requests_max, progress).await?;
    directory::copy_init_forks(&export.to, &plan)?;
    // pg_control says that all the rest is there.
    let root = export.to.clone();
    driver::unblock(move || sync_tree(&root)).await?;
    directory::write_file(&export.to, &plan.control_file())?;
    let root = export.to.join("global");
    driver::unblock(move || sync_tree(&root)).await?;
    Ok(Exported { at, files: plan.relations.len() as u64, pages })
}

/// What the directory consists of.
async fn plan_at(export: &Export, client: &PageClient, at: Lsn) -> Result<Plan, ExportError> {
    let deadline = driver::now().after(DEADLINE);
    let sizes = client.sizes(at, deadline).await?;
    let metadata = client.metadata(at, deadline).await?;
    let forks: Vec<_> = sizes.forks.iter().map(|fork| (fork.relation, fork.fork, fork.blocks)).collect();
    // A clock before 1970 is no reason to fail: PostgreSQL shows the time of a checkpoint, and does not use it.
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs() as i64);
    let source = Source {
        summary: FrameSummary {
            record_end: next_segment(at, export.segment_bytes),
            record_start: Lsn::INVALID,
            timeline: export.timeline,
            max_full_xid: last_full_xid(&metadata.values)?,
            commit_timestamp: 0,
        },
        metadata: metadata.values,
        forks: &forks,
        page_before: &[],
        histories: &[],
        time,
    };
    let plan = backup::plan(source)?;
    match plan.in_tablespaces.first() {
        Some(what) => Err(ExportError::Tablespace(what.clone())),
        None => Ok(plan),
    }
}

/// Start of the segment behind the one that holds `at`; `at` itself when one begins there, unless it is the first.
fn next_segment(at: Lsn, segment_bytes: u64) -> Lsn {
    Lsn(at.0.div_ceil(segment_bytes) * segment_bytes).max(Lsn(segment_bytes))
}
