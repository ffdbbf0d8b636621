//! The copy stream: WAL out, confirmations in.
//!
//! Receiving and sending run side by side in one task and share [`Shared`]. A receive is never dropped: the sender ends
//! first, and the receiver ends with the client's answer or when the connection is closed.

use std::{
    cell::{Cell, RefCell},
    pin::pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use driver::{Event, Writer};
use futures_util::{
    FutureExt,
    future::{Either, select},
};
use pgtypes::{Instant, Lsn, PgTimeline};
use wire::postgres::{
    CopyMessage, ErrorReply, FrontendMessage, Reply, StandbyStatus, decode_copy, keepalive, sqlstate, wal_data_header,
};

use super::{
    FollowError, FollowedLog, FollowerStatus, SessionError,
    inbound::Inbound,
    session::{Session, Start},
    timelines::{self, Found, Switch},
};

/// WAL in one message (`MAX_SEND_SIZE` of `walsender.c`).
const SEND_BYTES_MAX: usize = 128 << 10;
/// Messages end at pages while more follows, as PostgreSQL's do.
const PAGE_BYTES: u64 = 8192;
/// Silence after which a follower is given up (`wal_sender_timeout`).
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Silence after which it is asked for a sign of life.
const SILENCE_ASK: Duration = Duration::from_secs(30);
/// How long a follower may take to answer the end of the stream.
const FAREWELL_LIMIT: Duration = Duration::from_secs(5);
/// From 1970-01-01 to 2000-01-01.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// What sender and receiver share.
struct Shared {
    changed: Event,
    /// When the follower was last heard.
    heard: Cell<Instant>,
    status: Cell<Option<StandbyStatus>>,
    /// A keep-alive is due at once.
    wants_keepalive: Cell<bool>,
    /// The follower sends nothing more in this stream.
    received_all: Cell<bool>,
    /// Its session goes on behind the stream.
    stays: Cell<bool>,
    failed: RefCell<Option<SessionError>>,
}

/// Why the sender ended.
enum End {
    /// The client ended the stream.
    Client,
    /// The timeline has ended.
    Timeline(Switch),
    /// The core stops.
    Stopping,
    /// The client must be told that it cannot go on.
    Error(ErrorReply),
    /// The connection is of no use any more.
    Broken(SessionError),
}

/// Streams; true when the session goes on.
pub(super) async fn run<L: FollowedLog>(session: &mut Session<L>, start: Start) -> Result<bool, SessionError> {
    session.followers.set_status(session.number, |status| {
        *status = Some(FollowerStatus {
            log: session.log.id(),
            name: session.name.clone(),
            application: session.application.clone(),
            slot: start.slot.clone(),
            sent_lsn: start.begin_lsn,
            confirmed: [Lsn::INVALID; 3],
        });
    });
    tracing::info!(
        log = %session.log.id(), follower = session.name, application = session.application, slot = start.slot,
        begin = %start.begin_lsn, timeline = start.timeline.0, "follower streams"
    );
    let result = stream(session, &start).await;
    if let Some(slot) = &start.slot {
        session.release_slot(slot);
    }
    session.followers.set_status(session.number, |status| *status = None);
    result
}

async fn stream<L: FollowedLog>(session: &mut Session<L>, start: &Start) -> Result<bool, SessionError> {
    let readable = session.log.readable_lsn();
    let found = session.log.with_timelines(|all| timelines::find(all, readable, start.timeline));
    // Nothing to stream: the copy mode is not even entered (`StartReplication`).
    if let Found::Historic(switch) = found
        && start.begin_lsn >= switch.end_lsn
    {
        return finish(&mut session.writer, Some(switch)).await.map(|()| true);
    }
    let mut reply = Reply::new();
    reply.copy_both();
    write(&mut session.writer, reply.into_bytes()).await?;

    let shared = Shared {
        changed: Event::new(),
        heard: Cell::new(driver::now()),
        status: Cell::new(None),
        wants_keepalive: Cell::new(false),
        received_all: Cell::new(false),
        stays: Cell::new(false),
        failed: RefCell::new(None),
    };
    let Session { followers, number, log, inbound, writer, .. } = session;
    let closer = writer.closer();
    let confirm = |status: StandbyStatus| {
        followers.set_status(*number, |shown| {
            if let Some(shown) = shown {
                shown.confirmed = [status.write_lsn, status.flush_lsn, status.apply_lsn];
            }
        });
        if let Some(slot) = &start.slot {
            confirm_slot(&**log, slot, status.flush_lsn);
        }
    };
    let sending = async {
        let mut sender = Sender {
            log: &**log,
            shared: &shared,
            stopping: &|| followers.is_stopping(),
            changed: &followers.changed,
            slot: start.slot.as_deref(),
            timeline: start.timeline,
            sent: start.begin_lsn,
            report: &|sent, bytes| {
                followers.admission.metrics.sent_bytes.inc_by(bytes);
                followers.set_status(*number, |shown| {
                    if let Some(shown) = shown {
                        shown.sent_lsn = sent;
                    }
                });
            },
        };
        let end = sender.send_all(writer).await;
        let goes_on = say_farewell(&shared, writer, &end).await;
        if !goes_on {
            closer.close();
        }
        (end, goes_on)
    };
    let ((end, goes_on), ()) = futures_util::join!(sending, receive(inbound, &shared, &confirm));
    match end {
        End::Client | End::Timeline(_) | End::Stopping => Ok(goes_on),
        End::Error(reply) => Err(SessionError::Refused(reply.message)),
        End::Broken(error) => Err(error),
    }
}

/// A confirmation moves the slot forward only: what was confirmed once is not needed again.
fn confirm_slot<L: FollowedLog>(log: &L, slot: &str, flush_lsn: Lsn) {
    // A follower cannot have what nobody has sent it.
    if !flush_lsn.is_valid() || flush_lsn > log.readable_lsn() {
        return;
    }
    // A slot that expired or was dropped is not made again: the sender notices.
    if log.slot(slot).is_some_and(|held| held < flush_lsn) {
        // It exists, so there is room for it.
        let _exists = log.set_slot(slot, flush_lsn);
    }
}

/// Receives until the client ends the stream or the connection does.
async fn receive(inbound: &mut Inbound, shared: &Shared, confirm: &impl Fn(StandbyStatus)) {
    let result = loop {
        match inbound.wait().await {
            Ok(true) => {}
            Ok(false) => break Ok(false),
            Err(error) => break Err(error),
        }
        shared.heard.set(driver::now());
        match inbound.messages.next() {
            Ok(Some(FrontendMessage::CopyData(data))) => match decode_copy(data) {
                Ok(CopyMessage::Status(status)) => {
                    shared.status.set(Some(status));
                    confirm(status);
                    if status.reply_requested {
                        shared.wants_keepalive.set(true);
                    }
                }
                // For monitoring only; there is no vacuum here that could wait for it.
                Ok(CopyMessage::Feedback(_)) => {}
                Err(error) => break Err(error.into()),
            },
            Ok(Some(FrontendMessage::CopyDone | FrontendMessage::CopyFail)) => break Ok(true),
            Ok(Some(FrontendMessage::Terminate)) => break Ok(false),
            // `ProcessRepliesIfAny` takes Sync and Flush silently; nothing else may come.
            Ok(Some(FrontendMessage::Sync) | None) => {}
            Ok(Some(_)) => break Err(wire::postgres::ProtocolError::Malformed("copy stream").into()),
            Err(error) => break Err(error.into()),
        }
        shared.changed.set();
    };
    match result {
        Ok(stays) => shared.stays.set(stays),
        Err(error) => _ = shared.failed.replace(Some(error)),
    }
    shared.received_all.set(true);
    shared.changed.set();
}

struct Sender<'a, L> {
    log: &'a L,
    shared: &'a Shared,
    stopping: &'a dyn Fn() -> bool,
    /// Of all followers: the core stops, or a slot expired.
    changed: &'a Event,
    slot: Option<&'a str>,
    timeline: PgTimeline,
    sent: Lsn,
    report: &'a dyn Fn(Lsn, u64),
}

