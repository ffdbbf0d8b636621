//! Oracle: every page that redo makes, against PostgreSQL's.
//!
//! PostgreSQL is found as `../wal/tests/postgres/mod.rs` says.

mod oracle;
#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use oracle::{Files, Oracle, decode};
use pgtypes::Lsn;
use postgres::{Postgres, Server, output};
use redo::Context;

/// No page images but those for checking, as the engine forces it on its writers; no WAL is removed.
const SETTINGS: &str = "fsync = off\nfull_page_writes = off\nwal_consistency_checking = 'all'\nwal_keep_size = 10GB\n\
    max_prepared_transactions = 5\nautovacuum = off\ncheckpoint_timeout = 1h\nwal_level = logical\n";

/// Every kind of change to a heap.
const HEAP: &str = "
    create table t (i int primary key, k int, t text) with (fillfactor = 70);
    create index on t (k);
    insert into t select g, g % 10, repeat('x', g % 200) from generate_series(1, 5000) g;
    vacuum (freeze) t;
    update t set t = t || 'y' where i % 3 = 0;
    update t set k = k + 1 where i % 7 = 0;
    delete from t where i % 11 = 0;
    begin; savepoint a; select i from t where i < 50 for update; savepoint b;
        select i from t where i between 30 and 60 for share; rollback to b;
        update t set t = 'z' where i < 40; commit;
    vacuum t;
    select i from t where i between 100 and 130 for key share;
    vacuum (freeze) t;
    select i from t where i between 200 and 300 for update;
    delete from t where i between 400 and 420;
    insert into t select g, 0, 'new' from generate_series(6000, 6200) g on conflict (i) do nothing;
    insert into t values (6000, 1, 'conflict') on conflict (i) do update set k = excluded.k;
    delete from t where i > 3000;
    vacuum t;
    insert into t select g, 0, 'again' from generate_series(7000, 9000) g;
    vacuum t;
    create sequence s;
    select nextval('s') from generate_series(1, 100);
    select setval('s', 1000);
    create table parted (i int, t text) partition by list (i);
    create table parted_1 partition of parted for values in (1);
    create table parted_2 partition of parted for values in (2);
    insert into parted select 1, g::text from generate_series(1, 100) g;
    update parted set i = 2 where t::int % 2 = 0;
    create table narrow (i int);
    insert into narrow select generate_series(1, 6000);
    vacuum narrow;
    update narrow set i = i + 1 where i % 5 = 0;
    delete from narrow where i % 4 = 0;
    vacuum (index_cleanup off) narrow;
    delete from narrow where i > 10;
    vacuum narrow;
    begin; create table copied (i int, t text); copy copied from program 'seq 1 3000 | sed s/$/,x/' (format csv, freeze); commit;
    update copied set t = 'changed' where i % 2 = 0;
    begin; insert into copied values (-1, 'aborted'); rollback;
    begin; update copied set t = 'prepared' where i < 10; prepare transaction 'p';
    commit prepared 'p';
    begin; update t set t = 'first' where i = 1; prepare transaction 'q';
    begin; select i from t where i = 1 for key share; commit;
    commit prepared 'q';
    create table toasted (t text);
    alter table toasted alter t set storage external;
    insert into toasted select repeat(g::text, 5000) from generate_series(1, 20) g;
    update toasted set t = t || 'x';
    vacuum full copied;
    cluster t using t_pkey;
    truncate narrow;
    insert into narrow values (1);
    create database d2 strategy file_copy;
    create database d3 strategy wal_log;
    create database d4 strategy file_copy template d2;
    drop database d2;
    begin; create table gone as select generate_series(1, 1000) i; savepoint a; create table gone_2 (i int); rollback;
    select pg_log_standby_snapshot();
";

