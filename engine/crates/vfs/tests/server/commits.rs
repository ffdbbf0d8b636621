//! Rule V4: what PostgreSQL writes is published, and a commit returns when it is settled.

use crate::{
    PATIENCE, WATCH,
    client::Client,
    cluster::{Cluster, SEGMENT_BYTES, lives, programs, run, signal},
    within,
};
use std::{sync::atomic::Ordering::SeqCst, time::Duration};
use vfs_abi::{ROLE_REPLICA, ROLE_WRITER, Written};

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap()
}

/// What is published agrees with what PostgreSQL says it has written: whole pages up to its write position.
fn assert_published(client: &mut Client, area: &vfs_abi::Area, timeline: u32) {
    let mut seen = (Written { sequence: 0, written_lsn: 0, final_lsn: 0, timeline: 0 }, 0);
    // The background may write between the two looks, so both are repeated until they agree.
    let agreed = within(PATIENCE, || {
        let position = lsn(&client.value("SELECT pg_current_wal_lsn()"));
        seen = (area.written(), position);
        seen.0.written_lsn == position.next_multiple_of(8192)
    });
    assert!(agreed, "{seen:x?}");
    assert_eq!(timeline, seen.0.timeline);
    assert_eq!((seen.0.written_lsn - 1) / 8192 * 8192, seen.0.final_lsn);
}

/// A commit is acknowledged, and visible to others, only after its WAL is settled.
#[test]
fn commit_waits_until_its_wal_is_settled() {
    let server = Cluster::new("settled", ROLE_WRITER).start();
    let mut writer = server.connect();
    let mut reader = server.connect();
    writer.query("CREATE TABLE t (id int)");

    server.agent().let_settle(false);
    writer.send("INSERT INTO t VALUES (1)");

    assert_eq!(None, writer.bytes_within(WATCH));
    assert_eq!("0", reader.value("SELECT count(*) FROM t"));
    server.agent().let_settle(true);
    assert!(writer.answer().is_ok());
    assert_eq!("1", reader.value("SELECT count(*) FROM t"));
    assert!(server.agent().area.wal_flushes.load(SeqCst) > 0);
}

/// The last page is written again with each commit that lands in it, and ends where it ended before: the second of two
/// small commits waits as the first does.
#[test]
fn commit_on_the_same_page_waits_too() {
    let server = Cluster::new("samepage", ROLE_WRITER).start();
    let mut writer = server.connect();
    writer.query("CREATE TABLE t (id int)");
    for id in 0..20 {
        let before = server.agent().area.written();
        server.agent().let_settle(false);
        writer.send(&format!("INSERT INTO t VALUES ({id})"));
        assert_eq!(None, writer.bytes_within(WATCH / 8));
        let after = server.agent().area.written();
        assert!(after.sequence > before.sequence);
        server.agent().let_settle(true);
        assert!(writer.answer().is_ok());
        if after.written_lsn == before.written_lsn {
            return;
        }
    }
    panic!("no commit landed on the page of the one before");
}

/// A signal that arrives while a commit waits does not end the wait: the transaction may be neither acknowledged nor
/// reported as failed.
#[test]
fn signals_do_not_end_the_wait() {
    let mut server = Cluster::new("signals", ROLE_WRITER).start();
    let mut writer = server.connect();
    writer.query("CREATE TABLE t (id int)");
    server.agent().let_settle(false);
    writer.send("INSERT INTO t VALUES (1)");
    assert_eq!(None, writer.bytes_within(WATCH));

    for number in [libc::SIGINT, libc::SIGUSR1, libc::SIGTERM] {
        signal(writer.pid, number);
        assert_eq!(None, writer.bytes_within(WATCH / 4), "signal {number}");
    }

    server.agent().let_settle(true);
    let answer = String::from_utf8_lossy(&writer.bytes_within(PATIENCE).unwrap()).into_owned();
    assert!(answer.contains("INSERT 0 1") || answer.contains("terminating connection"), "{answer:?}");
    assert_eq!("1", server.connect().value("SELECT count(*) FROM t"));
    assert!(server.runs());
}

