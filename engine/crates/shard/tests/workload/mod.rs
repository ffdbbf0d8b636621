//! What the server of the tests goes through.
#![allow(dead_code, reason = "each test crate uses its own part")]

use std::{fs, os::unix::fs::FileExt, path::Path, process::Command};

use pgformat::ControlFile;

use crate::postgres::{Postgres, Server, output};

/// As the engine forces it on its writers; no WAL is removed.
pub const SETTINGS: &str = "fsync = off\nfull_page_writes = off\nwal_keep_size = 10GB\n\
    max_prepared_transactions = 20\nautovacuum = off\ncheckpoint_timeout = 1h\nmax_wal_size = 10GB\n\
    shared_buffers = 64MB\ntrack_commit_timestamp = on\nwal_level = replica\n";

/// Tables and indexes of all kinds; lengths that grow and shrink across stripes.
const RELATIONS: &str = "
    create table t (i int primary key, k int, t text) with (fillfactor = 70);
    create index on t (k);
    insert into t select g, g % 10, repeat('x', g % 200) from generate_series(1, 8000) g;
    vacuum (freeze) t;
    update t set t = t || 'y' where i % 3 = 0;
    delete from t where i % 11 = 0;
    vacuum t;
    delete from t where i > 6100;
    vacuum t;
    insert into t select g, 0, 'again' from generate_series(10000, 12000) g;
    delete from t where i > 500;
    vacuum t;
    vacuum (freeze) t;
    insert into t select g, 0, repeat('new', 90) from generate_series(20000, 27000) g;
    create table emptied (i int);
    insert into emptied select generate_series(1, 50000);
    vacuum emptied;
    delete from emptied;
    vacuum emptied;
    create table emptied_again (i int);
    insert into emptied_again select generate_series(1, 50000);
    vacuum emptied_again;
    delete from emptied_again;
    vacuum emptied_again;
    insert into emptied_again select generate_series(1, 20000);
    vacuum emptied_again;
    create table cut_in_stripe (i int);
    insert into cut_in_stripe select generate_series(1, 50000);
    vacuum (freeze) cut_in_stripe;
    delete from cut_in_stripe where i > 21000;
    vacuum cut_in_stripe;
    insert into cut_in_stripe select generate_series(1, 3000);
    create table truncated (i int primary key, t text);
    insert into truncated select g, repeat('t', 3000) from generate_series(1, 500) g;
    truncate truncated;
    insert into truncated select g, repeat('u', 100) from generate_series(1, 500) g;
    begin; create table same as select generate_series(1, 9000) i; truncate same; insert into same values (1); commit;
    begin; truncate truncated; insert into truncated values (1, 'one'); rollback;
    create table never_filled (i int primary key);
    create table dropped as select generate_series(1, 90000) i;
    create index on dropped (i);
    vacuum dropped;
    drop table dropped;
    begin; create table gone as select generate_series(1, 1000) i; savepoint a; create table gone_2 (i int); rollback;
    create unlogged table unlogged (i int primary key, t text);
    insert into unlogged select g, g::text from generate_series(1, 3000) g;
    create unlogged table made_logged (i int primary key, t text);
    insert into made_logged select g, g::text from generate_series(1, 3000) g;
    alter table made_logged set logged;
    create unlogged sequence unlogged_sequence;
    create temporary table temporary as select generate_series(1, 1000) i;
    create sequence s;
    select nextval('s') from generate_series(1, 100);
    create table clustered (i int primary key, t text);
    insert into clustered select 5000 - g, repeat('c', g % 300) from generate_series(1, 5000) g;
    cluster clustered using clustered_pkey;
    update clustered set t = 'c' where i % 2 = 0;
    vacuum full clustered;
    begin; create table copied (i int, t text); copy copied from program 'seq 1 9000 | sed s/$/,x/' (format csv, freeze);
        commit;
    update copied set t = 'changed' where i % 2 = 0;
    create table toasted (t text);
    alter table toasted alter t set storage external;
    insert into toasted select repeat(g::text, 5000) from generate_series(1, 200) g;
    update toasted set t = t || 'x';
    create materialized view m as select i from copied where i % 3 = 0;
    refresh materialized view m;
    alter table clustered alter i type bigint;
    reindex table clustered;
    create table ranges (i int, t text);
    create index on ranges using brin (i, t) with (pages_per_range = 1);
    insert into ranges select g, repeat('a', g % 300) from generate_series(1, 8000) g;
    vacuum ranges;
    select brin_desummarize_range('ranges_i_t_idx', g) from generate_series(0, 20) g;
    create table hashed (i int, k int);
    create index on hashed using hash (k);
    insert into hashed select g, g from generate_series(1, 6000) g;
    insert into hashed select g, 5 from generate_series(1, 3000) g;
    delete from hashed where k = 5 and i % 4 < 2;
    vacuum hashed;
    create table placed (i int, p point);
    create index on placed using gist (p);
    insert into placed select g, point(g % 100, g / 100) from generate_series(1, 6000) g;
    delete from placed where i between 1000 and 5000;
    vacuum placed;
    vacuum placed;
    create table words (i int, a int[]);
    create index on words using gin (a) with (fastupdate = off);
    create index pending on words using gin (a) with (fastupdate = on, gin_pending_list_limit = 64);
    insert into words select g, array[g % 3, g % 50 + 10, g + 1000] from generate_series(1, 5000) g;
    vacuum words;
    delete from words where i % 3 = 0;
    vacuum words;
    create table texts (i int, t text, p point);
    create index on texts using spgist (t);
    create index on texts using spgist (p);
    insert into texts select g, repeat('ab', g % 5) || md5(g::text), point(g % 77, g % 101) from generate_series(1, 5000) g;
    delete from texts where i % 3 = 0;
    vacuum texts;
    create extension bloom;
    create index on texts using bloom (t);
    insert into texts select g, g::text, null from generate_series(1, 300) g;
