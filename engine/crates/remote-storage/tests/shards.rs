//! Shards, archive and `cluster.json`: who may write what, and that nothing is removed that somebody needs.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use layers::{LayerId, Manifest, ManifestError, ShardGeneration};
use pgtypes::{Lsn, PgTimeline, SystemId};
use remote_storage::{
    ARCHIVE_SEGMENT_BYTES, ArchiveError, ClaimNonce, ClusterDescription, ClusterError, Faults, ManifestVersion,
    RemoteStorage, ShardError, ShardOwner, ShardRange, ShardStore, WalArchive, block_on,
};
use support::{LOG, SHARD, Scratch, faulty, layer_id, manifest, stores};

fn shard(url: &str) -> ShardStore {
    ShardStore::new(RemoteStorage::open(url).unwrap(), LOG, SHARD)
}

fn claim(store: &ShardStore, generation: u64) -> Result<ShardOwner, ShardError> {
    block_on(store.claim(ShardGeneration(generation)))
}

fn put_layer(owner: &ShardOwner, scratch: &Scratch, id: LayerId, bytes: &str) -> Result<(), ShardError> {
    let file = scratch.path().join(format!("layer-{}-{}", id.generation.0, id.number));
    fs::write(&file, bytes).unwrap();
    block_on(owner.put_layer(id, &file))
}

#[test]
fn a_generation_is_claimed_once_and_never_below_another() {
    let (_scratch, urls) = stores();
    for url in urls {
        let store = shard(&url);
        assert_eq!(None, block_on(store.newest_claim()).unwrap());
        assert!(claim(&store, 4).is_ok());
        for (generation, newest) in [(4, 4), (3, 4), (0, 4)] {
            match claim(&store, generation).unwrap_err() {
                ShardError::NotOwner { newest: found, .. } => assert_eq!(ShardGeneration(newest), found),
                other => panic!("{other}"),
            }
        }
        assert!(claim(&store, 5).is_ok());
        assert_eq!(Some(ShardGeneration(5)), block_on(store.newest_claim()).unwrap());
    }
}

/// An owner that restarts with its disk goes on, unless a newer one came or the disk is another; a manifest of its earlier life
/// that arrives late is not written over.
#[test]
fn a_restarted_owner_goes_on_with_its_claim_and_meets_its_earlier_life() {
    const NONCE: ClaimNonce = ClaimNonce(0xABC);
    let (_scratch, urls) = stores();
    for url in urls {
        let store = shard(&url);
        let again = |generation, nonce| block_on(store.claim_again(ShardGeneration(generation), nonce));
        assert!(matches!(again(1, NONCE), Err(ShardError::NotOwner { .. })), "nobody claimed it");
        let earlier = block_on(store.claim_as(ShardGeneration(1), NONCE)).unwrap();
        block_on(earlier.put_manifest(&manifest(1, 1, []))).unwrap();
        let owner = again(1, NONCE).unwrap();
        let other = again(1, ClaimNonce(NONCE.0 + 1));
        assert!(matches!(other, Err(ShardError::OtherClaim { generation: ShardGeneration(1), .. })), "{other:?}");
        let late = manifest(1, 2, [layer_id(1, 7)]);
        block_on(earlier.put_manifest(&late)).unwrap();
        let put = block_on(owner.put_manifest(&manifest(1, 2, [layer_id(1, 8)])));
        assert!(matches!(put, Err(ShardError::NotOwner { .. })), "{put:?}");
        assert_eq!(Some(late), block_on(again(1, NONCE).unwrap().newest_manifest()).unwrap());
        claim(&store, 2).unwrap();
        assert!(matches!(again(1, NONCE), Err(ShardError::NotOwner { newest: ShardGeneration(2), .. })));
    }
}

/// A claim that this program does not understand belongs to nobody: whose it is cannot be told.
#[test]
fn a_claim_of_another_version_is_refused_by_name() {
    let scratch = Scratch::new();
    let store = shard(&format!("file://{}", scratch.path().display()));
    let nonce = ClaimNonce(1);
    block_on(store.claim_as(ShardGeneration(1), nonce)).unwrap();
    let path = scratch.path().join(format!("{LOG}/shards/{:08x}/claims/0000000000000001", SHARD.0));
    let text = fs::read_to_string(&path).unwrap().replace("\"version\":1", "\"version\":9");
    fs::write(&path, text).unwrap();
    let refused = block_on(store.claim_again(ShardGeneration(1), nonce)).unwrap_err().to_string();
    assert!(refused.contains("claims/0000000000000001") && refused.contains("version 9"), "{refused}");
}

