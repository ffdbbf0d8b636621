//! What the object store holds of one shard, and who may write and remove it.
//!
//! Anyone reads by a [`ShardStore`]. Writing takes a [`ShardOwner`], which only a claim gives. Two owners may believe in
//! themselves at once: nothing that the older one does harms the newer one, since all that it writes has its generation
//! in the name, the highest manifest wins, and it removes nothing once a newer claim is there.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Mutex, PoisonError},
};

use layers::{LayerId, Manifest, ManifestError, ShardGeneration, ShardId};
use pgtypes::LogId;
use thiserror::Error;

use crate::{
    claim::{self, ClaimNonce},
    error::StorageError,
    keys::{self, Kind, ManifestVersion},
    storage::{PutNew, RemoteStorage},
};

/// Manifests that stay: the newest, and the one before for whoever looks at what went wrong.
const MANIFESTS_KEPT: usize = 2;
/// How often the newest manifest may vanish between its listing and its reading, because its owner goes on writing.
const NEWEST_TRIES_MAX: u32 = 10;

/// An operation on a shard failed.
#[derive(Debug, Error)]
pub enum ShardError {
    /// The object store did not do it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A newer owner is there, or one with the same generation: this one has to stop.
    #[error("shard {shard:08x}: generation {generation} is not the owner: {newest} is claimed", shard = shard.0,
        generation = generation.0, newest = newest.0)]
    NotOwner {
        /// The shard.
        shard: ShardId,
        /// Who asks.
        generation: ShardGeneration,
        /// The newest claim.
        newest: ShardGeneration,
    },
    /// This generation was claimed from another disk: it was given out twice.
    #[error("shard {shard:08x}: generation {generation} was claimed from another disk: it was given out twice; a new one is needed",
        shard = shard.0, generation = generation.0)]
    OtherClaim {
        /// The shard.
        shard: ShardId,
        /// Who asks.
        generation: ShardGeneration,
    },
    /// A claim is damaged, or of another version of the format.
    #[error("{key}: {what}")]
    Claim {
        /// The object.
        key: String,
        /// What is wrong.
        what: String,
    },
    /// A manifest is not what it should be. The shard does not open; an operator has to look at it.
    #[error("{key}: {source}")]
    Manifest {
        /// The object.
        key: String,
        /// What is wrong.
        source: ManifestError,
    },
    /// A manifest belongs to another shard, or the caller's is not its own, or is not the next one.
    #[error("{key}: {what}")]
    WrongManifest {
        /// The object.
        key: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A layer with other bytes is there under this name: a name was given twice.
    #[error("{key} is there with other bytes")]
    LayerDiffers {
        /// The object.
        key: String,
    },
    /// The caller would remove a layer that the shard needs.
    #[error("layer {0} is named by the newest manifest, or none was written yet: not removed")]
    LayerNeeded(LayerId),
    /// The newest manifest vanished time after time before it was read.
    #[error("{0}: manifests come and go faster than they can be read")]
    ManifestsChange(String),
}

/// What the object store holds of a shard, to read.
#[derive(Clone, Debug)]
pub struct ShardStore {
    storage: RemoteStorage,
    log: LogId,
    shard: ShardId,
}

impl ShardStore {
    /// The shard's part of a store. Reads nothing yet.
    pub fn new(storage: RemoteStorage, log: LogId, shard: ShardId) -> ShardStore {
        ShardStore { storage, log, shard }
    }

    /// The store beneath.
    pub fn storage(&self) -> &RemoteStorage {
        &self.storage
    }

    fn directory(&self, kind: Kind) -> String {
        keys::directory(self.log, self.shard, kind)
    }

