//! Makes PGDATA from the base backup, and puts into it what a start needs.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use consensus::TimelineHistory;
use pgformat::history_file_name;
use pgtypes::Lsn;

use crate::{
    base::{Base, segment_path},
    isolation::User,
};

/// Files of the base backup's top directory that belong to its own past.
const SKIPPED_FILES: &[&str] = &[
    "backup_label",
    "backup_label.old",
    "backup_manifest",
    "current_logfiles",
    "postmaster.opts",
    "postmaster.pid",
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
    vfs_abi::TRUST_FILE,
];

/// Directories that a start fills anew; the same list as `excludeDirContents` in PostgreSQL's basebackup.c, and `pg_wal`,
/// of which only the segments of the checkpoint are wanted.
const EMPTIED_DIRECTORIES: &[&str] =
    &["pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans", "pg_wal"];

/// PGDATA could not be made. The text names the file.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A file operation failed.
    #[error("restore {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent was fenced or told to stop meanwhile.
    #[error("restore interrupted")]
    Interrupted,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::Io { path, source }
}

/// Replaces `pgdata` by a copy of the base backup at `source`. Files are shared with it where the file system can
/// (reflinks). Nothing is synced: after a crash of the machine it is made again.
///
/// # Errors
/// A file cannot be copied; `interrupted` was set.
pub fn restore(
    source: &Path,
    base: &Base,
    pgdata: &Path,
    user: Option<&User>,
    interrupted: &AtomicBool,
) -> Result<(), RestoreError> {
    put_aside(pgdata)?;
    let copy = Copy { user, interrupted };
    copy.directory(source, pgdata, true)?;
    copy.wal(source, base, pgdata)
}

/// Renames `pgdata` away, which takes no time, and deletes it in the background, with what earlier starts left behind: a
/// thousand files take a second on a busy disk, and nobody should wait for that. No draft of a new PGDATA may exist yet.
///
/// # Errors
/// It cannot be renamed.
pub fn put_aside(pgdata: &Path) -> Result<(), RestoreError> {
    let free = (0..).map(|number: u32| pgdata.with_extension(format!("old-{number}"))).find(|path| !path.exists());
    let old = free.expect("there are fewer directories than numbers");
    match fs::rename(pgdata, &old) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(pgdata)(error)),
        _ => {}
    }
    let leftovers = leftovers(pgdata)?;
    if leftovers.is_empty() {
        return Ok(());
    }
    let delete = move || {
        for path in leftovers {
            match fs::remove_dir_all(&path) {
                // By the thread of the start before.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::debug!(%error, path = %path.display(), "a leftover is deleted with the next restore");
                }
                Ok(()) => {}
            }
        }
    };
    std::thread::Builder::new().name("delete-pgdata".into()).spawn(delete).map(drop).map_err(at(pgdata))
}

/// Directories beside `pgdata` that were put aside, or never became it.
fn leftovers(pgdata: &Path) -> Result<Vec<PathBuf>, RestoreError> {
    let (Some(parent), Some(name)) = (pgdata.parent(), pgdata.file_name()) else { return Ok(Vec::new()) };
    let name = name.to_string_lossy();
    let mut found = Vec::new();
    for entry in fs::read_dir(parent).map_err(at(parent))? {
        let entry = entry.map_err(at(parent))?;
        let other = entry.file_name();
        let suffix = other.to_str().and_then(|other| other.strip_prefix(&*name)).unwrap_or_default();
        if suffix.starts_with(".old") || suffix.starts_with(".new-") {
            found.push(entry.path());
        }
    }
    Ok(found)
}

struct Copy<'a> {
    user: Option<&'a User>,
    interrupted: &'a AtomicBool,
}