/// What the sender has to do next.
enum Step {
    Send { end: Lsn },
    Keepalive { ask: bool },
    End(End),
}

impl<L: FollowedLog> Sender<'_, L> {
    async fn send_all(&mut self, writer: &mut Writer) -> End {
        let mut asked = false;
        loop {
            match self.next_step(&mut asked).await {
                Step::End(end) => return end,
                Step::Keepalive { ask } => {
                    if let Err(error) = write(writer, keepalive(self.sent, postgres_now(), ask).to_vec()).await {
                        return End::Broken(error);
                    }
                }
                Step::Send { end } => match self.send(writer, end).await {
                    Ok(()) => {}
                    Err(end) => return end,
                },
            }
        }
    }

    /// Waits until there is something to do.
    async fn next_step(&self, asked: &mut bool) -> Step {
        loop {
            let heard = self.shared.heard.get();
            if driver::now().since(heard) < SILENCE_ASK {
                *asked = false;
            }
            let deadline = heard.after(if *asked { SILENCE_MAX } else { SILENCE_ASK });
            let log = pin!(self.log.until(|| self.ready()));
            let peer = pin!(self.shared.changed.until(|| self.ready()));
            let others = pin!(self.changed.until(|| self.ready()));
            let timer = pin!(driver::sleep_until(deadline));
            match select(select(log, peer).map(merge), select(others, timer)).await {
                Either::Left((step, _)) | Either::Right((Either::Left((step, _)), _)) => return step,
                Either::Right((Either::Right(_), _)) => {
                    // Heard in the meantime: a new deadline.
                    if self.shared.heard.get() != heard {
                        continue;
                    }
                    if *asked {
                        let error = "terminating walsender process due to replication timeout";
                        return Step::End(End::Error(ErrorReply::fatal(sqlstate::ADMIN_SHUTDOWN, error)));
                    }
                    *asked = true;
                    return Step::Keepalive { ask: true };
                }
            }
        }
    }

    fn ready(&self) -> Option<Step> {
        match self.shared.failed.take() {
            None => {}
            Some(SessionError::Protocol(error)) => {
                let error = ErrorReply::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string());
                return Some(Step::End(End::Error(error)));
            }
            Some(error) => return Some(Step::End(End::Broken(error))),
        }
        if self.shared.received_all.get() {
            return Some(Step::End(End::Client));
        }
        if (self.stopping)() {
            return Some(Step::End(End::Stopping));
        }
        if self.log.is_closed() {
            let error = ErrorReply::fatal(sqlstate::ADMIN_SHUTDOWN, "the log is served here no longer");
            return Some(Step::End(End::Error(error)));
        }
        if let Some(slot) = self.slot
            && self.log.slot(slot).is_none()
        {
            let message = format!("replication slot \"{slot}\" expired or was dropped");
            let error = ErrorReply::fatal(sqlstate::OBJECT_NOT_IN_PREREQUISITE_STATE, message);
            return Some(Step::End(End::Error(error)));
        }
        let readable = self.log.readable_lsn();
        let limit = match self.log.with_timelines(|all| timelines::find(all, readable, self.timeline)) {
            Found::Current => readable,
            Found::Historic(switch) if self.sent >= switch.end_lsn => return Some(Step::End(End::Timeline(switch))),
            Found::Historic(switch) => switch.end_lsn,
            // Only what is committed is shown, and that does not go away.
            Found::Unknown => {
                let message = format!("timeline {} is no longer in this server's history", self.timeline.0);
                return Some(Step::End(End::Error(ErrorReply::fatal(sqlstate::INTERNAL_ERROR, message))));
            }
        };
        if self.sent < limit {
            return Some(Step::Send { end: limit });
        }
        self.shared.wants_keepalive.take().then_some(Step::Keepalive { ask: false })
    }

    async fn send(&mut self, writer: &mut Writer, end: Lsn) -> Result<(), End> {
        let begin = self.sent;
        let wanted = end.bytes_since(begin).min(SEND_BYTES_MAX as u64) as usize;
        let bytes = self.log.read(begin, wanted).await.map_err(|error| {
            let code = match error {
                FollowError::Removed { .. } => sqlstate::UNDEFINED_FILE,
                FollowError::Damaged(_) => sqlstate::DATA_CORRUPTED,
                FollowError::Failed(_) => sqlstate::INTERNAL_ERROR,
            };
            End::Error(ErrorReply::fatal(code, error.to_string()))
        })?;
        let mut length = bytes.len().min(wanted);
        let behind = begin.advance(length as u64);
        let last_page = behind.floor(PAGE_BYTES);
        if behind < end && last_page > begin {
            length = last_page.bytes_since(begin) as usize;
        }
        let mut message = wal_data_header(begin, end, postgres_now(), length);
        message.extend_from_slice(&bytes[..length]);
        drop(bytes);
        // A follower that does not read is as silent as one that does not write.
        match driver::timeout(SILENCE_MAX, write(writer, message)).await {
            Some(result) => result.map_err(End::Broken)?,
            None => {
                let error = std::io::Error::new(std::io::ErrorKind::TimedOut, "the follower does not read");
                return Err(End::Broken(error.into()));
            }
        }
        self.sent = begin.advance(length as u64);
        (self.report)(self.sent, length as u64);
        Ok(())
    }
}

