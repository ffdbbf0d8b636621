//! The files of one log: written as the log's machine says, read for those who are entitled to its WAL.
//!
//! Knows nothing about what is committed: callers ask the machine first, and again after a read (see [`LogFiles::read`]).

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use driver::{AlignedBuffer, Bytes, File, OpenOptions};
use logstore::{
    Buffer, ReadFailed, SEGMENT_BYTES, SEGMENT_FILE_BYTES, SegmentError, SegmentReader, SegmentVerifier, TRAILER_BYTES,
    parse_segment_file_name, segment_file_name,
};
use pgtypes::{LogId, Lsn};

/// Files open for writing: the segment that grows, the one before (its sync and trailer), and the next, in two ways each.
const WRITERS_MAX: usize = 8;

/// Segments open for reading. More readers at more places than this open, and verify, segments again and again.
const READERS_MAX: usize = 16;

/// Bytes read at a time while a segment is verified.
const VERIFY_BYTES: usize = 1 << 20;

/// Why WAL cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Below what this safekeeper still holds, or beyond what it may give.
    #[error("WAL at {begin} is not available here: it holds {oldest} up to {readable}")]
    NotAvailable {
        /// First byte wanted.
        begin: Lsn,
        /// First position held.
        oldest: Lsn,
        /// Up to where it may be read.
        readable: Lsn,
    },
    /// The segment failed its checksum; reported, and never served.
    #[error("segment {} is damaged: {source}", segment_file_name(*start))]
    Damaged {
        /// Which segment.
        start: Lsn,
        /// How.
        source: SegmentError,
    },
    /// It failed its checksum before.
    #[error("segment {} is damaged", segment_file_name(*start))]
    KnownDamaged {
        /// Which segment.
        start: Lsn,
    },
    /// The file system failed.
    #[error("read segment {}: {source}", segment_file_name(*start))]
    Io {
        /// Which segment.
        start: Lsn,
        /// How.
        source: io::Error,
    },
}

/// A machine's buffer on its way to or from the disk.
pub struct Owned(pub Buffer);

impl Bytes for Owned {
    fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

struct OpenSegment {
    start: Lsn,
    file: File,
    verified: bool,
}

/// The directory of one log.
pub struct LogFiles {
    log: LogId,
    directory: PathBuf,
    direct: bool,
    /// By start and by whether each write is durable.
    writers: RefCell<BTreeMap<(Lsn, bool), File>>,
    /// The most recently used last.
    readers: RefCell<Vec<OpenSegment>>,
    /// Since [`LogFiles::close_if_idle`] was called last.
    used: Cell<bool>,
    /// How often a segment was forgotten: a file opened before may be another segment by now.
    forgotten: Cell<u64>,
    /// By copy of the control file: its name is durable. Whoever created it may have failed, or ended, before that.
    control_named: [Cell<bool>; 2],
}

impl LogFiles {
    /// The files in `directory`; `direct` says whether segments can be written past the page cache.
    pub fn new(log: LogId, directory: PathBuf, direct: bool) -> Self {
        Self {
            log,
            directory,
            direct,
            writers: RefCell::default(),
            readers: RefCell::default(),
            used: Cell::new(false),
            forgotten: Cell::new(0),
            control_named: Default::default(),
        }
    }

    /// The log's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where the segment at `start` is.
    pub fn segment_path(&self, start: Lsn) -> PathBuf {
        self.directory.join("wal").join(segment_file_name(start))
    }

    async fn writer(&self, start: Lsn, durable: bool) -> io::Result<File> {
        self.used.set(true);
        if let Some(file) = self.writers.borrow().get(&(start, durable)) {
            return Ok(file.clone());
        }
        let options = OpenOptions { write: true, direct: self.direct, durable, ..OpenOptions::default() };
        let file = File::open(self.segment_path(start), options).await?;
        let mut writers = self.writers.borrow_mut();
        if writers.len() >= WRITERS_MAX {
            writers.pop_first();
        }
        writers.insert((start, durable), file.clone());
        Ok(file)
    }

