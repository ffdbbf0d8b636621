//! The next transaction id of a PGDATA that is made without the log.
//!
//! Page servers keep counters as of a little before X: a transaction id may be named by records that no shard gets
//! (`docs/design/2026-11-27-page-service.md`, "Values of a shard"). Were the next id one that a page names already, rows of
//! transactions that were committed would be in the future. Every id in use has its place in `pg_xact`, whose page is made
//! before: so the ids go on behind the last page that exists. At most 32,768 are never used.

use layers::{Key, Metadata, Slru};
use metadata::{Counters, CountersError};

/// The last full transaction id that has a place in `pg_xact`; 0 when there are no counters, which a plan refuses.
///
/// # Errors
/// The value of the counters is damaged.
pub(super) fn last_full_xid(metadata: &[(Key, Vec<u8>)]) -> Result<u64, CountersError> {
    let value_of = |key| metadata.binary_search_by_key(&key, |(key, _)| *key).ok().map(|at| &metadata[at].1);
    let Some(counters) = value_of(Key::metadata(Metadata::Checkpoint)) else { return Ok(0) };
    let next = Counters::from_bytes(counters)?.checkpoint.next_full_xid;
    let per_page = u64::from(metadata::Slru::TransactionStatus.entries_per_page());
    let pages_of_epoch = (1u64 << 32) / per_page;
    let has_page = |page: u64| value_of(Key::slru(Slru::TransactionStatus, (page % pages_of_epoch) as u32)).is_some();
    // That of the last id that is known to be in use; the next may not have one yet.
    let known = next.saturating_sub(1) / per_page;
    // Pages never reach half around the circle: this ends.
    let last = (known..known + pages_of_epoch).take_while(|page| *page == known || has_page(*page)).last();
    Ok((last.unwrap_or(known) + 1) * per_page - 1)
}

#[cfg(test)]
mod tests {
    use pgformat::{CheckPoint, ServerSettings, WalLevel};
    use pgtypes::{Lsn, PgTimeline};

    use super::*;

    const PER_PAGE: u64 = 32_768;

    fn metadata_at(next_full_xid: u64, pages: &[u32]) -> Vec<(Key, Vec<u8>)> {
        let checkpoint = CheckPoint {
            redo: Lsn(8),
            timeline: PgTimeline(1),
            previous_timeline: PgTimeline(1),
            full_page_writes: false,
            wal_level: WalLevel::Replica,
            next_full_xid,
            next_oid: 16_384,
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
            wal_log_hints: false,
            max_connections: 100,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
            track_commit_timestamp: false,
        };
        let counters = Counters { checkpoint, checkpoint_lsn: Lsn(8), settings };
        let mut values = vec![(Key::metadata(Metadata::Checkpoint), counters.to_bytes())];
        values.extend(pages.iter().map(|page| (Key::slru(Slru::TransactionStatus, *page), vec![0; 8192])));
        values.sort();
        values
    }

    #[test]
    fn ids_go_on_behind_the_last_page() {
        let epoch = 1u64 << 32;
        let last_page = (epoch / PER_PAGE - 1) as u32;
        for (next, pages, expected) in [
            (740, &[0][..], PER_PAGE - 1),
            // The page of later ones was made after the counters were put.
            (740, &[0, 1], 2 * PER_PAGE - 1),
            (PER_PAGE, &[0], PER_PAGE - 1),
            (PER_PAGE + 1, &[0, 1], 2 * PER_PAGE - 1),
            // Old pages, with a gap between: the circle is not full.
            (5 * PER_PAGE + 7, &[4, 5, 9], 6 * PER_PAGE - 1),
            // Into the next epoch.
            (epoch - 5, &[last_page - 1, last_page], epoch - 1),
            (epoch - 5, &[0, last_page], epoch + PER_PAGE - 1),
            (epoch + 5, &[0, last_page], epoch + PER_PAGE - 1),
        ] {
            assert_eq!(Ok(expected), last_full_xid(&metadata_at(next, pages)), "{next} {pages:?}");
        }
        assert_eq!(Ok(0), last_full_xid(&[]));
    }
}
