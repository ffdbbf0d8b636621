//! The archive of real safekeepers: what is sealed gets into the object store once, and stays on the disks until it did.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use std::{fs, io::Write, path::PathBuf};

use harness::{Cluster, SEGMENT_BYTES, START, SYSTEM, Safekeeper, Variant, Writer, log, log_path};
use pgtypes::Lsn;
use remote_storage::{RemoteStorage, WalArchive, block_on};
use serde_json::{Value, json};

/// Segment `number` of the log.
fn segment_start(number: u64) -> Lsn {
    START.advance(number * SEGMENT_BYTES)
}

/// The archive of a cluster, in a directory.
struct Store(PathBuf);

impl Store {
    /// Tells all safekeepers about it; they are restarted.
    fn of(cluster: &mut Cluster) -> Store {
        let directory = cluster.safekeepers[0].directory.parent().unwrap().join("store");
        for safekeeper in &mut cluster.safekeepers {
            safekeeper.kill();
            let path = safekeeper.directory.join("safekeeper.toml");
            let mut config = fs::File::options().append(true).open(path).unwrap();
            writeln!(config, "[archive]\nobject_storage = \"file://{}\"", directory.display()).unwrap();
            safekeeper.start();
        }
        Store(directory)
    }

    fn archive(&self) -> WalArchive {
        WalArchive::new(RemoteStorage::open(&format!("file://{}", self.0.display())).unwrap(), log())
    }

    fn segments(&self) -> Vec<Lsn> {
        block_on(self.archive().list()).unwrap()
    }
}

/// Up to where a safekeeper has archived a log; `None` when the archive is no consumer of it.
fn archived(safekeeper: &Safekeeper, path: &str) -> Option<Lsn> {
    let status = safekeeper.call("GET", path, None);
    let consumers = status["consumers"].as_array().unwrap().clone();
    let archive = consumers.into_iter().find(|consumer| consumer["name"] == "archive")?;
    Some(archive["confirmed_lsn"].as_str().unwrap().parse().unwrap())
}

/// Waits until a safekeeper has archived everything before `end`. The writer has to tell commit positions meanwhile.
fn until_archived(writer: &mut Writer, safekeeper: &Safekeeper, end: Lsn) {
    writer.run(|_| archived(safekeeper, &log_path()) == Some(end));
}

#[test]
fn sealed_segments_get_into_the_archive_and_what_is_not_sealed_does_not() {
    let mut cluster = Cluster::new("archive", Variant::default());
    let store = Store::of(&mut cluster);
    let mut writer = Writer::elect(&cluster, 1);
    writer.commit(35 << 20);
    for safekeeper in &cluster.safekeepers {
        until_archived(&mut writer, safekeeper, segment_start(2));
    }
    assert_eq!(vec![segment_start(0), segment_start(1)], store.segments());
    for (number, wal) in writer.wal.chunks_exact(SEGMENT_BYTES as usize).enumerate() {
        assert!(wal == block_on(store.archive().get_segment(segment_start(number as u64))).unwrap(), "{number}");
    }
    // One that was away archives what it has missed, and one that died goes on where it was.
    cluster.safekeepers[2].kill();
    writer.commit(20 << 20);
    cluster.safekeepers[2].start();
    cluster.safekeepers[1].kill();
    cluster.safekeepers[1].start();
    for safekeeper in &cluster.safekeepers {
        until_archived(&mut writer, safekeeper, segment_start(3));
    }
    assert_eq!(3, store.segments().len());
    for safekeeper in &cluster.safekeepers {
        assert!(!safekeeper.log_text().contains("is not archived"));
    }
}

/// WAL that the archive does not have is nowhere else.
#[test]
fn wal_stays_on_the_disk_until_it_is_archived_and_a_difference_is_never_overwritten() {
    let mut cluster = Cluster::new("archive-differs", Variant::default());
    let store = Store::of(&mut cluster);
    let mut writer = Writer::elect(&cluster, 1);
    // Of another history, under the name of this one.
    let foreign = vec![0xEE; SEGMENT_BYTES as usize];
    block_on(store.archive().put_segment(START, foreign.clone())).unwrap();
    writer.commit(20 << 20);
    let safekeeper = &cluster.safekeepers[0];
    safekeeper.call("DELETE", &format!("{}/consumers/base_backup", log_path()), None);
    writer.run(|_| {
        let text = safekeeper.log_text();
        text.contains("WAL is not archived") && text.contains("is there with other bytes")
    });
    assert_eq!(Some(START), archived(safekeeper, &log_path()));
    assert_eq!(START, safekeeper.position("oldest_lsn"));
    assert!(foreign == block_on(store.archive().get_segment(START)).unwrap());

    // Somebody found out which one is right.
    let wrong = store.0.join(format!("{}/wal/{:016x}", log(), START.0));
    fs::remove_file(wrong).unwrap();
    until_archived(&mut writer, safekeeper, segment_start(1));
    assert!(writer.wal[..SEGMENT_BYTES as usize] == *block_on(store.archive().get_segment(START)).unwrap());
    writer.run(|_| safekeeper.position("oldest_lsn") == segment_start(1));
}

/// Another member may let its WAL go a moment later: the archive is a consumer from the first byte on. A log that begins
/// within a segment is archived with zeros before.
#[test]
fn a_new_log_is_held_for_the_archive_from_its_first_byte_on() {
    let mut cluster = Cluster::new("archive-new", Variant::default());
    let store = Store::of(&mut cluster);
    let other = format!("/v1/logs/{}/33333333-3333-3333-3333-333333333333", log().cluster);
    let members: Vec<Value> = cluster
        .configuration
        .members
        .iter()
        .map(|member| json!({"member": member.member.0, "disk": member.disk.to_string(), "address": member.address}))
        .collect();
    let begin = START.advance(1 << 20);
    let body = json!({"system_id": SYSTEM.0.to_string(), "segment_bytes": 1 << 20, "start_lsn": begin.to_string(),
        "timeline": 1, "max_full_xid": "3", "configuration": {"generation": 1, "members": members}});
    for safekeeper in &cluster.safekeepers {
        safekeeper.call("PUT", &other, Some(&body));
        assert_eq!(Some(begin), archived(safekeeper, &other));
    }
    assert!(store.segments().is_empty());
}

/// The bytes are safe with the others: a flipped bit on one disk does not hold the log there for ever.
#[test]
fn a_damaged_segment_is_archived_by_those_who_have_it_whole() {
    let mut cluster = Cluster::new("archive-damage", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    writer.commit(18 << 20);
    let sealed = |path: PathBuf| fs::read(path).is_ok_and(|file| file[SEGMENT_BYTES as usize..][..8] != [0; 8]);
    writer.run(|_| cluster.safekeepers.iter().all(|safekeeper| sealed(safekeeper.segment(START))));
    let path = cluster.safekeepers[0].segment(START);
    let mut file = fs::read(&path).unwrap();
    file[9_000_000] ^= 0x10;
    fs::write(&path, file).unwrap();
    let store = Store::of(&mut cluster);
    for safekeeper in &cluster.safekeepers {
        until_archived(&mut writer, safekeeper, segment_start(1));
    }
    assert!(cluster.safekeepers[0].log_text().contains("is damaged"));
    assert!(writer.wal[..SEGMENT_BYTES as usize] == *block_on(store.archive().get_segment(START)).unwrap());
}
