//! The same WAL gives the same layers, however it was cut into batches and layers and whatever died meanwhile.

use std::{collections::BTreeMap, fs, path::Path};

use layers::{
    HEADER_BYTES, Index, Key, KeyKind, LayerFile, LayerId, LayerKind, Manifest, ShardGeneration, TRAILER_BYTES,
    ValueKind,
};
use pgtypes::Lsn;
use remote_storage::{RemoteStorage, ShardStore, block_on};

use crate::{
    BLOCKS,
    harness::{START, eventually, log},
    some_blocks,
    world::{PageServer, SHARD, World},
};

type Values = BTreeMap<(Key, Lsn), (ValueKind, Vec<u8>)>;

/// Every value of every live delta layer. Images that a compaction has put into the place of a record are left out: where they
/// are depends on where layers end, and that they are right is what `check_history` finds out.
fn values_of(server: &mut PageServer) -> Values {
    // A compaction would change it under our eyes.
    server.kill();
    let storage = RemoteStorage::open(&format!("file://{}", server.objects.display())).unwrap();
    let manifest: Manifest = block_on(ShardStore::new(storage, log(), SHARD).newest_manifest()).unwrap().unwrap();
    let mut values = Values::new();
    for layer in manifest.layers.iter().filter(|layer| layer.kind == LayerKind::Delta) {
        let LayerId { generation: ShardGeneration(generation), number, .. } = layer.id;
        let name = format!("{generation:016x}-{number:016x}");
        read_layer(&server.objects_of("layers").into_iter().find(|path| path.ends_with(&name)).unwrap(), &mut values);
    }
    values
}

fn read_layer(path: &Path, values: &mut Values) {
    let bytes = fs::read(path).unwrap();
    let file =
        LayerFile::decode(&bytes[..HEADER_BYTES], &bytes[bytes.len() - TRAILER_BYTES..], bytes.len() as u64).unwrap();
    let of = |offset: u64, length: u32| &bytes[offset as usize..offset as usize + length as usize];
    let index = Index::decode(&file, of(file.index.offset, file.index.bytes)).unwrap();
    for number in 0..index.block_count() {
        let place = index.block_place(number).unwrap();
        let block = index.decode_block(number, of(place.offset, place.bytes)).unwrap();
        for (key, entry) in index.entries_of_block(number) {
            let value = index.value(entry, &block).unwrap().to_vec();
            let known = values.insert((key, entry.lsn), (entry.kind, value));
            assert_eq!(None, known, "{key:?} at {} is in two layers", entry.lsn);
        }
    }
}

/// Compares what two servers made of the same WAL.
fn assert_same(left: &Values, right: &Values) {
    assert!(left.keys().eq(right.keys()), "other keys or positions: {} and {}", left.len(), right.len());
    let mut compared = 0;
    for ((key, lsn), (kind, value)) in left {
        let (other_kind, other) = &right[&(*key, *lsn)];
        let is_block = matches!(key.kind(), Ok(KeyKind::Block { .. }));
        if is_block && (*kind == ValueKind::Image || *other_kind == ValueKind::Image) {
            continue;
        }
        assert!((kind, value) == (other_kind, other), "{key:?} at {lsn}: {kind:?} and {other_kind:?}");
        compared += 1;
    }
    assert!(compared > left.len() / 4, "{compared} of {}", left.len());
}

#[test]
fn replaying_the_same_wal_gives_the_same_layers() {
    let mut world = World::new("replay");
    // As it is written: a batch for each commit, and many small layers.
    world.server.start();
    world.write(0..BLOCKS);
    for round in 0..30 {
        world.write(some_blocks(round, 100));
    }
    world.freeze();
    world.check_history(START, 3);
    let first = values_of(&mut world.server);
    assert!(first.len() > 1000 && world.server.objects_of("layers").len() > 3);

    // At once, in large batches and one layer.
    let mut second = world.fresh_server("large");
    second.settings.insert("freeze_bytes", "\"256MiB\"".to_owned());
    second.start();
    std::mem::swap(&mut world.server, &mut second);
    world.freeze();
    world.check_history(START, 3);
    assert_same(&first, &values_of(&mut world.server));

    // With deaths, at places that depend on time, and once at each step of a layer's way.
    let mut third = world.fresh_server("deaths");
    third.generation += 1;
    std::mem::swap(&mut world.server, &mut third);
    world.server.settings.insert("test_ingest_delay_ms", "200".to_owned());
    for (number, step) in
        ["frozen layer written", "frozen layer uploaded", "frozen layer in the manifest"].into_iter().enumerate()
    {
        world.server.environment.insert("LAKEBASE_DIE_AT", step.to_owned());
        world.server.environment.insert("LAKEBASE_DIE_AFTER", (1 + number).to_string());
        world.server.spawn();
        assert_eq!((None, Some(9)), world.server.wait_end(), "{step}");
        world.server.environment.clear();
        world.server.start();
        let begun = world.server.position("ingested_lsn");
        let end = world.end();
        eventually("some WAL to be taken in", || {
            let now = world.server.position("ingested_lsn");
            now > begun || now == end
        });
        world.server.kill();
        if number == 1 {
            world.server.lose_disk();
        }
    }
    world.server.start();
    world.freeze();
    world.check_history(START, 3);
    assert_same(&first, &values_of(&mut world.server));
}