    /// The highest generation that was claimed.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn newest_claim(&self) -> Result<Option<ShardGeneration>, StorageError> {
        let claims = self.storage.list(&self.directory(Kind::Claims)).await?;
        Ok(claims.iter().filter_map(|claim| keys::number(keys::name(&claim.key))).max().map(ShardGeneration))
    }

    /// Claims the shard for `generation` under a nonce that nobody else knows: for an owner that does not come back.
    ///
    /// # Errors
    /// As [`ShardStore::claim_as`].
    pub async fn claim(&self, generation: ShardGeneration) -> Result<ShardOwner, ShardError> {
        let nonce = ClaimNonce::random().map_err(|error| StorageError::Unavailable {
            operation: crate::Operation::PutNew,
            key: keys::claim(self.log, self.shard, generation),
            attempts: 0,
            cause: format!("random number: {error}"),
        })?;
        self.claim_as(generation, nonce).await
    }

    /// Claims the shard for `generation`, which has to be above every claim that is there. Afterwards, no older owner
    /// removes a layer that the newest manifest names.
    ///
    /// # Errors
    /// [`ShardError::NotOwner`]: the same or a higher generation is claimed, by this process in an earlier life or
    /// another. After a [`StorageError`], too, the claim may be there: [`ShardStore::claim_again`] finds out whose it is.
    pub async fn claim_as(&self, generation: ShardGeneration, nonce: ClaimNonce) -> Result<ShardOwner, ShardError> {
        self.check_no_claim_from(generation.0, generation).await?;
        let key = keys::claim(self.log, self.shard, generation);
        // Of two with the same generation just one may win, so their bytes have to differ: see `put_new`.
        if self.storage.put_new(&key, claim::encode(generation, nonce)).await? != PutNew::Created {
            return Err(self.not_owner(generation, generation));
        }
        // Whoever claimed a higher one meanwhile has not seen this claim, and need not.
        self.check_no_claim_from(generation.0.saturating_add(1), generation).await?;
        Ok(ShardOwner { store: self.clone(), generation, durable: Mutex::new(None) })
    }

    /// The claim of an earlier life of the same owner, which knows `nonce` from its own disk and has ended since. What that
    /// life still has in flight is harmless: a manifest of it takes the sequence that this life would write, which is then
    /// told that it is not the owner, and begins again with that manifest.
    ///
    /// # Errors
    /// [`ShardError::NotOwner`]: a higher generation is claimed, or this one is not. [`ShardError::OtherClaim`]: another
    /// disk was given this generation, too, and claimed it. [`ShardError::Claim`]: the claim cannot be read. Or see
    /// [`StorageError`].
    pub async fn claim_again(&self, generation: ShardGeneration, nonce: ClaimNonce) -> Result<ShardOwner, ShardError> {
        match self.newest_claim().await? {
            Some(newest) if newest == generation => {}
            newest => return Err(self.not_owner(generation, newest.unwrap_or_default())),
        }
        let key = keys::claim(self.log, self.shard, generation);
        let bytes = self.storage.get(&key).await?;
        match claim::decode(&bytes, generation) {
            Ok(found) if found == nonce => {
                Ok(ShardOwner { store: self.clone(), generation, durable: Mutex::new(None) })
            }
            Ok(_) => Err(ShardError::OtherClaim { shard: self.shard, generation }),
            Err(what) => Err(ShardError::Claim { key, what }),
        }
    }

    fn not_owner(&self, generation: ShardGeneration, newest: ShardGeneration) -> ShardError {
        ShardError::NotOwner { shard: self.shard, generation, newest }
    }

    /// Refused if a claim of at least `bound` is there.
    async fn check_no_claim_from(&self, bound: u64, generation: ShardGeneration) -> Result<(), ShardError> {
        match self.newest_claim().await? {
            Some(newest) if newest.0 >= bound => Err(self.not_owner(generation, newest)),
            _ => Ok(()),
        }
    }

    /// Versions of the manifests that are there, rising.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn manifest_versions(&self) -> Result<Vec<ManifestVersion>, StorageError> {
        let manifests = self.storage.list(&self.directory(Kind::Manifests)).await?;
        let pairs = manifests.iter().filter_map(|manifest| keys::pair(keys::name(&manifest.key)));
        let version = |(generation, sequence)| ManifestVersion { generation: ShardGeneration(generation), sequence };
        let mut versions: Vec<_> = pairs.map(version).collect();
        versions.sort_unstable();
        Ok(versions)
    }

    /// A manifest by its version.
    ///
    /// # Errors
    /// It is not there, damaged, of another version of the format, or another's.
    pub async fn manifest(&self, version: ManifestVersion) -> Result<Manifest, ShardError> {
        let key = keys::manifest(self.log, self.shard, version);
        let bytes = self.storage.get_large(&key).await?;
        let manifest = match Manifest::decode(&bytes) {
            Ok(manifest) => manifest,
            Err(source) => return Err(ShardError::Manifest { key, source }),
        };
        if (manifest.log, manifest.shard) != (self.log, self.shard) || version_of(&manifest) != version {
            return Err(ShardError::WrongManifest { key, what: "it is the manifest of another shard or version" });
        }
        Ok(manifest)
    }

    /// The state of the shard; `None` if it never had one. A new owner reads it after its claim, not before.
    ///
    /// # Errors
    /// It is damaged, or of another version of the format: nothing older is taken for it. Or see [`StorageError`].
    pub async fn newest_manifest(&self) -> Result<Option<Manifest>, ShardError> {
        for _ in 0..NEWEST_TRIES_MAX {
            let Some(version) = self.manifest_versions().await?.pop() else { return Ok(None) };
            match self.manifest(version).await {
                // An older owner that goes on wrote two more and removed it.
                Err(ShardError::Storage(StorageError::NotFound { .. })) => {}
                result => return result.map(Some),
            }
        }
        Err(ShardError::ManifestsChange(self.directory(Kind::Manifests)))
    }

    /// Brings a layer to a local file, which appears whole; returns its length. The layer may be another shard's.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn get_layer(&self, id: LayerId, file: &Path) -> Result<u64, StorageError> {
        self.storage.download(&keys::layer(self.log, id), file).await
    }

    /// Bytes of a layer, half-open.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn get_layer_range(
        &self,
        id: LayerId,
        range: std::ops::Range<u64>,
    ) -> Result<bytes::Bytes, StorageError> {
        self.storage.get_range(&keys::layer(self.log, id), range).await
    }

    /// All layers of this shard's directory with their lengths, rising: those of no manifest, too, which an owner left
    /// that died between an upload and a manifest.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn list_layers(&self) -> Result<Vec<(LayerId, u64)>, StorageError> {
        let layers = self.storage.list(&self.directory(Kind::Layers)).await?;
        let mut ids: Vec<_> = layers
            .iter()
            .filter_map(|layer| {
                let (generation, number) = keys::pair(keys::name(&layer.key))?;
                let id = LayerId { shard: self.shard, generation: ShardGeneration(generation), number };
                Some((id, layer.bytes))
            })
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }
}

