//! Real safekeeper processes, driven over real sockets by the real proposer with made-up WAL.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU16, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use consensus::{
    Configuration, Grant, Member, Proposer, ProposerCommand,
    message::{AcceptorMessage, ProposerMessage},
};
use pgtypes::{
    BranchId, ClusterId, Generation, Incarnation, LogId, Lsn, MemberId, PgTimeline, SystemId, Term, WriterId,
};
use safekeeper::config::Config;
use serde_json::{Value, json};
use wal::{RecordSpec, WalWriter, main_data, rmgr};
use wire::append::{ErrorCode, FrameReader, Hello, Message, Purpose, decode, encode_to_vec};

const SEGMENT_BYTES: u64 = 16 << 20;
const START: Lsn = Lsn(SEGMENT_BYTES);
const SYSTEM: SystemId = SystemId(7_300_000_000_000_000_001);
/// Names the configuration file of a child process.
const CONFIG: &str = "SAFEKEEPER_TEST_CONFIG";
/// Everything here takes milliseconds; a machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

fn log() -> LogId {
    LogId { cluster: ClusterId([0x11; 16]), branch: BranchId([0x22; 16]) }
}

fn log_path() -> String {
    format!("/v1/logs/{}", log())
}

/// The body of the child processes; without its variable it does nothing.
#[test]
fn child_process_runs_a_safekeeper() {
    if let Ok(path) = std::env::var(CONFIG) {
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
        safekeeper::run(Config::load(Path::new(&path)).unwrap()).unwrap();
    }
}

/// How the processes of a test run.
#[derive(Clone, Copy, Default)]
struct Variant {
    polling: bool,
    cores: u16,
}

struct Safekeeper {
    member: u32,
    directory: PathBuf,
    variant: Variant,
    append: u16,
    admin: u16,
    child: Option<Child>,
}

/// A port below the range from which the kernel takes ports of outgoing connections: one of those could take a port of
/// ours while its process is down.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let number = std::process::id().wrapping_mul(61) + u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 10_000 + (number % 22_000) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Safekeeper {
    fn new(root: &Path, member: u32, variant: Variant) -> Self {
        let directory = root.join(format!("sk-{member}"));
        std::fs::create_dir(&directory).unwrap();
        let (append, admin) = (free_port(), free_port());
        let cores = variant.cores.max(1);
        let config = format!(
            "member = {member}\ndata_dir = \"data\"\ncores = {cores}\n[listen]\nappend = \"127.0.0.1:{append}\"\n\
             replication = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:{admin}\"\nmetrics = \"127.0.0.1:0\"\n\
             [tls]\nmode = \"off\"\ni_know_this_is_insecure = true\n[disk]\nheadroom = \"1MiB\"\nspare_segments = 1\n"
        );
        std::fs::write(directory.join("safekeeper.toml"), config).unwrap();
        let mut safekeeper = Self { member, directory, variant, append, admin, child: None };
        safekeeper.start();
        safekeeper
    }

    fn start(&mut self) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "child_process_runs_a_safekeeper", "--nocapture"])
            .env(CONFIG, self.directory.join("safekeeper.toml"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::options().create(true).append(true).open(self.directory.join("log")).unwrap());
        if self.variant.polling {
            command.env("LAKEBASE_IO", "polling");
        }
        self.child = Some(command.spawn().unwrap());
        eventually("the admin port to answer", || self.try_call("GET", "/v1/status", None).is_some());
    }

    /// SIGKILL.
    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn try_call(&self, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin)).ok()?;
        let body = body.map_or_else(String::new, Value::to_string);
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        Some((status, serde_json::from_str(body).ok()?))
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let (status, answer) = self.try_call(method, path, body).unwrap();
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    fn position(&self, key: &str) -> Lsn {
        self.call("GET", &log_path(), None)[key].as_str().unwrap().parse().unwrap()
    }

    fn log_text(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap()
    }

    fn segment(&self, start: Lsn) -> PathBuf {
        self.directory.join(format!("data/logs/{}/wal/{:016X}", log(), start.0))
    }

    /// Opens a connection of the append protocol and sends `first`.
    fn connect(&self, first: &[u8]) -> Conversation {
        let mut stream = TcpStream::connect(("127.0.0.1", self.append)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(first).unwrap();
        Conversation { stream, frames: FrameReader::new() }
    }

    fn greet(&self, hello: Hello) -> Conversation {
        self.connect(&encode_to_vec(&Message::Hello(hello)).unwrap())
    }

    /// The committed WAL `[START, until)` as a reader gets it.
    fn read(&self, until: Lsn) -> Vec<u8> {
        let mut conversation = self.greet(hello(Purpose::Read { begin_lsn: START }));
        let mut wal = Vec::new();
        while (wal.len() as u64) < until.bytes_since(START) {
            conversation.next(|message| match message {
                Message::WalData(data) => {
                    assert_eq!(START.advance(wal.len() as u64), data.begin_lsn);
                    wal.extend_from_slice(data.bytes);
                }
                other => panic!("{other:?}"),
            });
        }
        wal
    }
}

