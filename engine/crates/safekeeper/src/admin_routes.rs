//! The admin port's routes. They run on the HTTP thread and ask the cores.

use std::sync::Arc;

use admin::{ApiError, Unread};
use axum::{
    Extension, Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{delete as delete_method, get, post, put},
};
use consensus::{
    Configuration, ConfigurationError,
    message::{Refusal, Refused},
};
use identity::{Call, Caller};
use layers::ShardId;
use pgtypes::{ClusterId, LogId, Term};

use crate::{
    api::{ConfigurationJson, CreateLog, DamagedLog, Fence, Fenced, LogStatus, MembershipChanged, SetConsumer, Status},
    log_directory::{self, CreateError},
    process::{Process, Unavailable},
};

type Shared = State<Arc<Process>>;
type Answer<T> = Result<Json<T>, ApiError>;

/// The routes of the admin port.
pub fn router(process: Arc<Process>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/logs/{cluster}/{branch}", put(create).get(log_status).delete(delete))
        .route("/v1/logs/{cluster}/{branch}/fence", post(fence))
        .route("/v1/logs/{cluster}/{branch}/membership", put(membership))
        .route("/v1/logs/{cluster}/{branch}/consumers/{name}", put(set_consumer).delete(remove_consumer))
        .route("/v1/logs/{cluster}/{branch}/shards/{shard}", delete_method(remove_shard))
        .with_state(process)
}

impl From<Unavailable> for ApiError {
    fn from(unavailable: Unavailable) -> Self {
        ApiError::unavailable(unavailable.to_string())
    }
}

fn log_id(cluster: &str, branch: &str) -> Result<LogId, ApiError> {
    format!("{cluster}/{branch}").parse().map_err(|error| ApiError::bad_request(format!("{cluster}/{branch}: {error}")))
}

fn not_found(log: LogId) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "unknown_log", format!("there is no log {log} on this safekeeper"))
}

async fn status(State(process): Shared, Extension(caller): Extension<Caller>) -> Answer<Status> {
    // All clusters' callers may ask; with certificates there is one, this safekeeper's own.
    caller.authorize(Call::SafekeeperStatus, process.own_cluster().unwrap_or(ClusterId::default()))?;
    let mut logs = Vec::new();
    for core in 0..process.core_count() {
        let found: Vec<LogStatus> = process
            .ask(core, |core, answer| {
                // Dropped when the HTTP request was given up.
                let _ = answer.send(core.logs().iter().map(|log| log.api_status()).collect());
            })
            .await?;
        logs.extend(found);
    }
    logs.sort_by_key(|log| (log.cluster, log.branch));
    Ok(Json(Status {
        member: process.member().0,
        disk: process.disk(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        driver: process.driver.as_str().to_owned(),
        direct_io: process.direct_io,
        append_port: process.append_port,
        replication_port: process.replication_port,
        disk_full: process.spares.is_full(),
        logs,
        damaged: process.damaged().clone(),
    }))
}

async fn log_status(
    State(process): Shared,
    Extension(caller): Extension<Caller>,
    Path((cluster, branch)): Path<(String, String)>,
) -> Answer<LogStatus> {
    let log = log_id(&cluster, &branch)?;
    caller.authorize(Call::SafekeeperStatus, log.cluster)?;
    let status = process
        .ask(process.core_of(log), move |core, answer| {
            // As above.
            let _ = answer.send(core.log(log).map(|log| log.api_status()));
        })
        .await?;
    match status {
        Some(status) => Ok(Json(status)),
        None => Err(match process.damaged().iter().find(|damaged| damaged.is(log)) {
            Some(damaged) => ApiError::conflict("damaged", damaged.message.clone()),
            None => not_found(log),
        }),
    }
}

async fn create(
    State(process): Shared,
    Path((cluster, branch)): Path<(String, String)>,
    body: Unread,
) -> Result<(StatusCode, Json<LogStatus>), ApiError> {
    let log = log_id(&cluster, &branch)?;
    let body: CreateLog = body.authorized(Call::CreateLog, log.cluster).await?;
    let result = process
        .ask(process.core_of(log), move |core, answer| {
            let core = core.clone();
            driver::spawn(async move {
                // As above.
                let _ = answer.send(log_directory::create(&core, log, body).await);
            });
        })
        .await?;
    match result {
        Ok((created, status)) => Ok((if created { StatusCode::CREATED } else { StatusCode::OK }, Json(status))),
        Err(error) => Err(match &error {
            CreateError::Exists | CreateError::Busy => ApiError::conflict("exists", error.to_string()),
            CreateError::Damaged(_) => ApiError::conflict("damaged", error.to_string()),
            CreateError::Lost => ApiError::conflict("lost", error.to_string()),
            CreateError::NotAMember { .. } => ApiError::conflict("not_a_member", error.to_string()),
            CreateError::Invalid(_) => ApiError::bad_request(error.to_string()),
            CreateError::DiskFull => ApiError::unavailable(error.to_string()),
            CreateError::Io(_) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "disk_failed", error.to_string()),
        }),
    }
}