/// Every kind of change to an index.
const INDEXES: &str = "
    create table churn (i int primary key, k int, d int);
    create index on churn (k);
    create index on churn (d);
    insert into churn select g, g, g % 3 from generate_series(1, 1000) g;
    update churn set k = k + 1, d = (d + 1) % 3;
    update churn set k = k + 1, d = (d + 1) % 3;
    update churn set k = k + 1, d = (d + 1) % 3;
    update churn set k = k + 1, d = (d + 1) % 3;
    update churn set k = k + 1, d = (d + 1) % 3;
    update churn set k = k + 1, d = (d + 1) % 3;
    update churn set k = k + 1, d = (d + 1) % 3;
    update churn set k = k + 1, d = (d + 1) % 3;
    create table ranges (i int, t text);
    create index on ranges using brin (i, t) with (pages_per_range = 1);
    insert into ranges select g, repeat('a', g % 300) from generate_series(1, 8000) g;
    select brin_summarize_new_values('ranges_i_t_idx');
    insert into ranges select -g, repeat('zz', g % 400) from generate_series(1, 3000) g;
    vacuum ranges;
    select brin_desummarize_range('ranges_i_t_idx', g) from generate_series(0, 20) g;
    insert into ranges select g, g::text from generate_series(1, 2000) g;
    vacuum ranges;
    create index on ranges using brin (i) with (pages_per_range = 1, autosummarize = off);
    create table hashed (i int, k int) with (autovacuum_enabled = off);
    insert into hashed select g, g from generate_series(1, 100) g;
    create index on hashed using hash (k);
    insert into hashed select g, g from generate_series(1, 4000) g;
    insert into hashed select g, 5 from generate_series(1, 3000) g;
    delete from hashed where k = 5 and i % 4 < 2;
    vacuum hashed;
    insert into hashed select g, g * 7 from generate_series(1, 3000) g;
    delete from hashed where i % 8 < 7;
    vacuum hashed;
    insert into hashed select g, 77 from generate_series(1, 400) g;
    delete from hashed where k = 77;
    set enable_seqscan = off;
    set enable_bitmapscan = off;
    select count(*) from hashed where k = 77;
    select count(*) from hashed where k = 77;
    insert into hashed select g, 77 from generate_series(1, 1000) g;
    reset enable_seqscan;
    reset enable_bitmapscan;
    create table placed (i int, p point);
    create index on placed using gist (p);
    insert into placed select g, point(g % 100, g / 100) from generate_series(1, 6000) g;
    delete from placed where i between 1000 and 5000;
    vacuum placed;
    vacuum placed;
    insert into placed select g, point(g % 100, 7.5) from generate_series(1, 2000) g;
    delete from placed where i <= 500;
    set enable_seqscan = off;
    set enable_bitmapscan = off;
    select count(*) from placed where p <@ box(point(0, 0), point(100, 100));
    select count(*) from placed where p <@ box(point(0, 0), point(100, 100));
    reset enable_seqscan;
    reset enable_bitmapscan;
    insert into placed select g, point(g % 100, 7.25) from generate_series(1, 4000) g;
    create table words (i int, a int[]);
    create index on words using gin (a) with (fastupdate = off);
    create index pending on words using gin (a) with (fastupdate = on, gin_pending_list_limit = 64);
    insert into words select g, array[g % 3, g % 50 + 10, g + 1000] from generate_series(1, 5000) g;
    vacuum words;
    delete from words where i % 3 = 0;
    vacuum words;
    insert into words select g, array[1, g % 20 + 10] from generate_series(1, 2000) g;
    delete from words where i between 1000 and 4500;
    vacuum words;
    insert into words select g, array[1, 2] from generate_series(1, 30) g;
    select gin_clean_pending_list('pending');
    insert into words select g, array(select generate_series(1, 3000)) from generate_series(1, 3) g;
    delete from words;
    vacuum words;
    create table one_key (i int, a int[]);
    copy one_key from program 'seq 1 60000 | sed s/$/,{1}/' (format csv);
    create index on one_key using gin (a);
    set wal_consistency_checking = '';
    delete from one_key where i between 10000 and 50000;
    reset wal_consistency_checking;
    vacuum one_key;
    create table texts (i int, t text, p point);
    create index on texts using spgist (t);
    create index on texts using spgist (p);
    insert into texts select g, repeat('ab', g % 5) || md5(g::text), point(g % 77, g % 101)
        from generate_series(1, 5000) g;
    insert into texts select g, repeat('ab', g) || chr(97 + g % 26), null from generate_series(1, 200) g;
    delete from texts where i % 3 = 0;
    vacuum texts;
    insert into texts select g, 'abab' || g, point(g, 5) from generate_series(1, 2000) g;
    delete from texts where i % 2 = 0;
    vacuum texts;
    vacuum texts;
    create table few (t text);
    create index on few using spgist (t);
    insert into few select g::text from generate_series(1, 20) g;
    delete from few where t like '1%';
    vacuum few;
    create extension bloom;
    create index on texts using bloom (t);
    insert into texts select g, g::text from generate_series(1, 300) g;
    delete from texts where i % 5 = 0;
    vacuum texts;
";

/// Indexes that shrink to one leaf below their root, and grow again; pages that are used again.
const SHRUNK: &str = "
    create table shrunk (i int primary key, p point);
    create index on shrunk using gist (p);
    insert into shrunk select g, point(g % 100, g / 100) from generate_series(1, 6000) g;
    delete from shrunk where i < 5990;
    vacuum shrunk;
    vacuum shrunk;
    select txid_current();
    select txid_current();
    vacuum shrunk;
    insert into shrunk select g, point(g % 100, g / 100) from generate_series(10000, 16000) g;
";

