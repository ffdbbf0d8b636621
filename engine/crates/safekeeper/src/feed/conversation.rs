//! One subscriber: registered, then batches out and progress in.
//!
//! Sending and receiving run side by side in one task. A receive is never dropped: when the sender ends, the receiver ends
//! with the connection.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use driver::{Connection, Reader, Writer};
use filter::{Batch, Cutter};
use futures_util::future::Either;
use logstore::ShardError;
use pgtypes::{FrameSummary, Instant, Lsn, Term};
use wire::append::{BatchFrames, ErrorCode, ErrorFrame, FrameReader, Message, decode, encode_to_vec};

use super::{
    Subscription,
    feeds::{FEEDS_MAX, Membership, Subscriber, Wanted},
    source::{Progress, Source, SourceError},
};
use crate::{
    log::LogDriver,
    server::{FAREWELL_LIMIT, Farewell, drain, farewell_of, watch},
};

/// A subscriber hears something at least this often: it takes 5 of them as a sign that this safekeeper is of no use.
const HEARTBEAT: Duration = Duration::from_millis(200);

/// How long a subscriber waits until its ownership is durable. A disk that is full may take longer: it tries again.
const REGISTRATION_LIMIT: Duration = Duration::from_secs(10);

/// What sender and receiver share.
struct Session {
    /// The subscriber sends nothing more.
    ended: Cell<bool>,
    /// Why it is to be told that the feed ends.
    farewell: RefCell<Farewell>,
}

/// Serves a subscriber until it leaves; returns what it was told if it was refused.
pub(crate) async fn serve(
    log: &Rc<LogDriver>,
    connection: Connection,
    frames: FrameReader,
    subscription: Subscription,
) -> Farewell {
    if log.feeds().is_crowded() {
        let text = format!("{FEEDS_MAX} shards of this log are fed already");
        return refuse(connection, (ErrorCode::Busy, text)).await;
    }
    if let Err(farewell) = register(log, subscription).await {
        return refuse(connection, farewell).await;
    }
    if subscription.from == FrameSummary::default() {
        return answer_registration(log, connection, frames, subscription).await;
    }
    feed(log, connection, frames, subscription).await
}

/// Says that the ownership is durable, and takes progress as long as the subscriber has some: in this way it tells those
/// safekeepers what they need not keep that do not feed it.
async fn answer_registration(
    log: &Rc<LogDriver>,
    connection: Connection,
    frames: FrameReader,
    subscription: Subscription,
) -> Farewell {
    let answer = BatchFrames::new(Batch::heartbeat(subscription.from, commit_lsn(log), term(log))).next_frame();
    let frame = match answer {
        Ok(frame) => frame.unwrap_or_default(),
        Err(error) => return refuse(connection, (ErrorCode::Internal, error.to_string())).await,
    };
    let disarm = watch(connection.closer(), FAREWELL_LIMIT);
    let (mut reader, mut writer) = connection.into_split();
    // It may be gone; then there is nobody to be told.
    let _ = writer.write_all(frame).await;
    let _ = writer.shutdown().await;
    // It was told that nothing follows: what is wrong with its progress only goes to the log of this process.
    let farewell = receive(log, &mut reader, frames, None, subscription).await;
    disarm.set(true);
    farewell
}

/// Registers the generation, and waits until it is durable.
async fn register(log: &LogDriver, subscription: Subscription) -> Result<(), (ErrorCode, String)> {
    let Subscription { shard, generation, .. } = subscription;
    // An owner that comes back does not wait for the disk: under load that took longer than a page server waits for us.
    if log.feeds().is_registered(shard, generation) && log.with(|machine| owner_fault(machine, subscription)).is_none()
    {
        return Ok(());
    }
    log.feeds().set_registered(shard, None);
    let version = log.register_shard(shard, generation).map_err(|error| farewell_of_owner(&error))?;
    let settled = |machine: &logstore::Log| {
        let durable = machine.consumers_durable(version);
        (durable || machine.is_failed() || log.is_closed()).then_some(durable)
    };
    match driver::timeout(REGISTRATION_LIMIT, log.until(settled)).await {
        Some(true) => {
            // Unless a newer owner came meanwhile: the caller finds that out.
            if log.with(|machine| owner_fault(machine, subscription)).is_none() {
                log.feeds().set_registered(shard, Some(generation));
            }
            Ok(())
        }
        Some(false) if log.is_closed() => Err(stopping()),
        Some(false) | None => {
            Err((ErrorCode::Internal, "the owner of the shard cannot be made durable: see the disk".to_owned()))
        }
    }
}

/// Sends the last frame of a connection and lets the peer read it.
async fn say(mut connection: Connection, frame: Vec<u8>) {
    let disarm = watch(connection.closer(), FAREWELL_LIMIT);
    // It may be gone; then there is nobody to be told.
    let _ = connection.write_all(frame).await;
    let (reader, mut writer) = connection.into_split();
    let _ = writer.shutdown().await;
    drain(reader).await;
    disarm.set(true);
}

