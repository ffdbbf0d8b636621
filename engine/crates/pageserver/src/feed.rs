//! Where batches come from: one safekeeper at a time, another one when it is gone, silent or behind; the WAL archive when all of
//! them have removed what is needed.

use std::{cell::Cell, io, rc::Rc, time::Duration};

use driver::{Closer, Connection, Writer};
use futures_util::{StreamExt, future::Either, stream::FuturesUnordered};
use identity::{Call, Caller, NotAllowed, Role};
use pgtypes::{FrameSummary, Instant, Lsn, Term};
use wal::WalError;
use wire::append::{
    BatchAssembler, ErrorCode, FeedProgress, FrameReader, Hello, Message, Purpose, WireError, decode, encode_to_vec,
};

use crate::{archive::from_archive, ingest::IngestError, owner::Owner, start::StartError};

/// Connecting, the TLS handshake, and the first batch each end after this.
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(5);

/// A safekeeper speaks at least five times a second; one that was silent for so long is left.
pub(crate) const SILENCE_LIMIT: Duration = Duration::from_secs(3);

/// Before a safekeeper is called silent its socket is looked at again for so long: this process may itself have been kept from
/// running, and then the timer is over, too, although bytes are there.
const SECOND_LOOK: Duration = Duration::from_millis(500);

/// A read that waited for so long found nothing left over: what it brings was sent just now, and not before a backlog.
const FRESH: Duration = Duration::from_millis(20);

/// Pause before the next safekeeper is asked, doubled while none of them gives anything.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How often a safekeeper is told how far this shard is, while it moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// A reader that waits for a position longer than this makes the shard ask another safekeeper, which may be less behind.
const BEHIND_LIMIT: Duration = Duration::from_secs(1);

