//! The object store, which is the home of all that is old: layers, manifests, archived WAL.
//!
//! [`RemoteStorage`] reads and writes objects of S3, Google Cloud Storage, Azure or a local directory, with retries in a
//! budget and counts; it works on a thread of its own, and its futures run on any executor. [`ShardStore`],
//! [`ShardOwner`], [`WalArchive`] and [`ClusterDescription`] know the keys (`docs/formats/object-store.md`) and the rules by
//! which objects come and go. Knows nothing about what is in a layer, nor when one is made.
//! Read next: `storage.rs`, `shard_store.rs`.
#![forbid(unsafe_code)]

mod archive;
mod backend;
mod block_on;
mod claim;
mod cluster;
mod error;
#[cfg(feature = "faults")]
mod faults;
mod keys;
mod local;
mod metrics;
mod open;
mod retry;
mod shard_store;
mod storage;
mod transfer;

#[cfg(feature = "faults")]
pub use faults::{Faults, FaultsError};

pub use crate::{
    archive::{ARCHIVE_SEGMENT_BYTES, ArchiveError, WalArchive},
    block_on::block_on,
    claim::ClaimNonce,
    cluster::{CLUSTER_VERSION, ClusterDescription, ClusterError, ShardRange},
    error::StorageError,
    keys::ManifestVersion,
    metrics::{LATENCY_BUCKETS, Metrics, Operation, OperationMetrics},
    open::OpenError,
    retry::{RetryPolicies, RetryPolicy},
    shard_store::{ShardError, ShardOwner, ShardStore},
    storage::{LISTED_MAX, ObjectInfo, PutNew, RemoteStorage},
    transfer::PARTS_ABOVE_BYTES,
};