/// Tells a subscriber that is not taken in.
async fn refuse(connection: Connection, farewell: (ErrorCode, String)) -> Farewell {
    let (code, text) = farewell.clone();
    if let Ok(frame) = encode_to_vec(&Message::Error(ErrorFrame { code, text })) {
        say(connection, frame).await;
    }
    Some(farewell)
}

/// Feeds a registered subscriber.
async fn feed(
    log: &Rc<LogDriver>,
    connection: Connection,
    frames: FrameReader,
    subscription: Subscription,
) -> Farewell {
    let closer = connection.closer();
    let session = Session { ended: Cell::new(false), farewell: RefCell::new(None) };
    let position = subscription.from.record_end;
    let membership = log.feeds().enter(Subscriber {
        shard: subscription.shard,
        generation: subscription.generation,
        sent_lsn: position,
        received_lsn: position,
    });
    let (mut reader, mut writer) = connection.into_split();
    let sending = async {
        let farewell = send_all(log, &mut writer, &session, &membership, subscription).await;
        let disarm = watch(closer.clone(), FAREWELL_LIMIT);
        if let Some((code, text)) = &farewell
            && let Ok(frame) = encode_to_vec(&Message::Error(ErrorFrame { code: *code, text: text.clone() }))
        {
            // It may be gone; then there is nobody to be told.
            let _ = writer.write_all(frame).await;
        }
        // As above.
        let _ = writer.shutdown().await;
        (farewell, disarm)
    };
    let receiving = async {
        let farewell = receive(log, &mut reader, frames, Some(&membership), subscription).await;
        session.farewell.replace(farewell);
        session.ended.set(true);
        log.wake();
        if session.farewell.borrow().is_none() {
            // It has left: a send that still waits for it must not wait for ever.
            closer.close();
        }
    };
    // Whoever does not read must not keep a sender that has something to say.
    let watching = async {
        let over = |_: &logstore::Log| is_over(log, &session, subscription).then_some(());
        log.until(over).await;
        watch(closer.clone(), 2 * FAREWELL_LIMIT)
    };
    let ((farewell, disarm), (), disarm_too) = futures_util::join!(sending, receiving, watching);
    if farewell.is_some() {
        drain(reader).await;
    }
    disarm.set(true);
    disarm_too.set(true);
    farewell
}

fn is_over(log: &LogDriver, session: &Session, subscription: Subscription) -> bool {
    session.ended.get()
        || session.farewell.borrow().is_some()
        || log.is_closed()
        || log.with(|machine| owner_fault(machine, subscription)).is_some()
}

/// Why the subscriber may not be served any more: the shard has another owner, or is gone.
fn owner_fault(machine: &logstore::Log, subscription: Subscription) -> Option<ShardError> {
    let Subscription { shard, generation, .. } = subscription;
    match machine.shard(shard) {
        None => Some(ShardError::Unknown(shard)),
        Some(known) if known.generation != generation => Some(ShardError::StaleGeneration { known }),
        Some(_) => None,
    }
}

fn farewell_of_owner(error: &ShardError) -> (ErrorCode, String) {
    let code = match error {
        ShardError::StaleGeneration { .. } => ErrorCode::StaleGeneration,
        ShardError::Unknown(_) => ErrorCode::NotAllowed,
        ShardError::TooMany => ErrorCode::Busy,
    };
    (code, error.to_string())
}

fn stopping() -> (ErrorCode, String) {
    (ErrorCode::Stopping, "this safekeeper is stopping, or the log was deleted".to_owned())
}

/// What was sent last.
#[derive(Clone, Copy)]
struct Sent {
    at: Instant,
    term: Term,
}

