//! HTTP for people and the operator: the admin API with mTLS, and metrics in plain text.
//!
//! [`serve`] runs an axum router on a thread of its own, so that nothing here delays a commit; handlers reach the cores
//! by bounded channels. Each request carries who sent it as `Extension<`[`Caller`](identity::Caller)`>`: call
//! `caller.authorize(call, cluster)?` first; a handler with a body takes it as [`Unread`], which does that. Every error response is `{"error": code, "message": text}`, also those of
//! axum's extractors. [`serve_metrics`] answers `GET /metrics` and `GET /healthz`.
//! Knows nothing about safekeepers or PostgreSQL.

mod error;
mod metrics;
mod notices;
mod server;
mod unread;

pub use error::ApiError;
pub use metrics::serve_metrics;
pub use notices::Notices;
pub use server::{Server, serve};
pub use unread::Unread;
