//! Real safekeepers feed page servers: what a shard gets, who is refused, what is kept for whom.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use filter::{Batch, Item, WINDOW_BYTES, WalFilter};
use harness::{
    Cluster, Conversation, PATIENCE, SEGMENT_BYTES, START, Safekeeper, Variant, Writer, eventually, hello, log_path,
};
use layers::{HashRange, ShardGeneration, ShardId, Striping};
use pgtypes::{FrameSummary, Lsn, PgTimeline, Term, WriterId};
use serde_json::{Value, json};
use wal::{RecordSpec, Scanner};
use wire::append::{BatchAssembler, ErrorCode, FeedProgress, Message, Purpose, encode_to_vec};

const STRIPING: Striping = Striping { stripe_blocks: 64 };
const SHARDS: u32 = 4;
const BTREE: u8 = 11;

/// The position before the first record.
fn beginning() -> FrameSummary {
    FrameSummary { record_end: START, timeline: PgTimeline(1), max_full_xid: 3, ..FrameSummary::default() }
}

fn range(shard: u32) -> HashRange {
    HashRange::even_part(shard, SHARDS)
}

/// Commits `count` records of two blocks each, on relations and stripes all over the shards.
fn commit_blocks(cluster: &Cluster, writer: &mut Writer, count: u32, bytes: usize) -> Lsn {
    for _ in 0..count {
        let number = writer.wal.len() as u32;
        let data = vec![number as u8; bytes];
        let mut payload = vec![];
        for (id, block) in [(0u8, number % 4096), (1, number % 977)] {
            payload.extend([id, 0x20]);
            payload.extend((bytes as u16).to_le_bytes());
            payload.extend([1663, 5, 16_384 + number % 7, block].iter().flat_map(|word: &u32| word.to_le_bytes()));
        }
        payload.extend([&[255, 3][..], &data, &data, b"abc"].concat());
        writer.put(RecordSpec { rmgr: BTREE, info: 0, xid: 700 + number % 9, payload: &payload });
    }
    let end = writer.propose();
    writer.run(|writer| writer.committed >= end);
    settle(cluster, writer)
}

/// Safekeepers learn from the next message of the writer what is committed.
fn settle(cluster: &Cluster, writer: &mut Writer) -> Lsn {
    let end = writer.committed;
    writer.run(|_| cluster.safekeepers.iter().all(|safekeeper| safekeeper.position("commit_lsn") == end));
    end
}

/// What a shard must get of the writer's WAL between two record ends.
fn expected(writer: &Writer, shard: u32, from: FrameSummary, until: Lsn) -> (Vec<Item>, FrameSummary) {
    let mut filter = WalFilter::new(from, SEGMENT_BYTES, range(shard), STRIPING);
    let offset = |lsn: Lsn| lsn.bytes_since(writer.wal_start) as usize;
    let wal = &writer.wal[offset(from.record_end)..offset(until)];
    let (mut items, mut taken) = (vec![], 0);
    while taken < wal.len() {
        taken += filter.feed(&wal[taken..]).unwrap();
        items.extend(filter.take_batch(until, Term(1)).into_iter().flat_map(|batch| batch.items));
    }
    (items, filter.summary())
}

/// Every record end of the writer's WAL.
fn record_ends(writer: &Writer) -> Vec<FrameSummary> {
    let mut scanner = Scanner::resume(beginning(), SEGMENT_BYTES);
    let mut ends = vec![];
    let mut copy = scanner;
    for slice in writer.wal.chunks(8) {
        copy.feed(slice, |_| ()).unwrap();
        if copy.summary() != scanner.summary() {
            ends.push(copy.summary());
            scanner = copy;
        }
    }
    ends
}

/// A page server, as far as the append protocol knows it.
struct Subscriber {
    conversation: Conversation,
    assembler: BatchAssembler,
    position: Lsn,
}

fn purpose(shard: u32, generation: u64, from: FrameSummary) -> Purpose {
    Purpose::Feed {
        shard: ShardId(shard),
        generation: ShardGeneration(generation),
        range: range(shard),
        stripe_blocks: STRIPING.stripe_blocks,
        from,
    }
}

