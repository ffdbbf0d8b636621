//! `pg_control`: what is written is read again, and damage is told apart.

use pgformat::{
    CONTROL_DATA_BYTES, CheckPoint, ControlError, ControlFile, DatabaseState, HistoryFile, ServerSettings, WalLevel,
};
use pgtypes::{Lsn, PgTimeline, SystemId};
use proptest::prelude::*;
use wal::crc32c;

fn checkpoint(words: [u32; 12], longs: [u64; 3], flag: bool, wal_level: WalLevel) -> CheckPoint {
    CheckPoint {
        redo: Lsn(longs[0]),
        timeline: PgTimeline(words[0]),
        previous_timeline: PgTimeline(words[1]),
        full_page_writes: flag,
        wal_level,
        next_full_xid: longs[1],
        next_oid: words[2],
        next_multi: words[3],
        next_multi_offset: words[4],
        oldest_xid: words[5],
        oldest_xid_database: words[6],
        oldest_multi: words[7],
        oldest_multi_database: words[8],
        time: longs[2] as i64,
        oldest_commit_ts_xid: words[9],
        newest_commit_ts_xid: words[10],
        oldest_active_xid: words[11],
    }
}

fn control(
    words: [u32; 13],
    longs: [u64; 7],
    flags: [bool; 4],
    state: DatabaseState,
    checkpoint: CheckPoint,
) -> ControlFile {
    ControlFile {
        system_id: SystemId(longs[0]),
        catalog_version: words[0],
        state,
        time: longs[1] as i64,
        checkpoint_lsn: Lsn(longs[2]),
        checkpoint,
        unlogged_lsn: Lsn(longs[3]),
        min_recovery_point: Lsn(longs[4]),
        min_recovery_timeline: PgTimeline(words[1]),
        backup_start: Lsn(longs[5]),
        backup_end: Lsn(longs[6]),
        backup_end_required: flags[0],
        settings: ServerSettings {
            wal_level: checkpoint.wal_level,
            wal_log_hints: flags[1],
            max_connections: words[2] as i32,
            max_worker_processes: words[3] as i32,
            max_wal_senders: words[4] as i32,
            max_prepared_transactions: words[5] as i32,
            max_locks_per_transaction: words[6] as i32,
            track_commit_timestamp: flags[2],
        },
        relation_segment_blocks: words[7],
        segment_bytes: 1 << (20 + words[8] % 11),
        name_bytes: words[9],
        index_columns_max: words[10],
        toast_chunk_bytes: words[11],
        large_object_chunk_bytes: words[12],
        float8_by_value: flags[3],
        data_checksum_version: words[0] % 2,
        mock_authentication_nonce: [longs[0] as u8; 32],
    }
}

fn any_control() -> impl Strategy<Value = ControlFile> {
    let state = prop::sample::select(vec![
        DatabaseState::StartingUp,
        DatabaseState::ShutDown,
        DatabaseState::ShutDownInRecovery,
        DatabaseState::ShuttingDown,
        DatabaseState::InCrashRecovery,
        DatabaseState::InArchiveRecovery,
        DatabaseState::InProduction,
    ]);
    let level = prop::sample::select(vec![WalLevel::Minimal, WalLevel::Replica, WalLevel::Logical]);
    (any::<([u32; 12], [u64; 3], bool)>(), level, any::<([u32; 13], [u64; 7], [bool; 4])>(), state).prop_map(
        |((words, longs, flag), level, (more_words, more_longs, flags), state)| {
            control(more_words, more_longs, flags, state, checkpoint(words, longs, flag, level))
        },
    )
}

fn some_control() -> ControlFile {
    let checkpoint = checkpoint([1; 12], [0x3_0000_0028; 3], true, WalLevel::Replica);
    control([1; 13], [7; 7], [false; 4], DatabaseState::ShutDown, checkpoint)
}

/// Each row: a field is overwritten, with a checksum that matches, and the error that must follow.
#[test]
fn values_that_cannot_be_are_refused() {
    for (at, value, error) in [
        (8, 1300, ControlError::Version(1300)),
        (8, 1700_u32.swap_bytes(), ControlError::Version(1700_u32.swap_bytes())),
        (16, 7, ControlError::State(7)),
        (60, 3, ControlError::WalLevel(3)),
        (172, u32::MAX, ControlError::WalLevel(-1)),
        (204, 4, ControlError::Build { what: "maximum alignment", found: 4, expected: 8 }),
        (212, 0, ControlError::FloatFormat),
        (216, 4096, ControlError::Build { what: "block size", found: 4096, expected: 8192 }),
        (224, 16384, ControlError::Build { what: "WAL page size", found: 16384, expected: 8192 }),
        (228, 3 << 20, ControlError::SegmentSize(3 << 20)),
        (228, 0, ControlError::SegmentSize(0)),
    ] {
        let mut file = some_control().to_bytes();
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let crc = crc32c(0, &file[..288]);
        file[288..292].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Err(error), ControlFile::parse(&file), "{at}");
    }
}

#[test]
fn damage_is_seen() {
    let file = some_control().to_bytes();
    for at in (0..292).filter(|at| !(8..12).contains(at)) {
        let mut file = file;
        file[at] ^= 0x10;
        assert!(matches!(ControlFile::parse(&file), Err(ControlError::Crc { .. })), "byte {at}");
    }
    for length in [0, 1, 11, CONTROL_DATA_BYTES - 1] {
        assert_eq!(Err(ControlError::TooShort(length)), ControlFile::parse(&file[..length]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read_again(control in any_control()) {
        prop_assert_eq!(Ok(control.clone()), ControlFile::parse(&control.to_bytes()));
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(ControlFile::parse(&bytes).is_err());
    }

    /// Whatever is read from a history file is written in a form that is read alike.
    #[test]
    fn history_survives_rewriting(text in "([0-9]{1,4}[\t ][0-9A-F]{1,9}/[0-9A-F]{1,9}([\t ][ -~]{0,20})?\n|#.*\n|\n){0,8}") {
        if let Ok(history) = HistoryFile::parse(PgTimeline(10_000), text.as_bytes()) {
            prop_assert_eq!(Ok(history.clone()), HistoryFile::parse(PgTimeline(10_000), &history.to_bytes()));
        }
    }

    #[test]
    fn random_history_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(history) = HistoryFile::parse(PgTimeline(u32::MAX), &bytes) {
            prop_assert!(history.entries.len() <= bytes.len());
        }
    }
}
