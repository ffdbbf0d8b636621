//! `pg_control` and history files of real clusters, against what PostgreSQL's own programs say.

#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;

use std::fs;

use pgformat::{
    CONTROL_DATA_BYTES, CONTROL_FILE_BYTES, ControlFile, DatabaseState, HistoryFile, WalLevel, child_history_file,
    history_file_name, parse_segment_file_name, segment_file_name,
};
use pgtypes::{Lsn, PgTimeline};
use postgres::{ControlData, Postgres, Server};

fn read(server: &Server<'_>) -> (Vec<u8>, ControlFile) {
    let file = fs::read(server.data.join("global/pg_control")).expect("pg_control");
    let control = ControlFile::parse(&file).unwrap_or_else(|error| panic!("{error}"));
    (file, control)
}

fn on_off(value: bool) -> &'static str {
    if value { "on" } else { "off" }
}

fn state_text(state: DatabaseState) -> &'static str {
    match state {
        DatabaseState::StartingUp => "starting up",
        DatabaseState::ShutDown => "shut down",
        DatabaseState::ShutDownInRecovery => "shut down in recovery",
        DatabaseState::ShuttingDown => "shutting down",
        DatabaseState::InCrashRecovery => "in crash recovery",
        DatabaseState::InArchiveRecovery => "in archive recovery",
        DatabaseState::InProduction => "in production",
    }
}

fn wal_level_text(level: WalLevel) -> &'static str {
    match level {
        WalLevel::Minimal => "minimal",
        WalLevel::Replica => "replica",
        WalLevel::Logical => "logical",
    }
}

/// Every field that `pg_controldata` prints has the value that it prints.
fn assert_agrees(control: &ControlFile, data: &ControlData) {
    let checkpoint = &control.checkpoint;
    let settings = &control.settings;
    let xid = |full: u64| format!("{}:{}", full >> 32, full as u32);
    let nonce: String = control.mock_authentication_nonce.iter().map(|byte| format!("{byte:02x}")).collect();
    let segment = checkpoint.redo.0 / u64::from(control.segment_bytes);
    for (label, ours) in [
        ("Catalog version number", control.catalog_version.to_string()),
        ("Database system identifier", control.system_id.0.to_string()),
        ("Database cluster state", state_text(control.state).to_owned()),
        ("Latest checkpoint location", control.checkpoint_lsn.to_string()),
        ("Latest checkpoint's REDO location", checkpoint.redo.to_string()),
        (
            "Latest checkpoint's REDO WAL file",
            segment_file_name(checkpoint.timeline, segment, u64::from(control.segment_bytes)),
        ),
        ("Latest checkpoint's TimeLineID", checkpoint.timeline.0.to_string()),
        ("Latest checkpoint's PrevTimeLineID", checkpoint.previous_timeline.0.to_string()),
        ("Latest checkpoint's full_page_writes", on_off(checkpoint.full_page_writes).to_owned()),
        ("Latest checkpoint's NextXID", xid(checkpoint.next_full_xid)),
        ("Latest checkpoint's NextOID", checkpoint.next_oid.to_string()),
        ("Latest checkpoint's NextMultiXactId", checkpoint.next_multi.to_string()),
        ("Latest checkpoint's NextMultiOffset", checkpoint.next_multi_offset.to_string()),
        ("Latest checkpoint's oldestXID", checkpoint.oldest_xid.to_string()),
        ("Latest checkpoint's oldestXID's DB", checkpoint.oldest_xid_database.to_string()),
        ("Latest checkpoint's oldestActiveXID", checkpoint.oldest_active_xid.to_string()),
        ("Latest checkpoint's oldestMultiXid", checkpoint.oldest_multi.to_string()),
        ("Latest checkpoint's oldestMulti's DB", checkpoint.oldest_multi_database.to_string()),
        ("Latest checkpoint's oldestCommitTsXid", checkpoint.oldest_commit_ts_xid.to_string()),
        ("Latest checkpoint's newestCommitTsXid", checkpoint.newest_commit_ts_xid.to_string()),
        ("Fake LSN counter for unlogged rels", control.unlogged_lsn.to_string()),
        ("Minimum recovery ending location", control.min_recovery_point.to_string()),
        ("Min recovery ending loc's timeline", control.min_recovery_timeline.0.to_string()),
        ("Backup start location", control.backup_start.to_string()),
        ("Backup end location", control.backup_end.to_string()),
        ("End-of-backup record required", if control.backup_end_required { "yes" } else { "no" }.to_owned()),
        ("wal_level setting", wal_level_text(settings.wal_level).to_owned()),
        ("wal_log_hints setting", on_off(settings.wal_log_hints).to_owned()),
        ("max_connections setting", settings.max_connections.to_string()),
        ("max_worker_processes setting", settings.max_worker_processes.to_string()),
        ("max_wal_senders setting", settings.max_wal_senders.to_string()),
        ("max_prepared_xacts setting", settings.max_prepared_transactions.to_string()),
        ("max_locks_per_xact setting", settings.max_locks_per_transaction.to_string()),
        ("track_commit_timestamp setting", on_off(settings.track_commit_timestamp).to_owned()),
        ("Blocks per segment of large relation", control.relation_segment_blocks.to_string()),
        ("Bytes per WAL segment", control.segment_bytes.to_string()),
        ("Maximum length of identifiers", control.name_bytes.to_string()),
        ("Maximum columns in an index", control.index_columns_max.to_string()),
        ("Maximum size of a TOAST chunk", control.toast_chunk_bytes.to_string()),
        ("Size of a large-object chunk", control.large_object_chunk_bytes.to_string()),
        ("Float8 argument passing", if control.float8_by_value { "by value" } else { "by reference" }.to_owned()),
        ("Data page checksum version", control.data_checksum_version.to_string()),
        ("Mock authentication nonce", nonce),
    ] {
        assert_eq!(data.get(label), ours, "{label}");
    }
}

