//! PostgreSQL's standard output and error in a file of bounded size.
//!
//! PostgreSQL writes into a pipe, and a thread of the agent writes the file: it alone has it open, so that it can begin another one
//! between two lines. While the agent is frozen, PostgreSQL waits once the pipe is full, as it waits for its commits anyway. With
//! the agent what is in the pipe is lost. Knows nothing about what the lines say.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use crate::area::pipe;

/// Size at which `postgres.log` becomes `postgres.log.1`, in place of the one before: twice as much is on the disk at most. A day of
/// ten lines a second.
pub const LOG_BYTES_MAX: u64 = 64 << 20;

/// Bytes that wait for the thread before PostgreSQL does; the kernel grants as much to everybody.
const PIPE_BYTES: i32 = 1 << 20;

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Starts the thread that appends to the file at `path`; returns what PostgreSQL writes to. The thread ends with its last writer.
///
/// # Errors
/// The file cannot be opened, or there is no descriptor or thread to be had.
pub fn start(path: &Path, bytes_max: u64) -> io::Result<(OwnedFd, JoinHandle<()>)> {
    let mut log = BoundedFile::open(path, bytes_max)?;
    let (read, write) = pipe()?;
    // SAFETY: no pointers. Refused where the user has many pipes; then it is smaller.
    unsafe { libc::fcntl(write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
    let mut read = File::from(read);
    let copy = move || {
        let mut buffer = vec![0; READ_BYTES];
        let mut failed = false;
        loop {
            let count = match read.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return tracing::warn!(%error, "PostgreSQL's log cannot be read any more"),
            };
            // What cannot be written is dropped: PostgreSQL must not wait for a full disk's log.
            let result = log.append(&buffer[..count]);
            if let Err(error) = &result
                && !failed
            {
                tracing::warn!(%error, path = %log.path.display(), "lines of PostgreSQL's log are lost");
            }
            failed = result.is_err();
        }
    };
    Ok((write, thread::Builder::new().name("postgres-log".into()).spawn(copy)?))
}

/// A file that is put aside when it has grown.
struct BoundedFile {
    path: PathBuf,
    /// Where it is put.
    older: PathBuf,
    file: File,
    size: u64,
    bytes_max: u64,
}

impl BoundedFile {
    fn open(path: &Path, bytes_max: u64) -> io::Result<Self> {
        let mut older = OsString::from(path);
        older.push(".1");
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), older: older.into(), file, size, bytes_max })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size + bytes.len() as u64 <= self.bytes_max {
            return self.write(bytes);
        }
        // Between two lines; inside of one only where it is as long as a file itself.
        let line_end = bytes.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        let cut = match line_end {
            None if self.size < 2 * self.bytes_max => return self.write(bytes),
            None => 0,
            Some(end) => end,
        };
        self.write(&bytes[..cut])?;
        fs::rename(&self.path, &self.older)?;
        *self = Self::open(&self.path, self.bytes_max)?;
        self.write(&bytes[cut..])
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two runs of PostgreSQL, the second of which finds the first's file: nothing of the newest bytes is lost or cut.
    #[test]
    fn the_newest_lines_are_kept_in_two_files_of_bounded_size() {
        const MAX: u64 = 10_000;
        let directory = std::env::temp_dir().join(format!("lakebase-postgres-log-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).expect("created");
        let path = directory.join("postgres.log");
        for run in 0..2 {
            let (write, thread) = start(&path, MAX).expect("started");
            let mut write = File::from(write);
            for line in 0..1_000 {
                writeln!(write, "run {run} line {line:04} of a log that grows").expect("written");
            }
            drop(write);
            thread.join().expect("ended");
        }
        let [older, newer] = ["postgres.log.1", "postgres.log"]
            .map(|name| fs::read_to_string(directory.join(name)).expect("a file of whole lines"));
        for file in [&older, &newer] {
            // A read may bring many lines behind the one at which the file was full.
            assert!(file.len() as u64 <= MAX + READ_BYTES as u64 && file.ends_with('\n'));
        }
        let kept = older + &newer;
        let expected: Vec<String> = (0..2)
            .flat_map(|run| (0..1_000).map(move |line| format!("run {run} line {line:04} of a log that grows")))
            .collect();
        let kept: Vec<&str> = kept.lines().collect();
        assert_eq!(expected[expected.len() - kept.len()..], kept[..]);
        assert!(kept.len() < expected.len(), "the file never grew to its bound");
        assert_eq!(2, fs::read_dir(&directory).expect("listed").count());
        fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn a_line_without_end_is_bounded_too() {
        let directory = std::env::temp_dir().join(format!("lakebase-postgres-line-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("created");
        let mut log = BoundedFile::open(&directory.join("log"), 1_000).expect("opened");
        for _ in 0..100 {
            log.append(&[b'x'; 100]).expect("written");
        }
        for name in ["log", "log.1"] {
            assert!(fs::metadata(directory.join(name)).expect("there").len() <= 2_000, "{name}");
        }
        fs::remove_dir_all(directory).expect("removed");
    }
}
