//! An import of a real server's files, read back from its layers: nothing is missing, nothing is added, each value is where it
//! belongs, and a plan of a PGDATA made of them has the files that the server left.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;

use std::{collections::BTreeMap, fs, os::unix::fs::FileExt, path::Path};

use backup::{RelationPages, Source};
use layers::{
    HEADER_BYTES, HashRange, Index, Key, KeyKind, LayerFile, Manifest, ShardId, Striping, TRAILER_BYTES, ValueKind,
};
use pgtypes::{BranchId, ClusterId, LogId, Lsn};
use postgres::{Postgres, Server};
use remote_storage::{ClusterDescription, RemoteStorage, ShardStore, block_on};
use shard::StripeSize;
use transfer::{
    PgData, Progress,
    import::{self, Import, ImportError, Imported},
};

const LOG: LogId = LogId { cluster: ClusterId([0x11; 16]), branch: BranchId([0x22; 16]) };

const WORKLOAD: &str = "
    create table t (i int primary key, note text);
    insert into t select i, repeat('x', i % 500) from generate_series(1, 20000) i;
    create index on t using gin (to_tsvector('simple', note));
    create index on t using hash (i);
    delete from t where i > 15000;
    vacuum t;
    create table empty (i int);
    create unlogged table u as select generate_series(1, 1000) i;
    create index on u (i);
    create unlogged sequence us;
    create sequence s;
    select nextval('s');
    begin; insert into t values (-1, 'prepared'); prepare transaction 'p';
    select pg_replication_origin_create('o');
    select pg_replication_origin_advance('o', '1/23');
    create database other;
";

struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn wait(&self, _: &str) {}
    fn is_interrupted(&self) -> bool {
        false
    }
}

/// A stopped server with something of everything.
fn stopped_server<'a>(postgres: &'a Postgres, directory: &postgres::Directory, options: &[&str]) -> Server<'a> {
    let mut server = postgres.initdb(directory, "data", options);
    server.append_configuration("fsync = off\nmax_prepared_transactions = 5\ntrack_commit_timestamp = on");
    server.start();
    server.script(WORKLOAD);
    server.stop("fast");
    server
}

fn import_to(directory: &Path, data: &Path, shards: u32, striping: Striping) -> Result<Imported, ImportError> {
    let storage = RemoteStorage::open(&format!("file://{}", directory.display())).unwrap();
    let import = Import {
        pgdata: PgData::open(data)?,
        log: LOG,
        shards,
        striping,
        scratch: directory.parent().unwrap().to_owned(),
    };
    import::run(&import, &storage, &Silent)
}

/// Every value of a shard, from its layers.
fn values_of(store: &ShardStore, manifest: &Manifest, scratch: &Path) -> BTreeMap<Key, Vec<u8>> {
    let mut values = BTreeMap::new();
    let mut begin = manifest.range.keys().begin;
    for layer in &manifest.layers {
        assert_eq!(begin, layer.keys.begin, "layers leave no key out");
        begin = layer.keys.end;
        let path = scratch.join("layer");
        block_on(store.get_layer(layer.id, &path)).unwrap();
        let bytes = fs::read(&path).unwrap();
        let trailer = &bytes[bytes.len() - TRAILER_BYTES..];
        let file = LayerFile::decode(&bytes[..HEADER_BYTES], trailer, bytes.len() as u64).unwrap();
        assert_eq!(*layer, file.description);
        let place = file.index;
        let index = Index::decode(&file, &bytes[place.offset as usize..][..place.bytes as usize]).unwrap();
        for number in 0..index.block_count() {
            let place = index.block_place(number).unwrap();
            let block = index.decode_block(number, &bytes[place.offset as usize..][..place.bytes as usize]).unwrap();
            for (key, entry) in index.entries_of_block(number) {
                assert_eq!((manifest.through.record_end, ValueKind::Image), (entry.lsn, entry.kind));
                let value = index.value(entry, &block).unwrap().to_vec();
                assert!(values.insert(key, value).is_none(), "{key:?} twice");
            }
        }
    }
    assert_eq!(manifest.range.keys().end, begin);
    values
}

