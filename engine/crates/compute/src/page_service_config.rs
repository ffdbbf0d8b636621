//! `[page_service]` and `[backpressure]` of `compute.toml`: where pages come from when there is no base backup.
//!
//! Knows nothing about connections. `docs/compute.md` describes every key for users.

use std::time::Duration;

use layers::Striping;
use serde::Deserialize;

use crate::{
    config::text_duration,
    shard_map::{ShardConfig, ShardMap, check_shards},
};

/// A cache below this holds less than the blocks that one query may need at once: with `work_mem` sorts and 16 blocks per
/// read of each of a hundred backends that is a few MiB.
const CACHE_BYTES_MIN: u64 = 16 << 20;

/// `[page_service]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageServiceConfig {
    /// Blocks of a stripe, as in `cluster.json`: a constant of the lakebase.
    #[serde(default = "default_stripe_blocks")]
    pub stripe_blocks: u32,
    /// Bytes of relation blocks that the local cache may hold; 0: as many as the disk has room for.
    #[serde(default)]
    pub cache_bytes: u64,
    /// When blocks leave the cache.
    #[serde(default)]
    pub evict: Evict,
    /// How long a read waits for the page service before it fails with an I/O error.
    #[serde(default = "default_fill_timeout", deserialize_with = "text_duration")]
    pub fill_timeout: Duration,
    /// Of the shard map: one that comes later needs a higher one.
    #[serde(default)]
    pub version: u64,
    /// The shard map.
    pub shards: Vec<ShardConfig>,
}

/// When blocks leave the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evict {
    /// When the cache passes its limit, or the disk runs full.
    #[default]
    AsNeeded,
    /// Every clean block after each access: a test mode, in which any wrong page shows at once.
    Always,
}

/// `[backpressure]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackpressureConfig {
    /// Committed WAL that a shard has not ingested, bytes: above it the writer is slowed.
    pub ingest_lag_bytes: u64,
    /// Committed WAL that a shard has not brought to object storage, bytes: above it the writer is slowed.
    pub durable_lag_bytes: u64,
}

impl Default for BackpressureConfig {
    fn default() -> Self {
        Self { ingest_lag_bytes: 256 << 20, durable_lag_bytes: 4 << 30 }
    }
}

impl PageServiceConfig {
    /// How relations are cut.
    pub fn striping(&self) -> Striping {
        Striping { stripe_blocks: self.stripe_blocks }
    }

    /// Refuses values that cannot be used.
    ///
    /// # Errors
    /// What is wrong, with the key.
    pub fn check(&self) -> Result<(), String> {
        if self.stripe_blocks == 0 {
            return Err("page_service.stripe_blocks: must be above 0".into());
        }
        if self.cache_bytes != 0 && self.cache_bytes < CACHE_BYTES_MIN {
            return Err(format!("page_service.cache_bytes: must be 0 (no limit) or at least {CACHE_BYTES_MIN}"));
        }
        check_shards(&self.shards).map_err(|error| format!("page_service.shards: {error}"))
    }

    /// The map that the agent begins with.
    pub fn shard_map(&self) -> ShardMap {
        ShardMap { version: self.version, shards: self.shards.clone() }
    }
}

impl BackpressureConfig {
    /// Refuses values that cannot be used.
    ///
    /// # Errors
    /// What is wrong, with the key.
    pub fn check(&self) -> Result<(), String> {
        // Below it every flush would be slowed: a shard hears of WAL only after its commit.
        const LAG_BYTES_MIN: u64 = 1 << 20;
        for (name, value) in
            [("ingest_lag_bytes", self.ingest_lag_bytes), ("durable_lag_bytes", self.durable_lag_bytes)]
        {
            if value < LAG_BYTES_MIN {
                return Err(format!("backpressure.{name}: must be at least {LAG_BYTES_MIN}"));
            }
        }
        Ok(())
    }
}

fn default_stripe_blocks() -> u32 {
    Striping::DEFAULT.stripe_blocks
}

fn default_fill_timeout() -> Duration {
    Duration::from_secs(60)
}

#[cfg(test)]
mod tests {
    use layers::ShardGeneration;

    use super::*;

    const GOOD: &str = r#"
[[shards]]
shard = 1
generation = 3
begin = 2147483648
end = 4294967296
pages = "127.0.0.1:2"
[[shards]]
shard = 0
begin = 0
end = 2147483648
pages = "127.0.0.1:1"
"#;

    fn parse(source: &str) -> Result<PageServiceConfig, String> {
        let config: PageServiceConfig = toml::from_str(source).map_err(|error| error.to_string())?;
        config.check().map(|()| config)
    }

    #[test]
    fn ranges_may_come_in_any_order_and_the_rest_has_defaults() {
        let config = parse(GOOD).expect("valid");
        assert_eq!((2048, 0, Evict::AsNeeded), (config.stripe_blocks, config.cache_bytes, config.evict));
        assert_eq!(Duration::from_secs(60), config.fill_timeout);
        assert_eq!(ShardGeneration(3), config.shards[0].generation);
        assert_eq!(ShardGeneration(0), config.shards[1].generation);
    }

    #[test]
    fn bad_values_are_refused_with_the_key_in_the_message() {
        let cases = [
            ("shard = 1", "shard = 0", "shard 0 appears twice"),
            ("begin = 2147483648", "begin = 2147483649", "does not follow on 2147483648"),
            ("begin = 2147483648", "begin = 2147483647", "does not follow on 2147483648"),
            ("end = 4294967296", "end = 4294967295", "end at 4294967295"),
            ("end = 4294967296", "end = 4294967297", "does not follow"),
            ("\n[[shards]]\nshard = 1", "cache_bytes = 4096\n[[shards]]\nshard = 1", "cache_bytes"),
            ("\n[[shards]]\nshard = 1", "stripe_blocks = 0\n[[shards]]\nshard = 1", "stripe_blocks"),
            ("\n[[shards]]\nshard = 1", "evict = \"never\"\n[[shards]]\nshard = 1", "never"),
            ("pages = \"127.0.0.1:1\"", "pages = \"127.0.0.1\"", "HOST:PORT"),
            ("pages = \"127.0.0.1:1\"", "page = \"127.0.0.1:1\"", "unknown field"),
        ];
        for (from, to, expected) in cases {
            assert!(GOOD.contains(from), "{from}");
            let message = parse(&GOOD.replacen(from, to, 1)).expect_err(to);
            assert!(message.contains(expected), "{to}: {message}");
        }
        assert!(parse("shards = []").expect_err("none").contains("0 entries"));
    }

    #[test]
    fn backpressure_has_defaults_and_a_floor() {
        assert!(BackpressureConfig::default().check().is_ok());
        let low: BackpressureConfig = toml::from_str("ingest_lag_bytes = 10").expect("parsed");
        assert_eq!(4 << 30, low.durable_lag_bytes);
        assert!(low.check().expect_err("too low").contains("backpressure.ingest_lag_bytes"));
    }
}
