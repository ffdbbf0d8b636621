//! Reads pages, lengths and metadata from the page servers of a lakebase, many requests in flight.
//!
//! [`PageClient`] knows the shards: it cuts a request at stripes, sends the pieces to their owners, and puts the answers
//! together. One connection to each shard, opened when it is first needed and again when it breaks; what was in flight is
//! sent again until its deadline. Used by the compute agent, export and benchmarks, on a core of `driver`.
//!
//! Knows nothing about caches, PGDATA or who decides where shards are. Protocol: `docs/formats/page-protocol.md`.
//! Read next: `client.rs`, then `link.rs`.
#![forbid(unsafe_code)]

mod client;
mod config;
mod conversation;
mod error;
mod link;
mod request;
mod shard_map;
mod sizes;

pub use client::{Lease, Metadata, PageClient, Pages};
pub use config::{ClientConfig, ShardAddress};
pub use error::{BlockRead, Cause, PageError, RequestName};
pub use shard_map::ShardMapError;
pub use sizes::{ForkLength, ForkLengths};
