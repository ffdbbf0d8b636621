//! The append port: greets connections, brings each to the core of its log, and serves proposers, peers and readers.

use std::{
    cell::Cell,
    io,
    net::IpAddr,
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use consensus::message::{AcceptorMessage, ProposerMessage};
use driver::{Closer, Connection, Detached, Listener, Reader};
use futures_util::future::Either;
use identity::Call;
use layers::Striping;
use logstore::Reader as LogReader;
use pgtypes::Lsn;
use wire::append::{
    BallotAnswer, ErrorCode, ErrorFrame, FrameReader, Hello, MAX_APPEND_BYTES, Message, Purpose, WalData, WireError,
    decode, encode,
};

use crate::{
    core::Core,
    feed::{self, Subscription},
    files::ReadError,
    greetings::{GREETINGS_MAX, Greetings},
    log::LogDriver,
    outbox::Outbox,
    process::Process,
};

/// Connections of the append port at a time; more are told that the safekeeper is busy. 1,000 logs have a proposer each.
const CONNECTIONS_MAX: usize = 4096;

/// Time for the TLS handshake, and again for the greeting.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// Time for a refused peer to read why.
pub(crate) const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// How often a reader is told the commit position while nothing is committed.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Pause after a failed `accept`, which fails at once again while the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Bytes of a small message: reads below it say that little is expected.
const SMALL_READ_BYTES: usize = 512;

/// Small reads in a row after which a connection counts as idle and gets a small buffer.
const SMALL_READS: u32 = 8;

/// Spare capacity for the next read while each read fills the buffer: fewer system calls and fewer frames cut in two.
const LARGE_READ_BYTES: usize = 256 << 10;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// One of the connections that are counted against the bound.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let taken =
            OPEN.fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| (open < CONNECTIONS_MAX).then_some(open + 1));
        taken.ok().map(|_| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A connection on its way to the core of its log.
struct Visitor {
    peer: IpAddr,
    frames: FrameReader,
    _place: Place,
}

/// Accepts connections until the process is ending.
pub async fn accept(core: Rc<Core>, listener: Listener) {
    let greetings = Greetings::new(GREETINGS_MAX);
    loop {
        let accepted = {
            let accept = std::pin::pin!(listener.accept());
            let stopping = std::pin::pin!(core.until_stopping());
            match futures_util::future::select(accept, stopping).await {
                Either::Left((accepted, _)) => accepted,
                Either::Right(_) => return,
            }
        };
        match accepted {
            Ok(connection) => {
                driver::spawn(greet(core.clone(), connection, greetings.clone()));
            }
            Err(error) => {
                if core.process.notices.is_new("accept", driver::now()) {
                    tracing::error!(%error, "cannot accept connections of the append port");
                }
                driver::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Ends a connection from outside unless it is disarmed in time.
pub(crate) fn watch(closer: Closer, limit: Duration) -> Rc<Cell<bool>> {
    let disarmed = Rc::new(Cell::new(false));
    let seen = disarmed.clone();
    driver::spawn(async move {
        driver::sleep(limit).await;
        if !seen.get() {
            closer.close();
        }
    });
    disarmed
}

async fn greet(core: Rc<Core>, connection: Connection, greetings: Rc<Greetings>) {
    // A peer that is gone already has no address, and nobody to be served.
    let Ok(peer) = connection.peer_address().map(|address| address.ip()) else { return };
    let process = &core.process;
    let (guest, oldest) = greetings.enter(connection.closer());
    if let Some(oldest) = oldest {
        oldest.close();
        note(process, peer, "crowd", &format!("{GREETINGS_MAX} connections wait to be greeted: the oldest was closed"));
    }
    let mut connection = connection;
    if let Some(tls) = &process.tls {
        connection = match driver::timeout(GREETING_LIMIT, connection.upgrade_server(tls.server_config())).await {
            Some(Ok(connection)) => connection,
            Some(Err(error)) if is_gone(&error) => return,
            Some(Err(error)) => return note(process, peer, "tls", &format!("TLS handshake failed: {error}")),
            None => return note(process, peer, "tls", "TLS handshake took too long"),
        };
    }
    let Some(place) = Place::take() else {
        let text = format!("{CONNECTIONS_MAX} connections are open");
        return refuse(process, peer, connection, ErrorCode::Busy, text).await;
    };
    let mut frames = FrameReader::new();
    let disarm = watch(connection.closer(), GREETING_LIMIT);
    let greeting = read_hello(&mut connection, &mut frames).await;
    disarm.set(true);
    drop(guest);
    let hello = match greeting {
        Ok(Some(hello)) => hello,
        Ok(None) => return,
        Err(Greeting::Io(error)) if is_gone(&error) => return,
        Err(Greeting::Io(error)) => return note(process, peer, "greeting", &format!("no greeting: {error}")),
        Err(Greeting::Wire(error)) => {
            let code = if matches!(error, WireError::WrongVersion { .. }) {
                ErrorCode::WrongVersion
            } else {
                ErrorCode::BadMessage
            };
            return refuse(process, peer, connection, code, error.to_string()).await;
        }
        Err(Greeting::Other) => {
            let text = "the first message must be a greeting".to_owned();
            return refuse(process, peer, connection, ErrorCode::BadMessage, text).await;
        }
    };
    let call = match hello.purpose {
        Purpose::Propose => Call::Propose,
        Purpose::Peer => Call::Peer,
        Purpose::Read { .. } => Call::ReadWal,
        Purpose::Feed { .. } => Call::Feed,
    };
    let caller = process.caller(connection.peer_certificate().as_deref());
    if let Err(error) = caller.and_then(|caller| caller.authorize(call, hello.log.cluster)) {
        return refuse(process, peer, connection, ErrorCode::NotAllowed, error.to_string()).await;
    }
    let visitor = Visitor { peer, frames, _place: place };
    let owner = process.core_of(hello.log);
    if owner == core.index {
        return serve(core, connection, hello, visitor).await;
    }
    match connection.detach() {
        Ok(moved) => {
            // A core that takes no requests is overloaded or ending: the peer sees its connection close and tries again.
            let _ = process.send(owner, move |core| arrive(core.clone(), moved, hello, visitor));
        }
        Err(error) => note(process, peer, "move", &format!("connection cannot be moved to its core: {error}")),
    }
}

fn arrive(core: Rc<Core>, moved: Detached, hello: Hello, visitor: Visitor) {
    match moved.attach() {
        Ok(connection) => {
            driver::spawn(serve(core, connection, hello, visitor));
        }
        Err(error) => {
            note(&core.process, visitor.peer, "move", &format!("connection cannot be moved to its core: {error}"));
        }
    }
}

enum Greeting {
    Io(io::Error),
    Wire(WireError),
    Other,
}

async fn read_hello(connection: &mut Connection, frames: &mut FrameReader) -> Result<Option<Hello>, Greeting> {
    loop {
        match frames.next().map_err(Greeting::Wire)? {
            Some(frame) => match decode(frame).map_err(Greeting::Wire)? {
                Message::Hello(hello) => return Ok(Some(hello)),
                _ => return Err(Greeting::Other),
            },
            None => {
                let (result, buffer) = connection.read(frames.take_buffer(true)).await;
                frames.return_buffer(buffer);
                if result.map_err(Greeting::Io)? == 0 {
                    return Ok(None);
                }
            }
        }
    }
}

/// Whether the peer went away before it had said anything: a probe, or a process that ended. Nobody needs to look at it.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// Logs a problem with a peer, once.
fn note(process: &Process, peer: IpAddr, kind: &str, text: &str) {
    process.metrics.count_refusal("connection");
    if process.notices.is_new(&format!("{peer} {kind}"), driver::now()) {
        tracing::warn!(%peer, "{text}");
    }
}

/// Tells the peer why, and ends the connection.
async fn refuse(process: &Process, peer: IpAddr, mut connection: Connection, code: ErrorCode, text: String) {
    note(process, peer, &format!("{code:?}"), &format!("connection refused: {text}"));
    let mut out = Vec::new();
    if encode(&Message::Error(ErrorFrame { code, text }), &mut out).is_ok() {
        let disarm = watch(connection.closer(), FAREWELL_LIMIT);
        // The peer may be gone; then there is nobody to be told.
        let _ = connection.write_all(out).await;
        let (reader, mut writer) = connection.into_split();
        let _ = writer.shutdown().await;
        drain(reader).await;
        disarm.set(true);
    }
}

/// Reads until the peer closes: closing before it has sent everything would reset the connection, and the peer could
/// lose the last message that it was sent. The caller limits the time by a closer.
pub(crate) async fn drain(mut reader: Reader) {
    let mut buffer = Vec::with_capacity(4096);
    loop {
        buffer.clear();
        let (result, returned) = reader.read(buffer).await;
        buffer = returned;
        if !matches!(result, Ok(count) if count > 0) {
            return;
        }
    }
}

async fn serve(core: Rc<Core>, connection: Connection, hello: Hello, visitor: Visitor) {
    let process = core.process.clone();
    let peer = visitor.peer;
    let Some(log) = core.log(hello.log) else {
        let damaged =
            process.damaged().iter().any(|log| (log.cluster, log.branch) == (hello.log.cluster, hello.log.branch));
        let text = match damaged {
            true => format!("log {} is damaged on this safekeeper", hello.log),
            false => format!("there is no log {} on this safekeeper", hello.log),
        };
        return refuse(&process, peer, connection, ErrorCode::UnknownLog, text).await;
    };
    let system = log.system();
    if hello.system_id.0 != 0 && hello.system_id != system {
        let text = format!("log {} belongs to system {}, not {}", hello.log, system.0, hello.system_id.0);
        return refuse(&process, peer, connection, ErrorCode::WrongSystem, text).await;
    }
    let purpose = match hello.purpose {
        Purpose::Propose => "propose",
        Purpose::Peer => "peer",
        Purpose::Read { .. } => "read",
        Purpose::Feed { .. } => "feed",
    };
    let _counted = process.metrics.count_connection(purpose);
    match hello.purpose {
        Purpose::Propose => propose(&log, connection, visitor).await,
        Purpose::Peer => answer_peer(&log, connection, visitor).await,
        Purpose::Read { begin_lsn } => stream(&log, connection, visitor, begin_lsn).await,
        Purpose::Feed { shard, generation, range, stripe_blocks, from } => {
            let striping = Striping { stripe_blocks };
            let subscription = Subscription { shard, generation, range, striping, from };
            if let Some((code, text)) = feed::serve(&log, connection, visitor.frames, subscription).await {
                note(&process, peer, &format!("feed {code:?}"), &format!("feed of shard {} ended: {text}", shard.0));
            }
        }
    }
}

/// Why a conversation ended, when the other side is to be told.
pub(crate) type Farewell = Option<(ErrorCode, String)>;

async fn propose(log: &Rc<LogDriver>, connection: Connection, mut visitor: Visitor) {
    let process = log.process().clone();
    let id = process.next_connection();
    let closer = connection.closer();
    let outbox = Rc::new(Outbox::new(connection.closer()));
    let (mut reader, mut writer) = connection.into_split();
    outbox.push(&Message::Acceptor(AcceptorMessage::Status(log.status())));
    log.connect(id, outbox.clone());
    let sending = outbox.clone();
    let sender = driver::spawn(async move {
        sending.send_all(&mut writer).await;
        // Fails when the connection is gone, and then there is nothing to be shut down.
        let _ = writer.shutdown().await;
    });
    let farewell = receive_proposals(log, id, &mut reader, &mut visitor.frames).await;
    log.disconnect(id);
    if let Some((code, text)) = farewell {
        note(&process, visitor.peer, &format!("{code:?}"), &format!("proposer's connection ended: {text}"));
        outbox.push(&Message::Error(ErrorFrame { code, text }));
    }
    outbox.close();
    let disarm = watch(closer, FAREWELL_LIMIT);
    sender.await;
    drain(reader).await;
    disarm.set(true);
}

async fn receive_proposals(log: &Rc<LogDriver>, id: u64, reader: &mut Reader, frames: &mut FrameReader) -> Farewell {
    let mut small_reads = 0;
    let mut filled = false;
    loop {
        loop {
            let frame = match frames.next() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => return Some((ErrorCode::BadMessage, error.to_string())),
            };
            let now = driver::now();
            match decode(frame) {
                Ok(Message::Proposer(ProposerMessage::Append(append), payload)) => {
                    log.handle_append(id, &append, payload, now);
                }
                Ok(Message::Proposer(message, _)) => log.handle_message(id, message, now),
                Ok(other) => {
                    let text = format!("a proposer may not send {:?}", other.message_type());
                    return Some((ErrorCode::BadMessage, text));
                }
                Err(error) => return Some((ErrorCode::BadMessage, error.to_string())),
            }
        }
        log.until_room().await;
        if log.is_closed() {
            return Some((ErrorCode::Stopping, "this safekeeper is stopping, or the log was deleted".to_owned()));
        }
        let mut buffer = frames.take_buffer(small_reads >= SMALL_READS);
        if filled {
            buffer.reserve(LARGE_READ_BYTES);
        }
        let (result, buffer) = reader.read(buffer).await;
        filled = buffer.len() == buffer.capacity();
        frames.return_buffer(buffer);
        match result {
            Ok(0) if frames.has_partial_frame() => {
                return Some((ErrorCode::BadMessage, "the stream ended inside a message".to_owned()));
            }
            // The connection's end is the proposer's business: it reconnects.
            Ok(0) | Err(_) => return None,
            Ok(count) => small_reads = if count < SMALL_READ_BYTES { small_reads + 1 } else { 0 },
        }
    }
}

async fn answer_peer(log: &Rc<LogDriver>, mut connection: Connection, mut visitor: Visitor) {
    let farewell = loop {
        let request = match visitor.frames.next() {
            Ok(Some(frame)) => match decode(frame) {
                Ok(Message::FetchWal(fetch)) => Some(fetch),
                Ok(Message::AskBallot) => None,
                Ok(other) => break (ErrorCode::BadMessage, format!("a peer may not send {:?}", other.message_type())),
                Err(error) => break (ErrorCode::BadMessage, error.to_string()),
            },
            Ok(None) => {
                let (result, buffer) = connection.read(visitor.frames.take_buffer(true)).await;
                visitor.frames.return_buffer(buffer);
                match result {
                    Ok(0) | Err(_) => return,
                    Ok(_) => continue,
                }
            }
            Err(error) => break (ErrorCode::BadMessage, error.to_string()),
        };
        if log.is_closed() {
            break (ErrorCode::Stopping, "this safekeeper is stopping, or the log was deleted".to_owned());
        }
        let mut out = Vec::new();
        let encoded = match request {
            None => {
                let status = log.status();
                let answer = BallotAnswer { ballot: status.ballot, writer: status.writer };
                encode(&Message::BallotAnswer(answer), &mut out)
            }
            Some(fetch) => {
                let reader = LogReader::Peer(fetch.ballot);
                match log.read(fetch.begin_lsn, fetch.end_lsn, MAX_APPEND_BYTES as usize, reader).await {
                    Ok(bytes) => {
                        let commit_lsn = log.with(|log| log.acceptor().commit_lsn());
                        encode_wal(&mut out, fetch.begin_lsn, commit_lsn, &bytes)
                    }
                    Err(error) => break farewell_of(&error),
                }
            }
        };
        if let Err(error) = encoded {
            break (ErrorCode::Internal, error.to_string());
        }
        if connection.write_all(out).await.0.is_err() {
            return;
        }
    };
    refuse(log.process(), visitor.peer, connection, farewell.0, farewell.1).await;
}

pub(crate) fn farewell_of(error: &ReadError) -> (ErrorCode, String) {
    let code = match error {
        ReadError::NotAvailable { .. } => ErrorCode::WalNotAvailable,
        ReadError::Damaged { .. } | ReadError::KnownDamaged { .. } => ErrorCode::WalDamaged,
        ReadError::Io { .. } => ErrorCode::Internal,
    };
    (code, error.to_string())
}

fn encode_wal(out: &mut Vec<u8>, begin_lsn: Lsn, commit_lsn: Lsn, bytes: &[u8]) -> Result<(), WireError> {
    encode(&Message::WalData(WalData { begin_lsn, commit_lsn, bytes }), out)?;
    out.extend_from_slice(bytes);
    Ok(())
}

async fn stream(log: &Rc<LogDriver>, mut connection: Connection, visitor: Visitor, begin_lsn: Lsn) {
    let mut position = begin_lsn;
    let farewell = loop {
        if log.is_closed() {
            break (ErrorCode::Stopping, "this safekeeper is stopping, or the log was deleted".to_owned());
        }
        let mut out = Vec::new();
        let commit_lsn = log.with(|log| log.acceptor().commit_lsn());
        // Nothing to wait for is an error that the read itself explains.
        let result = if log.with(|log| log.readable(position, LogReader::Anyone).map_or(true, |end| end > position)) {
            match log.read_wal(position, MAX_APPEND_BYTES as usize).await {
                Ok(bytes) => {
                    let result = encode_wal(&mut out, position, commit_lsn, &bytes);
                    position = position.advance(bytes.len() as u64);
                    result
                }
                Err(error) => break farewell_of(&error),
            }
        } else {
            let more = log.until(|log| (log.acceptor().readable_until() > position).then_some(()));
            if driver::timeout(HEARTBEAT, more).await.is_some() {
                continue;
            }
            encode_wal(&mut out, position, commit_lsn, &[])
        };
        if let Err(error) = result {
            break (ErrorCode::Internal, error.to_string());
        }
        if connection.write_all(out).await.0.is_err() {
            return;
        }
    };
    refuse(log.process(), visitor.peer, connection, farewell.0, farewell.1).await;
}
