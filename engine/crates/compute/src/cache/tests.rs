//! The cache between a block map, as PostgreSQL's half uses it, and a page server that speaks the protocol over TCP.

use std::{
    cell::RefCell,
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use driver::{Connection, Listener};
use layers::{HashRange, ShardGeneration, ShardId, Striping};
use pageclient::{ClientConfig, PageClient, ShardAddress};
use pgtypes::{LogId, Lsn, SystemId, Term};
use vfs_abi::blocks::{FileKey, FileRef, Kind, Layout, Purpose};
use wire::page::{
    GetPages, NEWEST, PageErrorCode, PageFailed, PageFrameReader, PageMessage, PageWelcome, Pages, ReaderRole, decode,
    encode_to_vec,
};

use super::*;
use crate::config::HostPort;

const BASE: u64 = 0x100_0000;
const KEY: FileKey = FileKey { tablespace: 1663, database: 5, relation: 16384, fork: 0, segment: 0 };

/// What the page server says to a request.
enum Say {
    Pages,
    Failed(PageErrorCode),
    Nothing,
}

type Answers = Rc<RefCell<dyn FnMut(&GetPages) -> Say>>;

/// A page server; page `n` is full of the low byte of `n`.
#[derive(Clone)]
struct Server {
    asked: Rc<RefCell<Vec<GetPages>>>,
    say: Answers,
}

impl Server {
    fn start(say: impl FnMut(&GetPages) -> Say + 'static) -> (Server, String) {
        let listener = Listener::listen("127.0.0.1:0").expect("listening");
        let address = listener.local_address().expect("bound").to_string();
        let server = Server { asked: Rc::default(), say: Rc::new(RefCell::new(say)) };
        let accepting = server.clone();
        drop(driver::spawn(async move {
            while let Ok(connection) = listener.accept().await {
                drop(driver::spawn(accepting.clone().talk(connection)));
            }
        }));
        (server, address)
    }

    async fn talk(self, mut connection: Connection) {
        let mut frames = PageFrameReader::default();
        loop {
            let mut out = Vec::new();
            while let Some(frame) = frames.next().expect("frames") {
                match decode(frame).expect("a message") {
                    PageMessage::PageHello(hello) => {
                        let lsn = Lsn(BASE);
                        let welcome = PageWelcome {
                            shard: hello.shard,
                            generation: ShardGeneration(1),
                            range: HashRange::ALL,
                            stripe_blocks: Striping::DEFAULT.stripe_blocks,
                            ingested_lsn: lsn,
                            durable_lsn: lsn,
                            horizon_lsn: lsn,
                        };
                        out.extend(encode_to_vec(&PageMessage::PageWelcome(welcome)).expect("encoded"));
                    }
                    PageMessage::GetPages(get) => {
                        self.asked.borrow_mut().push(get);
                        let answer = match self.say.borrow_mut()(&get) {
                            Say::Pages => {
                                let blocks = get.first_block..get.first_block + u32::from(get.count);
                                let bytes: Vec<u8> = blocks.flat_map(|block| [block as u8; 8192]).collect();
                                encode_to_vec(&PageMessage::Pages(Pages::new(get.id, Lsn(BASE), &bytes)))
                            }
                            Say::Failed(code) => {
                                let failed = PageFailed { id: get.id, code, text: "as the test says".into() };
                                encode_to_vec(&PageMessage::PageFailed(failed))
                            }
                            Say::Nothing => continue,
                        };
                        out.extend(answer.expect("encoded"));
                    }
                    message => panic!("unexpected {message:?}"),
                }
            }
            if !out.is_empty() && connection.write_all(out).await.0.is_err() {
                return;
            }
            let (read, buffer) = connection.read(frames.take_buffer(false)).await;
            frames.return_buffer(buffer);
            if !matches!(read, Ok(1..)) {
                return;
            }
        }
    }
}

struct Fixture {
    cache: Rc<Cache>,
    file: FileRef,
    path: PathBuf,
    pgdata: PathBuf,
    stale: Arc<Mutex<Vec<String>>>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.cache.end();
        fs::remove_dir_all(&self.pgdata).expect("removed");
    }
}

