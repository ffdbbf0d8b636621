//! A safekeeper: stores the WAL of many logs, votes, and serves proposers, peers, readers and followers.
//!
//! The thin shell around `logstore`: it decides nothing about consensus. [`run`] starts it. Read `core.rs` for the
//! threads, `log.rs` for how a log's commands are carried out, `server.rs` for the append port.

mod admin_routes;
pub mod api;
pub mod archive;
pub mod config;
pub mod core;
pub mod data_dir;
mod feed;
pub mod files;
pub mod followers;
mod greetings;
pub mod log;
pub mod log_directory;
pub mod metrics;
pub mod outbox;
mod peers;
pub mod process;
mod server;
pub mod spares;
mod start;

pub use start::{StartError, run};
