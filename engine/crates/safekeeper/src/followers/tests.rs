//! The protocol from a client's side, over sockets, against a log in memory.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use consensus::message::TimelineEntry;
use driver::{Connection, Event, Listener};
use pgtypes::{BranchId, ClusterId, LogId, Lsn, PgTimeline, SystemId};
use wire::postgres::scram::Verifier;

use super::{Admission, FollowError, FollowedLog, FollowerMetrics, Followers, SlotLimits};

const SEGMENT_BYTES: u64 = 16 << 20;
const START: Lsn = Lsn(0x100_0000);
const LIMITS: SlotLimits = SlotLimits { lag_bytes_max: 1 << 20, silence_max: Duration::from_secs(3600) };

/// A log whose byte at each position follows from the position.
struct MemoryLog {
    oldest: Cell<Lsn>,
    readable: Cell<Lsn>,
    timelines: RefCell<Vec<TimelineEntry>>,
    slots: RefCell<Vec<(String, Lsn)>>,
    disk_failed: Cell<bool>,
    changed: Event,
}

fn byte_at(lsn: u64) -> u8 {
    (lsn ^ (lsn >> 8) ^ (lsn >> 16)) as u8
}

fn bytes(begin: Lsn, end: Lsn) -> Vec<u8> {
    (begin.0..end.0).map(byte_at).collect()
}

fn log_id() -> LogId {
    LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) }
}

impl MemoryLog {
    fn new(readable: u64) -> Rc<Self> {
        let first = TimelineEntry { timeline: PgTimeline(1), start_lsn: START, history_file: Vec::new() };
        Rc::new(Self {
            oldest: Cell::new(START),
            readable: Cell::new(START.advance(readable)),
            timelines: RefCell::new(vec![first]),
            slots: RefCell::default(),
            disk_failed: Cell::new(false),
            changed: Event::new(),
        })
    }

    fn commit(&self, end: Lsn) {
        self.readable.set(end);
        self.changed.set();
    }

    fn begin_timeline(&self, timeline: u32, start_lsn: Lsn) {
        let history_file = format!("1\t{start_lsn}\tno recovery target specified\n").into_bytes();
        let entry = TimelineEntry { timeline: PgTimeline(timeline), start_lsn, history_file };
        self.timelines.borrow_mut().push(entry);
        self.changed.set();
    }
}

impl FollowedLog for MemoryLog {
    type Bytes = Vec<u8>;

    fn id(&self) -> LogId {
        log_id()
    }

    fn system(&self) -> SystemId {
        SystemId(7_300_000_000_000_000_001)
    }

    fn segment_bytes(&self) -> u64 {
        SEGMENT_BYTES
    }

    fn oldest_lsn(&self) -> Lsn {
        self.oldest.get()
    }

    fn readable_lsn(&self) -> Lsn {
        self.readable.get()
    }

    fn is_closed(&self) -> bool {
        false
    }

    fn with_timelines<T>(&self, look: impl FnOnce(&[TimelineEntry]) -> T) -> T {
        look(&self.timelines.borrow())
    }

    fn until<T>(&self, condition: impl FnMut() -> Option<T>) -> impl Future<Output = T> {
        self.changed.until(condition)
    }

    async fn read(&self, begin: Lsn, max: usize) -> Result<Vec<u8>, FollowError> {
        if begin < self.oldest.get() {
            return Err(FollowError::Removed { begin, oldest: self.oldest.get() });
        }
        Ok(bytes(begin, begin.advance(max as u64).min(self.readable.get())))
    }

    fn slots(&self) -> Vec<(String, Lsn)> {
        self.slots.borrow().clone()
    }

    fn slot(&self, name: &str) -> Option<Lsn> {
        self.slots.borrow().iter().find(|(slot, _)| slot == name).map(|(_, lsn)| *lsn)
    }