impl Fixture {
    /// A sparse file of `blocks` absent blocks.
    fn new(address: &str, blocks: u32, cache_bytes: u64, fill_timeout: Duration) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, SeqCst);
        let pgdata = std::env::temp_dir().join(format!("lakebase-cache-{}-{number}", std::process::id()));
        fs::create_dir_all(pgdata.join("base/5")).expect("created");
        let path = pgdata.join(relation_path(&KEY));
        File::create(&path).expect("created").set_len(u64::from(blocks) * 8192).expect("lengthened");
        let shared = SharedBlocks::create(Layout::new(64, 64).expect("sizes")).expect("memory");
        shared.map().initialise(BASE, BASE);
        let file = shared.map().add_file(KEY, blocks, false, &Futex).expect("room");
        let shard = crate::shard_map::ShardConfig {
            shard: ShardId(0),
            generation: ShardGeneration(0),
            begin: 0,
            end: 1 << 32,
            pages: address.parse::<HostPort>().expect("an address"),
        };
        let client = PageClient::new(ClientConfig {
            log: LogId::default(),
            system_id: SystemId::default(),
            role: ReaderRole::Writer { term: Term(1) },
            striping: Striping::DEFAULT,
            shards: vec![ShardAddress {
                shard: ShardId(0),
                generation: ShardGeneration(0),
                range: HashRange::ALL,
                address: address.to_owned(),
            }],
            tls: None,
        });
        let stale: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = stale.clone();
        let setup = CacheSetup {
            blocks: shared,
            area: SharedArea::create(16 << 20, 1000).expect("memory"),
            pgdata: pgdata.clone(),
            config: PageServiceConfig {
                version: 0,
                stripe_blocks: 2048,
                cache_bytes,
                evict: crate::page_service_config::Evict::AsNeeded,
                fill_timeout,
                shards: vec![shard],
            },
            backpressure: BackpressureConfig::default(),
            view: Arc::default(),
            on_stale_term: Arc::new(move |text| told.lock().expect("no panic").push(text)),
        };
        let cache = Cache::start(Rc::new(client.expect("a map")), setup);
        Fixture { cache, file, path, pgdata, stale }
    }

    /// Asks for blocks as a process of PostgreSQL would.
    fn request(&self, first: u32, end: u32) {
        let map = self.cache.setup.blocks.map();
        let requested = map.request(self.file, first, end, Purpose::Read, &Futex).expect("chunks");
        if requested.ring {
            self.cache.setup.blocks.doorbell().ring();
        }
        assert_eq!(None, requested.ring_full);
    }

    fn kinds(&self, blocks: impl IntoIterator<Item = u32>) -> Vec<Kind> {
        let map = self.cache.setup.blocks.map();
        blocks.into_iter().map(|block| map.kind_of(self.file, block)).collect()
    }

    fn first_byte(&self, block: u32) -> u8 {
        let mut byte = [0];
        File::open(&self.path).expect("opened").read_exact_at(&mut byte, u64::from(block) * 8192).expect("read");
        byte[0]
    }
}

async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        driver::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 10 s: {what}");
}

fn on_core(test: impl Future<Output = ()>) {
    driver::run_core(test).expect("a core");
}

#[test]
fn blocks_that_are_asked_for_together_travel_together() {
    on_core(async {
        let (server, address) = Server::start(|_| Say::Pages);
        let fixture = Fixture::new(&address, 4096, 0, Duration::from_secs(5));
        fixture.request(10, 26);
        fixture.request(100, 101);
        wait_for("all blocks", || fixture.kinds((10..26).chain([100])).iter().all(|kind| *kind == Kind::Present)).await;
        assert_eq!(vec![10, 25, 100], [10, 25, 100].map(|block| fixture.first_byte(block)));
        assert_eq!(vec![Kind::Absent; 2], fixture.kinds([9, 26]));
        let asked: Vec<_> = server.asked.borrow().iter().map(|get| (get.first_block, get.count)).collect();
        assert_eq!(vec![(10, 16), (100, 1)], asked);
        let get = server.asked.borrow()[0];
        assert_eq!((NEWEST, Lsn(BASE)), (get.request_lsn, get.not_modified_since));
    });
}

