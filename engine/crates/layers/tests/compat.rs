//! Files that a released version wrote are read for ever: `tests/compat/layers/`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses a part of it")]
mod support;

use layers::{
    Index, Key, LayerDescription, LayerFile, LayerId, LayerIdentity, LayerKind, LayerWriter, LsnRange, Metadata,
    ShardGeneration, ShardId, Slru, Striping, ValueKind,
};
use pgtypes::{BranchId, ClusterId, LogId, Lsn};
use support::open_file;
use wal::{Fork, RelFileLocator};

const IDENTITY: LayerIdentity = LayerIdentity {
    log: LogId { cluster: ClusterId([0x11; 16]), branch: BranchId([0x22; 16]) },
    id: LayerId { shard: ShardId(3), generation: ShardGeneration(4), number: 5 },
    stripe_blocks: 2048,
};
const LSNS: LsnRange = LsnRange { after: Lsn(0x0100_0000), through: Lsn(0x0100_4000) };

type Value = (Key, Lsn, ValueKind, Vec<u8>);

fn block(fork: Fork, block: u32) -> Key {
    let relation = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
    Striping::DEFAULT.block(relation, fork, block)
}

/// Bytes that lz4 cannot make shorter.
fn noise(length: u32) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 ^ (at.wrapping_mul(40_503) >> 9) as u8).collect()
}

fn delta_values() -> Vec<Value> {
    let (long, short) = (noise(9000), b"record".to_vec());
    let mut values = vec![
        (Key::metadata(Metadata::TwoPhase(7)), Lsn(0x0100_1000), ValueKind::Image, short.clone()),
        (Key::metadata(Metadata::TwoPhase(7)), Lsn(0x0100_2000), ValueKind::Absent, vec![]),
        (Key::slru(Slru::TransactionStatus, 0), Lsn(0x0100_4000), ValueKind::Record, short.clone()),
        (block(Fork::Main, 0), Lsn(0x0100_0028), ValueKind::InitRecord, long.clone()),
        (block(Fork::Main, 0), Lsn(0x0100_0030), ValueKind::Record, short),
        (block(Fork::VisibilityMap, 0), Lsn(0x0100_0030), ValueKind::Record, long),
        (block(Fork::Main, 5000), Lsn(0x0100_3000), ValueKind::Record, vec![7; 20_000]),
    ];
    values.sort();
    values
}

fn image_values() -> Vec<Value> {
    let pages = [(0, noise(8192)), (1, vec![0; 8192]), (5000, vec![9; 8192])];
    let mut values: Vec<Value> =
        pages.map(|(at, page)| (block(Fork::Main, at), LSNS.through, ValueKind::Image, page)).into();
    values.sort();
    values
}

fn write(mut writer: LayerWriter, values: &[Value]) -> Vec<u8> {
    for (key, lsn, kind, value) in values {
        writer.push(*key, *lsn, *kind, value).unwrap();
    }
    let mut bytes = writer.take_output();
    bytes.extend(writer.finish(Key::MAX).unwrap().output);
    bytes
}

fn values_of(bytes: &[u8], index: &Index) -> Vec<Value> {
    let mut values = Vec::new();
    for number in 0..index.block_count() {
        let place = index.block_place(number).unwrap();
        let block = index.decode_block(number, &bytes[place.offset as usize..][..place.bytes as usize]).unwrap();
        let entries = index.entries_of_block(number);
        values.extend(entries.map(|(key, e)| (key, e.lsn, e.kind, index.value(e, &block).unwrap().to_vec())));
    }
    values
}

fn check(fixture: &[u8], written: &[u8], values: &[Value], expected: impl Fn(u64) -> LayerDescription) {
    let (file, index) = open_file(fixture).unwrap();
    assert_eq!(IDENTITY, file.identity);
    assert_eq!(expected(fixture.len() as u64), file.description);
    assert_eq!(values, values_of(fixture, &index));
    // What is written today differs at most by what lz4 makes of it.
    let (today, index): (LayerFile, Index) = open_file(written).unwrap();
    assert_eq!(
        LayerDescription { file_bytes: 0, ..file.description },
        LayerDescription { file_bytes: 0, ..today.description }
    );
    assert_eq!(values, values_of(written, &index));
    assert_eq!(fixture[..layers::HEADER_BYTES], written[..layers::HEADER_BYTES]);
}

#[test]
fn delta_layers_of_version_1_are_read() {
    let values = delta_values();
    let written = write(LayerWriter::delta(IDENTITY, 1, Key::MIN, LSNS), &values);
    let expected = |file_bytes| LayerDescription {
        id: IDENTITY.id,
        kind: LayerKind::Delta,
        level: 1,
        keys: layers::KeyRange::ALL,
        lsns: LSNS,
        file_bytes,
        values: 7,
        chain_max: 2,
    };
    check(include_bytes!("../../../../tests/compat/layers/delta-v1.layer"), &written, &values, expected);
}

#[test]
fn image_layers_of_version_1_are_read() {
    let values = image_values();
    let written = write(LayerWriter::image(IDENTITY, Key::MIN, LSNS.through), &values);
    let expected = |file_bytes| LayerDescription {
        id: IDENTITY.id,
        kind: LayerKind::Image,
        level: 1,
        keys: layers::KeyRange::ALL,
        lsns: LsnRange { after: LSNS.through, through: LSNS.through },
        file_bytes,
        values: 3,
        chain_max: 1,
    };
    check(include_bytes!("../../../../tests/compat/layers/image-v1.layer"), &written, &values, expected);
}
