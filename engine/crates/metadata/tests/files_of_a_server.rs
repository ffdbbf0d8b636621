//! Oracle: state that is replayed from WAL, against the files of the PostgreSQL that wrote it, and against the counters
//! that its recovery comes to after a crash.
//!
//! Not compared, because WAL does not define it: the next oid at a clean shutdown (WAL names the end of a batch of 8,192),
//! the order of replication origins in their file, and origins that were set up but never replayed anything. The oldest
//! transaction and multixact move between checkpoints without a record when no file of an SLRU becomes free: they are
//! those of a recovery. The positions of recoveries are drawn under a seed, as `../../wal/tests/recovery/mod.rs` says. PostgreSQL is found as `../wal/tests/postgres/mod.rs` says.

#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
#[path = "../../redo/tests/oracle/record_types.rs"]
mod record_types;
#[path = "../../wal/tests/recovery/mod.rs"]
mod recovery;
mod state;

use std::{collections::BTreeMap, fs, os::unix::fs::FileExt, path::Path, process::Command};

use pgformat::ControlFile;
use pgtypes::Lsn;
use postgres::{Directory, Postgres, Server, output};
use record_types::{Proof, kind_of, missing, name_of, type_of};
use recovery::{Positions, recover};
use state::{State, decode};
use wal::RecordInfo;

/// Recoveries of a run that says nothing else.
const RECOVERIES: usize = 4;

const SETTINGS: &str = "fsync = off\nfull_page_writes = off\nwal_keep_size = 10GB\nmax_prepared_transactions = 20\n\
    autovacuum = off\ncheckpoint_timeout = 1h\nwal_level = logical\n";

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
    let (mut state, records) = replay(base, wal, end);
    let tracks = if state.counters.settings.track_commit_timestamp { "on" } else { "off" };
    let configuration = format!("track_commit_timestamp = {tracks}\n");
    let data = recover(postgres, directory, base, wal, end, &configuration);
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

/// At a clean shutdown all files are the same; a recovery after a crash in between, and recoveries that stop at positions
/// drawn at random, come to the same files and counters.
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
    server.script("alter system set full_page_writes = on; select pg_reload_conf(); checkpoint");
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
    let mut seen: BTreeMap<(u8, u8), u64> = BTreeMap::new();
    for record in &records {
        *seen.entry(kind_of(record.rmgr, record.info)).or_default() += 1;
    }
    let with_state = seen.iter().filter(|(kind, _)| type_of(**kind).is_some_and(|(.., proof)| *proof == Proof::State));
    with_state.for_each(|(kind, count)| println!("{:<32} {count:>9}", name_of(*kind)));
    assert_eq!(Vec::<String>::new(), missing(&[Proof::State], |kind| seen.contains_key(kind)), "not judged");
    let ends = records.iter().map(|record| (*record, Lsn(record.end.0.next_multiple_of(8))));
    let mut positions = Positions::new(ends, RECOVERIES);
    while let Some(end) = positions.draw() {
        println!("recovery to {end}");
        judge_recovery(&postgres, &directory, &base, &wal, end);
    }
}
