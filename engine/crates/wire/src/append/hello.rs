//! The greeting: who speaks about which log, and what for.

use alloc::vec::Vec;

use layers::{HashRange, ShardGeneration, ShardId};
use pgtypes::{BranchId, ClusterId, FrameSummary, LogId, Lsn, SystemId};

use super::{
    WireError,
    consensus_codec::{put_lsn, put_summary, take_lsn, take_summary},
};
use crate::bytes::{Put, Taker};

/// First 8 bytes of a greeting.
pub const PROTOCOL_MAGIC: [u8; 8] = *b"lakebase";
/// Version of the append protocol. Peers of different versions do not talk.
pub const PROTOCOL_VERSION: u16 = 1;

/// First message on a connection. Magic and version stay where they are in all versions, so that a peer of any other
/// version is told so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Which log.
    pub log: LogId,
    /// The `system_identifier` of the PostgreSQL cluster that writes it; 0 when the caller does not know it (a peer that
    /// only asks for ballots), which the server does not compare.
    pub system_id: SystemId,
    /// What for.
    pub purpose: Purpose,
}

/// What the connection is used for; decides which messages may follow and which roles may open it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// A writer: `ProposerMessage`s follow, `AcceptorMessage`s answer, `Status` first.
    Propose,
    /// Another safekeeper: `FetchWal` and `AskBallot` follow.
    Peer,
    /// A reader of committed WAL: `WalData` flows from `begin_lsn` on, nothing else follows from the reader.
    Read {
        /// First byte wanted.
        begin_lsn: Lsn,
    },
    /// A page server: `FeedBatch`es flow from `from` on, `FeedProgress` comes back. Both belong to version 1: a
    /// safekeeper that does not know them refuses the greeting.
    Feed {
        /// Which shard.
        shard: ShardId,
        /// The subscriber's ownership of it. A lower one than the safekeeper has seen is refused
        /// ([`super::ErrorCode::StaleGeneration`]); when the first batch comes, this one is durable there.
        generation: ShardGeneration,
        /// Its places in the hash space; the shard that begins with 0 gets the metadata. Not empty.
        range: HashRange,
        /// Blocks of a stripe, above 0.
        stripe_blocks: u32,
        /// The position that the subscriber has, a record end. All zeros: it does not know yet, and only registers its
        /// generation; the answer is one empty batch at position 0, and the end of the stream.
        from: FrameSummary,
    },
}

/// The subscriber's position: a multiple of 8 with its record before it, or nothing at all.
fn check_from(from: &FrameSummary) -> Result<(), WireError> {
    let is_position = from.record_end.offset_in(8) == 0 && from.record_end > from.record_start;
    match is_position || *from == FrameSummary::default() {
        true => Ok(()),
        false => Err(WireError::BadValue { field: "feed.from" }),
    }
}

fn take_feed(fields: &mut Taker<'_>) -> Result<Purpose, WireError> {
    let shard = ShardId(fields.u32("feed.shard")?);
    let generation = ShardGeneration(fields.u64("feed.generation")?);
    let range = HashRange { begin: fields.u64("feed.begin")?, end: fields.u64("feed.end")? };
    if range.begin >= range.end || range.end > HashRange::ALL.end {
        return Err(WireError::BadValue { field: "feed.end" });
    }
    let stripe_blocks = fields.u32("feed.stripe_blocks")?;
    if stripe_blocks == 0 {
        return Err(WireError::BadValue { field: "feed.stripe_blocks" });
    }
    let from = take_summary(fields)?;
    check_from(&from)?;
    Ok(Purpose::Feed { shard, generation, range, stripe_blocks, from })
}

impl Hello {
    pub(super) fn put(&self, body: &mut Vec<u8>) {
        body.put(&PROTOCOL_MAGIC);
        body.put_u16(PROTOCOL_VERSION);
        body.put(&self.log.cluster.0);
        body.put(&self.log.branch.0);
        body.put_u64(self.system_id.0);
        match self.purpose {
            Purpose::Propose => body.put_u8(1),
            Purpose::Peer => body.put_u8(2),
            Purpose::Read { begin_lsn } => {
                body.put_u8(3);
                put_lsn(body, begin_lsn);
            }
            Purpose::Feed { shard, generation, range, stripe_blocks, from } => {
                body.put_u8(4);
                body.put_u32(shard.0);
                body.put_u64(generation.0);
                body.put_u64(range.begin);
                body.put_u64(range.end);
                body.put_u32(stripe_blocks);
                put_summary(body, &from);
            }
        }
    }

    pub(super) fn take(fields: &mut Taker<'_>) -> Result<Self, WireError> {
        if fields.array::<8>("magic").map_err(|_| WireError::BadMagic)? != PROTOCOL_MAGIC {
            return Err(WireError::BadMagic);
        }
        let theirs = fields.u16("version")?;
        if theirs != PROTOCOL_VERSION {
            return Err(WireError::WrongVersion { theirs, ours: PROTOCOL_VERSION });
        }
        let cluster = ClusterId(fields.array("cluster")?);
        let branch = BranchId(fields.array("branch")?);
        let system_id = SystemId(fields.u64("system_id")?);
        let purpose = match fields.u8("purpose")? {
            1 => Purpose::Propose,
            2 => Purpose::Peer,
            3 => Purpose::Read { begin_lsn: take_lsn(fields, "begin_lsn")? },
            4 => take_feed(fields)?,
            _ => return Err(WireError::BadValue { field: "purpose" }),
        };
        Ok(Hello { log: LogId { cluster, branch }, system_id, purpose })
    }
}
