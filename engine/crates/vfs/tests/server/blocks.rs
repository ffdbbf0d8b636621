//! Rules V1-V3, V5, V8: a server whose relation files are holes that fill themselves, and are emptied again.

use crate::{
    PATIENCE, WATCH,
    client::Client,
    cluster::{Cluster, Server, command, programs, signal},
    pages::{BASE, Options, Pages, path_of},
    within,
};
use std::{os::fd::AsRawFd, time::Duration};
use vfs_abi::{
    EXIT_REFUSED, ROLE_WRITER,
    blocks::{ENV_BLOCKS, ENV_BLOCKS_DOORBELL, FileKey, Kind},
};

/// Rows of the table that tests read.
const ROWS: u32 = 30_000;

/// A cluster with some data whose server was stopped in order; then its files become holes.
fn emptied(name: &str, settings: &[&str], options: Options) -> (Pages, Server) {
    let mut cluster = Cluster::new(name, ROLE_WRITER).set("shared_buffers=1MB");
    for setting in settings {
        cluster = cluster.set(setting);
    }
    let mut server = cluster.start();
    let mut client = server.connect();
    client.query(&format!(
        "CREATE TABLE t AS SELECT n AS id, n % 100 AS part, repeat('x', 100) AS filler FROM generate_series(1, {ROWS}) n"
    ));
    client.query("CREATE INDEX t_id ON t (id)");
    client.query("CREATE INDEX t_part ON t USING gin ((ARRAY[part]))");
    client.query("CREATE UNLOGGED TABLE u (id int PRIMARY KEY, filler text)");
    client.query("INSERT INTO u SELECT n, repeat('y', 100) FROM generate_series(1, 5000) n");
    client.query("VACUUM ANALYZE t");
    client.query("CREATE EXTENSION amcheck");
    client.query("CREATE EXTENSION pg_prewarm");
    drop(client);
    server.stop();
    let pages = Pages::attach(&mut server.cluster, options);
    (pages, server.restart())
}

/// An error with a text, when a query says something else than expected.
fn expect(client: &mut Client, sql: &str, expected: &str) -> Result<(), String> {
    let rows = client.try_query(sql).map_err(|error| format!("{sql}: {error}"))?;
    let found = rows.first().and_then(|row| row.first()).cloned().unwrap_or_default();
    if found == expected { Ok(()) } else { Err(format!("{sql}: {found} instead of {expected}")) }
}

fn run(client: &mut Client, sql: &str) -> Result<(), String> {
    client.try_query(sql).map(drop).map_err(|error| format!("{sql}: {error}"))
}

