//! SLRUs: arrays in the circle of 32-bit ids, in pages of 8 KiB and files of 32 pages.
//!
//! Sources: `access/transam/clog.c`, `multixact.c`, `commit_ts.c`, `slru.c`.

use alloc::{format, string::String};

use wal::Record;

use crate::{
    MetadataError,
    multixact::{Multixact, Truncation, previous},
    precedes,
    reader::Reader,
    rmgr_id,
    transaction::{Ending, FIRST_NORMAL_XID},
};

/// Bytes of a page of an SLRU.
pub const SLRU_PAGE_BYTES: usize = 8192;
/// Pages of a file (`SLRU_PAGES_PER_SEGMENT`).
const SEGMENT_PAGES: u32 = 32;
/// Kinds of records of SLRUs with transaction ids.
const ZERO_PAGE: u8 = 0x00;
const TRUNCATE: u8 = 0x10;

/// Statuses in `pg_xact`, of two bits each.
const COMMITTED: u8 = 1;
const ABORTED: u8 = 2;
/// Members in a group: their flags, one byte each, are in front of their transaction ids.
const GROUP_MEMBERS: u32 = 4;
const GROUP_BYTES: usize = 20;
const GROUPS_PER_PAGE: u32 = (SLRU_PAGE_BYTES / GROUP_BYTES) as u32;
/// Time and number of the origin.
const COMMIT_TIMESTAMP_BYTES: usize = 10;

/// A page of an SLRU.
pub type SlruPage = [u8; SLRU_PAGE_BYTES];

/// The SLRUs that WAL describes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Slru {
    /// `pg_xact`.
    TransactionStatus,
    /// `pg_multixact/offsets`.
    MultixactOffsets,
    /// `pg_multixact/members`.
    MultixactMembers,
    /// `pg_commit_ts`.
    CommitTimestamps,
}

impl Slru {
    /// All of them.
    pub const ALL: [Slru; 4] =
        [Slru::TransactionStatus, Slru::MultixactOffsets, Slru::MultixactMembers, Slru::CommitTimestamps];

    /// Entries on a page.
    pub const fn entries_per_page(self) -> u32 {
        match self {
            Slru::TransactionStatus => 4 * SLRU_PAGE_BYTES as u32,
            Slru::MultixactOffsets => SLRU_PAGE_BYTES as u32 / 4,
            Slru::MultixactMembers => GROUPS_PER_PAGE * GROUP_MEMBERS,
            Slru::CommitTimestamps => (SLRU_PAGE_BYTES / COMMIT_TIMESTAMP_BYTES) as u32,
        }
    }

    /// The page that has the entry of a transaction, multixact or member.
    pub const fn page_of(self, id: u32) -> u32 {
        id / self.entries_per_page()
    }

    /// Directory of its files, in PGDATA.
    pub const fn directory(self) -> &'static str {
        match self {
            Slru::TransactionStatus => "pg_xact",
            Slru::MultixactOffsets => "pg_multixact/offsets",
            Slru::MultixactMembers => "pg_multixact/members",
            Slru::CommitTimestamps => "pg_commit_ts",
        }
    }

    /// Name of the file that has a page, and the page's number in it.
    pub fn file(self, page: u32) -> (String, u32) {
        (format!("{:04X}", page / SEGMENT_PAGES), page % SEGMENT_PAGES)
    }

    /// First page of a file, by its name.
    pub fn first_page(self, file: &str) -> Option<u32> {
        let is_name = (4..=6).contains(&file.len()) && file.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
        let segment = if is_name { u32::from_str_radix(file, 16).ok()? } else { return None };
        segment.checked_mul(SEGMENT_PAGES)
    }

    /// Whether all of a page is before all of another, in the circle of ids (`CLOGPagePrecedes` and its like).
    fn page_precedes(self, a: u32, b: u32) -> bool {
        let per_page = self.entries_per_page();
        // The permanent ids are at the start of a page; their place in the circle means nothing.
        let first = |page: u32| page.wrapping_mul(per_page).wrapping_add(FIRST_NORMAL_XID + 1);
        precedes(first(a), first(b)) && precedes(first(a), first(b).wrapping_add(per_page - 1))
    }
}

