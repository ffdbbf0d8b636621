//! The agent's directory: what survives the agent, and what must not.
//!
//! `docs/formats/agent-files.md` describes the files. All are small texts of `key value` lines, replaced by rename and
//! synced, so that a crash leaves the old or the new one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    str::FromStr,
};

use consensus::Grant;
use pgtypes::{Attempt, Ballot, BranchId, ClusterId, LogId, Lsn, Term};

/// First line of each file: format and version.
const GRANT_HEADER: &str = "lakebase-grant 1";
const CLEAN_HEADER: &str = "lakebase-clean 1";

/// PGDATA was shut down cleanly, and its WAL ends where the log of that time ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CleanMark {
    /// Which log.
    pub log: LogId,
    /// Who wrote it.
    pub ballot: Ballot,
    /// End of the shutdown checkpoint's record: all before it was committed.
    pub end: Lsn,
}

/// A file of the directory cannot be read or written, or says nonsense.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct DataDirError {
    path: String,
    message: String,
}

impl DataDirError {
    fn new(path: &Path, message: impl Into<String>) -> Self {
        Self { path: path.display().to_string(), message: message.into() }
    }

    /// Names the file of an I/O error.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::new(path, error.to_string())
    }
}

/// The directory, locked for as long as this lives.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Opens or creates the directory, for one agent at a time.
    ///
    /// # Errors
    /// It cannot be created, or another agent uses it.
    pub fn open(root: &Path) -> Result<Self, DataDirError> {
        fs::create_dir_all(root).map_err(DataDirError::io(root))?;
        let path = root.join("lock");
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(DataDirError::io(&path))?;
        // SAFETY: no pointers.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            let message = match error.kind() {
                io::ErrorKind::WouldBlock => "another compute agent uses this directory".into(),
                _ => error.to_string(),
            };
            return Err(DataDirError::new(&path, message));
        }
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// PGDATA.
    pub fn pgdata(&self) -> PathBuf {
        self.root.join("pgdata")
    }

    /// PostgreSQL's log, when it goes to a file.
    pub fn postgres_log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    /// Copies of the certificates that PostgreSQL's user can read.
    pub fn postgres_tls(&self) -> PathBuf {
        self.root.join("postgres-tls")
    }

    /// The grant of an earlier run, if any.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub fn read_grant(&self) -> Result<Option<Grant>, DataDirError> {
        let path = self.root.join("grant");
        let Some(fields) = Fields::read(&path, GRANT_HEADER)? else { return Ok(None) };
        Ok(Some(Grant { term: Term(fields.get("term")?), writer: fields.get("writer")? }))
    }

    /// Remembers a grant, durably, before it is acted on.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_grant(&self, grant: Grant) -> Result<(), DataDirError> {
        let text = format!("{GRANT_HEADER}\nterm {}\nwriter {}\n", grant.term.0, grant.writer);
        self.replace("grant", &text)
    }

    /// The mark of a clean stop, if any.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub fn read_clean(&self) -> Result<Option<CleanMark>, DataDirError> {
        let path = self.root.join("clean");
        let Some(fields) = Fields::read(&path, CLEAN_HEADER)? else { return Ok(None) };
        let log = LogId { cluster: fields.get::<ClusterId>("cluster")?, branch: fields.get::<BranchId>("branch")? };
        let ballot = Ballot { term: Term(fields.get("term")?), attempt: Attempt(fields.get("attempt")?) };
        Ok(Some(CleanMark { log, ballot, end: fields.get("end")? }))
    }

    /// Marks PGDATA as reusable, after everything in it was synced.
    ///
    /// # Errors
    /// It cannot be written or synced.
    pub fn write_clean(&self, mark: CleanMark) -> Result<(), DataDirError> {
        let pgdata = self.pgdata();
        let directory = File::open(&pgdata).map_err(DataDirError::io(&pgdata))?;
        // SAFETY: no pointers. The library turned PostgreSQL's own fsyncs into nothing.
        if unsafe { libc::syncfs(directory.as_raw_fd()) } != 0 {
            return Err(DataDirError::io(&pgdata)(io::Error::last_os_error()));
        }
        let CleanMark { log, ballot, end } = mark;
        let text = format!(
            "{CLEAN_HEADER}\ncluster {}\nbranch {}\nterm {}\nattempt {}\nend {end}\n",
            log.cluster, log.branch, ballot.term.0, ballot.attempt.0
        );
        self.replace("clean", &text)
    }

    /// Takes the mark away, durably: from here on PGDATA is not trusted.
    ///
    /// # Errors
    /// It cannot be removed or the directory not synced.
    pub fn remove_clean(&self) -> Result<(), DataDirError> {
        let path = self.root.join("clean");
        match fs::remove_file(&path) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(DataDirError::io(&path)(error)),
        }
    }

    fn replace(&self, name: &str, text: &str) -> Result<(), DataDirError> {
        let path = self.root.join(name);
        let draft = self.root.join(format!("{name}.new"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &path)
        };
        write().map_err(DataDirError::io(&path))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), DataDirError> {
        File::open(&self.root).and_then(|directory| directory.sync_all()).map_err(DataDirError::io(&self.root))
    }
}