/// Everything that moves relation files, with answers that are known.
fn exercise(server: &Server) -> Result<(), String> {
    let mut client = Client::try_connect(&server.socket()).map_err(|error| error.to_string())?;
    let c = &mut client;
    let sum = u64::from(ROWS) * (u64::from(ROWS) + 1) / 2;
    expect(c, "SELECT sum(id) FROM t", &sum.to_string())?;
    expect(c, "SELECT count(*) FROM u", "0")?;
    run(c, "SET enable_seqscan = off")?;
    expect(c, "SELECT filler FROM t WHERE id = 12345", &"x".repeat(100))?;
    expect(c, "SELECT count(*) FROM t WHERE ARRAY[part] @> ARRAY[7]", "300")?;
    run(c, "RESET enable_seqscan")?;

    // Rows change, move and go; the visibility map follows.
    run(c, "UPDATE t SET part = part + 1 WHERE id % 3 = 0")?;
    run(c, "DELETE FROM t WHERE id % 5 = 0")?;
    run(c, "VACUUM (FREEZE) t")?;
    let left = ROWS - ROWS / 5;
    expect(c, "SELECT count(*) FROM t", &left.to_string())?;
    run(c, "SET enable_seqscan = off; SET enable_bitmapscan = off")?;
    expect(c, "SELECT count(*) FROM t WHERE id > 0", &left.to_string())?;
    run(c, "RESET enable_seqscan; RESET enable_bitmapscan")?;
    run(c, "CHECKPOINT")?;

    // Truncation in place, and growth afterwards.
    run(c, &format!("DELETE FROM t WHERE id > {}", ROWS / 2))?;
    run(c, "VACUUM t")?;
    run(c, &format!("INSERT INTO t SELECT n, 1, 'new' FROM generate_series({}, {}) n", ROWS + 1, 2 * ROWS))?;
    let kept = ROWS / 2 - ROWS / 2 / 5 + ROWS;
    expect(c, "SELECT count(*) FROM t", &kept.to_string())?;
    run(c, "REINDEX TABLE t")?;
    run(c, "SELECT bt_index_check('t_id', true)")?;
    run(c, "REINDEX TABLE pg_class")?;
    run(c, "VACUUM FULL pg_proc")?;

    // New files under new and old numbers.
    run(c, "CREATE TABLE v AS SELECT * FROM t")?;
    run(c, "TRUNCATE v")?;
    run(c, "INSERT INTO v SELECT * FROM t")?;
    run(c, "CREATE INDEX ON v USING gist (point(id, part))")?;
    run(c, "CREATE INDEX ON v USING spgist (point(id, part))")?;
    run(c, "CREATE INDEX ON v USING hash (id)")?;
    run(c, "CREATE INDEX ON v USING brin (id)")?;
    run(c, "CHECKPOINT")?;
    run(c, "SET enable_seqscan = off")?;
    expect(c, "SELECT count(*) FROM v WHERE point(id, part) <@ box '(0,-1),(1000000,1000)'", &kept.to_string())?;
    expect(c, &format!("SELECT part FROM v WHERE id = {}", ROWS + 5), "1")?;
    run(c, "RESET enable_seqscan")?;
    run(c, "DROP TABLE v")?;
    run(c, "CHECKPOINT")?;

    // Unlogged relations have pages that are in no WAL.
    run(c, "INSERT INTO u SELECT n, 'u' FROM generate_series(1, 3000) n")?;
    run(c, "CREATE UNLOGGED TABLE w AS SELECT * FROM t")?;
    run(c, "CREATE INDEX w_id ON w (id)")?;
    run(c, "CHECKPOINT")?;
    expect(c, "SELECT count(*) FROM w", &kept.to_string())?;
    expect(c, "SELECT count(*) FROM u", "3000")?;
    run(c, "SELECT bt_index_check('w_id', true)")?;

    // Copies of whole databases, block by block and file by file.
    run(c, "CREATE DATABASE logged TEMPLATE template0 STRATEGY wal_log")?;
    run(c, "CREATE DATABASE copied TEMPLATE template0 STRATEGY file_copy")?;
    for database in ["logged", "copied"] {
        let mut other = Client::try_connect_to(&server.socket(), database).map_err(|error| error.to_string())?;
        expect(&mut other, "SELECT count(*) > 3000 FROM pg_proc", "t")?;
        run(&mut other, "CREATE TABLE x AS SELECT n FROM generate_series(1, 1000) n")?;
        run(&mut other, "VACUUM FREEZE")?;
        run(&mut other, "CHECKPOINT")?;
        expect(&mut other, "SELECT count(*) FROM x", "1000")?;
    }
    expect(c, "SELECT sum(id) FROM t WHERE part = 1 AND id > 30000", "1350015000")?;
    run(c, "SELECT bt_index_check('t_id', true)")
}

/// The whole life of relation files over holes, while a second session reads.
fn lives(name: &str, settings: &[&str], options: Options) -> Pages {
    let (pages, mut server) = emptied(name, settings, options);
    let socket = server.socket();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reader = {
        let stop = stop.clone();
        std::thread::spawn(move || {
            let mut client = Client::try_connect(&socket).unwrap();
            let mut reads = 0;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                client.query("SELECT count(*) FROM pg_proc JOIN pg_depend ON objid = pg_proc.oid");
                client.query("SELECT count(*) FROM pg_class, pg_attribute WHERE attrelid = pg_class.oid");
                reads += 1;
            }
            reads
        })
    };
    let result = exercise(&server);
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(reader.join().unwrap() > 0);
    assert_eq!(Ok(()), result, "{:?}", pages.counters());
    server.stop();
    for line in server.cluster.log().lines() {
        assert!(!line.contains("PANIC") && !line.contains("could not read block"), "{line}");
    }
    let counters = pages.counters();
    assert!(counters.fills > 500 && counters.hits > counters.fills, "{counters:?}");
    println!("{name}: {counters:?}");
    pages
}