impl Drop for Safekeeper {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if thread::panicking() {
            eprintln!("--- member {}\n{}", self.member, self.log_text());
        }
    }
}

fn hello(purpose: Purpose) -> Hello {
    Hello { log: log(), system_id: SYSTEM, purpose }
}

struct Conversation {
    stream: TcpStream,
    frames: FrameReader,
}

impl Conversation {
    /// Gives the next message to `take`.
    fn next<T>(&mut self, take: impl FnOnce(Message<'_>) -> T) -> T {
        loop {
            if let Some(frame) = self.frames.next().unwrap() {
                return take(decode(frame).unwrap());
            }
            let mut buffer = vec![0; 1 << 16];
            let count = self.stream.read(&mut buffer).unwrap();
            assert!(count > 0, "closed");
            self.frames.feed(&buffer[..count]);
        }
    }

    fn error(&mut self) -> (ErrorCode, String) {
        self.next(|message| match message {
            Message::Error(error) => (error.code, error.text),
            other => panic!("{other:?}"),
        })
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

struct Cluster {
    safekeepers: Vec<Safekeeper>,
    configuration: Configuration,
    /// Removed last.
    _root: Root,
}

struct Root(PathBuf);

impl Drop for Root {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

impl Cluster {
    fn new(name: &str, variant: Variant) -> Self {
        let root = Root(std::env::temp_dir().join(format!("safekeeper-{name}-{}", std::process::id())));
        std::fs::create_dir(&root.0).unwrap();
        let safekeepers: Vec<_> = (1..=3).map(|member| Safekeeper::new(&root.0, member, variant)).collect();
        let members: Vec<Member> = safekeepers
            .iter()
            .map(|safekeeper| Member {
                member: MemberId(safekeeper.member),
                disk: safekeeper.call("GET", "/v1/status", None)["disk"].as_str().unwrap().parse().unwrap(),
                address: format!("127.0.0.1:{}", safekeeper.append),
            })
            .collect();
        let configuration = Configuration { generation: Generation(1), members, new_members: None };
        let members: Vec<_> = configuration
            .members
            .iter()
            .map(
                |member| json!({"member": member.member.0, "disk": member.disk.to_string(), "address": member.address}),
            )
            .collect();
        let body = json!({"system_id": SYSTEM.0.to_string(), "segment_bytes": SEGMENT_BYTES, "start_lsn": START.to_string(),
            "timeline": 1, "max_full_xid": "3", "configuration": {"generation": 1, "members": members}});
        for safekeeper in &safekeepers {
            safekeeper.call("PUT", &log_path(), Some(&body));
        }
        Cluster { safekeepers, configuration, _root: root }
    }

    fn fence(&self, term: u64, writer: WriterId) {
        for safekeeper in self.safekeepers.iter().filter(|safekeeper| safekeeper.child.is_some()) {
            let body = json!({"term": term, "writer": writer.to_string()});
            safekeeper.call("POST", &format!("{}/fence", log_path()), Some(&body));
        }
    }
}

enum Event {
    Status(MemberId, u64, consensus::message::AcceptorStatus),
    Message(MemberId, u64, AcceptorMessage),
    Gone(MemberId, u64),
}

/// A proposer with threads instead of an agent around it.
struct Writer {
    proposer: Proposer,
    generator: WalWriter,
    /// Local WAL from `wal_start` on.
    wal: Vec<u8>,
    wal_start: Lsn,
    links: BTreeMap<MemberId, (u64, TcpStream)>,
    next_link: u64,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    committed: Lsn,
    fenced: bool,
}

impl Writer {
    /// Elects itself; its local WAL begins at the end of the log.
    fn elect(cluster: &Cluster, term: u64) -> Self {
        let writer = WriterId([term as u8; 16]);
        cluster.fence(term, writer);
        let (sender, events) = mpsc::channel();
        let grant = Grant { term: Term(term), writer };
        let mut this = Writer {
            proposer: Proposer::new(grant, Incarnation([term as u8; 16]), cluster.configuration.clone()),
            generator: WalWriter::new(START, Lsn::INVALID, SEGMENT_BYTES, SYSTEM, PgTimeline(1)),
            wal: Vec::new(),
            wal_start: START,
            links: BTreeMap::new(),
            next_link: 0,
            events,
            sender,
            committed: Lsn::INVALID,
            fenced: false,
        };
        this.run(|this| this.proposer.start().is_some());
        let start = this.proposer.start().unwrap();
        this.generator = WalWriter::new(start.record_end, start.record_start, SEGMENT_BYTES, SYSTEM, PgTimeline(1));
        this.wal_start = start.record_end;
        this
    }

    /// Writes about `bytes` of records and waits until they are committed.
    fn commit(&mut self, bytes: usize) -> Lsn {
        let end = self.write(bytes);
        self.run(|this| this.committed >= end);
        end
    }

    fn write(&mut self, bytes: usize) -> Lsn {
        let before = self.wal.len();
        while self.wal.len() < before + bytes {
            let size = 100 + self.wal.len() % 20_000;
            let data: Vec<u8> = (0..size).map(|i| (i * 7 + self.wal.len()) as u8).collect();
            let payload = main_data(&data);
            self.generator.append(RecordSpec { rmgr: rmgr::XLOG, info: 0x20, xid: 0, payload: &payload });
            self.wal.extend(self.generator.take_bytes());
        }
        let end = self.wal_start.advance(self.wal.len() as u64);
        self.proposer.handle_wal(self.wal_start, end, driver::now());
        self.carry_out();
        end
    }

    /// Handles events until `done`.
    fn run(&mut self, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.carry_out();
            if done(self) {
                return;
            }
            assert!(Instant::now() < deadline, "waited too long; committed {}", self.committed);
            let now = driver::now();
            let wait = self.proposer.poll_timeout().map_or(Duration::from_millis(100), |at| at.since(now));
            match self.events.recv_timeout(wait) {
                Ok(event) => self.handle(event),
                Err(_) => self.proposer.handle_timeout(driver::now()),
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let now = driver::now();
        let current = |member, link| self.links.get(&member).is_some_and(|(current, _)| *current == link);
        match event {
            Event::Status(member, link, status) if current(member, link) => {
                self.proposer.handle_connected(member, &status, now);
            }
            Event::Message(member, link, message) if current(member, link) => {
                self.proposer.handle_message(member, message, now);
            }
            Event::Gone(member, link) if current(member, link) => {
                self.links.remove(&member);
                self.proposer.handle_disconnected(member, now);
            }
            Event::Status(..) | Event::Message(..) | Event::Gone(..) => {}
        }
    }

    fn carry_out(&mut self) {
        while let Some(command) = self.proposer.poll_command() {
            match command {
                ProposerCommand::Connect { member, address } => self.connect(member, &address),
                ProposerCommand::Disconnect { member } => {
                    if let Some((_, stream)) = self.links.remove(&member) {
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                }
                ProposerCommand::Send { member, message } => self.send(member, &Message::Proposer(message, &[])),
                ProposerCommand::SendWal { member, append } => {
                    let range = append.begin_lsn.bytes_since(self.wal_start) as usize
                        ..append.end_lsn.bytes_since(self.wal_start) as usize;
                    let bytes = self.wal[range].to_vec();
                    self.send(member, &Message::Proposer(ProposerMessage::Append(append), &bytes));
                }
                ProposerCommand::Committed { commit_lsn } => self.committed = commit_lsn,
                ProposerCommand::Fenced { .. } => self.fenced = true,
                ProposerCommand::Elected { .. }
                | ProposerCommand::Lease { .. }
                | ProposerCommand::Quorum { .. }
                | ProposerCommand::Trouble { .. } => {}
            }
        }
    }

    fn connect(&mut self, member: MemberId, address: &str) {
        self.next_link += 1;
        let link = self.next_link;
        let Ok(stream) = TcpStream::connect(address) else {
            return self.proposer.handle_disconnected(member, driver::now());
        };
        stream.set_nodelay(true).unwrap();
        self.links.insert(member, (link, stream.try_clone().unwrap()));
        self.send(member, &Message::Hello(hello(Purpose::Propose)));
        let sender = self.sender.clone();
        thread::spawn(move || {
            let _ = receive(member, link, stream, &sender);
            let _ = sender.send(Event::Gone(member, link));
        });
    }

    fn send(&mut self, member: MemberId, message: &Message<'_>) {
        if let Some((_, stream)) = self.links.get_mut(&member) {
            // A broken connection is noticed by its reading thread.
            let _ = stream.write_all(&encode_to_vec(message).unwrap());
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        for (_, stream) in self.links.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn receive(member: MemberId, link: u64, mut stream: TcpStream, sender: &mpsc::Sender<Event>) -> std::io::Result<()> {
    let mut frames = FrameReader::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        frames.feed(&buffer[..count]);
        while let Some(frame) = frames.next().map_err(std::io::Error::other)? {
            let event = match decode(frame).map_err(std::io::Error::other)? {
                Message::Acceptor(AcceptorMessage::Status(status)) => Event::Status(member, link, status),
                Message::Acceptor(message) => Event::Message(member, link, message),
                other => return Err(std::io::Error::other(format!("{other:?}"))),
            };
            sender.send(event).map_err(std::io::Error::other)?;
        }
    }
}

/// A safekeeper dies while WAL flows, the writer is replaced by one that has none of the old WAL, the dead one comes back:
/// nothing committed is missing anywhere, and the old writer gets no acknowledgement any more.
fn a_killed_safekeeper_catches_up_from_its_peers(name: &str, variant: Variant) {
    let mut cluster = Cluster::new(name, variant);
    let mut first = Writer::elect(&cluster, 1);
    first.commit(1000);
    first.write(3 << 20);
    cluster.safekeepers[2].kill();
    first.commit(20 << 20);

    let mut second = Writer::elect(&cluster, 2);
    let handed_over = second.wal_start;
    assert!(handed_over >= first.committed);
    let end = second.commit(2 << 20);
    first.write(1000);
    let before = first.committed;
    first.run(|this| this.fenced);
    assert_eq!(before, first.committed);

    cluster.safekeepers[2].start();
    second.run(|this| this.proposer.members().all(|(_, follows, flush_lsn)| follows && flush_lsn >= end));
    for key in ["flush_lsn", "commit_lsn"] {
        eventually(key, || {
            second.proposer.handle_timeout(driver::now());
            second.carry_out();
            cluster.safekeepers.iter().all(|safekeeper| safekeeper.position(key) == end)
        });
    }
    assert!(cluster.safekeepers[2].log_text().contains("caught up"), "it got its WAL from somewhere else");
    let mut expected = first.wal[..handed_over.bytes_since(START) as usize].to_vec();
    expected.extend_from_slice(&second.wal);
    for safekeeper in &cluster.safekeepers {
        assert!(expected == safekeeper.read(end), "member {}", safekeeper.member);
    }

    // All of them die at once: what was committed is on their disks.
    drop(second);
    for safekeeper in &mut cluster.safekeepers {
        safekeeper.kill();
    }
    for safekeeper in &mut cluster.safekeepers {
        safekeeper.start();
        assert_eq!(end, safekeeper.position("flush_lsn"));
    }
    let mut third = Writer::elect(&cluster, 3);
    assert_eq!(end, third.wal_start);
    third.commit(1000);
}

#[test]
fn a_killed_safekeeper_catches_up() {
    a_killed_safekeeper_catches_up_from_its_peers("catch-up", Variant::default());
}

#[test]
fn a_killed_safekeeper_catches_up_without_io_uring_and_with_several_cores() {
    a_killed_safekeeper_catches_up_from_its_peers("polling", Variant { polling: true, cores: 3 });
}

/// Each visitor that does not belong here is told so, once in the log, and the others do not notice.
#[test]
fn strangers_are_told_why_they_are_refused() {
    let cluster = Cluster::new("strangers", Variant::default());
    let safekeeper = &cluster.safekeepers[0];
    let good = hello(Purpose::Propose);
    let other_cluster = Hello { log: LogId { cluster: ClusterId([9; 16]), ..log() }, ..good };
    let other_system = Hello { system_id: SystemId(1), ..good };
    let mut other_version = encode_to_vec(&Message::Hello(good)).unwrap();
    other_version[wire::append::HEADER_BYTES + 8] = 99;
    let refusals: [(Vec<u8>, ErrorCode); 6] = [
        (encode_to_vec(&Message::Hello(other_cluster)).unwrap(), ErrorCode::UnknownLog),
        (encode_to_vec(&Message::Hello(other_system)).unwrap(), ErrorCode::WrongSystem),
        (other_version, ErrorCode::WrongVersion),
        (encode_to_vec(&Message::AskBallot).unwrap(), ErrorCode::BadMessage),
        (vec![0xAB; 100_000], ErrorCode::BadMessage),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), ErrorCode::BadMessage),
    ];
    for _ in 0..3 {
        for (first, code) in &refusals {
            let (found, text) = safekeeper.connect(first).error();
            assert_eq!((*code, false), (found, text.is_empty()));
        }
    }
    let mut proposer = safekeeper.greet(good);
    proposer.next(|message| assert!(matches!(message, Message::Acceptor(AcceptorMessage::Status(_))), "{message:?}"));
    proposer.stream.write_all(&encode_to_vec(&Message::AskBallot).unwrap()).unwrap();
    assert_eq!(ErrorCode::BadMessage, proposer.error().0);
    let mut reader = safekeeper.greet(hello(Purpose::Read { begin_lsn: Lsn(8) }));
    assert_eq!(ErrorCode::WalNotAvailable, reader.error().0);

    let warnings =
        safekeeper.log_text().lines().filter(|line| line.contains("refused") && line.contains("WARN")).count();
    assert!((4..=refusals.len() + 2).contains(&warnings), "{warnings} lines:\n{}", safekeeper.log_text());
    assert_eq!(START, safekeeper.position("flush_lsn"));
}

/// One flipped bit in a sealed segment: it is reported and never served, the rest of the log is.
#[test]
fn a_damaged_segment_is_reported_and_not_served() {
    let mut cluster = Cluster::new("damage", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let end = writer.commit(18 << 20);
    let victim = &mut cluster.safekeepers[0];
    let sealed = |path: PathBuf| std::fs::read(path).is_ok_and(|file| file[SEGMENT_BYTES as usize..][..8] != [0; 8]);
    writer.run(|_| sealed(victim.segment(START)));
    victim.kill();
    let path = victim.segment(START);
    let mut file = std::fs::read(&path).unwrap();
    file[9_000_000] ^= 0x10;
    std::fs::write(&path, file).unwrap();
    victim.start();

    let mut reader = victim.greet(hello(Purpose::Read { begin_lsn: START }));
    assert_eq!(ErrorCode::WalDamaged, reader.error().0);
    assert!(victim.log_text().contains("is damaged"));
    let behind = START.advance(SEGMENT_BYTES);
    let mut reader = victim.greet(hello(Purpose::Read { begin_lsn: behind }));
    reader.next(|message| match message {
        Message::WalData(data) => assert_eq!(writer.wal[SEGMENT_BYTES as usize..][..data.bytes.len()], *data.bytes),
        other => panic!("{other:?}"),
    });
    assert_eq!(writer.wal.len() as u64, end.bytes_since(START));
}
