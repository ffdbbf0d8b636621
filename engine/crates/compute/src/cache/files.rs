//! Relation files, opened once for many fills and evictions.

use std::{
    collections::HashMap,
    fmt::Write,
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    rc::Rc,
};

use vfs_abi::blocks::{BLOCK_BYTES, FileKey, FileRef};

/// Descriptors kept. At the bound all are closed: opening again costs less than telling which are wanted.
const OPEN_MAX: usize = 512;

/// `DEFAULTTABLESPACE_OID` of shared relations (pg_tablespace.dat).
const GLOBAL_TABLESPACE: u32 = 1664;

/// Path of a relation file below PGDATA (`GetRelationPath`, relpath.c).
pub fn relation_path(key: &FileKey) -> PathBuf {
    let mut path = match key.tablespace {
        GLOBAL_TABLESPACE => format!("global/{}", key.relation),
        _ => format!("base/{}/{}", key.database, key.relation),
    };
    path.push_str(match key.fork {
        0 => "",
        1 => "_fsm",
        2 => "_vm",
        _ => "_init",
    });
    if key.segment > 0 {
        // Writing to a string does not fail.
        let _written = write!(path, ".{}", key.segment);
    }
    path.into()
}

/// Open files by what the map calls them: a file that was unlinked and made anew has another incarnation, so that nothing
/// is written to the one before.
pub struct OpenFiles {
    pgdata: PathBuf,
    open: HashMap<FileRef, Rc<File>>,
}

impl OpenFiles {
    /// Of this PGDATA.
    pub fn new(pgdata: &Path) -> Self {
        Self { pgdata: pgdata.to_owned(), open: HashMap::new() }
    }

    /// The file, opened for writing. Meaningful only while a block of it is claimed under the same reference: a claim keeps
    /// the file from being unlinked.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn get(&mut self, file: FileRef, key: &FileKey) -> io::Result<Rc<File>> {
        if let Some(open) = self.open.get(&file) {
            return Ok(open.clone());
        }
        if self.open.len() >= OPEN_MAX {
            self.open.clear();
        }
        let path = self.pgdata.join(relation_path(key));
        let open = Rc::new(OpenOptions::new().write(true).open(path)?);
        self.open.insert(file, open.clone());
        Ok(open)
    }

    /// Closes files that are not in the map any more: their room is given back only then.
    pub fn close_gone(&mut self, is_current: impl Fn(FileRef) -> bool) {
        self.open.retain(|file, _| is_current(*file));
    }
}

/// Gives the room of `count` blocks from `first` on back to the file system; the file keeps its length and reads zeros there.
///
/// # Errors
/// The file system cannot do that, or I/O.
pub fn punch(file: &File, first: u32, count: u32) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let [offset, length] = [first, count].map(|blocks| (u64::from(blocks) * BLOCK_BYTES) as libc::off_t);
    // SAFETY: no pointers.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes that the file system of `path` has left for ordinary users.
///
/// # Errors
/// Those of `statvfs(3)`.
pub fn available_bytes(path: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all-zero is valid for this struct of numbers.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a path with its closing zero byte, and a writable struct.
    match unsafe { libc::statvfs(path.as_ptr(), &raw mut found) } {
        0 => Ok(found.f_bavail.saturating_mul(found.f_frsize)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn paths_are_postgresqls() {
        let key =
            |tablespace, database, fork, segment| FileKey { tablespace, database, relation: 16384, fork, segment };
        for (key, expected) in [
            (key(1663, 5, 0, 0), "base/5/16384"),
            (key(1663, 5, 2, 0), "base/5/16384_vm"),
            (key(1663, 5, 3, 0), "base/5/16384_init"),
            (key(1663, 5, 0, 7), "base/5/16384.7"),
            (key(1663, 5, 2, 1), "base/5/16384_vm.1"),
            (key(1664, 0, 0, 0), "global/16384"),
        ] {
            assert_eq!(Path::new(expected), relation_path(&key));
        }
    }

    #[test]
    fn a_punched_run_reads_zeros_and_takes_no_room() {
        let directory = std::env::temp_dir().join(format!("lakebase-punch-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("global")).expect("created");
        let key = FileKey { tablespace: 1664, database: 0, relation: 1, fork: 0, segment: 0 };
        let path = directory.join(relation_path(&key));
        let bytes = vec![7u8; 32 * 8192];
        std::fs::write(&path, &bytes).expect("written");
        let mut files = OpenFiles::new(&directory);
        let file = files.get(FileRef { slot: 1, incarnation: 1 }, &key).expect("opened");
        punch(&file, 8, 16).expect("punched");
        let found = std::fs::read(&path).expect("read");
        assert_eq!(bytes.len(), found.len());
        assert!(found[8 * 8192..24 * 8192].iter().all(|byte| *byte == 0));
        assert!(found[..8 * 8192].iter().chain(&found[24 * 8192..]).all(|byte| *byte == 7));
        assert!(std::fs::metadata(&path).expect("present").blocks() * 512 <= 16 * 8192);

        // Made anew under the same name: the descriptor of the old one is not used for it.
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, [1]).expect("written");
        let other = files.get(FileRef { slot: 1, incarnation: 3 }, &key).expect("opened");
        other.write_all_at(&[2], 0).expect("written");
        assert_eq!(vec![2], std::fs::read(&path).expect("read"));
        assert_eq!(2, files.open.len());
        files.close_gone(|file| file.incarnation == 3);
        assert_eq!(1, files.open.len());
        assert!(available_bytes(&directory).expect("asked") > 0);
        std::fs::remove_dir_all(directory).expect("removed");
    }
}
