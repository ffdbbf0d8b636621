//! Oracle: state that is replayed from WAL, against the files of the PostgreSQL that wrote it, and against the counters
//! that its recovery comes to after a crash.
//!
//! Not compared, because WAL does not define it: the next oid at a clean shutdown (WAL names the end of a batch of 8,192),
//! the order of replication origins in their file, and origins that were set up but never replayed anything. The oldest
//! transaction and multixact move between checkpoints without a record when no file of an SLRU becomes free: they are
//! those of a recovery. PostgreSQL is found as `../wal/tests/postgres/mod.rs` says.

#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
mod state;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use pgformat::ControlFile;
use pgtypes::Lsn;
use postgres::{Directory, Postgres, Server, output};
use state::{State, decode};
use wal::RecordInfo;

const SETTINGS: &str = "fsync = off\nfull_page_writes = off\nwal_keep_size = 10GB\nmax_prepared_transactions = 20\n\
    autovacuum = off\ncheckpoint_timeout = 1h\nwal_level = logical\n";

/// A recovery takes less than a second; the machine may be busy.
const RECOVERY_MAX: Duration = Duration::from_secs(60);

/// More than a page of `pg_xact`, a file of `pg_commit_ts`, in one commit.
const MANY_SUBTRANSACTIONS: &str = "
    create table t (i int primary key, k int);
    create procedure many(count int) language plpgsql as $$ begin
        for n in 1..count loop
            begin insert into t values (n, 0); exception when others then raise; end;
        end loop;
    end $$;
    call many(40000);
    update pg_database set datallowconn = true where datname = 'template0';
";

/// Everything else; prepared transactions hold the locks that make multixacts.
const WORKLOAD: &str = "
    begin; insert into t values (-1, 0); savepoint a; insert into t values (-2, 0); rollback to a;
        savepoint b; insert into t values (-3, 0); release b; commit;
    begin; insert into t values (-4, 0); savepoint a; insert into t values (-5, 0); rollback;
    begin; select count(*) from (select i from t where i < 3000 for key share) s; prepare transaction 'locks';
    create procedure lock_each(count int) language plpgsql as $$ begin
        for n in 1..count loop
            begin perform 1 from t where i = n for key share; exception when others then raise; end;
        end loop;
    end $$;
    call lock_each(2500);
    update t set k = 1 where i between 2501 and 2600;
    begin; select i from t where i = 5000 for share; prepare transaction 'share';
    begin; select i from t where i between 4990 and 5010 for share; savepoint a;
        select i from t where i = 5000 for key share; rollback to a; commit;
    begin; insert into t values (-6, 0); savepoint a; insert into t values (-7, 0); prepare transaction 'left open';
    begin; create table dropped_by_abort (i int); insert into t values (-8, 0); prepare transaction 'aborted';
    begin; savepoint a; insert into t values (-9, 0); release a; create table u (i int); prepare transaction 'committed';
    rollback prepared 'aborted';
    commit prepared 'committed';
    drop table u;
    select pg_replication_origin_create(name) from unnest(array['a', 'b', 'c']) name;
    select pg_replication_origin_advance('a', '0/5000');
    select pg_replication_origin_advance('b', '0/900');
    select pg_replication_origin_advance('b', '0/800');
    select pg_replication_origin_advance('c', '0/900');
    select pg_replication_origin_drop('c');
    select pg_replication_origin_session_setup('a');
    begin; select pg_replication_origin_xact_setup('0/6000', '2020-02-02 10:00:00'); insert into t values (-10, 0); commit;
    begin; select pg_replication_origin_xact_setup('0/7000', '2020-02-03 10:00:00'); savepoint a;
        insert into t values (-11, 0); release a; prepare transaction 'from a';
    begin; select pg_replication_origin_xact_setup('0/8000', '2020-02-04 10:00:00');
        insert into t values (-12, 0); prepare transaction 'of a, left open';
    select pg_replication_origin_xact_setup('0/9000', '2020-02-05 10:00:00');
    commit prepared 'from a';
    select pg_replication_origin_session_reset();
    create database logged strategy wal_log;
    create database copied strategy file_copy;
    create database dropped;
    drop database dropped;
    vacuum full pg_class;
    vacuum full pg_authid;
    create database copied_later strategy file_copy;
    select pg_logical_emit_message(true, 'nothing', 'said');
    select lo_create(0) from generate_series(1, 9000) g;
    truncate u2 cascade;
";

/// What all records that start before `end` make of a base backup, and the records.
fn replay(base: &Path, wal: &Path, end: Lsn) -> (State, Vec<RecordInfo>) {
    let (mut state, mut records) = (State::load(base), Vec::new());
    decode(wal, &control(base), |record, max_full_xid| {
        if record.info.start < end {
            state.replay(record, max_full_xid);
            records.push(record.info);
        }
    });
    (state, records)
}

/// The server is down.
fn judge(state: &mut State, data: &Path) {
    let files = State::load(data);
    let report = state.compare(&files);
    println!("{report}");
    assert!(state.faults.is_empty(), "{data:?}: {}", state.faults.join("\n"));
}

