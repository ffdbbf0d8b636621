//! Real page server processes over a directory of objects, fed by real safekeepers, and a model of every page that was written.
#![allow(dead_code, reason = "each test crate uses its own part")]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::TcpStream,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use layers::{HashRange, Key, LayerId, LayerIdentity, LayerWriter, Manifest, ShardGeneration, ShardId, Striping};
use pageserver::config::Config;
use pgtypes::{FrameSummary, Lsn, PgTimeline};
use remote_storage::{RemoteStorage, ShardStore, block_on};
use serde_json::Value;
use wal::{Fork, RecordSpec, RelFileLocator, rmgr};
use wire::page::{
    GetPages, NEWEST, PageErrorCode, PageFailed, PageFrameReader, PageHello, PageMessage, ReaderRole, decode,
    encode_to_vec,
};

use crate::harness::{Cluster, PATIENCE, SEGMENT_BYTES, START, SYSTEM, Variant, Writer, eventually, log};

/// Names the configuration file of a child process.
const CONFIG: &str = "PAGESERVER_TEST_CONFIG";
pub const STRIPING: Striping = Striping { stripe_blocks: 64 };
pub const SHARD: ShardId = ShardId(7);
/// Without the metadata, which made-up WAL has none of.
pub const RANGE: HashRange = HashRange { begin: 1, end: 1 << 32 };
pub const RELATION: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 16_384 };
/// A kind of record of resource manager XLOG: the image of a page.
const FPI: u8 = 0xB0;

/// The body of the child processes; without its variable it does nothing.
#[test]
fn child_process_runs_a_page_server() {
    if let Ok(path) = std::env::var(CONFIG) {
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
        if let Err(error) = pageserver::run(Config::load(Path::new(&path)).unwrap()) {
            eprintln!("ended: {error}");
            std::process::exit(3);
        }
    }
}

/// What a page of that version holds behind its header; half of it does not compress.
pub fn contents(block: u32, version: u64) -> Vec<u8> {
    let mut random = (u64::from(block) << 32 | version).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut page = vec![0; 8192];
    // A page header that redo and checksums take: lower, upper, special, size and version.
    page[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
    page[14..16].copy_from_slice(&8192u16.to_le_bytes());
    page[16..18].copy_from_slice(&8192u16.to_le_bytes());
    page[18..20].copy_from_slice(&(8192u16 | 4).to_le_bytes());
    for word in page[24..4096].chunks_exact_mut(8) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        word.copy_from_slice(&random.to_le_bytes());
    }
    page
}

/// The payload of a record that carries `page` as it is.
fn image_payload(block: u32, page: &[u8]) -> Vec<u8> {
    let mut payload = vec![0, 0x10, 0, 0];
    payload.extend_from_slice(&(page.len() as u16).to_le_bytes());
    payload.extend_from_slice(&[0, 0, 0x02]);
    for number in [RELATION.tablespace, RELATION.database, RELATION.relation, block] {
        payload.extend_from_slice(&number.to_le_bytes());
    }
    payload.extend_from_slice(page);
    payload
}

/// Positions and versions of a block, oldest first.
pub type History = BTreeMap<u32, Vec<(Lsn, u64)>>;

pub struct World {
    pub cluster: Cluster,
    pub writer: Writer,
    pub server: PageServer,
    pub objects: PathBuf,
    pub history: History,
    version: u64,
    _root: Root,
}

struct Root(PathBuf);

impl Drop for Root {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

impl World {
    pub fn new(name: &str) -> World {
        World::begin(name, false)
    }

    /// Safekeepers bring sealed segments to the same object storage.
    pub fn with_archive(name: &str) -> World {
        World::begin(name, true)
    }