impl Copy<'_> {
    fn directory(&self, from: &Path, to: &Path, top: bool) -> Result<(), RestoreError> {
        self.make_directory(to)?;
        for entry in fs::read_dir(from).map_err(at(from))? {
            if self.interrupted.load(Relaxed) {
                return Err(RestoreError::Interrupted);
            }
            let entry = entry.map_err(at(from))?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            let (source, target) = (entry.path(), to.join(&name));
            // Follows links: `pg_wal` and configuration files may be links.
            let kind = fs::metadata(&source).map_err(at(&source))?;
            if kind.is_dir() {
                if top && EMPTIED_DIRECTORIES.contains(&text.as_ref()) {
                    self.make_directory(&target)?;
                } else if !text.starts_with("pgsql_tmp") {
                    self.directory(&source, &target, false)?;
                }
            } else if kind.is_file() && !(top && SKIPPED_FILES.contains(&text.as_ref())) {
                self.file(&source, &target)?;
            }
        }
        Ok(())
    }

    /// The segments from the checkpoint's start to its end, and the history files.
    fn wal(&self, source: &Path, base: &Base, pgdata: &Path) -> Result<(), RestoreError> {
        for name in ["archive_status", "summaries"] {
            self.make_directory(&pgdata.join("pg_wal").join(name))?;
        }
        let segment_bytes = base.segment_bytes();
        let mut segment = base.control.checkpoint.redo.min(base.control.checkpoint_lsn).floor(segment_bytes);
        while segment < base.end.record_end {
            let path = |pgdata| segment_path(pgdata, base.timeline(), segment, segment_bytes);
            self.file(&path(source), &path(pgdata))?;
            segment = Lsn(segment.0 + segment_bytes);
        }
        let wal = source.join("pg_wal");
        for entry in fs::read_dir(&wal).map_err(at(&wal))? {
            let entry = entry.map_err(at(&wal))?;
            if entry.file_name().to_string_lossy().ends_with(".history") {
                self.file(&entry.path(), &pgdata.join("pg_wal").join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    fn make_directory(&self, path: &Path) -> Result<(), RestoreError> {
        fs::DirBuilder::new().mode(0o700).create(path).map_err(at(path))?;
        give(path, self.user)
    }

    fn file(&self, from: &Path, to: &Path) -> Result<(), RestoreError> {
        fs::copy(from, to).map_err(at(from))?;
        fs::set_permissions(to, Permissions::from_mode(0o600)).map_err(at(to))?;
        give(to, self.user)
    }
}

/// Hands a file to PostgreSQL's user.
///
/// # Errors
/// Not allowed.
pub fn give(path: &Path, user: Option<&User>) -> Result<(), RestoreError> {
    match user {
        Some(user) => chown(path, Some(user.uid), Some(user.gid)).map_err(at(path)),
        None => Ok(()),
    }
}

/// Creates a directory for PostgreSQL's user, if it does not exist.
///
/// # Errors
/// It cannot be created.
pub fn make_directory_for(path: &Path, mode: u32, user: Option<&User>) -> Result<(), RestoreError> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {
            // The umask may have taken bits away.
            fs::set_permissions(path, Permissions::from_mode(mode)).map_err(at(path))?;
            give(path, user)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(at(path)(error)),
    }
}

/// Writes a file of PostgreSQL's user, readable for nobody else.
///
/// # Errors
/// It cannot be written.
pub fn write_for(path: &Path, contents: &[u8], user: Option<&User>) -> Result<(), RestoreError> {
    // A new file: an old one may belong to another user or have other permissions.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(path)(error)),
        _ => {}
    }
    fs::write(path, contents).map_err(at(path))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(at(path))?;
    give(path, user)
}

/// Removes the socket and its lock file that a killed PostgreSQL on `pgdata` left in `directory`.
///
/// PostgreSQL takes the lock file for a living server's when any process has the number in it (`CreateLockFile`, miscinit.c);
/// the agent knows that its PostgreSQL is gone. Files of other servers in the same directory are left alone.
///
/// # Errors
/// A file cannot be read or removed.
pub fn remove_stale_socket(directory: &Path, port: u16, pgdata: &Path) -> Result<(), RestoreError> {
    let lock = directory.join(format!(".s.PGSQL.{port}.lock"));
    let text = match fs::read_to_string(&lock) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at(&lock)(error)),
    };
    if text.lines().nth(1).map(Path::new) != Some(pgdata) {
        return Ok(());
    }
    for path in [directory.join(format!(".s.PGSQL.{port}")), lock] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Makes the next start a replay of the log: standby mode, and every timeline's history, so that the newest is followed from
/// the start and a promotion takes a number above it (`findNewestTimeLine`, timeline.c).
///
/// # Errors
/// A file cannot be written.
pub fn prepare_replay(pgdata: &Path, timelines: &TimelineHistory, user: Option<&User>) -> Result<(), RestoreError> {
    for entry in &timelines.0 {
        if !entry.history_file.is_empty() {
            let path = pgdata.join("pg_wal").join(history_file_name(entry.timeline));
            write_for(&path, &entry.history_file, user)?;
        }
    }
    write_for(&pgdata.join("standby.signal"), b"", user)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A start that was killed in the middle must not leave its half of a PGDATA on the disk for ever.
    #[test]
    fn what_earlier_starts_left_is_deleted_with_the_pgdata_before() {
        let directory = std::env::temp_dir().join(format!("lakebase-put-aside-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        let pgdata = directory.join("pgdata");
        for name in ["pgdata", "pgdata.old", "pgdata.old-0", "pgdata.new-0badf00d", "pgdata.mine", "run"] {
            fs::create_dir_all(directory.join(name).join("base")).expect("created");
        }
        put_aside(&pgdata).expect("renamed");
        assert!(!pgdata.exists());
        let names = || -> Vec<String> {
            let entries = fs::read_dir(&directory).expect("read");
            let mut names: Vec<String> =
                entries.map(|entry| entry.expect("read").file_name().to_string_lossy().into()).collect();
            names.sort();
            names
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while names() != ["pgdata.mine", "run"] {
            assert!(std::time::Instant::now() < deadline, "{:?}", names());
            std::thread::yield_now();
        }
        put_aside(&pgdata).expect("nothing is there");
        fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn only_our_own_stale_socket_is_removed() {
        let directory = std::env::temp_dir().join(format!("lakebase-socket-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).expect("created");
        let (socket, lock) = (directory.join(".s.PGSQL.5432"), directory.join(".s.PGSQL.5432.lock"));
        let write = |pgdata: &str| {
            fs::write(&socket, "").expect("written");
            fs::write(&lock, format!("77\n{pgdata}\n0\n5432\n")).expect("written");
        };
        remove_stale_socket(&directory, 5432, Path::new("/a/pgdata")).expect("nothing is there");
        write("/b/pgdata");
        remove_stale_socket(&directory, 5432, Path::new("/a/pgdata")).expect("not ours");
        assert!(lock.exists() && socket.exists());
        write("/a/pgdata");
        remove_stale_socket(&directory, 5432, Path::new("/a/pgdata")).expect("removed");
        assert!(!lock.exists() && !socket.exists());
        fs::remove_dir_all(directory).expect("removed");
    }
}