/// The `key value` lines of a file.
struct Fields {
    path: PathBuf,
    text: String,
}

impl Fields {
    fn read(path: &Path, header: &str) -> Result<Option<Self>, DataDirError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(DataDirError::io(path)(error)),
        };
        if text.lines().next() != Some(header) {
            return Err(DataDirError::new(path, format!("does not begin with `{header}`")));
        }
        Ok(Some(Self { path: path.to_owned(), text }))
    }

    fn get<T: FromStr>(&self, key: &str) -> Result<T, DataDirError> {
        self.text
            .lines()
            .skip(1)
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
            .and_then(|value| value.parse().ok())
            .ok_or_else(|| DataDirError::new(&self.path, format!("no valid `{key}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgtypes::WriterId;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("lakebase-data-dir-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn grant_and_mark_are_read_as_written() {
        let root = directory("round-trip");
        let data_dir = DataDir::open(&root).expect("created");
        assert_eq!(None, data_dir.read_grant().expect("absent"));
        assert_eq!(None, data_dir.read_clean().expect("absent"));
        data_dir.remove_clean().expect("removing what is absent is done");

        let grant = Grant { term: Term(7), writer: WriterId([3; 16]) };
        data_dir.write_grant(grant).expect("written");
        assert_eq!(Some(grant), data_dir.read_grant().expect("present"));

        fs::create_dir(data_dir.pgdata()).expect("created");
        let mark = CleanMark {
            log: LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) },
            ballot: Ballot { term: Term(7), attempt: Attempt(2) },
            end: Lsn(0x1_0000_00A8),
        };
        data_dir.write_clean(mark).expect("written");
        assert_eq!(Some(mark), data_dir.read_clean().expect("present"));
        data_dir.remove_clean().expect("removed");
        assert_eq!(None, data_dir.read_clean().expect("absent"));
        fs::remove_dir_all(root).expect("removed");
    }

    /// A damaged mark must not look like "no mark": the operator should hear of it. A damaged grant neither.
    #[test]
    fn damaged_files_are_errors() {
        let root = directory("damaged");
        let data_dir = DataDir::open(&root).expect("created");
        for text in ["", "lakebase-grant 2\nterm 1\n", "lakebase-grant 1\nterm x\n", "lakebase-grant 1\nterm 1\n"] {
            fs::write(root.join("grant"), text).expect("written");
            assert!(data_dir.read_grant().is_err(), "{text:?}");
        }
        fs::write(root.join("clean"), "lakebase-clean 1\n").expect("written");
        assert!(data_dir.read_clean().is_err());
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn one_agent_per_directory() {
        let root = directory("lock");
        let first = DataDir::open(&root).expect("created");
        assert!(DataDir::open(&root).expect_err("locked").to_string().contains("another compute agent"));
        drop(first);
        DataDir::open(&root).expect("free again");
        fs::remove_dir_all(root).expect("removed");
    }
}
