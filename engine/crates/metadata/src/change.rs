//! What a record changes, as changes of values under keys.

use alloc::vec::Vec;

use pgtypes::Lsn;
use redo::{Database, Event, events_of};
use wal::{Record, rmgr, xlog_info};

use crate::{
    MetadataError,
    counters::{PARAMETER_CHANGE, settings_of},
    multixact::Multixact,
    reader::Reader,
    rmgr_id,
    slru::{Slru, SlruCut, zeroed_page},
    transaction::Ending,
    two_phase::Preparation,
};

/// Bytes of a relation map (`sizeof(RelMapFile)`), checksum included.
const RELATION_MAP_BYTES: usize = 524;

/// Facts about the cluster before the record, which [`crate::Counters::context`] knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Context {
    /// Setting `track_commit_timestamp`, as WAL last said.
    pub track_commit_timestamp: bool,
    /// Next transaction id, with its epoch.
    pub next_full_xid: u64,
}

impl Context {
    /// A transaction id with its epoch: that of its neighbourhood, half a circle to each side.
    ///
    /// The record may be the first to name an id, and ids before it may not have been named yet: it can lie ahead.
    pub fn full_xid(&self, xid: u32) -> u64 {
        let distance = xid.wrapping_sub(self.next_full_xid as u32) as i32;
        self.next_full_xid.saturating_add_signed(i64::from(distance))
    }
}

/// A change of the value under one key, or of those under a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change<'a> {
    /// A page of an SLRU, which exists from here on: [`crate::apply_slru`].
    SlruPage(Slru, u32),
    /// Pages of an SLRU are gone.
    CutSlru(SlruCut),
    /// A database's relation map is replaced; database 0 is the global one.
    RelationMap {
        /// Whose.
        database: Database,
        /// The whole of `pg_filenode.map`.
        map: &'a [u8],
    },
    /// A transaction is prepared.
    Prepare {
        /// With its epoch.
        full_xid: u64,
        /// Contents of its file, without the checksum: [`crate::two_phase_file`].
        state: &'a [u8],
    },
    /// A prepared transaction is committed or rolled back: its file is gone.
    FinishPrepared {
        /// With its epoch.
        full_xid: u64,
    },
    /// Changes of an origin were replayed up to a position of the origin's log.
    AdvanceOrigin {
        /// Number of the origin.
        id: u16,
        /// The position.
        lsn: Lsn,
        /// It holds even if it is before the one that is known.
        backward: bool,
    },
    /// An origin is gone.
    DropOrigin(u16),
    /// Relations and databases begin, end or change their lengths.
    Whole(Event),
    /// The record changes counters by more than its transaction id: [`crate::Counters::replay`].
    Counters,
}

/// Everything that the record changes beside pages of relations, in PostgreSQL's order.
///
/// # Errors
/// The record is not laid out like its kind: PostgreSQL 17 did not write it. Nothing of it may be applied.
pub fn changes_of<'a>(record: &'a Record, context: &Context) -> Result<Vec<Change<'a>>, MetadataError> {
    let mut changes = Vec::new();
    match record.info.rmgr {
        rmgr::XLOG => xlog(record, context, &mut changes)?,
        rmgr::XACT => xact(record, context, &mut changes)?,
        rmgr::MULTIXACT => multixact(record, &mut changes)?,
        rmgr_id::CLOG | rmgr_id::COMMIT_TIMESTAMP => {
            changes.extend(zeroed_page(record)?.map(|(slru, page)| Change::SlruPage(slru, page)));
            if let Some(cut) = SlruCut::of(record)? {
                changes.extend([Change::CutSlru(cut), Change::Counters]);
            }
        }
        rmgr_id::RELATION_MAP => changes.push(relation_map(record)?),
        rmgr_id::REPLICATION_ORIGIN => changes.push(origin(record)?),
        _ => {}
    }
    changes.extend(events_of(record).map(Change::Whole));
    Ok(changes)
}

fn xlog(record: &Record, context: &Context, changes: &mut Vec<Change<'_>>) -> Result<(), MetadataError> {
    const NEXT_OID: u8 = 0x30;
    const FULL_PAGE_WRITES_CHANGE: u8 = 0x80;
    match record.info.info & 0xF0 {
        xlog_info::CHECKPOINT_SHUTDOWN
        | xlog_info::CHECKPOINT_ONLINE
        | xlog_info::END_OF_RECOVERY
        | NEXT_OID
        | FULL_PAGE_WRITES_CHANGE => changes.push(Change::Counters),
        PARAMETER_CHANGE => {
            changes.push(Change::Counters);
            // `CommitTsParameterChange`: the array begins at the next transaction, or is gone.
            match (context.track_commit_timestamp, settings_of(record)?.track_commit_timestamp) {
                (false, true) => {
                    let slru = Slru::CommitTimestamps;
                    changes.push(Change::SlruPage(slru, slru.page_of(context.next_full_xid as u32)));
                }
                (true, false) => changes.push(Change::CutSlru(SlruCut::all(Slru::CommitTimestamps))),
                _ => {}
            }
        }
        _ => {}
    }
    Ok(())
}

