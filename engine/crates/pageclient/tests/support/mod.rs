//! A page server that answers from a formula, over real TCP on the test's own core, and does what a test says instead.
#![allow(dead_code, reason = "each test crate uses its own part")]

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use driver::{Closer, Connection, Event, Listener};
use identity::Tls;
use layers::{HashRange, Key, Metadata, ShardGeneration, ShardId, Striping, stripe_hash};
use pageclient::{BlockRead, ClientConfig, PageClient, ShardAddress};
use pgtypes::{BranchId, ClusterId, Instant, LogId, Lsn, SystemId, Term};
use wal::{Fork, RelFileLocator};
use wire::page::{
    AdvisoryTaken, LeaseGranted, LsnFound, NEWEST, PAGE_BYTES, PageErrorCode, PageFailed, PageFrameReader, PageMessage,
    PageProgress, PageWelcome, Pages, ReaderRole, Sizes, StripeLength, decode, encode_to_vec, metadata_parts,
};

pub const LOG: LogId = LogId { cluster: ClusterId([5; 16]), branch: BranchId([6; 16]) };
pub const SYSTEM: SystemId = SystemId(77);
pub const TABLE: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
/// Short stripes: a read spans many.
pub const STRIPING: Striping = Striping { stripe_blocks: 8 };
/// Where every server of the formula stands, plus 8 for each number of its shard.
pub const INGESTED: Lsn = Lsn(0x1000);

/// Runs a test on a core of its own; fails when it takes longer than a minute.
pub fn run(test: impl Future<Output = ()>) {
    let limit = Duration::from_secs(60);
    driver::run_core(async { driver::timeout(limit, test).await.expect("the test ends within a minute") })
        .expect("a core");
}

pub fn within(limit: Duration) -> Instant {
    driver::now().after(limit)
}

/// Long enough on a busy machine.
pub fn soon() -> Instant {
    within(Duration::from_secs(30))
}

/// What a shard says when nobody interferes.
#[derive(Clone, Copy)]
pub struct Shard {
    pub id: u32,
    pub range: HashRange,
}

