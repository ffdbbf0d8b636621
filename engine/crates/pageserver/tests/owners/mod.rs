//! Who owns a shard, what owners leave behind, where they get WAL from, and the bounds that they keep.

use std::time::{Duration, Instant};

use pgtypes::Lsn;
use wal::{RecordSpec, rmgr};
use wire::page::{NEWEST, ReaderRole};

use crate::{
    BLOCKS,
    harness::{START, eventually, log_path},
    some_blocks,
    world::{RELATION, World},
};

/// It happened under load: a shard that worked off a backlog compared old commit positions with what a reader waited for, and
/// went from one safekeeper to the next, each of which had everything.
#[test]
fn a_backlog_is_no_reason_to_leave_a_safekeeper() {
    let mut world = World::new("backlog");
    world.server.settings.insert("test_ingest_delay_ms", "400".to_owned());
    world.server.start();
    world.write(0..8);
    eventually("a source of WAL", || world.server.position("ingested_lsn") == world.end());
    let source = world.server.status()["source"].clone();
    let mut end = world.end();
    for _ in 0..30 {
        end = world.write(0..2);
    }
    let begun = Instant::now();
    world.server.reader(ReaderRole::Tool).newest(1, end).unwrap();
    assert!(begun.elapsed() > Duration::from_secs(2), "there was no backlog");
    assert_eq!(
        (source, ""),
        (world.server.status()["source"].clone(), world.server.status()["source_error"].as_str().unwrap())
    );
}

