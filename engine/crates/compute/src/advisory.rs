//! Files of PGDATA that are in no WAL, but that a cold start on another disk must find again: which of them changed.
//!
//! The page service keeps them beside the pages (*advisory* state). Knows nothing about how they get there.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use wal::crc32c;
use wire::page::ADVISORY_BYTES_MAX;

/// What users change by an editor or `ALTER SYSTEM`.
const CONFIGURATION: [&str; 4] = ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"];
/// Written by PostgreSQL at its clean stop only.
const STATISTICS: &str = "pg_stat/pgstat.stat";

/// A file that the page service should have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChangedFile {
    /// Path in PGDATA.
    pub name: &'static str,
    /// Its contents.
    pub contents: Vec<u8>,
    stamp: Stamp,
}

/// What shows a change without reading the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    modified: (i64, i64),
    inode: u64,
    /// Length of the file.
    pub bytes: u64,
}

/// What the page service is known to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Kept {
    stamp: Stamp,
    checksum: u32,
    bytes: usize,
}

/// The files of one PGDATA.
pub struct AdvisoryFiles {
    pgdata: PathBuf,
    kept: BTreeMap<&'static str, Kept>,
}

impl AdvisoryFiles {
    /// Of a PGDATA that was just made from what the page service has: nothing has changed.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn of_cold_start(pgdata: &Path) -> io::Result<Self> {
        let mut files = Self { pgdata: pgdata.to_owned(), kept: BTreeMap::new() };
        for file in files.changed(&CONFIGURATION)? {
            files.keep(&file);
        }
        Ok(files)
    }

    /// Configuration files that changed since the page service got them. Costs a `stat` each where nothing did.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn changed_configuration(&mut self) -> io::Result<Vec<ChangedFile>> {
        self.changed(&CONFIGURATION)
    }

    /// After a clean stop: what changed, with the statistics.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn changed_at_stop(&mut self) -> io::Result<Vec<ChangedFile>> {
        let mut changed = self.changed(&CONFIGURATION)?;
        changed.extend(self.changed(&[STATISTICS])?);
        Ok(changed)
    }

    /// The page service has the file.
    pub fn keep(&mut self, file: &ChangedFile) {
        let ChangedFile { stamp, ref contents, .. } = *file;
        self.kept.insert(file.name, Kept { stamp, checksum: crc32c(0, contents), bytes: contents.len() });
    }

    fn changed(&mut self, names: &[&'static str]) -> io::Result<Vec<ChangedFile>> {
        let mut changed = Vec::new();
        for name in names {
            let path = self.pgdata.join(name);
            let Some(stamp) = stamp(&path)? else { continue };
            if self.kept.get(name).is_some_and(|kept| kept.stamp == stamp) {
                continue;
            }
            let contents = match fs::read(&path) {
                Ok(contents) => contents,
                // Replaced by rename at this moment: the next look finds the new one.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let checksum = crc32c(0, &contents);
            match self.kept.get_mut(name) {
                Some(kept) if (kept.checksum, kept.bytes) == (checksum, contents.len()) => kept.stamp = stamp,
                // An empty file would mean its removal; PostgreSQL takes a missing one for empty, too.
                _ if contents.len() > ADVISORY_BYTES_MAX => {
                    tracing::warn!(
                        name,
                        bytes = contents.len(),
                        "too long for the page service: a later start will not have it"
                    );
                    self.kept.insert(name, Kept { stamp, checksum, bytes: contents.len() });
                }
                _ => changed.push(ChangedFile { name, contents, stamp }),
            }
        }
        Ok(changed)
    }
}

/// The stamp of a file that exists.
///
/// # Errors
/// The file system's.
pub fn stamp(path: &Path) -> io::Result<Option<Stamp>> {
    match fs::metadata(path) {
        Ok(found) => {
            let modified = (found.mtime(), found.mtime_nsec());
            Ok(Some(Stamp { modified, inode: found.ino(), bytes: found.len() }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_named_until_it_was_kept() {
        let pgdata = std::env::temp_dir().join(format!("lakebase-advisory-{}", std::process::id()));
        let _ = fs::remove_dir_all(&pgdata);
        fs::create_dir_all(pgdata.join("pg_stat")).expect("created");
        fs::write(pgdata.join("pg_hba.conf"), "local all all trust").expect("written");
        let mut files = AdvisoryFiles::of_cold_start(&pgdata).expect("read");
        let names = |changed: &[ChangedFile]| changed.iter().map(|file| file.name).collect::<Vec<_>>();
        assert_eq!(Vec::<&str>::new(), names(&files.changed_configuration().expect("read")));

        // `ALTER SYSTEM` writes a new file and renames it.
        fs::write(pgdata.join("postgresql.auto.conf.tmp"), "work_mem = '1MB'").expect("written");
        fs::rename(pgdata.join("postgresql.auto.conf.tmp"), pgdata.join("postgresql.auto.conf")).expect("renamed");
        let changed = files.changed_configuration().expect("read");
        assert_eq!(vec!["postgresql.auto.conf"], names(&changed));
        assert_eq!(changed, files.changed_configuration().expect("read"), "named until it was kept");
        files.keep(&changed[0]);
        assert!(files.changed_configuration().expect("read").is_empty());

        // Written anew with the same contents: nothing to tell.
        fs::write(pgdata.join("pg_hba.conf"), "local all all trust").expect("written");
        assert!(files.changed_configuration().expect("read").is_empty());

        fs::write(pgdata.join("pg_stat/pgstat.stat"), "statistics").expect("written");
        assert!(files.changed_configuration().expect("read").is_empty());
        assert_eq!(vec!["pg_stat/pgstat.stat"], names(&files.changed_at_stop().expect("read")));
        fs::remove_dir_all(pgdata).expect("removed");
    }
}
