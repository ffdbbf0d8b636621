//! Layer files: those on the local disk, and those that have to be had from object storage.
//!
//! A local file is a copy of an object, or a layer that is not uploaded yet. A copy that is damaged is removed, and the object
//! asked; when the object is damaged or missing, too, the layer is *lost*: it is named in the status, and reads that need it fail.
//! Knows nothing about what layers mean. Read next: `owner.rs`.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use driver::{Event, File, OpenOptions};
use layers::{ByteRange, HEADER_BYTES, Index, LayerDescription, LayerError, LayerFile, LayerId, TRAILER_BYTES};
use remote_storage::{ShardStore, StorageError};

use crate::{block_cache::BlockCache, data_dir::layer_path, metrics::Metrics};

/// Files that are fetched at a time, in the background of reads that go to object storage meanwhile.
const FETCHES_MAX: usize = 2;

/// Bytes of an index that are fetched together with the trailer: one request for small layers.
const TAIL_BYTES: u64 = 64 << 10;

/// Descriptors of layer files that are held open; beyond it those that were used longest ago are closed.
const OPEN_FILES_MAX: usize = 1024;

/// A layer cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LayerFault {
    /// Its object is missing or damaged, and there is no sound copy here.
    #[error("layer {layer} is lost: {cause}")]
    Lost {
        /// Which.
        layer: LayerId,
        /// What is wrong with it.
        cause: String,
    },
    /// Object storage does not answer; it may later.
    #[error("layer {layer} is not on this disk, and object storage does not answer: {cause}")]
    Unavailable {
        /// Which.
        layer: LayerId,
        /// What object storage says.
        cause: String,
    },
    /// It was removed meanwhile: whoever needed it looks at the map again.
    #[error("layer {0} was replaced")]
    Gone(LayerId),
}

#[derive(Default)]
struct Entry {
    /// Length of the file.
    bytes: u64,
    /// There is a local file.
    is_local: bool,
    /// Object storage has it.
    is_uploaded: bool,
    /// Being fetched.
    is_fetched: bool,
    /// Compactions that read the local file: it stays.
    pins: u32,
    open: Option<File>,
    /// When it was last used, by a counter.
    used: u64,
}

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Local copies of layers that object storage has, too; 0 is no limit.
    pub local_bytes: u64,
    /// Unpacked blocks in memory.
    pub block_bytes: u64,
}

/// All layer files of a shard.
pub struct LayerFiles {
    directory: PathBuf,
    store: ShardStore,
    metrics: Metrics,
    /// Limit of local copies; 0 is none.
    local_bytes_max: u64,
    entries: RefCell<HashMap<LayerId, Entry>>,
    local_bytes: Cell<u64>,
    clock: Cell<u64>,
    lost: RefCell<BTreeMap<LayerId, String>>,
    blocks: BlockCache,
    fetches: Cell<usize>,
    changed: Event,
}

/// Keeps a local file until it is dropped.
pub struct Pin {
    files: Rc<LayerFiles>,
    layer: LayerId,
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some(entry) = self.files.entries.borrow_mut().get_mut(&self.layer) {
            entry.pins -= 1;
        }
    }
}

impl LayerFiles {
    /// Files in `directory`, of which none is known yet.
    pub fn new(directory: PathBuf, store: ShardStore, bounds: Bounds, metrics: Metrics) -> Rc<LayerFiles> {
        Rc::new(LayerFiles {
            directory,
            store,
            metrics,
            local_bytes_max: bounds.local_bytes,
            entries: RefCell::default(),
            local_bytes: Cell::new(0),
            clock: Cell::new(0),
            lost: RefCell::default(),
            blocks: BlockCache::new(usize::try_from(bounds.block_bytes).unwrap_or(usize::MAX)),
            fetches: Cell::new(0),
            changed: Event::new(),
        })
    }

    /// Where they lie.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Adds a layer that object storage has, and says whether its file lies here.
    pub fn add_uploaded(&self, layer: &LayerDescription, is_local: bool) {
        self.add(layer, is_local, true);
    }