#[test]
fn database_of_holes_fills_itself() {
    let pages = lives("fills", &[], Options::default());
    assert_eq!(0, pages.counters().evictions);
}

/// Every clean block goes after each access, so that every read is a fill.
#[test]
fn database_lives_without_any_clean_block() {
    let options = Options { evict_always: true, ..Options::default() };
    let pages = lives("always", &[], options);
    let counters = pages.counters();
    assert!(counters.evictions > 5_000, "{counters:?}");
}

/// A cache far smaller than the data, in which written blocks go, too.
#[test]
fn database_lives_in_a_small_cache() {
    let options = Options { commit_lsn: u64::MAX, present_max: 200, ..Options::default() };
    let pages = lives("small", &["autovacuum=on"], options);
    let counters = pages.counters();
    assert!(counters.evictions > 5_000, "{counters:?}");
}

/// The horizon is what keeps written blocks: with it out of force, blocks come back as they were at the base backup.
#[test]
fn without_horizons_written_blocks_are_lost() {
    let options = Options { evict_always: true, commit_lsn: u64::MAX, ..Options::default() };
    let (pages, server) = emptied("planted", &[], options);
    let result = exercise(&server);
    assert!(result.is_err(), "nothing noticed that {} blocks were evicted", pages.counters().evictions);
}

/// A fill that fails is an error of that query alone.
#[test]
fn failed_fill_is_an_error_of_one_query() {
    let (pages, mut server) = emptied("eio", &[], Options::default());
    let mut client = server.connect();
    // What errors themselves need is there.
    assert!(client.try_query("SELECT 1/0").is_err());
    client.value("SELECT count(*) FROM pg_class WHERE relname = 't'");

    pages.fail(true);
    let error = client.try_query("SELECT sum(id) FROM t").unwrap_err().to_string();

    assert!(error.contains("could not read block") && error.contains("Input/output error"), "{error}");
    assert!(pages.counters().failures > 0);
    pages.fail(false);
    assert_eq!(ROWS.to_string(), client.value("SELECT count(*) FROM t"));
    assert!(server.runs());
}

/// Nobody but the page service can end the wait of a query, except that the backend is told to end.
#[test]
fn waiting_read_can_be_terminated() {
    let (pages, mut server) = emptied("terminate", &[], Options::default());
    let mut client = server.connect();
    client.value("SELECT count(*) FROM pg_class WHERE relname = 't'");
    pages.hold(true);
    client.send("SELECT sum(id) FROM t");
    assert_eq!(None, client.bytes_within(WATCH));

    signal(client.pid, libc::SIGTERM);

    assert!(within(PATIENCE, || !crate::cluster::lives(client.pid)));
    pages.hold(false);
    assert_eq!(ROWS.to_string(), server.connect().value("SELECT count(*) FROM t"));
    assert!(server.runs());
}

/// A page service that was away is no error.
#[test]
fn read_goes_on_when_the_page_service_returns() {
    let (pages, server) = emptied("returns", &[], Options::default());
    let mut client = server.connect();
    pages.hold(true);
    client.send("SELECT count(*) FROM t");
    assert_eq!(None, client.bytes_within(WATCH));
    pages.hold(false);
    assert_eq!(vec![vec![ROWS.to_string()]], client.answer().unwrap());
}

fn file_of(client: &mut Client, relation: &str) -> FileKey {
    let number = |text: String| text.parse().unwrap();
    FileKey {
        tablespace: 1663,
        database: number(client.value("SELECT oid FROM pg_database WHERE datname = current_database()")),
        relation: number(client.value(&format!("SELECT pg_relation_filenode('{relation}')"))),
        fork: 0,
        segment: 0,
    }
}

/// Brings what `pg_prewarm` itself reads: its plan, its function, its library, and the entry of `t`.
fn warm_prewarm(client: &mut Client) {
    client.query("SELECT pg_prewarm('pg_am', 'prefetch')");
    client.query("SELECT pg_prewarm('t', 'prefetch', 'main', 0, 0)");
}