fn version_of(manifest: &Manifest) -> ManifestVersion {
    ManifestVersion { generation: manifest.generation, sequence: manifest.sequence }
}

/// The newest manifest of this owner that is durable.
#[derive(Debug)]
struct Durable {
    sequence: u64,
    named: BTreeSet<LayerId>,
}

/// The shard as its owner has it: one that claimed it, whether or not it still is the newest.
#[derive(Debug)]
pub struct ShardOwner {
    store: ShardStore,
    generation: ShardGeneration,
    durable: Mutex<Option<Durable>>,
}

impl std::ops::Deref for ShardOwner {
    type Target = ShardStore;

    fn deref(&self) -> &ShardStore {
        &self.store
    }
}

impl ShardOwner {
    /// Whose generation it is.
    pub fn generation(&self) -> ShardGeneration {
        self.generation
    }

    /// Whether a newer owner has claimed the shard.
    ///
    /// # Errors
    /// [`ShardError::NotOwner`] if so.
    pub async fn check_owner(&self) -> Result<(), ShardError> {
        self.check_no_claim_from(self.generation.0.saturating_add(1), self.generation).await
    }

    /// Uploads a layer of this owner. Done twice with the same file it succeeds twice.
    ///
    /// # Errors
    /// Another layer has its name, the file cannot be read, or see [`StorageError`].
    pub async fn put_layer(&self, id: LayerId, file: &Path) -> Result<(), ShardError> {
        let key = keys::layer(self.store.log, id);
        assert!(
            id.shard == self.store.shard && id.generation == self.generation,
            "an owner names layers by its own shard and generation"
        );
        match self.store.storage.upload_new(&key, file).await? {
            PutNew::Created | PutNew::AlreadyThere { same: true } => Ok(()),
            PutNew::AlreadyThere { same: false } => Err(ShardError::LayerDiffers { key }),
        }
    }