/// On a replica the WAL comes from the safekeepers, so nobody has to be asked.
#[test]
fn replica_waits_for_nobody() {
    let server = Cluster::new("replica", ROLE_REPLICA).start();
    server.agent().let_settle(false);
    let mut client = server.connect();

    client.query("CREATE TABLE t AS SELECT 1 AS id");

    assert_eq!("1", client.value("SELECT count(*) FROM t"));
    assert_eq!(0, server.agent().area.wal_flushes.load(SeqCst));
    assert_published(&mut client, server.agent().area, 1);
}

/// Positions stay right across segment switches, `XLOG_SWITCH`, recycling and zero-filled new segments.
#[test]
fn published_positions_follow_postgres_across_segments() {
    for zero in ["wal_init_zero=off", "wal_init_zero=on"] {
        let server = Cluster::new("segments", ROLE_WRITER).set(zero).start();
        let mut client = server.connect();
        client.query("CREATE TABLE t (id int, filler text)");
        let first = server.agent().area.written().written_lsn;
        for round in 0..6 {
            client.query("INSERT INTO t SELECT n, repeat('x', 500) FROM generate_series(1, 3000) n");
            assert_published(&mut client, server.agent().area, 1);
            if round % 2 == 0 {
                client.query("SELECT pg_switch_wal()");
                client.query("CHECKPOINT");
                assert_published(&mut client, server.agent().area, 1);
            }
        }
        assert!(server.agent().area.written().written_lsn > first + 8 * SEGMENT_BYTES);
    }
}

/// The bytes below the published position are in the file when it is published: a reader of the page cache finds the
/// header of every page.
#[test]
fn published_bytes_are_readable() {
    let server = Cluster::new("readable", ROLE_WRITER).start();
    let mut client = server.connect();
    client.query("CREATE TABLE t (filler text)");
    client.send("INSERT INTO t SELECT repeat('x', 2000) FROM generate_series(1, 8000) n");
    let mut page = server.agent().area.written().written_lsn;
    let mut pages = 0;
    while pages < 1000 {
        let written = server.agent().area.written();
        while page < written.written_lsn {
            let (segment, offset) = (page / SEGMENT_BYTES, page % SEGMENT_BYTES);
            let name = format!("pg_wal/{:08X}{:08X}{:08X}", 1, segment / 4096, segment % 4096);
            let mut header = [0; 20];
            let file = std::fs::File::open(server.cluster.pgdata().join(name)).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut header, offset).unwrap();
            let magic = u16::from_le_bytes([header[0], header[1]]);
            let address = u64::from_le_bytes(header[8..16].try_into().unwrap());
            assert_eq!((0xD116, page), (magic, address), "XLOG_PAGE_MAGIC of 17 and xlp_pageaddr");
            page += 8192;
            pages += 1;
        }
    }
    assert!(client.answer().is_ok());
}

/// Promotion changes the timeline: the end-of-recovery record is the first WAL of the writer, and waits as any other.
#[test]
fn promotion_waits_and_publishes_the_new_timeline() {
    let mut server = Cluster::new("promotion", ROLE_WRITER).start();
    server.connect().query("CREATE TABLE t AS SELECT 1 AS id");
    signal(server.process.id(), libc::SIGINT);
    assert!(server.wait().success());
    server.cluster.write_file("standby.signal", "");
    let mut server = server.restart();
    let mut client = server.connect();
    assert_eq!("t", client.value("SELECT pg_is_in_recovery()"));
    assert_eq!("1", client.value("SELECT count(*) FROM t"));

    server.agent().let_settle(false);
    client.query("SELECT pg_promote(wait => false)");

    let waits = within(PATIENCE, || server.agent().area.settled_waiters.load(SeqCst) > 0);
    assert!(waits, "nobody waits for the end-of-recovery record");
    std::thread::sleep(WATCH);
    assert_eq!("t", client.value("SELECT pg_is_in_recovery()"));
    assert_eq!(2, server.agent().area.written().timeline);
    server.agent().let_settle(true);
    assert!(within(PATIENCE, || client.value("SELECT pg_is_in_recovery()") == "f"));
    client.query("INSERT INTO t VALUES (2)");
    assert_published(&mut client, server.agent().area, 2);
    let (segment, timeline) = (server.agent().area.written().final_lsn / SEGMENT_BYTES, 2);
    let name = format!("pg_wal/{:08X}{:08X}{:08X}", timeline, segment / 4096, segment % 4096);
    assert!(server.cluster.pgdata().join(name).exists());
    assert!(server.runs());
}

