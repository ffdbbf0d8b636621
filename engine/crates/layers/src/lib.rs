//! Layers: how a page server keeps what WAL did to pages, so that any page can be had as of any position.
//!
//! Values (WAL records, page images) come into an [`OpenLayer`]; frozen, it becomes a *delta layer* file. *Image layers*
//! hold all pages of a range of keys at one LSN. [`choose`] decides what to compact, [`collect`] what to remove. The [`LayerMap`] knows the live ones, and with their indexes in memory
//! plans a read to the byte ([`LayerMap::plan_read`]).
//!
//! Knows nothing about files, object stores, clocks, or what a record does to a page. Bytes: `docs/formats/layers.md`.
//! Read next: `key.rs`, `map.rs`, `plan.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod block;
mod compaction;
mod error;
mod format;
mod gc;
mod identity;
mod index;
mod key;
mod manifest;
mod map;
mod merge;
mod open;
mod plan;
mod split;
mod writer;

pub use compaction::{Choice, Limits, MergeTask, choose, image_keys};
pub use error::{LayerError, PutError};
pub use format::{ByteRange, HEADER_BYTES, LayerFile, TRAILER_BYTES, VERSION};
pub use gc::{LEASES_MAX, LeaseRefused, Leases, collect};
pub use identity::{
    Entry, LayerDescription, LayerId, LayerIdentity, LayerKind, LsnRange, ShardGeneration, ShardId, ValueKind,
};
pub use index::{Index, VALUES_MAX, ValueEntry};
pub use key::{HashRange, KEY_BYTES, Key, KeyKind, KeyRange, Metadata, Slru, Striping, UnknownKey, stripe_hash};
pub use manifest::{MANIFEST_LAYERS_MAX, MANIFEST_VERSION, Manifest, ManifestError};
pub use map::{Edit, LayerMap, MapError};
pub use merge::{Merge, Retain};
pub use open::{OpenLayer, OpenValue};
pub use plan::{Indexes, PlanError, PlannedRead, ReadPlan};
pub use split::{LayerOutput, Split, SplitWriter};
pub use writer::{FinishedLayer, LayerWriter, VALUE_BYTES_MAX};
