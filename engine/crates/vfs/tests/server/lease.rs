//! Rule V6: no byte leaves for a client without a read lease.

use crate::{
    PATIENCE, WATCH,
    cluster::{Cluster, lives, programs, signal},
    within,
};
use std::{
    process::Stdio,
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};
use vfs_abi::{ROLE_REPLICA, ROLE_WRITER};

/// A result that is ready when the lease has run out stays in the server until it is renewed.
#[test]
fn result_waits_for_the_lease() {
    let server = Cluster::new("lease", ROLE_WRITER).start();
    let mut client = server.connect();
    server.agent().lose_lease();

    client.send("SELECT 42");

    assert_eq!(None, client.bytes_within(WATCH));
    assert_eq!(1, server.agent().area.lease_waits.load(SeqCst));
    server.agent().let_renew(true);
    assert_eq!(vec![vec!["42".to_owned()]], client.answer().unwrap());
    assert_eq!("43", client.value("SELECT 43"));
}

/// A backend that is frozen in the middle of a query and thaws after its lease ran out does not answer, whatever the
/// agent is doing meanwhile.
#[test]
fn thawed_backend_does_not_answer() {
    let server = Cluster::new("thaw", ROLE_WRITER).start();
    let mut client = server.connect();
    client.send("SELECT pg_sleep(0.2), 42");
    signal(client.pid, libc::SIGSTOP);
    server.agent().lose_lease();

    signal(client.pid, libc::SIGCONT);

    assert_eq!(None, client.bytes_within(WATCH));
    server.agent().let_renew(true);
    assert_eq!("42", client.answer().unwrap()[0][1]);
}

/// A large result, already under way, stops when the lease ends and goes on when it is renewed.
#[test]
fn stream_of_rows_stops_and_goes_on() {
    let server = Cluster::new("stream", ROLE_WRITER).start();
    let mut client = server.connect();
    client.send("SELECT n, repeat('x', 1000) FROM generate_series(1, 20000) n");
    assert!(client.bytes_within(PATIENCE).is_some_and(|bytes| !bytes.is_empty()));
    server.agent().lose_lease();
    // What the kernel had taken before is drained; then nothing comes.
    let end = Instant::now() + PATIENCE;
    while client.bytes_within(WATCH).is_some() {
        assert!(Instant::now() < end);
    }
    assert_eq!(None, client.bytes_within(WATCH));
    server.agent().let_renew(true);
    assert!(client.bytes_within(PATIENCE).is_some_and(|bytes| !bytes.is_empty()));
}

#[test]
fn replica_needs_no_lease() {
    let cluster = Cluster::new("nolease", ROLE_REPLICA);
    cluster.agent.let_renew(false);
    let server = cluster.start();
    assert_eq!("1", server.connect().value("SELECT 1"));
}

/// The fence ends a backend that waits to answer; its client sees the connection end, without a byte.
#[test]
fn fence_ends_waiting_sends() {
    let mut server = Cluster::new("fencesend", ROLE_WRITER).start();
    let mut client = server.connect();
    server.agent().lose_lease();
    client.send("SELECT 42");
    assert_eq!(None, client.bytes_within(WATCH));

    server.agent().fence();
    server.agent().let_renew(true);

    assert_eq!(Some(vec![]), client.bytes_within(PATIENCE));
    assert!(!server.wait().success());
}

/// A fenced writer does not answer even while its lease still runs.
#[test]
fn fence_outranks_a_running_lease() {
    let server = Cluster::new("fencelease", ROLE_WRITER).start();
    let mut client = server.connect();
    server.agent().fence();
    client.send("SELECT 42");
    assert_eq!(Some(vec![]), client.bytes_within(PATIENCE));
}

#[test]
fn death_of_the_agent_ends_waiting_sends() {
    let server = Cluster::new("gonesend", ROLE_WRITER).start();
    let mut client = server.connect();
    server.agent().lose_lease();
    client.send("SELECT 42");
    assert_eq!(None, client.bytes_within(WATCH));

    server.agent().die();

    assert_eq!(Some(vec![]), client.bytes_within(Duration::from_secs(1)));
}

