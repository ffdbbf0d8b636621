//! A stopped PGDATA of PostgreSQL 17: whether a lakebase can be made of it, and what it says about itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use pgformat::{ControlError, ControlFile, DatabaseState};
use pgtypes::Lsn;

use crate::relations::RELATION_SEGMENT_BLOCKS;

/// The major version that is read.
const MAJOR_VERSION: &str = "17";
/// Files outside of WAL that come along as they are. The first is a template: a start writes its own from it.
pub(crate) const ADVISORY_FILES: [&str; 7] = [
    "global/pg_control",
    "PG_VERSION",
    "postgresql.conf",
    "postgresql.auto.conf",
    "pg_hba.conf",
    "pg_ident.conf",
    STATISTICS,
];
/// The one of them that can be too large.
pub(crate) const STATISTICS: &str = "pg_stat/pgstat.stat";
/// A checkpoint's record is 120 bytes; the header of a page and of a segment may lie in it.
const CHECKPOINT_RECORD_BYTES_MAX: u64 = 120 + 24 + 40;

/// A PGDATA that was shut down cleanly and can be imported.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PgData {
    /// Where it is.
    pub directory: PathBuf,
    /// Its `pg_control`.
    pub control: ControlFile,
    /// What an import leaves behind, for people: replication slots, settings that lie elsewhere.
    pub left_out: Vec<String>,
}

/// The directory cannot be imported. The text says why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum PgDataError {
    /// A file or directory cannot be read.
    #[error("{}: {cause}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// There is no PGDATA here.
    #[error("{}: no PostgreSQL data directory (it has no PG_VERSION)", .0.display())]
    NotPgData(PathBuf),
    /// Of another major version.
    #[error("{}: made by PostgreSQL {found}, expected {MAJOR_VERSION}: upgrade it first (pg_upgrade), then import", directory.display())]
    MajorVersion {
        /// The directory.
        directory: PathBuf,
        /// Its version.
        found: String,
    },
    /// `pg_control` is damaged, or of a build that this engine does not work with.
    #[error("{}: {cause}", path.display())]
    Control {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: ControlError,
    },
    /// PostgreSQL was built with another size of relation files.
    #[error("{}: relation files of {found} blocks, expected {RELATION_SEGMENT_BLOCKS}: this PostgreSQL was built with --with-segsize; dump and restore into an ordinary one", directory.display())]
    SegmentBlocks {
        /// The directory.
        directory: PathBuf,
        /// Blocks of its files.
        found: u32,
    },
    /// A server runs on it, or died on it.
    #[error("{}: a server runs on it, or did not end cleanly (postmaster.pid exists): stop it with `pg_ctl stop`", .0.display())]
    Running(PathBuf),
    /// An online base backup, or a server that is to recover.
    #[error("{}: {file} says that it is yet to be recovered: start it with PostgreSQL {MAJOR_VERSION} until it accepts writes (for a standby: pg_ctl promote), stop it with `pg_ctl stop`, then import", directory.display())]
    ToRecover {
        /// The directory.
        directory: PathBuf,
        /// `backup_label`, `standby.signal` or `recovery.signal`.
        file: &'static str,
    },
    /// The server was a standby.
    #[error("{}: it belonged to a standby, whose files may lack changes: promote it (pg_ctl promote), stop it, then import", .0.display())]
    Standby(PathBuf),
    /// Not shut down cleanly.
    #[error("{}: not cleanly shut down (pg_control says {state:?}): start it once with PostgreSQL {MAJOR_VERSION} and stop it with `pg_ctl stop`", directory.display())]
    NotShutDown {
        /// The directory.
        directory: PathBuf,
        /// Its state.
        state: DatabaseState,
    },
    /// Tablespaces.
    #[error("{}: tablespace {oid} exists, and tablespaces are not supported: move what is in it (ALTER TABLE … SET TABLESPACE pg_default), drop it, then stop the server and import", directory.display())]
    Tablespace {
        /// The directory.
        directory: PathBuf,
        /// Name of the entry of `pg_tblspc`.
        oid: String,
    },
    /// Something has a place in PGDATA that PostgreSQL does not give to such a thing.
    #[error("{}: {what}", path.display())]
    Unexpected {
        /// Where.
        path: PathBuf,
        /// What.
        what: String,
    },
}

impl PgDataError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> PgDataError {
        let path = path.to_owned();
        move |cause| PgDataError::Io { path, cause }
    }
}