/// Blocks of a fork that are not all zero, read as PostgreSQL would.
fn blocks_of(data: &Path, fork: &transfer::ForkFiles) -> BTreeMap<u32, Vec<u8>> {
    let mut blocks = BTreeMap::new();
    for block in 0..fork.blocks {
        let mut page = vec![0; 8192];
        let at = u64::from(block % transfer::RELATION_SEGMENT_BLOCKS) * 8192;
        fs::File::open(data.join(fork.path(block))).unwrap().read_exact_at(&mut page, at).unwrap();
        if page.iter().any(|byte| *byte != 0) {
            blocks.insert(block, page);
        }
    }
    blocks
}

/// Everything that an import wrote, compared with the files that it read.
fn compare(data: &Path, objects: &Path, scratch: &Path, shards: u32, striping: Striping) {
    let storage = RemoteStorage::open(&format!("file://{}", objects.display())).unwrap();
    let cluster = block_on(ClusterDescription::get(&storage, LOG.cluster)).unwrap();
    assert_eq!(shards as usize, cluster.shards.len());
    let pgdata = PgData::open(data).unwrap();
    assert_eq!(0, cluster.start_lsn.0 % u64::from(cluster.segment_bytes));
    assert!(cluster.start_lsn > pgdata.control.checkpoint_lsn);
    let forks = transfer::relation_forks(data).unwrap();
    let mut metadata = Vec::new();
    let mut lengths: BTreeMap<_, u32> = BTreeMap::new();
    let mut blocks: BTreeMap<_, BTreeMap<u32, Vec<u8>>> = BTreeMap::new();
    for shard in 0..shards {
        let store = ShardStore::new(storage.clone(), LOG, ShardId(shard));
        let manifest = block_on(store.newest_manifest()).unwrap().unwrap();
        assert_eq!(HashRange::even_part(shard, shards), manifest.range);
        assert_eq!(cluster.start_lsn, manifest.through.record_end);
        assert_eq!(cluster.start_lsn, manifest.horizon);
        for (key, value) in values_of(&store, &manifest, scratch) {
            assert!(manifest.range.contains(key), "{key:?} in shard {shard}");
            match key.kind().unwrap() {
                KeyKind::Metadata(_) | KeyKind::Slru(..) => metadata.push((key, value)),
                KeyKind::StripeSize { relation, fork, stripe } => {
                    let size = StripeSize::from_bytes(&value).unwrap();
                    assert_eq!(Lsn::INVALID, size.floor);
                    let end = stripe * striping.stripe_blocks + size.length;
                    let length = lengths.entry((relation, fork)).or_default();
                    *length = end.max(*length);
                }
                KeyKind::Block { relation, fork, block } => {
                    blocks.entry((relation, fork)).or_default().insert(block, value);
                }
            }
        }
    }

    let expected: BTreeMap<_, _> = forks.iter().map(|fork| ((fork.relation, fork.fork), fork.blocks)).collect();
    assert_eq!(expected, lengths);
    for fork in &forks {
        let found = blocks.remove(&(fork.relation, fork.fork)).unwrap_or_default();
        assert!(blocks_of(data, fork) == found, "{fork:?}");
    }
    assert!(blocks.is_empty(), "blocks of nobody: {:?}", blocks.keys());
    compare_plan(data, metadata, &forks, &cluster);
}