/// Why a conversation with a safekeeper ended.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer sent something else than the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer is no safekeeper of this cluster.
    #[error(transparent)]
    Identity(#[from] NotAllowed),
    /// It says why it does not go on.
    #[error("refused: {1}")]
    Refused(ErrorCode, String),
    /// What it sent is no WAL.
    #[error("it sent no WAL: {0}")]
    Wal(#[from] WalError),
    /// What it sent cannot be taken in.
    #[error(transparent)]
    Ingest(#[from] IngestError),
    /// It said nothing.
    #[error("silent for {SILENCE_LIMIT:?}")]
    Silent,
    /// Others may have what it has not.
    #[error("it has committed only {commit_lsn}, and a reader waits for {wanted}")]
    Behind {
        /// Its position.
        commit_lsn: Lsn,
        /// What is wanted.
        wanted: Lsn,
    },
    /// It closed the connection.
    #[error("closed by the safekeeper")]
    Closed,
    /// A message that does not belong here.
    #[error("unexpected message")]
    Unexpected,
    /// This process is ending.
    #[error("stopping")]
    Stopping,
}

impl FeedError {
    /// A fixed word for the metrics.
    fn reason(&self) -> &'static str {
        match self {
            FeedError::Io(_) => "io",
            FeedError::Wire(_) | FeedError::Wal(_) | FeedError::Unexpected => "protocol",
            FeedError::Identity(_) => "identity",
            FeedError::Refused(..) => "refused",
            FeedError::Ingest(_) => "ingest",
            FeedError::Silent => "silent",
            FeedError::Behind { .. } => "behind",
            FeedError::Closed => "closed",
            FeedError::Stopping => "stopping",
        }
    }
}

/// Takes WAL in until the process ends.
pub async fn follow(owner: Rc<Owner>) {
    const TROUBLE: &str = "no WAL from a safekeeper";
    let safekeepers = owner.process.config.safekeepers.clone();
    let mut delay = Delay::new(owner.process.config.ingest.test_ingest_delay_ms);
    let (mut at, mut pause, mut without_wal) = (0, PAUSE, 0);
    while !owner.is_stopping() {
        let address = &safekeepers[at % safekeepers.len()].append;
        let before = owner.ingested();
        owner.source.borrow_mut().name.clone_from(address);
        let Err(error) = converse(&owner, address, &mut delay).await;
        owner.source.borrow_mut().name.clear();
        if owner.is_stopping() {
            return;
        }
        owner.source.borrow_mut().last_error = format!("{address}: {error}");
        owner.process.metrics.feed_ends.get_or_create(&crate::metrics::ReasonLabels { reason: error.reason() }).inc();
        match &error {
            FeedError::Refused(ErrorCode::StaleGeneration, text) => {
                return owner.fail(StartError::Superseded(text.clone()));
            }
            FeedError::Ingest(fault @ IngestError::Put { .. }) => {
                return owner.fail(StartError::Internal(fault.to_string()));
            }
            FeedError::Refused(ErrorCode::WalNotAvailable, _) => without_wal += 1,
            _ => without_wal = 0,
        }
        owner.report(TROUBLE, &format!("{address}: {error}"));
        if without_wal >= safekeepers.len() {
            without_wal = 0;
            if let Err(error) = from_archive(&owner).await {
                owner.report(TROUBLE, &format!("archive: {error}"));
            }
        }
        let moved = owner.ingested() > before;
        if moved {
            owner.solved(TROUBLE);
        }
        pause = if moved { PAUSE } else { (pause * 2).min(PAUSE_MAX) };
        at += 1;
        owner.pause(pause).await;
    }
}

/// Announces this ownership to a majority of the safekeepers, so that no older one gets WAL any more. Returns the highest term
/// among them: every fence before this call is known to one of a majority.
///
/// # Errors
/// A newer owner is known, or the process is ending.
pub async fn register(
    config: &crate::config::Config,
    tls: Option<&identity::Tls>,
    system_id: pgtypes::SystemId,
    stripe_blocks: u32,
    mut report: impl FnMut(String),
    is_stopping: impl Fn() -> bool,
) -> Result<Term, StartError> {
    let majority = config.safekeepers.len() / 2 + 1;
    let hello = Hello {
        log: config.log(),
        system_id,
        purpose: Purpose::Feed {
            shard: config.shard(),
            generation: config.generation(),
            range: config.range(),
            stripe_blocks,
            from: FrameSummary::default(),
        },
    };
    let mut pause = PAUSE;
    loop {
        let mut asked: FuturesUnordered<_> = config
            .safekeepers
            .iter()
            .map(|safekeeper| async { (announce(hello, &safekeeper.append, tls).await, &safekeeper.append) })
            .collect();
        let (mut known, mut term) = (0, Term::default());
        // One that is slow or gone is not waited for.
        while known < majority
            && let Some((answer, address)) = asked.next().await
        {
            match answer {
                Err(FeedError::Refused(ErrorCode::StaleGeneration, text)) => return Err(StartError::Superseded(text)),
                Err(error) => report(format!("{address}: {error}")),
                Ok(of_safekeeper) => (known, term) = (known + 1, term.max(of_safekeeper)),
            }
        }
        if known >= majority {
            return Ok(term);
        }
        if is_stopping() {
            return Err(StartError::Stopped);
        }
        driver::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn announce(hello: Hello, address: &str, tls: Option<&identity::Tls>) -> Result<Term, FeedError> {
    let attempt = async {
        let mut connection = open(hello, address, tls).await?;
        let mut frames = FrameReader::new();
        loop {
            if let Some(frame) = frames.next()? {
                match decode(frame)? {
                    Message::FeedBatch(batch) => return Ok(batch.term),
                    Message::Error(error) => return Err(FeedError::Refused(error.code, error.text)),
                    _ => return Err(FeedError::Unexpected),
                }
            }
            let (result, buffer) = connection.read(frames.take_buffer(true)).await;
            frames.return_buffer(buffer);
            if result? == 0 {
                return Err(FeedError::Closed);
            }
        }
    };
    // Dropping the read loses nothing: the connection is given up with it.
    driver::timeout(STEP_LIMIT, attempt).await.unwrap_or(Err(FeedError::Silent))
}

pub(crate) async fn open(hello: Hello, address: &str, tls: Option<&identity::Tls>) -> Result<Connection, FeedError> {
    let mut connection = driver::connect(address, STEP_LIMIT).await?;
    if let Some(tls) = tls {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
        let handshake = connection.upgrade_client(tls.client_config(), host);
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no TLS handshake within {STEP_LIMIT:?}"));
        connection = driver::timeout(STEP_LIMIT, handshake).await.ok_or_else(late)??;
        Caller::of_certificate(connection.peer_certificate().as_deref())?.expect_server(
            Role::Safekeeper,
            hello.log.cluster,
            Call::ReadWal,
        )?;
    }
    let (written, _) = connection.write_all(encode_to_vec(&Message::Hello(hello))?).await;
    written?;
    Ok(connection)
}

/// Ends a connection when it is dropped, and with it the task that writes to it.
struct Conversation {
    closer: Closer,
    closed: Rc<Cell<bool>>,
    owner: Rc<Owner>,
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.closed.set(true);
        self.closer.close();
        self.owner.moved.set();
    }
}

/// Takes batches of one safekeeper in until something is wrong.
async fn converse(owner: &Rc<Owner>, address: &str, delay: &mut Delay) -> Result<std::convert::Infallible, FeedError> {
    let hello = Hello {
        log: owner.log(),
        system_id: owner.system_id,
        purpose: Purpose::Feed {
            shard: owner.shard(),
            generation: owner.generation(),
            range: owner.range(),
            stripe_blocks: owner.striping.stripe_blocks,
            from: owner.position(),
        },
    };
    let connection = open(hello, address, owner.process.tls.as_ref()).await?;
    let closed = Rc::new(Cell::new(false));
    let conversation = Conversation { closer: connection.closer(), closed: closed.clone(), owner: owner.clone() };
    let (mut reader, writer) = connection.into_split();
    driver::spawn(tell_progress(owner.clone(), writer, closed));
    let mut frames = FrameReader::new();
    let mut batches = BatchAssembler::new();
    let begun = driver::now();
    let mut fresh = false;
    loop {
        while let Some(frame) = frames.next()? {
            let message = decode(frame)?;
            if let Message::Error(error) = message {
                return Err(FeedError::Refused(error.code, error.text));
            }
            let Some(batch) = batches.take(&message)? else { continue };
            delay.wait().await;
            let commit_lsn = batch.commit_lsn;
            let is_heartbeat = batch.after == batch.through;
            owner.take_in(batch).await?;
            // While there is a backlog it is this shard that is behind, and what the safekeeper said is old.
            if is_heartbeat && fresh {
                check_behind(owner, commit_lsn, begun)?;
            }
        }
        if owner.is_stopping() {
            return Err(FeedError::Stopping);
        }
        let asked = driver::now();
        // Dropping the read loses nothing: the connection is given up with it.
        let mut read = std::pin::pin!(reader.read(frames.take_buffer(false)));
        let read = match driver::timeout(SILENCE_LIMIT, read.as_mut()).await {
            Some(read) => read,
            None => driver::timeout(SECOND_LOOK, read).await.ok_or(FeedError::Silent)?,
        };
        fresh = driver::now().since(asked) >= FRESH;
        let (read, buffer) = read;
        frames.return_buffer(buffer);
        match read? {
            0 => return Err(FeedError::Closed),
            count => owner.process.metrics.received_bytes.inc_by(count as u64),
        };
        // Keeps the connection alive up to here.
        let _ = &conversation;
    }
}

/// A safekeeper that the others have left behind speaks, but has nothing to say.
fn check_behind(owner: &Owner, commit_lsn: Lsn, begun: Instant) -> Result<(), FeedError> {
    let now = driver::now();
    match owner.wanted.get() {
        Some((wanted, since))
            if wanted > commit_lsn && now.since(since) > BEHIND_LIMIT && now.since(begun) > BEHIND_LIMIT =>
        {
            Err(FeedError::Behind { commit_lsn, wanted })
        }
        _ => Ok(()),
    }
}

/// Tells the safekeeper how far the shard is, until the conversation ends.
async fn tell_progress(owner: Rc<Owner>, mut writer: Writer, closed: Rc<Cell<bool>>) {
    let mut told = None;
    loop {
        let now = || FeedProgress { received: owner.ingested(), durable: owner.durable() };
        let changed = owner.moved.until(|| match closed.get() {
            true => Some(None),
            false => Some(now()).filter(|now| Some(*now) != told).map(Some),
        });
        let Some(progress) = changed.await else { return };
        let bytes = match encode_to_vec(&Message::FeedProgress(progress)) {
            Ok(bytes) => bytes,
            Err(error) => return tracing::error!(%error, "progress cannot be encoded"),
        };
        if writer.write_all(bytes).await.0.is_err() {
            // The reading side notices, too, and says so.
            return;
        }
        told = Some(progress);
        let ended = std::pin::pin!(owner.moved.until(|| closed.get().then_some(())));
        let slept = std::pin::pin!(driver::sleep(PROGRESS_INTERVAL));
        if let Either::Left(_) = futures_util::future::select(ended, slept).await {
            return;
        }
    }
}

/// The delay of batches that tests of lag ask for.
struct Delay {
    max_ms: u64,
    random: u64,
}

impl Delay {
    fn new(max_ms: u64) -> Delay {
        Delay { max_ms, random: driver::now().0 | 1 }
    }

    async fn wait(&mut self) {
        if self.max_ms > 0 {
            // Xorshift (Marsaglia 2003): any spread will do.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            driver::sleep(Duration::from_millis(self.random % (self.max_ms + 1))).await;
        }
    }
}
