//! Metrics for Prometheus.

use std::{io, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{encoding::text::encode, registry::Registry};

use crate::{ApiError, Server, serve};

/// Media type of the OpenMetrics text format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `GET /metrics` (everything in `registry`, OpenMetrics text) and `GET /healthz` (200 while this process
/// answers) on `listen`, without TLS: the port shows figures, and takes nothing.
///
/// # Errors
/// As [`serve`].
pub fn serve_metrics(listen: &str, registry: impl Into<Arc<Registry>>) -> io::Result<Server> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .with_state(registry.into());
    serve(listen, None, router)
}

async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => {
            let message = format!("metrics cannot be written: {error}");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message).into_response()
        }
    }
}