#[test]
fn every_field_agrees_with_pg_controldata() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &["--data-checksums", "--wal-segsize=64"]);
    server.append_configuration(
        "wal_level = logical\nwal_log_hints = on\nmax_connections = 33\nmax_worker_processes = 5\n\
         max_wal_senders = 7\nmax_prepared_transactions = 4\nmax_locks_per_transaction = 65\n\
         track_commit_timestamp = on\nfsync = off\n",
    );

    let (file, control) = read(&server);
    assert_agrees(&control, &server.control_data());
    assert_eq!(file, control.to_bytes(), "initdb's file is written alike");

    server.start();
    server.psql("create table t (i int)");
    server.psql("begin; insert into t values (1); select pg_current_xact_id(); commit; checkpoint");
    let (file, control) = read(&server);
    assert_eq!(DatabaseState::InProduction, control.state);
    assert_eq!((64 << 20, 1), (control.segment_bytes, control.data_checksum_version));
    assert_agrees(&control, &server.control_data());
    assert_eq!(file, control.to_bytes());

    server.stop("immediate");
    assert_agrees(&read(&server).1, &server.control_data());
    server.start();
    server.stop("fast");
    let (file, control) = read(&server);
    assert_eq!(DatabaseState::ShutDown, control.state);
    assert_agrees(&control, &server.control_data());
    assert_eq!(file, control.to_bytes());
}

/// A server starts from a file that we wrote, with the counters that we put into it.
#[test]
fn server_accepts_a_file_that_we_wrote() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &[]);
    let (_, mut control) = read(&server);
    control.settings.max_connections = 77;
    control.time += 12_345;
    control.unlogged_lsn = Lsn(0x1234_5678);
    fs::write(server.data.join("global/pg_control"), control.to_bytes()).expect("writable");

    assert_agrees(&control, &server.control_data());
    server.start();
    server.stop("fast");
    assert!(read(&server).1.unlogged_lsn >= Lsn(0x1234_5678));
}

/// After a promotion PostgreSQL's history file and segment names are what we read and write.
#[test]
fn history_of_promotions_agrees() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &[]);
    server.append_configuration("fsync = off\nrestore_command = 'false'\nrecovery_target_timeline = 'current'\n");
    let mut parent_file: Option<Vec<u8>> = None;
    for timeline in 2..=3 {
        fs::write(server.data.join("recovery.signal"), "").expect("writable");
        server.start();
        // The server accepts connections before it has left recovery.
        while server.psql("select pg_is_in_recovery()").trim() != "f" {
            std::thread::yield_now();
        }
        server.psql("checkpoint");
        let name = history_file_name(PgTimeline(timeline));
        let file = fs::read(server.data.join("pg_wal").join(&name)).expect("a history file");
        let history = HistoryFile::parse(PgTimeline(timeline), &file).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(timeline as usize - 1, history.entries.len());
        let last = history.entries.last().expect("an entry");
        assert_eq!(PgTimeline(timeline - 1), last.timeline);
        assert_eq!(file, child_history_file(parent_file.as_deref(), last));
        assert_eq!(file, history.to_bytes());
        assert_eq!(Some(PgTimeline(timeline - 1)), history.ancestor_at(Lsn(last.end_lsn.0 - 1)));
        assert_eq!(None, history.ancestor_at(last.end_lsn));

        let (_, control) = read(&server);
        assert_eq!(PgTimeline(timeline), control.checkpoint.timeline);
        let current = server.psql("select pg_walfile_name(pg_current_wal_lsn())");
        let lsn: Lsn = server.psql("select pg_current_wal_lsn()").trim().parse().expect("a position");
        let number = (lsn.0 - 1) / u64::from(control.segment_bytes);
        let expected = segment_file_name(PgTimeline(timeline), number, u64::from(control.segment_bytes));
        assert_eq!(expected, current.trim());
        let parsed = parse_segment_file_name(current.trim(), u64::from(control.segment_bytes));
        assert_eq!(Some((PgTimeline(timeline), number)), parsed);
        server.stop("fast");
        parent_file = Some(file);
    }
}

#[test]
fn size_of_the_file_is_fixed() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let server = postgres.initdb(&directory, "data", &[]);
    let (file, control) = read(&server);
    assert_eq!(CONTROL_FILE_BYTES, file.len());
    assert_eq!(Ok(control), ControlFile::parse(&file[..CONTROL_DATA_BYTES]));
}