    fn set_slot(&self, name: &str, confirmed_lsn: Lsn) -> bool {
        let mut slots = self.slots.borrow_mut();
        slots.retain(|(slot, _)| slot != name);
        slots.push((name.to_owned(), confirmed_lsn));
        self.changed.set();
        true
    }

    async fn slots_durable(&self) -> bool {
        !self.disk_failed.get()
    }

    fn remove_slot(&self, name: &str) -> bool {
        let mut slots = self.slots.borrow_mut();
        let before = slots.len();
        slots.retain(|(slot, _)| slot != name);
        slots.len() < before
    }
}

/// A server on this thread.
struct Server {
    followers: Rc<Followers>,
    log: Rc<MemoryLog>,
    address: String,
}

impl Server {
    fn start(log: Rc<MemoryLog>) -> Server {
        Self::start_with(log, None, vec![log_id()])
    }

    fn start_with(log: Rc<MemoryLog>, users_file: Option<std::path::PathBuf>, logs: Vec<LogId>) -> Server {
        let admission = Admission::new(None, users_file, LIMITS, FollowerMetrics::default()).unwrap();
        Self::serve(log, admission, logs)
    }

    fn serve(log: Rc<MemoryLog>, admission: Arc<Admission>, logs: Vec<LogId>) -> Server {
        let followers = Followers::new(admission);
        let listener = Listener::listen("127.0.0.1:0").unwrap();
        let address = listener.local_address().unwrap().to_string();
        let (serving, served) = (followers.clone(), log.clone());
        driver::spawn(async move {
            for number in 0.. {
                let connection = listener.accept().await.unwrap();
                let (followers, log, logs) = (serving.clone(), served.clone(), logs.clone());
                driver::spawn(async move {
                    let Some(mut admitted) = followers.admit(connection, async move || logs).await else { return };
                    // Every other follower moves, as to the core of its log.
                    if number % 2 == 0 {
                        admitted = admitted.detach().unwrap().attach().unwrap();
                    }
                    followers.serve(admitted, Some(log)).await;
                });
            }
        });
        Server { followers, log, address }
    }

    async fn connect(&self) -> Client {
        let connection = driver::connect(&self.address, Duration::from_secs(5)).await.unwrap();
        Client { connection, received: Vec::new() }
    }

    /// A client that is let in and may send commands.
    async fn log_in(&self) -> Client {
        let mut client = self.connect().await;
        client.send_startup(&[("user", "rep"), ("replication", "true")]).await;
        client.until_ready().await;
        client
    }
}

struct Client {
    connection: Connection,
    received: Vec<u8>,
}

type ServerMessage = (u8, Vec<u8>);

impl Client {
    async fn send_bytes(&mut self, bytes: Vec<u8>) {
        self.connection.write_all(bytes).await.0.unwrap();
    }

    async fn send_startup(&mut self, parameters: &[(&str, &str)]) {
        let mut body = (3u32 << 16).to_be_bytes().to_vec();
        for (name, value) in parameters {
            body.extend_from_slice(format!("{name}\0{value}\0").as_bytes());
        }
        body.push(0);
        let mut packet = (4 + body.len() as u32).to_be_bytes().to_vec();
        packet.append(&mut body);
        self.send_bytes(packet).await;
    }

    async fn send(&mut self, kind: u8, body: &[u8]) {
        let mut message = vec![kind];
        message.extend_from_slice(&(4 + body.len() as u32).to_be_bytes());
        message.extend_from_slice(body);
        self.send_bytes(message).await;
    }

    async fn query(&mut self, command: &str) {
        self.send(b'Q', format!("{command}\0").as_bytes()).await;
    }

    async fn confirm(&mut self, lsn: Lsn) {
        let mut status = vec![b'r'];
        for value in [lsn.0, lsn.0, lsn.0, 0] {
            status.extend_from_slice(&value.to_be_bytes());
        }
        // Asks for a keep-alive, so that the test sees that it was read.
        status.push(1);
        self.send(b'd', &status).await;
    }

