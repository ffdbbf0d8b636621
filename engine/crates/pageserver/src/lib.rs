//! A page server: one shard of the page service.
//!
//! The shell around the pure crates `shard`, `layers` and `filter`: it takes WAL in, keeps layers on its disk and in object storage,
//! and answers for pages. [`run`] starts it. Everything of the shard runs on one core; what takes long runs beside it. Contract of the
//! parts: `docs/design/2026-11-27-page-service.md`. Read next: `owner.rs`.

mod answer;
pub mod api;
mod archive;
mod attach;
mod block_cache;
mod commit_times;
mod compaction;
pub mod config;
mod data_dir;
mod fault_point;
mod feed;
mod flush;
mod ingest;
mod layer_files;
mod metrics;
mod orphans;
mod outbox;
mod owner;
mod process;
mod progress;
mod read;
mod routes;
mod server;
mod start;
mod state;

pub use config::Config;
pub use start::{StartError, run};
