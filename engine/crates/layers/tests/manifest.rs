//! Manifests: what is written is read, what is damaged is refused, version 1 is read for ever (`tests/compat/manifest/`).

use layers::{
    HashRange, Key, KeyRange, LayerDescription, LayerId, LayerKind, LsnRange, MANIFEST_VERSION, Manifest,
    ManifestError, ShardGeneration, ShardId,
};
use pgtypes::{BranchId, ClusterId, FrameSummary, LogId, Lsn, PgTimeline, SystemId};
use proptest::prelude::*;

const FIXTURE: &[u8] = include_bytes!("../../../../tests/compat/manifest/v1.manifest");

fn layer(shard: u32, generation: u64, number: u64) -> LayerDescription {
    LayerDescription {
        id: LayerId { shard: ShardId(shard), generation: ShardGeneration(generation), number },
        kind: LayerKind::Delta,
        level: 1,
        keys: KeyRange { begin: Key::first_of_hash(7), end: Key::MAX },
        lsns: LsnRange { after: Lsn(0x0100_0000), through: Lsn(0x0200_0000) },
        file_bytes: 123_456,
        values: 1000,
        chain_max: 12,
    }
}

/// What the fixture holds.
fn example() -> Manifest {
    let image = LayerDescription {
        kind: LayerKind::Image,
        level: 0,
        keys: KeyRange::ALL,
        lsns: LsnRange { after: Lsn(0x0100_0000), through: Lsn(0x0100_0000) },
        ..layer(2, 0, 1)
    };
    Manifest {
        log: LogId { cluster: ClusterId([0x11; 16]), branch: BranchId([0x22; 16]) },
        shard: ShardId(3),
        generation: ShardGeneration(4),
        sequence: 5,
        range: HashRange { begin: 1 << 30, end: 1 << 32 },
        stripe_blocks: 2048,
        system_id: SystemId(0x6123_4567_89AB_CDEF),
        segment_bytes: 16 << 20,
        checksums: true,
        horizon: Lsn(0x0100_0000),
        through: FrameSummary {
            record_end: Lsn(0x0200_0000),
            record_start: Lsn(0x01FF_FF80),
            timeline: PgTimeline(6),
            max_full_xid: 7 << 32 | 8,
            commit_timestamp: -9,
        },
        next_layer: 10,
        layers: vec![image, layer(3, 3, 99), layer(3, 4, 9)],
    }
}

#[test]
fn manifests_of_version_1_are_read_and_written() {
    assert_eq!(Ok(example()), Manifest::decode(FIXTURE));
    assert_eq!(FIXTURE, example().encode().unwrap());
    let none = Manifest { layers: vec![], ..example() };
    assert_eq!(Ok(none.clone()), Manifest::decode(&none.encode().unwrap()));
}

#[test]
fn the_order_of_layers_does_not_matter() {
    let mut turned = example();
    turned.layers.reverse();
    assert_eq!(FIXTURE, turned.encode().unwrap());
}

#[test]
fn a_flipped_bit_is_always_found() {
    for byte in 0..FIXTURE.len() {
        for bit in 0..8 {
            let mut bytes = FIXTURE.to_vec();
            bytes[byte] ^= 1 << bit;
            assert!(Manifest::decode(&bytes).is_err(), "bit {bit} of byte {byte}");
        }
    }
}

#[test]
fn bytes_that_are_cut_off_or_follow_are_found() {
    for length in 0..FIXTURE.len() {
        assert!(Manifest::decode(&FIXTURE[..length]).is_err(), "{length}");
    }
    let mut longer = FIXTURE.to_vec();
    longer.push(0);
    assert_eq!(Err(ManifestError::Checksum), Manifest::decode(&longer));
}

/// Whoever meets it has to know which engine to install.
#[test]
fn another_version_is_refused_by_its_number() {
    let mut bytes = FIXTURE.to_vec();
    bytes[8..10].copy_from_slice(&(MANIFEST_VERSION + 1).to_le_bytes());
    let error = Manifest::decode(&bytes).unwrap_err();
    assert_eq!(ManifestError::UnknownVersion { found: 2 }, error);
    assert!(error.to_string().contains("use a version of lakebase that reads format 2"), "{error}");
    // It need not be as long as one of version 1.
    assert_eq!(Err(ManifestError::UnknownVersion { found: 2 }), Manifest::decode(&bytes[..10]));
}