/// More than one request may hold, more than may be under way, and across stripes.
#[test]
fn every_block_of_a_large_read_arrives() {
    on_core(async {
        let (server, address) = Server::start(|_| Say::Pages);
        let fixture = Fixture::new(&address, 4096, 0, Duration::from_secs(5));
        fixture.request(1, 3001);
        wait_for("all blocks", || fixture.kinds(1..3001).iter().all(|kind| *kind == Kind::Present)).await;
        assert!((1..3001).all(|block| fixture.first_byte(block) == block as u8));
        assert!(server.asked.borrow().iter().all(|get| get.count <= 64));
        assert_eq!(3000, server.asked.borrow().iter().map(|get| u32::from(get.count)).sum::<u32>());
    });
}

#[test]
fn a_lost_page_fails_alone() {
    on_core(async {
        let lost = |get: &GetPages| (get.first_block..get.first_block + u32::from(get.count)).contains(&7);
        let (_server, address) = Server::start(move |get| match lost(get) {
            true => Say::Failed(PageErrorCode::Poisoned),
            false => Say::Pages,
        });
        let fixture = Fixture::new(&address, 4096, 0, Duration::from_secs(5));
        fixture.request(0, 16);
        wait_for("the failure", || fixture.kinds([7]) == [Kind::Failed]).await;
        let others = || fixture.kinds((0..7).chain(8..16)).iter().all(|kind| *kind == Kind::Present);
        wait_for("the others", others).await;
        assert_eq!(1, fixture.cache.setup.blocks.map().counters().failures);
    });
}

/// A backend that waits must get its error in time, and the next read must ask again.
#[test]
fn a_silent_page_service_fails_reads_after_the_timeout_and_serves_later_ones() {
    on_core(async {
        let mut first = true;
        let (_server, address) = Server::start(move |_| match std::mem::replace(&mut first, false) {
            true => Say::Nothing,
            false => Say::Pages,
        });
        let fixture = Fixture::new(&address, 4096, 0, Duration::from_millis(300));
        fixture.request(3, 4);
        wait_for("the failure", || fixture.kinds([3]) == [Kind::Failed]).await;
        fixture.request(3, 4);
        wait_for("the block", || fixture.kinds([3]) == [Kind::Present]).await;
        assert_eq!(3, fixture.first_byte(3));
    });
}

/// The reads of a fenced writer's PostgreSQL end with it; an error could reach a client before.
#[test]
fn a_stale_term_is_told_once_and_fails_no_read() {
    on_core(async {
        let (_server, address) = Server::start(|_| Say::Failed(PageErrorCode::StaleTerm));
        let fixture = Fixture::new(&address, 4096, 0, Duration::from_secs(5));
        fixture.request(0, 1);
        fixture.request(9, 10);
        wait_for("the callback", || !fixture.stale.lock().expect("no panic").is_empty()).await;
        driver::sleep(Duration::from_millis(50)).await;
        assert_eq!(1, fixture.stale.lock().expect("no panic").len());
        assert_eq!(vec![Kind::Filling; 2], fixture.kinds([0, 9]));
    });
}

