//! The data disk: its lock, its identity, and where what lies (`docs/formats/disk-layout.md`).
//!
//! Used at start, before any core runs, so it blocks.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use pgtypes::{DiskId, LogId};

/// Version of the layout that this program writes and reads.
const FORMAT: u32 = 1;

/// An opened and locked data directory.
pub struct DataDir {
    root: PathBuf,
    disk: DiskId,
    /// Holds the lock until the process ends.
    _lock: File,
}

/// The data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// A file operation failed.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// On what.
        path: PathBuf,
        /// Which.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Two processes with one directory would destroy it.
    #[error("{}: another process uses this data directory", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// Someone removed or replaced a part of the disk's contents.
    #[error("{}: {reason}", path.display())]
    Inconsistent {
        /// What is wrong.
        path: PathBuf,
        /// Why it is.
        reason: String,
    },
}

impl DataDir {
    /// Opens `root`, which is created when absent, and gives an empty one its identity.
    ///
    /// # Errors
    /// [`DataDirError`]; nothing was changed except for missing directories.
    pub fn open(root: &Path) -> Result<Self, DataDirError> {
        let io = |path: &Path, action| {
            let path = path.to_owned();
            move |source| DataDirError::Io { path, action, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(io(root, "create"))?;
        let lock_path = root.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io(&lock_path, "open"))?;
        // SAFETY: no pointers; the descriptor is open.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let source = io::Error::last_os_error();
            return Err(match source.kind() {
                io::ErrorKind::WouldBlock => DataDirError::Locked { path: root.to_owned() },
                _ => io(&lock_path, "lock")(source),
            });
        }
        let logs = root.join("logs");
        let disk_path = root.join("disk");
        let disk = match fs::read_to_string(&disk_path) {
            Ok(text) => {
                parse_disk(&text).map_err(|reason| DataDirError::Inconsistent { path: disk_path.clone(), reason })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if logs.exists() {
                    return Err(DataDirError::Inconsistent {
                        path: disk_path,
                        reason: "missing beside existing logs: they voted under another identity".to_owned(),
                    });
                }
                if let Some(foreign) = foreign(root)? {
                    return Err(DataDirError::Inconsistent {
                        path: root.to_owned(),
                        reason: format!("holds other files ({foreign}): data_dir must be empty at the first start"),
                    });
                }
                let disk = DiskId(*uuid::Uuid::new_v4().as_bytes());
                write_durably(root, &disk_path, &format!("format = {FORMAT}\ndisk = {disk}\n"))
                    .map_err(io(&disk_path, "write"))?;
                disk
            }
            Err(error) => return Err(io(&disk_path, "read")(error)),
        };
        for path in [&logs, &root.join("spares")] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io(path, "create"))?;
        }
        sync_directory(root).map_err(io(root, "sync"))?;
        Ok(Self { root: root.to_owned(), disk, _lock: lock })
    }

    /// The identity that the disk was born with.
    pub fn disk(&self) -> DiskId {
        self.disk
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a log lives.
    pub fn log(&self, log: LogId) -> PathBuf {
        self.root.join("logs").join(log.cluster.to_string()).join(log.branch.to_string())
    }

    /// Where pre-zeroed segments wait.
    pub fn spares(&self) -> PathBuf {
        self.root.join("spares")
    }

    /// The logs that have a directory, in order; some may have no valid contents (their creation was cut short).
    ///
    /// # Errors
    /// A directory cannot be read, or holds what is none of ours.
    pub fn list_logs(&self) -> Result<Vec<LogId>, DataDirError> {
        let mut logs = Vec::new();
        for cluster in list(&self.root.join("logs"))? {
            for branch in list(&cluster)? {
                let text = format!("{}/{}", name(&cluster), name(&branch));
                let log = text.parse().map_err(|_| DataDirError::Inconsistent {
                    path: branch.clone(),
                    reason: "not the directory of a log (cluster UUID/branch UUID)".to_owned(),
                })?;
                logs.push(log);
            }
        }
        logs.sort();
        Ok(logs)
    }
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, DataDirError> {
    let entries = fs::read_dir(directory).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    entries.map_err(|source| DataDirError::Io { path: directory.to_owned(), action: "list", source })
}

/// A file in `root` that is no trace of a first start cut short, nor what file systems are made with.
fn foreign(root: &Path) -> Result<Option<String>, DataDirError> {
    const OWN: [&str; 4] = ["lock", "disk.new", "spares", "lost+found"];
    Ok(list(root)?.iter().map(|path| name(path)).find(|name| !OWN.contains(&name.as_str()) && !name.starts_with('.')))
}

fn parse_disk(text: &str) -> Result<DiskId, String> {
    let mut lines = text.lines();
    let mut value = |key: &str| {
        let line = lines.next().unwrap_or_default();
        let value = line.strip_prefix(key).and_then(|rest| rest.strip_prefix(" = "));
        value.map(str::to_owned).ok_or_else(|| format!("expected `{key} = ...`, found {line:?}"))
    };
    let format = value("format")?;
    if format != FORMAT.to_string() {
        return Err(format!("written by another version of this program: format {format}, this one reads {FORMAT}"));
    }
    value("disk")?.parse().map_err(|error: pgtypes::ParseIdError| error.to_string())
}

/// Writes a whole file so that it is either there with all its contents or not at all.
fn write_durably(directory: &Path, path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_directory(directory)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("data-dir-{name}-{}", std::process::id()));
            assert!(!path.exists());
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn identity_is_born_once_and_the_directory_has_one_user() {
        let scratch = Scratch::new("identity");
        let first = DataDir::open(&scratch.0).unwrap();
        assert!(matches!(DataDir::open(&scratch.0), Err(DataDirError::Locked { .. })));
        let disk = first.disk();
        drop(first);
        assert_eq!(disk, DataDir::open(&scratch.0).unwrap().disk());
    }

    /// A disk that was replaced, or restored without its identity, must not vote as the old one.
    #[test]
    fn logs_without_identity_are_refused() {
        let scratch = Scratch::new("replaced");
        drop(DataDir::open(&scratch.0).unwrap());
        fs::remove_file(scratch.0.join("disk")).unwrap();
        assert!(matches!(DataDir::open(&scratch.0), Err(DataDirError::Inconsistent { .. })));
    }

    /// Somebody else's directory, such as a PGDATA, stays as it is.
    #[test]
    fn first_start_wants_an_empty_directory() {
        let scratch = Scratch::new("full");
        fs::create_dir_all(scratch.0.join("lost+found")).unwrap();
        fs::write(scratch.0.join("PG_VERSION"), "17").unwrap();
        let error = DataDir::open(&scratch.0).err().unwrap().to_string();
        assert!(error.contains("PG_VERSION"), "{error}");
        assert!(!scratch.0.join("disk").exists());
        fs::remove_file(scratch.0.join("PG_VERSION")).unwrap();
        DataDir::open(&scratch.0).unwrap();
    }

    #[test]
    fn foreign_contents_are_refused() {
        let scratch = Scratch::new("foreign");
        let directory = DataDir::open(&scratch.0).unwrap();
        let log = LogId { cluster: pgtypes::ClusterId([1; 16]), branch: pgtypes::BranchId([2; 16]) };
        fs::create_dir_all(directory.log(log)).unwrap();
        assert_eq!(vec![log], directory.list_logs().unwrap());
        fs::create_dir_all(scratch.0.join("logs/lost+found/x")).unwrap();
        assert!(matches!(directory.list_logs(), Err(DataDirError::Inconsistent { .. })));
        drop(directory);
        for text in ["", "format = 2\ndisk = 00000000-0000-0000-0000-000000000000\n", "format = 1\ndisk = x\n"] {
            fs::write(scratch.0.join("disk"), text).unwrap();
            assert!(matches!(DataDir::open(&scratch.0), Err(DataDirError::Inconsistent { .. })), "{text:?}");
        }
    }
}