fn xact<'a>(record: &'a Record, context: &Context, changes: &mut Vec<Change<'a>>) -> Result<(), MetadataError> {
    if let Some(preparation) = Preparation::of(record)? {
        let full_xid = context.full_xid(preparation.xid);
        changes.push(Change::Prepare { full_xid, state: record.main_data() });
        if let Some(id) = record.origin.filter(|id| *id != 0) {
            changes.push(Change::AdvanceOrigin { id, lsn: preparation.origin_lsn, backward: false });
        }
    }
    let Some(ending) = Ending::of(record)? else { return Ok(()) };
    pages(Slru::TransactionStatus, ending.xids(), changes);
    if ending.committed && context.track_commit_timestamp {
        pages(Slru::CommitTimestamps, ending.xids(), changes);
        changes.push(Change::Counters);
    }
    if let (Some(lsn), id @ 1..) = (ending.origin_lsn, ending.origin) {
        changes.push(Change::AdvanceOrigin { id, lsn, backward: false });
    }
    if ending.prepared {
        changes.push(Change::FinishPrepared { full_xid: context.full_xid(ending.xid) });
    }
    Ok(())
}

fn multixact(record: &Record, changes: &mut Vec<Change<'_>>) -> Result<(), MetadataError> {
    match Multixact::of(record)? {
        Some(Multixact::Create(creation)) => {
            pages(Slru::MultixactOffsets, [creation.id, creation.next_id()], changes);
            pages(Slru::MultixactMembers, creation.members().map(|(offset, ..)| offset), changes);
            changes.push(Change::Counters);
        }
        Some(Multixact::Truncate(truncation)) => {
            changes.extend(SlruCut::of_multixacts(&truncation).map(Change::CutSlru));
            changes.push(Change::Counters);
        }
        _ => changes.extend(zeroed_page(record)?.map(|(slru, page)| Change::SlruPage(slru, page))),
    }
    Ok(())
}

/// The pages of these ids, each once.
fn pages(slru: Slru, ids: impl IntoIterator<Item = u32>, changes: &mut Vec<Change<'_>>) {
    let mut pages: Vec<u32> = ids.into_iter().map(|id| slru.page_of(id)).collect();
    pages.sort_unstable();
    pages.dedup();
    changes.extend(pages.into_iter().map(|page| Change::SlruPage(slru, page)));
}

/// `xl_relmap_update`.
fn relation_map(record: &Record) -> Result<Change<'_>, MetadataError> {
    let mut main = Reader::new(record.main_data());
    let (database, tablespace, length) = (main.u32()?, main.u32()?, main.u32()?);
    if length as usize != RELATION_MAP_BYTES {
        return Err(MetadataError::Record("a relation map has another length"));
    }
    Ok(Change::RelationMap { database: Database { tablespace, database }, map: main.take(RELATION_MAP_BYTES)? })
}

/// `xl_replorigin_set` and `xl_replorigin_drop`.
fn origin(record: &Record) -> Result<Change<'_>, MetadataError> {
    let mut main = Reader::new(record.main_data());
    match record.info.info & 0xF0 {
        0x00 => {
            let lsn = Lsn(main.u64()?);
            Ok(Change::AdvanceOrigin { id: main.u16()?, lsn, backward: main.bool()? })
        }
        0x10 => Ok(Change::DropOrigin(main.u16()?)),
        _ => Err(MetadataError::Record("there is no such record of replication origins")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_epoch_of_an_xid_is_that_of_its_neighbourhood() {
        for (next_full_xid, xid, expected) in [
            (1000, 999, 999),
            (1000, 1001, 1001),
            (1 << 32 | 1000, 1001, 1 << 32 | 1001),
            (1 << 32 | 1000, 0xFFFF_FFF0, 0xFFFF_FFF0),
            (0xFFFF_FFF0, 3, 1 << 32 | 3),
        ] {
            let context = Context { track_commit_timestamp: false, next_full_xid };
            assert_eq!(expected, context.full_xid(xid), "{next_full_xid:#x} {xid:#x}");
        }
    }
}