    /// The next message; `None` when the server has closed.
    async fn receive(&mut self) -> Option<ServerMessage> {
        loop {
            if let Some(&[kind, l0, l1, l2, l3]) = self.received.first_chunk::<5>() {
                let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
                if self.received.len() > length {
                    let message = self.received.drain(..=length).skip(5).collect();
                    return Some((kind, message));
                }
            }
            let mut buffer = std::mem::take(&mut self.received);
            buffer.reserve(1 << 16);
            let read = self.connection.read(buffer);
            let (result, buffer) = driver::timeout(Duration::from_secs(20), read).await.expect("the server is silent");
            self.received = buffer;
            if !matches!(result, Ok(count) if count > 0) {
                return None;
            }
        }
    }

    async fn expect(&mut self, kind: u8) -> Vec<u8> {
        let (found, body) = self.receive().await.expect("a message");
        assert_eq!(kind as char, found as char, "{}", String::from_utf8_lossy(&body));
        body
    }

    /// Messages up to `ReadyForQuery`, without it.
    async fn until_ready(&mut self) -> Vec<ServerMessage> {
        let mut messages = Vec::new();
        loop {
            match self.receive().await.expect("a message") {
                (b'Z', _) => return messages,
                message => messages.push(message),
            }
        }
    }

    /// The SQLSTATE of the error that answers a command.
    async fn error_of(&mut self, command: &str) -> String {
        self.query(command).await;
        let messages = self.until_ready().await;
        assert_eq!(1, messages.len(), "{command}: {messages:?}");
        sqlstate(&messages[0])
    }

    /// The only row that answers a command.
    async fn row_of(&mut self, command: &str) -> Vec<Option<String>> {
        self.query(command).await;
        let messages = self.until_ready().await;
        let row = messages.iter().find(|(kind, _)| *kind == b'D');
        columns(&row.unwrap_or_else(|| panic!("{command}: {messages:?}")).1)
    }

    /// WAL up to `end`, beginning at `begin`; keep-alives are skipped.
    async fn receive_wal(&mut self, begin: Lsn, end: Lsn) -> Vec<u8> {
        let mut wal = Vec::new();
        while begin.advance(wal.len() as u64) < end {
            let data = self.expect(b'd').await;
            if data[0] == b'w' {
                let start = u64::from_be_bytes(data[1..9].try_into().unwrap());
                assert_eq!(begin.0 + wal.len() as u64, start, "no gap and no overlap");
                wal.extend_from_slice(&data[25..]);
            }
        }
        wal
    }

    /// Whether a keep-alive is the next message.
    async fn expect_keepalive(&mut self) -> Lsn {
        let data = self.expect(b'd').await;
        assert_eq!((b'k', 18), (data[0], data.len()));
        Lsn(u64::from_be_bytes(data[1..9].try_into().unwrap()))
    }
}

fn columns(row: &[u8]) -> Vec<Option<String>> {
    let (count, mut rest) = row.split_at(2);
    let count = u16::from_be_bytes(count.try_into().unwrap());
    (0..count)
        .map(|_| {
            let (length, behind) = rest.split_at(4);
            let length = i32::from_be_bytes(length.try_into().unwrap());
            rest = behind;
            let (value, behind) = rest.split_at(length.max(0) as usize);
            rest = behind;
            (length >= 0).then(|| String::from_utf8(value.to_vec()).unwrap())
        })
        .collect()
}

fn sqlstate((kind, body): &ServerMessage) -> String {
    assert_eq!(b'E', *kind, "{}", String::from_utf8_lossy(body));
    let field = body.split(|byte| *byte == 0).find(|field| field.first() == Some(&b'C')).unwrap();
    String::from_utf8(field[1..].to_vec()).unwrap()
}

fn run(test: impl Future<Output = ()>) {
    driver::run_core(test).unwrap();
}