fn merge<A, B>(either: Either<(Step, A), (Step, B)>) -> Step {
    match either {
        Either::Left((step, _)) | Either::Right((step, _)) => step,
    }
}

/// Ends the stream; true when the session goes on behind it.
async fn say_farewell(shared: &Shared, writer: &mut Writer, end: &End) -> bool {
    let farewell = async {
        match end {
            End::Client => {
                if !shared.stays.get() {
                    return Ok(false);
                }
                let mut reply = Reply::new();
                reply.copy_done();
                write(writer, reply.into_bytes()).await?;
                finish(writer, None).await?;
                Ok(true)
            }
            End::Timeline(switch) => {
                let mut reply = Reply::new();
                reply.copy_done();
                write(writer, reply.into_bytes()).await?;
                shared.changed.until(|| shared.received_all.get().then_some(())).await;
                if !shared.stays.get() {
                    return Ok(false);
                }
                finish(writer, Some(*switch)).await?;
                Ok(true)
            }
            End::Stopping => {
                // As a walsender that ends with its server (`WalSndDone`): the client sees an orderly end.
                let mut reply = Reply::new();
                reply.command_complete("COPY 0");
                write(writer, reply.into_bytes()).await?;
                leave(shared, writer).await
            }
            End::Error(error) => {
                let mut reply = Reply::new();
                reply.error(error);
                write(writer, reply.into_bytes()).await?;
                leave(shared, writer).await
            }
            End::Broken(_) => Ok(false),
        }
    };
    // At the end of a timeline `pg_receivewal` syncs its file before it answers.
    let limit = if let End::Timeline(_) = end { SILENCE_MAX } else { FAREWELL_LIMIT };
    // A follower that does not answer in time, or is gone, is closed.
    matches!(driver::timeout(limit, farewell).await, Some(Ok::<bool, SessionError>(true)))
}

