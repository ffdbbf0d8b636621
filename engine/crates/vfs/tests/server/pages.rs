//! The agent's side of the block map, with a copy of PGDATA in the place of the page service.
//!
//! What it evicts it keeps, and it serves the oldest version that a request allows, as a page server that lags would. So
//! its source holds every version that it may be asked for. The library's own eviction
//! (`evict=always`) asks nobody, so with it only blocks that were never written may go: the commit position stays below
//! every horizon but the base's.

use crate::{
    agent::{checked, owned, wake},
    cluster::Cluster,
};
use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    thread::JoinHandle,
};
use vfs_abi::blocks::{
    BLOCK_BYTES, BlockMap, ClockHand, Counters, ENV_BLOCKS, ENV_BLOCKS_DOORBELL, EVICT_ALWAYS, EvictRun, FileKey,
    FillRequest, Layout, Signals,
};

/// Position of the base backup in these tests: below every position of WAL.
pub const BASE: u64 = 1;

/// How pages are served.
pub struct Options {
    /// Position up to which WAL counts as durable, for eviction.
    pub commit_lsn: u64,
    /// The library evicts after each access.
    pub evict_always: bool,
    /// The agent evicts down to so many blocks.
    pub present_max: u64,
    /// Blocks that are brought unasked after each one asked for.
    pub read_ahead: u32,
    /// A mistake (finding A1): what a page must hold is told by the LSN in it, not by the horizon.
    pub trusts_page_lsn: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { commit_lsn: BASE, evict_always: false, present_max: u64::MAX, read_ahead: 0, trusts_page_lsn: false }
    }
}

/// What the test may change while it runs.
#[derive(Default)]
struct Control {
    empties: AtomicBool,
    holds: AtomicBool,
    fails: AtomicBool,
    stops: AtomicBool,
}

/// Shared futexes.
pub struct Futexes;

impl Signals for Futexes {
    fn wait(&self, _: &AtomicU32, _: u32) {
        std::thread::yield_now();
    }

    fn wake_all(&self, word: &AtomicU32) {
        wake(word);
    }
}

pub struct Pages {
    pub map: BlockMap<'static>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
    _memory: OwnedFd,
    _doorbell: Arc<OwnedFd>,
}

/// A mapped region, never unmapped.
pub fn region(layout: Layout) -> (OwnedFd, BlockMap<'static>) {
    // SAFETY: plain system calls; the mapping has the length of the file, is page-aligned and stays; the slices lie in it
    // side by side; every bit pattern of an atomic is valid.
    unsafe {
        let memory = owned(libc::memfd_create(c"vfs-blocks".as_ptr(), libc::MFD_CLOEXEC));
        let bytes = layout.region_bytes();
        checked(libc::ftruncate(memory.as_raw_fd(), bytes as i64));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let address =
            libc::mmap(std::ptr::null_mut(), bytes as usize, protection, libc::MAP_SHARED, memory.as_raw_fd(), 0);
        assert_ne!(libc::MAP_FAILED, address);
        let wide = address.cast::<AtomicU64>();
        let narrow = wide.add(layout.wide_words()).cast::<AtomicU32>();
        let wide = std::slice::from_raw_parts(wide, layout.wide_words());
        let narrow = std::slice::from_raw_parts(narrow, layout.narrow_words());
        (memory, BlockMap::from_raw(layout, wide, narrow))
    }
}

