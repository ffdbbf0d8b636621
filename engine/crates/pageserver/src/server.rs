//! The page port: greets readers, and answers many requests of each at once, in whatever order they become ready.

use std::{
    cell::Cell,
    io,
    net::IpAddr,
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use driver::{Closer, Connection, Event, Listener, Reader};
use futures_util::future::Either;
use identity::{Call, Caller};
use layers::ShardGeneration;
use wire::{
    append::WireError,
    page::{
        PageErrorCode, PageFailed, PageFrameReader, PageHello, PageMessage, PageProgress, PageWelcome, ReaderRole,
        decode, encode_to_vec,
    },
};

use crate::{answer, outbox::Outbox, owner::Owner, read::yield_now};

/// Connections at a time; more are told that the server is busy.
const CONNECTIONS_MAX: usize = 1024;

/// Time for the TLS handshake, and again for the greeting.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// Time for a refused reader to see why.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// How often a reader is told how far the shard is, while it moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// How often a reader that waits for answers is told something even when nothing moves: it takes 10 s of silence for a server
/// that is frozen.
const SIGN_OF_LIFE_INTERVAL: Duration = Duration::from_secs(1);

/// Pause after a failed `accept`, which fails at once again while the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Requests of one connection that are worked on at once; the rest stays in its socket.
const REQUESTS_MAX: usize = 1024;

/// Answers from memory before other tasks get their turn.
const QUICK_ANSWERS_PER_TURN: usize = 64;

/// Answers that may wait for a slow reader before its next requests are looked at.
const ANSWERS_BYTES_MAX: usize = 16 << 20;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// One of the connections that are counted against the bound.
struct Place(prometheus_client::metrics::gauge::Gauge);

impl Place {
    fn take(owner: &Owner) -> Option<Self> {
        let taken =
            OPEN.fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| (open < CONNECTIONS_MAX).then_some(open + 1));
        taken.ok()?;
        let gauge = owner.process.metrics.connections.clone();
        gauge.inc();
        Some(Place(gauge))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.dec();
        OPEN.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A reader that was let in.
pub struct Session {
    /// Number of the connection: whose lease it is.
    pub number: u64,
    /// What it is.
    pub role: ReaderRole,
    /// Who it is.
    pub caller: Caller,
    /// Its answers.
    pub outbox: Rc<Outbox>,
    in_flight: Cell<usize>,
    done: Event,
}

/// Accepts readers until the process is ending.
pub async fn accept(owner: Rc<Owner>, listener: Listener) {
    let mut number = 0;
    loop {
        let accepted = {
            let accept = std::pin::pin!(listener.accept());
            let stopping = std::pin::pin!(owner.until_stopping());
            match futures_util::future::select(accept, stopping).await {
                Either::Left((accepted, _)) => accepted,
                Either::Right(_) => return,
            }
        };
        match accepted {
            Ok(connection) => {
                number += 1;
                driver::spawn(greet(owner.clone(), connection, number));
            }
            Err(error) => {
                if owner.process.notices.is_new("accept", driver::now()) {
                    tracing::error!(%error, "cannot accept connections of the page port");
                }
                driver::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Ends a connection from outside unless it is disarmed in time.
fn watch(closer: Closer, limit: Duration) -> Rc<Cell<bool>> {
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

async fn greet(owner: Rc<Owner>, connection: Connection, number: u64) {
    // A reader that is gone already has no address, and nobody to be served.
    let Ok(peer) = connection.peer_address().map(|address| address.ip()) else { return };
    let mut connection = connection;
    if let Some(tls) = &owner.process.tls {
        connection = match driver::timeout(GREETING_LIMIT, connection.upgrade_server(tls.server_config())).await {
            Some(Ok(connection)) => connection,
            Some(Err(error)) if is_gone(&error) => return,
            Some(Err(error)) => return note(&owner, peer, "tls", &format!("TLS handshake failed: {error}")),
            None => return note(&owner, peer, "tls", "TLS handshake took too long"),
        };
    }
    let Some(place) = Place::take(&owner) else {
        let text = format!("{CONNECTIONS_MAX} connections are open");
        return refuse(&owner, peer, connection, PageErrorCode::Busy, text).await;
    };
    let mut frames = PageFrameReader::default();
    let disarm = watch(connection.closer(), GREETING_LIMIT);
    let greeting = read_hello(&mut connection, &mut frames).await;
    disarm.set(true);
    let hello = match greeting {
        Ok(Some(hello)) => hello,
        Ok(None) => return,
        Err(Greeting::Io(error)) if is_gone(&error) => return,
        Err(Greeting::Io(error)) => return note(&owner, peer, "greeting", &format!("no greeting: {error}")),
        Err(Greeting::Wire(error)) => {
            let is_version = matches!(error, WireError::WrongVersion { .. });
            let code = if is_version { PageErrorCode::WrongVersion } else { PageErrorCode::BadRequest };
            return refuse(&owner, peer, connection, code, error.to_string()).await;
        }
        Err(Greeting::Other) => {
            let text = "the first message must be a greeting".to_owned();
            return refuse(&owner, peer, connection, PageErrorCode::BadRequest, text).await;
        }
    };
    let caller = match owner.process.caller(connection.peer_certificate().as_deref()) {
        Ok(caller) => caller,
        Err(error) => return refuse(&owner, peer, connection, PageErrorCode::NotAllowed, error.to_string()).await,
    };
    if let Err((code, text)) = admit(&owner, &hello, &caller) {
        return refuse(&owner, peer, connection, code, text).await;
    }
    serve(&owner, connection, frames, hello, caller, number).await;
    drop(place);
}

/// Whether the reader is at the right server and may read.
fn admit(owner: &Owner, hello: &PageHello, caller: &Caller) -> Result<(), (PageErrorCode, String)> {
    if hello.log != owner.log() {
        let text = format!("this is a page server of log {}, not {}", owner.log(), hello.log);
        return Err((PageErrorCode::UnknownLog, text));
    }
    caller.authorize(Call::ReadPages, hello.log.cluster).map_err(|e| (PageErrorCode::NotAllowed, e.to_string()))?;
    if hello.system_id.0 != 0 && hello.system_id != owner.system_id {
        let text = format!("the log belongs to system {}, not {}", owner.system_id.0, hello.system_id.0);
        return Err((PageErrorCode::UnknownLog, text));
    }
    let any_generation = hello.generation == ShardGeneration(0);
    if hello.shard != owner.shard() || !any_generation && hello.generation != owner.generation() {
        let text = format!(
            "this is shard {} in generation {}, not {} in {}",
            owner.shard().0,
            owner.generation().0,
            hello.shard.0,
            hello.generation.0
        );
        return Err((PageErrorCode::WrongShardOwner, text));
    }
    check_term(owner, hello.role)
}

/// Refuses a writer whose term is over.
///
/// # Errors
/// Code and text for the reader.
pub fn check_term(owner: &Owner, role: ReaderRole) -> Result<(), (PageErrorCode, String)> {
    match role {
        ReaderRole::Writer { term } if term < owner.term() => {
            let text = format!("term {} is over: the log is at term {}", term.0, owner.term().0);
            Err((PageErrorCode::StaleTerm, text))
        }
        _ => Ok(()),
    }
}

enum Greeting {
    Io(io::Error),
    Wire(WireError),
    Other,
}

async fn read_hello(connection: &mut Connection, frames: &mut PageFrameReader) -> Result<Option<PageHello>, Greeting> {
    loop {
        match frames.next().map_err(Greeting::Wire)? {
            Some(frame) => match decode(frame).map_err(Greeting::Wire)? {
                PageMessage::PageHello(hello) => return Ok(Some(hello)),
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

/// Whether the reader went away before it had said anything: a probe, or a process that ended. Nobody needs to look at it.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// Logs a problem with a reader, once.
fn note(owner: &Owner, peer: IpAddr, kind: &str, text: &str) {
    if owner.process.notices.is_new(&format!("{peer} {kind}"), driver::now()) {
        tracing::warn!(%peer, "{text}");
    }
}

/// Tells the reader why, and ends the connection.
async fn refuse(owner: &Owner, peer: IpAddr, mut connection: Connection, code: PageErrorCode, text: String) {
    note(owner, peer, &format!("{code:?}"), &format!("connection refused: {text}"));
    owner.process.metrics.failures.get_or_create(&answer::label_of(code)).inc();
    let Ok(bytes) = encode_to_vec(&PageMessage::PageFailed(PageFailed { id: 0, code, text })) else { return };
    let disarm = watch(connection.closer(), FAREWELL_LIMIT);
    // The reader may be gone; then there is nobody to be told.
    let _ = connection.write_all(bytes).await;
    let (reader, mut writer) = connection.into_split();
    let _ = writer.shutdown().await;
    drain(reader).await;
    disarm.set(true);
}

/// Reads until the reader closes: closing before it has sent everything would reset the connection, and it could lose the last
/// message. The caller limits the time by a closer.
async fn drain(mut reader: Reader) {
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

async fn serve(
    owner: &Rc<Owner>,
    connection: Connection,
    mut frames: PageFrameReader,
    hello: PageHello,
    caller: Caller,
    number: u64,
) {
    let closer = connection.closer();
    let outbox = Rc::new(Outbox::new(connection.closer()));
    let (mut reader, mut writer) = connection.into_split();
    let session = Rc::new(Session {
        number,
        role: hello.role,
        caller,
        outbox: outbox.clone(),
        in_flight: Cell::new(0),
        done: Event::new(),
    });
    let progress = progress_of(owner);
    let welcome = PageWelcome {
        shard: owner.shard(),
        generation: owner.generation(),
        range: owner.range(),
        stripe_blocks: owner.striping.stripe_blocks,
        ingested_lsn: progress.ingested_lsn,
        durable_lsn: progress.durable_lsn,
        horizon_lsn: progress.horizon_lsn,
    };
    outbox.push(&PageMessage::PageWelcome(welcome));
    let sending = outbox.clone();
    let sender = driver::spawn(async move {
        sending.send_all(&mut writer).await;
        // Fails when the connection is gone, and then there is nothing to be shut down.
        let _ = writer.shutdown().await;
    });
    driver::spawn(tell_progress(owner.clone(), session.clone(), progress));
    // A waiting read ends with the connection.
    let (of_stop, stopped) = (owner.clone(), outbox.clone());
    driver::spawn(async move {
        let stopping = std::pin::pin!(of_stop.until_stopping());
        let closed = std::pin::pin!(stopped.until_closed());
        if let Either::Left(_) = futures_util::future::select(stopping, closed).await {
            let text = "this page server is stopping".to_owned();
            let failed = PageFailed { id: 0, code: PageErrorCode::Stopping, text };
            stopped.push(&PageMessage::PageFailed(failed));
            stopped.close();
            driver::sleep(FAREWELL_LIMIT).await;
            stopped.abort();
        }
    });
    if let Some((code, text)) = receive(owner, &session, &mut reader, &mut frames).await {
        owner.process.metrics.failures.get_or_create(&answer::label_of(code)).inc();
        outbox.push(&PageMessage::PageFailed(PageFailed { id: 0, code, text }));
    }
    outbox.close();
    let disarm = watch(closer, FAREWELL_LIMIT);
    sender.await;
    drain(reader).await;
    disarm.set(true);
}

/// Why a conversation ended, when the other side is to be told.
type Farewell = Option<(PageErrorCode, String)>;

async fn receive(
    owner: &Rc<Owner>,
    session: &Rc<Session>,
    reader: &mut Reader,
    frames: &mut PageFrameReader,
) -> Farewell {
    let mut from_memory = answer::FromMemory::new();
    loop {
        let mut quick = 0;
        loop {
            let frame = match frames.next() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => return Some((PageErrorCode::BadRequest, error.to_string())),
            };
            match decode(frame) {
                Ok(PageMessage::GetPages(get)) if from_memory.answer(owner, session, &get).is_some() => {
                    quick += 1;
                    if quick % QUICK_ANSWERS_PER_TURN == 0 {
                        yield_now().await;
                    }
                }
                Ok(message) => {
                    let Some(request) = answer::Request::of(message) else {
                        return Some((PageErrorCode::BadRequest, "a reader may not send this".to_owned()));
                    };
                    session.in_flight.set(session.in_flight.get() + 1);
                    let (owner, session) = (owner.clone(), session.clone());
                    driver::spawn(async move {
                        answer::answer(&owner, &session, request).await;
                        session.in_flight.set(session.in_flight.get() - 1);
                        session.done.set();
                    });
                }
                Err(error) => return Some((PageErrorCode::BadRequest, error.to_string())),
            }
            session.done.until(|| (session.in_flight.get() < REQUESTS_MAX).then_some(())).await;
            session.outbox.until_below(ANSWERS_BYTES_MAX).await;
        }
        if session.outbox.is_closed() {
            return None;
        }
        let (result, buffer) = reader.read(frames.take_buffer(session.in_flight.get() == 0)).await;
        frames.return_buffer(buffer);
        match result {
            Ok(0) if frames.has_partial_frame() => {
                return Some((PageErrorCode::BadRequest, "the stream ended inside a message".to_owned()));
            }
            // The connection's end is the reader's business: it reconnects.
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

fn progress_of(owner: &Owner) -> PageProgress {
    PageProgress { ingested_lsn: owner.ingested(), durable_lsn: owner.durable(), horizon_lsn: owner.horizon() }
}

/// Tells a reader how far the shard is, while it moves, and now and then while the reader waits for answers.
async fn tell_progress(owner: Rc<Owner>, session: Rc<Session>, mut told: PageProgress) {
    let outbox = &session.outbox;
    loop {
        let moved = {
            let closed = std::pin::pin!(outbox.until_closed());
            let moved = std::pin::pin!(owner.moved.until(|| Some(progress_of(&owner)).filter(|now| *now != told)));
            let moved = std::pin::pin!(driver::timeout(SIGN_OF_LIFE_INTERVAL, moved));
            match futures_util::future::select(moved, closed).await {
                Either::Left((moved, _)) => moved,
                Either::Right(_) => return,
            }
        };
        match moved {
            Some(now) => told = now,
            None if session.in_flight.get() == 0 => continue,
            None => {}
        }
        outbox.push(&PageMessage::PageProgress(told));
        let closed = std::pin::pin!(outbox.until_closed());
        let slept = std::pin::pin!(driver::sleep(PROGRESS_INTERVAL));
        if let Either::Right(_) = futures_util::future::select(slept, closed).await {
            return;
        }
    }
}
