//! Pre-zeroed segments, ready for any log of the process, and the headroom of the disk.
//!
//! A keeper task fills files with zeros in the background and looks at the free space; cores take files by renaming
//! them. Writes into a segment then change no metadata, so that a flush costs one disk write.

use std::{
    collections::VecDeque,
    ffi::CString,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use admin::Notices;
use driver::{EventFd, File, OpenOptions, oneshot};
use logstore::{SEGMENT_FILE_BYTES, parse_segment_file_name, segment_file_name};
use pgtypes::{Instant, Lsn};

use crate::metrics::Metrics;

/// How often the free space is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// With fewer spares than this the next one is filled at once, else after a pause: filling competes with appends for the
/// disk, and many spares are there to postpone it.
const URGENT_BELOW: usize = 2;

/// 64 MiB/s of zeros while enough spares are ready.
const FILL_PAUSE: Duration = Duration::from_millis(250);

/// Why no segment can be had.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// Another segment would take the headroom. Try again when space was announced.
    #[error("the disk keeps its headroom")]
    DiskFull,
    /// The file system failed.
    #[error("take a spare segment: {0}")]
    Io(#[from] io::Error),
}

/// The spare segments of the process.
pub struct Spares {
    directory: PathBuf,
    direct: bool,
    target: usize,
    headroom: u64,
    state: Mutex<State>,
    /// Rung when a spare is wanted.
    wanted: EventFd,
    full: AtomicBool,
    metrics: Metrics,
}

#[derive(Default)]
struct State {
    ready: Vec<Spare>,
    /// Cores that wait for a segment; one entry for each log at most.
    waiting: VecDeque<oneshot::Sender<Result<Spare, TakeError>>>,
    /// Number in the name of the next file.
    next: u64,
}

/// A file that can become a segment.
#[derive(Debug)]
struct Spare {
    path: PathBuf,
    /// `None`: all zeros. Else the start of the segment that it was: its pages carry their addresses, so they are garbage
    /// under any other start, and could pass for WAL under the same one.
    was: Option<Lsn>,
}

impl Spare {
    /// `spare-NUMBER` or `spare-NUMBER-START`, of the right size.
    fn parse(entry: &std::fs::DirEntry) -> io::Result<Option<(u64, Spare)>> {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix("spare-")) else { return Ok(None) };
        let (number, was) = match rest.split_once('-') {
            None => (rest, Some(None)),
            Some((number, start)) => (number, parse_segment_file_name(start).map(Some)),
        };
        match (number.parse(), was) {
            (Ok(number), Some(was)) if entry.metadata()?.len() == SEGMENT_FILE_BYTES => {
                Ok(Some((number, Spare { path: entry.path(), was })))
            }
            _ => Ok(None),
        }
    }
}

