//! The proposer at work: one election and the reign that follows, on one core.
//!
//! Performs [`ProposerCommand`]s, reads PostgreSQL's WAL when its doorbell rings, and tells PostgreSQL what is settled and how
//! long the lease runs. Everything from the doorbell to the futex happens on this core: no thread is woken in between. The
//! rules are in `consensus`; connections in `link.rs`; WAL in `framer.rs`.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::PathBuf,
    pin::pin,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError, mpsc::SyncSender},
    time::Duration,
};

use consensus::{
    ANNOUNCE_DELAY, Configuration, Grant, Proposer, ProposerCommand, TimelineHistory, Trouble,
    message::{AcceptorMessage, AcceptorStatus, Append, ProposerMessage, Refusal, Refused},
};
use driver::{Event, now};
use futures_util::future::select;
use pgtypes::{Ballot, FrameSummary, Incarnation, Instant, Lsn, MemberId, PgTimeline, SystemId, WriterId};
use vfs_abi::Written;
use wire::append::Message;

use crate::{
    area::SharedArea,
    cache::SharedBlocks,
    core,
    framer::{Framer, FramerError},
    link::{self, Greeting, Link},
    metrics::{CoreView, MemberView, Metrics},
    postgres::KillSwitch,
    settled::SettledQueue,
};

/// How often the end of a clean stop is looked for.
const FINISH_INTERVAL: Duration = Duration::from_millis(2);

/// What the agent asks of the core. Bounded by the channel: the agent waits for each step's event.
pub enum CoreCommand {
    /// Elect this writer, anew.
    Elect {
        /// Numbers the session; its events carry it.
        session: u64,
        /// What was granted.
        grant: Grant,
        /// Random, of this attempt.
        incarnation: Incarnation,
        /// Safekeepers as configured; they know better.
        configuration: Configuration,
    },
    /// PostgreSQL is about to start: propose what it writes.
    Attach(Attachment),
    /// PostgreSQL has ended cleanly: answer with the log's end once all that it wrote is committed, `None` when that does
    /// not come about in time.
    Finish {
        /// At most this long.
        limit: Duration,
        /// The answer.
        reply: SyncSender<Option<Lsn>>,
    },
    /// Close all connections.
    End,
}

/// A PostgreSQL about to start.
pub struct Attachment {
    /// Its shared area.
    pub area: SharedArea,
    /// Its directory.
    pub pgdata: PathBuf,
    /// Its WAL segment size.
    pub segment_bytes: u64,
    /// Its system identifier.
    pub system_id: SystemId,
    /// WAL that is there already and continues the log: the base backup's.
    pub written_before: Option<Written>,
    /// Its block map, which must know what is committed.
    pub blocks: Option<SharedBlocks>,
    /// Where the agent puts the means to kill it.
    pub killer: KillSlot,
}

/// The means to kill PostgreSQL, once it runs.
pub type KillSlot = Arc<Mutex<Option<KillSwitch>>>;

/// What the core tells the agent.
#[derive(Debug)]
pub enum CoreEvent {
    /// X is committed.
    Elected(Box<ElectedEvent>),
    /// The term is over. PostgreSQL was killed.
    Fenced {
        /// By whom.
        ballot: Ballot,
        /// Its writer.
        writer: WriterId,
    },
    /// PostgreSQL's WAL cannot be proposed. PostgreSQL was killed.
    Broken(FramerError),
}

/// The outcome of an election.
#[derive(Debug)]
pub struct ElectedEvent {
    /// The ballot that won.
    pub ballot: Ballot,
    /// X.
    pub end_of_log: FrameSummary,
    /// PostgreSQL's timelines of the log.
    pub timelines: TimelineHistory,
    /// Safekeepers that hold the log up to X.
    pub holders: Vec<MemberId>,
}

