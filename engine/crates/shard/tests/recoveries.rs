//! Oracle: what shards have at random positions, against stock recoveries that are stopped there.
//!
//! A recovery knows nothing but WAL, as a shard does: its visibility maps must be ours byte for byte, its files as long as
//! ours to the block, sequences and pages that `CREATE DATABASE` logged without contents included; everything else but for
//! `redo::mask`. Positions are drawn under a seed, as `../../wal/tests/recovery/mod.rs` says. PostgreSQL is found as
//! `../../wal/tests/postgres/mod.rs` says.

mod harness;
#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
#[path = "../../wal/tests/recovery/mod.rs"]
mod recovery;
mod workload;

use std::{collections::BTreeMap, fs, process::Command};

use filter::Routed;
use harness::{
    capture::{Capture, Moment, STRIPING, batches, new_server},
    files::Files,
    judge::{compare, listing, ranges},
    store::Shard,
};
use layers::{KeyKind, ValueKind};
use pgtypes::Lsn;
use postgres::{Postgres, output};
use recovery::{Positions, recover};
use wal::{Fork, Record};

/// Records of a batch.
const BATCH_RECORDS: usize = 500;
/// Recoveries of a run that says nothing else.
const RECOVERIES: usize = 3;
/// Resource manager of page images, which says nothing about whose page it is.
const XLOG: u8 = 0;

fn ingest(capture: &Capture, records: &[Routed], count: u32) -> Vec<Shard> {
    let shard = |range| {
        let mut shard = Shard::import(&capture.base, capture.from.record_end, STRIPING, range);
        let mut record = 0;
        let is_cut = || {
            record += 1;
            record % BATCH_RECORDS == 0
        };
        batches(capture.from, records, range, is_cut, |batch| shard.batch(batch));
        shard
    };
    ranges(count).into_iter().map(shard).collect()
}

/// Resource managers of relations, by the records of their main forks: catalogs in the middle of a transaction do not know
/// them, and whoever asks a server leaves traces. Relations without records have nothing to be masked.
fn access_methods(shards: &[Shard], files: &Files) -> BTreeMap<(u32, u32), u8> {
    let (mut methods, mut in_any_database) = (BTreeMap::new(), BTreeMap::new());
    for (key, values) in shards.iter().flat_map(|shard| &shard.store.values) {
        let Ok(KeyKind::Block { relation, fork: Fork::Main, .. }) = key.kind() else { continue };
        for value in values.iter().filter(|value| matches!(value.kind, ValueKind::Record | ValueKind::InitRecord)) {
            let rmgr = Record::from_stored(Lsn::INVALID, value.lsn, &value.bytes).expect("a record").info.rmgr;
            if rmgr != XLOG {
                methods.insert((relation.database, relation.relation), rmgr);
                in_any_database.insert(relation.relation, rmgr);
                break;
            }
        }
    }
    // Copies of databases keep the numbers of files.
    for (relation, _) in files.forks.keys() {
        let of_copy = in_any_database.get(&relation.relation).copied();
        let method = methods.entry((relation.database, relation.relation));
        method.or_insert(of_copy.unwrap_or(XLOG));
    }
    methods
}

#[test]
fn shards_have_the_files_of_recoveries_to_random_positions() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = new_server(&postgres, &directory, workload::SETTINGS);
    let base = directory.0.join("base");
    output(Command::new("cp").arg("-a").arg(&server.data).arg(&base));
    server.start();
    workload::youth(&postgres, &mut server);
    workload::age(&postgres, &mut server);
    server.stop("fast");
    let capture = Capture::of(Files::load(&base), &server.data);
    let records = capture.records();
    let shards = ingest(&capture, &records, 2);

    let ends = records.iter().map(|routed| (routed.record.info, routed.summary.record_end));
    let mut positions = Positions::new(ends, RECOVERIES);
    let mut visibility_blocks = 0;
    while let Some(lsn) = positions.draw() {
        let settings = listing(&shards, lsn).counters.expect("a checkpoint").settings;
        let tracks = if settings.track_commit_timestamp { "on" } else { "off" };
        let configuration = format!("track_commit_timestamp = {tracks}\n");
        let data = recover(&postgres, &directory, &base, &server.data.join("pg_wal"), lsn, &configuration);
        let files = Files::load(&data);
        fs::remove_dir_all(&data).expect("a directory that was ours");
        let access_methods = access_methods(&shards, &files);
        let verdict = compare(&Moment { lsn, files, access_methods, is_recovery: true }, &shards);
        println!("{lsn}: {verdict:?}");
        assert_eq!(0, verdict.fault_count, "recovered to {lsn}, {positions}:\n{}", verdict.faults.join("\n"));
        assert!(verdict.blocks > 1000 && verdict.identical * 4 > verdict.blocks, "{verdict:?}");
        visibility_blocks += verdict.visibility_blocks;
    }
    assert!(visibility_blocks > 10, "{visibility_blocks} pages of visibility maps compared");
}