pub fn page(relation: RelFileLocator, block: u32, shard: u32) -> Vec<u8> {
    let mut page = vec![block as u8; PAGE_BYTES];
    for (at, number) in [(0, block), (4, relation.relation), (8, shard)] {
        page[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }
    page
}

/// A value that does not fit into a frame.
pub fn long_value() -> Vec<u8> {
    (0..2_500_000u32).map(|i| (i >> 8) as u8).collect()
}

pub fn put(message: &PageMessage<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(&encode_to_vec(message).expect("a message within the limits"));
}

pub fn put_failure(id: u64, code: PageErrorCode, text: &str, out: &mut Vec<u8>) {
    put(&PageMessage::PageFailed(PageFailed { id, code, text: text.to_owned() }), out);
}

impl Shard {
    pub fn lsn(&self) -> Lsn {
        INGESTED.advance(8 * u64::from(self.id))
    }

    pub fn welcome(&self) -> PageWelcome {
        PageWelcome {
            shard: ShardId(self.id),
            generation: ShardGeneration(3),
            range: self.range,
            stripe_blocks: STRIPING.stripe_blocks,
            ingested_lsn: self.lsn(),
            durable_lsn: Lsn(self.lsn().0 - 0x800),
            horizon_lsn: Lsn(0x100 + 8 * u64::from(self.id)),
        }
    }

    pub fn answer(&self, message: &PageMessage<'_>, out: &mut Vec<u8>) {
        let at = |lsn| if lsn == NEWEST { self.lsn() } else { lsn };
        match message {
            PageMessage::PageHello(hello) => {
                assert_eq!((LOG, SYSTEM, ShardId(self.id)), (hello.log, hello.system_id, hello.shard));
                put(&PageMessage::PageWelcome(self.welcome()), out);
            }
            PageMessage::GetPages(get) => {
                let stripe = STRIPING.stripe_of(get.first_block);
                let last = get.first_block + u32::from(get.count) - 1;
                assert_eq!(stripe, STRIPING.stripe_of(last), "{get:?} spans stripes");
                let hash = u64::from(stripe_hash(get.relation.relation, stripe));
                assert!((self.range.begin..self.range.end).contains(&hash), "{get:?} is another shard's");
                let bytes: Vec<u8> =
                    (get.first_block..=last).flat_map(|block| page(get.relation, block, self.id)).collect();
                put(&PageMessage::Pages(Pages::new(get.id, at(get.request_lsn), &bytes)), out);
            }
            PageMessage::GetSizes(get) => {
                let stripes = (0..20).filter(|stripe| {
                    let hash = u64::from(stripe_hash(TABLE.relation, *stripe));
                    (self.range.begin..self.range.end).contains(&hash)
                });
                let length = |stripe| if stripe == 19 { 3 } else { STRIPING.stripe_blocks };
                let entry = |stripe| StripeLength { relation: TABLE, fork: Fork::Main, stripe, length: length(stripe) };
                let mut entries: Vec<_> = stripes.map(entry).collect();
                if self.id == 1 {
                    let empty = RelFileLocator { relation: 20_000, ..TABLE };
                    entries.push(StripeLength { relation: empty, fork: Fork::VisibilityMap, stripe: 0, length: 0 });
                }
                // In two parts, the first of which may be empty.
                let later = entries.split_off(entries.len() / 2);
                for (entries, last) in [(entries, false), (later, true)] {
                    put(&PageMessage::Sizes(Sizes { id: get.id, lsn: at(get.at), entries, last }), out);
                }
            }
            PageMessage::GetMetadata(get) => {
                assert_eq!(0, self.range.begin, "metadata is on the shard that has hash 0");
                let long = long_value();
                let values = [
                    (Key::metadata(Metadata::Checkpoint), &b"checkpoint"[..]),
                    (Key::metadata(Metadata::TwoPhase(700)), &long),
                    (Key::metadata(Metadata::TwoPhase(701)), &b""[..]),
                ];
                for part in metadata_parts(get.id, at(get.at), &values) {
                    put(&PageMessage::MetadataPart(part), out);
                }
            }
            PageMessage::TakeLease(take) => {
                let seconds = take.seconds - self.id;
                put(&PageMessage::LeaseGranted(LeaseGranted { id: take.id, lsn: at(take.lsn), seconds }), out);
            }
            PageMessage::PutAdvisory(file) => {
                let lsn = Lsn(file.contents.len() as u64);
                put(&PageMessage::AdvisoryTaken(AdvisoryTaken { id: file.id, lsn }), out);
            }
            PageMessage::FindLsn(find) => {
                let found = LsnFound { id: find.id, lsn: Lsn(0x900), commit_timestamp: find.timestamp - 1 };
                put(&PageMessage::LsnFound(found), out);
            }
            other => panic!("not a reader's message: {other:?}"),
        }
    }

    pub fn progress(&self, ingested_lsn: Lsn) -> PageMessage<'static> {
        let PageWelcome { durable_lsn, horizon_lsn, .. } = self.welcome();
        PageMessage::PageProgress(PageProgress { ingested_lsn, durable_lsn, horizon_lsn })
    }
}

/// Whether the connection goes on.
#[derive(PartialEq, Eq)]
pub enum After {
    GoOn,
    Close,
}