/// What sessions share.
#[derive(Clone)]
pub struct Surroundings {
    /// How to greet safekeepers.
    pub greeting: Greeting,
    /// Where events go, with the session's number. Must not block; a session has three at most.
    pub on_event: Arc<dyn Fn(u64, CoreEvent) + Send + Sync>,
    /// What other threads see.
    pub view: Arc<CoreView>,
    /// What is counted.
    pub metrics: Metrics,
}

/// One election and its reign.
pub struct Session {
    number: u64,
    surroundings: Surroundings,
    state: RefCell<State>,
    /// The timer must look at its deadline again.
    changed: Event,
    /// The session has ended.
    ending: Event,
    armed: Cell<Option<Instant>>,
    ended: Cell<bool>,
}

struct State {
    proposer: Proposer,
    links: BTreeMap<MemberId, Rc<Link>>,
    troubles: BTreeMap<MemberId, String>,
    wal: Option<Wal>,
    newest_timeline: PgTimeline,
}

/// PostgreSQL's WAL on its way.
struct Wal {
    area: SharedArea,
    framer: Framer,
    queue: SettledQueue,
    blocks: Option<SharedBlocks>,
    killer: KillSlot,
    /// Base backup's WAL that continues the log.
    written_before: Option<Written>,
    /// What is being looked at in several steps.
    under_way: Option<Written>,
    /// Writes looked at.
    seen: u64,
    broken: bool,
}

impl Session {
    /// Begins an election.
    pub fn start(
        number: u64,
        surroundings: Surroundings,
        grant: Grant,
        incarnation: Incarnation,
        configuration: Configuration,
    ) -> Rc<Self> {
        let proposer = Proposer::new(grant, incarnation, configuration);
        let state = State {
            proposer,
            links: BTreeMap::new(),
            troubles: BTreeMap::new(),
            wal: None,
            newest_timeline: PgTimeline::default(),
        };
        surroundings.view.set_commit_lsn(Lsn::INVALID);
        surroundings.view.set_record_end(Lsn::INVALID);
        surroundings.view.set_lease_until(Instant::default());
        surroundings.view.set_quorum(false);
        let session = Rc::new(Self {
            number,
            surroundings,
            state: RefCell::new(state),
            changed: Event::new(),
            ending: Event::new(),
            armed: Cell::new(None),
            ended: Cell::new(false),
        });
        session.pump(&mut session.state.borrow_mut());
        driver::spawn(keep_time(session.clone()));
        session
    }

    /// Ends it: connections are closed, tasks end.
    pub fn end(&self) {
        self.ended.set(true);
        let mut state = self.state.borrow_mut();
        for link in std::mem::take(&mut state.links).into_values() {
            link.close();
        }
        state.wal = None;
        self.surroundings.view.set_quorum(false);
        self.surroundings.view.set_members(Vec::new());
        self.changed.set();
        self.ending.set();
    }

    /// Proposes what PostgreSQL writes from now on.
    pub fn attach(self: &Rc<Self>, attachment: Attachment) {
        let Attachment { area, pgdata, segment_bytes, system_id, written_before, blocks, killer } = attachment;
        let mut state = self.state.borrow_mut();
        let Some(start) = state.proposer.start() else {
            unreachable!("the agent attaches PostgreSQL after the election only");
        };
        area.renew(state.proposer.lease_until().0);
        if state.proposer.is_fenced() {
            area.fence_writer();
        }
        let framer = Framer::new(&pgdata, start, segment_bytes, system_id);
        state.wal = Some(Wal {
            area: area.clone(),
            framer,
            queue: SettledQueue::new(),
            blocks,
            killer,
            written_before,
            under_way: None,
            seen: 0,
            broken: false,
        });
        drop(state);
        driver::spawn(answer_doorbell(self.clone(), area));
    }

