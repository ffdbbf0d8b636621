//! What a client is told: whose pages, who reads them, and where the shards are.

use identity::Tls;
use layers::{HashRange, ShardGeneration, ShardId, Striping};
use pgtypes::{LogId, SystemId};
use wire::page::ReaderRole;

/// Whose pages, who reads them, and where the shards are.
#[derive(Clone)]
pub struct ClientConfig {
    /// Which log's pages.
    pub log: LogId,
    /// Of the PostgreSQL cluster; 0 when it is not known.
    pub system_id: SystemId,
    /// What the reader is.
    pub role: ReaderRole,
    /// Of the lakebase (`cluster.json`).
    pub striping: Striping,
    /// The shards: together the whole hash space, each place once.
    pub shards: Vec<ShardAddress>,
    /// Certificates; `None` by the development flag.
    pub tls: Option<Tls>,
}

/// Where a shard is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardAddress {
    /// The shard.
    pub shard: ShardId,
    /// The ownership that is expected there; 0 takes any.
    pub generation: ShardGeneration,
    /// What is on it.
    pub range: HashRange,
    /// `host:port`. TLS checks the host against the server's certificate.
    pub address: String,
}