    /// Makes a manifest durable, which has to be the next of this owner: what it names was uploaded before. Then removes
    /// manifests that are older than the two newest.
    ///
    /// # Errors
    /// It is not this owner's or its sequence does not rise; another wrote one under this generation and sequence
    /// ([`ShardError::NotOwner`]); or see [`StorageError`]: then it may be durable all the same, and only the same
    /// manifest may be put under this sequence again.
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<(), ShardError> {
        let version = version_of(manifest);
        let key = keys::manifest(self.store.log, self.store.shard, version);
        let wrong = |what| ShardError::WrongManifest { key: key.clone(), what };
        if (manifest.log, manifest.shard, manifest.generation) != (self.store.log, self.store.shard, self.generation) {
            return Err(wrong("it is not this owner's"));
        }
        if self.durable().as_ref().is_some_and(|durable| durable.sequence >= manifest.sequence) {
            return Err(wrong("its sequence does not rise"));
        }
        let bytes = manifest.encode().map_err(|source| ShardError::Manifest { key: key.clone(), source })?;
        match self.store.storage.put_new(&key, bytes).await? {
            PutNew::Created | PutNew::AlreadyThere { same: true } => {}
            PutNew::AlreadyThere { same: false } => return Err(self.store.not_owner(self.generation, self.generation)),
        }
        let named = manifest.layers.iter().map(|layer| layer.id).collect();
        *self.durable() = Some(Durable { sequence: manifest.sequence, named });
        if let Err(error) = self.remove_old_manifests().await {
            // They are removed with the next one.
            tracing::warn!(shard = self.store.shard.0, %error, "old manifests stay for now");
        }
        Ok(())
    }

    async fn remove_old_manifests(&self) -> Result<(), StorageError> {
        let versions = self.store.manifest_versions().await?;
        let old = &versions[..versions.len().saturating_sub(MANIFESTS_KEPT)];
        let keys = old.iter().map(|version| keys::manifest(self.store.log, self.store.shard, *version)).collect();
        self.store.storage.delete(keys).await
    }

    /// Removes layers, which may be other shards'. None of them is named by the newest manifest that this owner made
    /// durable, and after that no newer owner had claimed the shard; otherwise none is removed.
    ///
    /// # Errors
    /// A layer is named or this owner wrote no manifest; [`ShardError::NotOwner`]; or see [`StorageError`]: then some may
    /// be removed.
    pub async fn delete_layers(&self, ids: &[LayerId]) -> Result<(), ShardError> {
        {
            let durable = self.durable();
            let named = durable.as_ref().map(|durable| &durable.named);
            if let Some(needed) = ids.iter().find(|id| named.is_none_or(|named| named.contains(id))) {
                return Err(ShardError::LayerNeeded(*needed));
            }
        }
        // After the manifest: whoever claims later than this listing reads that manifest or a newer one.
        self.check_owner().await?;
        self.store.storage.delete(ids.iter().map(|id| keys::layer(self.store.log, *id)).collect()).await?;
        Ok(())
    }

    fn durable(&self) -> std::sync::MutexGuard<'_, Option<Durable>> {
        // It is replaced as a whole.
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