#[test]
fn committed_wal_is_streamed_and_nothing_beyond() {
    run(async {
        let server = Server::start(MemoryLog::new(300_001));
        let mut client = server.log_in().await;
        client.query("START_REPLICATION 0/1000000 TIMELINE 1").await;
        assert_eq!(vec![0, 0, 0], client.expect(b'W').await);
        let first = START.advance(300_001);
        assert_eq!(bytes(START, first), client.receive_wal(START, first).await);

        client.confirm(first).await;
        assert_eq!(first, client.expect_keepalive().await);
        server.log.commit(START.advance(300_010));
        let second = START.advance(300_010);
        assert_eq!(bytes(first, second), client.receive_wal(first, second).await);

        client.send(b'c', b"").await;
        client.expect(b'c').await;
        let end = client.until_ready().await;
        assert_eq!(2, end.len(), "{end:?}");
        assert!(end.iter().all(|(kind, _)| *kind == b'C'), "{end:?}");
        assert_eq!(Some("0/10493EA".to_owned()), client.row_of("IDENTIFY_SYSTEM").await[2]);
    });
}

#[test]
fn follower_is_led_from_one_timeline_to_the_next() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        let switch = START.advance(1000);
        let mut client = server.log_in().await;
        client.query("START_REPLICATION 0/1000000 TIMELINE 1").await;
        client.expect(b'W').await;
        client.receive_wal(START, switch).await;

        // A promotion of which nothing is committed may be taken back: the follower is not told.
        server.log.begin_timeline(2, switch);
        client.confirm(switch).await;
        client.expect_keepalive().await;
        let mut other = server.log_in().await;
        assert_eq!(Some("1".to_owned()), other.row_of("IDENTIFY_SYSTEM").await[1]);
        assert_eq!("58P01", other.error_of("TIMELINE_HISTORY 2").await);
        assert_eq!("55000", other.error_of("START_REPLICATION 0/1000000 TIMELINE 2").await);

        server.log.commit(switch.advance(48));
        client.expect(b'c').await;
        client.send(b'c', b"").await;
        let end = client.until_ready().await;
        let kinds: Vec<char> = end.iter().map(|(kind, _)| *kind as char).collect();
        assert_eq!(vec!['T', 'D', 'C', 'C'], kinds);
        assert_eq!(vec![Some("2".to_owned()), Some("0/10003E8".to_owned())], columns(&end[1].1));

        let history = client.row_of("TIMELINE_HISTORY 2").await;
        assert_eq!(Some("00000002.history".to_owned()), history[0]);
        assert_eq!(Some("1\t0/10003E8\tno recovery target specified\n".to_owned()), history[1]);
        client.query("START_REPLICATION 0/1000000 TIMELINE 2").await;
        client.expect(b'W').await;
        assert_eq!(bytes(START, switch.advance(48)), client.receive_wal(START, switch.advance(48)).await);

        // A timeline that has ended, from its end: not even the copy mode is entered.
        other.query("START_REPLICATION 0/10003E8 TIMELINE 1").await;
        let kinds: Vec<char> = other.until_ready().await.iter().map(|(kind, _)| *kind as char).collect();
        assert_eq!(vec!['T', 'D', 'C', 'C'], kinds);
    });
}

