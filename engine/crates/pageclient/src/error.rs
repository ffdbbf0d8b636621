//! Why a request failed: what was asked of whom, and the cause.

use std::fmt;

use layers::ShardId;
use pgtypes::Lsn;
use wal::{Fork, RelFileLocator};
use wire::{append::WireError, page::PageErrorCode};

/// A request that failed. The text is for the person who must act.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{request} from shard {shard} at {address}: {cause}", shard = shard.0)]
pub struct PageError {
    /// What was asked; of a request that was cut at stripes, the whole.
    pub request: RequestName,
    /// Of which shard.
    pub shard: ShardId,
    /// Where it is.
    pub address: String,
    /// Why it failed.
    #[source]
    pub cause: Cause,
}

/// Why a request failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Cause {
    /// The term of this writer is over: every later request fails, too.
    #[error("this writer's term is over: {0}")]
    StaleTerm(String),
    /// The server says so.
    #[error("{text}")]
    Server {
        /// For programs.
        code: PageErrorCode,
        /// The server's words.
        text: String,
    },
    /// No answer before the deadline.
    #[error("no answer in time{}", last.as_ref().map_or(String::new(), |last| format!(" ({last})")))]
    Deadline {
        /// The last thing that went wrong, if anything did.
        last: Option<String>,
    },
    /// The server answered with something else than what was asked.
    #[error("the answer does not fit the request: {0}")]
    Unfit(String),
    /// The request breaks the rules of the protocol: the caller's fault.
    #[error(transparent)]
    Request(#[from] WireError),
}

/// A read of blocks `first_block` up to `first_block + count`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRead {
    /// Of which relation.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// The first.
    pub first_block: u32,
    /// How many, above 0.
    pub count: u32,
    /// As of when; [`wire::page::NEWEST`] for the newest.
    pub request_lsn: Lsn,
    /// The blocks did not change between this position and `request_lsn`: a server that has ingested so much may answer.
    pub not_modified_since: Lsn,
}

/// What was asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RequestName {
    /// Blocks of a relation.
    Pages(BlockRead),
    /// All lengths as of a position.
    Sizes(Lsn),
    /// All metadata as of a position.
    Metadata(Lsn),
    /// A lease on a position.
    Lease(Lsn),
    /// A file outside WAL.
    Advisory(String),
    /// The position of a time.
    FindLsn(i64),
}

impl fmt::Display for RequestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestName::Pages(read) => {
                let BlockRead { relation, fork, first_block, count, request_lsn, not_modified_since } = read;
                write!(f, "read relation {}/{}/{}", relation.tablespace, relation.database, relation.relation)?;
                match fork {
                    Fork::Main => {}
                    Fork::FreeSpaceMap => f.write_str(" (fsm)")?,
                    Fork::VisibilityMap => f.write_str(" (vm)")?,
                    Fork::Init => f.write_str(" (init)")?,
                }
                match count {
                    1 => write!(f, " block {first_block}")?,
                    _ => write!(f, " blocks {first_block}..{}", first_block.saturating_add(*count))?,
                }
                write!(f, " as of {} (unchanged since {not_modified_since})", At(*request_lsn))
            }
            RequestName::Sizes(at) => write!(f, "read lengths as of {}", At(*at)),
            RequestName::Metadata(at) => write!(f, "read metadata as of {}", At(*at)),
            RequestName::Lease(lsn) => write!(f, "take lease on {}", At(*lsn)),
            RequestName::Advisory(name) => write!(f, "hand in {name}"),
            RequestName::FindLsn(timestamp) => write!(f, "find position of time {timestamp} us"),
        }
    }
}

/// A position, or the newest.
struct At(Lsn);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == Lsn::MAX { f.write_str("now") } else { self.0.fmt(f) }
    }
}
