//! The data directory: its lock, whose it is, and which layer files lie in it (`docs/formats/disk-layout.md`).
//!
//! Everything in it can be had again from object storage and the safekeepers, but for layers that were not uploaded, whose WAL
//! the safekeepers keep. Used at start, before the core runs, so it blocks.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use layers::{LayerId, ShardGeneration, ShardId};
use pgtypes::LogId;
use remote_storage::ClaimNonce;

/// Version of the layout that this program writes and reads.
const FORMAT: u32 = 1;

/// Ending of the name of a finished layer file.
const LAYER: &str = ".layer";
/// Ending of a file that is being written or fetched.
const UNFINISHED: &str = ".unfinished";

/// An opened and locked data directory.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
    /// Holds the lock until the process ends.
    _lock: File,
}

/// An ownership as the disk knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    /// Which.
    pub generation: ShardGeneration,
    /// What the claim in object storage says if it is this disk's.
    pub nonce: ClaimNonce,
    /// Starts of the process as this owner before this one.
    pub life: u64,
}

/// Numbers of layers that one life of an owner may take. It takes a million ahead for each compaction.
const NUMBERS_OF_A_LIFE: u64 = 1 << 40;

impl Claim {
    /// The first number of a layer that this life may give. What an earlier one still has on its way never has it.
    pub fn first_number(&self) -> u64 {
        (self.life * NUMBERS_OF_A_LIFE).max(1)
    }

    fn parse(text: &str) -> Option<Claim> {
        let mut words = text.split_ascii_whitespace();
        let mut word = || words.next();
        let (generation, nonce, life) = (word()?.parse().ok()?, word()?.parse().ok()?, word()?.parse().ok()?);
        // Of 2^24 lives the numbers would not fit.
        let is_sound = words.next().is_none() && life < 1 << 24;
        is_sound.then_some(Claim { generation: ShardGeneration(generation), nonce, life })
    }
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
    /// Two processes with one directory would remove each other's files.
    #[error("{}: another process uses this data directory", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// It is another shard's, or no data directory at all.
    #[error("{}: {reason}", path.display())]
    Inconsistent {
        /// What is wrong.
        path: PathBuf,
        /// Why it is.
        reason: String,
    },
}

impl DataDir {
    /// Opens `root` for a shard; it is created when absent, and an empty one is marked as the shard's.
    ///
    /// # Errors
    /// [`DataDirError`]; nothing was changed except for missing directories.
    pub fn open(root: &Path, log: LogId, shard: ShardId) -> Result<Self, DataDirError> {
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
        let owner_path = root.join("shard");
        let owner = format!("format = {FORMAT}\nlog = {log}\nshard = {}\n", shard.0);
        match fs::read_to_string(&owner_path) {
            Ok(text) if text == owner => {}
            Ok(text) => {
                let reason =
                    format!("this is shard {} of log {log}, in format {FORMAT}; the directory says {text:?}", shard.0);
                return Err(DataDirError::Inconsistent { path: owner_path, reason });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(foreign) = foreign(root).map_err(io(root, "list"))? {
                    let reason = format!("holds other files ({foreign}): data_dir must be empty at the first start");
                    return Err(DataDirError::Inconsistent { path: root.to_owned(), reason });
                }
                write_durably(root, &owner_path, &owner).map_err(io(&owner_path, "write"))?;
            }
            Err(error) => return Err(io(&owner_path, "read")(error)),
        }
        let layers = root.join("layers");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&layers).map_err(io(&layers, "create"))?;
        sync_directory(root).map_err(io(root, "sync"))?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// Where layer files lie.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// The ownership that was granted to this disk, as its last life left it.
    ///
    /// # Errors
    /// The file that says so cannot be read, or makes no sense.
    pub fn claim(&self) -> Result<Option<Claim>, DataDirError> {
        let path = self.root.join("generation");
        match fs::read_to_string(&path) {
            Ok(text) => match Claim::parse(&text) {
                Some(claim) => Ok(Some(claim)),
                None => {
                    let reason = format!(
                        "{text:?} is no generation, nonce and life: empty the directory, and give the shard a higher generation"
                    );
                    Err(DataDirError::Inconsistent { path, reason })
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(DataDirError::Io { path, action: "read", source }),
        }
    }

    /// Remembers the ownership that was granted to this disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_claim(&self, claim: &Claim) -> Result<(), DataDirError> {
        let path = self.root.join("generation");
        let Claim { generation, nonce, life } = claim;
        write_durably(&self.root, &path, &format!("{} {nonce} {life}\n", generation.0))
            .map_err(|source| DataDirError::Io { path, action: "write", source })
    }

    /// Removes a layer file.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_layer(&self, layer: LayerId) -> Result<(), DataDirError> {
        let path = layer_path(&self.layers(), layer);
        fs::remove_file(&path).map_err(|source| DataDirError::Io { path, action: "remove", source })
    }

    /// Layer files with their lengths. Removes those that were never finished.
    ///
    /// # Errors
    /// The directory cannot be read, or a file cannot be removed.
    pub fn take_stock(&self) -> Result<Vec<(LayerId, u64)>, DataDirError> {
        let directory = self.layers();
        let io = |path: &Path, action| {
            let path = path.to_owned();
            move |source| DataDirError::Io { path, action, source }
        };
        let mut found = Vec::new();
        for entry in fs::read_dir(&directory).map_err(io(&directory, "list"))? {
            let path = entry.map_err(io(&directory, "list"))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match layer_of_name(name) {
                Some(id) => {
                    let bytes = fs::metadata(&path).map_err(io(&path, "stat"))?.len();
                    found.push((id, bytes));
                }
                // Being written, or with another ending being fetched.
                None if is_unfinished(name) => fs::remove_file(&path).map_err(io(&path, "remove"))?,
                None => {
                    let reason = "not a layer file: somebody else writes to this directory".to_owned();
                    return Err(DataDirError::Inconsistent { path, reason });
                }
            }
        }
        Ok(found)
    }
}