";

/// Databases of both strategies, copies of what was changed, and a source that goes on changing.
const DATABASES: &str = "
    create database logged strategy wal_log;
    create database copied strategy file_copy;
    create database dropped strategy file_copy;
    drop database dropped;
    vacuum full pg_class;
    vacuum full pg_authid;
    create database copy_of_logged strategy file_copy template logged;
    create database copy_of_copy strategy file_copy template copied;
    create database copied_by_log strategy wal_log template copied;
";

const IN_A_DATABASE: &str = "
    create table here (i int primary key, t text);
    insert into here select g, repeat('h', g % 400) from generate_series(1, 6000) g;
    vacuum here;
    delete from here where i > 900;
    vacuum here;
    create unlogged table not_logged (i int primary key);
    insert into not_logged select generate_series(1, 500);
    vacuum full pg_class;
    create table large as select generate_series(1, 60000) i;
";

/// More than a page of `pg_xact`, a file of `pg_commit_ts`, in one commit.
const SUBTRANSACTIONS: &str = "
    create table u (i int primary key, k int);
    create procedure many(count int) language plpgsql as $$ begin
        for n in 1..count loop
            begin insert into u values (n, 0); exception when others then raise; end;
        end loop;
    end $$;
    call many(40000);
";

/// Transactions of all kinds, multixacts, origins, large objects; prepared transactions hold the locks that make multixacts.
const TRANSACTIONS: &str = "
    begin; insert into u values (-1, 0); savepoint a; insert into u values (-2, 0); rollback to a;
        savepoint b; insert into u values (-3, 0); release b; commit;
    begin; select count(*) from (select i from u where i < 3000 for key share) s; prepare transaction 'locks';
    create procedure lock_each(count int) language plpgsql as $$ begin
        for n in 1..count loop
            begin perform 1 from u where i = n for key share; exception when others then raise; end;
        end loop;
    end $$;
    call lock_each(2500);
    update u set k = 1 where i between 2501 and 2600;
    begin; insert into u values (-6, 0); savepoint a; insert into u values (-7, 0); prepare transaction 'left open';
    begin; create table dropped_by_abort as select generate_series(1, 3000) i; prepare transaction 'aborted';
    begin; create table committed as select generate_series(1, 3000) i; drop table never_filled;
        prepare transaction 'committed';
    rollback prepared 'aborted';
    commit prepared 'committed';
    select pg_replication_origin_create(name) from unnest(array['a', 'b', 'c']) name;
    select pg_replication_origin_advance('a', '0/5000');
    select pg_replication_origin_advance('b', '0/900');
    select pg_replication_origin_advance('b', '0/800');
    select pg_replication_origin_advance('c', '0/900');
    select pg_replication_origin_drop('c');
    select pg_replication_origin_session_setup('a');
    begin; select pg_replication_origin_xact_setup('0/6000', '2020-02-02 10:00:00'); insert into u values (-10, 0); commit;
    select pg_replication_origin_session_reset();
    select lo_create(0) from generate_series(1, 9000) g;
    select pg_logical_emit_message(true, 'nothing', 'said');
";