impl Subscriber {
    fn connect(safekeeper: &Safekeeper, shard: u32, generation: u64, from: FrameSummary) -> Subscriber {
        let conversation = safekeeper.greet(hello(purpose(shard, generation, from)));
        Subscriber { conversation, assembler: BatchAssembler::new(), position: from.record_end }
    }

    /// The next batch, or why there is none.
    fn next(&mut self) -> Result<Batch, ErrorCode> {
        loop {
            let Subscriber { conversation, assembler, .. } = self;
            let taken = conversation.next(|message| match message {
                Message::Error(error) => Err(error.code),
                message => Ok(assembler.take(&message).unwrap()),
            });
            if let Some(batch) = taken? {
                assert_eq!(self.position, batch.after, "a gap");
                assert!(batch.after <= batch.through && batch.through <= batch.commit_lsn);
                self.position = batch.through;
                return Ok(batch);
            }
        }
    }

    /// Items up to `end`, and what the log adds up to there.
    fn read_until(&mut self, end: Lsn) -> (Vec<Item>, FrameSummary) {
        let mut items = vec![];
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "waited too long for {end}, got {}", self.position);
            let batch = self.next().unwrap();
            items.extend(batch.items);
            if batch.through >= end {
                assert_eq!(end, batch.through);
                return (items, batch.summary);
            }
        }
    }

    fn confirm(&mut self, received: Lsn, durable: Lsn) {
        self.send(&Message::FeedProgress(FeedProgress { received, durable }));
    }

    fn send(&mut self, message: &Message<'_>) {
        self.conversation.stream.write_all(&encode_to_vec(message).unwrap()).unwrap();
    }

    /// Reads batches until the feed ends with an error.
    fn error(&mut self) -> ErrorCode {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "the feed goes on");
            if let Err(code) = self.next() {
                return code;
            }
        }
    }
}

fn shard_status(safekeeper: &Safekeeper, shard: u32) -> Value {
    let status = safekeeper.call("GET", &log_path(), None);
    let shards = status["shards"].as_array().unwrap();
    shards.iter().find(|entry| entry["shard"] == shard).cloned().unwrap_or(Value::Null)
}

