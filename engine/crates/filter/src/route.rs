//! Who needs a record.
//!
//! The rules of `docs/design/2026-11-27-page-service.md`, "Who gets what". Blocks of the free-space map go to nobody: it is
//! advisory, and kept elsewhere.

use alloc::vec::Vec;

use layers::{HashRange, Striping, stripe_hash};
use redo::{BlockTag, blocks_of, events_of};
use wal::{Fork, Record, RecordHeader, rmgr, xact_info};

/// Resource managers whose records only standbys and logical decoding read.
const LOGICAL_MESSAGE: u8 = 21;

/// Who needs a record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Route {
    /// Places in the hash space of the blocks that it touches, in order, each once.
    hashes: Vec<u32>,
    /// Every shard needs it: it concerns whole relations or databases.
    pub everyone: bool,
    /// The shard that has the metadata needs it.
    pub metadata: bool,
}

/// Whether any shard could need the record of that header. What is false here need not be looked into, and may be long: a
/// logical message has up to 1 GiB.
pub fn is_for_somebody(header: &RecordHeader) -> bool {
    match header.rmgr {
        rmgr::STANDBY | LOGICAL_MESSAGE | rmgr::TABLESPACE => false,
        rmgr::XACT => !is_invalidation(header.info),
        _ => true,
    }
}

/// Records of a transaction in progress that change nothing: cache invalidations, and which subtransactions are whose.
fn is_invalidation(info: u8) -> bool {
    matches!(info & xact_info::OPERATION_MASK, xact_info::INVALIDATIONS | xact_info::ASSIGNMENT)
}

impl Route {
    /// Who needs `record`.
    pub fn of(record: &Record, striping: Striping) -> Route {
        let mut hashes: Vec<u32> = blocks_of(record)
            .filter(|touch| touch.tag.fork != Fork::FreeSpaceMap)
            .map(|touch| hash_of(touch.tag, striping))
            .collect();
        hashes.sort_unstable();
        hashes.dedup();
        let metadata = match record.info.rmgr {
            rmgr::XLOG => record.blocks.is_empty(),
            rmgr::XACT => !is_invalidation(record.info.info),
            rmgr::SMGR
            | rmgr::CLOG
            | rmgr::DBASE
            | rmgr::MULTIXACT
            | rmgr::RELATION_MAP
            | rmgr::COMMIT_TIMESTAMP
            | rmgr::REPLICATION_ORIGIN => true,
            _ => false,
        };
        Route { hashes, everyone: events_of(record).next().is_some(), metadata }
    }

    /// Places in the hash space of the blocks that the record touches, in order, each once.
    pub fn hashes(&self) -> &[u32] {
        &self.hashes
    }

    /// Whether a shard needs the record. The one that begins with 0 has the metadata.
    pub fn concerns(&self, range: HashRange) -> bool {
        self.everyone || self.metadata && range.begin == 0 || self.hashes.iter().any(|hash| has_hash(range, *hash))
    }

    /// Whether nobody needs it.
    pub fn is_empty(&self) -> bool {
        !self.everyone && !self.metadata && self.hashes.is_empty()
    }
}

/// Where a block lies.
pub(crate) fn hash_of(tag: BlockTag, striping: Striping) -> u32 {
    stripe_hash(tag.relation.relation, striping.stripe_of(tag.block))
}

/// Whether a place lies in a shard.
pub(crate) fn has_hash(range: HashRange, hash: u32) -> bool {
    (range.begin..range.end).contains(&u64::from(hash))
}