impl PgData {
    /// Looks whether a lakebase can be made of `directory`.
    ///
    /// # Errors
    /// It is no PGDATA, of another version or build, in use, not cleanly shut down, a standby's, or has tablespaces.
    pub fn open(directory: &Path) -> Result<PgData, PgDataError> {
        let own = || directory.to_owned();
        let version_path = directory.join("PG_VERSION");
        let version = match fs::read_to_string(&version_path) {
            Ok(version) => version.trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(PgDataError::NotPgData(own())),
            Err(error) => return Err(PgDataError::io(&version_path)(error)),
        };
        if version != MAJOR_VERSION {
            return Err(PgDataError::MajorVersion { directory: own(), found: version });
        }
        if directory.join("postmaster.pid").exists() {
            return Err(PgDataError::Running(own()));
        }
        for file in ["backup_label", "standby.signal", "recovery.signal"] {
            if directory.join(file).exists() {
                return Err(PgDataError::ToRecover { directory: own(), file });
            }
        }
        let path = directory.join("global/pg_control");
        let bytes = fs::read(&path).map_err(PgDataError::io(&path))?;
        let control = ControlFile::parse(&bytes).map_err(|cause| PgDataError::Control { path, cause })?;
        match control.state {
            DatabaseState::ShutDown => {}
            DatabaseState::ShutDownInRecovery => return Err(PgDataError::Standby(own())),
            state => return Err(PgDataError::NotShutDown { directory: own(), state }),
        }
        if control.relation_segment_blocks != RELATION_SEGMENT_BLOCKS {
            let found = control.relation_segment_blocks;
            return Err(PgDataError::SegmentBlocks { directory: own(), found });
        }
        if let Some(oid) = names(&directory.join("pg_tblspc"))?.into_iter().next() {
            return Err(PgDataError::Tablespace { directory: own(), oid });
        }
        let left_out = left_out(directory)?;
        Ok(PgData { directory: own(), control, left_out })
    }

    /// Behind every byte of WAL that its pages know: at or after the end of its last checkpoint's record.
    pub fn end_bound(&self) -> Lsn {
        Lsn(self.control.checkpoint_lsn.0 + CHECKPOINT_RECORD_BYTES_MAX)
    }

    /// N: the start of the WAL segment after the one that holds its end. A lakebase's log begins there.
    pub fn log_start(&self) -> Lsn {
        let segment_bytes = u64::from(self.control.segment_bytes);
        Lsn(self.end_bound().floor(segment_bytes).0 + segment_bytes)
    }

    /// Whether its pages have checksums.
    pub fn has_checksums(&self) -> bool {
        self.control.data_checksum_version != 0
    }
}

/// What of the server's state an import does not take along, and what to do about it.
fn left_out(directory: &Path) -> Result<Vec<String>, PgDataError> {
    let mut left_out: Vec<String> = Vec::new();
    let slots = names(&directory.join("pg_replslot"))?;
    if !slots.is_empty() {
        left_out.push(format!("replication slots ({}): create them again where they are needed", slots.join(", ")));
    }
    for file in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        if !directory.join(file).exists() {
            left_out.push(format!("{file}: it lies outside of the data directory; settings in it do not come along"));
        }
    }
    if fs::read_to_string(directory.join("postgresql.conf")).is_ok_and(|text| text.lines().any(includes_a_file)) {
        left_out.push(
            "files that postgresql.conf includes: move their settings into it before the import, or no server will start"
                .to_owned(),
        );
    }
    if fs::metadata(directory.join(STATISTICS)).is_ok_and(|file| file.len() > shard::ADVISORY_BYTES_MAX as u64) {
        left_out.push(format!("{STATISTICS}: it is too large; run ANALYZE in each database afterwards"));
    }
    let others: Vec<_> = names(directory)?.into_iter().filter(|name| is_other_file(directory, name)).collect();
    if !others.is_empty() {
        left_out.push(format!("files that are not PostgreSQL's own ({}): settings may name them", others.join(", ")));
    }
    Ok(left_out)
}

/// Whether a line of `postgresql.conf` is `include`, `include_if_exists` or `include_dir`.
fn includes_a_file(line: &str) -> bool {
    let word = line.trim_start().split([' ', '\t', '=', '\'']).next().unwrap_or_default();
    matches!(word.to_ascii_lowercase().as_str(), "include" | "include_dir" | "include_if_exists")
}

/// Whether an entry of the data directory is a file that neither comes along nor belongs to a run of the server.
fn is_other_file(directory: &Path, name: &str) -> bool {
    const OF_A_RUN: [&str; 3] = ["postmaster.opts", "current_logfiles", "backup_manifest"];
    let is_known = ADVISORY_FILES.contains(&name) || OF_A_RUN.contains(&name) || name.ends_with(".old");
    !is_known && directory.join(name).is_file()
}

/// Names in a directory, sorted.
///
/// # Errors
/// It cannot be read, or a name is not UTF-8.
pub(crate) fn names(directory: &Path) -> Result<Vec<String>, PgDataError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(PgDataError::io(directory))? {
        let entry = entry.map_err(PgDataError::io(directory))?;
        let name = entry.file_name().into_string().map_err(|name| PgDataError::Unexpected {
            path: directory.join(name),
            what: "PostgreSQL gives no such name to a file".to_owned(),
        })?;
        names.push(name);
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_are_found_and_comments_are_not() {
        for line in ["include_dir = 'conf.d'", "include 'x.conf'", "  INCLUDE_IF_EXISTS='x'", "include\t'x'"] {
            assert!(includes_a_file(line), "{line}");
        }
        for line in ["#include_dir = 'conf.d'", "included = 1", "", "work_mem = 1MB # include 'x'"] {
            assert!(!includes_a_file(line), "{line}");
        }
    }
}
