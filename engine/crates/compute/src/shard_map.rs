//! The shard map of the page service: checked, and replaced while the agent runs.
//!
//! Versions order maps: the operator may repeat a call, and a late one must not undo a newer. Knows nothing about connections.

use std::collections::BTreeSet;

use layers::{HashRange, ShardGeneration, ShardId};
use pageclient::ShardAddress;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::{HostPort, text};

/// Shards of a lakebase. More would make a shard map of megabytes; nobody has needed a tenth of it.
const SHARDS_MAX: usize = 4096;
/// Places of the hash space.
const HASHES: u64 = 1 << 32;

/// A shard and its owner: `[[page_service.shards]]`, and an element of `PUT /v1/shards`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShardConfig {
    /// Its number.
    #[serde(deserialize_with = "shard", serialize_with = "shard_number")]
    pub shard: ShardId,
    /// Generation of its owner; 0: whichever answers.
    #[serde(default, deserialize_with = "generation", serialize_with = "generation_number")]
    pub generation: ShardGeneration,
    /// First place of the hash space.
    pub begin: u64,
    /// Behind the last place; at most 2^32.
    pub end: u64,
    /// `host:port` of its owner's page protocol.
    #[serde(deserialize_with = "text", serialize_with = "shown")]
    pub pages: HostPort,
}

impl ShardConfig {
    /// Its part of the hash space.
    pub fn range(&self) -> HashRange {
        HashRange { begin: self.begin, end: self.end }
    }

    /// As the client wants it.
    pub fn address(&self) -> ShardAddress {
        ShardAddress {
            shard: self.shard,
            generation: self.generation,
            range: self.range(),
            address: self.pages.to_string(),
        }
    }
}

/// A map with its version.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShardMap {
    /// Higher than that of every map before; 0 only in a configuration file that has none.
    pub version: u64,
    /// All shards.
    pub shards: Vec<ShardConfig>,
}

/// Why a map is not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShardMapRefused {
    /// There are no shards here.
    #[error("this compute starts from a base backup: it has no page service")]
    NoPageService,
    /// The shards do not divide the hash space among them.
    #[error("{0}")]
    Invalid(String),
    /// A later map was taken, or another one of this version.
    #[error("the map has version {offered}, and the one in force {known}: a new map needs a higher version")]
    StaleVersion {
        /// Of the map that was offered.
        offered: u64,
        /// Of the map in force.
        known: u64,
    },
    /// The agent is about to end.
    #[error("the agent is stopping")]
    Stopping,
}

impl ShardMap {
    /// Puts `later` in place of this map; false when it is this map already.
    ///
    /// # Errors
    /// It is no map, or not a later one; this map stays.
    pub fn replace(&mut self, later: ShardMap) -> Result<bool, ShardMapRefused> {
        check_shards(&later.shards).map_err(ShardMapRefused::Invalid)?;
        if later == *self {
            return Ok(false);
        }
        if later.version <= self.version {
            return Err(ShardMapRefused::StaleVersion { offered: later.version, known: self.version });
        }
        *self = later;
        Ok(true)
    }
}

/// Refuses shards that do not divide the hash space among them.
///
/// # Errors
/// What is wrong.
pub fn check_shards(shards: &[ShardConfig]) -> Result<(), String> {
    if shards.is_empty() || shards.len() > SHARDS_MAX {
        return Err(format!("{} entries; expected 1 to {SHARDS_MAX}", shards.len()));
    }
    let mut numbers = BTreeSet::new();
    for shard in shards {
        if !numbers.insert(shard.shard) {
            return Err(format!("shard {} appears twice", shard.shard.0));
        }
    }
    let mut ranges: Vec<(u64, u64)> = shards.iter().map(|shard| (shard.begin, shard.end)).collect();
    ranges.sort_unstable();
    let mut covered = 0;
    for (begin, end) in ranges {
        if begin != covered || end <= begin || end > HASHES {
            return Err(format!(
                "the range {begin} to {end} does not follow on {covered}: together the ranges must be 0 to {HASHES}, without \
                 gaps and overlaps"
            ));
        }
        covered = end;
    }
    match covered {
        HASHES => Ok(()),
        _ => Err(format!("the ranges end at {covered}, expected {HASHES}")),
    }
}

fn shard<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ShardId, D::Error> {
    u32::deserialize(deserializer).map(ShardId)
}

fn shard_number<S: Serializer>(shard: &ShardId, serializer: S) -> Result<S::Ok, S::Error> {
    shard.0.serialize(serializer)
}

fn generation<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ShardGeneration, D::Error> {
    u64::deserialize(deserializer).map(ShardGeneration)
}

fn generation_number<S: Serializer>(generation: &ShardGeneration, serializer: S) -> Result<S::Ok, S::Error> {
    generation.0.serialize(serializer)
}

fn shown<S: Serializer>(address: &HostPort, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(version: u64, ports: [u16; 2]) -> ShardMap {
        let text = format!(
            r#"{{"version": {version}, "shards": [
                {{"shard": 0, "begin": 0, "end": 2147483648, "pages": "127.0.0.1:{}"}},
                {{"shard": 7, "generation": 3, "begin": 2147483648, "end": 4294967296, "pages": "[::1]:{}"}}]}}"#,
            ports[0], ports[1]
        );
        serde_json::from_str(&text).expect("valid")
    }

    #[test]
    fn a_later_map_takes_the_place_and_may_be_repeated() {
        let mut current = map(0, [1, 2]);
        assert_eq!(Ok(true), current.replace(map(5, [1, 3])));
        assert_eq!(Ok(false), current.replace(map(5, [1, 3])), "the operator did not hear the answer");
        let refused = current.replace(map(5, [1, 4])).expect_err("two maps of one version");
        assert_eq!(ShardMapRefused::StaleVersion { offered: 5, known: 5 }, refused);
        assert!(current.replace(map(4, [1, 2])).is_err(), "an old call that comes late");
        assert_eq!(map(5, [1, 3]), current);
    }

    #[test]
    fn a_map_with_a_hole_changes_nothing() {
        let mut current = map(0, [1, 2]);
        let mut holed = map(1, [1, 2]);
        holed.shards.remove(0);
        assert!(matches!(current.replace(holed), Err(ShardMapRefused::Invalid(_))));
        assert_eq!(map(0, [1, 2]), current);
    }

    #[test]
    fn what_is_shown_can_be_put_again() {
        let shown = serde_json::to_string(&map(3, [1, 2])).expect("text");
        assert_eq!(map(3, [1, 2]), serde_json::from_str(&shown).expect("valid"));
    }
}