/// Pages of an SLRU that are gone, always whole files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlruCut {
    /// Of which one.
    pub slru: Slru,
    range: Range,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Range {
    /// Files that are before this page.
    Before(u32),
    /// Files from one number up to another, in a circle.
    Files(u32, u32),
    All,
}

impl SlruCut {
    /// Everything.
    pub(crate) fn all(slru: Slru) -> SlruCut {
        SlruCut { slru, range: Range::All }
    }

    /// What a record cuts off, if it does.
    pub(crate) fn of(record: &Record) -> Result<Option<SlruCut>, MetadataError> {
        let slru = match record.info.rmgr {
            rmgr_id::CLOG => Slru::TransactionStatus,
            rmgr_id::COMMIT_TIMESTAMP => Slru::CommitTimestamps,
            _ => return Ok(None),
        };
        if record.info.info & 0xF0 != TRUNCATE {
            return Ok(None);
        }
        Ok(Some(SlruCut { slru, range: Range::Before(Reader::new(record.main_data()).page()?) }))
    }

    /// Of a truncation of multixacts (`PerformMembersTruncation`, `PerformOffsetsTruncation`).
    pub(crate) fn of_multixacts(truncation: &Truncation) -> [SlruCut; 2] {
        let file = |member| Slru::MultixactMembers.page_of(member) / SEGMENT_PAGES;
        let files = Range::Files(file(truncation.first_member), file(truncation.end_member));
        // The one before the oldest is kept: where its members end is written at the oldest.
        let page = Slru::MultixactOffsets.page_of(previous(truncation.oldest));
        [
            SlruCut { slru: Slru::MultixactMembers, range: files },
            SlruCut { slru: Slru::MultixactOffsets, range: Range::Before(page) },
        ]
    }

    /// Whether a page is gone (`SlruMayDeleteSegment`).
    pub fn removes(&self, page: u32) -> bool {
        let file = page / SEGMENT_PAGES;
        match self.range {
            Range::All => true,
            Range::Before(cutoff) => {
                let first = file * SEGMENT_PAGES;
                self.slru.page_precedes(first, cutoff) && self.slru.page_precedes(first + (SEGMENT_PAGES - 1), cutoff)
            }
            Range::Files(first, end) if first <= end => (first..end).contains(&file),
            Range::Files(first, end) => file >= first || file < end,
        }
    }
}

/// The page that a record makes anew: an array grows.
pub(crate) fn zeroed_page(record: &Record) -> Result<Option<(Slru, u32)>, MetadataError> {
    let slru = match record.info.rmgr {
        rmgr_id::CLOG => Slru::TransactionStatus,
        rmgr_id::COMMIT_TIMESTAMP => Slru::CommitTimestamps,
        _ => {
            return Ok(match Multixact::of(record)? {
                Some(Multixact::ZeroOffsets(page)) => Some((Slru::MultixactOffsets, page)),
                Some(Multixact::ZeroMembers(page)) => Some((Slru::MultixactMembers, page)),
                _ => None,
            });
        }
    };
    match record.info.info & 0xF0 {
        ZERO_PAGE => Ok(Some((slru, Reader::new(record.main_data()).page()?))),
        TRUNCATE => Ok(None),
        _ => Err(MetadataError::Record("there is no such record of an SLRU")),
    }
}

