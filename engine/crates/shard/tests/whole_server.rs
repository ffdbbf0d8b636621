//! Oracle: what shards make of a server's WAL, against the files that the server left.
//!
//! Compared are all blocks of all relations (after `redo::mask`, but the visibility map byte for byte), the lengths of all
//! forks, and everything that a cold start needs beside them. Not compared, because WAL does not define them: values of
//! sequences, free-space maps, and blocks that a server adds to a file without writing them. PostgreSQL is found as
//! `../../wal/tests/postgres/mod.rs` says.

mod harness;
#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
mod workload;

use harness::{
    capture::{Capture, STRIPING, batches},
    judge::{compare, ranges},
    store::Shard,
};

/// Records of a batch.
const BATCH_RECORDS: usize = 500;

/// Ingests everything into so many shards, and compares.
fn judge(capture: &Capture, records: &[filter::Routed], count: u32) {
    let mut shards = Vec::new();
    for range in ranges(count) {
        let mut shard = Shard::import(&capture.base, capture.from.record_end, STRIPING, range);
        let mut record = 0;
        let is_cut = || {
            record += 1;
            record % BATCH_RECORDS == 0
        };
        batches(capture.from, records, range, is_cut, |batch| shard.batch(batch));
        shards.push(shard);
    }
    let verdict = compare(capture, &shards);
    let copied: u64 = shards.iter().map(|shard| shard.copied_blocks).sum();
    let values: usize = shards.iter().flat_map(|shard| shard.store.values.values()).map(Vec::len).sum();
    println!("{count} shards, {} records, {values} values, {copied} blocks copied: {verdict:?}", records.len());
    assert_eq!(0, verdict.fault_count, "{}", verdict.faults.join("\n"));
    assert!(verdict.blocks > 10_000 && verdict.visibility_blocks > 50 && copied > 1000);
    assert!(verdict.identical * 10 > verdict.blocks, "masks hide little");
}

/// As the engine runs its writers.
#[test]
fn shards_have_the_servers_files() {
    let capture = Capture::take("data", workload::SETTINGS, &workload::life);
    let records = capture.records();
    judge(&capture, &records, 1);
    judge(&capture, &records, 4);
}
