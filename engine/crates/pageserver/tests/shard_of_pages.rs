//! A page server as its readers see it: whatever dies, is lost or damaged, a page is that of its position, or an error.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../safekeeper/tests/harness/mod.rs"]
mod harness;
mod owners;
mod replay;
mod world;

use std::path::PathBuf;

use harness::{START, eventually};
use pgtypes::{Lsn, Term};
use wire::page::{NEWEST, PageErrorCode, PageMessage, ReaderRole, TakeLease};
use world::{World, check_page};

/// Blocks over several stripes.
const BLOCKS: u32 = 300;

fn some_blocks(seed: u32, count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(move |number| (number.wrapping_mul(7919) ^ seed.wrapping_mul(104_729)) % BLOCKS)
}

/// The thin thread: newest and older positions, from memory and from layers, over restarts with and without the disk.
#[test]
fn pages_are_those_of_their_position_wherever_they_lie() {
    let mut world = World::new("positions");
    world.server.settings.insert("freeze_bytes", "\"64MiB\"".to_owned());
    world.server.start();
    world.write(0..BLOCKS);
    let first = world.end();
    world.write(some_blocks(1, 200));
    world.check_history(START, 4);

    world.freeze();
    assert_eq!(world.end(), world.server.position("durable_lsn"));
    assert_eq!(1, world.server.status()["level0_layers"]);
    world.check_history(START, 4);

    world.write(some_blocks(2, 200));
    world.server.kill();
    world.server.start();
    world.check_history(first, 4);
    world.freeze();
    world.server.kill();
    world.server.lose_disk();
    world.server.start();
    world.check_history(START, 6);
    assert!(world.server.metric("remote_reads_total") > 0.0);
}

/// Many requests on one connection, answered as they become ready; one that asks for WAL that is not there yet waits.
#[test]
fn requests_are_answered_out_of_order() {
    let mut world = World::new("order");
    world.server.start();
    world.write(0..BLOCKS);
    let mut reader = world.server.reader(ReaderRole::Tool);
    let (position, after) = (world.end(), Lsn(world.end().0 + 8));
    let waiting = reader.request(5, 1, NEWEST, after);
    let asked: Vec<u64> = (0..BLOCKS / 64).map(|stripe| reader.request(stripe * 64, 64, NEWEST, position)).collect();
    let mut answered = Vec::new();
    for _ in &asked {
        let (id, pages) = reader.answer();
        let stripe = (id - asked[0]) as u32;
        for (number, page) in pages.unwrap().chunks_exact(8192).enumerate() {
            let block = stripe * 64 + number as u32;
            check_page(block, world.history[&block].last().unwrap().1, page);
        }
        answered.push(id);
    }
    answered.sort_unstable();
    assert_eq!(asked, answered);
    world.write([5]);
    let (id, page) = reader.answer();
    assert_eq!(waiting, id);
    check_page(5, world.history[&5].last().unwrap().1, &page.unwrap());

    let code = |answer: (u64, Result<Vec<u8>, wire::page::PageFailed>)| answer.1.unwrap_err().code;
    reader.request(63, 2, NEWEST, position);
    assert_eq!(PageErrorCode::BadRequest, code(reader.answer()), "two stripes");
    reader.request(BLOCKS + 5, 1, NEWEST, position);
    assert_eq!(PageErrorCode::NoSuchBlock, code(reader.answer()));
    reader.request(5, 1, Lsn(START.0 - 8), Lsn(START.0 - 8));
    assert_eq!(PageErrorCode::BelowHorizon, code(reader.answer()));
}

/// Merges, images within them and image layers: what is compacted is read as before, and so it is by the next owner.
#[test]
fn compaction_changes_no_page() {
    let mut world = World::new("compaction");
    world.server.start();
    world.write(0..BLOCKS);
    for round in 0..12 {
        world.write(some_blocks(round, 200));
    }
    world.freeze();
    world.server.call("POST", "/v1/compact");
    let status = world.server.status();
    assert!(status["level1_layers"].as_u64().unwrap() > 1 && status["image_layers"].as_u64().unwrap() > 2, "{status}");
    world.check_history(START, 8);
    world.server.kill();
    world.server.lose_disk();
    world.server.start();
    world.check_history(START, 8);
}