async fn delete(
    State(process): Shared,
    Extension(caller): Extension<Caller>,
    Path((cluster, branch)): Path<(String, String)>,
) -> Answer<serde_json::Value> {
    let log = log_id(&cluster, &branch)?;
    caller.authorize(Call::DeleteLog, log.cluster)?;
    let result = process
        .ask(process.core_of(log), move |core, answer| {
            let core = core.clone();
            driver::spawn(async move {
                // As above.
                let _ = answer.send(log_directory::delete(&core, log).await);
            });
        })
        .await?;
    match result {
        Ok(true) => Ok(Json(serde_json::json!({}))),
        Ok(false) => Err(not_found(log)),
        Err(error) => Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "disk_failed", error.to_string())),
    }
}

async fn fence(
    State(process): Shared,
    Path((cluster, branch)): Path<(String, String)>,
    body: Unread,
) -> Answer<Fenced> {
    let log = log_id(&cluster, &branch)?;
    let body: Fence = body.authorized(Call::Fence, log.cluster).await?;
    if body.term == 0 {
        return Err(ApiError::bad_request("term 0 is nobody's; terms start at 1"));
    }
    let result = process
        .ask(process.core_of(log), move |core, answer| match core.log(log) {
            Some(log) => log.fence(Term(body.term), body.writer, answer),
            // Dropping the sender says so.
            None => drop(answer),
        })
        .await;
    match result {
        Ok(Ok(fenced)) => Ok(Json(Fenced {
            term: fenced.term.0,
            writer: fenced.writer,
            flush_lsn: fenced.flush_lsn,
            last_ballot: fenced.last_ballot.into(),
            generation: fenced.generation.0,
            // Rounded up: a promise must not look over before it is.
            promise_remaining_ms: fenced.promise_remaining.as_nanos().div_ceil(1_000_000) as u64,
        })),
        Ok(Err(refused)) => Err(fence_refused(&refused)),
        Err(unavailable) => Err(gone(&process, log, unavailable)),
    }
}

/// Why a core gave no answer about a log.
fn gone(process: &Process, log: LogId, unavailable: Unavailable) -> ApiError {
    let damaged = process.damaged().iter().find(|damaged| damaged.is(log)).map(|damaged| damaged.message.clone());
    match damaged {
        Some(message) => ApiError::conflict("damaged", message),
        None if process.is_stopping() => unavailable.into(),
        None => not_found(log),
    }
}

fn fence_refused(refused: &Refused) -> ApiError {
    let holder = format!("term {} is granted to {}", refused.ballot.term.0, refused.writer);
    match &refused.reason {
        Refusal::Fenced => ApiError::conflict("fenced", format!("a later term was granted: {holder}")),
        Refusal::OtherWriter => ApiError::conflict("other_writer", format!("the term is another writer's: {holder}")),
        Refusal::NotAMember => ApiError::conflict("not_a_member", "this disk is not a member of the log"),
        Refusal::DiskFailed => ApiError::unavailable("a disk operation failed; restart this safekeeper"),
        other => ApiError::conflict("refused", format!("{other:?}")),
    }
}