/// Announced blocks are asked for without waiting, and as many as fit into the ring.
#[test]
fn prefetch_does_not_wait() {
    let (pages, server) = emptied("prefetch", &[], Options::default());
    let mut client = server.connect();
    let key = file_of(&mut client, "t");
    warm_prewarm(&mut client);
    client.query("EXPLAIN ANALYZE SELECT count(*) FROM t WHERE ctid < '(1,1)'");
    client.query("EXPLAIN SELECT count(filler) FROM t");
    let file = pages.map.find_file(&key, &crate::pages::Futexes).unwrap();
    pages.hold(true);
    let blocks: u32 = client.value("SELECT pg_prewarm('t', 'prefetch')").parse().unwrap();
    let count = |kind| (0..blocks).filter(|block| pages.map.kind_of(file, *block) == kind).count();
    assert!(count(Kind::Filling) > 400 && count(Kind::Absent) == 0, "{blocks} blocks, {:?}", pages.counters());
    pages.hold(false);

    assert!(within(PATIENCE, || count(Kind::Present) == blocks as usize));
    let before = pages.counters().waits;
    assert_eq!(ROWS.to_string(), client.value("SELECT count(filler) FROM t"));
    // The scan itself waits for none of the table's blocks; its plan may touch a few of the catalog.
    assert!(pages.counters().waits - before < 20, "{:?}", pages.counters());
}

/// Finding A3.2: pages that were asked for before a table was dropped come too late, and do not bring its file back.
#[test]
fn late_fill_does_not_bring_a_dropped_table_back() {
    let (pages, server) = emptied("late", &[], Options::default());
    let mut client = server.connect();
    let key = file_of(&mut client, "t");
    warm_prewarm(&mut client);
    // Everything that dropping it reads is there.
    client.query("BEGIN; DROP TABLE t; ROLLBACK");
    pages.hold(true);
    client.query("SELECT pg_prewarm('t', 'prefetch')");
    let asked = pages.counters();
    client.query("DROP TABLE t");
    pages.hold(false);

    client.query("CREATE TABLE other AS SELECT * FROM pg_proc");
    let path = server.cluster.pgdata().join(path_of(&key));
    // PostgreSQL keeps the empty file until the next checkpoint, so that its number is not used again.
    assert_eq!(0, std::fs::metadata(&path).unwrap().len());
    assert!(asked.prefetches > 400 && pages.counters().fills < asked.prefetches + asked.fills);
    client.query("CHECKPOINT");
    assert!(!path.exists());
    assert_eq!(None, pages.map.find_file(&key, &crate::pages::Futexes));
}

/// Finding A1.1: VACUUM changes a page without moving the LSN in it; the horizon moves.
#[test]
fn horizon_covers_changes_that_the_page_does_not_show() {
    let (pages, server) = emptied("horizon", &[], Options::default());
    let mut client = server.connect();
    let key = file_of(&mut client, "t");
    let file = pages.map.find_file(&key, &crate::pages::Futexes).unwrap();
    assert_eq!(BASE, pages.map.horizon_of(file, 0));
    client.query("SELECT count(*) FROM t; CHECKPOINT");
    client.query("UPDATE t SET part = 0 WHERE id = 1");
    let before = client.value("SELECT pg_current_wal_insert_lsn()");
    client.query("CHECKPOINT");
    let horizon = pages.map.horizon_of(file, 0);
    let (high, low) = before.split_once('/').unwrap();
    let insert = u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap();
    assert!(horizon >= insert - 40, "{horizon:x} {insert:x}");
    assert_eq!(Kind::Present, pages.map.kind_of(file, 0));
}

