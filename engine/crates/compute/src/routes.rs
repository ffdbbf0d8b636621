//! The admin HTTP routes of the agent.

use std::sync::Arc;

use admin::{ApiError, Unread};
use axum::{
    Extension, Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use consensus::Grant;
use driver::oneshot;
use identity::{Call, Caller};
use pgtypes::{ClusterId, Term};
use serde::Deserialize;

use crate::{
    shard_map::{ShardMap, ShardMapRefused},
    status::Status,
};

/// Why a grant is not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrantRefused {
    /// It is for another writer.
    #[error("the grant is for writer {granted}, this is writer {own}")]
    OtherWriter {
        /// The grant's.
        granted: String,
        /// The agent's.
        own: String,
    },
    /// A higher term was granted before.
    #[error("term {granted} was granted after term {known}: grants never go back")]
    StaleTerm {
        /// The grant's.
        granted: u64,
        /// The agent's.
        known: u64,
    },
    /// Another writer holds a later term.
    #[error("term {granted} is over: the log belongs to another writer; grant a higher term")]
    Fenced {
        /// The grant's.
        granted: u64,
    },
    /// It could not be remembered.
    #[error("the grant cannot be written down: {0}")]
    NotKept(String),
    /// The agent is about to end.
    #[error("the agent is stopping")]
    Stopping,
}

impl GrantRefused {
    fn code(&self) -> (StatusCode, &'static str) {
        match self {
            GrantRefused::OtherWriter { .. } => (StatusCode::CONFLICT, "other_writer"),
            GrantRefused::StaleTerm { .. } => (StatusCode::CONFLICT, "stale_term"),
            GrantRefused::Fenced { .. } => (StatusCode::CONFLICT, "fenced"),
            GrantRefused::NotKept(_) => (StatusCode::INTERNAL_SERVER_ERROR, "not_kept"),
            GrantRefused::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        }
    }
}

impl ShardMapRefused {
    fn code(&self) -> (StatusCode, &'static str) {
        match self {
            ShardMapRefused::NoPageService => (StatusCode::CONFLICT, "no_page_service"),
            ShardMapRefused::Invalid(_) => (StatusCode::BAD_REQUEST, "bad_request"),
            ShardMapRefused::StaleVersion { .. } => (StatusCode::CONFLICT, "stale_version"),
            ShardMapRefused::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        }
    }
}

/// What the routes ask of the agent. Bounded by the number of connections that the server takes.
pub enum Request {
    /// Take a grant.
    Grant {
        /// The grant.
        grant: Grant,
        /// The answer.
        reply: oneshot::Sender<Result<(), GrantRefused>>,
    },
    /// Shards have other owners.
    ReplaceShards {
        /// All of them.
        map: ShardMap,
        /// The answer.
        reply: oneshot::Sender<Result<(), ShardMapRefused>>,
    },
    /// Stop PostgreSQL and end.
    Stop,
}

#[derive(Clone)]
struct Shared {
    cluster: ClusterId,
    status: Status,
    ask: Arc<dyn Fn(Request) + Send + Sync>,
}

/// All routes. `ask` hands a request to the agent, and must not block.
pub fn routes(cluster: ClusterId, status: Status, ask: Arc<dyn Fn(Request) + Send + Sync>) -> Router {
    Router::new()
        .route("/v1/status", get(show_status))
        .route("/v1/grant", post(take_grant))
        .route("/v1/shards", put(replace_shards))
        .route("/v1/stop", post(stop))
        .with_state(Shared { cluster, status, ask })
}

async fn show_status(
    State(shared): State<Shared>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<serde_json::Value>, ApiError> {
    caller.authorize(Call::ComputeStatus, shared.cluster)?;
    Ok(Json(shared.status.to_json()))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantBody {
    term: u64,
    writer: String,
}

async fn take_grant(State(shared): State<Shared>, body: Unread) -> Result<Response, ApiError> {
    let body: GrantBody = body.authorized(Call::Grant, shared.cluster).await?;
    let writer = body.writer.parse().map_err(|e| ApiError::bad_request(format!("writer: {e}")))?;
    if body.term == 0 {
        return Err(ApiError::bad_request("term: must be above 0"));
    }
    let grant = Grant { term: Term(body.term), writer };
    let (reply, answer) = oneshot::channel();
    (shared.ask)(Request::Grant { grant, reply });
    match answer.await {
        Ok(Ok(())) => Ok(Json(serde_json::json!({"term": body.term, "writer": body.writer})).into_response()),
        Ok(Err(refused)) => {
            let (status, code) = refused.code();
            Err(ApiError::new(status, code, refused.to_string()))
        }
        Err(_) => Err(ApiError::unavailable("the agent is stopping")),
    }
}

async fn replace_shards(State(shared): State<Shared>, body: Unread) -> Result<Response, ApiError> {
    let map: ShardMap = body.authorized(Call::ReplaceShards, shared.cluster).await?;
    let shown = serde_json::json!(map);
    let (reply, answer) = oneshot::channel();
    (shared.ask)(Request::ReplaceShards { map, reply });
    match answer.await {
        Ok(Ok(())) => Ok(Json(shown).into_response()),
        Ok(Err(refused)) => {
            let (status, code) = refused.code();
            Err(ApiError::new(status, code, refused.to_string()))
        }
        Err(_) => Err(ApiError::unavailable("the agent is stopping")),
    }
}

async fn stop(State(shared): State<Shared>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    caller.authorize(Call::StopCompute, shared.cluster)?;
    (shared.ask)(Request::Stop);
    Ok((StatusCode::ACCEPTED, Json(serde_json::json!({"state": "stopping"}))).into_response())
}