impl Spares {
    /// Takes stock of `directory`; unfinished files are removed. Blocks: used at start.
    ///
    /// # Errors
    /// The directory cannot be read or cleaned.
    pub fn open(
        directory: PathBuf,
        direct: bool,
        target: usize,
        headroom: u64,
        metrics: Metrics,
    ) -> io::Result<Arc<Self>> {
        let mut state = State::default();
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            match Spare::parse(&entry)? {
                Some((number, spare)) => {
                    state.next = state.next.max(number + 1);
                    state.ready.push(spare);
                }
                None => std::fs::remove_file(entry.path())?,
            }
        }
        metrics.spare_segments.set(state.ready.len() as i64);
        Ok(Arc::new(Self {
            directory,
            direct,
            target,
            headroom,
            state: Mutex::new(state),
            wanted: EventFd::new()?,
            full: AtomicBool::new(false),
            metrics,
        }))
    }

    /// Whether new segments are refused.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    /// Moves a spare segment to `destination`, durably, to become the segment at `start`.
    ///
    /// # Errors
    /// [`TakeError`]; there is no file at `destination` then, or an unused one.
    pub async fn take(&self, destination: &Path, start: Lsn) -> Result<(), TakeError> {
        let next = {
            let mut state = self.lock();
            let fitting = state.ready.iter().rposition(|spare| spare.was != Some(start));
            match fitting.map(|index| state.ready.swap_remove(index)) {
                Some(spare) => Ok(spare),
                None if self.is_full() => return Err(TakeError::DiskFull),
                None => {
                    let (sender, receiver) = oneshot::channel();
                    state.waiting.push_back(sender);
                    Err(receiver)
                }
            }
        };
        self.wanted.ring();
        let Spare { path, .. } = match next {
            Ok(spare) => spare,
            // The keeper ends with the process only.
            Err(receiver) => receiver.await.unwrap_or_else(|_| Err(io::Error::other("stopping").into()))?,
        };
        self.metrics.spare_segments.set(self.lock().ready.len() as i64);
        let destination = destination.to_owned();
        let source_directory = self.directory.clone();
        let moved = driver::unblock(move || {
            std::fs::rename(&path, &destination)?;
            sync(destination.parent().unwrap_or(Path::new("/")))?;
            // Else a crash could leave the file under both names, and two logs would write into it.
            sync(&source_directory)
        });
        Ok(moved.await?)
    }

    /// Takes the segment at `path`, which starts at `start`, out of use: as a spare when one is wanted and it was written to
    /// its end (`complete`), else it is removed. Durable on return.
    ///
    /// # Errors
    /// The file system failed; the segment may still be there.
    pub async fn give(&self, path: PathBuf, start: Lsn, complete: bool) -> io::Result<()> {
        let spare = {
            let mut state = self.lock();
            (complete && state.ready.len() < self.target).then(|| {
                state.next += 1;
                let name = format!("spare-{}-{}", state.next - 1, segment_file_name(start));
                Spare { path: self.directory.join(name), was: Some(start) }
            })
        };
        let to = spare.as_ref().map(|spare| spare.path.clone());
        driver::unblock(move || {
            match to {
                Some(to) => {
                    std::fs::rename(&path, &to)?;
                    sync(to.parent().unwrap_or(Path::new("/")))?;
                }
                None => std::fs::remove_file(&path)?,
            }
            sync(path.parent().unwrap_or(Path::new("/")))
        })
        .await?;
        if let Some(spare) = spare {
            self.add(spare);
        }
        self.wanted.ring();
        Ok(())
    }

    /// Keeps spares ready until the process ends. One task of the process runs it.
    ///
    /// # Errors
    /// The driver refuses the event counter.
    pub async fn keep(self: Arc<Self>, notices: Arc<Notices>) -> io::Result<()> {
        const FULL: &str = "disk full";
        const FAILED: &str = "spare segment";
        let waiter = self.wanted.waiter()?;
        let mut filled_once = false;
        // The file system had no room for a segment although it counts enough free bytes (a quota, or a device that fails
        // while it looks for blocks): only a segment that could be made shows that space has returned.
        let mut refused = false;
        let mut next_fill = Instant::default();
        loop {
            let free = match self.free_bytes().await {
                Ok(free) => free,
                Err(error) => {
                    if notices.is_new(FAILED, driver::now()) {
                        tracing::error!(%error, "cannot ask for the free space of the data disk");
                    }
                    driver::sleep(LOOK_INTERVAL).await;
                    continue;
                }
            };
            self.metrics.disk_free_bytes.set(free);
            let room = free >= self.headroom.saturating_add(SEGMENT_FILE_BYTES);
            if room == self.is_full() && !(room && refused) {
                self.set_full(!room);
                if room {
                    notices.solved(FULL);
                    tracing::info!(free_bytes = free, "space has returned: appends resume");
                }
            }
            if !room && notices.is_new(FULL, driver::now()) {
                tracing::error!(
                    free_bytes = free,
                    headroom_bytes = self.headroom,
                    "data disk is full: appends that need a new segment are refused until space returns"
                );
            }
            let (urgent, missing) = {
                let state = self.lock();
                // Whoever waits found none that fits: those that are ready do not count for them.
                let urgent = !state.waiting.is_empty() || state.ready.len() < self.target.min(URGENT_BELOW);
                (urgent, state.ready.len() < self.target)
            };
            filled_once |= !missing;
            let pause = next_fill.since(driver::now());
            if room && (urgent || missing && pause.is_zero()) {
                match self.create().await {
                    Ok(path) => {
                        refused = false;
                        notices.solved(FAILED);
                        self.add(Spare { path, was: None });
                        if filled_once {
                            next_fill = driver::now().after(FILL_PAUSE);
                        }
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                        refused = true;
                        self.set_full(true);
                        if notices.is_new(FULL, driver::now()) {
                            tracing::error!(
                                %error,
                                free_bytes = free,
                                "the data disk has no room for a segment: appends that need one are refused until it has"
                            );
                        }
                    }
                    Err(error) => {
                        if notices.is_new(FAILED, driver::now()) {
                            tracing::error!(%error, "cannot create a spare segment");
                        }
                        let waiting = std::mem::take(&mut self.lock().waiting);
                        for sender in waiting {
                            // A receiver that is gone no longer wants it.
                            let _ = sender.send(Err(io::Error::new(error.kind(), error.to_string()).into()));
                        }
                    }
                }
            }
            // Looked at even when nobody takes a spare, so that a disk that is filled up by others is noticed.
            let wait = if missing && !pause.is_zero() { pause.min(LOOK_INTERVAL) } else { LOOK_INTERVAL };
            if let Some(Err(error)) = driver::timeout(wait, waiter.wait()).await {
                return Err(error);
            }
        }
    }

    fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Release);
        self.metrics.disk_full.set(full.into());
        if full {
            let waiting = std::mem::take(&mut self.lock().waiting);
            for sender in waiting {
                // A receiver that is gone no longer wants it.
                let _ = sender.send(Err(TakeError::DiskFull));
            }
        }
    }

    fn add(&self, spare: Spare) {
        let mut state = self.lock();
        let mut unclaimed = Ok(spare);
        while let Ok(spare) = unclaimed {
            // A used one may not fit whoever waits; the keeper makes a new one for them.
            let waiting = if spare.was.is_none() { state.waiting.pop_front() } else { None };
            let Some(sender) = waiting else {
                state.ready.push(spare);
                break;
            };
            unclaimed = match sender.send(Ok(spare)) {
                // A receiver that is gone no longer wants it: the next one gets it.
                Err(returned) => returned,
                Ok(()) => break,
            };
        }
        self.metrics.spare_segments.set(state.ready.len() as i64);
    }

    async fn create(&self) -> io::Result<PathBuf> {
        let number = {
            let mut state = self.lock();
            state.next += 1;
            state.next - 1
        };
        let new = self.directory.join(format!("new-{number}"));
        let spare = self.directory.join(format!("spare-{number}"));
        let result = async {
            let file =
                File::open(&new, OpenOptions { write: true, create_new: true, direct: self.direct, durable: false })
                    .await?;
            driver::fill_with_zeros(&file, SEGMENT_FILE_BYTES).await?;
            let (from, to) = (new.clone(), spare.clone());
            driver::unblock(move || std::fs::rename(from, to)).await
        };
        if let Err(error) = result.await {
            // Gives its space back; a file that stays is removed at the next start.
            let _ = driver::unblock(move || std::fs::remove_file(new)).await;
            return Err(error);
        }
        Ok(spare)
    }

    /// Bytes that this process may still use on the data disk.
    async fn free_bytes(&self) -> io::Result<u64> {
        let path = CString::new(self.directory.as_os_str().as_bytes()).map_err(io::Error::other)?;
        driver::unblock(move || {
            // SAFETY: an all-zero statvfs is valid, the path ends with zero, and the call keeps neither.
            let (result, stat) = unsafe {
                let mut stat: libc::statvfs = std::mem::zeroed();
                (libc::statvfs(path.as_ptr(), &raw mut stat), stat)
            };
            if result == 0 { Ok(stat.f_bavail * stat.f_frsize) } else { Err(io::Error::last_os_error()) }
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one call: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    std::fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::registry::Registry;

    /// Runs `body` with a fresh directory for spares and one for segments.
    fn with_directory<F: Future<Output = ()>>(name: &str, body: impl FnOnce(PathBuf, PathBuf) -> F) {
        let root = std::env::temp_dir().join(format!("spares-{name}-{}", std::process::id()));
        let (spares, wal) = (root.join("spares"), root.join("wal"));
        std::fs::create_dir_all(&spares).unwrap();
        std::fs::create_dir(&wal).unwrap();
        driver::run_core(body(spares, wal)).unwrap();
        std::fs::remove_dir_all(&root).unwrap();
    }

    fn open(directory: &Path, target: usize, headroom: u64) -> Arc<Spares> {
        let metrics = Metrics::register(&mut Registry::default());
        Spares::open(directory.to_owned(), true, target, headroom, metrics).unwrap()
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn spares_are_made_taken_and_given_back() {
        with_directory("cycle", async |directory, wal| {
            std::fs::write(directory.join("new-7"), "cut short").unwrap();
            std::fs::write(directory.join("spare-9"), "too small").unwrap();
            let spares = open(&directory, 1, 0);
            assert_eq!(Vec::<String>::new(), names(&directory));
            driver::spawn(spares.clone().keep(Arc::default()));
            let segment = |number: u64| wal.join(segment_file_name(Lsn(number << 24)));

            spares.take(&segment(1), Lsn(1 << 24)).await.unwrap();
            spares.take(&segment(2), Lsn(2 << 24)).await.unwrap();
            assert!(std::fs::read(segment(1)).unwrap().iter().all(|byte| *byte == 0));
            while names(&directory).iter().filter(|name| name.starts_with("spare-")).count() < 1 {
                driver::sleep(Duration::from_millis(1)).await;
            }

            // One is wanted and ready: what is given is removed.
            spares.give(segment(2), Lsn(2 << 24), true).await.unwrap();
            assert_eq!(vec![segment_file_name(Lsn(1 << 24))], names(&wal));
            assert_eq!(1, names(&directory).len());
        });
    }

    /// Its old pages carry the addresses of that start: under the same one they could pass for WAL of today.
    #[test]
    fn a_used_segment_is_never_given_to_its_old_start() {
        with_directory("reuse", async |directory, wal| {
            let used = directory.join("spare-0-0000000001000000");
            std::fs::File::create(&used).unwrap().set_len(SEGMENT_FILE_BYTES).unwrap();
            let spares = open(&directory, 1, 0);
            let same = {
                let destination = wal.join("a");
                let spares = spares.clone();
                driver::spawn(async move { spares.take(&destination, Lsn(1 << 24)).await })
            };
            driver::sleep(Duration::from_millis(20)).await;
            assert!(used.exists());
            driver::spawn(spares.clone().keep(Arc::default()));
            same.await.unwrap();
            assert!(used.exists());
            spares.take(&wal.join("b"), Lsn(2 << 24)).await.unwrap();
            assert!(!used.exists());
        });
    }

    /// Nobody waits for space: the log is told at once, and what is there is still given.
    #[test]
    fn without_headroom_only_what_is_ready_is_given() {
        with_directory("full", async |directory, wal| {
            std::fs::File::create(directory.join("spare-0")).unwrap().set_len(SEGMENT_FILE_BYTES).unwrap();
            let spares = open(&directory, 2, u64::MAX);
            driver::spawn(spares.clone().keep(Arc::default()));
            while !spares.is_full() {
                driver::sleep(Duration::from_millis(1)).await;
            }
            spares.take(&wal.join("a"), Lsn(1 << 24)).await.unwrap();
            assert!(matches!(spares.take(&wal.join("b"), Lsn(2 << 24)).await, Err(TakeError::DiskFull)));
            assert_eq!(Vec::<String>::new(), names(&directory));
        });
    }
}
