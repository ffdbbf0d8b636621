//! What else changes for PostgreSQL: flushes of the cache, tablespaces, and whom a dead postmaster takes with it.

use crate::{
    PATIENCE,
    client::Client,
    cluster::{Cluster, lives, signal},
    within,
};
use std::{io, time::Duration};
use vfs_abi::ROLE_WRITER;

/// Every real flush fails with EIO: PostgreSQL, which panics on a failed flush of WAL or data, does not notice.
#[test]
fn no_flush_of_the_data_directory_reaches_the_kernel() {
    let mut server = Cluster::new("flush", ROLE_WRITER).set("data_sync_retry=off").prepare(forbid_flushes).start();
    let mut client = server.connect();
    client.query("CREATE TABLE t AS SELECT n FROM generate_series(1, 100000) n");
    client.query("CHECKPOINT");
    client.query("CREATE DATABASE copy STRATEGY file_copy");
    client.query("CREATE UNLOGGED TABLE u AS SELECT 1 AS n");
    client.query("SELECT pg_switch_wal()");
    client.query("CHECKPOINT");
    assert!(server.runs());
    signal(server.process.id(), libc::SIGINT);
    assert!(server.wait().success());
    assert!(!server.log_has("Input/output error"), "{}", server.cluster.log());
}

/// Installs a seccomp filter: `fsync`, `fdatasync` and `sync_file_range` fail with EIO.
fn forbid_flushes() -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let skip_unless = |number: libc::c_long| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: 1,
        k: number as u32,
    };
    let fail = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EIO as u32);
    let mut program = [
        // The number of the system call is the first word of `struct seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        skip_unless(libc::SYS_fsync),
        fail,
        skip_unless(libc::SYS_fdatasync),
        fail,
        skip_unless(libc::SYS_sync_file_range),
        fail,
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter is valid for the calls; both are allowed between fork and exec.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A file outside PGDATA is flushed for real: with flushes forbidden, its error arrives.
#[test]
fn files_outside_are_flushed_for_real() {
    let server = Cluster::new("outside", ROLE_WRITER).prepare(forbid_flushes).start();
    let mut client = Client::try_connect_replication(&server.socket()).unwrap();
    let target = server.cluster.directory.0.join("backup");
    std::fs::create_dir(&target).unwrap();
    std::fs::set_permissions(&target, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let sql = format!("BASE_BACKUP ( TARGET 'server', TARGET_DETAIL '{}', CHECKPOINT 'fast' )", target.display());
    let error = client.try_query(&sql).unwrap_err().to_string();
    assert!(error.contains("could not fsync file") && error.contains("Input/output error"), "{error}");
}

#[test]
fn tablespace_with_a_location_is_refused() {
    let mut server = Cluster::new("tablespace", ROLE_WRITER).start();
    let mut client = server.connect();
    let location = server.cluster.directory.0.join("elsewhere");
    client.query(&format!("COPY (SELECT 1) TO PROGRAM 'mkdir -m 700 {}'", location.display()));

    let error = client.try_query(&format!("CREATE TABLESPACE real LOCATION '{}'", location.display())).unwrap_err();

    assert!(error.to_string().contains("Operation not permitted"), "{error}");
    assert!(server.log_has("a tablespace with a location is refused"));
    client.query("CREATE TABLESPACE inplace LOCATION ''");
    client.query("CREATE TABLE t TABLESPACE inplace AS SELECT 1 AS n");
    client.query("CHECKPOINT");
    assert_eq!("1", client.value("SELECT n FROM t"));
    assert!(server.runs());
}

/// Children of the postmaster are process groups of their own, and a running query looks at no flag: only a signal that
/// cannot be caught ends them all.
#[test]
fn killed_postmaster_takes_running_backends_along() {
    let mut server = Cluster::new("kill", ROLE_WRITER).start();
    let mut client = server.connect();
    client.send("SELECT count(*) FROM generate_series(1, 1000000000000) n");
    let children = server.children();
    assert!(children.contains(&client.pid) && children.len() >= 5, "{children:?}");

    signal(server.process.id(), libc::SIGKILL);

    let ended = within(Duration::from_secs(1), || children.iter().all(|pid| !lives(*pid)));
    assert!(ended, "still running: {:?}", children.iter().filter(|pid| lives(**pid)).collect::<Vec<_>>());
    assert_eq!(Some(vec![]), client.bytes_within(PATIENCE));
    assert!(!server.wait().success());
}

/// The postmaster itself dies with the thread that started it, and everything with it.
#[test]
fn death_of_the_launcher_ends_the_server() {
    let server = std::thread::spawn(|| {
        let server = Cluster::new("launcher", ROLE_WRITER).start();
        let mut client = server.connect();
        client.send("SELECT count(*) FROM generate_series(1, 1000000000000) n");
        (server, client)
    });
    let (mut server, mut client) = server.join().unwrap();
    assert!(!server.wait().success());
    assert_eq!(Some(vec![]), client.bytes_within(Duration::from_secs(1)));
}
