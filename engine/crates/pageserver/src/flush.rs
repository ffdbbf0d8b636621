//! Layers out: a frozen layer becomes a local file, then an object, then a line of the manifest; only then it is durable.
//!
//! Crash safety: a manifest names uploaded layers only, and what it does not name is made again from WAL, which safekeepers keep
//! up to the durable position. Read next: `compaction.rs`.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use layers::{
    FinishedLayer, Index, Key, LayerDescription, LayerId, LayerIdentity, LayerOutput, LayerWriter, Manifest, PutError,
};
use remote_storage::ShardError;

use crate::{
    data_dir::{layer_path, sync_directory, unfinished_path},
    fault_point,
    owner::{Owner, Waiting},
    start::StartError,
    state::Frozen,
};

/// Pause before the disk or object storage is tried again, doubled up to the maximum.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How often the age of the open layer is looked at.
const AGE_INTERVAL: Duration = Duration::from_millis(500);

/// Bytes that are written to a layer file at a time.
const WRITE_BYTES: usize = 1 << 20;

/// A layer file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The disk refuses.
    #[error("{}: {source}", path.display())]
    Io {
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A value does not fit: a fault of this program.
    #[error("layer cannot be written: {0}")]
    Put(#[from] PutError),
}

impl WriteError {
    /// Whether the disk is full.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, WriteError::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

/// Writes layer files, as `LayerWriter` and `SplitWriter` give out their bytes. Blocks: for threads beside the core.
pub struct LayerFileWriter {
    directory: PathBuf,
    file: Option<(PathBuf, fs::File)>,
    buffer: Vec<u8>,
}

impl LayerFileWriter {
    /// A writer of files in `directory`.
    pub fn new(directory: &Path) -> LayerFileWriter {
        LayerFileWriter { directory: directory.to_owned(), file: None, buffer: Vec::new() }
    }

    /// The next bytes of a layer's file, which they begin when they are the first.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn write(&mut self, layer: LayerId, bytes: &[u8]) -> Result<(), WriteError> {
        if self.file.is_none() {
            let path = unfinished_path(&self.directory, layer);
            let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
            let file = file.map_err(|source| WriteError::Io { path: path.clone(), source })?;
            self.file = Some((path, file));
        }
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BYTES { self.spill() } else { Ok(()) }
    }

    fn spill(&mut self) -> Result<(), WriteError> {
        if let Some((path, file)) = &mut self.file {
            file.write_all(&self.buffer).map_err(|source| WriteError::Io { path: path.clone(), source })?;
        }
        self.buffer.clear();
        Ok(())
    }

    /// The last bytes: the file is durable then, under its name.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn finish(&mut self, layer: &FinishedLayer) -> Result<(), WriteError> {
        let id = layer.file.description.id;
        self.write(id, &layer.output)?;
        self.spill()?;
        let Some((unfinished, file)) = self.file.take() else { return Ok(()) };
        let path = layer_path(&self.directory, id);
        let done = file
            .sync_data()
            .and_then(|()| fs::rename(&unfinished, &path))
            .and_then(|()| sync_directory(&self.directory));
        done.map_err(|source| WriteError::Io { path, source })
    }

    /// Takes what a row of layers gives out; a finished layer is returned.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn take(&mut self, output: LayerOutput) -> Result<Option<FinishedLayer>, WriteError> {
        match output {
            LayerOutput::Bytes(layer, bytes) => self.write(layer, &bytes).map(|()| None),
            LayerOutput::Finished(layer) => self.finish(&layer).map(|()| Some(*layer)),
        }
    }
}

impl Drop for LayerFileWriter {
    fn drop(&mut self) {
        if let Some((path, _)) = self.file.take() {
            // What cannot be removed now goes at the next start.
            let _ = fs::remove_file(path);
        }
    }
}

/// Writes the delta layer of a frozen one. Blocks.
fn write_frozen(
    directory: &Path,
    frozen: &Frozen,
    identity: LayerIdentity,
    end: Key,
) -> Result<(LayerDescription, Index), WriteError> {
    let layer = &frozen.layer;
    let Some((mut writer, _)): Option<(LayerWriter, _)> = layer.freeze(identity) else {
        return Err(WriteError::Put(PutError::OutOfRange));
    };
    let mut file = LayerFileWriter::new(directory);
    for (key, value) in layer.values() {
        writer.push(key, value.lsn, value.kind, &value.value)?;
        let bytes = writer.take_output();
        if !bytes.is_empty() {
            file.write(identity.id, &bytes)?;
        }
    }
    let finished = writer.finish(end)?;
    file.finish(&finished)?;
    Ok((finished.file.description, finished.index))
}

/// Freezes the open layer when it is old, until the process ends.
pub async fn watch_age(owner: Rc<Owner>) {
    while owner.pause(AGE_INTERVAL).await {
        owner.freeze_if_due();
        owner.trim_indexes();
        owner.show();
    }
}