/// What only logical decoding and backups need.
const LOGICAL: &str = "
    select pg_create_logical_replication_slot('decoded', 'test_decoding');
    create table catalog_changes (i int);
    vacuum full pg_class;
    select pg_logical_emit_message(true, 'nothing', 'said');
    begin; savepoint a; select count(*) from (select txid_current()) x; savepoint b; create table in_b (i int); commit;
    select pg_drop_replication_slot('decoded');
    select pg_create_restore_point('here');
    select pg_backup_start('nothing', true);
    select pg_backup_stop(false);
    select pg_switch_wal();
    checkpoint;
";

/// Hints are logged as images while page images are on.
const IMAGES_FOR_HINTS: &str = "
    create table hinted as select g i, repeat('x', 300) t from generate_series(1, 400) g;
    alter system set full_page_writes = on;
    select pg_reload_conf();
    checkpoint;
    select count(*) from hinted;
    alter system reset full_page_writes;
    select pg_reload_conf();
    checkpoint;
";

/// What runs while pgbench does: each takes locks, waits for transactions, and scans what they change.
const UNDER_LOAD: &[&str] = &[
    "vacuum pgbench_accounts",
    "create index concurrently on pgbench_accounts (abalance)",
    "reindex table pgbench_accounts",
    "cluster pgbench_branches using pgbench_branches_pkey",
    "truncate pgbench_history",
    "create database copied_under_load strategy file_copy",
    "create database logged_under_load strategy wal_log",
    "reindex table concurrently pgbench_tellers",
    "begin; create table frozen (i int, t text); copy frozen from program 'seq 1 5000 | sed s/$/,x/' (format csv, freeze); commit",
    "vacuum (freeze) pgbench_tellers",
    "drop database copied_under_load",
];

/// pgbench runs until the last command is done.
fn change_under_load(server: &Server<'_>) {
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                output(server.client("pgbench").args(["--client=4", "--transactions=100", "--no-vacuum"]));
            }
        });
        for command in UNDER_LOAD {
            server.script(command);
        }
        is_done.store(true, Ordering::Relaxed);
        load.join().expect("pgbench runs");
    });
}

fn start_lsn(server: &Server<'_>) -> Lsn {
    server.control_data().get("Latest checkpoint location").parse().expect("a position")
}

/// Replays all that the server wrote from `start` on and compares; the server is down.
fn judge(server: &Server<'_>, base: &Path, start: Lsn, hint_bits_logged: bool) -> Oracle {
    let mut oracle = Oracle::new(Files(base.to_owned()), Context { hint_bits_logged });
    decode(&server.data.join("pg_wal"), start, |record| oracle.replay(record));
    let files = oracle.compare_files(&Files(server.data.clone()));
    println!("{}{files} pages compared with files", oracle.report());
    assert!(files > 100, "{files} pages compared with files");
    assert!(oracle.faults == 0, "{} faults:\n{}", oracle.faults, oracle.descriptions.join("\n"));
    for (rmgr, (tried, found)) in &oracle.flipped {
        // Hints, command ids and pages that were deleted are masked.
        assert!(found * 4 > *tried, "{found} of {tried} changed bytes were found, resource manager {rmgr}");
    }
    assert!(oracle.refused > 0, "no damaged record was refused");
    assert!(oracle.trimmed_bytes > 0, "no record was trimmed");
    oracle
}

fn copy_base(server: &Server<'_>, base: &Path) {
    fs::create_dir(base).expect("a new directory");
    for name in ["base", "global"] {
        output(Command::new("cp").arg("-a").arg(server.data.join(name)).arg(base));
    }
}

/// With data checksums, the records that mark pages as visible also move the heap page's LSN.
#[test]
fn pages_of_a_server_are_the_same() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &["--data-checksums"]);
    server.append_configuration(SETTINGS);
    let (start, base) = (start_lsn(&server), directory.0.join("base"));
    copy_base(&server, &base);
    server.start();
    output(server.client("pgbench").args(["--initialize", "--quiet", "--scale=1"]));
    change_under_load(&server);
    server.script(HEAP);
    server.script(INDEXES);
    server.script(SHRUNK);
    server.script(LOGICAL);
    server.script(IMAGES_FOR_HINTS);
    server.stop("fast");

    let oracle = judge(&server, &base, start, true);

    assert_eq!(6, oracle.events.len(), "{:?}", oracle.events);
    // Who sets a hint first is a matter of time here; the test of images for hints makes them for certain.
    let missing: Vec<String> = oracle.missing().into_iter().filter(|name| name != "XLOG FPI_FOR_HINT").collect();
    assert_eq!(Vec::<String>::new(), missing, "not judged");
    assert_eq!(Vec::<&str>::new(), oracle.never_flipped(), "no changed byte was found");
}