    fn begin(name: &str, with_archive: bool) -> World {
        let root = std::env::temp_dir().join(format!("pageserver-{name}-{}", std::process::id()));
        std::fs::create_dir(&root).unwrap();
        let root = Root(root);
        let mut cluster = Cluster::new(name, Variant::default());
        let objects = root.0.join("objects");
        genesis(&objects);
        for safekeeper in cluster.safekeepers.iter_mut().filter(|_| with_archive) {
            safekeeper.kill();
            let path = safekeeper.directory.join("safekeeper.toml");
            let mut config = std::fs::File::options().append(true).open(path).unwrap();
            writeln!(config, "[archive]\nobject_storage = \"file://{}\"", objects.display()).unwrap();
            safekeeper.start();
        }
        let writer = Writer::elect(&cluster, 1);
        let safekeepers = cluster.safekeepers.iter().map(|safekeeper| safekeeper.append).collect();
        let server = PageServer::new(&root.0, "a", &objects, safekeepers);
        World { cluster, writer, server, objects, history: History::new(), version: 0, _root: root }
    }

    /// A page server with object storage and a disk of its own, which begins at the beginning, too. The one before has ended.
    pub fn fresh_server(&self, name: &str) -> PageServer {
        let objects = self._root.0.join(format!("objects-{name}"));
        genesis(&objects);
        let mut server = self.server.another(name);
        server.objects = objects;
        server
    }

    /// Writes a record that touches no block of the model; returns its end, which is committed.
    pub fn write_record(&mut self, record: RecordSpec<'_>) -> Lsn {
        self.writer.put(record);
        let end = self.writer.propose();
        self.writer.run(|this| this.committed >= end);
        self.tell_commit(end);
        end
    }

    /// Writes the next version of each block, and waits until that is committed; returns the end.
    pub fn write(&mut self, blocks: impl IntoIterator<Item = u32>) -> Lsn {
        let writer = &mut self.writer;
        let mut end = writer.wal_start.advance(writer.wal.len() as u64);
        for block in blocks {
            self.version += 1;
            let payload = image_payload(block, &contents(block, self.version));
            writer.generator.append(RecordSpec { rmgr: rmgr::XLOG, info: FPI, xid: 0, payload: &payload });
            writer.wal.extend(writer.generator.take_bytes());
            end = writer.wal_start.advance(writer.wal.len() as u64);
            self.history.entry(block).or_default().push((end, self.version));
        }
        writer.proposer.handle_wal(writer.wal_start, end, driver::now());
        writer.run(|this| this.committed >= end);
        self.tell_commit(end);
        end
    }

    /// Runs the proposer until the safekeepers know what is committed: nobody else does while a test waits.
    fn tell_commit(&mut self, end: Lsn) {
        let safekeepers = &self.cluster.safekeepers;
        self.writer.run(|_| safekeepers.iter().filter(|s| s.child.is_some()).all(|s| s.position("commit_lsn") >= end));
    }

    /// Makes everything that was written durable in object storage.
    pub fn freeze(&self) {
        let end = self.end();
        eventually("everything to be ingested", || self.server.position("ingested_lsn") >= end);
        // With object storage that fails half of the time it may take longer than a caller waits.
        let (status, answer) = self.server.try_call("POST", "/v1/freeze").unwrap();
        assert!([200, 504].contains(&status), "{status} {answer}");
        eventually("everything to be durable", || self.server.position("durable_lsn") >= end);
    }

    pub fn end(&self) -> Lsn {
        self.writer.wal_start.advance(self.writer.wal.len() as u64)
    }

    /// Compares every block with the model as of `lsn`.
    pub fn check(&self, lsn: Lsn) {
        let mut reader = self.server.reader(ReaderRole::Tool);
        for (block, history) in &self.history {
            let version = history.iter().rev().find(|(at, _)| *at <= lsn).map(|(_, version)| *version);
            let answer = reader.page(*block, lsn, lsn);
            match (version, answer) {
                (Some(version), Ok(page)) => check_page(*block, version, &page),
                // Before it was first written the fork was shorter, or the block empty.
                (None, Err(PageFailed { code: PageErrorCode::NoSuchBlock, .. })) => {}
                (None, Ok(page)) => assert!(page.iter().all(|byte| *byte == 0), "block {block} at {lsn}"),
                (version, answer) => panic!("block {block} at {lsn}: version {version:?}: {answer:?}"),
            }
        }
    }