/// Writes frozen layers to the local disk, until the process ends.
pub async fn write(owner: Rc<Owner>) {
    const TROUBLE: &str = "the local disk does not take a layer";
    let mut pause = PAUSE;
    loop {
        let frozen = owner.moved.until(|| match owner.is_stopping() {
            true => Some(None),
            false => owner.state.borrow().frozen().front().cloned().map(Some),
        });
        let Some(frozen): Option<Arc<Frozen>> = frozen.await else { return };
        let identity = owner.identity(owner.take_numbers(1));
        owner.files.make_room(frozen.layer.bytes());
        let (directory, end, of_thread) = (owner.files.directory().to_owned(), owner.keys().end, frozen.clone());
        match driver::unblock(move || write_frozen(&directory, &of_thread, identity, end)).await {
            Ok((layer, index)) => {
                fault_point::pass("frozen layer written");
                owner.files.add_written(&layer);
                owner.waiting.borrow_mut().push_back(Waiting { layer, summary: frozen.summary });
                let result = owner.state.borrow_mut().frozen_is_written(layer, Arc::new(index));
                if let Err(error) = result {
                    return owner.fail(StartError::Internal(format!("a new layer does not fit: {error}")));
                }
                owner.solved(TROUBLE);
                owner.moved.set();
                pause = PAUSE;
            }
            Err(WriteError::Put(error)) => {
                return owner.fail(StartError::Internal(format!("a frozen layer cannot be written: {error}")));
            }
            Err(error) => {
                owner.report(TROUBLE, &error);
                // Copies of what object storage has make room for what it has not.
                if !error.is_disk_full() || owner.files.evict(frozen.layer.bytes()) == 0 {
                    owner.pause(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }
}

/// Uploads written layers and names them in the manifest, until the process ends.
pub async fn upload(owner: Rc<Owner>) {
    if owner.hold_uploads.get() {
        let trouble = "lengths of relations are in a layer that is lost: put its object back, and restart the server";
        return owner.report("nothing is made durable", &trouble);
    }
    loop {
        let waiting = owner.moved.until(|| match owner.is_stopping() {
            true => Some(None),
            false => owner.waiting.borrow().front().copied().map(Some),
        });
        let Some(Waiting { layer, summary }) = waiting.await else { return };
        if !owner.upload_layer(layer.id, layer.file_bytes).await {
            return;
        }
        fault_point::pass("frozen layer uploaded");
        let committed = owner
            .commit(|manifest| {
                manifest.layers.push(layer);
                manifest.through = summary;
            })
            .await;
        if !committed {
            return;
        }
        fault_point::pass("frozen layer in the manifest");
        owner.files.set_uploaded(layer.id);
        owner.waiting.borrow_mut().pop_front();
        owner.files.make_room(0);
        owner.show();
        owner.moved.set();
    }
}

impl Owner {
    /// Uploads a layer's file, for as long as it takes; `false` when the process ends before.
    pub async fn upload_layer(&self, layer: LayerId, bytes: u64) -> bool {
        const TROUBLE: &str = "object storage does not take a layer";
        let path = layer_path(self.files.directory(), layer);
        let mut pause = PAUSE;
        loop {
            let begun = driver::now();
            match self.store.put_layer(layer, &path).await {
                Ok(()) => {
                    let metrics = &self.process.metrics;
                    metrics.uploads.inc();
                    metrics.uploaded_bytes.inc_by(bytes);
                    metrics.upload_seconds.observe(driver::now().since(begun).as_secs_f64());
                    self.solved(TROUBLE);
                    return true;
                }
                Err(error) => {
                    if let Some(failure) = ownership_lost(&error) {
                        self.fail(failure);
                    }
                    if self.is_stopping() {
                        return false;
                    }
                    self.report(TROUBLE, &error);
                    self.process.metrics.storage_retries.inc();
                    self.pause(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    /// Changes the manifest and makes the change durable, for as long as it takes; `false` when the process ends before.
    pub async fn commit(&self, change: impl FnOnce(&mut Manifest)) -> bool {
        const TROUBLE: &str = "object storage does not take a manifest";
        self.begin_commit().await;
        let mut next = self.manifest().clone();
        change(&mut next);
        next.sequence = if next.generation == self.generation() { next.sequence + 1 } else { 1 };
        next.generation = self.generation();
        next.next_layer = self.next_number();
        let mut pause = PAUSE;
        loop {
            if self.is_stopping() {
                self.end_commit(None);
                return false;
            }
            // The same bytes under the same name, so that an attempt that was done without our knowing is no other manifest.
            match self.store.put_manifest(&next).await {
                Ok(()) => break,
                Err(error) => match ownership_lost(&error) {
                    Some(failure) => {
                        self.fail(failure);
                        self.end_commit(None);
                        return false;
                    }
                    None => {
                        self.report(TROUBLE, &error);
                        self.process.metrics.storage_retries.inc();
                        self.pause(pause).await;
                        pause = (pause * 2).min(PAUSE_MAX);
                    }
                },
            }
        }
        self.solved(TROUBLE);
        self.end_commit(Some(next));
        true
    }
}

/// Whether the error says that this process has no business with the shard any more.
pub fn ownership_lost(error: &ShardError) -> Option<StartError> {
    match error {
        ShardError::NotOwner { .. } | ShardError::OtherClaim { .. } => Some(StartError::Superseded(error.to_string())),
        ShardError::Claim { .. } => Some(StartError::Manifest(error.to_string())),
        // A name was given twice: an earlier life of this process has not written its last word. The next start sees it.
        ShardError::LayerDiffers { .. } | ShardError::WrongManifest { .. } | ShardError::LayerNeeded(_) => {
            Some(StartError::Internal(error.to_string()))
        }
        ShardError::Storage(_) | ShardError::Manifest { .. } | ShardError::ManifestsChange(_) => None,
    }
}