#[test]
fn starts_that_cannot_be_are_refused_and_the_session_goes_on() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        server.log.begin_timeline(2, START.advance(500));
        server.log.oldest.set(START.advance(8));
        let mut client = server.log_in().await;
        for (command, expected) in [
            ("START_REPLICATION 0/10003F0 TIMELINE 2", "55000"),
            ("START_REPLICATION 0/1000300 TIMELINE 1", "55000"),
            ("START_REPLICATION 0/1000100 TIMELINE 3", "55000"),
            ("START_REPLICATION 0/1000000", "58P01"),
            ("START_REPLICATION SLOT s LOGICAL 0/0", "0A000"),
            ("TIMELINE_HISTORY 1", "58P01"),
            ("SHOW shared_buffers", "42704"),
            ("DROP_REPLICATION_SLOT nobody", "42704"),
            ("READ_REPLICATION_SLOT \"No\"", "42602"),
            ("BASE_BACKUP", "0A000"),
            ("SELECT 1", "0A000"),
            ("nonsense", "42601"),
        ] {
            assert_eq!(expected, client.error_of(command).await, "{command}");
        }
        for (name, expected) in [("wal_segment_size", "16MB"), ("data_directory_mode", "0700")] {
            assert_eq!(vec![Some(expected.to_owned())], client.row_of(&format!("SHOW {name}")).await);
        }
        client.send(b'P', b"extended").await;
        client.send(b'B', b"").await;
        client.send(b'S', b"").await;
        let answer = client.until_ready().await;
        assert_eq!(("08P01".to_owned(), 1), (sqlstate(&answer[0]), answer.len()));
    });
}

#[test]
fn slot_is_made_by_its_first_use_held_by_one_and_moved_by_confirmations() {
    run(async {
        let server = Server::start(MemoryLog::new(100_000));
        let mut client = server.log_in().await;
        assert_eq!(vec![None, None, None], client.row_of("READ_REPLICATION_SLOT s1").await);
        client.query("START_REPLICATION SLOT s1 0/1000000 TIMELINE 1").await;
        client.expect(b'W').await;
        client.receive_wal(START, START.advance(100_000)).await;
        assert_eq!(Some(START), server.log.slot("s1"));

        let mut other = server.log_in().await;
        assert_eq!("55006", other.error_of("START_REPLICATION SLOT s1 0/1000000").await);
        assert_eq!("55006", other.error_of("DROP_REPLICATION_SLOT s1").await);
        assert_eq!("42710", other.error_of("CREATE_REPLICATION_SLOT s1 PHYSICAL").await);

        client.confirm(START.advance(5000)).await;
        client.expect_keepalive().await;
        assert_eq!(Some(START.advance(5000)), server.log.slot("s1"));
        // Neither back, nor further than was sent.
        for confirmed in [START, START.advance(100_001), Lsn::INVALID] {
            client.confirm(confirmed).await;
            client.expect_keepalive().await;
            assert_eq!(Some(START.advance(5000)), server.log.slot("s1"), "{confirmed}");
        }
        let status = server.followers.status();
        assert_eq!((1, Some("s1")), (status.len(), status[0].slot.as_deref()));

        client.send(b'c', b"").await;
        client.expect(b'c').await;
        client.until_ready().await;
        let row = other.row_of("READ_REPLICATION_SLOT s1").await;
        assert_eq!(["physical", "0/1001388", "1"].map(|text| Some(text.to_owned())).to_vec(), row);
        other.query("DROP_REPLICATION_SLOT s1").await;
        other.until_ready().await;
        assert_eq!(None, server.log.slot("s1"));
    });
}

#[test]
fn temporary_slot_goes_with_its_session() {
    run(async {
        let server = Server::start(MemoryLog::new(100_000));
        let mut client = server.log_in().await;
        client.query("CREATE_REPLICATION_SLOT t TEMPORARY PHYSICAL (RESERVE_WAL)").await;
        client.until_ready().await;
        assert_eq!(Some(START), server.log.slot("t"));
        client.send(b'X', b"").await;
        assert_eq!(None, client.receive().await);
        let gone = server.followers.changed.until(|| server.log.slot("t").is_none().then_some(()));
        driver::timeout(Duration::from_secs(20), gone).await.expect("the slot is gone");
    });
}

#[test]
fn slot_that_cannot_be_made_durable_is_not_made() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        server.log.disk_failed.set(true);
        let mut client = server.log_in().await;
        assert_eq!("58030", client.error_of("CREATE_REPLICATION_SLOT s1 PHYSICAL").await);
        assert_eq!(None, server.log.slot("s1"));
    });
}