/// Compares with a recovery of the base backup that stops before the record at `end` and becomes a server.
fn judge_recovery(postgres: &Postgres, directory: &Directory, base: &Path, wal: &Path, end: Lsn) {
    let data = directory.0.join("recovered");
    output(Command::new("cp").arg("-a").arg(base).arg(&data));
    fs::write(data.join("recovery.signal"), "").expect("a written file");
    postgres.own(&data.join("recovery.signal"));
    let mut server = postgres.server(directory, &data);
    server.append_configuration(&format!(
        "hot_standby = off\nrestore_command = 'cp {}/%f %p'\nrecovery_target_lsn = '{end}'\n\
         recovery_target_inclusive = off\nrecovery_target_action = promote\n",
        wal.display()
    ));
    server.start();
    // `pg_ctl` is content with a standby.
    let is_ready = || server.client("pg_isready").arg("--quiet").status().expect("pg_isready runs").success();
    let deadline = Instant::now() + RECOVERY_MAX;
    while !is_ready() {
        assert!(Instant::now() < deadline, "waited {RECOVERY_MAX:?} for the end of a recovery to {end}");
        sleep(Duration::from_millis(20));
    }
    server.stop("fast");

    let (mut state, records) = replay(base, wal, end);
    judge(&mut state, &data);
    // What the new timeline's checkpoint says of itself, and settings that are those of the start.
    let theirs = control(&data).checkpoint;
    let ours = pgformat::CheckPoint {
        redo: theirs.redo,
        timeline: theirs.timeline,
        previous_timeline: theirs.previous_timeline,
        full_page_writes: theirs.full_page_writes,
        wal_level: theirs.wal_level,
        time: theirs.time,
        oldest_active_xid: theirs.oldest_active_xid,
        ..state.counters.checkpoint
    };
    assert_eq!(theirs, ours, "recovered to {end}, {} records", records.len());
    fs::remove_dir_all(&data).expect("a directory that was ours");
}

fn control(data: &Path) -> ControlFile {
    ControlFile::parse(&fs::read(data.join("global/pg_control")).expect("a control file")).expect("PostgreSQL 17")
}

/// Moves the counters on, as if 2,000,000 transactions and 69,999 multixacts of two members had been: there are files to be
/// cut off.
fn move_on(postgres: &Postgres, server: &Server<'_>) {
    const FILE_BYTES: u64 = 32 * 8192;
    for (directory, files) in [("pg_xact", 2), ("pg_multixact/offsets", 2), ("pg_multixact/members", 3)] {
        for number in 0..files {
            let path = server.data.join(directory).join(format!("{number:04X}"));
            let file = fs::OpenOptions::new().create(true).append(true).open(&path).expect("a file of an SLRU");
            file.set_len(FILE_BYTES).expect("a longer file");
            postgres.own(&path);
        }
    }
    // Where the members of the oldest multixact are.
    let offsets = fs::OpenOptions::new().write(true).open(server.data.join("pg_multixact/offsets/0000"));
    offsets.expect("a file").write_all_at(&1u32.to_le_bytes(), 4).expect("a written entry");
    let oldest = control(&server.data).checkpoint.oldest_xid.to_string();
    let mut resetwal = postgres.command("pg_resetwal");
    resetwal.args(["-x", "2000000", "-u", &oldest, "-m", "70000,1", "-O", "140000", "-D"]).arg(&server.data);
    output(&mut resetwal);
}

/// At a clean shutdown all files are the same; a recovery after a crash in between, and recoveries that stop at other
/// positions, come to the same files and counters.
#[test]
fn state_is_that_of_the_servers_files() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &[]);
    server.append_configuration(SETTINGS);
    move_on(&postgres, &server);
    // `pg_resetwal` says that WAL was minimal: no recovery begins there.
    server.start();
    server.stop("fast");
    server.append_configuration("track_commit_timestamp = on");
    let base = directory.0.join("base");
    output(Command::new("cp").arg("-a").arg(&server.data).arg(&base));

    server.start();
    server.script(MANY_SUBTRANSACTIONS);
    output(server.client("vacuumdb").args(["--all", "--freeze", "--quiet"]));
    server.script("checkpoint; create table u2 (i int); insert into u2 values (1);");
    server.script(WORKLOAD);
    server.stop("immediate");
    server.start();
    server.script("begin; insert into t values (-20, 0); savepoint a; insert into t values (-21, 0); commit;");
    server
        .script("create database after_recovery strategy file_copy; select lo_create(0) from generate_series(1, 9) g;");
    server.stop("fast");

    let wal = server.data.join("pg_wal");
    let (mut state, records) = replay(&base, &wal, Lsn(u64::MAX));
    judge(&mut state, &server.data);
    let mut base_state = State::load(&base);
    base_state.compare(&State::load(&server.data));
    assert!(base_state.faults.len() > 40, "the judge misses what was not replayed: {:?}", base_state.faults);

    let [recovery, shutdown] = &state.shutdowns[..] else { panic!("{:#?}", state.shutdowns) };
    assert_eq!(recovery.theirs, recovery.ours, "after a crash");
    assert!(shutdown.ours.next_oid >= shutdown.theirs.next_oid, "{shutdown:?}");
    let ours = pgformat::CheckPoint { next_oid: shutdown.theirs.next_oid, ..shutdown.ours };
    assert_eq!(shutdown.theirs, ours, "at a clean shutdown");
    assert_eq!(control(&server.data).checkpoint, state.counters.checkpoint);
    assert_eq!(control(&server.data).settings, state.counters.settings);
    for kind in state::KINDS {
        assert!(state.counts.contains_key(*kind), "no {kind}: {:?}", state.counts);
    }
    // Before the middle one of the records of these kinds: multixacts, commits of prepared transactions, relation maps.
    for (rmgr, kind) in [(6, 0x20), (1, 0x30), (7, 0x00)] {
        let kinds = |record: &&RecordInfo| record.rmgr == rmgr && record.info & 0x70 == kind;
        let ends: Vec<_> = records.iter().filter(kinds).map(|record| record.start).collect();
        judge_recovery(&postgres, &directory, &base, &wal, ends[ends.len() / 2]);
    }
}