/// A process that dies between two steps of flush, upload or compaction, again and again; and each time its successor goes on from
/// what is durable. Nobody sees half of a step.
#[test]
fn a_crash_between_any_two_steps_loses_nothing() {
    let mut world = World::new("crash");
    world.server.start();
    world.write(0..BLOCKS);
    let steps = [
        "frozen layer written",
        "frozen layer uploaded",
        "frozen layer in the manifest",
        "compacted layers written",
        "compacted layer uploaded",
        "compaction in the manifest",
        "objects removed",
    ];
    for (number, step) in steps.into_iter().enumerate() {
        for lost in [false, true] {
            world.server.kill();
            world.server.environment.insert("LAKEBASE_DIE_AT", step.to_owned());
            world.server.environment.insert("LAKEBASE_DIE_AFTER", (1 + number % 2).to_string());
            // It may die by what it finds before it answers anybody.
            world.server.spawn();
            for round in 0..10 {
                world.write(some_blocks(round + number as u32 * 10, 60));
            }
            // Compaction begins by itself; when it does, the process may have died already.
            let _ = world.server.try_call("POST", "/v1/freeze");
            let _ = world.server.try_call("POST", "/v1/compact");
            assert_eq!((None, Some(9)), world.server.wait_end(), "{step} was not reached");
            world.server.environment.clear();
            if lost {
                world.server.lose_disk();
            }
            world.server.start();
            world.check(world.end());
        }
    }
    world.freeze();
    world.check_history(START, 10);
}

/// The older owner of two ends, whatever it was doing; what it wrote meanwhile harms nobody.
#[test]
fn a_new_owner_ends_the_old_one() {
    let mut world = World::new("owners");
    world.server.start();
    world.write(0..BLOCKS);
    world.freeze();
    let mut second = world.server.another("b");
    second.start();
    world.write(some_blocks(1, 300));
    assert_eq!((Some(3), None), world.server.wait_end());
    assert!(world.server.log_text().contains("another owner"), "{}", world.server.log_text());
    std::mem::swap(&mut world.server, &mut second);
    world.freeze();
    world.check_history(START, 5);

    second.spawn();
    assert_eq!((Some(3), None), second.wait_end(), "an older generation starts");
    world.check(world.end());
}

/// Object storage that fails half of the time, forgets to answer, and is away for a while: ingest goes on, and all of it
/// becomes durable in the end.
#[test]
fn object_storage_may_fail() {
    let mut world = World::new("storage");
    let faults = "seed:7,fail:20,after:20,outage:1500+2000";
    world.server.environment.insert("LAKEBASE_STORAGE_FAULTS", faults.to_owned());
    world.server.start();
    world.write(0..BLOCKS);
    for round in 0..20 {
        world.write(some_blocks(round, 50));
        world.check(world.end());
    }
    world.freeze();
    let attempts = r#"storage_attempts_total{operation="put_new"}"#;
    eventually("the figures of object storage", || world.server.metric(attempts) > 5.0);
    world.server.kill();
    world.server.environment.clear();
    world.server.lose_disk();
    world.server.start();
    world.check_history(START, 5);
}

fn files(directory: PathBuf) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn flip_bits(path: &PathBuf) {
    let mut bytes = std::fs::read(path).unwrap();
    let end = bytes.len();
    // Of every block, and neither of the index nor of the ends.
    for at in (100..end * 3 / 4).step_by(1000) {
        bytes[at] ^= 4;
    }
    std::fs::write(path, bytes).unwrap();
}

