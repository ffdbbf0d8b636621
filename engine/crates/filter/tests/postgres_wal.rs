//! Filtering of a real server's WAL: what `redo` and `metadata` find in records reaches the shards that need it.

#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
mod shards;

use std::{collections::BTreeMap, fs};

use filter::{Item, Route, WalFilter};
use metadata::{Context, changes_of};
use pgtypes::{FrameSummary, Lsn, PgTimeline, Term};
use postgres::{Postgres, Server, output};
use shards::{STRIPING, assert_complete, joined, ranges};
use wal::{Decoder, RECORD_BYTES_MAX, Record, Scanner};

const SETTINGS: &str = "fsync = off\nwal_keep_size = 10GB\nmax_prepared_transactions = 5\nautovacuum = off\n\
    wal_level = logical\ntrack_commit_timestamp = on\n";

const WORKLOAD: &str = "
    create table t (i int primary key, t text);
    create index on t using hash (i);
    create index on t using brin (i);
    create index on t using gist (point(i, i));
    create index on t using spgist (t);
    create index on t using gin (to_tsvector('simple', t));
    insert into t select g, md5(g::text) from generate_series(1, 20000) g;
    update t set t = t || 'x' where i % 3 = 0;
    delete from t where i > 15000;
    vacuum t;
    begin; select * from t where i < 50 for update; savepoint a; select * from t where i < 60 for share; commit;
    begin; insert into t values (-1, 'prepared'); prepare transaction 'p';
    commit prepared 'p';
    begin; select * from t where i < 50 for share; prepare transaction 'q';
    begin; select * from t where i < 60 for key share; commit;
    commit prepared 'q';
    create sequence s; select nextval('s') from generate_series(1, 50);
    create unlogged table u (i int); insert into u select generate_series(1, 1000);
    cluster t using t_pkey;
    truncate t;
    create database d2 strategy file_copy;
    create database d3 strategy wal_log;
    drop database d2;
    select pg_replication_origin_create('origin');
    select pg_logical_emit_message(true, 'prefix', repeat('x', 1000000));
    select pg_log_standby_snapshot();
    checkpoint;
";

/// Segments of the server in order, and where they begin.
fn wal_of(server: &Server<'_>) -> (Lsn, Vec<u8>) {
    let segment_bytes = 16u64 << 20;
    let directory = server.data.join("pg_wal");
    let mut names: Vec<String> = fs::read_dir(&directory)
        .expect("a directory of segments")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name"))
        .filter(|name| name.len() == 24)
        .collect();
    names.sort();
    let number = u64::from_str_radix(&names[0][16..], 16).expect("hexadecimal");
    let bytes = names.iter().flat_map(|name| fs::read(directory.join(name)).expect("a segment")).collect();
    (Lsn(number * segment_bytes), bytes)
}

#[test]
fn everything_that_a_servers_wal_changes_reaches_its_shard() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &["--data-checksums"]);
    server.append_configuration(SETTINGS);
    server.start();
    output(server.client("pgbench").args(["--initialize", "--quiet", "--scale=1"]));
    output(server.client("pgbench").args(["--client=4", "--transactions=100"]));
    server.script(WORKLOAD);
    server.stop("fast");
    let (start, wal) = wal_of(&server);
    let from = FrameSummary { record_end: start, timeline: PgTimeline(1), ..FrameSummary::default() };

    // All records up to the end of the log, which is wherever the bytes are no record any more.
    let mut decoder = Decoder::new(Scanner::resume(from, 16 << 20), RECORD_BYTES_MAX);
    let (mut records, mut taken): (Vec<Record>, usize) = (vec![], 0);
    while let Ok(fed) = decoder.feed(&wal[taken..]) {
        taken += fed;
        records.extend(decoder.poll_record());
        if taken == wal.len() {
            break;
        }
    }
    let end = decoder.summary();
    let committed = &wal[..end.record_end.bytes_since(start) as usize];

    let ranges = ranges(4);
    let shards: Vec<BTreeMap<Lsn, Item>> = ranges
        .iter()
        .map(|range| {
            let mut filter = WalFilter::new(from, 16 << 20, *range, STRIPING);
            let (mut batches, mut taken) = (vec![], 0);
            while taken < committed.len() {
                taken += filter.feed(&committed[taken..]).expect("valid WAL");
                batches.extend(filter.take_batch(end.record_end, Term(1)));
            }
            assert_eq!(end, filter.summary());
            joined(&batches).into_iter().map(|item| (item.end, item)).collect()
        })
        .collect();

    let context = Context { track_commit_timestamp: true, next_full_xid: 1000 };
    let (mut kinds, mut bytes): (BTreeMap<u8, u64>, [usize; 4]) = Default::default();
    for record in &records {
        let items: Vec<_> =
            ranges.iter().zip(&shards).map(|(range, items)| (*range, items.get(&record.info.end).cloned())).collect();
        assert_complete(record, &items);
        let changes = changes_of(record, &context).expect("a record of PostgreSQL");
        if !changes.is_empty() {
            assert!(items[0].1.is_some(), "shard 0 lacks {record:?}");
            *kinds.entry(record.info.rmgr).or_default() += 1;
        }
        if Route::of(record, STRIPING).is_empty() {
            assert!(items.iter().all(|(_, item)| item.is_none()));
        }
        for ((_, item), bytes) in items.iter().zip(&mut bytes) {
            *bytes += item.as_ref().map_or(0, |item| item.stored.len());
        }
    }

    println!("{} records, {} bytes of WAL, to shards {bytes:?}, metadata {kinds:?}", records.len(), committed.len());
    assert!(records.len() > 50_000);
    // XLOG, XACT, SMGR, CLOG or commit timestamps, DBASE, MULTIXACT, RELMAP.
    for rmgr in [0, 1, 2, 4, 6, 7, 18] {
        assert!(kinds.contains_key(&rmgr), "nothing of resource manager {rmgr}: {kinds:?}");
    }
    assert!(bytes.iter().all(|bytes| *bytes < committed.len() / 2), "{bytes:?} of {}", committed.len());
}