/// Finding A1, experiment E1. VACUUM marks a page as all-visible without moving the LSN in it, and marks it in the
/// visibility map. The page is evicted, and comes back. Without the mark the next DELETE does not clear the map, and
/// index-only scans return the deleted row for ever. Returns what such a scan finds.
fn index_only_trap(trusts_page_lsn: bool) -> String {
    let mut server = Cluster::new("trap", ROLE_WRITER).start();
    let mut client = server.connect();
    client.query("CREATE TABLE t (id int); CREATE INDEX t_id ON t (id)");
    client.query("CREATE EXTENSION pg_buffercache");
    drop(client);
    server.stop();
    // With checksums or wal_log_hints the LSN would move.
    crate::cluster::run(
        command(programs().join("pg_checksums")).args(["--disable", "--no-sync", "-D"]).arg(server.cluster.pgdata()),
    );
    let options = Options { commit_lsn: u64::MAX, trusts_page_lsn, ..Options::default() };
    let pages = Pages::attach(&mut server.cluster, options);
    let server = server.restart();
    let mut client = server.connect();
    let key = file_of(&mut client, "t");
    let file = pages.map.find_file(&key, &crate::pages::Futexes).unwrap();
    let evict = |client: &mut Client| {
        client.query("CHECKPOINT");
        client.query(&format!(
            "SELECT pg_buffercache_evict(bufferid) FROM pg_buffercache WHERE relfilenode = {} AND relforknumber = 0",
            key.relation
        ));
        pages.empty(|| pages.map.kind_of(file, 0) == Kind::Absent);
    };
    client.query("INSERT INTO t SELECT n FROM generate_series(1, 100) n");
    client.query("SELECT count(*) FROM t");
    evict(&mut client);
    client.query("VACUUM t");
    evict(&mut client);
    client.query("DELETE FROM t WHERE id = 7");
    client.query("SET enable_seqscan = off; SET enable_bitmapscan = off");
    let plan: String = client.query("EXPLAIN SELECT id FROM t WHERE id = 7").concat().concat();
    assert!(plan.contains("Index Only Scan"), "{plan}");
    client.value("SELECT count(id) FROM t WHERE id = 7")
}

#[test]
fn deleted_rows_stay_deleted_for_index_only_scans() {
    assert_eq!("0", index_only_trap(false));
    assert_eq!("1", index_only_trap(true), "the trap no longer catches anybody: this test looks at nothing");
}

/// A page that was never logged stays until it is written again.
#[test]
fn pages_in_no_wal_are_pinned() {
    let (pages, server) = emptied("pinned", &[], Options { commit_lsn: u64::MAX, ..Options::default() });
    let mut client = server.connect();
    client.query("CREATE UNLOGGED TABLE n AS SELECT n FROM generate_series(1, 1000) n");
    client.query("CREATE DATABASE copied TEMPLATE template0 STRATEGY file_copy");
    client.query("CHECKPOINT");
    let key = file_of(&mut client, "n");
    let database = client.value("SELECT oid FROM pg_database WHERE datname = 'copied'").parse().unwrap();
    for key in [key, FileKey { database, relation: 1255, ..key }] {
        let file = pages.map.find_file(&key, &crate::pages::Futexes).unwrap();
        assert_eq!(Kind::Pinned, pages.map.kind_of(file, 0), "{key:?}");
    }
}

/// A block that does not come would be the end of recovery: the startup process asks until it does.
#[test]
fn recovery_never_gives_up() {
    let mut cluster = Cluster::new("recovery", ROLE_WRITER);
    let mut server = cluster.start();
    let mut client = server.connect();
    client.query("CREATE TABLE t AS SELECT n FROM generate_series(1, 10000) n");
    client.query("CHECKPOINT");
    client.query("UPDATE t SET n = n + 1");
    // An unclean end, so that the next start replays WAL. No product of ours does this with a PGDATA of its own (V7).
    signal(server.process.id(), libc::SIGQUIT);
    server.wait();
    let pages = Pages::attach(&mut server.cluster, Options::default());
    pages.fail(true);
    cluster = server.into_cluster();

    let mut server = cluster.launch();
    assert!(within(PATIENCE, || pages.counters().failures >= 4));
    assert!(server.runs());
    pages.fail(false);

    assert!(within(PATIENCE, || Client::try_connect(&server.socket()).is_ok()));
    assert_eq!("50015000", server.connect().value("SELECT sum(n) FROM t"));
    assert!(server.log_has("redo done") && !server.log_has("Input/output error"), "{}", server.cluster.log());
}