/// Where a layer lies in the directory of layers.
pub fn layer_path(directory: &Path, id: LayerId) -> PathBuf {
    directory.join(format!("{:08x}-{:016x}-{:016x}{LAYER}", id.shard.0, id.generation.0, id.number))
}

/// Where it lies while it is incomplete.
pub fn unfinished_path(directory: &Path, id: LayerId) -> PathBuf {
    let mut path = layer_path(directory, id).into_os_string();
    path.push(UNFINISHED);
    path.into()
}

/// Whether the name begins with that of a layer: whoever writes such a file gives it an ending of its own.
fn is_unfinished(name: &str) -> bool {
    let end = name.find(LAYER).map_or(0, |at| at + LAYER.len());
    end < name.len() && layer_of_name(&name[..end]).is_some()
}

fn layer_of_name(name: &str) -> Option<LayerId> {
    let mut parts = name.strip_suffix(LAYER)?.split('-');
    let mut hexadecimal = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        part.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u64::from_str_radix(part, 16).ok())?
    };
    let shard = ShardId(hexadecimal(8)? as u32);
    let generation = ShardGeneration(hexadecimal(16)?);
    let number = hexadecimal(16)?;
    parts.next().is_none().then_some(LayerId { shard, generation, number })
}

/// A file beside our own, if there is one: this is not a directory of ours.
fn foreign(root: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(root)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // Left by a first start that was cut short, and by file systems.
        if !["lock", "shard.unfinished", "layers", "lost+found"].contains(&name.as_str()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn write_durably(root: &Path, path: &Path, text: &str) -> io::Result<()> {
    let unfinished = path.with_extension("unfinished");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    sync_directory(root)
}

/// Makes creations, renames and removals in a directory durable.
///
/// # Errors
/// Those of `open(2)` and `fsync(2)`.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever went back to an older engine reads which format is meant, and nothing is changed.
    #[test]
    fn a_directory_of_another_format_shard_or_owner_is_refused_by_name() {
        let root = std::env::temp_dir().join(format!("pageserver-data-dir-{}", std::process::id()));
        let log: LogId = "11111111-1111-1111-1111-111111111111/22222222-2222-2222-2222-222222222222".parse().unwrap();
        let open = |shard| DataDir::open(&root, log, ShardId(shard));
        let first = open(7).unwrap();
        assert!(matches!(open(7), Err(DataDirError::Locked { .. })));
        assert_eq!(None, first.claim().unwrap());
        fs::write(root.join("generation"), "5\n").unwrap();
        assert!(first.claim().unwrap_err().to_string().contains("generation"));
        drop(first);
        let refused = open(8).unwrap_err().to_string();
        assert!(refused.contains("this is shard 8") && refused.contains("shard = 7"), "{refused}");
        let path = root.join("shard");
        let text = fs::read_to_string(&path).unwrap().replace("format = 1", "format = 2");
        fs::write(&path, &text).unwrap();
        let refused = open(7).unwrap_err().to_string();
        assert!(refused.contains("in format 1") && refused.contains("format = 2"), "{refused}");
        assert_eq!(text, fs::read_to_string(&path).unwrap());
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn each_life_of_an_owner_has_numbers_of_its_own() {
        let claim = Claim { generation: ShardGeneration(5), nonce: ClaimNonce(0xF0), life: 3 };
        assert_eq!(Some(claim), Claim::parse("5 00000000000000f0 3\n"));
        assert_eq!(1, Claim { life: 0, ..claim }.first_number());
        assert!(Claim { life: 2, ..claim }.first_number() + NUMBERS_OF_A_LIFE <= claim.first_number());
        assert!(Claim { life: (1 << 24) - 1, ..claim }.first_number() <= u64::MAX - NUMBERS_OF_A_LIFE + 1);
        for text in ["", "5", "5 f0", "5 f0 x", "5 f0 3 4", "5 f0 16777216"] {
            assert_eq!(None, Claim::parse(text), "{text}");
        }
    }

    #[test]
    fn the_name_of_a_file_is_its_layer_and_back() {
        let id = LayerId { shard: ShardId(0xABC), generation: ShardGeneration(7), number: u64::MAX };
        let path = layer_path(Path::new("/d"), id);
        assert_eq!("/d/00000abc-0000000000000007-ffffffffffffffff.layer", path.to_str().unwrap());
        assert_eq!(Some(id), layer_of_name(path.file_name().unwrap().to_str().unwrap()));
        for name in ["", "a.layer", "00000abc-7-1.layer", "+0000abc-0000000000000007-ffffffffffffffff.layer"] {
            assert_eq!(None, layer_of_name(name), "{name}");
            assert!(!is_unfinished(name), "{name}");
        }
        for ending in [".unfinished", ".0123456789abcdef.incoming"] {
            let name = format!("{}{ending}", path.file_name().unwrap().to_str().unwrap());
            assert!(is_unfinished(&name) && layer_of_name(&name).is_none(), "{name}");
        }
    }
}