    /// Writes whole blocks into a segment; with `durable` they are when this returns.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn write(&self, start: Lsn, offset: u64, buffer: Buffer, durable: bool) -> (io::Result<()>, Buffer) {
        match self.writer(start, durable).await {
            Ok(file) => {
                let (result, Owned(buffer)) = file.write_at(Owned(buffer), offset).await;
                (result, buffer)
            }
            Err(error) => (Err(error), buffer),
        }
    }

    /// Fills `buffer` with whole blocks of a segment.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn read_blocks(&self, start: Lsn, offset: u64, mut buffer: Buffer) -> (io::Result<()>, Buffer) {
        let read = async {
            let file = self.writer(start, false).await?;
            file.read_range(offset, buffer.len()).await
        };
        match read.await {
            Ok(bytes) => {
                buffer.as_bytes_mut().copy_from_slice(&bytes);
                (Ok(()), buffer)
            }
            Err(error) => (Err(error), buffer),
        }
    }

    /// Makes everything written to the segments `first..=last` durable.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn sync(&self, first: Lsn, last: Lsn) -> io::Result<()> {
        let mut start = first;
        while start <= last {
            self.writer(start, false).await?.sync_data().await?;
            start = start.advance(SEGMENT_BYTES);
        }
        Ok(())
    }

    /// Replaces a copy of the control file, durably.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn write_control(&self, copy: u8, buffer: Buffer) -> (io::Result<()>, Buffer) {
        let path = self.control_path(copy);
        let open = |create_new| {
            File::open(&path, OpenOptions { write: true, create_new, direct: self.direct, durable: false })
        };
        let opened = match open(false).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => open(true).await,
            opened => opened,
        };
        let file = match opened {
            Ok(file) => file,
            Err(error) => return (Err(error), buffer),
        };
        let (mut result, Owned(buffer)) = file.write_at(Owned(buffer), 0).await;
        if result.is_ok() {
            result = file.sync_data().await;
        }
        let named = &self.control_named[usize::from(copy)];
        if result.is_ok() && !named.get() {
            result = driver::sync_directory(&self.directory).await;
            named.set(result.is_ok());
        }
        (result, buffer)
    }

    fn control_path(&self, copy: u8) -> PathBuf {
        self.directory.join(format!("control.{copy}"))
    }

    /// The copies of the control file that exist. Blocks: used at start.
    ///
    /// # Errors
    /// Those of the file system, other than that a copy does not exist.
    pub fn read_control(&self) -> io::Result<[Option<Vec<u8>>; 2]> {
        let read = |copy| match std::fs::read(self.control_path(copy)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        Ok([read(0)?, read(1)?])
    }

    /// Forgets the open files of a segment that is about to be removed.
    pub fn forget(&self, start: Lsn) {
        self.forgotten.set(self.forgotten.get() + 1);
        self.writers.borrow_mut().retain(|(open, _), _| *open != start);
        self.readers.borrow_mut().retain(|open| open.start != start);
    }

    /// Closes all files if none was used since this was called last.
    pub fn close_if_idle(&self) {
        if !self.used.replace(false) {
            self.close_all();
        }
    }

    /// Closes all files.
    pub fn close_all(&self) {
        self.writers.borrow_mut().clear();
        self.readers.borrow_mut().clear();
    }

    /// Reads from `begin` on, at most `max` bytes and never beyond the end of its segment or `until`. A segment that is
    /// `sealed` is verified when it is opened.
    ///
    /// The file may be recycled meanwhile: the caller must ask the machine after the read whether `begin` is still held.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] and [`ReadError::Io`].
    pub async fn read(&self, begin: Lsn, until: Lsn, max: usize, sealed: bool) -> Result<AlignedBuffer, ReadError> {
        self.used.set(true);
        let start = begin.floor(SEGMENT_BYTES);
        let in_segment = SEGMENT_BYTES - begin.offset_in(SEGMENT_BYTES);
        let length = in_segment.min(until.bytes_since(begin)).min(max as u64) as usize;
        loop {
            let forgotten = self.forgotten.get();
            let result = self.read_from(start, begin.offset_in(SEGMENT_BYTES), length, sealed).await;
            if forgotten == self.forgotten.get() {
                return result;
            }
            // It may have been this segment. A file that was taken out of the list, or opened, meanwhile is not trusted.
            self.readers.borrow_mut().retain(|open| open.start != start);
        }
    }

    async fn read_from(
        &self,
        start: Lsn,
        offset: u64,
        length: usize,
        sealed: bool,
    ) -> Result<AlignedBuffer, ReadError> {
        let io = |source| ReadError::Io { start, source };
        let open = {
            let mut readers = self.readers.borrow_mut();
            let position = readers.iter().position(|open| open.start == start);
            position.map(|index| readers.remove(index))
        };
        let mut open = match open {
            Some(open) => open,
            None => {
                let options = OpenOptions { direct: self.direct, ..OpenOptions::default() };
                let file = File::open(self.segment_path(start), options).await.map_err(io)?;
                OpenSegment { start, file, verified: false }
            }
        };
        if sealed && !open.verified {
            self.verify(&open).await?;
            open.verified = true;
        }
        let result = open.file.read_range(offset, length).await.map_err(io);
        let mut readers = self.readers.borrow_mut();
        // Another reader may have opened it, too.
        if readers.iter().all(|other| other.start != start) {
            if readers.len() >= READERS_MAX {
                readers.remove(0);
            }
            readers.push(open);
        }
        result
    }

    async fn verify(&self, open: &OpenSegment) -> Result<(), ReadError> {
        let start = open.start;
        let io = |source| ReadError::Io { start, source };
        let damaged = |source| ReadError::Damaged { start, source };
        let trailer = open.file.read_range(SEGMENT_BYTES, TRAILER_BYTES as usize).await.map_err(io)?;
        let mut verifier = SegmentVerifier::new(&trailer, self.log, start).map_err(damaged)?;
        for offset in (0..SEGMENT_BYTES).step_by(VERIFY_BYTES) {
            verifier.feed(&open.file.read_range(offset, VERIFY_BYTES).await.map_err(io)?);
        }
        verifier.finish().map(|_| ()).map_err(damaged)
    }
}

