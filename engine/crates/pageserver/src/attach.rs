//! Taking a shard over: register, claim, manifest, map, and what ingest builds on.

use std::{cell::RefCell, collections::HashMap, rc::Rc, sync::Arc, time::Duration};

use layers::{Edit, KeyKind, LayerId, LayerMap, Manifest};
use pgtypes::Lsn;
use remote_storage::{ClaimNonce, RemoteStorage, ShardError, ShardOwner, ShardStore};
use shard::{Ingest, StripeSize};

use crate::{
    data_dir::{Claim, DataDir},
    feed::register,
    flush::ownership_lost,
    layer_files::{Bounds, LayerFault, LayerFiles},
    owner::{Owner, Parts},
    process::Process,
    read::ReadFault,
    start::StartError,
    state::{State, Wanted},
};

/// Indexes that are loaded at a time.
const INDEXES_AT_A_TIME: usize = 16;

/// Lengths and metadata that are loaded at a time.
const VALUES_AT_A_TIME: usize = 256;

/// Pause before object storage is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// Takes the shard over, for as long as it takes.
///
/// # Errors
/// Somebody else owns it, what is there is not this shard, or the process is told to end.
pub async fn attach(
    process: &Arc<Process>,
    storage: RemoteStorage,
    data_dir: &DataDir,
) -> Result<Rc<Owner>, StartError> {
    let config = &process.config;
    let reader = ShardStore::new(storage, config.log(), config.shard());
    let first = newest_manifest(process, &reader).await?;
    check(process, &first)?;
    let term = register(
        config,
        process.tls.as_ref(),
        first.system_id,
        first.stripe_blocks,
        |trouble| note(process, "the shard cannot be registered with a majority of the safekeepers", &trouble),
        || process.is_stopping(),
    )
    .await?;
    let (store, first_number) = claim(process, &reader, data_dir).await?;
    let store = Rc::new(store);
    // Only now nobody older writes a newer one that counts.
    let manifest = newest_manifest(process, &reader).await?;
    check(process, &manifest)?;
    let next_number = next_number(process, &store, &manifest, first_number).await?;

    let files = LayerFiles::new(
        data_dir.layers(),
        reader,
        Bounds { local_bytes: config.cache_bytes, block_bytes: config.block_cache_bytes },
        process.metrics.clone(),
    );
    let mut map = LayerMap::new(config.range().keys(), manifest.horizon);
    let edit = Edit { remove: Vec::new(), add: manifest.layers.clone() };
    map.apply(&edit).map_err(|error| StartError::Manifest(error.to_string()))?;
    take_stock(data_dir, &manifest, &files)?;
    tracing::info!(
        generation = manifest.generation.0,
        sequence = manifest.sequence,
        layers = manifest.layers.len(),
        through = %manifest.through.record_end,
        horizon = %manifest.horizon,
        "shard is attached"
    );
    let layers = manifest.layers.clone();
    let state = State::new(map, manifest.through.record_end);
    let metrics = &process.metrics;
    metrics.durable_lsn.set(manifest.through.record_end.0 as i64);
    metrics.ingested_lsn.set(manifest.through.record_end.0 as i64);
    metrics.layers.set(layers.len() as i64);
    let parts = Parts { process: process.clone(), store, files, manifest, state, next_number };
    let owner = Rc::new(Owner::new(parts));
    // Before the first reader: a writer whose term is over must not get in before WAL does.
    owner.hear(term, owner.commit_lsn());
    load_indexes(&owner, layers.iter().map(|layer| layer.id).collect()).await?;
    load_ingest(&owner).await?;
    Ok(owner)
}

fn note(process: &Process, what: &str, trouble: &dyn std::fmt::Display) {
    if process.notices.is_new(what, driver::now()) {
        tracing::warn!(%trouble, "{what}: trying again");
    }
}

