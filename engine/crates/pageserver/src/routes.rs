//! The admin port's routes. They run on the HTTP thread and ask the core.

use std::{rc::Rc, sync::Arc};

use admin::ApiError;
use axum::{
    Extension, Json, Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use identity::{Call, Caller};
use layers::{LayerKind, Limits};

use crate::{
    api::{Compacted, Frozen, Layer, LayerDump, Status},
    compaction::Tended,
    owner::Owner,
    process::{Process, Unavailable},
};

/// Rounds of one `POST /v1/compact`: far more than any shard needs to come to rest.
const ROUNDS_MAX: u32 = 1000;

type Shared = State<Arc<Process>>;
type Answer<T> = Result<Json<T>, ApiError>;

/// The routes of the admin port.
pub fn router(process: Arc<Process>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/layers", get(layers))
        .route("/v1/freeze", post(freeze))
        .route("/v1/compact", post(compact))
        .with_state(process)
}

impl From<Unavailable> for ApiError {
    fn from(unavailable: Unavailable) -> Self {
        ApiError::unavailable(unavailable.to_string())
    }
}

async fn status(State(process): Shared, Extension(caller): Extension<Caller>) -> Answer<Status> {
    caller.authorize(Call::PageServerStatus, process.log().cluster)?;
    let status = process
        .ask(|owner, answer| {
            // Dropped when the HTTP request was given up; so below.
            let _ = answer.send(owner.status());
        })
        .await?;
    Ok(Json(status))
}

async fn layers(State(process): Shared, Extension(caller): Extension<Caller>) -> Answer<LayerDump> {
    caller.authorize(Call::PageServerStatus, process.log().cluster)?;
    let dump = process
        .ask(|owner, answer| {
            let _ = answer.send(owner.dump_layers());
        })
        .await?;
    Ok(Json(dump))
}

async fn freeze(State(process): Shared, Extension(caller): Extension<Caller>) -> Answer<Frozen> {
    caller.authorize(Call::TendLayers, process.log().cluster)?;
    let durable_lsn = process
        .ask(|owner, answer| {
            let owner = owner.clone();
            driver::spawn(async move {
                let wanted = owner.ingested();
                // A batch that is being taken in ends soon.
                owner.moved.until(|| (owner.is_between_batches() || owner.is_stopping()).then_some(())).await;
                owner.freeze();
                let done = owner.moved.until(|| match owner.durable() >= wanted {
                    true => Some(Some(owner.durable())),
                    false => owner.is_stopping().then_some(None),
                });
                if let Some(durable) = done.await {
                    let _ = answer.send(durable);
                }
            });
        })
        .await?;
    Ok(Json(Frozen { durable_lsn }))
}

async fn compact(State(process): Shared, Extension(caller): Extension<Caller>) -> Answer<Compacted> {
    caller.authorize(Call::TendLayers, process.log().cluster)?;
    let result = process
        .ask(|owner, answer| {
            let owner = owner.clone();
            driver::spawn(async move {
                let _ = answer.send(compact_all(&owner).await);
            });
        })
        .await?;
    match result {
        Ok(rounds) => Ok(Json(Compacted { rounds })),
        Err(text) => Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "compaction", text)),
    }
}

/// Compacts until nothing is left to do, beyond what the background would do.
async fn compact_all(owner: &Rc<Owner>) -> Result<u32, String> {
    let eager = Limits { level0_max: 1, bands_max: 1, ..Limits::DEFAULT };
    for round in 0..ROUNDS_MAX {
        match owner.tend_once(&eager).await {
            Ok(Tended::Something) => {}
            Ok(Tended::Nothing | Tended::Stopping) => return Ok(round),
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(ROUNDS_MAX)
}

impl Owner {
    /// What the admin port says about the shard.
    pub fn status(&self) -> Status {
        let config = &self.process.config;
        let state = self.state.borrow();
        let count = |wanted: fn(&layers::LayerDescription) -> bool| state.map().layers().filter(|l| wanted(l)).count();
        let source = self.source.borrow().clone();
        let (faults, first_faults) = self.faults();
        Status {
            cluster: config.cluster,
            branch: config.branch,
            shard: config.shard,
            generation: config.generation,
            begin: config.begin,
            end: config.end,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            driver: self.process.driver.as_str().to_owned(),
            pages_port: self.process.pages_port,
            horizon_lsn: state.map().horizon(),
            durable_lsn: self.durable(),
            ingested_lsn: self.ingested(),
            commit_lsn: self.commit_lsn(),
            lag_bytes: self.commit_lsn().bytes_since(self.ingested()),
            term: self.term().0,
            source: source.name,
            source_error: source.last_error,
            image_layers: count(|layer| layer.kind == LayerKind::Image),
            level0_layers: count(|layer| layer.kind == LayerKind::Delta && layer.level == 0),
            level1_layers: count(|layer| layer.kind == LayerKind::Delta && layer.level > 0),
            layer_bytes: state.map().layers().map(|layer| layer.file_bytes).sum(),
            local_layers: self.files.local_count(),
            local_bytes: self.files.local_bytes(),
            open_bytes: state.open().bytes(),
            frozen_layers: state.frozen().len(),
            waiting_layers: self.waiting.borrow().len(),
            backlog_bytes: self.backlog_bytes(),
            lost_layers: self.files.lost().into_iter().map(|(layer, cause)| (layer.to_string(), cause)).collect(),
            faults,
            first_faults,
            troubles: self.troubles.borrow().iter().map(|(what, text)| ((*what).to_owned(), text.clone())).collect(),
        }
    }

    /// The layer map.
    pub fn dump_layers(&self) -> LayerDump {
        let state = self.state.borrow();
        let mut layers: Vec<_> = state.map().layers().copied().collect();
        layers.sort_by_key(|layer| (layer.lsns, layer.keys.begin));
        LayerDump {
            horizon_lsn: state.map().horizon(),
            durable_lsn: self.durable(),
            layers: layers.iter().map(|layer| Layer::new(layer, self.files.whereabouts(layer.id))).collect(),
        }
    }
}