    /// The end of the log, once all that PostgreSQL wrote is committed.
    pub async fn finish(&self, limit: Duration) -> Option<Lsn> {
        let deadline = now().after(limit);
        while now() < deadline && !self.ended.get() {
            if let Some(end) = self.committed_end()? {
                // The safekeepers hear of the last commit, so that followers get all of it.
                driver::sleep(ANNOUNCE_DELAY * 2).await;
                return Some(end);
            }
            driver::sleep(FINISH_INTERVAL).await;
        }
        None
    }

    /// Where the log ends, if all that PostgreSQL wrote is committed; the outer `None`: it will never be.
    fn committed_end(&self) -> Option<Option<Lsn>> {
        let state = self.state.borrow();
        let wal = state.wal.as_ref().filter(|wal| !wal.broken)?;
        let seen = wal.written_before.is_none() && wal.seen == wal.area.flush_target();
        let end = wal.framer.record_end();
        Some((seen && state.proposer.commit_lsn() == end && wal.framer.sendable() == end).then_some(end))
    }

    /// Looks at what PostgreSQL has written; true when there is more to look at.
    fn take_wal(self: &Rc<Self>) -> bool {
        let mut state = self.state.borrow_mut();
        let moment = now();
        let State { proposer, wal: Some(wal), newest_timeline, .. } = &mut *state else { return false };
        if wal.broken {
            return false;
        }
        let before = wal.written_before;
        let written = before.or(wal.under_way.take()).unwrap_or_else(|| wal.area.written());
        if before.is_none() && written.sequence == wal.seen {
            return false;
        }
        let result = wal.step(proposer, newest_timeline, written, moment);
        match result {
            Ok(true) if before.is_some() => wal.written_before = None,
            Ok(true) => {
                wal.seen = written.sequence;
                wal.queue.push(written.sequence, wal.framer.record_end(), moment);
                let commit_lsn = proposer.commit_lsn();
                self.settle(wal, commit_lsn, moment);
            }
            Ok(false) if before.is_some() => {}
            Ok(false) => wal.under_way = Some(written),
            Err(error) => {
                wal.break_off();
                tracing::error!(%error, "PostgreSQL is killed");
                (self.surroundings.on_event)(self.number, CoreEvent::Broken(error));
                return false;
            }
        }
        self.surroundings.view.set_record_end(wal.framer.record_end());
        self.pump(&mut state);
        true
    }

    fn settle(&self, wal: &mut Wal, commit_lsn: Lsn, moment: Instant) {
        if let Some(settled) = wal.queue.commit(commit_lsn) {
            wal.area.settle_writes(settled.sequence);
            self.surroundings.metrics.commit_wait_seconds.observe(moment.since(settled.since).as_secs_f64());
        }
    }

    /// Performs everything that the proposer wants done.
    fn pump(self: &Rc<Self>, state: &mut State) {
        while let Some(command) = state.proposer.poll_command() {
            self.perform(state, command);
        }
        let wanted = state.proposer.poll_timeout();
        if wanted.is_some_and(|wanted| self.armed.get().is_none_or(|armed| wanted < armed)) {
            self.changed.set();
        }
    }

