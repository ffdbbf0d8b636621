//! Rule V7: a server that cannot be proved to belong to its agent does not start, and says why in one line.

use crate::{
    PATIENCE,
    cluster::{Cluster, TRUST, command, library, remove_segment, run},
    within,
};
use std::{os::fd::AsRawFd, sync::atomic::Ordering::SeqCst};
use vfs_abi::{
    AREA_BYTES, ENV_AGENT_FD, ENV_AREA, ENV_DOORBELL, ENV_PGDATA, ENV_TRUST, EXIT_REFUSED, LIBRARY_FILE, ROLE_WRITER,
};

/// A case: how the start is spoiled, and what the line says.
type Case = (&'static str, fn(&mut Cluster), &'static str);

#[test]
fn every_wrong_start_is_refused_with_one_line() {
    let cases: &[Case] = &[
        ("no area", |c| c.set_environment(ENV_AREA, None), "LAKEBASE_VFS_AREA is not set: no compute agent"),
        ("no PGDATA", |c| c.set_environment(ENV_PGDATA, None), "LAKEBASE_VFS_PGDATA is not set"),
        ("no trust", |c| c.set_environment(ENV_TRUST, None), "LAKEBASE_VFS_TRUST is not set"),
        ("no doorbell", |c| c.set_environment(ENV_DOORBELL, None), "LAKEBASE_VFS_DOORBELL is not set"),
        ("no pipe", |c| c.set_environment(ENV_AGENT_FD, None), "LAKEBASE_VFS_AGENT_FD is not set"),
        ("empty area", |c| c.set_environment(ENV_AREA, Some("")), "LAKEBASE_VFS_AREA is not set"),
        ("area is no number", |c| c.set_environment(ENV_AREA, Some("x")), "LAKEBASE_VFS_AREA has the bad value \"x\""),
        ("area is stdin", |c| c.set_environment(ENV_AREA, Some("0")), "LAKEBASE_VFS_AREA has the bad value \"0\""),
        ("area is absent", |c| c.set_environment(ENV_AREA, Some("/nowhere/area")), "cannot map the area"),
        ("doorbell is closed", |c| c.set_environment(ENV_DOORBELL, Some("900")), "names descriptor 900"),
        ("pipe is closed", |c| c.set_environment(ENV_AGENT_FD, Some("901")), "names descriptor 901"),
        ("magic", |c| c.agent.area.magic.store(7, SeqCst), "magic number 0x0000000000000007 instead of"),
        ("segment size", |c| c.agent.area.segment_bytes.store(12345, SeqCst), "WAL segment size of 12345 bytes"),
        ("role", |c| c.agent.area.role.store(9, SeqCst), "unknown role 9"),
        ("fenced", |c| c.agent.fence(), "this writer is fenced"),
        ("dead agent", |c| c.agent.die(), "the compute agent is gone"),
        ("foreign PGDATA", |c| c.write_trust(Some("other/1/1/x")), "PGDATA belongs to \"other/1/1/x\""),
        ("trust is a prefix", |c| c.write_trust(Some(&TRUST[1..])), "PGDATA belongs to"),
        ("PGDATA without trust", |c| c.write_trust(None), "which says for whom PGDATA is true"),
        ("relative PGDATA", |c| c.set_environment(ENV_PGDATA, Some("data")), "LAKEBASE_VFS_PGDATA has the bad value"),
        ("absent PGDATA", |c| c.set_environment(ENV_PGDATA, Some("/nowhere")), "no data directory \"/nowhere\""),
        ("area too long", |c| resize(c, 2 * AREA_BYTES as i64), "the area has 8192 bytes instead of 4096"),
    ];
    for (name, spoil, expected) in cases {
        let mut cluster = Cluster::bare("refused", ROLE_WRITER);
        spoil(&mut cluster);

        let mut server = cluster.launch();

        assert_eq!(Some(EXIT_REFUSED), server.wait().code(), "{name}: {}", server.cluster.log());
        let log = server.cluster.log();
        assert_eq!(1, log.lines().count(), "{name}: {log}");
        assert!(log.contains(expected) && log.contains("PostgreSQL is not started"), "{name}: {log}");
    }
}

