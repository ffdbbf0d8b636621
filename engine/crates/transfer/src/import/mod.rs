//! A stopped PGDATA becomes the first layers of a lakebase.
//!
//! One pass: each shard's stripes in the order of their keys, every page checked, image layers at N (the start of the log)
//! written to a scratch directory and uploaded behind the next one's writing. `cluster.json` is written last; without it
//! nobody takes what is there for a lakebase. Memory: one stripe, the index of one layer, a list of the stripes.

mod layer_files;
mod metadata_values;
mod relation_reader;
mod stripe;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};

use layers::{
    HashRange, Key, LayerDescription, LayerId, LayerIdentity, Manifest, ShardGeneration, ShardId, Split, Striping,
};
use pgtypes::{ClusterId, FrameSummary, LogId, Lsn};
use remote_storage::{
    CLUSTER_VERSION, ClusterDescription, ClusterError, RemoteStorage, ShardError, ShardOwner, ShardRange, ShardStore,
    StorageError, block_on,
};

pub use self::layer_files::LayerFileError;
use self::{
    layer_files::{LAYER_BYTES_TARGET, LayerFiles, LayerOnDisk},
    metadata_values::{slru_pages, small_values},
    relation_reader::RelationReader,
    stripe::{Stripe, stripes_of},
};
use crate::{
    page::{PageError, PageRules},
    pgdata::{PgData, PgDataError},
    progress::Progress,
    relations::{BLOCK_BYTES, ForkFiles, relation_forks},
};

/// Shards that an import makes at most; a shard can be split later.
pub const SHARDS_MAX: u32 = 4096;
/// The import owns each shard before its first page server does.
const GENERATION: ShardGeneration = ShardGeneration(0);
/// As `PG_VERSION_NUM`.
const POSTGRES_VERSION: u32 = 170_000;
/// Layers that wait for their upload, beside the one that is uploaded and the one that is written.
const WAITING_LAYERS_MAX: usize = 1;

/// What to import, and where to.
#[derive(Clone, Debug)]
pub struct Import {
    /// The PGDATA.
    pub pgdata: PgData,
    /// Names of the new lakebase and its branch.
    pub log: LogId,
    /// How many shards its pages are divided among: 1 to [`SHARDS_MAX`].
    pub shards: u32,
    /// How relations are cut into stripes.
    pub striping: Striping,
    /// A directory for layers that are not uploaded yet: three times 256 MiB at most.
    pub scratch: PathBuf,
}

/// What was imported.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Imported {
    /// What `cluster.json` says.
    pub cluster: ClusterDescription,
    /// Forks of relations.
    pub forks: u64,
    /// Pages that are not all zero.
    pub pages: u64,
    /// Layers.
    pub layers: u64,
    /// Their size.
    pub layer_bytes: u64,
}