#[test]
fn the_cache_stays_below_its_limit_and_what_left_it_comes_back() {
    on_core(async {
        const LIMIT: u64 = 16 << 20;
        let (_server, address) = Server::start(|_| Say::Pages);
        let fixture = Fixture::new(&address, 8192, LIMIT, Duration::from_secs(5));
        let map = fixture.cache.setup.blocks.map();
        for first in (0..8192).step_by(256) {
            fixture.request(first, first + 256);
            let done = || !fixture.kinds(first..first + 256).contains(&Kind::Filling);
            wait_for("a part of the file", done).await;
        }
        wait_for("room", || map.present_blocks() <= LIMIT / 8192).await;
        let used = fs::metadata(&fixture.path).expect("present").blocks() * 512;
        assert!(used <= LIMIT, "{used} bytes");
        let counters = map.counters();
        assert!(counters.evictions >= 6144, "{counters:?}");
        let evicted = (0..8192).find(|block| fixture.kinds([*block]) == [Kind::Absent]).expect("something left");
        assert_eq!(0, fixture.first_byte(evicted), "its bytes are gone");
        fixture.request(evicted, evicted + 1);
        wait_for("the block", || fixture.kinds([evicted]) == [Kind::Present]).await;
        assert_eq!(evicted as u8, fixture.first_byte(evicted));
    });
}

/// Changes that only this machine has are never given back.
#[test]
fn blocks_whose_changes_are_not_committed_stay() {
    use vfs_abi::blocks::{WriteClaim, WriteOutcome};
    on_core(async {
        let (_server, address) = Server::start(|_| Say::Pages);
        let fixture = Fixture::new(&address, 8192, 16 << 20, Duration::from_secs(5));
        let map = fixture.cache.setup.blocks.map();
        let horizon = BASE + 1000;
        for block in 0..3000 {
            assert_eq!(Ok(WriteClaim::Claimed), map.claim_write(fixture.file, block, block + 1, true, &Futex));
            map.finish_write(fixture.file, block, WriteOutcome::Evictable { horizon }, &Futex);
        }
        driver::sleep(Duration::from_millis(500)).await;
        assert_eq!(3000, map.present_blocks());
        map.set_commit_lsn(horizon);
        wait_for("room", || map.present_blocks() < 2048).await;
        let gone = (0..3000).find(|block| fixture.kinds([*block]) == [Kind::Absent]).expect("something left");
        assert_eq!(horizon, map.horizon_of(fixture.file, gone));
    });
}

/// A transaction writes a block back and then reads its neighbour, which was evicted before: the neighbour's page must not
/// wait for WAL that is flushed only when that transaction ends. PostgreSQL's suite stood still for 10 s at a time by it.
#[test]
fn a_read_never_waits_for_wal_that_is_not_committed() {
    use vfs_abi::blocks::{WriteClaim, WriteOutcome};
    on_core(async {
        let (server, address) = Server::start(|_| Say::Pages);
        let fixture = Fixture::new(&address, 64, 0, Duration::from_secs(5));
        let map = fixture.cache.setup.blocks.map();
        let committed = BASE + 500;
        map.set_commit_lsn(committed);
        assert_eq!(Ok(WriteClaim::Claimed), map.claim_write(fixture.file, 0, 1, true, &Futex));
        map.finish_write(fixture.file, 0, WriteOutcome::Evictable { horizon: BASE + 1000 }, &Futex);
        fixture.request(1, 2);
        wait_for("the block", || fixture.kinds([1]) == [Kind::Present]).await;
        assert_eq!(Lsn(committed), server.asked.borrow()[0].not_modified_since);
    });
}

/// A sequential scan asks for 128 KiB at a time and announces nothing.
#[test]
fn blocks_ahead_of_a_reader_that_goes_on_are_there_when_it_comes() {
    on_core(async {
        let (_server, address) = Server::start(|_| Say::Pages);
        let fixture = Fixture::new(&address, 100, 0, Duration::from_secs(5));
        for first in [0, 16] {
            fixture.request(first, first + 16);
            wait_for("a read", || fixture.kinds(first..first + 16).iter().all(|kind| *kind == Kind::Present)).await;
        }
        wait_for("what comes next", || fixture.kinds(32..48).iter().all(|kind| *kind == Kind::Present)).await;
        assert_eq!(vec![Kind::Absent; 16], fixture.kinds(48..64));
        fixture.request(48, 64);
        wait_for("all of the file", || fixture.kinds(48..96).iter().all(|kind| *kind == Kind::Present)).await;
        assert_eq!(vec![95, 0], [95, 96].map(|block| fixture.first_byte(block)));
    });
}