async fn send_all(
    log: &Rc<LogDriver>,
    writer: &mut Writer,
    session: &Session,
    membership: &Membership,
    subscription: Subscription,
) -> Farewell {
    let Subscription { shard, range, striping, from, .. } = subscription;
    tracing::info!(
        log = %log.id(), shard = shard.0, generation = subscription.generation.0, from = %from.record_end, "feeding a shard"
    );
    let mut source = Source::new(log.clone(), subscription);
    let mut cutter = Cutter::new(from, range, striping);
    // The first batch says that the registration is durable.
    let mut sent = Sent { at: driver::now(), term: term(log) };
    if !send(log, writer, Batch::heartbeat(from, commit_lsn(log), sent.term)).await {
        return None;
    }
    loop {
        if let Some(farewell) = session.farewell.take() {
            return Some(farewell);
        }
        if session.ended.get() {
            return None;
        }
        if log.is_closed() {
            return Some(stopping());
        }
        if let Some(fault) = log.with(|machine| owner_fault(machine, subscription)) {
            return Some(farewell_of_owner(&fault));
        }
        let position = cutter.summary();
        let advanced = {
            let mut advancing = std::pin::pin!(source.advance(&mut cutter));
            loop {
                let left = HEARTBEAT.saturating_sub(driver::now().since(sent.at));
                let due = std::pin::pin!(driver::sleep(left));
                match futures_util::future::select(advancing.as_mut(), due).await {
                    Either::Left((advanced, _)) => break advanced,
                    // A disk that is slow, or a segment that is verified before it is served: we are there all the same.
                    Either::Right(_) => {
                        sent = Sent { at: driver::now(), term: term(log) };
                        if !send(log, writer, Batch::heartbeat(position, commit_lsn(log), sent.term)).await {
                            return None;
                        }
                    }
                }
            }
        };
        let progress = match advanced {
            Ok(progress) => progress,
            Err(error) => return Some(farewell_of_source(&error)),
        };
        let batch = match cutter.take_batch(commit_lsn(log), term(log)) {
            Some(batch) => batch,
            None => {
                let due = driver::now().since(sent.at) >= HEARTBEAT || term(log) != sent.term;
                match progress {
                    _ if due => Batch::heartbeat(cutter.summary(), commit_lsn(log), term(log)),
                    Progress::Made => continue,
                    Progress::Wait(wanted) => {
                        wait(log, session, subscription, wanted, sent).await;
                        continue;
                    }
                }
            }
        };
        sent = Sent { at: driver::now(), term: batch.term };
        let summary = batch.summary;
        if !send(log, writer, batch).await {
            return None;
        }
        membership.sent(&summary);
    }
}

/// Waits until there is something to be done, at most until a heartbeat is due.
async fn wait(log: &LogDriver, session: &Session, subscription: Subscription, wanted: Wanted, sent: Sent) {
    let has_work = |machine: &logstore::Log| {
        let acceptor = machine.acceptor();
        let work = is_over(log, session, subscription)
            || acceptor.state().ballot.term != sent.term
            || log.feeds().has_work(wanted, acceptor.readable_until());
        work.then_some(())
    };
    let left = HEARTBEAT.saturating_sub(driver::now().since(sent.at));
    // The end of the time is as good as an event: the caller looks at everything again.
    let _elapsed = driver::timeout(left, log.until(has_work)).await;
}

fn farewell_of_source(error: &SourceError) -> (ErrorCode, String) {
    match error {
        SourceError::Read(error) => farewell_of(error),
        SourceError::Decode(_) => (ErrorCode::WalDamaged, error.to_string()),
    }
}

fn commit_lsn(log: &LogDriver) -> Lsn {
    log.with(|log| log.acceptor().commit_lsn())
}

fn term(log: &LogDriver) -> Term {
    log.with(|log| log.acceptor().state().ballot.term)
}

/// Sends a batch, frame by frame; false when the connection is of no use any more.
async fn send(log: &LogDriver, writer: &mut Writer, batch: Batch) -> bool {
    let mut frames = BatchFrames::new(batch);
    loop {
        match frames.next_frame() {
            Ok(Some(frame)) => {
                let bytes = frame.len() as u64;
                if writer.write_all(frame).await.0.is_err() {
                    return false;
                }
                log.process().metrics.feed_sent_bytes.inc_by(bytes);
            }
            Ok(None) => return true,
            Err(error) => {
                tracing::error!(log = %log.id(), %error, "batch of a feed cannot be encoded; closing the connection");
                return false;
            }
        }
    }
}

/// Takes progress until the connection ends or the subscriber breaks the protocol, which it is to be told.
async fn receive(
    log: &LogDriver,
    reader: &mut Reader,
    mut frames: FrameReader,
    membership: Option<&Membership>,
    subscription: Subscription,
) -> Farewell {
    let Subscription { shard, generation, .. } = subscription;
    loop {
        match frames.next() {
            Ok(Some(frame)) => match decode(frame) {
                Ok(Message::FeedProgress(progress)) => {
                    if let Some(membership) = membership {
                        membership.update(|subscriber| subscriber.received_lsn = progress.received);
                    }
                    if let Err(error) = log.confirm_shard(shard, generation, progress.durable) {
                        return Some(farewell_of_owner(&error));
                    }
                    log.process().metrics.set_progress(log.id(), shard.0, progress.received, progress.durable);
                }
                Ok(other) => {
                    let text = format!("a page server may not send {:?}", other.message_type());
                    return Some((ErrorCode::BadMessage, text));
                }
                Err(error) => return Some((ErrorCode::BadMessage, error.to_string())),
            },
            Ok(None) => {
                let (result, buffer) = reader.read(frames.take_buffer(true)).await;
                frames.return_buffer(buffer);
                match result {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
            Err(error) => return Some((ErrorCode::BadMessage, error.to_string())),
        }
    }
}
