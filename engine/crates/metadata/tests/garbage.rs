//! Broken records make errors: they never panic, whatever is in them.

use metadata::{Change, Context, Origins, SLRU_PAGE_BYTES, Slru, apply_slru, changes_of, slru_part};
use pgtypes::{Lsn, PgTimeline, SystemId};
use proptest::{collection::vec, prelude::*};
use wal::{Decoder, RECORD_BYTES_MAX, Record, RecordSpec, Scanner, WalWriter, main_data};

const SEGMENT_BYTES: u64 = 1 << 20;

/// A record as PostgreSQL lays it out; none when the decoder refuses it already.
fn record(rmgr: u8, info: u8, main: &[u8]) -> Option<(Record, u64)> {
    let mut writer = WalWriter::new(Lsn(SEGMENT_BYTES), Lsn(0), SEGMENT_BYTES, SystemId(1), PgTimeline(1));
    let payload = main_data(main);
    writer.append(RecordSpec { rmgr, info, xid: 700, payload: &payload });
    let scanner = Scanner::at_segment_start(Lsn(SEGMENT_BYTES), SEGMENT_BYTES, 3, PgTimeline(1));
    let mut decoder = Decoder::new(scanner, RECORD_BYTES_MAX);
    decoder.feed(writer.bytes()).ok()?;
    let max_full_xid = decoder.summary().max_full_xid;
    decoder.poll_record().map(|record| (record, max_full_xid))
}

fn counters() -> metadata::Counters {
    let checkpoint = pgformat::CheckPoint::parse(&[0; 88]).expect("wal_level minimal");
    let settings = pgformat::ServerSettings {
        wal_level: pgformat::WalLevel::Replica,
        wal_log_hints: false,
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 0,
        max_locks_per_transaction: 64,
        track_commit_timestamp: true,
    };
    metadata::Counters { checkpoint, checkpoint_lsn: Lsn(0), settings }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// A change of a page is one that `apply_slru` can make: nothing is refused half-way.
    #[test]
    fn nothing_panics(
        rmgr in prop_oneof![4 => 0u8..9, 2 => 18u8..20, 1 => 0u8..22],
        info in (0u8..16).prop_map(|info| info << 4),
        main in vec(prop_oneof![3 => 0u8..4, 2 => 0u8..64, 1 => any::<u8>()], 0..600),
        track_commit_timestamp: bool,
        next_full_xid: u64,
    ) {
        let Some((record, max_full_xid)) = record(rmgr, info, &main) else { return Ok(()) };
        let _ = counters().replay(&record, max_full_xid);
        let mut page = [0xFF; SLRU_PAGE_BYTES];
        for slru in Slru::ALL {
            let _ = apply_slru(&record, slru, 0, &mut page);
        }
        if let Ok(changes) = changes_of(&record, &Context { track_commit_timestamp, next_full_xid }) {
            for change in changes {
                match change {
                    Change::SlruPage(slru, number) => {
                        let mut of_part = page;
                        prop_assert_eq!(Ok(()), apply_slru(&record, slru, number, &mut page));
                        if let Some(part) = slru_part(&record, slru, number).expect("a record that was read") {
                            let part = Record::from_stored(record.info.start, record.info.end, &part);
                            let part = part.expect("a stored record");
                            prop_assert_eq!(Ok(()), apply_slru(&part, slru, number, &mut of_part));
                            prop_assert!(of_part == page, "the part of a page does less");
                        }
                    }
                    Change::CutSlru(cut) => {
                        let _ = (cut.removes(0), cut.removes(u32::MAX));
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn origins_survive_their_file(origins in proptest::collection::btree_map(any::<u16>(), any::<u64>(), 0..20)) {
        let origins = Origins(origins.into_iter().map(|(id, lsn)| (id, Lsn(lsn))).collect());
        let mut file = origins.to_bytes();
        prop_assert_eq!(Ok(origins), Origins::parse(&file));
        let last = file.len() - 5;
        file[last] ^= 1;
        prop_assert!(Origins::parse(&file).is_err());
    }
}
