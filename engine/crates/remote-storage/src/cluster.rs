//! `cluster.json`: what a lakebase is, from its import on.

use layers::{HashRange, ShardId};
use pgtypes::{BranchId, ClusterId, LogId, Lsn, PgTimeline, SystemId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    error::StorageError,
    keys,
    storage::{PutNew, RemoteStorage},
};

/// Version that is written, and the only one that is read.
pub const CLUSTER_VERSION: u32 = 1;

/// A shard's part of the hash space when the lakebase began; half-open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRange {
    /// Number of the shard.
    pub shard: u32,
    /// First hash.
    pub begin: u64,
    /// Behind the last hash, at most 2^32.
    pub end: u64,
}

impl ShardRange {
    /// The shard.
    pub fn id(&self) -> ShardId {
        ShardId(self.shard)
    }

    /// Its part of the hash space.
    pub fn range(&self) -> HashRange {
        HashRange { begin: self.begin, end: self.end }
    }
}

/// What is the same for a lakebase for ever, and where its log begins. Written once, last in an import.
///
/// Numbers of 64 bits are text: JSON's numbers are not safe above 2^53.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterDescription {
    /// [`CLUSTER_VERSION`].
    pub version: u32,
    /// The lakebase.
    #[serde(with = "text")]
    pub cluster: ClusterId,
    /// Its first branch.
    #[serde(with = "text")]
    pub branch: BranchId,
    /// Of PostgreSQL's `pg_control`.
    #[serde(with = "system_id")]
    pub system_id: SystemId,
    /// PostgreSQL's version, as `PG_VERSION_NUM`: 170011 for 17.11.
    pub postgres_version: u32,
    /// Bytes of a WAL segment of PostgreSQL.
    pub segment_bytes: u32,
    /// Where the log begins.
    #[serde(with = "text")]
    pub start_lsn: Lsn,
    /// PostgreSQL's timeline there.
    #[serde(with = "timeline")]
    pub timeline: PgTimeline,
    /// The next transaction id there, 64 bits with its epoch (`FullTransactionId`).
    #[serde(with = "text")]
    pub next_full_xid: u64,
    /// Blocks of a stripe, a power of two.
    pub stripe_blocks: u32,
    /// Whether pages carry checksums.
    pub checksums: bool,
    /// The shards that the import made, rising: together they have every hash once.
    pub shards: Vec<ShardRange>,
}

mod text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr,
        T::Err: Display,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

mod system_id {
    use pgtypes::SystemId;
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(id: &SystemId, serializer: S) -> Result<S::Ok, S::Error> {
        super::text::serialize(&id.0, serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemId, D::Error> {
        super::text::deserialize(deserializer).map(SystemId)
    }
}

mod timeline {
    use pgtypes::PgTimeline;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(timeline: &PgTimeline, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(timeline.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PgTimeline, D::Error> {
        u32::deserialize(deserializer).map(PgTimeline)
    }
}

/// `cluster.json` was not written or read.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// The object store did not do it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// There is another lakebase of this name: it was imported before.
    #[error("{key} is there already, and it describes another lakebase: nothing is changed")]
    AlreadyThere {
        /// The object.
        key: String,
    },
    /// A later version wrote it.
    #[error(
        "{key}: format {found} is not known: this engine reads {CLUSTER_VERSION}; use a version of lakebase that reads \
         format {found}"
    )]
    UnknownVersion {
        /// The object.
        key: String,
        /// What it says.
        found: u64,
    },
    /// It is not what it should be.
    #[error("{key}: {cause}")]
    Malformed {
        /// The object.
        key: String,
        /// What is wrong.
        cause: String,
    },
}

impl ClusterDescription {
    /// Lakebase and first branch.
    pub fn log(&self) -> LogId {
        LogId { cluster: self.cluster, branch: self.branch }
    }

    /// Writes it where none is. The same one again is fine: an import may be told of an error after it was done.
    ///
    /// # Errors
    /// Another is there; the caller broke a rule; or see [`StorageError`].
    pub async fn put(&self, storage: &RemoteStorage) -> Result<(), ClusterError> {
        let key = keys::cluster(self.cluster);
        let malformed = |cause: &str| ClusterError::Malformed { key: key.clone(), cause: cause.to_owned() };
        self.check().map_err(malformed)?;
        let mut json = serde_json::to_vec_pretty(self).map_err(|error| malformed(&error.to_string()))?;
        json.push(b'\n');
        match storage.put_new(&key, json).await? {
            PutNew::Created | PutNew::AlreadyThere { same: true } => Ok(()),
            PutNew::AlreadyThere { same: false } => Err(ClusterError::AlreadyThere { key }),
        }
    }

    /// Reads the description of a lakebase.
    ///
    /// # Errors
    /// It is not there (the import did not end), of another version, or not what it should be.
    pub async fn get(storage: &RemoteStorage, cluster: ClusterId) -> Result<ClusterDescription, ClusterError> {
        let key = keys::cluster(cluster);
        let bytes = storage.get(&key).await?;
        let malformed = |cause: String| ClusterError::Malformed { key: key.clone(), cause };
        let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        // Before its fields, which may be others.
        match json.get("version").and_then(serde_json::Value::as_u64) {
            Some(found) if found == u64::from(CLUSTER_VERSION) => {}
            Some(found) => return Err(ClusterError::UnknownVersion { key, found }),
            None => return Err(malformed("it has no version".to_owned())),
        }
        let description: ClusterDescription =
            serde_json::from_value(json).map_err(|error| malformed(error.to_string()))?;
        if description.cluster != cluster {
            return Err(malformed("it describes another lakebase".to_owned()));
        }
        description.check().map_err(|cause| malformed(cause.to_owned()))?;
        Ok(description)
    }

    /// The lakebases of a store that have a `cluster.json` or once began to have one.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn list(storage: &RemoteStorage) -> Result<Vec<ClusterId>, StorageError> {
        Ok(storage.list_directories("").await?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.version != CLUSTER_VERSION {
            return Err("version");
        }
        if !self.stripe_blocks.is_power_of_two() {
            return Err("stripe_blocks is no power of two");
        }
        if !self.segment_bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&self.segment_bytes) {
            return Err("segment_bytes is no size of PostgreSQL's segments");
        }
        let mut end = 0;
        for shard in &self.shards {
            if shard.begin != end || shard.begin >= shard.end {
                return Err("shards do not follow each other");
            }
            end = shard.end;
        }
        if end != HashRange::ALL.end { Err("shards do not have every hash") } else { Ok(()) }
    }
}
