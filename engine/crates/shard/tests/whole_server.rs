//! Oracle: what shards make of a server's WAL, against the files that the server left.
//!
//! Compared, at the end and at an earlier shutdown, are all blocks of all relations (after `redo::mask`, but the visibility map byte for byte), the lengths of all
//! forks, and everything that a cold start needs beside them. Not compared, because WAL does not define them: values of
//! sequences, free-space maps, and blocks that a server adds to a file without writing them. PostgreSQL is found as
//! `../../wal/tests/postgres/mod.rs` says.

mod harness;
#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
mod workload;

use filter::Routed;
use harness::{
    capture::{Capture, Moment, STRIPING, batches},
    judge::{Verdict, compare, compare_state, ranges},
    store::Shard,
};

/// Records of a batch.
const BATCH_RECORDS: usize = 500;

/// Ingests everything into so many shards, and compares.
fn judge(capture: &Capture, records: &[Routed], count: u32) {
    let mut shards = Vec::new();
    for range in ranges(count) {
        let mut shard = Shard::import(&capture.base, capture.from.record_end, STRIPING, range);
        let mut record = 0;
        let is_cut = || {
            record += 1;
            record % BATCH_RECORDS == 0
        };
        batches(capture.from, records, range, is_cut, |batch| shard.batch(batch));
        let mut verdict = Verdict::default();
        compare_state(&shard, &mut verdict);
        assert_eq!(0, verdict.fault_count, "{}", verdict.faults.join("\n"));
        shards.push(shard);
    }
    let copied: u64 = shards.iter().map(|shard| shard.copied_blocks).sum();
    let values: usize = shards.iter().flat_map(|shard| shard.store.values.values()).map(Vec::len).sum();
    println!("{count} shards, {} records, {values} values, {copied} blocks copied", records.len());
    for moment in &capture.moments {
        let verdict = compare(moment, &shards);
        println!("{}: {verdict:?}", moment.lsn);
        assert_eq!(0, verdict.fault_count, "{}", verdict.faults.join("\n"));
        assert!(verdict.blocks > 10_000 && verdict.visibility_blocks > 50 && copied > 1000);
        assert!(verdict.identical * 4 > verdict.blocks, "masks do not hide everything");
    }
    let [first, .., last] = &capture.moments[..] else { panic!("two moments") };
    let wrong = Moment {
        lsn: first.lsn,
        files: last.files.clone(),
        access_methods: last.access_methods.clone(),
        is_recovery: false,
    };
    let verdict = compare(&wrong, &shards);
    assert!(verdict.fault_count > 300, "the judge misses what happened since: {verdict:?}");
}

/// PostgreSQL's regression suite: about a minute, and 3 GB of memory. Built on demand: a test that passed because it was not
/// asked for would count as one.
#[cfg(feature = "suites")]
#[test]
fn shards_have_the_files_of_the_regression_suite() {
    let settings = format!("{}autovacuum = on\nautovacuum_naptime = 5s\nmax_connections = 60\n", workload::SETTINGS);
    let capture = Capture::take(&settings, &[workload::regression_suite, workload::age_of_suite]);
    judge(&capture, &capture.records(), 2);
}

/// As the engine runs its writers.
#[test]
fn shards_have_the_servers_files() {
    let capture = Capture::take(workload::SETTINGS, &[workload::youth, workload::age]);
    let records = capture.records();
    judge(&capture, &records, 1);
    judge(&capture, &records, 4);
}

/// As a cluster that was imported, or a replica's upstream, may: images of pages, compressed, and no commit timestamps.
#[test]
fn shards_have_the_files_of_a_server_with_page_images() {
    let settings = format!(
        "{}full_page_writes = on\nwal_compression = pglz\ntrack_commit_timestamp = off\n\
         wal_level = logical\ncheckpoint_timeout = 30s\nmax_wal_size = 50MB\n",
        workload::SETTINGS
    );
    let capture = Capture::take(&settings, &[workload::youth, workload::age]);
    judge(&capture, &capture.records(), 3);
}
