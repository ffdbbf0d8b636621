//! The part of a commit or abort that one page of an SLRU needs.
//!
//! A transaction may have a million subtransactions, whose record of 4 MB concerns a thousand pages of `pg_commit_ts`: each
//! of them keeps its own subtransactions, and nothing of relations and invalidations.

use alloc::vec::Vec;

use wal::{Record, xact_info};

use crate::{
    MetadataError,
    slru::Slru,
    transaction::{Ending, HAS_SUBXACTS},
};

/// Records with less main data are kept as they are: there is nothing to be won.
const WHOLE_BYTES: usize = 96;

/// Ids of the parts behind a record's header (`access/xlogrecord.h`).
const DATA_LONG: u8 = 254;
const ORIGIN: u8 = 253;

/// A stored record ([`wal::Record::to_stored`]) that does to page `number` of `slru` what `record` does; `None` when
/// `record` itself is short enough, or ends no transaction.
///
/// # Errors
/// The record is not laid out like its kind.
pub fn slru_part(record: &Record, slru: Slru, number: u32) -> Result<Option<Vec<u8>>, MetadataError> {
    if record.main_data().len() < WHOLE_BYTES {
        return Ok(None);
    }
    let Some(ending) = Ending::of(record)? else { return Ok(None) };
    let operation = if ending.committed { xact_info::COMMIT } else { xact_info::ABORT };
    let mut part = Vec::new();
    part.extend_from_slice(&ending.xid.to_le_bytes());
    part.extend_from_slice(&[operation | xact_info::HAS_INFO, record.info.rmgr, 0, 0]);
    if ending.origin != 0 {
        part.push(ORIGIN);
        part.extend_from_slice(&ending.origin.to_le_bytes());
    }
    let subtransactions = || ending.subtransactions().filter(|xid| slru.page_of(*xid) == number);
    let count = subtransactions().count() as u32;
    part.push(DATA_LONG);
    part.extend_from_slice(&(16 + 4 * count).to_le_bytes());
    part.extend_from_slice(&ending.time.to_le_bytes());
    part.extend_from_slice(&HAS_SUBXACTS.to_le_bytes());
    part.extend_from_slice(&count.to_le_bytes());
    for xid in subtransactions() {
        part.extend_from_slice(&xid.to_le_bytes());
    }
    Ok(Some(part))
}