async fn membership(
    State(process): Shared,
    Path((cluster, branch)): Path<(String, String)>,
    body: Unread,
) -> Answer<MembershipChanged> {
    let log = log_id(&cluster, &branch)?;
    let body: ConfigurationJson = body.authorized(Call::ChangeMembership, log.cluster).await?;
    let configuration = Configuration::from(body);
    let result = process
        .ask(process.core_of(log), move |core, answer| match core.log(log) {
            Some(log) => log.configure(configuration, answer),
            // Dropping the sender says so.
            None => drop(answer),
        })
        .await;
    match result {
        Ok(Ok(generation)) => Ok(Json(MembershipChanged { generation: generation.0 })),
        Ok(Err(error)) => Err(match error {
            ConfigurationError::NotCommitted => ApiError::conflict("not_committed", error.to_string()),
            ConfigurationError::Generation { .. } => ApiError::conflict("generation", error.to_string()),
            ConfigurationError::Conflict(_) => ApiError::conflict("conflict", error.to_string()),
            ConfigurationError::DiskFailed => ApiError::unavailable(error.to_string()),
            ConfigurationError::NotAMember => ApiError::conflict("not_a_member", error.to_string()),
            ConfigurationError::Size
            | ConfigurationError::Duplicate
            | ConfigurationError::Step
            | ConfigurationError::OtherMembers => ApiError::bad_request(error.to_string()),
        }),
        Err(unavailable) => Err(gone(&process, log, unavailable)),
    }
}

async fn set_consumer(
    State(process): Shared,
    Path((cluster, branch, name)): Path<(String, String, String)>,
    body: Unread,
) -> Answer<serde_json::Value> {
    let log = log_id(&cluster, &branch)?;
    // Who decides what WAL is kept may as well delete the log.
    let body: SetConsumer = body.authorized(Call::DeleteLog, log.cluster).await?;
    let result = process
        .ask(process.core_of(log), move |core, answer| {
            let result = core.log(log).map(|log| log.set_consumer(&name, body.confirmed_lsn));
            // As above.
            let _ = answer.send(result);
        })
        .await?;
    match result {
        Some(Ok(())) => Ok(Json(serde_json::json!({}))),
        Some(Err(error)) => Err(ApiError::bad_request(error.to_string())),
        None => Err(not_found(log)),
    }
}

async fn remove_consumer(
    State(process): Shared,
    Extension(caller): Extension<Caller>,
    Path((cluster, branch, name)): Path<(String, String, String)>,
) -> Answer<serde_json::Value> {
    let log = log_id(&cluster, &branch)?;
    caller.authorize(Call::DeleteLog, log.cluster)?;
    let result = process
        .ask(process.core_of(log), move |core, answer| {
            // As above.
            let _ = answer.send(core.log(log).map(|log| log.remove_consumer(&name)));
        })
        .await?;
    match result {
        Some(true) => Ok(Json(serde_json::json!({}))),
        Some(false) => Err(ApiError::not_found("there is no such consumer")),
        None => Err(not_found(log)),
    }
}

async fn remove_shard(
    State(process): Shared,
    Extension(caller): Extension<Caller>,
    Path((cluster, branch, shard)): Path<(String, String, u32)>,
) -> Answer<serde_json::Value> {
    let log = log_id(&cluster, &branch)?;
    caller.authorize(Call::DeleteLog, log.cluster)?;
    let result = process
        .ask(process.core_of(log), move |core, answer| {
            // As above.
            let _ = answer.send(core.log(log).map(|log| log.remove_shard(ShardId(shard))));
        })
        .await?;
    match result {
        Some(true) => Ok(Json(serde_json::json!({}))),
        Some(false) => Err(ApiError::not_found("there is no such shard")),
        None => Err(not_found(log)),
    }
}

impl DamagedLog {
    fn is(&self, log: LogId) -> bool {
        (self.cluster, self.branch) == (log.cluster, log.branch)
    }
}