#[test]
fn slot_that_lags_too_far_expires_and_ends_its_stream() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        let mut client = server.log_in().await;
        client.query("START_REPLICATION SLOT s1 0/1000000").await;
        client.expect(b'W').await;
        client.receive_wal(START, START.advance(1000)).await;
        server.followers.expire_slots(&*server.log);
        assert_eq!(Some(START), server.log.slot("s1"));

        server.log.commit(START.advance(1001 + LIMITS.lag_bytes_max));
        client.receive_wal(START.advance(1000), server.log.readable.get()).await;
        server.followers.expire_slots(&*server.log);
        assert_eq!(None, server.log.slot("s1"));
        let (kind, body) = client.receive().await.unwrap();
        assert_eq!("55000", sqlstate(&(kind, body)));
        assert_eq!(None, client.receive().await);
    });
}

#[test]
fn silent_slot_expires_and_a_used_one_does_not() {
    run(async {
        let log = MemoryLog::new(1000);
        let mut table = super::slots::SlotTable::new(LIMITS);
        let start = driver::now();
        for slot in ["used", "silent"] {
            log.set_slot(slot, START);
            table.acquire(log_id(), slot, 1, start).unwrap();
        }
        table.release(log_id(), "silent", 1, start);
        assert!(table.expire(&*log, start.after(LIMITS.silence_max)).is_empty());
        let expired = table.expire(&*log, start.after(LIMITS.silence_max + Duration::from_secs(1)));
        assert_eq!(vec!["silent"], expired.iter().map(|(slot, _)| slot.as_str()).collect::<Vec<_>>());
        assert_eq!(vec![("used".to_owned(), START)], log.slots());
    });
}

#[test]
fn wal_that_is_removed_under_a_follower_ends_its_stream_with_the_reason() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        let mut client = server.log_in().await;
        client.query("START_REPLICATION 0/1000000").await;
        client.expect(b'W').await;
        client.receive_wal(START, START.advance(1000)).await;
        server.log.oldest.set(START.advance(2000));
        server.log.commit(START.advance(3000));
        let (kind, body) = client.receive().await.unwrap();
        assert_eq!("58P01", sqlstate(&(kind, body)));
        assert_eq!(None, client.receive().await);
    });
}

#[test]
fn stopping_says_farewell_to_streams_and_closes_the_rest() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        let (mut streaming, mut idle) = (server.log_in().await, server.log_in().await);
        streaming.query("START_REPLICATION 0/1000000").await;
        streaming.expect(b'W').await;
        streaming.receive_wal(START, START.advance(1000)).await;
        let followers = server.followers.clone();
        let stopped = driver::spawn(async move { followers.stop().await });
        assert_eq!(b"COPY 0\0".to_vec(), streaming.expect(b'C').await);
        assert_eq!(None, streaming.receive().await);
        assert_eq!(None, idle.receive().await);
        drop(streaming);
        stopped.await;

        let mut late = server.connect().await;
        late.send_startup(&[("user", "rep"), ("replication", "true")]).await;
        assert_eq!("53300", sqlstate(&late.receive().await.unwrap()));
    });
}

