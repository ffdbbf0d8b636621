//! HTTP for people and the operator: the admin API with mTLS, and metrics in plain text.
//!
//! [`serve`] runs an axum router on a thread of its own, so that nothing here delays a commit; handlers reach the cores
//! by bounded channels. Each request carries who sent it as `Extension<`[`Caller`](identity::Caller)`>`: call
//! `caller.authorize(call, cluster)?` first. Every error response is `{"error": code, "message": text}`, also those of
//! axum's extractors. [`serve_metrics`] answers `GET /metrics` and `GET /healthz`.
//! Knows nothing about safekeepers or PostgreSQL.

mod error;
mod metrics;
mod server;

pub use error::ApiError;
pub use metrics::serve_metrics;
pub use server::{Server, serve};