/// The files that a cold start would make of it.
fn compare_plan(
    data: &Path,
    metadata: Vec<(Key, Vec<u8>)>,
    forks: &[transfer::ForkFiles],
    cluster: &ClusterDescription,
) {
    let lengths: Vec<_> = forks.iter().map(|fork| (fork.relation, fork.fork, fork.blocks)).collect();
    let summary = pgtypes::FrameSummary {
        record_end: cluster.start_lsn,
        timeline: cluster.timeline,
        max_full_xid: cluster.next_full_xid - 1,
        ..Default::default()
    };
    let source = Source { summary, metadata, forks: &lengths, page_before: &[], histories: &[], time: 0 };
    let plan = backup::plan(source).unwrap();
    for directory in &plan.directories {
        assert!(data.join(directory).is_dir(), "{directory}");
    }
    let mut seen = 0;
    for file in &plan.files {
        let theirs = fs::read(data.join(&file.path)).unwrap_or_else(|error| panic!("{}: {error}", file.path));
        assert!(theirs == file.contents, "{}", file.path);
        seen += 1;
    }
    assert!(seen > 10);
    for part in ["pg_twophase/", "pg_commit_ts/", "pg_xact/", "pg_multixact/offsets/", "pg_logical/replorigin"] {
        assert!(plan.files.iter().any(|file| file.path.starts_with(part)), "{part}");
    }
    assert!(plan.left_out.is_empty(), "{:?}", plan.left_out);
    let copies = plan.relations.iter().filter(|file| file.pages == RelationPages::CopyOfInit).count();
    assert!(copies >= 3, "table, its index and its sequence");
    // The last WAL is behind everything that the server wrote.
    let theirs = PgData::open(data).unwrap().control;
    assert_eq!(theirs.checkpoint.next_full_xid, plan.control.checkpoint.next_full_xid);
    assert_eq!(theirs.checkpoint.next_oid, plan.control.checkpoint.next_oid);
    assert_eq!(theirs.checkpoint.next_multi, plan.control.checkpoint.next_multi);
}

#[test]
fn layers_have_what_the_files_have() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    for (name, options, shards, striping) in [
        ("one", &["--data-checksums"][..], 1, Striping::DEFAULT),
        ("three", &["--data-checksums", "--wal-segsize=1"], 3, Striping { stripe_blocks: 16 }),
        ("plain", &[], 2, Striping::DEFAULT),
    ] {
        let place = postgres::Directory(directory.0.join(name));
        fs::create_dir(&place.0).unwrap();
        postgres.own(&place.0);
        let server = stopped_server(&postgres, &place, options);
        let objects = place.0.join("objects");

        let imported = import_to(&objects, &server.data, shards, striping).unwrap();

        assert!(imported.pages > 2000 && imported.forks > 500, "{imported:?}");
        compare(&server.data, &objects, &place.0, shards, striping);
        // A second one under the name is refused, whatever it holds.
        let again = import_to(&objects, &server.data, 1, striping);
        assert!(matches!(again, Err(ImportError::Exists(_))), "{again:?}");
    }
}

/// An import that ends early leaves nothing, and one that was killed is not taken for a lakebase, nor built upon.
#[test]
fn an_import_that_fails_leaves_nothing() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let server = postgres.initdb(&directory, "data", &["--data-checksums"]);
    let objects = directory.0.join("objects");
    let storage = RemoteStorage::open(&format!("file://{}", objects.display())).unwrap();
    // The last of all stripes: everything before it is uploaded by then.
    let page = transfer::relation_forks(&server.data)
        .unwrap()
        .into_iter()
        .max_by_key(|fork| (layers::stripe_hash(fork.relation.relation, 0), fork.blocks));
    let path = server.data.join(page.unwrap().path(0));
    let sound = fs::read(&path).unwrap();
    let mut damaged = sound.clone();
    damaged[5000] ^= 1;
    fs::write(&path, damaged).unwrap();
    let failed = import_to(&objects, &server.data, 4, Striping::DEFAULT);
    assert!(matches!(failed, Err(ImportError::Page(_))), "{failed:?}");
    assert!(block_on(storage.list("")).unwrap().is_empty());

    fs::write(&path, sound).unwrap();
    let left = format!("{}/left", LOG.cluster);
    block_on(storage.put(&left, &b"by one that was killed"[..])).unwrap();
    let refused = import_to(&objects, &server.data, 4, Striping::DEFAULT);
    assert!(matches!(refused, Err(ImportError::Leftovers { objects: 1, .. })), "{refused:?}");
    block_on(storage.delete(vec![left])).unwrap();
    import_to(&objects, &server.data, 4, Striping::DEFAULT).unwrap();
}
