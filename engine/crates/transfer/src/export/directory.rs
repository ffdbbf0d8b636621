//! The directory that an export writes: everything in it but pages of relations.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use backup::{Plan, RelationPages, SmallFile};
use wal::Fork;

use super::ExportError;
use crate::relations::BLOCK_BYTES;

/// PostgreSQL refuses a directory that others may read.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// The directory; its contents go when it is dropped before [`TargetDirectory::keep`].
pub(super) struct TargetDirectory {
    path: PathBuf,
    /// It did not exist before.
    is_new: bool,
    is_kept: bool,
}

impl TargetDirectory {
    /// Makes the directory, or takes an empty one.
    pub(super) fn create(path: &Path) -> Result<TargetDirectory, ExportError> {
        let is_new = match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(ExportError::io(path)(error)),
        };
        if !is_new && fs::read_dir(path).map_err(ExportError::io(path))?.next().is_some() {
            return Err(ExportError::NotEmpty(path.to_owned()));
        }
        Ok(TargetDirectory { path: path.to_owned(), is_new, is_kept: false })
    }

    /// The export is complete.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for TargetDirectory {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        // An error is being reported already, and PostgreSQL starts nothing without pg_control.
        if self.is_new {
            let _ = fs::remove_dir_all(&self.path);
            return;
        }
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let _ = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(entry.path()),
                _ => fs::remove_file(entry.path()),
            };
        }
    }
}

/// Directories, small files, WAL, and files of relations at their full lengths, without their pages.
pub(super) fn write_all_but_pages(root: &Path, plan: &Plan) -> Result<(), ExportError> {
    for directory in &plan.directories {
        let path = root.join(directory);
        DirBuilder::new().mode(DIRECTORY_MODE).create(&path).map_err(ExportError::io(&path))?;
    }
    for file in &plan.files {
        write_file(root, file)?;
    }
    for file in &plan.checkpoint.files {
        let path = root.join(&file.path);
        let wal = create(&path)?;
        wal.set_len(file.length).map_err(ExportError::io(&path))?;
        for piece in &file.pieces {
            wal.write_all_at(&piece.bytes, piece.offset).map_err(ExportError::io(&path))?;
        }
    }
    for file in &plan.relations {
        let path = root.join(&file.path);
        create(&path)?.set_len(u64::from(file.blocks) * BLOCK_BYTES as u64).map_err(ExportError::io(&path))?;
    }
    Ok(())
}

/// Main forks of unlogged relations, once their init forks have pages.
pub(super) fn copy_init_forks(root: &Path, plan: &Plan) -> Result<(), ExportError> {
    for file in plan.relations.iter().filter(|file| file.pages == RelationPages::CopyOfInit) {
        let init = plan
            .relations
            .iter()
            .find(|init| (init.relation, init.fork, init.segment) == (file.relation, Fork::Init, file.segment))
            .unwrap_or_else(|| unreachable!("the plan copies an init fork that it has: {file:?}"));
        let path = root.join(&file.path);
        fs::copy(root.join(&init.path), &path).map_err(ExportError::io(&path))?;
    }
    Ok(())
}

/// A small file.
pub(super) fn write_file(root: &Path, file: &SmallFile) -> Result<(), ExportError> {
    let path = root.join(&file.path);
    create(&path)?.write_all(&file.contents).map_err(ExportError::io(&path))
}

fn create(path: &Path) -> Result<File, ExportError> {
    OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path).map_err(ExportError::io(path))
}

/// Makes a directory and all below it durable.
pub(super) fn sync_tree(path: &Path) -> Result<(), ExportError> {
    for entry in fs::read_dir(path).map_err(ExportError::io(path))? {
        let entry = entry.map_err(ExportError::io(path))?;
        let below = entry.path();
        if entry.file_type().map_err(ExportError::io(&below))?.is_dir() {
            sync_tree(&below)?;
        } else {
            sync(&below)?;
        }
    }
    sync(path)
}

fn sync(path: &Path) -> Result<(), ExportError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(ExportError::io(path))
}
