//! Writes to a store that is a local directory, as safe as those to S3: whole or not at all, durable before success,
//! and exclusive where they should create.
//!
//! Reads, lists and deletions are object_store's. It syncs files and directories on request, but it takes a directory
//! that is there for a durable one, which another process may have made a moment ago.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

use crate::error::AttemptError;

/// What an object is made of.
pub(crate) enum Source<'a> {
    Bytes(&'a [u8]),
    File(&'a Path),
}

/// Whether a write may replace what is there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Overwrite,
    Create,
}

/// The most directories that are remembered as durable; beyond, all are forgotten and synced again when needed.
const DIRECTORIES_MAX: usize = 4096;

pub(crate) struct LocalDirectory {
    root: PathBuf,
    /// Directories that this process has synced, with those above them up to the root.
    durable: Mutex<HashSet<PathBuf>>,
}

impl LocalDirectory {
    /// Takes a directory for a store, made if it is not there.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let there = root.ancestors().find(|directory| directory.is_dir()).map(fs::canonicalize).transpose()?;
        fs::create_dir_all(root)?;
        let root = fs::canonicalize(root)?;
        for directory in root.ancestors() {
            sync_directory(directory)?;
            // Those above need not be readable.
            if there.as_deref().is_none_or(|there| there == directory) {
                break;
            }
        }
        Ok(LocalDirectory { root, durable: Mutex::new(HashSet::new()) })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Writes the object and returns its length. Blocks.
    pub(crate) fn write(&self, key: &str, source: &Source<'_>, mode: Mode) -> Result<u64, AttemptError> {
        let object = self.root.join(key);
        let directory = object.parent().ok_or_else(|| AttemptError::Rejected("no key".to_owned()))?;
        self.make_durable(directory).map_err(|error| failed(directory, &error))?;
        if mode == Mode::Create && object.exists() {
            // Whoever made it may not have synced the directory yet, and may be us in an attempt before.
            sync_directory(directory).map_err(|error| failed(directory, &error))?;
            return Err(AttemptError::AlreadyThere);
        }
        let random = getrandom::u64().map_err(AttemptError::temporary)?;
        // object_store hides names that end like this from lists.
        let mut staged = object.clone().into_os_string();
        staged.push(format!("#{random}"));
        let staged = PathBuf::from(staged);
        let result = stage(&staged, source).and_then(|bytes| {
            let placed = match mode {
                Mode::Overwrite => fs::rename(&staged, &object),
                Mode::Create => fs::hard_link(&staged, &object),
            };
            match placed {
                Ok(()) => Ok(bytes),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(AttemptError::AlreadyThere),
                Err(error) => Err(failed(&object, &error)),
            }
        });
        if mode == Mode::Create || result.is_err() {
            // A staged file that stays is no object; it is lost room only.
            let _ = fs::remove_file(&staged);
        }
        if matches!(result, Ok(_) | Err(AttemptError::AlreadyThere)) {
            sync_directory(directory).map_err(|error| failed(directory, &error))?;
        }
        result
    }

    /// Makes a directory and all between it and the root durable.
    fn make_durable(&self, directory: &Path) -> io::Result<()> {
        if self.directories().contains(directory) {
            if directory.is_dir() {
                return Ok(());
            }
            // Somebody removed it: what was known about those above it is of no use either.
            self.directories().clear();
        }
        fs::create_dir_all(directory)?;
        for directory in directory.ancestors() {
            sync_directory(directory)?;
            if directory == self.root {
                break;
            }
        }
        let mut durable = self.directories();
        if durable.len() >= DIRECTORIES_MAX {
            durable.clear();
        }
        durable.insert(directory.to_owned());
        Ok(())
    }

    fn directories(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        // A set of names is whole whatever a thread did that panicked.
        self.durable.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Writes and syncs a file that nobody sees yet.
fn stage(staged: &Path, source: &Source<'_>) -> Result<u64, AttemptError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).open(staged).map_err(|error| failed(staged, &error))?;
    let bytes = match source {
        Source::Bytes(bytes) => {
            file.write_all(bytes).map_err(|error| failed(staged, &error))?;
            bytes.len() as u64
        }
        Source::File(path) => {
            let mut from = File::open(path).map_err(|error| AttemptError::File((*path).to_owned(), error))?;
            // Which side failed is in neither the error nor of use: the text names both.
            io::copy(&mut from, &mut file)
                .map_err(|error| AttemptError::temporary(format_args!("copy to {}: {error}", staged.display())))?
        }
    };
    file.sync_all().map_err(|error| failed(staged, &error))?;
    Ok(bytes)
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn failed(path: &Path, error: &io::Error) -> AttemptError {
    let cause = format!("{}: {error}", path.display());
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => AttemptError::Denied(cause),
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::InvalidFilename => {
            AttemptError::Rejected(cause)
        }
        _ => AttemptError::Temporary(cause),
    }
}
