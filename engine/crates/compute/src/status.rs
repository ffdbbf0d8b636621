//! What the agent says about itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgtypes::{Ballot, Lsn};
use serde::Serialize;

use crate::{
    metrics::{CoreView, Metrics, StateLabel},
    shard_map::ShardMap,
};

/// Where the agent stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nobody has granted a term yet.
    #[default]
    WaitingForGrant,
    /// Asks safekeepers for their votes.
    Electing,
    /// Elected; PGDATA is made, PostgreSQL replays to the end of the log.
    Recovering,
    /// PostgreSQL accepts connections.
    Running,
    /// PostgreSQL is being shut down.
    Stopping,
    /// The log belongs to another writer: PostgreSQL was killed. Another grant ends this.
    Fenced,
    /// A person must act; `last_error` says on what. Another grant or a restart tries again.
    Failed,
}

impl State {
    /// All states.
    pub const ALL: [State; 7] = [
        State::WaitingForGrant,
        State::Electing,
        State::Recovering,
        State::Running,
        State::Stopping,
        State::Fenced,
        State::Failed,
    ];

    /// Name in the status and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::WaitingForGrant => "waiting_for_grant",
            State::Electing => "electing",
            State::Recovering => "recovering",
            State::Running => "running",
            State::Stopping => "stopping",
            State::Fenced => "fenced",
            State::Failed => "failed",
        }
    }
}

/// What changes.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The state.
    pub state: State,
    /// The term in force, and the attempt once it is known.
    pub ballot: Option<Ballot>,
    /// X of the present election.
    pub end_of_log: Option<Lsn>,
    /// Process id of the postmaster.
    pub postgres_pid: Option<i32>,
    /// How PGDATA was made: `reuse`, `base_backup`, `replay`, `cold_start`.
    pub recovery: Option<&'static str>,
    /// What went wrong last.
    pub last_error: Option<String>,
    /// A record that the engine cannot apply ended PostgreSQL: which.
    pub unsupported_record: Option<String>,
    /// Where shards are, with the page service.
    pub shard_map: Option<ShardMap>,
}

/// What stays.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The lakebase.
    pub cluster: String,
    /// The branch.
    pub branch: String,
    /// This writer.
    pub writer: String,
    /// PostgreSQL's version.
    pub postgres_version: String,
    /// How its processes are held together.
    pub isolation: &'static str,
    /// How I/O reaches the kernel.
    pub driver: &'static str,
}

/// Shared between the agent, which changes it, and the admin thread.
#[derive(Clone, Debug)]
pub struct Status {
    identity: Arc<Identity>,
    facts: Arc<Mutex<Facts>>,
    view: Arc<CoreView>,
    metrics: Metrics,
}

#[derive(Debug, Serialize)]
struct StatusBody<'a> {
    state: State,
    cluster: &'a str,
    branch: &'a str,
    writer: &'a str,
    version: &'static str,
    term: Option<u64>,
    attempt: Option<u32>,
    x: Option<String>,
    commit_lsn: String,
    record_end: String,
    quorum: bool,
    lease_remaining_ms: u64,
    postgres_pid: Option<i32>,
    postgres_version: &'a str,
    isolation: &'static str,
    driver: &'static str,
    recovery: Option<&'static str>,
    last_error: Option<&'a str>,
    unsupported_record: Option<&'a str>,
    safekeepers: Vec<SafekeeperBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shard_map: Option<&'a ShardMap>,
    #[serde(skip_serializing_if = "Option::is_none")]
    page_service: Option<PageServiceBody>,
}

#[derive(Debug, Serialize)]
struct PageServiceBody {
    ingest_lag_bytes: u64,
    durable_lag_bytes: u64,
    flush_delay_us: u64,
    cached_blocks: u64,
    failed_blocks: u64,
}

#[derive(Debug, Serialize)]
struct SafekeeperBody {
    member: u32,
    follows: bool,
    flush_lsn: String,
    trouble: Option<String>,
}

impl Status {
    /// A fresh agent's.
    pub fn new(identity: Identity, view: Arc<CoreView>, metrics: Metrics) -> Self {
        let status = Self { identity: Arc::new(identity), facts: Arc::default(), view, metrics };
        status.set_state(State::WaitingForGrant);
        status
    }

    /// What the core shows.
    pub fn view(&self) -> Arc<CoreView> {
        self.view.clone()
    }

    /// The facts, to change them.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and says so.
    pub fn set_state(&self, state: State) {
        let before = std::mem::replace(&mut self.facts().state, state);
        for known in State::ALL {
            let label = StateLabel { state: known.as_str() };
            self.metrics.state.get_or_create(&label).set(i64::from(known == state));
        }
        if before != state {
            tracing::info!(state = state.as_str(), "state");
        }
    }

    /// Present while PostgreSQL runs on the page service.
    fn page_service(&self) -> Option<PageServiceBody> {
        let blocks = self.metrics.blocks.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let counters = blocks.map().counters();
        let (lag, delay) = self.view.lag();
        Some(PageServiceBody {
            ingest_lag_bytes: lag.ingest_bytes,
            durable_lag_bytes: lag.durable_bytes,
            // At most `backpressure::DELAY_MAX`.
            flush_delay_us: delay.as_micros() as u64,
            cached_blocks: counters.present,
            failed_blocks: counters.failures,
        })
    }

    /// The answer to `GET /v1/status`.
    pub fn to_json(&self) -> serde_json::Value {
        let facts = self.facts().clone();
        let identity = &*self.identity;
        let member = |member: crate::metrics::MemberView| SafekeeperBody {
            member: member.member.0,
            follows: member.follows,
            flush_lsn: member.flush_lsn.to_string(),
            trouble: member.trouble,
        };
        let body = StatusBody {
            state: facts.state,
            cluster: &identity.cluster,
            branch: &identity.branch,
            writer: &identity.writer,
            version: env!("CARGO_PKG_VERSION"),
            term: facts.ballot.map(|ballot| ballot.term.0),
            attempt: facts.ballot.map(|ballot| ballot.attempt.0).filter(|attempt| *attempt > 0),
            x: facts.end_of_log.map(|lsn| lsn.to_string()),
            commit_lsn: self.view.commit_lsn().to_string(),
            record_end: self.view.record_end().to_string(),
            quorum: self.view.has_quorum(),
            lease_remaining_ms: self.view.lease_until().since(driver::now()).as_millis() as u64,
            postgres_pid: facts.postgres_pid,
            postgres_version: &identity.postgres_version,
            isolation: identity.isolation,
            driver: identity.driver,
            recovery: facts.recovery,
            last_error: facts.last_error.as_deref(),
            unsupported_record: facts.unsupported_record.as_deref(),
            safekeepers: self.view.members().into_iter().map(member).collect(),
            shard_map: facts.shard_map.as_ref(),
            page_service: self.page_service(),
        };
        serde_json::json!(body)
    }
}