impl Pages {
    /// Turns the relation files of a stopped cluster into holes and serves their pages from a copy.
    pub fn attach(cluster: &mut Cluster, options: Options) -> Pages {
        let layout = Layout::new(10_000, 5_000).unwrap();
        let (memory, map) = region(layout);
        map.initialise(BASE, options.commit_lsn);
        if options.evict_always {
            map.set_evict_mode(EVICT_ALWAYS);
        }
        // SAFETY: no pointers.
        let doorbell = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) });
        let source = cluster.directory.0.join("source");
        crate::cluster::run(crate::cluster::command("cp").arg("-a").arg(cluster.pgdata()).arg(&source));
        let files = relation_files(&cluster.pgdata());
        assert!(files.len() > 200, "an initialised cluster has hundreds of relation files");
        let unlogged: Vec<FileKey> = files.iter().map(|(key, _)| *key).filter(|key| key.fork == INIT).collect();
        for (key, path) in &files {
            empty(&map, &cluster.pgdata(), *key, path, &unlogged);
        }
        for (name, fd) in [(ENV_BLOCKS, memory.as_raw_fd()), (ENV_BLOCKS_DOORBELL, doorbell.as_raw_fd())] {
            cluster.inherited.push(fd);
            cluster.environment.push((name.into(), OsString::from(fd.to_string())));
        }
        let control = Arc::new(Control::default());
        let doorbell = Arc::new(doorbell);
        let server = Server {
            map,
            pgdata: cluster.pgdata(),
            source,
            kept: HashMap::new(),
            control: control.clone(),
            doorbell: doorbell.clone(),
            present_max: options.present_max,
            read_ahead: options.read_ahead,
            trusts_page_lsn: options.trusts_page_lsn,
            hand: ClockHand::default(),
        };
        let thread = std::thread::spawn(move || server.run());
        Pages { map, control, thread: Some(thread), _memory: memory, _doorbell: doorbell }
    }

    /// Whether requests are left lying. On is a page service that is away.
    pub fn hold(&self, held: bool) {
        self.control.holds.store(held, SeqCst);
    }

    /// Whether every fill fails.
    pub fn fail(&self, fails: bool) {
        self.control.fails.store(fails, SeqCst);
    }

    /// Evicts whatever may be evicted, while `condition` does not hold.
    pub fn empty(&self, condition: impl FnMut() -> bool) {
        self.control.empties.store(true, SeqCst);
        assert!(crate::within(crate::PATIENCE, condition));
        self.control.empties.store(false, SeqCst);
    }

    pub fn counters(&self) -> Counters {
        self.map.counters()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.control.stops.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking());
        }
    }
}

const INIT: u32 = 3;

/// Path of a file in PGDATA.
pub fn path_of(key: &FileKey) -> PathBuf {
    let fork = ["", "_fsm", "_vm", "_init"][key.fork as usize];
    let segment = if key.segment == 0 { String::new() } else { format!(".{}", key.segment) };
    let name = format!("{}{fork}{segment}", key.relation);
    if key.tablespace == 1664 { Path::new("global").join(name) } else { format!("base/{}/{name}", key.database).into() }
}

/// Every tracked relation file of a data directory.
fn relation_files(pgdata: &Path) -> Vec<(FileKey, PathBuf)> {
    let mut directories = vec![(1664, 0, pgdata.join("global"))];
    for entry in fs::read_dir(pgdata.join("base")).unwrap() {
        let path = entry.unwrap().path();
        let Ok(database) = path.file_name().unwrap().to_str().unwrap().parse() else { continue };
        directories.push((1663, database, path));
    }
    let mut files = vec![];
    for (tablespace, database, directory) in directories {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let (name, segment) = name.split_once('.').unwrap_or((name, "0"));
            let (number, fork) = name.split_once('_').unwrap_or((name, "main"));
            let fork = ["main", "fsm", "vm", "init"].iter().position(|known| *known == fork);
            let (Ok(relation), Ok(segment), Some(fork)) = (number.parse(), segment.parse(), fork) else { continue };
            if fork != 1 {
                files.push((FileKey { tablespace, database, relation, fork: fork as u32, segment }, path));
            }
        }
    }
    files
}

/// What a base backup makes of one file: a hole of its length; of an unlogged relation a copy of its init fork.
fn empty(map: &BlockMap, pgdata: &Path, key: FileKey, path: &Path, unlogged: &[FileKey]) {
    let init = FileKey { fork: INIT, segment: 0, ..key };
    let file = File::options().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    if key.fork != INIT && unlogged.contains(&init) {
        file.set_len(0).unwrap();
        if key.fork == 0 {
            // Read from the copy, since the fork itself may be a hole by now.
            let source = pgdata.with_file_name("source").join(path_of(&init));
            file.write_all_at(&fs::read(source).unwrap(), 0).unwrap();
        } else {
            fs::remove_file(path).unwrap();
            return;
        }
        map.add_file(key, 0, true, &Futexes).unwrap();
        return;
    }
    file.set_len(0).unwrap();
    file.set_len(length).unwrap();
    map.add_file(key, (length / BLOCK_BYTES) as u32, false, &Futexes).unwrap();
}

/// A page as it was when it was evicted, with the position that tells how young it is.
struct Version {
    position: u64,
    page: Vec<u8>,
}

/// Versions of a block that are kept.
const VERSIONS_MAX: usize = 4;

fn page_lsn(page: &[u8]) -> u64 {
    let word = |at: usize| u64::from(u32::from_ne_bytes(page[at..at + 4].try_into().unwrap()));
    word(0) << 32 | word(4)
}

