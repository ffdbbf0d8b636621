//! What is said about reads that fail: one line when a shard stops answering, one when it answers again, one for each page
//! that is lost.
//!
//! Knows nothing about why.

use std::collections::{BTreeMap, BTreeSet};

use layers::{ShardId, Striping, stripe_hash};
use pageclient::{BlockRead, PageError};
use pgtypes::Instant;

use crate::{page_service_config::PageServiceConfig, shard_map::ShardConfig};

/// Lost pages that were named. At the bound all are forgotten, and named again when they are read.
const NAMED_MAX: usize = 4096;

/// Shards that do not answer, and pages that are lost.
pub struct Outages {
    striping: Striping,
    shards: Vec<ShardConfig>,
    silent: BTreeMap<ShardId, Outage>,
    named: BTreeSet<(u32, u32, u32, u8, u32)>,
}

struct Outage {
    since: Instant,
    failed_blocks: u64,
}

impl Outages {
    /// Of this page service.
    pub fn new(config: &PageServiceConfig) -> Self {
        Self {
            striping: config.striping(),
            shards: config.shards.clone(),
            silent: BTreeMap::new(),
            named: BTreeSet::new(),
        }
    }

    /// Who has which part from now on.
    pub fn replace_shards(&mut self, shards: Vec<ShardConfig>) {
        self.silent.retain(|silent, _| shards.iter().any(|shard| shard.shard == *silent));
        self.shards = shards;
    }

    /// A read that began at `began` failed because its shard does not answer as it should.
    pub fn note_silence(&mut self, error: &PageError, blocks: u32, began: Instant) {
        let outage = self.silent.entry(error.shard).or_insert_with(|| {
            tracing::error!(shard = error.shard.0, "reads of PostgreSQL fail: {error}");
            Outage { since: began, failed_blocks: 0 }
        });
        outage.failed_blocks += u64::from(blocks);
    }

    /// A page cannot be had from a shard that answers.
    pub fn note_lost(&mut self, read: &BlockRead, error: &PageError) {
        if self.named.len() >= NAMED_MAX {
            self.named.clear();
        }
        let relation = read.relation;
        let name = (relation.tablespace, relation.database, relation.relation, read.fork as u8, read.first_block);
        if self.named.insert(name) {
            tracing::error!(shard = error.shard.0, "a read of PostgreSQL fails: {error}");
        }
    }

    /// A read succeeded.
    pub fn note_answer(&mut self, read: &BlockRead, now: Instant) {
        if self.silent.is_empty() {
            return;
        }
        let hash = stripe_hash(read.relation.relation, self.striping.stripe_of(read.first_block));
        let owner = self.shards.iter().find(|shard| (shard.begin..shard.end).contains(&u64::from(hash)));
        if let Some(owner) = owner
            && let Some(outage) = self.silent.remove(&owner.shard)
        {
            tracing::info!(
                shard = owner.shard.0,
                seconds = now.since(outage.since).as_secs(),
                failed_blocks = outage.failed_blocks,
                "the shard answers again"
            );
        }
    }
}
