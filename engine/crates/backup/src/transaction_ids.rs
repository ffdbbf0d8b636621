//! The next transaction id, and the SLRU pages that PostgreSQL reads when it starts.

use alloc::{collections::BTreeMap, vec, vec::Vec};

use layers::Slru;
use metadata::{Counters, SLRU_PAGE_BYTES};

use crate::{plan::PlanError, slru_files::metadata_slru};

/// The first ids of each epoch have fixed meanings (`FirstNormalTransactionId`).
const FIRST_NORMAL_XID: u64 = 3;

/// Lets the counters go on behind `max_full_xid`, but not beyond the pages of `pg_xact`: counters that a page server rounded
/// up may, and PostgreSQL reads the page of the next id when it starts (`TrimCLOG`).
///
/// # Errors
/// The log uses ids that have no page: a value was lost.
pub(crate) fn settle_next_xid(
    counters: &mut Counters,
    max_full_xid: u64,
    pages: &mut BTreeMap<(Slru, u32), Vec<u8>>,
) -> Result<(), PlanError> {
    counters.observe(max_full_xid);
    let next = &mut counters.checkpoint.next_full_xid;
    let per_page = u64::from(metadata::Slru::TransactionStatus.entries_per_page());
    let epoch_pages = (1u64 << 32) / per_page;
    let in_epoch = |full_page: u64| (full_page % epoch_pages) as u32;
    let has_page = |full_page: u64| pages.contains_key(&(Slru::TransactionStatus, in_epoch(full_page)));
    // Ids with fixed meanings need no page.
    let end = if *next & 0xFFFF_FFFF <= FIRST_NORMAL_XID { *next & !0xFFFF_FFFF } else { *next };
    let last_page = end.saturating_sub(1) / per_page;
    if !has_page(last_page) {
        let page_start = last_page * per_page;
        if max_full_xid >= page_start || !has_page(last_page.saturating_sub(1)) {
            return Err(PlanError::MissingPage { slru: Slru::TransactionStatus, page: in_epoch(last_page) });
        }
        *next = page_start;
    }
    // An epoch begins with id 3, in the middle of a page that its first transaction makes: PostgreSQL reads it before.
    if *next & 0xFFFF_FFFF <= FIRST_NORMAL_XID {
        *next = *next & !0xFFFF_FFFF | FIRST_NORMAL_XID;
        pages.entry((Slru::TransactionStatus, 0)).or_insert_with(|| vec![0; SLRU_PAGE_BYTES]);
    }
    check_multixacts(counters, pages)
}

/// What `TrimMultiXact` reads when PostgreSQL starts.
fn check_multixacts(counters: &Counters, pages: &BTreeMap<(Slru, u32), Vec<u8>>) -> Result<(), PlanError> {
    let checkpoint = &counters.checkpoint;
    for (slru, id) in
        [(Slru::MultixactOffsets, checkpoint.next_multi), (Slru::MultixactMembers, checkpoint.next_multi_offset)]
    {
        let page = metadata_slru(slru).page_of(id);
        if id % metadata_slru(slru).entries_per_page() != 0 && !pages.contains_key(&(slru, page)) {
            return Err(PlanError::MissingPage { slru, page });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pgformat::{CheckPoint, ServerSettings, WalLevel};
    use pgtypes::{Lsn, PgTimeline};

    use super::*;

    const EPOCH: u64 = 1 << 32;
    const LAST_PAGE: u32 = 131_071;

    fn counters(next_full_xid: u64) -> Counters {
        let checkpoint = CheckPoint {
            redo: Lsn(0),
            timeline: PgTimeline(1),
            previous_timeline: PgTimeline(1),
            full_page_writes: false,
            wal_level: WalLevel::Replica,
            next_full_xid,
            next_oid: 10_000,
            next_multi: 1,
            next_multi_offset: 0,
            oldest_xid: 3,
            oldest_xid_database: 1,
            oldest_multi: 1,
            oldest_multi_database: 1,
            time: 0,
            oldest_commit_ts_xid: 0,
            newest_commit_ts_xid: 0,
            oldest_active_xid: 0,
        };
        let settings = ServerSettings {
            wal_level: WalLevel::Replica,
            wal_log_hints: true,
            max_connections: 100,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
            track_commit_timestamp: false,
        };
        Counters { checkpoint, checkpoint_lsn: Lsn(0), settings }
    }

    fn pages(numbers: &[u32]) -> BTreeMap<(Slru, u32), Vec<u8>> {
        let page = |number: &u32| ((Slru::TransactionStatus, *number), vec![0; SLRU_PAGE_BYTES]);
        numbers.iter().map(page).chain([((Slru::MultixactOffsets, 0), vec![0; SLRU_PAGE_BYTES])]).collect()
    }

    /// A2, and ids that were rounded up beyond what `pg_xact` has.
    #[test]
    fn the_next_id_is_behind_every_id_of_the_log_and_within_pg_xact() {
        for (in_counters, max, existing, expected) in [
            (700, 720, &[0][..], Some(721)),
            (750, 720, &[0], Some(750)),
            (32_768, 720, &[0], Some(32_768)),
            (32_769, 720, &[0], Some(32_768)),
            (40_000, 32_767, &[0], Some(32_768)),
            (40_000, 32_768, &[0], None),
            (700, 32_768, &[0], None),
            (700, 32_768, &[0, 1], Some(32_769)),
            (700, 720, &[], None),
            (EPOCH - 10, EPOCH - 1, &[LAST_PAGE], Some(EPOCH + 3)),
            (EPOCH + 3, EPOCH - 1, &[LAST_PAGE], Some(EPOCH + 3)),
            (EPOCH + 50, EPOCH - 1, &[LAST_PAGE], Some(EPOCH + 3)),
            (EPOCH + 50, EPOCH + 7, &[LAST_PAGE, 0], Some(EPOCH + 50)),
            (EPOCH + 50, EPOCH + 7, &[LAST_PAGE], None),
        ] {
            let mut counters = counters(in_counters);
            let mut pages = pages(existing);
            let result = settle_next_xid(&mut counters, max, &mut pages);
            let found = result.is_ok().then_some(counters.checkpoint.next_full_xid);
            assert_eq!(expected, found, "counters {in_counters}, log {max}, pages {existing:?}");
            if let Some(next) = found.filter(|next| next % 32_768 != 0) {
                let page = (next % EPOCH / 32_768) as u32;
                assert!(pages.contains_key(&(Slru::TransactionStatus, page)), "PostgreSQL reads page {page}");
            }
        }
    }

    #[test]
    fn a_lost_page_of_multixacts_is_named() {
        let mut counters = counters(700);
        counters.checkpoint.next_multi_offset = 1637;
        let missing = PlanError::MissingPage { slru: Slru::MultixactMembers, page: 1 };
        assert_eq!(Err(missing), settle_next_xid(&mut counters, 0, &mut pages(&[0])));
    }
}
