//! Records that end transactions.
//!
//! Sources: `ParseCommitRecord`, `ParseAbortRecord` (`access/rmgrdesc/xactdesc.c`), `xact_redo` (`access/transam/xact.c`).

use pgtypes::Lsn;
use wal::{Record, rmgr, xact_info};

use crate::{
    MetadataError,
    reader::{Reader, u32s},
};

/// Flags of `xl_xact_xinfo`.
mod xinfo {
    pub const DBINFO: u32 = 1 << 0;
    pub const SUBXACTS: u32 = 1 << 1;
    pub const RELATIONS: u32 = 1 << 2;
    pub const INVALIDATIONS: u32 = 1 << 3;
    pub const TWO_PHASE: u32 = 1 << 4;
    pub const ORIGIN: u32 = 1 << 5;
    pub const GID: u32 = 1 << 7;
    pub const DROPPED_STATISTICS: u32 = 1 << 8;
}

/// The flag of records that name subtransactions.
pub(crate) const HAS_SUBXACTS: u32 = xinfo::SUBXACTS;

const LOCATOR_BYTES: usize = 12;
const STATISTICS_BYTES: usize = 12;
const INVALIDATION_BYTES: usize = 16;
/// Ids below have fixed meanings (`FirstNormalTransactionId`).
pub(crate) const FIRST_NORMAL_XID: u32 = 3;

/// A commit or an abort.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending<'a> {
    pub committed: bool,
    /// The transaction, or the subtransaction that was rolled back alone.
    pub xid: u32,
    subtransactions: &'a [u8],
    /// It had been prepared.
    pub prepared: bool,
    /// What `pg_commit_ts` stores: the origin's time if there is one. Microseconds since 2000-01-01 UTC.
    pub time: u64,
    /// Number of the replication origin, 0 for none.
    pub origin: u16,
    /// Position at the origin.
    pub origin_lsn: Option<Lsn>,
}

impl<'a> Ending<'a> {
    /// `None` when the record ends no transaction.
    pub fn of(record: &'a Record) -> Result<Option<Ending<'a>>, MetadataError> {
        if record.info.rmgr != rmgr::XACT {
            return Ok(None);
        }
        let (committed, prepared) = match record.info.info & xact_info::OPERATION_MASK {
            xact_info::COMMIT => (true, false),
            xact_info::COMMIT_PREPARED => (true, true),
            xact_info::ABORT => (false, false),
            xact_info::ABORT_PREPARED => (false, true),
            _ => return Ok(None),
        };
        let mut main = Reader::new(record.main_data());
        let mut ending = Ending {
            committed,
            xid: record.info.xid,
            subtransactions: &[],
            prepared,
            time: main.u64()?,
            origin: record.origin.unwrap_or(0),
            origin_lsn: None,
        };
        let flags = if record.info.info & xact_info::HAS_INFO != 0 { main.u32()? } else { 0 };
        if flags & xinfo::DBINFO != 0 {
            main.skip(8)?;
        }
        if flags & xinfo::SUBXACTS != 0 {
            let count = main.u32()? as usize;
            ending.subtransactions = main.take(count.saturating_mul(4))?;
        }
        if flags & xinfo::RELATIONS != 0 {
            main.skip_array(LOCATOR_BYTES)?;
        }
        if flags & xinfo::DROPPED_STATISTICS != 0 {
            main.skip_array(STATISTICS_BYTES)?;
        }
        if committed && flags & xinfo::INVALIDATIONS != 0 {
            main.skip_array(INVALIDATION_BYTES)?;
        }
        if flags & xinfo::TWO_PHASE != 0 {
            ending.xid = main.u32()?;
            if flags & xinfo::GID != 0 {
                main.skip_string()?;
            }
        }
        if flags & xinfo::ORIGIN != 0 {
            ending.origin_lsn = Some(Lsn(main.u64()?));
            ending.time = main.u64()?;
        }
        Ok(Some(ending))
    }

    /// The transaction and its subtransactions, in ascending order as PostgreSQL assigned them.
    pub fn xids(&self) -> impl Iterator<Item = u32> + use<'a> {
        let all = core::iter::once(self.xid).chain(u32s(self.subtransactions));
        all.filter(|xid| *xid >= FIRST_NORMAL_XID)
    }

    /// Its subtransactions.
    pub fn subtransactions(&self) -> impl Iterator<Item = u32> + use<'a> {
        u32s(self.subtransactions)
    }

    /// The last one.
    pub fn newest_xid(&self) -> u32 {
        u32s(self.subtransactions).next_back().unwrap_or(self.xid)
    }
}
