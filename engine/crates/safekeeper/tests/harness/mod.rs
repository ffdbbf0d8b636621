//! Real safekeeper processes, and the real proposer with made-up WAL around them, over real sockets.
#![allow(dead_code, reason = "each test crate uses its own part")]

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

pub const SEGMENT_BYTES: u64 = 16 << 20;
pub const START: Lsn = Lsn(SEGMENT_BYTES);
pub const SYSTEM: SystemId = SystemId(7_300_000_000_000_000_001);
/// Names the configuration file of a child process.
const CONFIG: &str = "SAFEKEEPER_TEST_CONFIG";
/// Everything here takes milliseconds; a machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn log() -> LogId {
    LogId { cluster: ClusterId([0x11; 16]), branch: BranchId([0x22; 16]) }
}

pub fn log_path() -> String {
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
pub struct Variant {
    pub polling: bool,
    pub cores: u16,
}

pub struct Safekeeper {
    pub member: u32,
    pub directory: PathBuf,
    pub variant: Variant,
    pub append: u16,
    pub admin: u16,
    pub child: Option<Child>,
}

/// A port below the range from which the kernel takes ports of outgoing connections: one of those could take a port of
/// ours while its process is down.
pub fn free_port() -> u16 {
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
    pub fn new(root: &Path, member: u32, variant: Variant) -> Self {
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

    pub fn start(&mut self) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "harness::child_process_runs_a_safekeeper", "--nocapture"])
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
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn try_call(&self, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
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

    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let (status, answer) = self.try_call(method, path, body).unwrap();
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    pub fn position(&self, key: &str) -> Lsn {
        self.call("GET", &log_path(), None)[key].as_str().unwrap().parse().unwrap()
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap()
    }

    pub fn segment(&self, start: Lsn) -> PathBuf {
        self.directory.join(format!("data/logs/{}/wal/{:016X}", log(), start.0))
    }

    /// Opens a connection of the append protocol and sends `first`.
    pub fn connect(&self, first: &[u8]) -> Conversation {
        let mut stream = TcpStream::connect(("127.0.0.1", self.append)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(first).unwrap();
        Conversation { stream, frames: FrameReader::new() }
    }

    pub fn greet(&self, hello: Hello) -> Conversation {
        self.connect(&encode_to_vec(&Message::Hello(hello)).unwrap())
    }

    /// The committed WAL `[START, until)` as a reader gets it.
    pub fn read(&self, until: Lsn) -> Vec<u8> {
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

pub fn hello(purpose: Purpose) -> Hello {
    Hello { log: log(), system_id: SYSTEM, purpose }
}

pub struct Conversation {
    pub stream: TcpStream,
    pub frames: FrameReader,
}

impl Conversation {
    /// Gives the next message to `take`.
    pub fn next<T>(&mut self, take: impl FnOnce(Message<'_>) -> T) -> T {
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

    pub fn error(&mut self) -> (ErrorCode, String) {
        self.next(|message| match message {
            Message::Error(error) => (error.code, error.text),
            other => panic!("{other:?}"),
        })
    }
}

pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub struct Cluster {
    pub safekeepers: Vec<Safekeeper>,
    pub configuration: Configuration,
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
    pub fn new(name: &str, variant: Variant) -> Self {
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

    pub fn fence(&self, term: u64, writer: WriterId) {
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
pub struct Writer {
    pub proposer: Proposer,
    pub generator: WalWriter,
    /// Local WAL from `wal_start` on.
    pub wal: Vec<u8>,
    pub wal_start: Lsn,
    pub links: BTreeMap<MemberId, (u64, TcpStream)>,
    pub next_link: u64,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    pub committed: Lsn,
    pub fenced: bool,
}

impl Writer {
    /// Elects itself; its local WAL begins at the end of the log.
    pub fn elect(cluster: &Cluster, term: u64) -> Self {
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
    pub fn commit(&mut self, bytes: usize) -> Lsn {
        let end = self.write(bytes);
        self.run(|this| this.committed >= end);
        end
    }

    pub fn write(&mut self, bytes: usize) -> Lsn {
        let before = self.wal.len();
        while self.wal.len() < before + bytes {
            let size = 100 + self.wal.len() % 20_000;
            let data: Vec<u8> = (0..size).map(|i| (i * 7 + self.wal.len()) as u8).collect();
            let payload = main_data(&data);
            self.put(RecordSpec { rmgr: rmgr::XLOG, info: 0x20, xid: 0, payload: &payload });
        }
        self.propose()
    }

    /// Generates a record, which waits for [`Writer::propose`].
    pub fn put(&mut self, record: RecordSpec<'_>) {
        self.generator.append(record);
        self.wal.extend(self.generator.take_bytes());
    }

    /// Sends what was generated.
    pub fn propose(&mut self) -> Lsn {
        let end = self.wal_start.advance(self.wal.len() as u64);
        self.proposer.handle_wal(self.wal_start, end, driver::now());
        self.carry_out();
        end
    }

    /// Handles events until `done`.
    pub fn run(&mut self, done: impl Fn(&Self) -> bool) {
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

    pub fn carry_out(&mut self) {
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

    pub fn connect(&mut self, member: MemberId, address: &str) {
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

    pub fn send(&mut self, member: MemberId, message: &Message<'_>) {
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