    fn perform(self: &Rc<Self>, state: &mut State, command: ProposerCommand) {
        let surroundings = &self.surroundings;
        match command {
            ProposerCommand::Committed { commit_lsn } => {
                surroundings.view.set_commit_lsn(commit_lsn);
                if let Some(wal) = &mut state.wal {
                    // Before the settled flush returns: what it has made durable may be evicted from then on.
                    if let Some(blocks) = &wal.blocks {
                        blocks.map().set_commit_lsn(commit_lsn.0);
                    }
                    self.settle(wal, commit_lsn, now());
                }
            }
            ProposerCommand::SendWal { member, append } => self.send_wal(state, member, append),
            ProposerCommand::Send { member, message } => {
                self.send(state, member, &Message::Proposer(message, &[]));
            }
            ProposerCommand::Lease { until } => {
                surroundings.view.set_lease_until(until);
                if let Some(wal) = &state.wal {
                    wal.area.renew(until.0);
                }
            }
            ProposerCommand::Connect { member, address } => {
                let link = Rc::new(Link::default());
                if let Some(earlier) = state.links.insert(member, link.clone()) {
                    earlier.close();
                }
                driver::spawn(hold_link(self.clone(), member, address, link));
            }
            ProposerCommand::Disconnect { member } => {
                if let Some(link) = state.links.remove(&member) {
                    link.close();
                }
            }
            ProposerCommand::Elected { ballot, start, timelines, .. } => {
                state.newest_timeline = timelines.0.last().map_or(start.timeline, |entry| entry.timeline);
                surroundings.view.set_record_end(start.record_end);
                let holds = |(member, follows, flush_lsn): (MemberId, bool, Lsn)| {
                    (follows && flush_lsn >= start.record_end).then_some(member)
                };
                let holders = state.proposer.members().filter_map(holds).collect();
                let event = ElectedEvent { ballot, end_of_log: start, timelines, holders };
                (surroundings.on_event)(self.number, CoreEvent::Elected(Box::new(event)));
            }
            ProposerCommand::Quorum { present } => {
                surroundings.view.set_quorum(present);
                match present {
                    true => tracing::info!("a majority of safekeepers follows"),
                    false => tracing::info!("no majority of safekeepers follows: commits wait"),
                }
            }
            ProposerCommand::Trouble { member, trouble } => {
                let text = trouble_text(&trouble);
                let known = state.troubles.insert(member, text.clone());
                if known.as_ref() != Some(&text) {
                    tracing::warn!(member = member.0, "{text}");
                }
            }
            ProposerCommand::Fenced { ballot, writer } => {
                if let Some(wal) = &mut state.wal {
                    wal.break_off();
                }
                tracing::info!(%ballot, %writer, "fenced: another writer was granted the log");
                (surroundings.on_event)(self.number, CoreEvent::Fenced { ballot, writer });
            }
        }
    }

    fn send(&self, state: &State, member: MemberId, message: &Message<'_>) {
        let Some(link) = state.links.get(&member) else { return };
        let mut encoded = Ok(());
        link.send(|outbox| encoded = link::encode_message(message, outbox));
        if let Err(error) = encoded {
            // A history of more than a megabyte: no safekeeper could take it.
            tracing::error!(member = member.0, %error, "a message cannot be sent");
            link.close();
        }
    }

    fn send_wal(&self, state: &mut State, member: MemberId, append: Append) {
        let (begin, end) = (append.begin_lsn, append.end_lsn);
        let Some(wal) = &mut state.wal else { return };
        match wal.framer.bytes(begin, end) {
            Ok(bytes) => {
                if let Some(link) = state.links.get(&member) {
                    let message = Message::Proposer(ProposerMessage::Append(append), bytes);
                    let mut encoded = Ok(());
                    link.send(|outbox| encoded = link::encode_message(&message, outbox));
                    match encoded {
                        Ok(()) => drop(self.surroundings.metrics.sent_bytes.inc_by(end.bytes_since(begin))),
                        Err(error) => {
                            tracing::error!(member = member.0, %error, "WAL cannot be sent");
                            link.close();
                        }
                    }
                }
            }
            Err(unavailable) => {
                state.proposer.handle_unavailable(member, begin, unavailable.available_from, now());
            }
        }
    }

    /// What other threads see of the safekeepers. One that follows has no trouble any more.
    fn show_members(&self, state: &mut State) {
        let State { proposer, troubles, .. } = state;
        for (member, ..) in proposer.members().filter(|(_, follows, _)| *follows) {
            troubles.remove(&member);
        }
        let view = |(member, follows, flush_lsn)| MemberView {
            member,
            follows,
            flush_lsn,
            trouble: troubles.get(&member).cloned(),
        };
        self.surroundings.view.set_members(proposer.members().map(view).collect());
    }
}