    /// Compares with the model as of `count` positions from `from` on.
    pub fn check_history(&self, from: Lsn, count: usize) {
        let mut positions: Vec<Lsn> =
            self.history.values().flatten().map(|(lsn, _)| *lsn).filter(|lsn| *lsn >= from).collect();
        positions.sort();
        let step = (positions.len() / count).max(1);
        for lsn in positions.into_iter().step_by(step).chain([self.end()]) {
            self.check(lsn);
        }
    }
}

pub fn check_page(block: u32, version: u64, page: &[u8]) {
    let expected = contents(block, version);
    assert!(expected[10..] == page[10..], "block {block} is not of version {version}");
    let page = page.try_into().unwrap();
    assert!(pgformat::is_page_sound(page, block), "checksum of block {block}");
}

/// What an import leaves: an empty image of everything at the beginning of the log, and a manifest.
fn genesis(objects: &Path) {
    std::fs::create_dir(objects).unwrap();
    let storage = RemoteStorage::open(&format!("file://{}", objects.display())).unwrap();
    let owner = block_on(ShardStore::new(storage, log(), SHARD).claim(ShardGeneration(0))).unwrap();
    let id = LayerId { shard: SHARD, generation: ShardGeneration(0), number: 1 };
    let identity = LayerIdentity { log: log(), id, stripe_blocks: STRIPING.stripe_blocks };
    let keys = RANGE.keys();
    let finished = LayerWriter::image(identity, keys.begin, START).finish(Key::MAX).unwrap();
    let path = objects.with_extension("layer");
    std::fs::write(&path, &finished.output).unwrap();
    block_on(owner.put_layer(id, &path)).unwrap();
    let through = FrameSummary { record_end: START, timeline: PgTimeline(1), max_full_xid: 3, ..Default::default() };
    let manifest = Manifest {
        log: log(),
        shard: SHARD,
        generation: ShardGeneration(0),
        sequence: 1,
        range: RANGE,
        stripe_blocks: STRIPING.stripe_blocks,
        system_id: SYSTEM,
        segment_bytes: SEGMENT_BYTES as u32,
        checksums: true,
        horizon: START,
        through,
        next_layer: 2,
        layers: vec![finished.file.description],
    };
    block_on(owner.put_manifest(&manifest)).unwrap();
}

pub struct PageServer {
    pub directory: PathBuf,
    pub generation: u64,
    pub settings: BTreeMap<&'static str, String>,
    pub environment: BTreeMap<&'static str, String>,
    pub cache_bytes: String,
    pub history_bytes: String,
    pub block_cache_bytes: String,
    pub index_cache_bytes: String,
    pub objects: PathBuf,
    safekeepers: Vec<u16>,
    pages: u16,
    admin: u16,
    metrics: u16,
    child: Option<Child>,
}

impl PageServer {
    pub fn new(root: &Path, name: &str, objects: &Path, safekeepers: Vec<u16>) -> PageServer {
        let directory = root.join(name);
        std::fs::create_dir(&directory).unwrap();
        let [pages, admin, metrics] = [(); 3].map(|()| crate::harness::free_port());
        let settings = BTreeMap::from([
            ("freeze_bytes", "\"256KiB\"".to_owned()),
            ("freeze_interval", "\"3600s\"".to_owned()),
            ("layer_bytes_target", "\"256KiB\"".to_owned()),
        ]);
        PageServer {
            directory,
            generation: 1,
            settings,
            environment: BTreeMap::new(),
            cache_bytes: "1GiB".to_owned(),
            history_bytes: "1GiB".to_owned(),
            block_cache_bytes: "64MiB".to_owned(),
            index_cache_bytes: "1GiB".to_owned(),
            objects: objects.to_owned(),
            safekeepers,
            pages,
            admin,
            metrics,
            child: None,
        }
    }