/// Moves the counters on, as if 2,000,000 transactions and 69,999 multixacts of two members had been: there are files of
/// SLRUs to be cut off.
pub fn move_on(postgres: &Postgres, server: &Server<'_>) {
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
    let control = fs::read(server.data.join("global/pg_control")).expect("a control file");
    let oldest = ControlFile::parse(&control).expect("PostgreSQL 17").checkpoint.oldest_xid.to_string();
    let mut resetwal = postgres.command("pg_resetwal");
    resetwal.args(["-x", "2000000", "-u", &oldest, "-m", "70000,1", "-O", "140000", "-D"]).arg(&server.data);
    output(&mut resetwal);
}

/// Before the first restart.
pub fn youth(_: &Postgres, server: &mut Server<'_>) {
    output(server.client("pgbench").args(["--initialize", "--quiet", "--scale=1"]));
    output(server.client("pgbench").args(["--client=4", "--transactions=300"]));
    server.script(SUBTRANSACTIONS);
    output(server.client("vacuumdb").args(["--all", "--freeze", "--quiet"]));
    server.script("checkpoint");
    server.script(RELATIONS);
    server.script(DATABASES);
    for database in ["logged", "copied", "copy_of_copy"] {
        server.script(&format!("\\connect {database}\n{IN_A_DATABASE}"));
    }
}

/// What was made before is changed, cut and dropped; with a crash.
pub fn age(_: &Postgres, server: &mut Server<'_>) {
    server.script("create database from_changed strategy file_copy template copied");
    server.script("create database from_changed_by_log strategy wal_log template logged");
    server.script(
        "\\connect from_changed\nupdate here set t = 'changed'; drop table large; insert into here values (-1, '')",
    );
    server.script("drop database copy_of_logged");
    server.script(TRANSACTIONS);
    // Commit timestamps begin and end with a start.
    for setting in ["track_commit_timestamp = off", "track_commit_timestamp = on"] {
        server.stop("fast");
        server.append_configuration(setting);
        server.start();
        server.script("insert into u values (-25, 0); delete from u where i = -25");
    }
    output(server.client("pgbench").args(["--client=4", "--transactions=300"]));
    server.stop("immediate");
    server.start();
    server.script("insert into t values (-20, 0); vacuum t; create database after_recovery strategy file_copy");
    server.script("truncate truncated; drop table emptied; vacuum (freeze)");
    server.script("delete from cut_in_stripe where i > 9000; vacuum cut_in_stripe; delete from copied where i > 50; vacuum copied");
    server.script("begin; insert into u values (-30, 0); insert into emptied_again values (1); prepare transaction 'open at the end'");
}

/// PostgreSQL's regression suite, from the directory that `LAKEBASE_PG_TESTS` names. A test that fails leaves WAL like any
/// other; that the suite ran is what counts.
pub fn regression_suite(postgres: &Postgres, server: &mut Server<'_>) {
    const PASSED_MIN: usize = 200;
    let suites = std::env::var_os("LAKEBASE_PG_TESTS").expect("LAKEBASE_PG_TESTS: a directory with regress/");
    let suite = Path::new(&suites).join("regress");
    let sockets = server.data.parent().expect("a directory");
    let results = sockets.join("results");
    fs::create_dir_all(results.join("results")).expect("a new directory");
    output(Command::new("chmod").args(["-R", "777"]).arg(&results));
    let program = postgres.tool("postgres");
    let bin = Path::new(program.get_program()).parent().expect("a directory");
    let mut command = Command::new(suite.join("pg_regress"));
    command.current_dir(&results);
    for (option, path) in [
        ("--bindir", bin),
        ("--host", sockets),
        ("--inputdir", &suite),
        ("--expecteddir", &suite),
        ("--dlpath", &suite),
        ("--outputdir", &results),
        ("--schedule", &suite.join("parallel_schedule")),
    ] {
        command.arg(format!("{option}={}", path.display()));
    }
    let ran = command.args(["--user=postgres", "--max-concurrent-tests=20"]).output().expect("the suite starts");
    let text = String::from_utf8_lossy(&ran.stdout);
    let passed = text.lines().filter(|line| line.starts_with("ok ")).count();
    println!("{passed} tests passed");
    assert!(passed >= PASSED_MIN, "{text}{}", String::from_utf8_lossy(&ran.stderr));
}

/// What the suite left is copied, emptied and dropped.
pub fn age_of_suite(_: &Postgres, server: &mut Server<'_>) {
    server.script(
        "create database copied template regression strategy file_copy;
        create database logged template regression strategy wal_log;
        \\connect copied
        delete from tenk1 where unique1 > 100; vacuum (freeze) tenk1; drop table onek cascade; vacuum full tenk2;
        \\connect logged
        update tenk1 set ten = 11; vacuum; truncate tenk2;
        \\connect regression
        vacuum (freeze); reindex table tenk1;",
    );
}
