//! JSON of the admin port, for the server and for the commands that call it. Described in `docs/pageserver.md`.
//!
//! Identities and positions are texts; so are 64-bit numbers that a JSON reader might round.

use std::{collections::BTreeMap, fmt, str::FromStr};

use layers::{LayerDescription, LayerKind};
use pgtypes::{BranchId, ClusterId, Lsn};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

mod text {
    use super::{Deserialize, Deserializer, FromStr, Serializer, de, fmt};

    pub fn serialize<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: fmt::Display>,
        D: Deserializer<'de>,
    {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error| de::Error::custom(format!("{text:?}: {error}")))
    }
}

/// `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The lakebase.
    #[serde(with = "text")]
    pub cluster: ClusterId,
    /// Its branch.
    #[serde(with = "text")]
    pub branch: BranchId,
    /// Number of the shard.
    pub shard: u32,
    /// Number of the ownership.
    #[serde(with = "text")]
    pub generation: u64,
    /// First place of the hash space.
    pub begin: u64,
    /// Behind the last place.
    pub end: u64,
    /// Of the program.
    pub version: String,
    /// `io_uring` or `polling`.
    pub driver: String,
    /// Port of the page protocol.
    pub pages_port: u16,
    /// Nothing before this can be read.
    #[serde(with = "text")]
    pub horizon_lsn: Lsn,
    /// Everything up to here is in object storage.
    #[serde(with = "text")]
    pub durable_lsn: Lsn,
    /// Everything up to here can be read.
    #[serde(with = "text")]
    pub ingested_lsn: Lsn,
    /// Committed, as far as known.
    #[serde(with = "text")]
    pub commit_lsn: Lsn,
    /// Committed bytes that are not ingested.
    pub lag_bytes: u64,
    /// The highest term that safekeepers speak of.
    #[serde(with = "text")]
    pub term: u64,
    /// Where WAL comes from: a safekeeper's address, `archive`, or nothing.
    pub source: String,
    /// Why the source before was left.
    pub source_error: String,
    /// Layers of the map: images, level 0, level 1.
    pub image_layers: usize,
    /// Frozen layers as they were written.
    pub level0_layers: usize,
    /// Compacted delta layers.
    pub level1_layers: usize,
    /// Bytes of all of them.
    pub layer_bytes: u64,
    /// Layers with a file on the local disk.
    pub local_layers: usize,
    /// Bytes of those files.
    pub local_bytes: u64,
    /// Bytes of the open layer in memory.
    pub open_bytes: u64,
    /// Layers in memory that wait to be written.
    pub frozen_layers: usize,
    /// Layers that wait to be uploaded.
    pub waiting_layers: usize,
    /// Bytes that object storage does not have.
    pub backlog_bytes: u64,
    /// Layers that are lost, with the cause: pages that need them cannot be read.
    pub lost_layers: BTreeMap<String, String>,
    /// Records that could not be followed.
    pub faults: u64,
    /// The first of them.
    pub first_faults: Vec<String>,
    /// What the background cannot do at present.
    pub troubles: BTreeMap<String, String>,
}

/// One layer of `GET /v1/layers`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Layer {
    /// `shard/generation-number`, hexadecimal.
    pub id: String,
    /// `delta` or `image`.
    pub kind: String,
    /// 0: a frozen layer, 1: a compacted one.
    pub level: u8,
    /// First key, hexadecimal.
    pub begin: String,
    /// Behind the last key, hexadecimal.
    pub end: String,
    /// Record ends above this,
    #[serde(with = "text")]
    pub after: Lsn,
    /// and up to this.
    #[serde(with = "text")]
    pub through: Lsn,
    /// Length of its file.
    pub bytes: u64,
    /// Values in it.
    pub values: u64,
    /// The longest chain of one of its keys.
    pub chain_max: u32,
    /// Its file lies on the local disk.
    pub is_local: bool,
    /// Object storage has it.
    pub is_uploaded: bool,
}

impl Layer {
    /// A layer of a map or a manifest.
    pub fn new(layer: &LayerDescription, (is_local, is_uploaded): (bool, bool)) -> Layer {
        let hexadecimal = |key: layers::Key| key.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        Layer {
            id: layer.id.to_string(),
            kind: match layer.kind {
                LayerKind::Delta => "delta".to_owned(),
                LayerKind::Image => "image".to_owned(),
            },
            level: layer.level,
            begin: hexadecimal(layer.keys.begin),
            end: hexadecimal(layer.keys.end),
            after: layer.lsns.after,
            through: layer.lsns.through,
            bytes: layer.file_bytes,
            values: layer.values,
            chain_max: layer.chain_max,
            is_local,
            is_uploaded,
        }
    }
}

/// `GET /v1/layers`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerDump {
    /// Nothing before this can be read.
    #[serde(with = "text")]
    pub horizon_lsn: Lsn,
    /// Everything up to here is in object storage.
    #[serde(with = "text")]
    pub durable_lsn: Lsn,
    /// All layers, in the order of positions.
    pub layers: Vec<Layer>,
}

/// Answer to `POST /v1/freeze`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Frozen {
    /// Everything up to here is in object storage.
    #[serde(with = "text")]
    pub durable_lsn: Lsn,
}

/// Answer to `POST /v1/compact`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Compacted {
    /// Merges, rows of images and removals that were done.
    pub rounds: u32,
}