/// Says that nothing more follows, and waits for the client to close, so that it can read what was said.
async fn leave(shared: &Shared, writer: &mut Writer) -> Result<bool, SessionError> {
    writer.shutdown().await?;
    shared.changed.until(|| shared.received_all.get().then_some(())).await;
    Ok(false)
}

/// The results behind a stream: where the next timeline begins, and the end of the command, twice: clients rely on it
/// (`exec_replication_command`: "dupe, but necessary per libpqrcv_endstreaming").
async fn finish(writer: &mut Writer, switch: Option<Switch>) -> Result<(), SessionError> {
    let mut reply = Reply::new();
    if let Some(Switch { end_lsn, next }) = switch {
        reply.next_timeline(next, end_lsn);
    }
    reply.command_complete("START_STREAMING").command_complete("START_REPLICATION").ready_for_query();
    write(writer, reply.into_bytes()).await
}

async fn write(writer: &mut Writer, bytes: Vec<u8>) -> Result<(), SessionError> {
    let (result, _) = writer.write_all(bytes).await;
    Ok(result?)
}

/// Microseconds since 2000-01-01 UTC (`GetCurrentTimestamp`).
fn postgres_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH + POSTGRES_EPOCH);
    // Before 2000 the clock is wrong anyway.
    since.map_or(0, |duration| duration.as_micros() as i64)
}