/// A reader takes ten seconds of silence for a server that is frozen: one that waits on its behalf says that it lives.
#[test]
fn a_reader_that_waits_hears_of_the_server_although_nothing_moves() {
    let mut world = World::new("signs");
    world.server.start();
    let end = world.write(0..3);
    let mut reader = world.server.reader(ReaderRole::Tool);
    reader.newest(1, end).unwrap();
    reader.request(1, 1, NEWEST, Lsn(end.0 + 8));
    for _ in 0..4 {
        let begun = Instant::now();
        reader.progress();
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
}

/// Two disks with one generation, by a mistake of whoever gives them out: the second one ends, also when it comes back, and the
/// first goes on over its own restarts, with names for layers that no earlier life has on its way.
#[test]
fn one_generation_that_was_given_to_two_disks_has_one_owner() {
    let mut world = World::new("twice");
    world.server.start();
    world.write(0..BLOCKS);
    world.freeze();
    let mut second = world.server.another("b");
    second.generation = world.server.generation;
    for _ in 0..2 {
        second.spawn();
        assert_eq!((Some(3), None), second.wait_end());
        assert!(second.log_text().contains("given out twice"), "{}", second.log_text());
    }
    // What is on its way into the directory has other names.
    let is_of_life = |life: u64, name: &str| {
        let number = name.split_once('-').and_then(|(_, number)| u64::from_str_radix(number, 16).ok());
        number.is_some_and(|number| number >> 40 == life)
    };
    for life in 1..3 {
        world.server.kill();
        world.server.start();
        world.write(some_blocks(life as u32, 50));
        world.freeze();
        let layers = world.server.objects_of("layers");
        let names: Vec<_> = layers.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert!(names.iter().any(|name| is_of_life(life, name)), "{names:?}");
    }
    world.check_history(START, 3);
}

/// A layer that was uploaded and never named would lie in object storage for ever.
#[test]
fn what_a_dead_owner_left_is_removed_by_the_next() {
    let mut world = World::new("orphans");
    world.server.environment.insert("LAKEBASE_DIE_AT", "frozen layer uploaded".to_owned());
    world.server.spawn();
    world.write(0..BLOCKS);
    assert_eq!((None, Some(9)), world.server.wait_end());
    world.server.environment.clear();
    world.server.lose_disk();
    let left = world.server.objects_of("layers");
    let orphan = left.last().unwrap();
    assert!(orphan.to_str().unwrap().ends_with("0000000000000001-0000000000000001"), "{left:?}");
    world.server.start();
    world.freeze();
    // The newest manifest is of this owner, but of an earlier life: what that knew was removable is not known.
    world.server.kill();
    world.server.start();
    eventually("the orphan to go", || !orphan.exists());
    eventually("its count", || world.server.metric("orphans_total") == 1.0);
    world.check_history(START, 3);
    world.server.kill();
    world.server.start();
    world.check(world.end());
}

/// All that a page server has is in object storage, and safekeepers have removed what it needs: the archive has that.
#[test]
fn a_shard_that_lost_its_disk_goes_on_from_the_archive() {
    let mut world = World::with_archive("from-archive");
    world.server.settings.insert("freeze_bytes", "\"8MiB\"".to_owned());
    world.server.start();
    world.write(0..BLOCKS);
    world.freeze();
    world.server.kill();
    world.server.lose_disk();
    for safekeeper in &world.cluster.safekeepers {
        // An operator has given the shard up.
        safekeeper.call("DELETE", &format!("{}/shards/7", log_path()), None);
        safekeeper.call("DELETE", &format!("{}/consumers/base_backup", log_path()), None);
    }
    for round in 0..12 {
        world.write(some_blocks(round, 400));
    }
    let removed = START.advance(2 * (16 << 20));
    let safekeepers = &world.cluster.safekeepers;
    world.writer.run(|_| safekeepers.iter().all(|safekeeper| safekeeper.position("oldest_lsn") >= removed));
    world.server.start();
    world.check(world.end());
    world.check_history(START, 4);
    assert!(world.server.log_text().contains("reading WAL from the archive"), "{}", world.server.log_text());
    let source = world.server.status()["source"].clone();
    assert_ne!("archive", source, "what is not archived comes from a safekeeper");
    assert!(!world.server.status()["troubles"].as_object().unwrap().contains_key("no WAL from a safekeeper"));
}

/// Indexes and blocks in memory stay within their bounds; what is needed again is read again.
#[test]
fn memory_of_layer_files_is_bounded() {
    let mut world = World::new("indexes");
    world.server.index_cache_bytes = "0B".to_owned();
    world.server.block_cache_bytes = "1MiB".to_owned();
    world.server.start();
    world.write(0..BLOCKS);
    for round in 0..4 {
        world.write(some_blocks(round, 100));
    }
    world.freeze();
    world.check_history(START, 2);
    eventually("indexes to go", || world.server.metric("index_bytes") == 0.0);
    world.check_history(START, 2);
    eventually("indexes that were needed to be counted", || world.server.metric("index_bytes") > 0.0);
    world.server.call("POST", "/v1/compact");
    eventually("indexes to go again", || world.server.metric("index_bytes") == 0.0);
    world.server.kill();
    world.server.start();
    world.check_history(START, 2);
}

/// Copied pages are in memory until their layer is written. Ingest stops before a copy that is larger than what was allowed, with
/// older positions served, instead of being killed for it at each start; and goes on when it is allowed more.
#[test]
fn a_database_copy_that_is_too_large_stops_ingest_by_name() {
    const TROUBLE: &str = "ingest has stopped: a database is copied that does not fit into memory";
    let mut world = World::new("copy");
    world.server.settings.insert("copy_bytes_max", "\"1MiB\"".to_owned());
    world.server.start();
    let before = world.write(0..BLOCKS);
    // A batch with the copy ends behind it.
    world.check(before);
    // xl_dbase_create_file_copy_rec: database, tablespace, and those of the source.
    let ids = [6, RELATION.tablespace, RELATION.database, RELATION.tablespace];
    let mut payload = vec![255, 16];
    ids.iter().for_each(|id: &u32| payload.extend_from_slice(&id.to_le_bytes()));
    world.write_record(RecordSpec { rmgr: rmgr::DBASE, info: 0, xid: 0, payload: &payload });
    world.write(0..3);
    eventually("ingest to stop", || world.server.status()["troubles"].as_object().unwrap().contains_key(TROUBLE));
    let trouble = world.server.status()["troubles"][TROUBLE].as_str().unwrap().to_owned();
    assert!(trouble.contains("copy_bytes_max") && trouble.contains(&(BLOCKS * 8192).to_string()), "{trouble}");
    world.check(before);
    assert!(world.server.position("ingested_lsn") <= before.advance(64));
    world.server.kill();
    world.server.settings.insert("copy_bytes_max", "\"16MiB\"".to_owned());
    world.server.start();
    world.check(world.end());
    world.freeze();
    world.check_history(before, 2);
}

/// Object storage is away for longer than the local backlog lasts, and is a bad one before and after: ingest waits at its limit,
/// memory and disk stay bounded, and everything goes on by itself.
#[test]
fn ingest_waits_at_the_limit_of_its_backlog_and_goes_on_by_itself() {
    const TROUBLE: &str = "ingest waits: object storage or the local disk does not take layers";
    const LIMIT: u64 = 1 << 20;
    let mut world = World::new("backlog-limit");
    let faults = "seed:3,fail:30,after:3,throttle:5,delay:30,outage:4000+15000";
    world.server.environment.insert("LAKEBASE_STORAGE_FAULTS", faults.to_owned());
    world.server.settings.insert("backlog_bytes_max", "\"1MiB\"".to_owned());
    world.server.start();
    world.write(0..BLOCKS);
    let troubles = |world: &World| world.server.status()["troubles"].as_object().unwrap().clone();
    let mut backlog = 0;
    let mut round = 0;
    eventually("ingest to wait", || {
        let status = world.server.status();
        // Its own lag is what it heard of: it does not listen while it waits.
        let ingested: Lsn = status["ingested_lsn"].as_str().unwrap().parse().unwrap();
        if world.end().bytes_since(ingested) < 1 << 20 {
            round += 1;
            world.write(some_blocks(round, 20));
        }
        backlog = backlog.max(status["backlog_bytes"].as_u64().unwrap() + status["open_bytes"].as_u64().unwrap());
        troubles(&world).contains_key(TROUBLE)
    });
    // The backlog, one open layer with the batch that filled it, and what was frozen beside.
    assert!((LIMIT..LIMIT + (4 << 20)).contains(&backlog), "{backlog}");
    assert!(world.server.position("ingested_lsn") < world.end());
    eventually("everything to be ingested", || world.server.position("ingested_lsn") >= world.end());
    world.freeze();
    eventually("no trouble to be left", || troubles(&world).is_empty());
    world.server.kill();
    world.server.environment.clear();
    world.server.lose_disk();
    world.server.start();
    world.check_history(START, 3);
}