/// Waits before object storage is asked again.
async fn pause(process: &Process, error: &ShardError) -> Result<(), StartError> {
    if let Some(failure) = ownership_lost(error) {
        return Err(failure);
    }
    note(process, "object storage does not answer", error);
    driver::sleep(PAUSE).await;
    if process.is_stopping() { Err(StartError::Stopped) } else { Ok(()) }
}

async fn newest_manifest(process: &Process, store: &ShardStore) -> Result<Manifest, StartError> {
    loop {
        match store.newest_manifest().await {
            Ok(Some(manifest)) => return Ok(manifest),
            Ok(None) => {
                let text = "object storage has no manifest of this shard: was the cluster imported there?".to_owned();
                return Err(StartError::Manifest(text));
            }
            Err(error @ (ShardError::Manifest { .. } | ShardError::WrongManifest { .. })) => {
                return Err(StartError::Manifest(error.to_string()));
            }
            Err(error) => pause(process, &error).await?,
        }
    }
}

fn check(process: &Process, manifest: &Manifest) -> Result<(), StartError> {
    let config = &process.config;
    if manifest.range != config.range() {
        let text = format!(
            "the manifest is of hashes {} to {}, the configuration says {} to {}",
            manifest.range.begin, manifest.range.end, config.begin, config.end
        );
        return Err(StartError::Manifest(text));
    }
    if manifest.generation > config.generation() {
        let text = format!("generation {} wrote the newest manifest", manifest.generation.0);
        return Err(StartError::Superseded(text));
    }
    Ok(())
}

/// Claims the generation, or goes on with the claim if this disk has made it; also returns the first number that no layer of an
/// earlier life has.
async fn claim(process: &Process, store: &ShardStore, data_dir: &DataDir) -> Result<(ShardOwner, u64), StartError> {
    let generation = process.config.generation();
    let known = data_dir.claim().map_err(StartError::DataDir)?.filter(|known| known.generation == generation);
    let mine = match known {
        // What that life has on its way may still arrive: its numbers are not given again.
        Some(known) => Claim { life: known.life + 1, ..known },
        None => {
            let no_random = |error| StartError::Internal(format!("random number: {error}"));
            Claim { generation, nonce: ClaimNonce::random().map_err(no_random)?, life: 0 }
        }
    };
    // Before the claim: a crash in between must not lock the owner of the disk out.
    data_dir.set_claim(&mine).map_err(StartError::DataDir)?;
    loop {
        let claimed = match store.newest_claim().await {
            // The claim of an earlier life, of an attempt that seemed to fail, or of another disk: its nonce tells.
            Ok(newest) if newest == Some(generation) => store.claim_again(generation, mine.nonce).await,
            Ok(_) => store.claim_as(generation, mine.nonce).await,
            Err(error) => Err(error.into()),
        };
        match claimed {
            Ok(owner) => return Ok((owner, mine.first_number())),
            Err(error) => pause(process, &error).await?,
        }
    }
}

/// The first number that no layer of this owner has, and no upload of an earlier life: at least `first`.
async fn next_number(
    process: &Process,
    store: &ShardStore,
    manifest: &Manifest,
    first: u64,
) -> Result<u64, StartError> {
    let generation = process.config.generation();
    let named = if manifest.generation == generation { manifest.next_layer } else { 1 };
    loop {
        match store.list_layers().await {
            Ok(layers) => {
                let mine = layers.iter().filter(|(layer, _)| layer.generation == generation);
                return Ok(mine.map(|(layer, _)| layer.number + 1).fold(named.max(first), u64::max));
            }
            Err(error) => pause(process, &error.into()).await?,
        }
    }
}

/// Adds the layers of the manifest, and removes local files that it does not name.
fn take_stock(data_dir: &DataDir, manifest: &Manifest, files: &LayerFiles) -> Result<(), StartError> {
    let local: HashMap<LayerId, u64> = data_dir.take_stock().map_err(StartError::DataDir)?.into_iter().collect();
    for layer in &manifest.layers {
        let is_local = local.get(&layer.id) == Some(&layer.file_bytes);
        files.add_uploaded(layer, is_local);
    }
    for (layer, _) in local.iter().filter(|(layer, _)| !files.whereabouts(**layer).0) {
        data_dir.remove_layer(*layer).map_err(StartError::DataDir)?;
    }
    files.make_room(0);
    Ok(())
}

