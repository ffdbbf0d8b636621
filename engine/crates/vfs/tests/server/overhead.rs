//! What the interception of a read costs whose block is there: nanoseconds over the system call.

use crate::{
    cluster::{Cluster, command, run},
    pages::{BASE, Futexes, region},
};
use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
};
use vfs_abi::{
    ROLE_WRITER,
    blocks::{BlockMap, ENV_BLOCKS, ENV_BLOCKS_DOORBELL, FileKey, Kind, Layout, Purpose},
};

const BLOCKS: u32 = 16;

/// Puts a file into the map whose blocks a fill has brought.
fn filled(map: &BlockMap) {
    let key = FileKey { tablespace: 1663, database: 1, relation: 2, fork: 0, segment: 0 };
    map.initialise(BASE, BASE);
    let file = map.add_file(key, BLOCKS, false, &Futexes).unwrap();
    map.request(file, 0, BLOCKS, Purpose::Read, &Futexes).unwrap();
    while let Some(request) = map.poll_request(&Futexes) {
        assert!(map.begin_fill_write(&request));
        map.finish_fill(&request, &Futexes);
    }
    assert_eq!(Kind::Present, map.kind_of(file, BLOCKS - 1));
}

#[test]
fn warm_read_costs_little_more_than_the_system_call() {
    let mut cluster = Cluster::bare("overhead", ROLE_WRITER);
    let program = cluster.directory.0.join("overhead");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/server/overhead.c");
    run(std::process::Command::new("cc").args(["-O2", "-rdynamic", "-o"]).arg(&program).arg(source));
    let (memory, map): (OwnedFd, _) = region(Layout::new(100, 100).unwrap());
    filled(&map);
    // SAFETY: no pointers.
    let doorbell = crate::agent::owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) });
    for (name, fd) in [(ENV_BLOCKS, memory.as_raw_fd()), (ENV_BLOCKS_DOORBELL, doorbell.as_raw_fd())] {
        cluster.inherited.push(fd);
        cluster.environment.push((name.into(), fd.to_string().into()));
    }
    let pgdata = cluster.pgdata();
    run(command("mkdir").arg("-p").arg(pgdata.join("base/1")));
    cluster.write_file("base/1/2", &"x".repeat(BLOCKS as usize * 8192));

    let mut process = cluster.spawn(program.to_str().unwrap(), &[pgdata.to_str().unwrap()]);
    assert!(process.wait().unwrap().success(), "{}", cluster.log());

    let log = cluster.log();
    let times: Vec<f64> = log.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [hooked, plain] = times[..] else { panic!("{log}") };
    println!("pread of a present block: {hooked:.1} ns, the system call alone: {plain:.1} ns");
    // The least of many rounds on either side; debug builds are a little slower than what ships.
    assert!(hooked - plain < 50.0, "{hooked} ns instead of {plain} ns");
    assert!(map.counters().hits > 100_000);
    assert_eq!(0, map.counters().waits);
    assert!(fs::metadata(pgdata.join("base/1/2")).unwrap().len() > 0);
}