/// Replays on page `number` of `slru` what `record` does to it.
///
/// `page` is as the records before left it; all zeros where there was none. The page is one that [`crate::changes_of`]
/// names; another one stays as it is.
///
/// # Errors
/// The record is not laid out like its kind, or has nothing to say about this SLRU. `page` is as it was.
pub fn apply_slru(record: &Record, slru: Slru, number: u32, page: &mut SlruPage) -> Result<(), MetadataError> {
    if zeroed_page(record)? == Some((slru, number)) {
        // WAL of earlier minor releases makes a page of offsets only after the multixact before it has said there where its
        // members end: the first entry stays. In other WAL it is zero.
        let kept = if slru == Slru::MultixactOffsets { 4 } else { 0 };
        page[kept..].fill(0);
        return Ok(());
    }
    if let Some(ending) = Ending::of(record)? {
        return match slru {
            Slru::TransactionStatus => {
                let status = if ending.committed { COMMITTED } else { ABORTED };
                entries(slru, number, ending.xids()).for_each(|entry| set_status(page, entry, status));
                Ok(())
            }
            Slru::CommitTimestamps if ending.committed => {
                let (time, origin) = (ending.time.to_le_bytes(), ending.origin.to_le_bytes());
                for entry in entries(slru, number, ending.xids()) {
                    let at = entry * COMMIT_TIMESTAMP_BYTES;
                    page[at..at + 8].copy_from_slice(&time);
                    page[at + 8..at + COMMIT_TIMESTAMP_BYTES].copy_from_slice(&origin);
                }
                Ok(())
            }
            _ => Err(MetadataError::NotTouched),
        };
    }
    let Some(Multixact::Create(creation)) = Multixact::of(record)? else { return Ok(()) };
    match slru {
        Slru::MultixactOffsets => {
            for (id, offset) in [(creation.id, creation.offset), (creation.next_id(), creation.next_offset())] {
                for entry in entries(slru, number, [id]) {
                    page[4 * entry..4 * entry + 4].copy_from_slice(&offset.to_le_bytes());
                }
            }
        }
        Slru::MultixactMembers => {
            for (offset, xid, status) in creation.members() {
                for entry in entries(slru, number, [offset]) {
                    let (group, in_group) = (entry / GROUP_MEMBERS as usize, entry % GROUP_MEMBERS as usize);
                    let flags = group * GROUP_BYTES;
                    let at = flags + GROUP_MEMBERS as usize + 4 * in_group;
                    page[flags + in_group] = status;
                    page[at..at + 4].copy_from_slice(&xid.to_le_bytes());
                }
            }
        }
        _ => return Err(MetadataError::NotTouched),
    }
    Ok(())
}

/// Places on a page of those ids that it has.
fn entries(slru: Slru, page: u32, ids: impl IntoIterator<Item = u32>) -> impl Iterator<Item = usize> {
    let on_page = move |id: &u32| slru.page_of(*id) == page;
    ids.into_iter().filter(on_page).map(move |id| (id % slru.entries_per_page()) as usize)
}

fn set_status(page: &mut SlruPage, entry: usize, status: u8) {
    let shift = 2 * (entry % 4);
    let byte = &mut page[entry / 4];
    *byte = *byte & !(3 << shift) | status << shift;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cut keeps the file that the cutoff page is in, and what is ahead in the circle.
    #[test]
    fn cuts_remove_whole_files_behind() {
        let before = |cutoff| SlruCut { slru: Slru::TransactionStatus, range: Range::Before(cutoff) };
        let files = |first, end| SlruCut { slru: Slru::MultixactMembers, range: Range::Files(first, end) };
        for (cut, page, expected) in [
            (before(31), 0, false),
            (before(32), 0, true),
            (before(32), 31, true),
            (before(40), 32, false),
            (before(32), 100_000, true),
            (before(100_000), 0, false),
            (before(0), 131_071, true),
            (files(1, 3), 31, false),
            (files(1, 3), 32, true),
            (files(1, 3), 95, true),
            (files(1, 3), 96, false),
            (files(3, 3), 96, false),
            (files(82_040, 1), 0, true),
            (files(82_040, 1), 32, false),
        ] {
            assert_eq!(expected, cut.removes(page), "{cut:?} {page}");
        }
    }
}