/// Reads segments while the log recovers. Blocks.
pub struct RecoveryReader<'a> {
    files: &'a LogFiles,
    open: Option<(Lsn, std::fs::File)>,
}

impl<'a> RecoveryReader<'a> {
    /// Of the segments of `files`.
    pub fn new(files: &'a LogFiles) -> Self {
        Self { files, open: None }
    }

    fn list(&self) -> io::Result<Vec<Lsn>> {
        let mut starts = Vec::new();
        for entry in std::fs::read_dir(self.files.directory.join("wal"))? {
            let entry = entry?;
            match entry.file_name().to_str().and_then(parse_segment_file_name) {
                Some(start) if entry.metadata()?.len() == SEGMENT_FILE_BYTES => starts.push(start),
                _ => return Err(io::Error::other(format!("{}: not a segment", entry.path().display()))),
            }
        }
        Ok(starts)
    }

    fn read_at(&mut self, start: Lsn, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let file = match &self.open {
            Some((open, file)) if *open == start => file,
            _ => {
                let file = std::fs::File::open(self.files.segment_path(start))?;
                forget_cached(&file)?;
                &self.open.insert((start, file)).1
            }
        };
        file.read_exact_at(buffer, offset)
    }
}

/// Makes the kernel read the file anew, except for what it still has to write.
///
/// A page whose write-back failed stays in the page cache, clean. Once an earlier run was told of the failure, no sync
/// reports it again: what is read from the cache would count as durable although the disk does not have it.
fn forget_cached(file: &std::fs::File) -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is open.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

impl SegmentReader for RecoveryReader<'_> {
    fn starts(&mut self) -> Result<Vec<Lsn>, ReadFailed> {
        self.list().map_err(|error| {
            tracing::error!(log = %self.files.log, %error, "cannot list the segments");
            ReadFailed
        })
    }

    fn read(&mut self, start: Lsn, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailed> {
        self.read_at(start, offset, buffer).map_err(|error| {
            tracing::error!(log = %self.files.log, segment = segment_file_name(start), %error, "cannot read a segment");
            ReadFailed
        })
    }
}