#[test]
fn garbage_ends_its_connection_only() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xFF; 64], &[0, 0, 0, 8, 0, 2, 0, 0], &[0; 8]] {
            let mut client = server.connect().await;
            client.send_bytes(garbage.to_vec()).await;
            let (kind, _) = client.receive().await.unwrap();
            assert_eq!((b'E', None), (kind, client.receive().await), "{garbage:?}");
        }
        for garbage in [&b"?\0\0\0\x04"[..], &[b'Q', 0xFF, 0, 0, 0], b"Q\0\0\0\x05x", b"p\0\0\0\x04"] {
            let mut client = server.log_in().await;
            client.send_bytes(garbage.to_vec()).await;
            assert_eq!("08P01", sqlstate(&client.receive().await.unwrap()), "{garbage:?}");
            assert_eq!(None, client.receive().await);
        }
        for garbage in [&b"d\0\0\0\x05x"[..], b"d\0\0\0\x04", b"Q\0\0\0\x05\0", b"\0\0\0\0\0"] {
            let mut client = server.log_in().await;
            client.query("START_REPLICATION 0/1000000").await;
            client.expect(b'W').await;
            client.receive_wal(START, START.advance(1000)).await;
            client.send_bytes(garbage.to_vec()).await;
            assert_eq!("08P01", sqlstate(&client.receive().await.unwrap()), "{garbage:?}");
            assert_eq!(None, client.receive().await);
        }
        server.log_in().await;
    });
}

#[test]
fn sessions_that_are_no_physical_replication_are_refused() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        for (parameters, expected) in [
            (&[("user", "rep")][..], "0A000"),
            (&[("user", "rep"), ("replication", "database"), ("database", "x")], "0A000"),
            (&[("replication", "true")], "28000"),
            (&[("user", "rep"), ("replication", "true"), ("options", "-c lakebase.log=x")], "3D000"),
            (&[("user", "rep@x"), ("replication", "true")], "3D000"),
        ] {
            let mut client = server.connect().await;
            client.send_startup(parameters).await;
            assert_eq!(expected, sqlstate(&client.receive().await.unwrap()), "{parameters:?}");
            assert_eq!(None, client.receive().await);
        }
    });
}

#[test]
fn log_is_chosen_by_options_by_name_or_because_it_is_the_only_one() {
    run(async {
        let other = LogId { cluster: ClusterId([1; 16]), branch: BranchId([3; 16]) };
        let server = Server::start_with(MemoryLog::new(1000), None, vec![log_id(), other]);
        let mut client = server.connect().await;
        client.send_startup(&[("user", "rep"), ("replication", "true")]).await;
        assert_eq!("3D000", sqlstate(&client.receive().await.unwrap()));

        let (name, options) = (format!("rep@{}", log_id()), format!("-c lakebase.log={}", log_id()));
        for parameters in [
            &[("user", name.as_str()), ("replication", "true")][..],
            &[("user", "rep"), ("replication", "true"), ("options", &options)],
        ] {
            let mut client = server.connect().await;
            client.send_startup(parameters).await;
            client.until_ready().await;
        }
    });
}

#[test]
fn newer_protocol_is_negotiated_down() {
    run(async {
        let server = Server::start(MemoryLog::new(1000));
        let mut client = server.connect().await;
        let body = b"\0\x03\0\x02user\0rep\0replication\0true\0_pq_.x\0y\0\0";
        let mut packet = (4 + body.len() as u32).to_be_bytes().to_vec();
        packet.extend_from_slice(body);
        client.send_bytes(packet).await;
        assert_eq!(b"\0\x03\0\0\0\0\0\x01_pq_.x\0".to_vec(), client.expect(b'v').await);
        client.until_ready().await;
    });
}

/// Without TLS by the development flag, a users file still asks for passwords.
#[test]
fn wrong_password_is_refused_like_an_unknown_user() {
    run(async {
        let path = std::env::temp_dir().join(format!("followers-{}", uuid::Uuid::new_v4()));
        std::fs::write(&path, format!("anna:{}\n", Verifier::of_password("right", b"salt", 4096))).unwrap();
        let server = Server::start_with(MemoryLog::new(1000), Some(path.clone()), vec![log_id()]);
        for user in ["anna", "nobody"] {
            let mut client = server.connect().await;
            client.send_startup(&[("user", user), ("replication", "true")]).await;
            assert_eq!(b"\0\0\0\x0ASCRAM-SHA-256\0\0".to_vec(), client.expect(b'R').await);
            client.send(b'p', b"SCRAM-SHA-256\0\0\0\0\x0Bn,,n=,r=abc").await;
            let challenge = String::from_utf8(client.expect(b'R').await[4..].to_vec()).unwrap();
            let nonce = challenge.split(',').next().unwrap();
            let proof = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
            client.send(b'p', format!("c=biws,{nonce},p={proof}").as_bytes()).await;
            assert_eq!("28P01", sqlstate(&client.receive().await.unwrap()), "{user}");
            assert_eq!(None, client.receive().await);
        }
        std::fs::remove_file(path).unwrap();
    });
}