    /// Adds a layer of which only the local file exists.
    pub fn add_written(&self, layer: &LayerDescription) {
        self.add(layer, true, false);
    }

    fn add(&self, layer: &LayerDescription, is_local: bool, is_uploaded: bool) {
        let entry = Entry { bytes: layer.file_bytes, is_local, is_uploaded, used: self.tick(), ..Entry::default() };
        self.entries.borrow_mut().insert(layer.id, entry);
        if is_local {
            self.count_local(layer.file_bytes as i64);
        }
    }

    /// Object storage has it now.
    pub fn set_uploaded(&self, layer: LayerId) {
        if let Some(entry) = self.entries.borrow_mut().get_mut(&layer) {
            entry.is_uploaded = true;
        }
    }

    /// Forgets a layer and removes its file.
    pub fn remove(&self, layer: LayerId) {
        let entry = self.entries.borrow_mut().remove(&layer);
        if entry.is_some_and(|entry| entry.is_local) {
            self.remove_file(layer);
        }
        if self.lost.borrow_mut().remove(&layer).is_some() {
            self.metrics.lost_layers.set(self.lost.borrow().len() as i64);
        }
    }

    /// Removes a local file, whose length is no longer counted.
    fn remove_file(&self, layer: LayerId) {
        let path = layer_path(&self.directory, layer);
        match std::fs::metadata(&path).and_then(|metadata| std::fs::remove_file(&path).map(|()| metadata.len())) {
            Ok(bytes) => self.count_local(-(bytes as i64)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A file too many: the next start removes it.
            Err(error) => tracing::warn!(%error, path = %path.display(), "layer file cannot be removed"),
        }
    }

    fn count_local(&self, change: i64) {
        let bytes = self.local_bytes.get().saturating_add_signed(change);
        self.local_bytes.set(bytes);
        self.metrics.local_bytes.set(bytes);
    }

    fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    /// Bytes of local files.
    pub fn local_bytes(&self) -> u64 {
        self.local_bytes.get()
    }

    /// How many layers have a local file.
    pub fn local_count(&self) -> usize {
        self.entries.borrow().values().filter(|entry| entry.is_local).count()
    }

    /// Whether a layer has a local file, and whether object storage has it.
    pub fn whereabouts(&self, layer: LayerId) -> (bool, bool) {
        self.entries.borrow().get(&layer).map_or((false, false), |entry| (entry.is_local, entry.is_uploaded))
    }

    /// Layers that are lost, and why.
    pub fn lost(&self) -> BTreeMap<LayerId, String> {
        self.lost.borrow().clone()
    }

    /// Whether any layer is lost.
    pub fn has_lost(&self) -> bool {
        !self.lost.borrow().is_empty()
    }

    fn lose(&self, layer: LayerId, cause: String) -> LayerFault {
        if self.lost.borrow_mut().insert(layer, cause.clone()).is_none() {
            tracing::error!(%layer, %cause, "a layer is lost: pages that need it cannot be read");
            self.metrics.lost_layers.set(self.lost.borrow().len() as i64);
        }
        LayerFault::Lost { layer, cause }
    }

    fn check_lost(&self, layer: LayerId) -> Result<(), LayerFault> {
        match self.lost.borrow().get(&layer) {
            Some(cause) => Err(LayerFault::Lost { layer, cause: cause.clone() }),
            None => Ok(()),
        }
    }

    fn storage_fault(&self, layer: LayerId, error: &StorageError) -> LayerFault {
        if error.is_not_found() {
            if !self.entries.borrow().contains_key(&layer) {
                return LayerFault::Gone(layer);
            }
            return self.lose(layer, "object storage has no such object".to_owned());
        }
        LayerFault::Unavailable { layer, cause: error.to_string() }
    }

    /// An open descriptor of the local file; `None` when there is none.
    async fn local(&self, layer: LayerId) -> Option<File> {
        {
            let used = self.tick();
            let mut entries = self.entries.borrow_mut();
            let entry = entries.get_mut(&layer).filter(|entry| entry.is_local)?;
            entry.used = used;
            if let Some(file) = &entry.open {
                return Some(file.clone());
            }
        }
        let path = layer_path(&self.directory, layer);
        match File::open(&path, OpenOptions::default()).await {
            Ok(file) => {
                let mut entries = self.entries.borrow_mut();
                if let Some(entry) = entries.get_mut(&layer) {
                    entry.open = Some(file.clone());
                }
                close_some(&mut entries);
                Some(file)
            }
            Err(error) => {
                self.discard(layer, &format!("cannot be opened: {error}"));
                None
            }
        }
    }

    /// Removes a local copy that is of no use. One that object storage does not have stays, for whoever may still read it.
    fn discard(&self, layer: LayerId, cause: &str) {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.get_mut(&layer).filter(|entry| entry.is_local) else { return };
        self.metrics.damaged_files.inc();
        tracing::warn!(%layer, cause, "local layer file is of no use: fetching it again");
        if entry.is_uploaded {
            entry.is_local = false;
            entry.open = None;
            drop(entries);
            self.remove_file(layer);
        }
    }

    /// Block `number` of a layer, unpacked, if it is in memory.
    pub fn block_in_memory(&self, layer: LayerId, number: u32) -> Option<Rc<Vec<u8>>> {
        self.blocks.get(layer, number)
    }

    /// Block `number` of a layer, unpacked: from memory, from the local file, else from object storage.
    ///
    /// # Errors
    /// [`LayerFault`].
    pub async fn read_block(
        self: &Rc<Self>,
        layer: LayerId,
        index: &Index,
        number: u32,
    ) -> Result<Rc<Vec<u8>>, LayerFault> {
        if let Some(block) = self.blocks.get(layer, number) {
            return Ok(block);
        }
        self.check_lost(layer)?;
        let place = index.block_place(number).unwrap_or(ByteRange { offset: 0, bytes: 0 });
        let mut damage = None;
        if let Some(file) = self.local(layer).await {
            self.metrics.local_reads.inc();
            let unpacked = file
                .read_range(place.offset, place.bytes as usize)
                .await
                .map_err(|error| error.to_string())
                .and_then(|bytes| index.decode_block(number, &bytes).map_err(|error| error.to_string()));
            match unpacked {
                Ok(block) => return Ok(self.keep(layer, number, block)),
                Err(cause) => {
                    self.discard(layer, &cause);
                    damage = Some(cause);
                }
            }
        }
        match self.entries.borrow().get(&layer) {
            None => return Err(LayerFault::Gone(layer)),
            Some(entry) if !entry.is_uploaded => {
                let cause = damage.unwrap_or_else(|| "its file is gone".to_owned());
                let cause = format!("the local file is its only copy, and it {cause}; WAL has it: restart the server");
                return Err(self.lose(layer, cause));
            }
            Some(_) => {}
        }
        self.fetch_later(layer);
        self.metrics.remote_reads.inc();
        let bytes = self
            .store
            .get_layer_range(layer, place.offset..place.offset + u64::from(place.bytes))
            .await
            .map_err(|error| self.storage_fault(layer, &error))?;
        let block = index
            .decode_block(number, &bytes)
            .map_err(|error| self.lose(layer, format!("its object is damaged: {error}")))?;
        Ok(self.keep(layer, number, block))
    }

    fn keep(&self, layer: LayerId, number: u32, block: Vec<u8>) -> Rc<Vec<u8>> {
        let block = Rc::new(block);
        self.blocks.put(layer, number, block.clone());
        block
    }

    /// The index of a layer: from the local file, else from object storage, of which only the end is fetched.
    ///
    /// # Errors
    /// [`LayerFault`].
    pub async fn load_index(self: &Rc<Self>, layer: &LayerDescription) -> Result<Arc<Index>, LayerFault> {
        let id = layer.id;
        self.check_lost(id)?;
        if let Some(file) = self.local(id).await {
            match self.local_index(&file, layer).await {
                Ok(index) => return Ok(index),
                Err(cause) => self.discard(id, &cause),
            }
        }
        match self.entries.borrow().get(&id) {
            None => return Err(LayerFault::Gone(id)),
            Some(entry) if !entry.is_uploaded => {
                return Err(self.lose(id, "the local file is its only copy, and it is damaged".to_owned()));
            }
            Some(_) => {}
        }
        let fault = |error: StorageError| self.storage_fault(id, &error);
        let header = self.store.get_layer_range(id, 0..HEADER_BYTES as u64).await.map_err(fault)?;
        let tail_bytes = TAIL_BYTES.min(layer.file_bytes).max(TRAILER_BYTES as u64);
        let tail_begin = layer.file_bytes.saturating_sub(tail_bytes);
        let tail = self.store.get_layer_range(id, tail_begin..tail_begin + tail_bytes).await.map_err(fault)?;
        let damaged = |error: LayerError| self.lose(id, format!("its object is damaged: {error}"));
        let trailer = &tail[tail.len().saturating_sub(TRAILER_BYTES)..];
        let file = LayerFile::decode(&header, trailer, layer.file_bytes).map_err(damaged)?;
        let place = file.index;
        let index = match place.offset.checked_sub(tail_begin) {
            Some(at) => {
                let bytes = tail.get(at as usize..(at + u64::from(place.bytes)) as usize).unwrap_or_default();
                Index::decode(&file, bytes)
            }
            None => {
                let bytes = self
                    .store
                    .get_layer_range(id, place.offset..place.offset + u64::from(place.bytes))
                    .await
                    .map_err(fault)?;
                Index::decode(&file, &bytes)
            }
        };
        check_description(&file, layer).map_err(|cause| self.lose(id, cause))?;
        index.map(Arc::new).map_err(damaged)
    }

    async fn local_index(&self, file: &File, layer: &LayerDescription) -> Result<Arc<Index>, String> {
        let io = |error: io::Error| error.to_string();
        let header = file.read_range(0, HEADER_BYTES).await.map_err(io)?;
        let trailer_begin = layer.file_bytes.saturating_sub(TRAILER_BYTES as u64);
        let trailer = file.read_range(trailer_begin, TRAILER_BYTES).await.map_err(io)?;
        let layer_file = LayerFile::decode(&header, &trailer, layer.file_bytes).map_err(|error| error.to_string())?;
        check_description(&layer_file, layer)?;
        let place = layer_file.index;
        let bytes = file.read_range(place.offset, place.bytes as usize).await.map_err(io)?;
        // Checking and unpacking an index of a million values takes tens of milliseconds.
        let index = driver::unblock(move || Index::decode(&layer_file, &bytes)).await;
        index.map(Arc::new).map_err(|error| error.to_string())
    }

    /// Fetches a file in the background, unless it is being fetched or enough others are.
    fn fetch_later(self: &Rc<Self>, layer: LayerId) {
        let fits = |bytes: u64| self.local_bytes_max == 0 || bytes <= self.local_bytes_max / 2;
        let begin = {
            let mut entries = self.entries.borrow_mut();
            let entry = entries.get_mut(&layer);
            entry.filter(|entry| !entry.is_fetched && fits(entry.bytes) && self.fetches.get() < FETCHES_MAX).map(
                |entry| {
                    entry.is_fetched = true;
                    self.fetches.set(self.fetches.get() + 1);
                },
            )
        };
        if begin.is_some() {
            let files = self.clone();
            driver::spawn(async move {
                // Whoever needs the file is told; here nobody waits.
                if let Err(fault) = files.fetch(layer).await {
                    tracing::debug!(%fault, "layer file was not fetched");
                }
                files.fetches.set(files.fetches.get() - 1);
                files.changed.set();
            });
        }
    }

    /// Fetches a file; its entry says already that it is being fetched.
    async fn fetch(&self, layer: LayerId) -> Result<(), LayerFault> {
        let wanted = self.entries.borrow().get(&layer).map_or(0, |entry| entry.bytes);
        self.make_room(wanted);
        let path = layer_path(&self.directory, layer);
        // It appears whole. Its directory is not synced: after a power loss the object is still there.
        let result = self.store.get_layer(layer, &path).await;
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.get_mut(&layer) else {
            drop(entries);
            // Removed meanwhile: nobody needs it; what cannot be removed goes at the next start.
            let _ = std::fs::remove_file(&path);
            return Err(LayerFault::Gone(layer));
        };
        entry.is_fetched = false;
        match result {
            Ok(bytes) => {
                entry.is_local = true;
                drop(entries);
                self.count_local(bytes as i64);
                Ok(())
            }
            Err(error) => {
                drop(entries);
                Err(self.storage_fault(layer, &error))
            }
        }
    }

    /// Makes sure that the file lies here, and keeps it until the pin is dropped.
    ///
    /// # Errors
    /// [`LayerFault`].
    pub async fn pin(self: &Rc<Self>, layer: LayerId) -> Result<Pin, LayerFault> {
        loop {
            self.check_lost(layer)?;
            let fetch = {
                let used = self.tick();
                let mut entries = self.entries.borrow_mut();
                let entry = entries.get_mut(&layer).ok_or(LayerFault::Gone(layer))?;
                if entry.is_local {
                    entry.pins += 1;
                    entry.used = used;
                    return Ok(Pin { files: self.clone(), layer });
                }
                !std::mem::replace(&mut entry.is_fetched, true)
            };
            if fetch {
                self.fetch(layer).await?;
                self.changed.set();
            } else {
                let is_over = || self.entries.borrow().get(&layer).is_none_or(|entry| !entry.is_fetched);
                self.changed.until(|| is_over().then_some(())).await;
            }
        }
    }

    /// A local file turned out to be damaged while something else than [`LayerFiles::read_block`] read it.
    pub fn report_damage(&self, layer: LayerId, cause: &str) {
        self.discard(layer, cause);
    }

    /// Removes local copies that were used longest ago until `bytes` more fit below the limit.
    pub fn make_room(&self, bytes: u64) {
        if self.local_bytes_max > 0 {
            self.evict((self.local_bytes.get() + bytes).saturating_sub(self.local_bytes_max));
        }
    }

    /// Removes local copies of at least `bytes` together, those used longest ago first; returns how many bytes went.
    pub fn evict(&self, bytes: u64) -> u64 {
        let mut gone = 0;
        while gone < bytes {
            let victim = {
                let entries = self.entries.borrow();
                let idle = entries.iter().filter(|(_, entry)| entry.is_local && entry.is_uploaded && entry.pins == 0);
                idle.min_by_key(|(_, entry)| entry.used).map(|(layer, entry)| (*layer, entry.bytes))
            };
            let Some((layer, bytes)) = victim else { break };
            if let Some(entry) = self.entries.borrow_mut().get_mut(&layer) {
                entry.is_local = false;
                entry.open = None;
            }
            self.remove_file(layer);
            self.metrics.evictions.inc();
            // An empty layer has a header, too; one is enough for the loop to end.
            gone += bytes.max(1);
        }
        gone
    }
}

/// Closes the descriptors that were used longest ago. Reads in progress have their own share of them.
fn close_some(entries: &mut HashMap<LayerId, Entry>) {
    let mut open: Vec<_> = entries.iter().filter(|(_, e)| e.open.is_some()).map(|(id, e)| (e.used, *id)).collect();
    if open.len() > OPEN_FILES_MAX {
        open.sort_unstable();
        // A quarter at a time, so that it is not done for every open.
        for (_, layer) in open.iter().take(OPEN_FILES_MAX / 4) {
            if let Some(entry) = entries.get_mut(layer) {
                entry.open = None;
            }
        }
    }
}

fn check_description(file: &LayerFile, layer: &LayerDescription) -> Result<(), String> {
    if file.description == *layer {
        return Ok(());
    }
    Err(format!("it is not the layer that the manifest describes: {:?} instead of {layer:?}", file.description))
}