/// The thread that answers.
struct Server {
    map: BlockMap<'static>,
    pgdata: PathBuf,
    source: PathBuf,
    kept: HashMap<(FileKey, u32), Vec<Version>>,
    control: Arc<Control>,
    doorbell: Arc<OwnedFd>,
    present_max: u64,
    read_ahead: u32,
    trusts_page_lsn: bool,
    hand: ClockHand,
}

impl Server {
    fn run(mut self) {
        let mut bell = File::from(self.doorbell.try_clone().unwrap());
        let mut waiting: Vec<FillRequest> = vec![];
        while !self.control.stops.load(SeqCst) {
            while let Some(request) = self.map.poll_request(&Futexes) {
                waiting.push(request);
                waiting.extend((1..=self.read_ahead).map_while(|n| self.map.read_ahead(&request, n, &Futexes)));
            }
            if !self.control.holds.load(SeqCst) {
                // Answers come in another order than requests.
                for request in std::mem::take(&mut waiting).into_iter().rev() {
                    self.answer(&request);
                }
            }
            self.evict();
            if self.map.prepare_sleep() {
                let mut entry = libc::pollfd { fd: self.doorbell.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // The upper bound is for the controls, which ring no bell.
                // SAFETY: one valid entry.
                if unsafe { libc::poll(&raw mut entry, 1, 20) } > 0 {
                    bell.read_exact(&mut [0; 8]).unwrap();
                }
            }
        }
    }

    fn answer(&mut self, request: &FillRequest) {
        if self.control.fails.load(SeqCst) {
            self.map.fail_fill(request, &Futexes);
            return;
        }
        let page = self.page(request);
        if self.map.begin_fill_write(request) {
            let file = File::options().write(true).open(self.pgdata.join(path_of(&request.key))).unwrap();
            file.write_all_at(&page, u64::from(request.block) * BLOCK_BYTES).unwrap();
            self.map.finish_fill(request, &Futexes);
        }
    }

    fn page(&self, request: &FillRequest) -> Vec<u8> {
        let (key, block) = (&request.key, request.block);
        if let Some(versions) = self.kept.get(&(*key, block)) {
            let newest = versions.last().unwrap();
            let wanted = if self.trusts_page_lsn { newest.position } else { request.horizon };
            // What was evicted may lack changes that were in a buffer then, below a position that a neighbour raised: a later
            // version with a change at or below what is wanted is the one that a page server has there.
            let is_outdated = |at: usize| {
                !self.trusts_page_lsn && versions[at + 1..].iter().any(|later| page_lsn(&later.page) <= wanted)
            };
            let allowed = |at: &usize| versions[*at].position >= wanted && !is_outdated(*at);
            // Neighbours raise the horizon, too: then the newest is all that there is.
            return (0..versions.len()).find(allowed).map_or(newest, |at| &versions[at]).page.clone();
        }
        let mut page = vec![0; BLOCK_BYTES as usize];
        let file = File::open(self.source.join(path_of(key)));
        let read = file.and_then(|file| file.read_exact_at(&mut page, u64::from(block) * BLOCK_BYTES));
        // A request may be late: its file is gone, and the page is dropped. Marked, so that a test would see it.
        if read.is_err() {
            page.fill(0xEE);
        }
        page
    }

    fn evict(&mut self) {
        let limit = if self.control.empties.load(SeqCst) { 0 } else { self.present_max };
        while self.map.present_blocks() > limit {
            let Some(mut candidate) = self.map.next_candidate(&mut self.hand, true) else { return };
            while let Some(run) = self.map.begin_evict(&mut candidate, &Futexes) {
                let punched = self.punch(&run);
                self.map.finish_evict(&run, punched, &Futexes);
            }
        }
    }

    fn punch(&mut self, run: &EvictRun) -> bool {
        let path = self.pgdata.join(path_of(&run.key));
        let file = File::options().read(true).write(true).open(path).unwrap();
        for block in run.first_block..run.first_block + run.blocks {
            let mut page = vec![0; BLOCK_BYTES as usize];
            file.read_exact_at(&mut page, u64::from(block) * BLOCK_BYTES).unwrap();
            let horizon = self.map.horizon_of(run.file, block);
            let position = if self.trusts_page_lsn { page_lsn(&page) } else { horizon };
            let versions = self.kept.entry((run.key, block)).or_default();
            versions.push(Version { position, page });
            if versions.len() > VERSIONS_MAX {
                versions.remove(0);
            }
        }
        let (offset, length) = (u64::from(run.first_block) * BLOCK_BYTES, u64::from(run.blocks) * BLOCK_BYTES);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: integer arguments.
        checked(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) });
        true
    }
}