    /// Another owner of the same shard, with a disk of its own.
    pub fn another(&self, name: &str) -> PageServer {
        let root = self.directory.parent().unwrap();
        let mut other = PageServer::new(root, name, &self.objects, self.safekeepers.clone());
        other.generation = self.generation + 1;
        other
    }

    pub fn spawn(&mut self) {
        let settings: Vec<_> = self.settings.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        let safekeepers: Vec<_> =
            self.safekeepers.iter().map(|port| format!("[[safekeepers]]\nappend = \"127.0.0.1:{port}\"\n")).collect();
        let config = format!(
            "cluster = \"{}\"\nbranch = \"{}\"\nshard = {}\ngeneration = {}\nbegin = {}\nend = {}\ndata_dir = \"data\"\ncache_bytes = \"{}\"\n\
             block_cache_bytes = \"{}\"\nindex_cache_bytes = \"{}\"\n\
             object_storage = \"file://{}\"\n{}[listen]\npages = \"127.0.0.1:{}\"\nadmin = \"127.0.0.1:{}\"\n\
             metrics = \"127.0.0.1:{}\"\n[tls]\nmode = \"off\"\ni_know_this_is_insecure = true\n\
             [retention]\nhistory_bytes = \"{}\"\nlease_period = \"5s\"\n[ingest]\n{}",
            log().cluster,
            log().branch,
            SHARD.0,
            self.generation,
            RANGE.begin,
            RANGE.end,
            self.cache_bytes,
            self.block_cache_bytes,
            self.index_cache_bytes,
            self.objects.display(),
            safekeepers.concat(),
            self.pages,
            self.admin,
            self.metrics,
            self.history_bytes,
            settings.concat(),
        );
        let path = self.directory.join("pageserver.toml");
        std::fs::write(&path, config).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "world::child_process_runs_a_page_server", "--nocapture"])
            .env(CONFIG, path)
            .envs(&self.environment)
            .stdout(Stdio::null())
            .stderr(std::fs::File::options().create(true).append(true).open(self.directory.join("log")).unwrap())
            .spawn();
        self.child = Some(child.unwrap());
    }

    pub fn start(&mut self) {
        self.spawn();
        eventually("the admin port of the page server to answer", || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert_eq!(None, ended, "{}", self.log_text());
            self.try_call("GET", "/v1/status").is_some()
        });
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Waits until the process ends by itself; returns its status, or the signal.
    pub fn wait_end(&mut self) -> (Option<i32>, Option<i32>) {
        let mut status = None;
        eventually("the page server to end", || {
            status = self.child.as_mut().unwrap().try_wait().unwrap();
            status.is_some()
        });
        self.child = None;
        let status = status.unwrap();
        (status.code(), status.signal())
    }

    /// As a replaced machine: nothing is left of the disk, and the next owner has a generation of its own.
    pub fn lose_disk(&mut self) {
        assert!(self.child.is_none());
        std::fs::remove_dir_all(self.directory.join("data")).unwrap();
        self.generation += 1;
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    pub fn layers(&self) -> PathBuf {
        self.directory.join("data/layers")
    }

    pub fn try_call(&self, method: &str, path: &str) -> Option<(u16, Value)> {
        let (status, body) = self.http(self.admin, method, path)?;
        Some((status, serde_json::from_str(&body).ok()?))
    }

    fn http(&self, port: u16, method: &str, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        Some((status, body.to_owned()))
    }

    pub fn call(&self, method: &str, path: &str) -> Value {
        let (status, answer) = self.try_call(method, path).unwrap();
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    pub fn status(&self) -> Value {
        self.call("GET", "/v1/status")
    }

    pub fn position(&self, key: &str) -> Lsn {
        self.status()[key].as_str().unwrap().parse().unwrap()
    }

    /// The value of a metric without labels.
    pub fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.http(self.metrics, "GET", "/metrics").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("lakebase_pageserver_{name} ")));
        line.unwrap_or_else(|| panic!("no metric {name}")).parse().unwrap()
    }

    /// Objects of the shard of a kind, rising.
    pub fn objects_of(&self, kind: &str) -> Vec<PathBuf> {
        let directory = self.objects.join(format!("{}/shards/{:08x}/{kind}", log(), SHARD.0));
        let mut found: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        found.sort();
        found
    }

    pub fn reader(&self, role: ReaderRole) -> Reader {
        let mut stream = TcpStream::connect(("127.0.0.1", self.pages)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let hello = PageHello { log: log(), system_id: SYSTEM, shard: SHARD, generation: ShardGeneration(0), role };
        stream.write_all(&encode_to_vec(&PageMessage::PageHello(hello)).unwrap()).unwrap();
        Reader { stream, frames: PageFrameReader::default(), next_id: 1 }
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if std::thread::panicking() {
            eprintln!("--- page server {}\n{}", self.directory.display(), self.log_text());
        }
    }
}