/// A commit that waits when the fence falls is never acknowledged: its backend ends, and the whole server with it.
#[test]
fn fence_ends_waiting_commits() {
    let mut server = Cluster::new("fence", ROLE_WRITER).start();
    let mut writer = server.connect();
    writer.query("CREATE TABLE t (id int)");
    let children = server.children();
    server.agent().let_settle(false);
    writer.send("INSERT INTO t VALUES (1)");
    assert_eq!(None, writer.bytes_within(WATCH));

    server.agent().fence();
    server.agent().let_settle(true);

    assert_eq!(Some(vec![]), writer.bytes_within(PATIENCE));
    assert!(!server.wait().success());
    assert!(server.log_has("this writer is fenced by its agent"));
    assert!(children.iter().all(|pid| !lives(*pid)));
}

/// Without its agent nothing can be settled any more: who waits ends within a second, and with it the server.
#[test]
fn death_of_the_agent_ends_waiting_commits() {
    let mut server = Cluster::new("gone", ROLE_WRITER).start();
    let mut writer = server.connect();
    writer.query("CREATE TABLE t (id int)");
    server.agent().let_settle(false);
    writer.send("INSERT INTO t VALUES (1)");
    assert_eq!(None, writer.bytes_within(WATCH));

    server.agent().die();

    assert_eq!(Some(vec![]), writer.bytes_within(Duration::from_secs(1)));
    assert!(!server.wait().success());
    assert!(server.log_has("is gone: the process ends"));
}

/// With `wal_sync_method=open_datasync` PostgreSQL never calls `fdatasync`; each write waits instead.
#[test]
fn synchronous_writes_wait_themselves() {
    let server = Cluster::new("datasync", ROLE_WRITER).set("wal_sync_method=open_datasync").start();
    let mut writer = server.connect();
    writer.query("CREATE TABLE t (id int)");
    server.agent().let_settle(false);
    writer.send("INSERT INTO t VALUES (1)");
    assert_eq!(None, writer.bytes_within(WATCH));
    server.agent().let_settle(true);
    assert!(writer.answer().is_ok());
}

/// With `fsync=off` PostgreSQL would acknowledge without asking: such a server ends at its first WAL.
#[test]
fn fsync_off_is_refused() {
    let mut server = Cluster::new("fsync", ROLE_WRITER).set("fsync=off").launch();
    if within(PATIENCE, || Client::try_connect(&server.socket()).is_ok() || !server.runs()) && server.runs() {
        assert!(server.connect().try_query("CREATE TABLE t (id int)").is_err());
    }
    assert!(!server.wait().success());
    assert!(server.log_has("fsync is off: commits would not wait for the safekeepers"));
}

/// PostgreSQL's own benchmark, and a clean stop whose shut-down checkpoint is settled, too.
#[test]
fn pgbench_runs_and_stops_cleanly() {
    let mut server = Cluster::new("pgbench", ROLE_WRITER).start();
    let socket = server.cluster.pgdata().to_str().unwrap().to_owned();
    let port = server.port.to_string();
    let connection = ["-h", &socket, "-p", &port, "-U", "postgres"];
    let pgbench = || {
        let mut command = crate::cluster::command(programs().join("pgbench"));
        command.args(connection);
        command
    };
    run(pgbench().args(["-i", "-q", "-s", "2", "postgres"]));
    let output = run(pgbench().args(["-n", "-c", "8", "-t", "50", "postgres"]));
    assert!(String::from_utf8_lossy(&output.stdout).contains("400/400"));
    assert_eq!("400", server.connect().value("SELECT count(*) FROM pgbench_history"));

    signal(server.process.id(), libc::SIGINT);
    assert!(server.wait().success());
    assert!(server.log_has("database system is shut down"));
    let area = server.agent().area;
    assert!(area.is_settled(area.flush_target()));
}