/// Loads the indexes of the layers, as many as are kept. One that is lost is named, and one that is not to be had now is loaded
/// when it is needed.
async fn load_indexes(owner: &Owner, layers: Vec<LayerId>) -> Result<(), StartError> {
    for some in layers.chunks(INDEXES_AT_A_TIME) {
        let loads = some.iter().map(|layer| owner.need_index(*layer));
        for fault in futures_util::future::join_all(loads).await.into_iter().filter_map(Result::err) {
            note(&owner.process, "the index of a layer cannot be loaded", &fault);
        }
        if owner.is_stopping() {
            return Err(StartError::Stopped);
        }
        if owner.state.borrow().indexes().bytes() > owner.process.config.index_cache_bytes {
            break;
        }
    }
    Ok(())
}

/// Loads lengths and metadata as of the end of the manifest. What lies in a lost layer is left out: reads of it fail.
async fn load_ingest(owner: &Owner) -> Result<(), StartError> {
    let lsn = owner.attached_at;
    let ingest = RefCell::new(Ingest::new(owner.striping, owner.range()));
    for wanted in [Wanted::StripeSizes, Wanted::Metadata] {
        if wanted == Wanted::Metadata && owner.range().begin != 0 {
            continue;
        }
        let keys = until_read(owner, || owner.keys_at(lsn, wanted, true)).await?.unwrap_or_default();
        for some in keys.chunks(VALUES_AT_A_TIME) {
            let loads = some.iter().map(|key| async {
                let value = until_read(owner, || owner.value(*key, lsn)).await?;
                let bytes = match (value, key.kind()) {
                    (Some(shard::Rebuilt::Absent), _) => return Ok(()),
                    (Some(shard::Rebuilt::Bytes(bytes)), _) => bytes,
                    // Of pages of SLRUs only the key counts.
                    (_, Ok(KeyKind::Slru(..))) => Vec::new(),
                    (_, Ok(KeyKind::StripeSize { .. })) => {
                        owner.unreadable.borrow_mut().insert(*key);
                        anything(owner).to_bytes()
                    }
                    _ => return Ok(()),
                };
                if let Err(error) = ingest.borrow_mut().load(*key, &bytes) {
                    owner.count_fault(&error);
                }
                Ok(())
            });
            futures_util::future::join_all(loads).await.into_iter().collect::<Result<(), StartError>>()?;
        }
    }
    owner.ingest.replace(ingest.into_inner());
    let state = owner.state.borrow();
    let lost = owner.files.lost();
    owner
        .hold_uploads
        .set(lost.keys().any(|layer| state.indexes().get(*layer).is_none() && state.is_needed(*layer, lsn)));
    Ok(())
}

/// What a stripe is taken for whose length cannot be read: as long as it can be, with all that ever was in it. Then a block of it is
/// read as far down as the layer that is lost, and no record makes a length that would hide that.
fn anything(owner: &Owner) -> StripeSize {
    StripeSize { length: owner.striping.stripe_blocks, floor: Lsn::INVALID }
}

/// Reads for as long as object storage does not answer; `None` for what cannot be read for good, which is counted.
async fn until_read<T, F>(owner: &Owner, read: impl Fn() -> F) -> Result<Option<T>, StartError>
where
    F: Future<Output = Result<T, ReadFault>>,
{
    loop {
        match read().await {
            Ok(value) => return Ok(Some(value)),
            Err(ReadFault::Layer(LayerFault::Unavailable { cause, .. })) => {
                note(&owner.process, "object storage does not answer", &cause);
                driver::sleep(PAUSE).await;
                if owner.is_stopping() {
                    return Err(StartError::Stopped);
                }
            }
            Err(fault) => {
                owner.count_fault(&fault);
                return Ok(None);
            }
        }
    }
}
