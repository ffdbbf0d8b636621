//! Which shard of a lakebase needs which WAL record, and the cutting of a stream of WAL into batches for shards.
//!
//! [`Route::of`] says who needs a record. A [`Router`] decodes committed WAL once, a [`Cutter`] makes the [`Batch`]es of one
//! shard from it; a [`WalFilter`] is one of each, for whoever serves a single shard, and a [`Window`] a router with its newest
//! records, for whoever serves many.
//!
//! Knows nothing about sockets, files or what a record does to a page. `docs/design/2026-11-27-page-service.md`. Read
//! next: `route.rs`, `wal_filter.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod batch;
mod cutter;
mod route;
mod router;
mod wal_filter;
mod window;

pub use batch::{Batch, Item};
pub use cutter::{BATCH_BYTES, Cutter, ITEM_OVERHEAD_BYTES};
pub use route::{Route, is_for_somebody};
pub use router::{Routed, Router};
pub use wal_filter::WalFilter;
pub use window::{WINDOW_BYTES, Window};
