//! The greeting of the page protocol: who reads which shard, and the server's answer.

use alloc::vec::Vec;

use layers::{HashRange, ShardGeneration, ShardId};
use pgtypes::{BranchId, ClusterId, LogId, Lsn, SystemId, Term};

use super::codec::{put_lsn, take_lsn};
use crate::{
    append::WireError,
    bytes::{Put, Taker},
};

/// First 8 bytes of a greeting.
pub const PAGE_PROTOCOL_MAGIC: [u8; 8] = *b"lakepage";
/// Version of the page protocol. Peers of different versions do not talk.
pub const PAGE_PROTOCOL_VERSION: u16 = 1;

/// First message on a connection. Magic and version stay where they are in all versions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHello {
    /// Which log's pages.
    pub log: LogId,
    /// The `system_identifier` of the PostgreSQL cluster; 0 when the reader does not know it, which is not compared.
    pub system_id: SystemId,
    /// The shard that the reader expects here; another one is refused with `WrongShardOwner`.
    pub shard: ShardId,
    /// The ownership that the reader's map names; 0 takes any.
    pub generation: ShardGeneration,
    /// What the reader is.
    pub role: ReaderRole,
}

/// What a reader is; decides what it may ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReaderRole {
    /// The writer of that term: refused with `StaleTerm` when the server knows a higher one.
    Writer {
        /// Granted by the operator.
        term: Term,
    },
    /// A replica: it follows the log, whoever writes it, and is never refused for a term.
    Replica,
    /// Export, inspection, benchmarks.
    Tool,
}

/// The server's first answer: what it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageWelcome {
    /// The shard.
    pub shard: ShardId,
    /// The server's ownership of it.
    pub generation: ShardGeneration,
    /// What is on it.
    pub range: HashRange,
    /// Blocks of a stripe, above 0.
    pub stripe_blocks: u32,
    /// Everything up to here can be read.
    pub ingested_lsn: Lsn,
    /// Everything up to here is on object storage.
    pub durable_lsn: Lsn,
    /// Nothing before this can be read.
    pub horizon_lsn: Lsn,
}

impl PageHello {
    pub(super) fn put(&self, body: &mut Vec<u8>) {
        body.put(&PAGE_PROTOCOL_MAGIC);
        body.put_u16(PAGE_PROTOCOL_VERSION);
        body.put(&self.log.cluster.0);
        body.put(&self.log.branch.0);
        body.put_u64(self.system_id.0);
        body.put_u32(self.shard.0);
        body.put_u64(self.generation.0);
        match self.role {
            ReaderRole::Writer { term } => {
                body.put_u8(1);
                body.put_u64(term.0);
            }
            ReaderRole::Replica => body.put_u8(2),
            ReaderRole::Tool => body.put_u8(3),
        }
    }

    pub(super) fn take(fields: &mut Taker<'_>) -> Result<Self, WireError> {
        if fields.array::<8>("magic").map_err(|_| WireError::BadMagic)? != PAGE_PROTOCOL_MAGIC {
            return Err(WireError::BadMagic);
        }
        let theirs = fields.u16("version")?;
        if theirs != PAGE_PROTOCOL_VERSION {
            return Err(WireError::WrongVersion { theirs, ours: PAGE_PROTOCOL_VERSION });
        }
        let cluster = ClusterId(fields.array("cluster")?);
        let branch = BranchId(fields.array("branch")?);
        let system_id = SystemId(fields.u64("system_id")?);
        let shard = ShardId(fields.u32("shard")?);
        let generation = ShardGeneration(fields.u64("generation")?);
        let role = match fields.u8("role")? {
            1 => ReaderRole::Writer { term: Term(fields.u64("term")?) },
            2 => ReaderRole::Replica,
            3 => ReaderRole::Tool,
            _ => return Err(WireError::BadValue { field: "role" }),
        };
        Ok(PageHello { log: LogId { cluster, branch }, system_id, shard, generation, role })
    }
}

impl PageWelcome {
    pub(super) fn put(&self, body: &mut Vec<u8>) {
        body.put_u32(self.shard.0);
        body.put_u64(self.generation.0);
        body.put_u64(self.range.begin);
        body.put_u64(self.range.end);
        body.put_u32(self.stripe_blocks);
        put_lsn(body, self.ingested_lsn);
        put_lsn(body, self.durable_lsn);
        put_lsn(body, self.horizon_lsn);
    }

    pub(super) fn take(fields: &mut Taker<'_>) -> Result<Self, WireError> {
        let shard = ShardId(fields.u32("shard")?);
        let generation = ShardGeneration(fields.u64("generation")?);
        let range = HashRange { begin: fields.u64("range")?, end: fields.u64("range")? };
        if range.begin >= range.end || range.end > HashRange::ALL.end {
            return Err(WireError::BadValue { field: "range" });
        }
        let stripe_blocks = fields.u32("stripe_blocks")?;
        if stripe_blocks == 0 {
            return Err(WireError::BadValue { field: "stripe_blocks" });
        }
        Ok(PageWelcome {
            shard,
            generation,
            range,
            stripe_blocks,
            ingested_lsn: take_lsn(fields, "ingested_lsn")?,
            durable_lsn: take_lsn(fields, "durable_lsn")?,
            horizon_lsn: take_lsn(fields, "horizon_lsn")?,
        })
    }
}