pub struct Reader {
    stream: TcpStream,
    frames: PageFrameReader,
    next_id: u64,
}

impl Reader {
    pub fn send(&mut self, message: &PageMessage<'_>) {
        self.stream.write_all(&encode_to_vec(message).unwrap()).unwrap();
    }

    /// The next message that is neither welcome nor progress, given to `take`.
    pub fn next<T>(&mut self, take: impl FnOnce(PageMessage<'_>) -> T) -> T {
        loop {
            while let Some(frame) = self.frames.next().unwrap() {
                match decode(frame).unwrap() {
                    PageMessage::PageWelcome(_) | PageMessage::PageProgress(_) => {}
                    message => return take(message),
                }
            }
            let mut buffer = vec![0; 1 << 16];
            let count = self.stream.read(&mut buffer).unwrap();
            assert!(count > 0, "closed");
            self.frames.feed(&buffer[..count]);
        }
    }

    /// Reads until the server says how far it is.
    pub fn progress(&mut self) {
        loop {
            while let Some(frame) = self.frames.next().unwrap() {
                if let PageMessage::PageProgress(_) = decode(frame).unwrap() {
                    return;
                }
            }
            let mut buffer = vec![0; 1 << 16];
            let count = self.stream.read(&mut buffer).unwrap();
            assert!(count > 0, "closed");
            self.frames.feed(&buffer[..count]);
        }
    }

    pub fn request(&mut self, block: u32, count: u16, lsn: Lsn, since: Lsn) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.send(&PageMessage::GetPages(GetPages {
            id,
            relation: RELATION,
            fork: Fork::Main,
            first_block: block,
            count,
            request_lsn: lsn,
            not_modified_since: since,
        }));
        id
    }

    pub fn answer(&mut self) -> (u64, Result<Vec<u8>, PageFailed>) {
        self.next(|message| match message {
            PageMessage::Pages(pages) => {
                assert!(pages.is_intact());
                (pages.id, Ok(pages.bytes.to_vec()))
            }
            PageMessage::PageFailed(failed) => (failed.id, Err(failed)),
            other => panic!("{other:?}"),
        })
    }

    pub fn page(&mut self, block: u32, lsn: Lsn, since: Lsn) -> Result<Vec<u8>, PageFailed> {
        let id = self.request(block, 1, lsn, since);
        let (answered, answer) = self.answer();
        assert_eq!(id, answered);
        answer
    }

    pub fn newest(&mut self, block: u32, since: Lsn) -> Result<Vec<u8>, PageFailed> {
        self.page(block, NEWEST, since)
    }
}