/// A metric of the process, whose port the log tells.
fn metric(safekeeper: &Safekeeper, name: &str) -> u64 {
    let log = safekeeper.log_text();
    let address = log.split_whitespace().rev().find_map(|word| word.strip_prefix("metrics=")).unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let line = text.lines().find(|line| line.starts_with(name));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// Each shard gets its records and no others, from the first on and then as they are committed; four shards that follow
/// closely cost one decoding of the log.
fn shards_are_fed(name: &str, variant: Variant) {
    let cluster = Cluster::new(name, variant);
    let mut writer = Writer::elect(&cluster, 1);
    let safekeeper = &cluster.safekeepers[1];
    writer.commit(1000);
    let first = commit_blocks(&cluster, &mut writer, 3000, 200);
    let mut subscribers: Vec<_> =
        (0..SHARDS).map(|shard| Subscriber::connect(safekeeper, shard, 1, beginning())).collect();
    for (shard, subscriber) in (0..).zip(&mut subscribers) {
        assert!(expected(&writer, shard, beginning(), first) == subscriber.read_until(first), "shard {shard}");
    }

    let decoded =
        |decoder| metric(safekeeper, &format!("lakebase_safekeeper_feed_decoded_bytes_total{{decoder=\"{decoder}\"}}"));
    let (shared_before, own_before) = (decoded("shared"), decoded("own"));
    let from = expected(&writer, 0, beginning(), first).1;
    let mut end = first;
    let mut received = vec![vec![]; SHARDS as usize];
    for _ in 0..10 {
        end = commit_blocks(&cluster, &mut writer, 50, 3000);
        for (subscriber, received) in subscribers.iter_mut().zip(&mut received) {
            received.extend(subscriber.read_until(end).0);
        }
    }
    for (shard, items) in (0..).zip(received) {
        assert!(expected(&writer, shard, from, end).0 == items, "shard {shard}");
    }
    assert_eq!(end.bytes_since(first), decoded("shared") - shared_before);
    assert_eq!(0, decoded("own") - own_before);
    let status = shard_status(safekeeper, 2);
    assert_eq!(json!(end.to_string()), status["feed"]["sent_lsn"]);
    assert_eq!(json!(end.bytes_since(START)), status["feed"]["received_lag_bytes"]);
}

#[test]
fn shards_are_fed_from_the_first_record_to_the_last() {
    shards_are_fed("feed", Variant::default());
}

#[test]
fn shards_are_fed_without_io_uring_and_with_several_cores() {
    shards_are_fed("feed-polling", Variant { polling: true, cores: 3 });
}

/// Page servers come back with whatever they have: in the window, before it, at its end.
#[test]
fn a_feed_resumes_at_the_end_of_any_record() {
    let cluster = Cluster::new("feed-resume", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let safekeeper = &cluster.safekeepers[0];
    commit_blocks(&cluster, &mut writer, 100, 8000);
    writer.commit(50_000);
    let end = commit_blocks(&cluster, &mut writer, 40, 30_000);
    // Keeps the window alive.
    let mut steady = Subscriber::connect(safekeeper, 3, 1, beginning());
    steady.read_until(end);
    let ends = record_ends(&writer);
    assert!(ends.len() > 140);
    for (number, from) in ends.iter().enumerate().filter(|(number, _)| number % 9 == 0 || *number + 3 > ends.len()) {
        let mut subscriber = Subscriber::connect(safekeeper, 0, 1, *from);
        let greeting = subscriber.next().unwrap();
        assert_eq!((from.record_end, 0, *from), (greeting.through, greeting.items.len(), greeting.summary));
        if from.record_end < end {
            assert!(expected(&writer, 0, *from, end) == subscriber.read_until(end), "from record {number}");
        }
    }

    // Nothing of a position is taken on trust: another record before it is another log.
    let mut stranger = ends[20];
    stranger.record_start = Lsn(stranger.record_start.0 - 8);
    assert_eq!(ErrorCode::WalDamaged, Subscriber::connect(safekeeper, 0, 1, stranger).error());
    assert_eq!(
        ErrorCode::WalNotAvailable,
        Subscriber::connect(safekeeper, 0, 1, FrameSummary { record_end: Lsn(8), ..beginning() }).error()
    );

    // One that is ahead of this safekeeper waits for it.
    let mut ahead = Subscriber::connect(
        safekeeper,
        0,
        1,
        FrameSummary { record_end: end.advance(1 << 20), ..*ends.last().unwrap() },
    );
    for _ in 0..3 {
        let batch = ahead.next().unwrap();
        assert_eq!((end.advance(1 << 20), 0), (batch.through, batch.items.len()));
    }
}

/// Of two owners of a shard the newer one wins, at once, for ever, and on every connection.
#[test]
fn an_older_owner_of_a_shard_is_refused() {
    let mut cluster = Cluster::new("feed-generation", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let end = commit_blocks(&cluster, &mut writer, 100, 100);
    let safekeeper = &mut cluster.safekeepers[0];
    let mut older = Subscriber::connect(safekeeper, 1, 5, beginning());
    older.read_until(end);

    // The newer one does not know its position yet: it only registers.
    let mut registration = Subscriber::connect(safekeeper, 1, 6, FrameSummary::default());
    let answer = registration.next().unwrap();
    assert_eq!((Lsn::INVALID, 0, Term(1)), (answer.through, answer.items.len(), answer.term));
    assert_eq!(0, registration.conversation.stream.read(&mut [0; 8]).unwrap(), "nothing follows");
    assert_eq!(ErrorCode::StaleGeneration, older.error());
    assert_eq!(ErrorCode::StaleGeneration, Subscriber::connect(safekeeper, 1, 5, beginning()).error());
    let status = shard_status(safekeeper, 1);
    assert_eq!(
        (json!(6), json!(START.to_string()), Value::Null),
        (status["generation"].clone(), status["durable_lsn"].clone(), status["feed"].clone())
    );

    safekeeper.kill();
    safekeeper.start();
    assert_eq!(ErrorCode::StaleGeneration, Subscriber::connect(safekeeper, 1, 5, FrameSummary::default()).error());
    let mut newer = Subscriber::connect(safekeeper, 1, 6, beginning());
    newer.read_until(end);
    // Other shards are other owners' business.
    Subscriber::connect(safekeeper, 2, 1, beginning()).read_until(end);
}

/// WAL goes when every shard has it on object storage, and stays as long as one does not.
#[test]
fn wal_is_kept_for_the_shard_that_is_furthest_behind() {
    let cluster = Cluster::new("feed-retention", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let safekeeper = &cluster.safekeepers[0];
    let mut subscribers: Vec<_> = (0..2).map(|shard| Subscriber::connect(safekeeper, shard, 1, beginning())).collect();
    writer.commit(35 << 20);
    let end = settle(&cluster, &mut writer);
    for subscriber in &mut subscribers {
        subscriber.read_until(end);
    }
    let consumer = format!("{}/consumers/base_backup", log_path());
    safekeeper.call("DELETE", &consumer, None);
    subscribers[0].confirm(end, end);
    subscribers[1].confirm(end, START.advance(SEGMENT_BYTES - 8));
    eventually("the confirmations", || {
        shard_status(safekeeper, 0)["durable_lsn"] == json!(end.to_string())
            && shard_status(safekeeper, 1)["feed"]["received_lsn"] == json!(end.to_string())
    });
    assert_eq!(START, safekeeper.position("oldest_lsn"));
    assert_eq!(json!(end.bytes_since(START) - SEGMENT_BYTES + 8), shard_status(safekeeper, 1)["durable_lag_bytes"]);

    subscribers[1].confirm(end, START.advance(SEGMENT_BYTES + 8));
    eventually("the first segment to go", || {
        writer.proposer.handle_timeout(driver::now());
        writer.carry_out();
        safekeeper.position("oldest_lsn") == START.advance(SEGMENT_BYTES)
    });
    eventually("its file to go", || !safekeeper.segment(START).exists());
    assert_eq!(ErrorCode::WalNotAvailable, Subscriber::connect(safekeeper, 1, 1, beginning()).error());

    // Safekeepers that do not feed the shard are told by a registration.
    let other = &cluster.safekeepers[2];
    let mut registration = Subscriber::connect(other, 1, 1, FrameSummary::default());
    registration.confirm(end, START.advance(SEGMENT_BYTES + 8));
    assert_eq!(Lsn::INVALID, registration.next().unwrap().through);
    let told = json!(START.advance(SEGMENT_BYTES + 8).to_string());
    eventually("the other safekeeper to know", || shard_status(other, 1)["durable_lsn"] == told);

    // A shard that is given up holds nothing any more, and is fed no longer.
    safekeeper.call("DELETE", &format!("{}/shards/1", log_path()), None);
    assert_eq!(ErrorCode::NotAllowed, subscribers[1].error());
    eventually("the second segment to go", || {
        writer.proposer.handle_timeout(driver::now());
        writer.carry_out();
        safekeeper.position("oldest_lsn") > START.advance(SEGMENT_BYTES)
    });
}

fn resident_bytes(safekeeper: &Safekeeper) -> usize {
    let path = format!("/proc/{}/statm", safekeeper.child.as_ref().unwrap().id());
    let pages: usize = std::fs::read_to_string(path).unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// A page server that hangs costs a bounded amount of memory and holds nobody up; a newer owner does not wait for it.
#[test]
fn a_subscriber_that_does_not_read_is_held_in_bounds() {
    let cluster = Cluster::new("feed-hanging", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let safekeeper = &cluster.safekeepers[0];
    commit_blocks(&cluster, &mut writer, 10, 100);
    let mut hanging: Vec<_> = (0..2).map(|shard| Subscriber::connect(safekeeper, shard, 1, beginning())).collect();
    let mut reading = Subscriber::connect(safekeeper, 2, 1, beginning());
    let (mut end, mut before) = (START, 0);
    for round in 0..5 {
        end = commit_blocks(&cluster, &mut writer, 300, 30_000);
        let (items, _) = reading.read_until(end);
        assert!(!items.is_empty());
        if round == 0 {
            before = resident_bytes(safekeeper);
        }
    }
    // Four rounds of 18 MB later: a window, and a batch with its frame for each of those that hang.
    let grown = resident_bytes(safekeeper).saturating_sub(before);
    assert!(grown < WINDOW_BYTES + (16 << 20), "{grown} bytes more");

    let mut newer = Subscriber::connect(safekeeper, 0, 2, beginning());
    newer.read_until(end);
    // The one that was replaced is closed, whether it reads the reason or not.
    let stream = &mut hanging[0].conversation.stream;
    let mut rest = vec![0; 1 << 20];
    eventually("the hanging connection to be closed", || !matches!(stream.read(&mut rest), Ok(count) if count > 0));
}

/// What a subscriber may send is its progress.
#[test]
fn subscribers_that_break_the_protocol_are_told_so() {
    let cluster = Cluster::new("feed-malformed", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let safekeeper = &cluster.safekeepers[0];
    let end = commit_blocks(&cluster, &mut writer, 10, 100);
    let mut bad =
        vec![encode_to_vec(&Message::AskBallot).unwrap(), b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0xAB; 100_000]];
    let mut backwards = encode_to_vec(&Message::FeedProgress(FeedProgress { received: end, durable: end })).unwrap();
    let durable = backwards.len() - 8;
    backwards[durable..].copy_from_slice(&end.advance(8).0.to_le_bytes());
    bad.push(backwards);
    let mut cut = encode_to_vec(&Message::FeedProgress(FeedProgress { received: end, durable: end })).unwrap();
    cut[0] = 8;
    bad.push(cut);
    for bytes in bad {
        let mut subscriber = Subscriber::connect(safekeeper, 0, 1, beginning());
        subscriber.read_until(end);
        // A safekeeper that has answered may close while the rest is on its way.
        let _ = subscriber.conversation.stream.write_all(&bytes);
        assert_eq!(ErrorCode::BadMessage, subscriber.error(), "{:x?}", &bytes[..20.min(bytes.len())]);
    }
    for greeting in [
        Purpose::Feed {
            shard: ShardId(1),
            generation: ShardGeneration(1),
            range: HashRange { begin: 9, end: 9 },
            stripe_blocks: 1,
            from: beginning(),
        },
        Purpose::Feed {
            shard: ShardId(1),
            generation: ShardGeneration(1),
            range: range(1),
            stripe_blocks: 0,
            from: beginning(),
        },
    ] {
        assert_eq!(ErrorCode::BadMessage, safekeeper.greet(hello(greeting)).error().0);
    }
    assert_eq!(Value::Null, shard_status(safekeeper, 1));
    assert_eq!(json!(START.to_string()), shard_status(safekeeper, 0)["durable_lsn"]);
    let mut good = Subscriber::connect(safekeeper, 0, 1, beginning());
    good.read_until(end);
}

/// Page servers refuse writers of old terms: they learn the new one while nothing is written, and that the feed is alive.
#[test]
fn subscribers_hear_of_new_terms_and_that_nothing_has_happened() {
    let cluster = Cluster::new("feed-term", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let end = commit_blocks(&cluster, &mut writer, 10, 100);
    let safekeeper = &cluster.safekeepers[0];
    let mut subscriber = Subscriber::connect(safekeeper, 0, 1, beginning());
    subscriber.read_until(end);
    let begun = Instant::now();
    for _ in 0..5 {
        let batch = subscriber.next().unwrap();
        assert_eq!((end, Term(1), 0), (batch.through, batch.term, batch.items.len()));
    }
    // Five heartbeats of 200 ms; a busy machine may be late, but not silent.
    assert!((Duration::from_millis(700)..PATIENCE).contains(&begun.elapsed()), "{:?}", begun.elapsed());

    cluster.fence(2, WriterId([2; 16]));
    let deadline = Instant::now() + PATIENCE;
    while subscriber.next().unwrap().term != Term(2) {
        assert!(Instant::now() < deadline, "the new term did not come");
    }
}