/// A local copy that is damaged is fetched again; an object that is damaged fails the reads that need it, by name, and only those.
#[test]
fn damage_is_found_and_named() {
    let mut world = World::new("damage");
    world.server.settings.insert("freeze_bytes", "\"64MiB\"".to_owned());
    world.server.start();
    world.write(0..BLOCKS);
    world.freeze();
    let old = world.end();
    world.write(0..BLOCKS / 2);
    world.freeze();
    world.server.kill();
    files(world.server.layers()).iter().for_each(flip_bits);
    world.server.start();
    world.check_history(START, 3);
    assert!(world.server.metric("damaged_files_total") > 0.0);

    world.server.kill();
    world.server.lose_disk();
    let objects = world.objects.join(format!("{}/shards/00000007/layers", harness::log()));
    let first =
        files(objects).into_iter().find(|path| path.to_str().unwrap().ends_with("0000000000000001-0000000000000001"));
    flip_bits(&first.unwrap());
    world.server.start();
    let mut reader = world.server.reader(ReaderRole::Tool);
    let mut failures = 0;
    for block in BLOCKS / 2..BLOCKS {
        match reader.page(block, NEWEST, old) {
            Ok(page) => check_page(block, world.history[&block].last().unwrap().1, &page),
            Err(failed) => {
                failures += 1;
                assert_eq!(PageErrorCode::LayerLost, failed.code, "{failed:?}");
                assert!(failed.text.contains("0000000000000001-0000000000000001"), "{failed:?}");
            }
        }
    }
    assert!(failures > BLOCKS / 4, "{failures}");
    check_page(3, world.history[&3].last().unwrap().1, &reader.newest(3, old).unwrap());
    assert_eq!(1, world.server.status()["lost_layers"].as_object().unwrap().len());
    let end = world.write([3]);
    check_page(3, world.history[&3].last().unwrap().1, &reader.newest(3, end).unwrap());
}

/// A writer that was replaced reads nothing any more, once safekeepers say so.
#[test]
fn a_writer_whose_term_is_over_is_refused() {
    let mut world = World::new("term");
    world.server.start();
    let end = world.write(0..BLOCKS);
    let mut reader = world.server.reader(ReaderRole::Writer { term: Term(1) });
    assert!(reader.newest(1, end).is_ok());
    world.cluster.fence(2, pgtypes::WriterId([2; 16]));
    eventually("the page server to hear of term 2", || world.server.status()["term"] == "2");
    assert_eq!(PageErrorCode::StaleTerm, reader.newest(1, end).unwrap_err().code);
    let mut late = world.server.reader(ReaderRole::Writer { term: Term(1) });
    assert_eq!(PageErrorCode::StaleTerm, late.answer().1.unwrap_err().code);
    assert!(world.server.reader(ReaderRole::Replica).newest(1, end).is_ok());
}

/// A safekeeper dies: the next one has the rest.
#[test]
fn wal_comes_from_another_safekeeper() {
    let mut world = World::new("switch");
    world.server.start();
    world.write(0..BLOCKS);
    world.check(world.end());
    let source = world.server.status()["source"].as_str().unwrap().to_owned();
    let victim = world.cluster.safekeepers.iter_mut().find(|s| source.ends_with(&format!(":{}", s.append))).unwrap();
    victim.kill();
    world.write(some_blocks(1, 100));
    world.check(world.end());
    assert_ne!(source, world.server.status()["source"].as_str().unwrap());
}

/// Local copies stay within their limit; what is not here is read from object storage.
#[test]
fn local_files_stay_within_their_limit() {
    let mut world = World::new("cache");
    world.server.start();
    world.server.kill();
    world.server.cache_bytes = "1MiB".to_owned();
    world.server.start();
    world.write(0..BLOCKS);
    for round in 0..8 {
        world.write(some_blocks(round, 100));
    }
    world.freeze();
    eventually("files to go", || world.server.status()["local_bytes"].as_u64().unwrap() <= 1 << 20);
    assert!(world.server.metric("evictions_total") > 0.0);
    world.check_history(START, 5);
    assert!(world.server.metric("remote_reads_total") > 0.0);
}

/// One safekeeper feeds a shard, all of them keep WAL for it: each is told what is in object storage, also after it was away.
#[test]
fn every_safekeeper_hears_what_is_in_object_storage() {
    let mut world = World::new("progress");
    world.server.start();
    world.write(0..BLOCKS);
    world.freeze();
    let told = |world: &World, end: Lsn| {
        world.cluster.safekeepers.iter().filter(|safekeeper| safekeeper.child.is_some()).all(|safekeeper| {
            safekeeper.call("GET", &harness::log_path(), None)["shards"][0]["durable_lsn"] == end.to_string()
        })
    };
    eventually("all safekeepers to hear", || told(&world, world.end()));

    let source = world.server.status()["source"].as_str().unwrap().to_owned();
    let away = world.cluster.safekeepers.iter().position(|s| !source.ends_with(&format!(":{}", s.append))).unwrap();
    world.cluster.safekeepers[away].kill();
    world.write(some_blocks(1, 100));
    world.freeze();
    eventually("the two others to hear", || told(&world, world.end()));
    world.cluster.safekeepers[away].start();
    eventually("the one that was away to hear", || told(&world, world.end()));
}

