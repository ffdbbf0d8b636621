//! Which files the PGDATA of a cleanly shut down server as of X has: what a cold start and an export write.
//!
//! [`plan`] takes the metadata, the lengths of forks and the frame summary at X, and names every directory and file:
//! small ones with their contents, relations with their lengths, and WAL that ends with a *synthetic shutdown checkpoint* at X
//! ([`SyntheticCheckpoint`]), so that PostgreSQL starts as after a clean stop.
//!
//! Knows nothing about where files are written and pages come from. The judge is PostgreSQL: `tests/stock_server.rs`.
//! Read next: `plan.rs`, `synthetic_checkpoint.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod free_space;
mod free_space_files;
mod layout;
mod plan;
mod relations;
mod slru_files;
mod synthetic_checkpoint;
mod transaction_ids;

pub use free_space::{FreeSpaceError, compact_free_space, expand_free_space, free_space_map_of};
pub use plan::{Plan, PlanError, SmallFile, Source, plan};
pub use relations::{RelationError, RelationFile, RelationPages};
pub use slru_files::SlruError;
pub use synthetic_checkpoint::{SyntheticCheckpoint, WalFile, WalPageError, WalPiece};