/// After `lease_wait_timeout` the client is given up in an orderly way: the server itself goes on.
#[test]
fn client_is_given_up_after_the_timeout() {
    let mut server = Cluster::new("giveup", ROLE_WRITER).start();
    let mut client = server.connect();
    server.agent().area.lease_wait_timeout_ms.store(700, SeqCst);
    server.agent().lose_lease();
    let start = Instant::now();
    client.send("SELECT 42");

    assert_eq!(Some(vec![]), client.bytes_within(PATIENCE));
    assert!(start.elapsed() >= Duration::from_millis(700));
    assert!(server.log_has("no read lease for 700 ms"));
    assert!(server.log_has("connection to client lost"));
    server.agent().let_renew(true);
    assert!(server.runs());
    assert_eq!("1", server.connect().value("SELECT 1"));
}

/// A backend that waits for the lease can be terminated: sessions need not stay until the timeout.
#[test]
fn waiting_backend_can_be_terminated() {
    let mut server = Cluster::new("terminate", ROLE_WRITER).start();
    let mut client = server.connect();
    server.agent().lose_lease();
    client.send("SELECT 42");
    assert_eq!(None, client.bytes_within(WATCH));

    signal(client.pid, libc::SIGTERM);

    // Well before `lease_wait_timeout`, 60 s.
    assert_eq!(Some(vec![]), client.bytes_within(PATIENCE / 4));
    assert!(within(PATIENCE / 4, || !lives(client.pid)));
    server.agent().let_renew(true);
    assert_eq!("1", server.connect().value("SELECT 1"));
    assert!(server.runs());
}

/// Encrypted connections go through the same call (`secure_raw_write`, be-secure.c).
#[test]
fn encrypted_result_waits_for_the_lease() {
    let cluster = Cluster::new("tls", ROLE_WRITER).set("listen_addresses=127.0.0.1").set("ssl=on");
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    cluster.write_file("server.crt", &certified.cert.pem());
    cluster.write_file("server.key", &certified.signing_key.serialize_pem());
    let server = cluster.start();
    let port = server.port.to_string();
    let mut psql = crate::cluster::command(programs().join("psql"));
    psql.args(["-h", "127.0.0.1", "-p", &port, "-U", "postgres", "-d", "postgres", "-XAtq"]);
    psql.args(["-c", "SELECT ssl, 'connected' FROM pg_stat_ssl WHERE pid = pg_backend_pid()"]);
    // The connection is made while the lease runs; the second answer waits.
    psql.args(["-c", "SELECT pg_sleep(3)", "-c", "SELECT 'answered'"]);
    psql.env("PGSSLMODE", "require").stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut psql = psql.spawn().unwrap();
    let mut output = std::io::BufReader::new(psql.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    assert_eq!("t|connected\n", line);

    server.agent().lose_lease();

    let waits = within(PATIENCE, || server.agent().area.lease_waits.load(SeqCst) == 1);
    assert!(waits, "no send waited for the lease");
    std::thread::sleep(WATCH);
    assert!(psql.try_wait().unwrap().is_none());
    server.agent().let_renew(true);
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut output, &mut rest).unwrap();
    assert_eq!("\nanswered\n", rest);
    assert!(psql.wait().unwrap().success());
}

/// The WAL receiver talks to a server, not to a client: it streams without a lease, or a writer could not recover
/// before its first one. What it writes is published as any WAL.
#[test]
fn wal_receiver_needs_no_lease() {
    let mut upstream = Cluster::new("upstream", ROLE_REPLICA).start();
    signal(upstream.process.id(), libc::SIGINT);
    assert!(upstream.wait().success());
    let standby = Cluster::copy_of(&upstream.cluster, "standby", ROLE_WRITER);
    let upstream = upstream.restart();
    let socket = upstream.cluster.pgdata();
    let source = format!("primary_conninfo=host={} port={} user=postgres", socket.display(), upstream.port);
    standby.write_file("standby.signal", "");
    standby.agent.lose_lease();
    let lease = standby.agent.area.lease_until_ns.load(SeqCst);
    let standby = standby.set(&source).launch();
    let mut client = upstream.connect();

    let streams = within(PATIENCE, || client.value("SELECT count(*) FROM pg_stat_replication") == "1");
    client.query("CREATE TABLE t AS SELECT n FROM generate_series(1, 10000) n");
    let flushed = within(PATIENCE, || {
        client.value("SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= pg_current_wal_lsn()") == "1"
    });

    assert!(streams && flushed, "{}", standby.cluster.log());
    assert_eq!(lease, standby.agent().area.lease_until_ns.load(SeqCst));
    let written = standby.agent().area.written();
    assert!(written.written_lsn > crate::cluster::SEGMENT_BYTES && written.timeline == 1, "{written:x?}");
    assert!(standby.agent().area.wal_flushes.load(SeqCst) > 0);
}