/// What is older than the history that is kept goes, on disk and in object storage, unless a reader holds a lease; what is kept
/// is read as before, by the next owner, too.
#[test]
fn history_is_given_up_but_for_leases() {
    let mut world = World::new("garbage");
    world.server.history_bytes = "256KiB".to_owned();
    world.server.start();
    world.write(0..BLOCKS);
    let held = world.end();
    let mut reader = world.server.reader(ReaderRole::Tool);
    let mut hold = |lsn| {
        reader.send(&PageMessage::TakeLease(TakeLease { id: 1, lsn, seconds: 600 }));
        reader.next(|message| match message {
            PageMessage::LeaseGranted(granted) => assert_eq!((lsn, 5), (granted.lsn, granted.seconds)),
            other => panic!("{other:?}"),
        });
    };
    for round in 0..10 {
        world.write(some_blocks(round, 150));
        world.freeze();
        hold(held);
        world.server.call("POST", "/v1/compact");
        hold(held);
    }
    assert!(world.server.position("horizon_lsn") <= held);
    world.check(held);

    // The lease of five seconds ends, and with it what only it needed.
    let begun = world.server.position("horizon_lsn");
    eventually("history to be given up", || world.server.position("horizon_lsn") > held);
    assert!(begun <= held && world.server.metric("collected_total") > 0.0);
    eventually("layers to go", || {
        world.server.call("POST", "/v1/compact");
        let status = world.server.status();
        let objects = files(world.objects.join(format!("{}/shards/00000007/layers", harness::log()))).len() as u64;
        let layers = ["image_layers", "level0_layers", "level1_layers"].map(|key| status[key].as_u64().unwrap());
        objects == layers.iter().sum::<u64>()
    });
    let mut reader = world.server.reader(ReaderRole::Tool);
    assert_eq!(PageErrorCode::BelowHorizon, reader.page(1, held, held).unwrap_err().code);
    let horizon = world.server.position("horizon_lsn");
    world.check_history(horizon, 5);
    world.server.kill();
    world.server.lose_disk();
    world.server.start();
    assert!(world.server.position("horizon_lsn") >= horizon);
    world.check_history(world.server.position("horizon_lsn"), 5);
}

/// An object is gone, and with it which lengths it had: pages that need it fail by name, nothing that was made without it becomes
/// durable, and with the object all is as if it had never been gone.
#[test]
fn nothing_becomes_durable_without_the_lengths_of_a_lost_layer() {
    let mut world = World::new("lost");
    world.server.settings.insert("freeze_bytes", "\"64MiB\"".to_owned());
    world.server.start();
    world.write(0..BLOCKS);
    world.freeze();
    let durable = world.server.position("durable_lsn");
    world.server.kill();
    world.server.lose_disk();
    let objects = files(world.objects.join(format!("{}/shards/00000007/layers", harness::log())));
    let object = objects.iter().find(|path| path.to_str().unwrap().ends_with("0000000000000001-0000000000000001"));
    let (object, away) = (object.unwrap(), world.objects.join("away"));
    std::fs::rename(object, &away).unwrap();
    world.server.start();
    let end = world.write(0..BLOCKS / 2);
    let mut reader = world.server.reader(ReaderRole::Tool);
    for block in 0..BLOCKS {
        let failed = reader.page(block, NEWEST, end).unwrap_err();
        assert_eq!(PageErrorCode::LayerLost, failed.code, "block {block}: {failed:?}");
    }
    assert!(world.server.status()["troubles"].as_object().unwrap().contains_key("nothing is made durable"));
    assert_eq!(durable, world.server.position("durable_lsn"));

    std::fs::rename(&away, object).unwrap();
    world.server.kill();
    world.server.start();
    world.freeze();
    world.check_history(START, 4);
}