impl Wal {
    /// One step through `written`; true when it was the last.
    fn step(
        &mut self,
        proposer: &mut Proposer,
        newest_timeline: &mut PgTimeline,
        written: Written,
        moment: Instant,
    ) -> Result<bool, FramerError> {
        // Also when the bytes are of before X: the WAL receiver's are settled at once, but those of a server that promoted
        // itself before it had replayed the log are another history, and must not be.
        let timeline = PgTimeline(written.timeline);
        if let Some(entry) = self.framer.timeline_entry(timeline, *newest_timeline)? {
            *newest_timeline = timeline;
            proposer.handle_timeline(entry);
        }
        if !self.framer.is_news(written) {
            return Ok(true);
        }
        let step = self.framer.step(written)?;
        proposer.handle_wal(self.framer.start(), step.sendable, moment);
        Ok(step.done)
    }

    /// Ends this PostgreSQL: nothing that it writes is looked at any more, and no wait of it returns.
    fn break_off(&mut self) {
        self.broken = true;
        self.area.fence_writer();
        if let Some(killer) = &*self.killer.lock().unwrap_or_else(PoisonError::into_inner) {
            killer.kill();
        }
    }
}

/// Connects and stays connected until one side ends it.
async fn hold_link(session: Rc<Session>, member: MemberId, address: String, link: Rc<Link>) {
    let is_current = |state: &State| state.links.get(&member).is_some_and(|current| Rc::ptr_eq(current, &link));
    let on_status = |status: AcceptorStatus| {
        let mut state = session.state.borrow_mut();
        if is_current(&state) {
            tracing::debug!(member = member.0, address, "connected to a safekeeper");
            state.proposer.handle_connected(member, &status, now());
            session.pump(&mut state);
        }
    };
    let on_message = |message: AcceptorMessage| {
        let mut state = session.state.borrow_mut();
        if is_current(&state) {
            // Usual for a moment after a grant; where it lasts, the status says that the fence is missing.
            if let AcceptorMessage::Refused(Refused { reason: Refusal::TermNotGranted { known }, .. }) = &message {
                let text = format!("the term was not granted here (fence): the last one known is {}", known.0);
                state.troubles.insert(member, text);
                session.show_members(&mut state);
            }
            state.proposer.handle_message(member, message, now());
            session.pump(&mut state);
        }
    };
    let result = link::converse(&link, &address, &session.surroundings.greeting, on_status, on_message).await;
    link.close();
    let mut state = session.state.borrow_mut();
    if !is_current(&state) {
        return;
    }
    state.links.remove(&member);
    if let Err(error) = result {
        let text = error.to_string();
        // Said once, not with every attempt.
        if state.troubles.insert(member, text.clone()).as_ref() != Some(&text) {
            tracing::info!(member = member.0, address, %error, "no connection to a safekeeper");
        }
    }
    state.proposer.handle_disconnected(member, now());
    session.pump(&mut state);
}

/// Calls the proposer when it wants to be called.
async fn keep_time(session: Rc<Session>) {
    while !session.ended.get() {
        let wanted = session.state.borrow().proposer.poll_timeout();
        session.armed.set(wanted);
        let earlier = session.changed.until(|| {
            let wanted_now = session.state.borrow().proposer.poll_timeout();
            let rearm = match (wanted_now, session.armed.get()) {
                (Some(wanted), Some(armed)) => wanted < armed,
                (Some(_), None) => true,
                (None, _) => false,
            };
            (rearm || session.ended.get()).then_some(())
        });
        match wanted {
            None => earlier.await,
            Some(moment) => {
                select(pin!(driver::sleep_until(moment)), pin!(earlier)).await;
            }
        }
        if session.ended.get() {
            return;
        }
        let mut state = session.state.borrow_mut();
        let moment = now();
        if state.proposer.poll_timeout().is_some_and(|wanted| wanted <= moment) {
            state.proposer.handle_timeout(moment);
            // Not to be rearmed by `pump`: the deadline is read anew right after.
            session.armed.set(Some(Instant(0)));
            session.pump(&mut state);
            session.show_members(&mut state);
        }
    }
}