/// Without checksums, marking a heap page as visible leaves its LSN; page images come between the records, compressed.
#[test]
fn pages_of_a_server_without_checksums_and_with_images_are_the_same() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &[]);
    server.append_configuration(SETTINGS);
    server.append_configuration("full_page_writes = on\nwal_compression = pglz\n");
    let (start, base) = (start_lsn(&server), directory.0.join("base"));
    copy_base(&server, &base);
    server.start();
    output(server.client("pgbench").args(["--initialize", "--quiet", "--scale=1"]));
    for _ in 0..3 {
        output(server.client("pgbench").args(["--client=4", "--transactions=50"]));
        server.script("checkpoint; vacuum freeze;");
    }
    server.script(HEAP);
    server.stop("fast");

    let oracle = judge(&server, &base, start, false);

    assert!(oracle.restored.keys().any(|(rmgr, _)| *rmgr == 10), "no heap page came as an image");
    assert!(oracle.compared.contains_key(&(9, 0x40)), "no page was marked as visible");
}

/// Hint bits are logged as page images, once per page and checkpoint.
#[test]
fn pages_of_a_server_with_images_for_hints_are_the_same() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &["--data-checksums"]);
    server.append_configuration(SETTINGS);
    server.append_configuration("full_page_writes = on\n");
    let (start, base) = (start_lsn(&server), directory.0.join("base"));
    copy_base(&server, &base);
    server.start();
    server.script(
        "create table hinted as select g i, repeat('x', 300) t from generate_series(1, 4000) g;
        checkpoint;
        select count(*) from hinted;
        update hinted set t = 'y' where i % 3 = 0;
        vacuum freeze;",
    );
    server.stop("fast");

    let oracle = judge(&server, &base, start, true);

    assert!(oracle.restored.contains_key(&(0, 0xA0)), "no image for a hint");
}

/// Runs one of PostgreSQL's own suites. A test that fails leaves WAL like any other; that the suite ran is what counts.
#[cfg(feature = "suites")]
fn run_suite(postgres: &Postgres, directory: &Path, suites: &Path, name: &str, program: &str, passed_min: usize) {
    let suite = suites.join(name);
    let results = directory.join(format!("{name}-results"));
    fs::create_dir_all(results.join("results")).expect("a new directory");
    output(Command::new("chmod").args(["-R", "777"]).arg(&results));
    let postgres_program = postgres.tool("postgres");
    let bin = Path::new(postgres_program.get_program()).parent().expect("a directory");
    let schedule = ["parallel_schedule", "isolation_schedule"].map(|name| suite.join(name));
    let schedule = schedule.iter().find(|schedule| schedule.exists()).expect("a schedule");
    let mut command = Command::new(suite.join(program));
    // The tester of the isolation suite is looked for on PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    command.current_dir(&results).env("PATH", format!("{}:{path}", suite.display()));
    for (option, path) in [
        ("--bindir", bin),
        ("--host", directory),
        ("--inputdir", &suite),
        ("--expecteddir", &suite),
        ("--dlpath", &suite),
        ("--outputdir", &results),
        ("--schedule", schedule),
    ] {
        command.arg(format!("{option}={}", path.display()));
    }
    let ran = command.args(["--user=postgres", "--max-concurrent-tests=20"]).output().expect("the suite starts");
    let text = String::from_utf8_lossy(&ran.stdout);
    let passed = text.lines().filter(|line| line.starts_with("ok ")).count();
    println!("{name}: {passed} tests passed");
    assert!(passed >= passed_min, "{text}{}", String::from_utf8_lossy(&ran.stderr));
}

/// PostgreSQL's own suites, which `LAKEBASE_PG_TESTS` names a directory of: some minutes, and 7 GB in the directory for
/// temporary files. Built on demand: a test that passed because it was not asked for would count as one.
#[cfg(feature = "suites")]
#[test]
fn pages_of_the_suites_of_postgresql_are_the_same() {
    let suites =
        std::env::var_os("LAKEBASE_PG_TESTS").expect("LAKEBASE_PG_TESTS: a directory with regress/ and isolation/");
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &["--data-checksums"]);
    server.append_configuration(SETTINGS);
    server.append_configuration(
        "wal_compression = lz4\nwal_keep_size = 100GB\nmax_connections = 60\nautovacuum = on\nautovacuum_naptime = 5s\n\
         checkpoint_timeout = 30s\nmax_wal_size = 1GB\n",
    );
    let (start, base) = (start_lsn(&server), directory.0.join("base"));
    copy_base(&server, &base);
    server.start();
    run_suite(&postgres, &directory.0, Path::new(&suites), "regress", "pg_regress", 200);
    run_suite(&postgres, &directory.0, Path::new(&suites), "isolation", "pg_isolation_regress", 100);
    server.stop("fast");

    let oracle = judge(&server, &base, start, true);

    assert!(oracle.records > 1_000_000);
}
