//! What this safekeeper asks of others: the WAL that it lacks, and the fences that it missed.

use std::{io, rc::Rc, time::Duration};

use consensus::{
    CatchUpTask,
    message::{Donor, Refusal},
};
use driver::Connection;
use identity::{Call, Caller, Role};
use pgtypes::Lsn;
use wire::append::{
    BallotAnswer, ErrorFrame, FetchWal, FrameReader, Hello, Message, Purpose, WireError, decode, encode_to_vec,
};

use crate::log::LogDriver;

/// Time to connect, TLS included.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// Time for one answer: a donor may have to verify a segment of 16 MiB on a busy disk first.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Pauses between two rounds over all donors.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Why a peer was of no use.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no answer within {ANSWER_LIMIT:?}")]
    Silent,
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Identity(#[from] identity::NotAllowed),
    #[error("it says: {} ({:?})", .0.text, .0.code)]
    Refused(ErrorFrame),
    #[error("it answered something else than what was asked")]
    Nonsense,
    #[error("what it sent is no WAL at {0}: {1}")]
    BadWal(Lsn, String),
}

/// A connection to another safekeeper, for one log.
struct Link {
    connection: Connection,
    frames: FrameReader,
}

impl Link {
    async fn open(log: &LogDriver, address: &str) -> Result<Self, PeerError> {
        let process = log.process();
        let mut connection = driver::connect(address, CONNECT_LIMIT).await?;
        if let Some(tls) = &process.tls {
            let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
            let handshake = connection.upgrade_client(tls.client_config(), host);
            connection = driver::timeout(CONNECT_LIMIT, handshake).await.ok_or(PeerError::Silent)??;
            let server = Caller::of_certificate(connection.peer_certificate().as_deref())?;
            server.expect_server(Role::Safekeeper, log.id().cluster, Call::Peer)?;
        }
        let mut link = Link { connection, frames: FrameReader::new() };
        let hello = Hello { log: log.id(), system_id: log.system(), purpose: Purpose::Peer };
        link.send(&Message::Hello(hello)).await?;
        Ok(link)
    }

    async fn send(&mut self, message: &Message<'_>) -> Result<(), PeerError> {
        Ok(self.connection.write_all(encode_to_vec(message)?).await.0?)
    }

    /// The next message, given to `take`. The link is of no use after an error.
    async fn answer<T>(&mut self, take: impl FnOnce(Message<'_>) -> Result<T, PeerError>) -> Result<T, PeerError> {
        let answer = async {
            loop {
                if let Some(frame) = self.frames.next()? {
                    return match decode(frame)? {
                        Message::Error(error) => Err(PeerError::Refused(error)),
                        message => take(message),
                    };
                }
                let (result, buffer) = self.connection.read(self.frames.take_buffer(false)).await;
                self.frames.return_buffer(buffer);
                if result? == 0 {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
            }
        };
        driver::timeout(ANSWER_LIMIT, answer).await.ok_or(PeerError::Silent)?
    }
}

/// Asks every other member for its ballot, all at a time, and tells the log.
pub async fn ask_for_ballots(log: &Rc<LogDriver>) {
    let own = log.process().disk();
    let members = log.status().configuration;
    let questions = members.all_members().filter(|member| member.disk != own).map(|member| {
        let address = member.address.clone();
        async move {
            let result = async {
                let mut link = Link::open(log, &address).await?;
                link.send(&Message::AskBallot).await?;
                link.answer(|message| match message {
                    Message::BallotAnswer(answer) => Ok(answer),
                    _ => Err(PeerError::Nonsense),
                })
                .await
            };
            match result.await {
                Ok(BallotAnswer { ballot, writer }) => log.handle_peer_ballot(ballot.term, writer),
                Err(error) => note(log, &address, "ask for its ballot", &error),
            }
        }
    });
    futures_util::future::join_all(questions).await;
}

/// Fetches what `task` says, from one donor after another, until it is complete, refused or replaced.
pub async fn catch_up(log: &Rc<LogDriver>, task: CatchUpTask, number: u64) {
    tracing::info!(log = %log.id(), from = %task.from, until = %task.until, "catching up from a peer");
    let mut position = task.from;
    let mut pause = PAUSE.0;
    loop {
        for donor in &task.donors {
            let before = position;
            match fetch(log, &task, donor, number, &mut position).await {
                Ok(()) => {
                    if position >= task.until {
                        log.process().notices.solved(&problem(log, &donor.address));
                        tracing::info!(log = %log.id(), position = %position, "caught up");
                    }
                    return;
                }
                Err(error) => note(log, &donor.address, "fetch WAL from it", &error),
            }
            if position > before {
                pause = PAUSE.0;
            }
        }
        driver::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
        if !log.is_current_catch_up(number) {
            return;
        }
    }
}

fn problem(log: &LogDriver, address: &str) -> String {
    format!("peer {address} {}", log.id())
}

fn note(log: &LogDriver, address: &str, what: &str, error: &PeerError) {
    if log.process().notices.is_new(&problem(log, address), driver::now()) {
        tracing::warn!(log = %log.id(), peer = address, %error, "peer: cannot {what}");
    }
}

async fn fetch(
    log: &Rc<LogDriver>,
    task: &CatchUpTask,
    donor: &Donor,
    number: u64,
    position: &mut Lsn,
) -> Result<(), PeerError> {
    let mut link = None;
    while *position < task.until {
        log.until_room().await;
        if !log.is_current_catch_up(number) {
            return Ok(());
        }
        let link = match &mut link {
            Some(link) => link,
            none => none.insert(Link::open(log, &donor.address).await?),
        };
        let request = FetchWal { begin_lsn: *position, end_lsn: task.until, ballot: task.ballot };
        link.send(&Message::FetchWal(request)).await?;
        let begin = *position;
        let (count, outcome) = link
            .answer(|message| match message {
                Message::WalData(data) if data.begin_lsn == begin && !data.bytes.is_empty() => {
                    Ok((data.bytes.len() as u64, log.handle_fetched(task, begin, data.bytes)))
                }
                _ => Err(PeerError::Nonsense),
            })
            .await?;
        log.process().metrics.caught_up_bytes.inc_by(count);
        match outcome {
            Ok(()) => *position = begin.advance(count),
            Err(Refusal::Gap { expected }) => *position = expected,
            Err(Refusal::BadWal { lsn, detail }) => return Err(PeerError::BadWal(lsn, detail)),
            Err(Refusal::DiskFull) => driver::sleep(PAUSE.1).await,
            // A later election, or another refusal for good: whoever is elected asks for another catch-up.
            Err(_) => return Ok(()),
        }
        let wait = log.process().catch_up_rate.spend(count, driver::now());
        if !wait.is_zero() {
            driver::sleep(wait).await;
        }
    }
    Ok(())
}