/// What a server does with a message on a connection of that number, from 1: bytes to send, and whether it goes on.
pub type Handler = dyn Fn(usize, &PageMessage<'_>, &mut Vec<u8>) -> After;

pub struct FakeServer {
    pub shard: Shard,
    pub address: String,
    state: Rc<State>,
}

struct State {
    handler: Box<Handler>,
    tls: Option<Tls>,
    connections: Cell<usize>,
    ended: Cell<usize>,
    changed: Event,
    closers: RefCell<Vec<Closer>>,
}

impl FakeServer {
    /// A server of the formula.
    pub fn start(shard: Shard) -> FakeServer {
        FakeServer::with(shard, move |_, message, out| {
            shard.answer(message, out);
            After::GoOn
        })
    }

    pub fn with(
        shard: Shard,
        handler: impl Fn(usize, &PageMessage<'_>, &mut Vec<u8>) -> After + 'static,
    ) -> FakeServer {
        FakeServer::at("127.0.0.1:0", shard, None, handler)
    }

    pub fn at(
        address: &str,
        shard: Shard,
        tls: Option<Tls>,
        handler: impl Fn(usize, &PageMessage<'_>, &mut Vec<u8>) -> After + 'static,
    ) -> FakeServer {
        let listener = Listener::listen(address).expect("a free port");
        let address = listener.local_address().expect("an address").to_string();
        let handler = Box::new(handler);
        let state = Rc::new(State {
            handler,
            tls,
            connections: Cell::new(0),
            ended: Cell::new(0),
            changed: Event::new(),
            closers: RefCell::default(),
        });
        driver::spawn(accept(listener, state.clone()));
        FakeServer { shard, address, state }
    }

    pub fn connections(&self) -> usize {
        self.state.connections.get()
    }

    /// Waits until so many connections were opened.
    pub async fn opened(&self, count: usize) {
        self.state.changed.until(|| (self.connections() >= count).then_some(())).await;
    }

    /// Waits until so many connections have ended.
    pub async fn ended(&self, count: usize) {
        self.state.changed.until(|| (self.state.ended.get() >= count).then_some(())).await;
    }

    /// Ends all connections, as a crash does.
    pub fn break_connections(&self) {
        self.state.closers.take().iter().for_each(Closer::close);
    }

    pub fn place(&self) -> ShardAddress {
        ShardAddress {
            shard: ShardId(self.shard.id),
            generation: ShardGeneration(0),
            range: self.shard.range,
            address: self.address.clone(),
        }
    }
}

async fn accept(listener: Listener, state: Rc<State>) {
    loop {
        let connection = listener.accept().await.expect("a connection");
        state.connections.set(state.connections.get() + 1);
        state.closers.borrow_mut().push(connection.closer());
        state.changed.set();
        let (number, state) = (state.connections.get(), state.clone());
        driver::spawn(async move {
            serve(connection, number, &state).await;
            state.ended.set(state.ended.get() + 1);
            state.changed.set();
        });
    }
}

async fn serve(mut connection: Connection, number: usize, state: &State) {
    if let Some(tls) = &state.tls {
        // A client that refuses the certificate ends the handshake.
        let Ok(encrypted) = connection.upgrade_server(tls.server_config()).await else { return };
        connection = encrypted;
    }
    let mut frames = PageFrameReader::default();
    loop {
        let mut out = Vec::new();
        while let Some(frame) = frames.next().expect("a client's frame") {
            if (state.handler)(number, &decode(frame).expect("a client's message"), &mut out) == After::Close {
                connection.closer().close();
                return;
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

/// The whole space.
pub fn only_shard() -> Shard {
    Shard { id: 1, range: HashRange::ALL }
}

pub fn shards(count: u32) -> Vec<Shard> {
    (0..count).map(|index| Shard { id: index + 1, range: HashRange::even_part(index, count) }).collect()
}

pub fn config(servers: &[&FakeServer]) -> ClientConfig {
    ClientConfig {
        log: LOG,
        system_id: SYSTEM,
        role: ReaderRole::Writer { term: Term(4) },
        striping: STRIPING,
        shards: servers.iter().map(|server| server.place()).collect(),
        tls: None,
    }
}

pub fn client(servers: &[&FakeServer]) -> PageClient {
    PageClient::new(config(servers)).expect("a sound map")
}

pub fn blocks(first_block: u32, count: u32) -> BlockRead {
    BlockRead {
        relation: TABLE,
        fork: Fork::Main,
        first_block,
        count,
        request_lsn: Lsn(0x800),
        not_modified_since: Lsn(0x400),
    }
}

/// That `bytes` are blocks of the table; returns how many came from each shard.
pub fn check(bytes: &[u8], first_block: u32, count: u32) -> Vec<u32> {
    assert_eq!(count as usize * PAGE_BYTES, bytes.len());
    let number = |page: &[u8], at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
    let mut of_shard = vec![0; 16];
    for (found, block) in bytes.chunks(PAGE_BYTES).zip(first_block..) {
        let shard = number(found, 8);
        assert_eq!(page(TABLE, block, shard), found, "block {block}");
        of_shard[shard as usize] += 1;
    }
    of_shard
}