mod encrypted {
    use identity::{Role, Tls, ca};

    use super::*;

    struct Authority(std::path::PathBuf);

    impl Authority {
        fn new() -> Self {
            let directory = std::env::temp_dir().join(format!("followers-ca-{}", uuid::Uuid::new_v4()));
            ca::init(&directory, log_id().cluster).unwrap();
            Self(directory)
        }

        fn issue(&self, role: Role, name: &str) -> Tls {
            Tls::load(ca::issue(&self.0, role, name, &["127.0.0.1".to_owned()]).unwrap()).unwrap()
        }
    }

    impl Drop for Authority {
        fn drop(&mut self) {
            let _left_behind = std::fs::remove_dir_all(&self.0);
        }
    }

    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 0xD2, 0x16, 0x2F];

    impl Client {
        /// Asks for encryption and begins the session behind it.
        async fn encrypt(mut self, tls: &Tls) -> Client {
            self.send_bytes(SSL_REQUEST.to_vec()).await;
            let (result, answer) = self.connection.read(Vec::with_capacity(1)).await;
            assert_eq!((1, b"S".to_vec()), (result.unwrap(), answer));
            let connection = self.connection.upgrade_client(tls.client_config(), "127.0.0.1").await.unwrap();
            let mut client = Client { connection, received: Vec::new() };
            client.send_startup(&[("user", "rep"), ("replication", "true")]).await;
            client
        }
    }

    #[test]
    fn certificate_of_a_follower_is_enough_and_of_others_is_not() {
        run(async {
            let authority = Authority::new();
            let tls = authority.issue(Role::Safekeeper, "sk-1");
            let admission = Admission::new(Some(tls), None, LIMITS, FollowerMetrics::default()).unwrap();
            let server = Server::serve(MemoryLog::new(1000), admission, vec![log_id()]);
            for role in Role::ALL {
                let tls = authority.issue(role, "visitor");
                let mut client = server.connect().await.encrypt(&tls).await;
                if identity::allowed(role, identity::Call::Replicate) {
                    client.until_ready().await;
                    let row = client.row_of("IDENTIFY_SYSTEM").await;
                    assert_eq!(Some("7300000000000000001".to_owned()), row[0], "{role}");
                } else {
                    assert_eq!("28000", sqlstate(&client.receive().await.unwrap()), "{role}");
                }
            }
        });
    }

    #[test]
    fn plain_connection_is_refused_where_there_is_tls() {
        run(async {
            let authority = Authority::new();
            let tls = authority.issue(Role::Safekeeper, "sk-1");
            let admission = Admission::new(Some(tls), None, LIMITS, FollowerMetrics::default()).unwrap();
            let server = Server::serve(MemoryLog::new(1000), admission, vec![log_id()]);
            let mut client = server.connect().await;
            client.send_startup(&[("user", "rep"), ("replication", "true")]).await;
            assert_eq!("28000", sqlstate(&client.receive().await.unwrap()));

            // What a stranger in between puts behind the request must not be taken for the client's.
            let mut client = server.connect().await;
            client.send_bytes([&SSL_REQUEST[..], b"\0\0\0\x09\0\x03\0\0\0"].concat()).await;
            assert_eq!("08P01", sqlstate(&client.receive().await.unwrap()));
            assert_eq!(None, client.receive().await);
        });
    }
}
