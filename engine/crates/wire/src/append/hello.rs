//! The greeting: who speaks about which log, and what for.

use alloc::vec::Vec;

use pgtypes::{BranchId, ClusterId, LogId, Lsn, SystemId};

use super::{
    WireError,
    consensus_codec::{put_lsn, take_lsn},
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
            _ => return Err(WireError::BadValue { field: "purpose" }),
        };
        Ok(Hello { log: LogId { cluster, branch }, system_id, purpose })
    }
}