/// Looks at PostgreSQL's WAL whenever it was written.
async fn answer_doorbell(session: Rc<Session>, area: SharedArea) {
    let waiter = match area.doorbell().waiter() {
        Ok(waiter) => waiter,
        // Without a doorbell nothing could ever be committed: better no agent than a silent one.
        Err(error) => panic!("the doorbell cannot be waited for: {error}"),
    };
    while !session.ended.get() {
        if session.take_wal() {
            // A writer that never pauses must not keep the core from reading acknowledgements.
            core::yield_now().await;
            continue;
        }
        let seen = session.state.borrow().wal.as_ref().filter(|wal| !wal.broken).map(|wal| wal.seen);
        let Some(seen) = seen else { return };
        if !area.prepare_sleep(seen) {
            continue;
        }
        let ended = session.ending.until(|| session.ended.get().then_some(()));
        drop(select(pin!(waiter.wait()), pin!(ended)).await);
    }
}

fn trouble_text(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Refused(refusal) => format!("a safekeeper refuses: {refusal:?}"),
        Trouble::OtherDisk(status) => {
            format!("member {} answers with disk {}, which is not the configuration's", status.member.0, status.disk)
        }
        Trouble::EndOfLogBelowCommit { end, commit_lsn } => {
            format!(
                "the log of the voters ends at {end}, but {commit_lsn} is known to be committed: waiting for more votes"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use consensus::Member;
    use pgtypes::{DiskId, Generation, Term};

    const SEGMENT: u64 = 1 << 20;

    fn proposer() -> Proposer {
        let member = Member { member: MemberId(1), disk: DiskId::default(), address: "a:1".into() };
        let configuration = Configuration { generation: Generation(0), members: vec![member], new_members: None };
        Proposer::new(Grant { term: Term(1), writer: WriterId::default() }, Incarnation::default(), configuration)
    }

    /// `pg_ctl promote` during the replay: the new timeline begins below X, where the log has other records. Taken for the
    /// WAL receiver's, its commits would be acknowledged by this machine alone.
    #[test]
    fn wal_of_a_server_that_was_promoted_before_the_end_of_the_log_is_never_settled() {
        let pgdata = std::env::temp_dir().join(format!("lakebase-session-promoted-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&pgdata);
        std::fs::create_dir_all(pgdata.join("pg_wal")).expect("created");
        let start = FrameSummary {
            record_end: Lsn(SEGMENT + 50_000),
            record_start: Lsn(SEGMENT + 49_000),
            timeline: PgTimeline(1),
            ..FrameSummary::default()
        };
        let mut wal = Wal {
            area: SharedArea::create(SEGMENT, 60_000).expect("memory"),
            framer: Framer::new(&pgdata, start, SEGMENT, SystemId(77)),
            queue: SettledQueue::new(),
            blocks: None,
            killer: KillSlot::default(),
            written_before: None,
            under_way: None,
            seen: 0,
            broken: false,
        };
        let (mut proposer, mut newest) = (proposer(), PgTimeline(1));
        let mut step = |timeline| {
            let (written_lsn, final_lsn) = (SEGMENT + 24_576, SEGMENT + 16_384);
            let written = Written { sequence: 1, written_lsn, final_lsn, timeline };
            wal.step(&mut proposer, &mut newest, written, Instant(0))
        };
        assert!(matches!(step(1), Ok(true)), "the WAL receiver's");

        std::fs::write(pgdata.join("pg_wal/00000002.history"), "1\t0/102000\tpromoted\n").expect("written");
        assert!(matches!(step(2), Err(FramerError::Timeline { .. })));
        std::fs::remove_dir_all(pgdata).expect("removed");
    }
}