/// Two processes that were given one generation by mistake.
#[test]
fn of_eight_who_claim_one_generation_at_once_one_gets_it_even_on_a_bad_day() {
    const ROUNDS: u64 = 15;
    let (_scratch, urls) = stores();
    for url in urls {
        let barrier = Barrier::new(8);
        let faults: Vec<Faults> = (0..8).map(|seed| Faults::seeded(seed).fail(10).fail_after(25).delay(2)).collect();
        let winners: Vec<Vec<u64>> = thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|racer: usize| {
                    let (barrier, url, faults) = (&barrier, &url, &faults[racer]);
                    scope.spawn(move || {
                        let store = ShardStore::new(faulty(url, faults), LOG, SHARD);
                        let won = |generation: &u64| {
                            barrier.wait();
                            let result = claim(&store, *generation);
                            // Those who are late meet the claim in the list, the others in the creation.
                            assert!(matches!(result, Ok(_) | Err(ShardError::NotOwner { .. })), "{result:?}");
                            result.is_ok()
                        };
                        (1..=ROUNDS).filter(won).collect::<Vec<_>>()
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        assert!(faults.iter().all(|faults| faults.injected() > 0));
        for round in 1..=ROUNDS {
            assert_eq!(1, winners.iter().filter(|won| won.contains(&round)).count(), "{url} generation {round}");
        }
    }
}

#[test]
fn the_highest_manifest_is_the_state_and_two_are_kept() {
    let (_scratch, urls) = stores();
    for url in urls {
        let store = shard(&url);
        assert_eq!(None, block_on(store.newest_manifest()).unwrap());
        let first = claim(&store, 1).unwrap();
        for sequence in 1..=4 {
            let state = manifest(1, sequence, [layer_id(1, sequence)]);
            block_on(first.put_manifest(&state)).unwrap();
            assert_eq!(Some(state), block_on(store.newest_manifest()).unwrap());
        }
        let version = |generation, sequence| ManifestVersion { generation: ShardGeneration(generation), sequence };
        assert_eq!(vec![version(1, 3), version(1, 4)], block_on(store.manifest_versions()).unwrap());
        let second = claim(&store, 2).unwrap();
        block_on(second.put_manifest(&manifest(2, 1, []))).unwrap();
        // The old owner has not noticed: what it writes is not the state.
        block_on(first.put_manifest(&manifest(1, 5, []))).unwrap();
        block_on(first.put_manifest(&manifest(1, 6, []))).unwrap();
        assert_eq!(Some(manifest(2, 1, [])), block_on(store.newest_manifest()).unwrap());
        assert_eq!(vec![version(1, 6), version(2, 1)], block_on(store.manifest_versions()).unwrap());
    }
}

#[test]
fn a_manifest_is_taken_only_from_its_owner_and_in_order() {
    let (_scratch, urls) = stores();
    for url in urls {
        let owner = claim(&shard(&url), 1).unwrap();
        let put = |state: &Manifest| block_on(owner.put_manifest(state));
        put(&manifest(1, 2, [])).unwrap();
        for wrong in [manifest(1, 2, []), manifest(1, 1, []), manifest(2, 3, [])] {
            assert!(matches!(put(&wrong), Err(ShardError::WrongManifest { .. })), "{wrong:?}");
        }
        let other_log = Manifest { shard: layers::ShardId(9), ..manifest(1, 3, []) };
        assert!(matches!(put(&other_log), Err(ShardError::WrongManifest { .. })));
        let broken = Manifest { stripe_blocks: 3, ..manifest(1, 3, []) };
        assert!(matches!(put(&broken), Err(ShardError::Manifest { source: ManifestError::Malformed(_), .. })));
        // Somebody else with our generation was there: one of us must not be.
        let key = format!("{LOG}/shards/{:08x}/manifests/{:016x}-{:016x}", SHARD.0, 1, 3);
        block_on(owner.storage().put_new(&key, "another's")).unwrap();
        assert!(matches!(put(&manifest(1, 3, [])), Err(ShardError::NotOwner { .. })));
    }
}

/// Nothing older is taken instead: layers that it names may be gone.
#[test]
fn a_damaged_or_foreign_manifest_stops_the_shard() {
    let (_scratch, urls) = stores();
    for url in urls {
        let store = shard(&url);
        let owner = claim(&store, 1).unwrap();
        block_on(owner.put_manifest(&manifest(1, 1, []))).unwrap();
        let key = |sequence: u64| format!("{LOG}/shards/{:08x}/manifests/{:016x}-{sequence:016x}", SHARD.0, 1);
        let mut bytes = manifest(1, 2, []).encode().unwrap();
        bytes[100] ^= 1;
        block_on(store.storage().put(&key(2), bytes)).unwrap();
        let error = block_on(store.newest_manifest()).unwrap_err();
        assert!(matches!(error, ShardError::Manifest { source: ManifestError::Checksum, .. }), "{error}");
        assert!(error.to_string().contains(&key(2)), "{error}");
        block_on(store.storage().put(&key(2), manifest(1, 7, []).encode().unwrap())).unwrap();
        assert!(matches!(block_on(store.newest_manifest()), Err(ShardError::WrongManifest { .. })));
    }
}

#[test]
fn layers_go_up_and_come_back_and_a_name_is_given_once() {
    let (scratch, urls) = stores();
    for url in urls {
        let owner = claim(&shard(&url), 1).unwrap();
        put_layer(&owner, &scratch, layer_id(1, 2), "two").unwrap();
        put_layer(&owner, &scratch, layer_id(1, 1), "one!").unwrap();
        put_layer(&owner, &scratch, layer_id(1, 1), "one!").unwrap();
        let differs = put_layer(&owner, &scratch, layer_id(1, 1), "1");
        assert!(matches!(differs, Err(ShardError::LayerDiffers { .. })), "{differs:?}");
        let back = scratch.path().join("back");
        assert_eq!(4, block_on(owner.get_layer(layer_id(1, 1), &back)).unwrap());
        assert_eq!("one!", fs::read_to_string(&back).unwrap());
        assert_eq!("ne", block_on(owner.get_layer_range(layer_id(1, 1), 1..3)).unwrap());
        assert!(block_on(owner.get_layer(layer_id(1, 3), &back)).unwrap_err().is_not_found());
        assert_eq!(vec![(layer_id(1, 1), 4), (layer_id(1, 2), 3)], block_on(owner.list_layers()).unwrap());
    }
}

#[test]
fn a_layer_is_removed_only_when_no_manifest_and_no_newer_owner_may_need_it() {
    let (scratch, urls) = stores();
    for url in urls {
        let store = shard(&url);
        let owner = claim(&store, 1).unwrap();
        let ids = [layer_id(1, 1), layer_id(1, 2), layer_id(1, 3)];
        for id in ids {
            put_layer(&owner, &scratch, id, "x").unwrap();
        }
        let delete = |ids: &[LayerId]| block_on(owner.delete_layers(ids));
        assert!(matches!(delete(&ids[..1]), Err(ShardError::LayerNeeded(_))), "no manifest yet");
        block_on(owner.put_manifest(&manifest(1, 1, ids))).unwrap();
        assert!(matches!(delete(&ids[..1]), Err(ShardError::LayerNeeded(id)) if id == ids[0]));
        block_on(owner.put_manifest(&manifest(1, 2, [ids[1], ids[2]]))).unwrap();
        delete(&ids[..1]).unwrap();
        delete(&ids[..1]).unwrap();
        block_on(owner.put_manifest(&manifest(1, 3, [ids[2]]))).unwrap();
        let newer = claim(&store, 2).unwrap();
        assert!(matches!(delete(&ids[1..2]), Err(ShardError::NotOwner { newest: ShardGeneration(2), .. })));
        assert!(matches!(block_on(owner.check_owner()), Err(ShardError::NotOwner { .. })));
        assert_eq!(2, block_on(store.list_layers()).unwrap().len(), "{url}");
        block_on(newer.put_manifest(&manifest(2, 1, [ids[2]]))).unwrap();
        block_on(newer.delete_layers(&ids[1..2])).unwrap();
        assert_eq!(vec![(ids[2], 1)], block_on(store.list_layers()).unwrap());
    }
}

/// Owners come while older ones go on, requests fail before and after they are done. Whatever happens, every layer that the
/// newest manifest names is there.
#[test]
fn the_newest_manifest_never_names_a_layer_that_is_gone() {
    const OWNERS: u64 = 4;
    let (scratch, urls) = stores();
    for (at, url) in urls.into_iter().enumerate() {
        let seeds = if at == 0 { 12 } else { 6 };
        let (deposed, injected) = (AtomicU64::new(0), AtomicU64::new(0));
        for seed in 0..seeds {
            let url = format!("{url}/{seed}");
            // Manifests written so far: an owner comes when those before it are busy.
            let written = AtomicU64::new(0);
            thread::scope(|scope| {
                for generation in 1..=OWNERS {
                    let (url, scratch, written, deposed, injected) = (&url, &scratch, &written, &deposed, &injected);
                    let faults = Faults::seeded(seed * 10 + generation).fail(8).fail_after(8).delay(4);
                    scope.spawn(move || {
                        let store = ShardStore::new(faulty(url, &faults), LOG, SHARD);
                        while written.load(Relaxed) < (generation - 1) * (3 + seed % 4) {
                            thread::yield_now();
                        }
                        let owner = match claim(&store, generation) {
                            Ok(owner) => owner,
                            // A newer one was faster.
                            Err(ShardError::NotOwner { .. }) if generation < OWNERS => return,
                            Err(error) => panic!("{error}"),
                        };
                        if let Some(state) = own(&owner, scratch, written) {
                            assert!(generation < OWNERS, "the last owner was deposed: {state:?}");
                            deposed.fetch_add(1, Relaxed);
                        }
                        injected.fetch_add(faults.injected(), Relaxed);
                    });
                }
                // Others read while they write.
                scope.spawn(|| {
                    let store = shard(&url);
                    for _ in 0..10 {
                        block_on(store.newest_manifest()).unwrap();
                    }
                });
            });
            let store = shard(&url);
            let state = block_on(store.newest_manifest()).unwrap().unwrap();
            let there: BTreeSet<LayerId> =
                block_on(store.list_layers()).unwrap().into_iter().map(|(id, _)| id).collect();
            assert_eq!(ShardGeneration(OWNERS), state.generation);
            for layer in &state.layers {
                assert!(there.contains(&layer.id), "{url}: {} is gone", layer.id);
            }
            // What the first owners wrote was taken over.
            assert!(state.layers.iter().any(|layer| layer.id.generation < state.generation), "{state:?}");
        }
        assert!(deposed.into_inner() > seeds && injected.into_inner() > seeds, "owners did not meet");
    }
}

/// What a page server does: takes over what is there, adds layers, merges some, removes them. Ends when it is deposed, with
/// its last layers, or after its rounds.
fn own(owner: &ShardOwner, scratch: &Scratch, written: &AtomicU64) -> Option<Vec<LayerId>> {
    const ROUNDS: u64 = 8;
    let generation = owner.generation().0;
    let taken = block_on(owner.newest_manifest()).unwrap();
    let mut named: Vec<LayerId> = taken.into_iter().flat_map(|state| state.layers).map(|layer| layer.id).collect();
    let mut removed = Vec::new();
    for round in 1..=ROUNDS {
        put_layer(owner, scratch, layer_id(generation, round), &format!("{generation} {round}")).unwrap();
        named.push(layer_id(generation, round));
        if named.len() > 12 {
            removed.extend(named.drain(1..4));
        }
        block_on(owner.put_manifest(&manifest(generation, round, named.iter().copied()))).unwrap();
        written.fetch_add(1, Relaxed);
        match block_on(owner.delete_layers(&removed)) {
            Ok(()) => removed.clear(),
            Err(ShardError::NotOwner { .. }) => {
                written.fetch_add(ROUNDS - round, Relaxed);
                return Some(named);
            }
            Err(error) => panic!("{error}"),
        }
    }
    None
}

fn description() -> ClusterDescription {
    ClusterDescription {
        version: 1,
        cluster: LOG.cluster,
        branch: LOG.branch,
        system_id: SystemId(u64::MAX - 1),
        postgres_version: 170_011,
        segment_bytes: 16 << 20,
        start_lsn: Lsn(0x1_0300_0000),
        timeline: PgTimeline(1),
        next_full_xid: 1 << 60 | 743,
        stripe_blocks: 2048,
        checksums: true,
        shards: vec![
            ShardRange { shard: 0, begin: 0, end: 1 << 31 },
            ShardRange { shard: 1, begin: 1 << 31, end: 1 << 32 },
        ],
    }
}

#[test]
fn a_lakebase_is_described_once() {
    let (_scratch, urls) = stores();
    for url in urls {
        let storage = RemoteStorage::open(&url).unwrap();
        block_on(async {
            assert!(ClusterDescription::list(&storage).await.unwrap().is_empty());
            let get = || ClusterDescription::get(&storage, LOG.cluster);
            assert!(matches!(get().await, Err(ClusterError::Storage(error)) if error.is_not_found()));
            description().put(&storage).await.unwrap();
            description().put(&storage).await.unwrap();
            let other = ClusterDescription { checksums: false, ..description() };
            assert!(matches!(other.put(&storage).await, Err(ClusterError::AlreadyThere { .. })));
            assert_eq!(description(), get().await.unwrap());
            assert_eq!(vec![LOG.cluster], ClusterDescription::list(&storage).await.unwrap());
            let json = storage.get(&format!("{}/cluster.json", LOG.cluster)).await.unwrap();
            let json = String::from_utf8(json.to_vec()).unwrap();
            for text in ["\"start_lsn\": \"1/3000000\"", "\"system_id\": \"18446744073709551614\"", "\"timeline\": 1,"]
            {
                assert!(json.contains(text), "{json}");
            }
            let key = format!("{}/cluster.json", LOG.cluster);
            storage.put(&key, json.replace("\"version\": 1", "\"version\": 2, \"new\": 3")).await.unwrap();
            let error = get().await.unwrap_err();
            assert!(error.to_string().contains("use a version of lakebase that reads format 2"), "{error}");
            storage.put(&key, json.replace("4294967296", "4294967295")).await.unwrap();
            assert!(matches!(get().await, Err(ClusterError::Malformed { .. })));
            storage.put(&key, json.replace("\"checksums\"", "\"checksum\"")).await.unwrap();
            assert!(matches!(get().await, Err(ClusterError::Malformed { .. })));
        });
    }
}

fn segment(fill: u8) -> Vec<u8> {
    vec![fill; ARCHIVE_SEGMENT_BYTES as usize]
}

#[test]
fn a_segment_is_archived_by_all_who_have_it_and_never_changes() {
    let (_scratch, urls) = stores();
    for url in urls {
        let start = Lsn(3 * ARCHIVE_SEGMENT_BYTES);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let archive = WalArchive::new(RemoteStorage::open(&url).unwrap(), LOG);
                    block_on(archive.put_segment(start, segment(7))).unwrap();
                });
            }
        });
        let archive = WalArchive::new(RemoteStorage::open(&url).unwrap(), LOG);
        let error = block_on(archive.put_segment(start, segment(8))).unwrap_err();
        assert!(matches!(error, ArchiveError::Differs { .. }), "{error}");
        assert!(segment(7) == block_on(archive.get_segment(start)).unwrap());
        assert!(!block_on(archive.contains(Lsn(ARCHIVE_SEGMENT_BYTES))).unwrap());
        block_on(archive.put_segment(Lsn(ARCHIVE_SEGMENT_BYTES), segment(1))).unwrap();
        assert!(block_on(archive.contains(Lsn(ARCHIVE_SEGMENT_BYTES))).unwrap());
        assert_eq!(vec![Lsn(ARCHIVE_SEGMENT_BYTES), start], block_on(archive.list()).unwrap());
        assert!(matches!(block_on(archive.put_segment(Lsn(8), segment(1))), Err(ArchiveError::Malformed { .. })));
        assert!(matches!(block_on(archive.put_segment(start, vec![1])), Err(ArchiveError::Malformed { .. })));
        assert!(block_on(archive.get_segment(Lsn(0))).is_err_and(|error| error.to_string().contains("not there")));
    }
}