/// Nothing that looks like a lakebase was left.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The PGDATA.
    #[error(transparent)]
    PgData(#[from] PgDataError),
    /// One of its pages.
    #[error(
        "{0}: PostgreSQL would refuse it, too. Repair or drop the relation first; pg_checksums --check finds all damaged pages"
    )]
    Page(#[from] PageError),
    /// A layer.
    #[error(transparent)]
    Layer(#[from] LayerFileError),
    /// The scratch directory.
    #[error("{}: {cause}", path.display())]
    Scratch {
        /// Where.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Object storage.
    #[error("object storage: {0}")]
    Storage(#[from] StorageError),
    /// What object storage has of a shard.
    #[error("object storage: {0}")]
    Shard(#[from] ShardError),
    /// `cluster.json`.
    #[error("object storage: {0}")]
    Cluster(#[from] ClusterError),
    /// The name is taken.
    #[error("lakebase {0} exists already; import never changes one: leave out --cluster, or remove all of it first")]
    Exists(ClusterId),
    /// Something under the name, but no lakebase.
    #[error(
        "{objects} objects of lakebase {cluster} are there, but no cluster.json: an import runs, or was interrupted. Leave out --cluster to get another name, or remove them"
    )]
    Leftovers {
        /// Whose.
        cluster: ClusterId,
        /// How many.
        objects: usize,
    },
    /// More shards than are possible, or none.
    #[error("{0} shards: expected 1 to {SHARDS_MAX}")]
    Shards(u32),
    /// By the user.
    #[error("interrupted")]
    Interrupted,
}

/// Imports. Blocks; errors leave no objects behind where storage still answers.
///
/// # Errors
/// See [`ImportError`]. The PGDATA is never changed.
pub fn run(import: &Import, storage: &RemoteStorage, progress: &dyn Progress) -> Result<Imported, ImportError> {
    if !(1..=SHARDS_MAX).contains(&import.shards) {
        return Err(ImportError::Shards(import.shards));
    }
    let cluster = import.log.cluster;
    match block_on(ClusterDescription::get(storage, cluster)) {
        Err(ClusterError::Storage(error)) if error.is_not_found() => {}
        // Damaged or of another version, it is a lakebase all the same.
        Ok(_) | Err(ClusterError::UnknownVersion { .. } | ClusterError::Malformed { .. }) => {
            return Err(ImportError::Exists(cluster));
        }
        Err(error) => return Err(error.into()),
    }
    let objects = block_on(storage.list(&cluster.to_string()))?.len();
    if objects > 0 {
        return Err(ImportError::Leftovers { cluster, objects });
    }
    let scratch = Scratch::create(&import.scratch, cluster)?;
    let result = Importer { import, storage, progress, scratch: &scratch.path }.run();
    if result.is_err() {
        remove_all(storage, cluster);
    }
    result
}

/// All of it is ours: there was nothing. What cannot be removed, because storage is what failed, the next import of this
/// name tells.
fn remove_all(storage: &RemoteStorage, cluster: ClusterId) {
    let objects = block_on(storage.list(&cluster.to_string())).unwrap_or_default();
    let _ = block_on(storage.delete(objects.into_iter().map(|object| object.key).collect()));
}

/// A directory that goes with the import.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn create(parent: &Path, cluster: ClusterId) -> Result<Scratch, ImportError> {
        let path = parent.join(format!("lakebase-import-{cluster}-{}", std::process::id()));
        fs::create_dir(&path).map_err(|cause| ImportError::Scratch { path: path.clone(), cause })?;
        Ok(Scratch { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing depends on it; a directory of temporary files is where it stays otherwise.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Takes the values of a shard, in the order of their keys.
type PutValue<'a> = &'a mut dyn FnMut(Key, &[u8]) -> Result<(), ImportError>;

struct Importer<'a> {
    import: &'a Import,
    storage: &'a RemoteStorage,
    progress: &'a dyn Progress,
    scratch: &'a Path,
}

impl Importer<'_> {
    fn run(&self) -> Result<Imported, ImportError> {
        let pgdata = &self.import.pgdata;
        let forks = relation_forks(&pgdata.directory)?;
        let bytes = forks.iter().map(|files| u64::from(files.blocks) * BLOCK_BYTES as u64).sum();
        self.progress.begin("import", bytes);
        let cluster = self.description();
        let mut imported =
            Imported { cluster: cluster.clone(), forks: forks.len() as u64, pages: 0, layers: 0, layer_bytes: 0 };
        for index in 0..self.import.shards {
            let (shard, range) = (ShardId(index), HashRange::even_part(index, self.import.shards));
            let store = ShardStore::new(self.storage.clone(), self.import.log, shard);
            let owner = block_on(store.claim(GENERATION))?;
            let (layers, pages) = self.shard(shard, range, &forks, &owner)?;
            imported.pages += pages;
            imported.layers += layers.len() as u64;
            imported.layer_bytes += layers.iter().map(|layer| layer.file_bytes).sum::<u64>();
            block_on(owner.put_manifest(&self.manifest(shard, range, layers)))?;
        }
        if self.progress.is_interrupted() {
            return Err(ImportError::Interrupted);
        }
        block_on(cluster.put(self.storage))?;
        Ok(imported)
    }

    fn description(&self) -> ClusterDescription {
        let Import { pgdata, log, shards, striping, .. } = self.import;
        let control = &pgdata.control;
        ClusterDescription {
            version: CLUSTER_VERSION,
            cluster: log.cluster,
            branch: log.branch,
            system_id: control.system_id,
            // A data directory says no minor release.
            postgres_version: POSTGRES_VERSION,
            segment_bytes: control.segment_bytes,
            start_lsn: pgdata.log_start(),
            timeline: control.checkpoint.timeline,
            next_full_xid: control.checkpoint.next_full_xid,
            stripe_blocks: striping.stripe_blocks,
            checksums: pgdata.has_checksums(),
            shards: (0..*shards)
                .map(|shard| {
                    let HashRange { begin, end } = HashRange::even_part(shard, *shards);
                    ShardRange { shard, begin, end }
                })
                .collect(),
        }
    }

    fn manifest(&self, shard: ShardId, range: HashRange, layers: Vec<LayerDescription>) -> Manifest {
        let Import { pgdata, log, striping, .. } = self.import;
        let control = &pgdata.control;
        let start = pgdata.log_start();
        Manifest {
            log: *log,
            shard,
            generation: GENERATION,
            sequence: 1,
            range,
            stripe_blocks: striping.stripe_blocks,
            system_id: control.system_id,
            segment_bytes: control.segment_bytes,
            checksums: pgdata.has_checksums(),
            horizon: start,
            through: FrameSummary {
                record_end: start,
                record_start: Lsn::INVALID,
                timeline: control.checkpoint.timeline,
                max_full_xid: control.checkpoint.next_full_xid.saturating_sub(1),
                commit_timestamp: 0,
            },
            next_layer: layers.iter().map(|layer| layer.id.number).max().unwrap_or(0) + 1,
            layers,
        }
    }

    /// Writes and uploads all layers of a shard; returns them, and how many pages they hold.
    fn shard(
        &self,
        shard: ShardId,
        range: HashRange,
        forks: &[ForkFiles],
        owner: &ShardOwner,
    ) -> Result<(Vec<LayerDescription>, u64), ImportError> {
        let (send, receive) = mpsc::sync_channel::<LayerOnDisk>(WAITING_LAYERS_MAX);
        thread::scope(|scope| {
            let uploads = scope.spawn(move || upload(owner, &receive));
            let written = self.write_layers(shard, range, forks, send);
            let uploaded = uploads.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // When an upload fails, the writer finds the channel closed: the upload's error is the cause.
            let uploaded = uploaded?;
            Ok((uploaded, written?))
        })
    }

    fn write_layers(
        &self,
        shard: ShardId,
        range: HashRange,
        forks: &[ForkFiles],
        finished: mpsc::SyncSender<LayerOnDisk>,
    ) -> Result<u64, ImportError> {
        let Import { pgdata, log, striping, .. } = self.import;
        let identity = LayerIdentity {
            log: *log,
            id: LayerId { shard, generation: GENERATION, number: 1 },
            stripe_blocks: striping.stripe_blocks,
        };
        let split = Split { keys: range.keys(), cuts: Default::default(), layer_bytes_target: LAYER_BYTES_TARGET };
        let mut layers = LayerFiles::new(self.scratch, identity, split, pgdata.log_start());
        let mut put = |key: Key, value: &[u8]| -> Result<(), ImportError> {
            if self.progress.is_interrupted() {
                return Err(ImportError::Interrupted);
            }
            match layers.put(key, value)? {
                Some(layer) => finished.send(layer).map_err(|_| ImportError::Interrupted),
                None => Ok(()),
            }
        };
        if range.begin == 0 {
            for (key, value) in small_values(pgdata)? {
                put(key, &value)?;
            }
            slru_pages(pgdata, &mut put)?;
        }
        let pages = self.relations(range, forks, &mut put)?;
        for layer in layers.finish()? {
            finished.send(layer).map_err(|_| ImportError::Interrupted)?;
        }
        Ok(pages)
    }

    /// Puts lengths and pages of a shard's stripes; returns the number of pages.
    fn relations(&self, range: HashRange, forks: &[ForkFiles], put: PutValue<'_>) -> Result<u64, ImportError> {
        let Import { pgdata, striping, .. } = self.import;
        let rules = PageRules { has_checksums: pgdata.has_checksums(), end_bound: pgdata.end_bound() };
        let mut reader = RelationReader::new(&pgdata.directory);
        let mut buffer = Vec::new();
        let mut pages = 0;
        let stripes = stripes_of(forks, *striping, range);
        for of_hash in stripes.chunk_by(|a, b| a.hash == b.hash) {
            for stripe in of_hash {
                let key = striping.stripe_size(stripe.files.relation, stripe.files.fork, stripe.number);
                put(key, &shard::StripeSize { length: stripe.blocks, floor: Lsn::INVALID }.to_bytes())?;
            }
            for Stripe { files, first, blocks, .. } in of_hash {
                buffer.resize(*blocks as usize * BLOCK_BYTES, 0);
                reader.read(files, *first, &mut buffer)?;
                for (page, block) in buffer.as_chunks::<BLOCK_BYTES>().0.iter().zip(*first..) {
                    let fault = |fault| PageError { path: pgdata.directory.join(files.path(block)), block, fault };
                    // A block below the length that has no value is a page of zeros.
                    if rules.check(page, block).map_err(fault)? {
                        put(striping.block(files.relation, files.fork, block), page)?;
                        pages += 1;
                    }
                }
                self.progress.advance(buffer.len() as u64);
            }
        }
        Ok(pages)
    }
}

/// Uploads layers until there are no more, and removes their files.
fn upload(owner: &ShardOwner, layers: &mpsc::Receiver<LayerOnDisk>) -> Result<Vec<LayerDescription>, ImportError> {
    let mut uploaded = Vec::new();
    for LayerOnDisk { description, path } in layers {
        block_on(owner.put_layer(description.id, &path))?;
        fs::remove_file(&path).map_err(|cause| ImportError::Scratch { path, cause })?;
        uploaded.push(description);
    }
    Ok(uploaded)
}