/// Replaces bytes and makes the checksum right again: what a faulty program would write.
fn forged(at: usize, with: &[u8]) -> Result<Manifest, ManifestError> {
    let mut bytes = FIXTURE.to_vec();
    bytes[at..at + with.len()].copy_from_slice(with);
    let end = bytes.len() - 4;
    let crc = wal::crc32c(0, &bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
    Manifest::decode(&bytes)
}

#[test]
fn a_number_of_layers_that_is_not_there_allocates_nothing() {
    assert_eq!(
        Err(ManifestError::Length { found: FIXTURE.len() as u64, expected: 164 + 112 * u64::from(u32::MAX) }),
        forged(140, &u32::MAX.to_le_bytes())
    );
}

#[test]
fn a_manifest_that_breaks_a_rule_is_neither_read_nor_written() {
    assert!(forged(0, b"LB").is_ok());
    for (at, with) in [(10, &[2][..]), (11, &[1]), (155, &[1]), (164, &[3]), (166, &[1]), (275 - 4, &[1])] {
        assert!(matches!(forged(at, with), Err(ManifestError::Malformed(_))), "{at}");
    }
    type Break = (&'static str, fn(&mut Manifest));
    let broken: [Break; 9] = [
        ("range", |manifest| manifest.range.end = 1 << 30),
        ("range", |manifest| manifest.range.end = (1 << 32) + 1),
        ("stripe", |manifest| manifest.stripe_blocks = 3),
        ("segment", |manifest| manifest.segment_bytes = 1 << 19),
        ("horizon", |manifest| manifest.horizon = Lsn(0x0200_0001)),
        ("twice", |manifest| manifest.layers[0] = manifest.layers[1]),
        ("ranges", |manifest| manifest.layers[1].keys = KeyRange { begin: Key::MAX, end: Key::MAX }),
        ("ahead", |manifest| manifest.layers[1].lsns.through = Lsn(0x0200_0001)),
        ("next layer", |manifest| manifest.next_layer = 9),
    ];
    for (what, breaks) in broken {
        let mut manifest = example();
        breaks(&mut manifest);
        let error = manifest.encode().unwrap_err();
        assert!(matches!(error, ManifestError::Malformed(_)) && error.to_string().contains(what), "{what}: {error}");
    }
}

prop_compose! {
    fn layers_of_a_shard()(ids in prop::collection::btree_set((0u32..4, 0u64..5, 1u64..1000), 0..40),
        kinds in prop::collection::vec(any::<(bool, u8, u64, u64, u32)>(), 40), hashes in prop::collection::vec(0u32..u32::MAX, 40),
        after in prop::collection::vec(0u64..1 << 40, 40))
        -> Vec<LayerDescription> {
        ids.into_iter().enumerate().map(|(at, (shard, generation, number))| {
            let (image, level, file_bytes, values, chain_max) = kinds[at];
            let after_lsn = Lsn(after[at]);
            LayerDescription {
                id: LayerId { shard: ShardId(shard), generation: ShardGeneration(generation), number },
                kind: if image { LayerKind::Image } else { LayerKind::Delta },
                level,
                keys: KeyRange { begin: Key::first_of_hash(hashes[at]), end: Key::MAX },
                lsns: LsnRange { after: after_lsn, through: Lsn(after_lsn.0 + u64::from(!image)) },
                file_bytes,
                values,
                chain_max,
            }
        }).collect()
    }
}

proptest! {
    #[test]
    fn every_manifest_is_read_as_it_was_written(
        ids in any::<([u8; 16], [u8; 16], u32, u64, u64, u64)>(), begin in 0u64..1 << 32, stripe in 0u32..32, segment in 20u32..31,
        checksums in any::<bool>(), summary in any::<(u64, u32, u64, i64)>(), layers in layers_of_a_shard(),
    ) {
        let manifest = Manifest {
            log: LogId { cluster: ClusterId(ids.0), branch: BranchId(ids.1) },
            shard: ShardId(ids.2),
            generation: ShardGeneration(ids.3),
            sequence: ids.4,
            range: HashRange { begin, end: 1 << 32 },
            stripe_blocks: 1 << stripe,
            system_id: SystemId(ids.5),
            segment_bytes: 1 << segment,
            checksums,
            horizon: Lsn(summary.0 % (1 << 41)),
            through: FrameSummary {
                record_end: Lsn(1 << 41), record_start: Lsn(summary.0), timeline: PgTimeline(summary.1),
                max_full_xid: summary.2, commit_timestamp: summary.3,
            },
            next_layer: 1000,
            layers,
        };
        let bytes = manifest.encode().unwrap();
        prop_assert_eq!(Ok(manifest), Manifest::decode(&bytes));
    }

    #[test]
    fn no_bytes_make_the_reader_fail(mut bytes in prop::collection::vec(any::<u8>(), 0..600), frame in any::<bool>()) {
        if frame && bytes.len() >= 164 {
            bytes[..10].copy_from_slice(&FIXTURE[..10]);
            let end = bytes.len() - 4;
            let crc = wal::crc32c(0, &bytes[..end]);
            bytes[end..].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(manifest) = Manifest::decode(&bytes) {
            prop_assert_eq!(bytes, manifest.encode().unwrap());
        }
    }
}
