//! Image layers of one shard as files in a scratch directory, handed on one by one.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use layers::{Key, LayerDescription, LayerId, LayerIdentity, LayerOutput, PutError, Split, SplitWriter, ValueKind};
use pgtypes::Lsn;

/// A layer ends with the key that takes it to this size. A large one has its index in memory at once: 64 B for each page
/// of 8 KiB here, and a page server downloads it as a whole.
pub(crate) const LAYER_BYTES_TARGET: u64 = 256 << 20;

/// A layer that is complete.
#[derive(Debug)]
pub(crate) struct LayerOnDisk {
    pub(crate) description: LayerDescription,
    /// Its file, which its receiver removes.
    pub(crate) path: PathBuf,
}

/// A layer was not written.
#[derive(Debug, thiserror::Error)]
pub enum LayerFileError {
    /// The scratch directory is full, or not there.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A defect of the import: keys out of order.
    #[error("layer: {0}")]
    Put(#[from] PutError),
}

/// Writes the layers of one shard.
pub(crate) struct LayerFiles<'a> {
    lsn: Lsn,
    writer: SplitWriter,
    file: FileWriter<'a>,
}

impl<'a> LayerFiles<'a> {
    pub(crate) fn new(directory: &'a Path, first: LayerIdentity, split: Split, lsn: Lsn) -> LayerFiles<'a> {
        LayerFiles { lsn, writer: SplitWriter::images(first, split, lsn), file: FileWriter { directory, open: None } }
    }

    /// Adds a value, in the order of keys; returns a layer when this began the next.
    pub(crate) fn put(&mut self, key: Key, value: &[u8]) -> Result<Option<LayerOnDisk>, LayerFileError> {
        self.writer.push(key, self.lsn, ValueKind::Image, value)?;
        let mut finished = None;
        while let Some(output) = self.writer.poll_output() {
            // At most one: there are no cuts, so a value ends at most one layer.
            finished = self.file.write(output)?.or(finished);
        }
        Ok(finished)
    }

    /// Ends the last layer.
    pub(crate) fn finish(self) -> Result<Vec<LayerOnDisk>, LayerFileError> {
        let LayerFiles { writer, mut file, .. } = self;
        let mut layers = Vec::new();
        for output in writer.finish()? {
            layers.extend(file.write(output)?);
        }
        Ok(layers)
    }
}

/// The file that is being written.
struct FileWriter<'a> {
    directory: &'a Path,
    open: Option<(PathBuf, File)>,
}

impl FileWriter<'_> {
    fn write(&mut self, output: LayerOutput) -> Result<Option<LayerOnDisk>, LayerFileError> {
        let (id, bytes, description) = match output {
            LayerOutput::Bytes(id, bytes) => (id, bytes, None),
            LayerOutput::Finished(layer) => {
                let description = layer.file.description;
                (description.id, layer.output, Some(description))
            }
        };
        let (path, mut file) = match self.open.take() {
            Some(open) => open,
            None => {
                let path = self.directory.join(file_name(id));
                let file = File::create_new(&path).map_err(io_error(&path))?;
                (path, file)
            }
        };
        file.write_all(&bytes).map_err(io_error(&path))?;
        match description {
            Some(description) => Ok(Some(LayerOnDisk { description, path })),
            None => {
                self.open = Some((path, file));
                Ok(None)
            }
        }
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> LayerFileError {
    let path = path.to_owned();
    move |cause| LayerFileError::Io { path, cause }
}

fn file_name(id: LayerId) -> String {
    format!("{:08x}-{:016x}", id.shard.0, id.number)
}