fn resize(cluster: &Cluster, bytes: i64) {
    // SAFETY: integer arguments.
    assert_eq!(0, unsafe { libc::ftruncate(cluster.agent.memory.as_raw_fd(), bytes) });
}

/// The area may also be a file, and the trust file may end in a newline.
#[test]
fn area_may_be_a_path() {
    let mut cluster = Cluster::new("path", ROLE_WRITER);
    let path = format!("/proc/self/fd/{}", cluster.agent.memory.as_raw_fd());
    cluster.set_environment(ENV_AREA, Some(&path));
    cluster.write_trust(Some(&format!("{TRUST}\n")));
    let server = cluster.start();
    assert_eq!("1", server.connect().value("SELECT 1"));
}

/// The environment names one data directory and the command line another: the server ends before it writes WAL.
#[test]
fn another_data_directory_is_refused() {
    let mut cluster = Cluster::new("otherdata", ROLE_WRITER);
    let claimed = cluster.directory.0.join("claimed");
    run(command("cp").arg("-a").arg(cluster.pgdata()).arg(&claimed));
    cluster.set_environment(ENV_PGDATA, claimed.to_str());
    let mut server = cluster.launch();
    assert!(!server.wait().success());
    assert!(server.log_has("the server runs in another data directory than its agent's"));
}

/// An agent that is wrong about the segment size would settle wrong positions.
#[test]
fn wrong_segment_size_is_refused() {
    let cluster = Cluster::new("segsize", ROLE_WRITER);
    cluster.agent.area.segment_bytes.store(16 << 20, SeqCst);
    let mut server = cluster.launch();
    assert!(!server.wait().success());
    assert!(server.log_has("WAL segments have 1048576 bytes, but the agent expects 16777216"));
}

/// Programs that PostgreSQL starts know nothing of the library and hold none of its descriptors.
#[test]
fn children_programs_are_free_of_the_library() {
    let server = Cluster::new("programs", ROLE_WRITER).start();
    let mut client = server.connect();
    client.query("CREATE TEMP TABLE output (line text)");
    client.query("COPY output FROM PROGRAM 'env; ls -l /proc/self/fd; cat /proc/self/maps | sed s/.*\\\\///'");
    let lines: Vec<String> = client.query("SELECT line FROM output").into_iter().flatten().collect();
    let leaks = |word: &str| lines.iter().filter(|line| line.contains(word)).cloned().collect::<Vec<_>>();
    assert!(lines.len() > 10);
    for word in ["LAKEBASE_VFS", "LD_PRELOAD", LIBRARY_FILE, "eventfd", "vfs-area"] {
        assert_eq!(Vec::<String>::new(), leaks(word), "{word}");
    }
}

/// Other programs that the environment reaches on the way to PostgreSQL run as they are.
#[test]
fn other_programs_are_left_alone() {
    let output = run(std::process::Command::new("sh")
        .args(["-c", "env; echo text > /dev/null; ls /"])
        .env("LD_PRELOAD", library()));
    assert!(String::from_utf8_lossy(&output.stdout).contains(LIBRARY_FILE), "the environment is untouched");
    assert_eq!("", String::from_utf8_lossy(&output.stderr));
}

/// `initdb` starts a PostgreSQL of its own, in a directory that belongs to no agent: it ends at its first WAL.
#[test]
fn initdb_is_refused() {
    let cluster = Cluster::bare("initdb", ROLE_WRITER);
    let target = cluster.directory.0.join("fresh");
    let mut process = cluster.spawn("initdb", &["--no-clean", "-D", target.to_str().unwrap()]);
    assert!(within(PATIENCE, || process.try_wait().unwrap().is_some()));
    assert!(!process.wait().unwrap().success());
    let log = cluster.log();
    assert!(log.contains("the server runs in another data directory than its agent's"), "{log}");
    remove_segment(&std::fs::read_to_string(target.join("postmaster.pid")).unwrap());
}