/// TPC-B with more data than buffers and cache: what clients were told adds up, and the indexes agree.
#[test]
fn pgbench_runs_in_a_small_cache() {
    let mut server = Cluster::new("pgbench", ROLE_WRITER).set("shared_buffers=1MB").set("autovacuum=on").start();
    let socket = server.cluster.pgdata();
    let pgbench = |server: &Server, arguments: &[&str]| {
        let mut command = command(programs().join("pgbench"));
        command.args(["-h", socket.to_str().unwrap(), "-U", "postgres", "-p", &server.port.to_string()]);
        crate::cluster::run(command.args(arguments).arg("postgres"))
    };
    pgbench(&server, &["-i", "-q", "-s", "2"]);
    server.connect().query("CREATE EXTENSION amcheck");
    server.stop();
    let options = Options { commit_lsn: u64::MAX, present_max: 300, read_ahead: 3, ..Options::default() };
    let pages = Pages::attach(&mut server.cluster, options);
    let server = server.restart();

    let output = pgbench(&server, &["-c", "6", "-j", "2", "-t", "500"]);

    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(report.contains("number of transactions actually processed: 3000/3000"), "{report}");
    let mut client = server.connect();
    assert_eq!("3000", client.value("SELECT count(*) FROM pgbench_history"));
    for (table, column) in [("accounts", "abalance"), ("tellers", "tbalance"), ("branches", "bbalance")] {
        let sql = format!("SELECT sum({column}) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_{table}");
        assert_eq!("t", client.value(&sql), "{table}");
    }
    client.query("SELECT bt_index_check('pgbench_accounts_pkey', true)");
    let counters = pages.counters();
    assert!(counters.evictions > 3_000, "{counters:?}");
    println!("pgbench: {counters:?}");
}

/// A block map of another version, or cut off, is none.
#[test]
fn every_wrong_block_map_is_refused() {
    type Case = (&'static str, fn(&mut Cluster, &std::os::fd::OwnedFd), &'static str);
    let cases: &[Case] = &[
        ("no doorbell", |c, _| c.set_environment(ENV_BLOCKS_DOORBELL, None), "BLOCKS_DOORBELL is not set"),
        ("no number", |c, _| c.set_environment(ENV_BLOCKS, Some("x")), "LAKEBASE_VFS_BLOCKS has the bad value"),
        ("empty", |c, _| c.set_environment(ENV_BLOCKS, Some("")), "LAKEBASE_VFS_BLOCKS is not set"),
        ("absent", |c, _| c.set_environment(ENV_BLOCKS, Some("/nowhere")), "cannot map the block map"),
        ("cut off", |_, memory| resize(memory, 4096), "the block map has 4096 bytes instead of"),
        ("no header", |_, memory| resize(memory, 8), "the block map has 8 bytes instead of the 24"),
        (
            "zeros",
            |_, memory| [0, 4096].into_iter().for_each(|bytes| resize(memory, bytes)),
            "0x0000000000000000 instead",
        ),
    ];
    for (name, spoil, expected) in cases {
        let mut cluster = Cluster::bare("refused-map", ROLE_WRITER);
        let (memory, map) = crate::pages::region(vfs_abi::blocks::Layout::new(10, 10).unwrap());
        map.initialise(BASE, BASE);
        let bell = cluster.inherited[1].to_string();
        cluster.inherited.push(memory.as_raw_fd());
        cluster.set_environment(ENV_BLOCKS, Some(&memory.as_raw_fd().to_string()));
        cluster.set_environment(ENV_BLOCKS_DOORBELL, Some(&bell));
        spoil(&mut cluster, &memory);

        let mut server = cluster.launch();

        assert_eq!(Some(EXIT_REFUSED), server.wait().code(), "{name}: {}", server.cluster.log());
        let log = server.cluster.log();
        assert!(log.lines().count() == 1 && log.contains(expected), "{name}: {log}");
    }
}

fn resize(memory: &std::os::fd::OwnedFd, bytes: i64) {
    // SAFETY: integer arguments.
    assert_eq!(0, unsafe { libc::ftruncate(memory.as_raw_fd(), bytes) });
}

/// Backpressure slows flushes, by 10 ms each at most.
#[test]
fn backpressure_delays_commits_but_does_not_stop_them() {
    let server = Cluster::new("delay", ROLE_WRITER).start();
    let mut client = server.connect();
    client.query("CREATE TABLE t (id int)");
    server.agent().area.flush_delay_us.store(60_000_000, std::sync::atomic::Ordering::SeqCst);
    let start = std::time::Instant::now();
    for id in 0..20 {
        client.query(&format!("INSERT INTO t VALUES ({id})"));
    }
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(200), "{elapsed:?}");
    assert!(elapsed < PATIENCE, "{elapsed:?}");
}
