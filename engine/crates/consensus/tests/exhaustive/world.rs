//! A small world around the real machines: three acceptors with their disks, two writers, an operator, a network.
//!
//! Every step that may happen next is an [`Action`]; a world is a value, so that all orders can be tried. What makes
//! that possible:
//! - The network keeps every message: it may be delivered never, late, in any order, and again. So loss, delay,
//!   reordering and duplication need no steps of their own, and an acceptor that starts again needs no new connection.
//!   (Connections that break are part of what must come about, see [`World::recovers`].)
//! - Answers arrive at once, and twice. One that arrives later tells a writer less, never more: positions only rise in
//!   a ballot.
//! - State is persisted at once: a crash before it is as if the message had not arrived, except behind a truncation,
//!   for which there is a step.
//! - Time stands still: acceptors hear appends at one moment and votes so much later that every promise is over, since
//!   no property checked here may depend on clocks (`lease.rs` checks the ones that do).

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use consensus::{
    Acceptor, AcceptorCommand, AcceptorIdentity, AcceptorState, CatchUpTask, Configuration, Grant, Member, Proposer,
    ProposerCommand, TermHistory, Trouble,
    message::{AcceptorMessage, Append, ProposerMessage, Refusal, Voted},
};
use pgtypes::{
    Ballot, DiskId, FrameSummary, Generation, Incarnation, Instant, LogId, Lsn, MemberId, PgTimeline, SystemId, Term,
    WriterId,
};

use crate::search::{Mix, Model};

pub const ACCEPTORS: usize = 3;
pub const WRITERS: usize = 2;
const MAJORITY: usize = 2;
/// Smallest piece of WAL that travels by itself.
const CHUNK_BYTES: u64 = 8;
const START: Lsn = Lsn(16 << 20);
/// When acceptors hear appends; votes and fences come when every promise is over.
const APPEND_TIME: Instant = Instant(0);
const VOTE_TIME: Instant = Instant(100_000_000_000);
/// When writers hear messages, and when their timers fire: behind every delay of theirs, before an acceptor counts as
/// silent.
const WRITER_TIME: Instant = Instant(1_000_000_000_000);
const TIMER_TIME: Instant = Instant(1_002_000_000_000);
/// Far more rounds, and steps in one, than any good end needs.
const ROUNDS_MAX: usize = 60;
const STEPS_MAX: usize = 500;

/// How much may happen in one history.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub terms: u64,
    /// Records that the first ballot writes, and each later one, as soon as it is decided.
    pub records: (u8, u8),
    /// A record is written, sent and synced in this many pieces.
    pub chunks_per_record: u8,
    pub acceptor_crashes: u8,
    pub writer_crashes: u8,
    pub replaced_disks: u8,
    /// Appends that are not synced at once.
    pub slow_syncs: u8,
    /// Whether acceptors are told what is committed. Then they serve it; it decides nothing else.
    pub commit_told: bool,
}

/// What was done so far of what [`Bounds`] allows.
#[derive(Clone, Copy, Default, Hash)]
struct Used {
    acceptor_crashes: u8,
    writer_crashes: u8,
    replaced_disks: u8,
    slow_syncs: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// The acceptor takes a message that a writer has sent at some time.
    Deliver { writer: usize, acceptor: usize, message: usize },
    /// It takes WAL, which its disk does not sync yet.
    DeliverUnsynced { writer: usize, acceptor: usize, message: usize },
    /// It cuts its log as an election asks, and crashes before that is persisted.
    CutAndCrash { writer: usize, acceptor: usize, message: usize },
    /// Its disk syncs what was accepted.
    Flush { acceptor: usize },
    /// It fetches a record from a peer.
    Fetch { acceptor: usize, donor: usize },
    /// It learns a fence from a peer.
    Ask { acceptor: usize, peer: usize },
    /// A fence reaches an acceptor; the first of the next term begins that term, a majority grants it.
    Fence { term: u64, acceptor: usize },
    /// What the writer was to repeat is due.
    Timer { writer: usize },
    /// The acceptor starts again; what was not synced may have reached the disk or not.
    CrashAcceptor { acceptor: usize, wal_written: bool },
    /// The run of a writer ends and another begins, which learns the state of one acceptor last.
    CrashWriter { writer: usize, last: usize },
    /// The acceptor comes back with an empty disk.
    ReplaceDisk { acceptor: usize },
}

#[derive(Clone)]
struct AcceptorNode {
    machine: Acceptor,
    /// What the control file holds.
    disk: AcceptorState,
    /// WAL accepted, a byte for each chunk that says which ballot wrote it; the first `durable` are synced.
    log: Vec<u8>,
    durable: usize,
    task: Option<CatchUpTask>,
    asking: bool,
    /// Its disk is the configuration's.
    listed: bool,
}

#[derive(Clone)]
struct WriterNode {
    term: u64,
    run: u8,
    machine: Option<Proposer>,
    /// Names what this run sends.
    connection: u64,
    /// The ballot it was elected in, the log that it was elected with, and what it has written since.
    elected: Option<Ballot>,
    log: Vec<u8>,
    decided: bool,
    /// The logs that it was voted with in the present ballot.
    votes: Vec<(Voted, Vec<u8>)>,
}

/// Something that a run of a writer has sent to an acceptor.
#[derive(Clone)]
struct Sent {
    connection: u64,
    message: Message,
}

#[derive(Clone, PartialEq)]
enum Message {
    Header(ProposerMessage),
    Wal(Append, Vec<u8>),
}

#[derive(Clone, Default)]
struct Operator {
    begun: u64,
    granted: u64,
    /// Which acceptors have answered the fence of the term that is not granted yet, as bits.
    answered: u8,
}

#[derive(Clone)]
pub struct World {
    bounds: Bounds,
    used: Used,
    acceptors: [Arc<AcceptorNode>; ACCEPTORS],
    writers: [Arc<WriterNode>; WRITERS],
    network: [[Arc<Vec<Sent>>; ACCEPTORS]; WRITERS],
    operator: Operator,
    /// All that was ever reported as committed.
    committed: Vec<u8>,
    next_connection: u64,
    /// Nothing fails any more: messages arrive once, in order, on connections.
    calm: bool,
    /// The writers' time.
    now: Instant,
    /// The first property that did not hold.
    violation: Option<String>,
}

fn lsn(chunks: usize) -> Lsn {
    START.advance(chunks as u64 * CHUNK_BYTES)
}

fn chunks(lsn: Lsn) -> usize {
    (lsn.bytes_since(START) / CHUNK_BYTES) as usize
}

fn configuration() -> Configuration {
    let member = |n: usize| Member { member: member_id(n), disk: DiskId([n as u8 + 1; 16]), address: String::new() };
    Configuration { generation: Generation(1), members: (0..ACCEPTORS).map(member).collect(), new_members: None }
}

fn member_id(acceptor: usize) -> MemberId {
    MemberId(acceptor as u32 + 1)
}

fn writer_id(writer: usize) -> WriterId {
    WriterId([writer as u8 + 1; 16])
}

/// The writer of a term: they take turns.
fn writer_of(term: u64) -> usize {
    (term as usize + 1) % WRITERS
}

/// Whether a planted bug makes an acceptor accept what it had refused for good.
fn may_regress() -> bool {
    cfg!(any(feature = "bug-accept-stale-term", feature = "bug-forget-term-on-restart"))
}

fn is_prefix(a: &[u8], b: &[u8]) -> bool {
    b.starts_with(a)
}

impl Model for World {
    type Action = Action;

    fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        let (bounds, used) = (&self.bounds, &self.used);
        for acceptor in 0..ACCEPTORS {
            let node = &self.acceptors[acceptor];
            let crash = used.acceptor_crashes < bounds.acceptor_crashes;
            for writer in 0..WRITERS {
                for (message, sent) in self.network[writer][acceptor].iter().enumerate() {
                    if !self.changes_something(acceptor, sent) {
                        continue;
                    }
                    actions.push(Action::Deliver { writer, acceptor, message });
                    match &sent.message {
                        Message::Wal(..) if used.slow_syncs < bounds.slow_syncs => {
                            actions.push(Action::DeliverUnsynced { writer, acceptor, message });
                        }
                        Message::Header(ProposerMessage::Elected(elected))
                            if crash && node.parts_from(&elected.history) =>
                        {
                            actions.push(Action::CutAndCrash { writer, acceptor, message });
                        }
                        _ => {}
                    }
                }
            }
            if node.durable < node.log.len() {
                actions.push(Action::Flush { acceptor });
            }
            // A crash that loses nothing does not count; what it forgets changes nothing without a bug, or commits told.
            let unsynced = node.durable < node.log.len();
            if if unsynced { crash } else { bounds.commit_told || may_regress() } {
                actions.push(Action::CrashAcceptor { acceptor, wal_written: false });
            }
            if crash && unsynced {
                actions.push(Action::CrashAcceptor { acceptor, wal_written: true });
            }
            if used.replaced_disks < bounds.replaced_disks && node.listed {
                actions.push(Action::ReplaceDisk { acceptor });
            }
            for other in (0..ACCEPTORS).filter(|other| *other != acceptor) {
                if node.task.is_some() {
                    actions.push(Action::Fetch { acceptor, donor: other });
                }
                if node.asking {
                    actions.push(Action::Ask { acceptor, peer: other });
                }
            }
            let may_begin = self.operator.granted == self.operator.begun && self.operator.begun < bounds.terms;
            // The fence of a term that is granted comes with its vote: an acceptor that is fenced and no more could do
            // less than one that is not.
            let first = if may_regress() { 1 } else { self.operator.granted + 1 };
            for term in first..=self.operator.begun + u64::from(may_begin) {
                if node.machine.state().ballot.term < Term(term) {
                    actions.push(Action::Fence { term, acceptor });
                }
            }
        }
        for writer in 0..WRITERS {
            let Some(machine) = &self.writers[writer].machine else { continue };
            if machine.is_retrying() {
                actions.push(Action::Timer { writer });
            }
            if used.writer_crashes < bounds.writer_crashes {
                // Which acceptor is heard last matters only when the others know another attempt then.
                let attempt = |acceptor: usize| self.acceptors[acceptor].machine.state().ballot;
                let mut seen = Vec::new();
                for last in 0..ACCEPTORS {
                    let highest = (0..ACCEPTORS).filter(|other| *other != last).map(attempt).max();
                    if !seen.contains(&highest) {
                        seen.push(highest);
                        actions.push(Action::CrashWriter { writer, last });
                    }
                }
            }
        }
        actions
    }

    /// The world after `action`.
    fn after(&self, action: Action) -> World {
        let mut world = self.clone();
        world.apply(action);
        world.settle();
        world.check();
        world
    }

    /// Equal for worlds with the same future, apart from how acceptors are numbered.
    fn fingerprint(&self) -> u64 {
        let mut mix = Mix::default();
        (&self.used, &self.committed).hash(&mut mix);
        let mut parts: [u64; ACCEPTORS] = std::array::from_fn(|acceptor| self.hash_acceptor(acceptor));
        parts.sort_unstable();
        parts.hash(&mut mix);
        for node in &self.writers {
            (node.term, node.run, node.decided, &node.log, node.elected).hash(&mut mix);
            if let Some(machine) = &node.machine {
                machine.hash_protocol_state(&mut mix);
            }
        }
        (self.operator.begun, self.operator.granted).hash(&mut mix);
        mix.finish()
    }

    fn violation(&self) -> Option<&String> {
        self.violation.as_ref()
    }

    /// Goes on without faults, on new connections, until the writer of the last term has begun and what it was elected
    /// with can be read from every acceptor.
    fn recovers(&self, known: &mut dyn FnMut(&World) -> bool) -> Result<(), String> {
        // With a planted bug, the history to be shown is one that leads all the way to what breaks.
        if crate::planted().is_some() {
            return Ok(());
        }
        let mut world = self.clone();
        world.calm = true;
        world.now = TIMER_TIME;
        let term = world.operator.begun;
        for writer in 0..WRITERS {
            for acceptor in 0..ACCEPTORS {
                world.reconnect(writer, acceptor);
            }
        }
        for acceptor in 0..ACCEPTORS {
            world.apply(Action::Fence { term, acceptor });
        }
        for _ in 0..ROUNDS_MAX {
            world.now = world.now.after(Duration::from_millis(500));
            if world.round(known) {
                return Ok(());
            }
            if let Some(what) = world.violation {
                return Err(what);
            }
        }
        Err(String::from("the end of the log is never served"))
    }
}

impl World {
    /// A log that nobody has written to; term 1 is known to all and granted.
    pub fn new(bounds: Bounds) -> World {
        let acceptor = |n: usize| Arc::new(AcceptorNode::created(n, DiskId([n as u8 + 1; 16])));
        let writer = || Arc::new(WriterNode::created());
        let mut world = World {
            bounds,
            used: Used::default(),
            acceptors: [acceptor(0), acceptor(1), acceptor(2)],
            writers: [writer(), writer()],
            network: Default::default(),
            operator: Operator::default(),
            committed: Vec::new(),
            next_connection: 1,
            calm: false,
            now: WRITER_TIME,
            violation: None,
        };
        for acceptor in 0..ACCEPTORS {
            world.apply(Action::Fence { term: 1, acceptor });
        }
        world
    }

    fn summary(&self, end: usize) -> FrameSummary {
        let per_record = self.bounds.chunks_per_record as usize;
        FrameSummary {
            record_end: lsn(end / per_record * per_record),
            timeline: PgTimeline(1),
            ..FrameSummary::default()
        }
    }

    fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// Whether a message can change anything when it is delivered now: what the acceptor would refuse or has carried
    /// out already is left where it is.
    fn changes_something(&self, acceptor: usize, sent: &Sent) -> bool {
        let node = &self.acceptors[acceptor];
        let state = node.machine.state();
        match &sent.message {
            Message::Header(ProposerMessage::Vote(vote)) => {
                let again = vote.ballot == state.ballot && vote.incarnation == state.incarnation;
                vote.ballot >= state.ballot && !again
            }
            Message::Header(ProposerMessage::Elected(elected)) => {
                let clean = node.machine.receive_lsn() == node.machine.flush().record_end;
                let again = state.elected == elected.ballot && clean && node.machine.hears(sent.connection);
                elected.ballot == state.ballot && !again
            }
            Message::Header(ProposerMessage::CatchUp(catch_up)) => {
                let wants = node.task.is_none() && node.machine.receive_lsn() < catch_up.until;
                wants && node.machine.check_fetched(catch_up.ballot, node.machine.receive_lsn()).is_ok()
            }
            Message::Header(ProposerMessage::Append(_)) => false,
            Message::Wal(append, _) => node.machine.check_append(sent.connection, append).is_ok(),
        }
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Deliver { writer, acceptor, message } => {
                let sent = self.network[writer][acceptor][message].clone();
                let ballot = sent.message.ballot();
                let is_vote = matches!(sent.message, Message::Header(ProposerMessage::Vote(_)));
                if is_vote {
                    self.apply(Action::Fence { term: ballot.term.0, acceptor });
                }
                self.deliver(acceptor, sent);
                self.flush(acceptor);
                // With a vote that came behind the election comes the election: in between, the acceptor could do less
                // than before the vote.
                let late = is_vote && self.writers[writer].elected == Some(ballot);
                let elects = |sent: &&Sent| {
                    sent.message.ballot() == ballot
                        && matches!(sent.message, Message::Header(ProposerMessage::Elected(_)))
                };
                if let Some(sent) = self.network[writer][acceptor].iter().find(elects).filter(|_| late).cloned() {
                    self.deliver(acceptor, sent);
                }
            }
            Action::DeliverUnsynced { writer, acceptor, message } => {
                self.used.slow_syncs += 1;
                let sent = self.network[writer][acceptor][message].clone();
                self.deliver(acceptor, sent);
            }
            Action::CutAndCrash { writer, acceptor, message } => {
                self.used.acceptor_crashes += 1;
                let sent = self.network[writer][acceptor][message].clone();
                if let Message::Header(message) = sent.message {
                    let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                    node.machine.handle_message(sent.connection, message, APPEND_TIME);
                    if let Some(AcceptorCommand::Truncate { to }) = node.machine.poll_command() {
                        node.log.truncate(chunks(to));
                        node.durable = node.log.len();
                    }
                }
                self.restart_acceptor(acceptor);
            }
            Action::Flush { acceptor } => self.flush(acceptor),
            Action::Fetch { acceptor, donor } => self.fetch(acceptor, donor),
            Action::Ask { acceptor, peer } => {
                let (ballot, writer) = {
                    let state = self.acceptors[peer].machine.state();
                    (state.ballot, state.writer)
                };
                let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                node.asking = false;
                node.machine.handle_peer_ballot(ballot.term, writer);
                self.drain_acceptor(acceptor);
            }
            Action::Fence { term, acceptor } => {
                if term > self.operator.begun {
                    self.operator.begun = term;
                    self.operator.answered = 0;
                }
                let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                node.machine.handle_fence(term, Term(term), writer_id(writer_of(term)), VOTE_TIME);
                self.drain_acceptor(acceptor);
            }
            Action::Timer { writer } => {
                let now = self.now.max(TIMER_TIME);
                let node = Arc::make_mut(&mut self.writers[writer]);
                if let Some(machine) = &mut node.machine {
                    machine.handle_timeout(now);
                }
                self.drain_writer(writer);
            }
            Action::CrashAcceptor { acceptor, wal_written } => {
                let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                self.used.acceptor_crashes += u8::from(node.durable < node.log.len());
                if wal_written {
                    node.durable = node.log.len();
                }
                self.restart_acceptor(acceptor);
            }
            Action::CrashWriter { writer, last } => {
                self.used.writer_crashes += 1;
                let term = self.writers[writer].term;
                self.start_writer(writer, term, last);
            }
            Action::ReplaceDisk { acceptor } => {
                self.used.replaced_disks += 1;
                let created = AcceptorNode::created(acceptor, DiskId([100 + acceptor as u8; 16]));
                self.acceptors[acceptor] = Arc::new(AcceptorNode { listed: false, ..created });
                for writer in 0..WRITERS {
                    self.reconnect(writer, acceptor);
                }
            }
        }
    }

    /// Does what can be done at once without losing a history in which something breaks.
    fn settle(&mut self) {
        self.shake_hands();
        if may_regress() || self.used.replaced_disks > 0 {
            return;
        }
        // Messages of ballots below the acceptor's are refused now and for good.
        for of_writer in &mut self.network {
            for (acceptor, sent) in of_writer.iter_mut().enumerate() {
                let known = self.acceptors[acceptor].machine.state().ballot;
                if sent.iter().any(|sent| sent.message.ballot() < known) {
                    Arc::make_mut(sent).retain(|sent| sent.message.ballot() >= known);
                }
            }
        }
        // A writer that every acceptor refuses is as good as dead.
        for writer in 0..WRITERS {
            let term = Term(self.writers[writer].term);
            let fenced = self.acceptors.iter().all(|node| node.machine.state().ballot.term > term);
            if fenced && self.writers[writer].machine.is_some() {
                self.end_writer(writer);
            }
        }
    }

    /// Delivers what changes nothing by itself: an election that the acceptor has accepted before it crashed, and where
    /// to fetch from.
    fn shake_hands(&mut self) {
        for writer in 0..WRITERS {
            for acceptor in 0..ACCEPTORS {
                let harmless = |sent: &&Sent| match &sent.message {
                    Message::Header(ProposerMessage::Elected(elected)) => {
                        let node = &self.acceptors[acceptor];
                        let clean = node.machine.receive_lsn() == node.machine.flush().record_end;
                        let present = self.writers[writer].connection == sent.connection;
                        clean && present && elected.ballot == node.machine.state().elected
                    }
                    Message::Header(ProposerMessage::CatchUp(_)) => true,
                    _ => false,
                };
                let found = self.network[writer][acceptor]
                    .iter()
                    .find(|sent| harmless(sent) && self.changes_something(acceptor, sent));
                if let Some(sent) = found.cloned() {
                    self.deliver(acceptor, sent);
                }
            }
        }
    }

    // ---- acceptors ----

    fn deliver(&mut self, acceptor: usize, sent: Sent) {
        let connection = sent.connection;
        match sent.message {
            Message::Header(message) => {
                let now = match &message {
                    ProposerMessage::Vote(_) => VOTE_TIME,
                    _ => APPEND_TIME,
                };
                Arc::make_mut(&mut self.acceptors[acceptor]).machine.handle_message(connection, message, now);
            }
            Message::Wal(append, content) => {
                let summary = self.summary(chunks(append.end_lsn));
                let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                match node.machine.check_append(connection, &append) {
                    Err(refused) => node.machine.refuse(connection, refused),
                    Ok(()) => {
                        node.log.extend_from_slice(&content);
                        node.machine.appended(connection, &append, summary, APPEND_TIME);
                    }
                }
            }
        }
        self.drain_acceptor(acceptor);
    }

    /// The disk syncs what was accepted.
    fn flush(&mut self, acceptor: usize) {
        if self.acceptors[acceptor].durable == self.acceptors[acceptor].log.len() {
            return;
        }
        let summary = self.summary(self.acceptors[acceptor].log.len());
        let node = Arc::make_mut(&mut self.acceptors[acceptor]);
        node.durable = node.log.len();
        node.machine.handle_flushed(summary, lsn(node.durable));
        self.drain_acceptor(acceptor);
    }

    fn fetch(&mut self, acceptor: usize, donor: usize) {
        let Some(task) = self.acceptors[acceptor].task.clone() else { return };
        let begin = self.acceptors[acceptor].machine.receive_lsn();
        let per_record = self.bounds.chunks_per_record as usize;
        let end = (chunks(begin) / per_record + 1) * per_record;
        let end = end.min(chunks(task.until));
        let from = &self.acceptors[donor];
        let serves = from.listed && from.machine.may_serve(task.ballot, lsn(end)) && from.durable >= end;
        let content = (serves && chunks(begin) < end).then(|| from.log[chunks(begin)..end].to_vec());
        let summary = self.summary(end);
        let node = Arc::make_mut(&mut self.acceptors[acceptor]);
        if begin >= task.until || node.machine.check_fetched(task.ballot, begin).is_err() {
            node.task = None;
        } else if let Some(content) = content {
            node.log.extend_from_slice(&content);
            node.machine.fetched(lsn(end), summary);
            if end >= chunks(task.until) {
                node.task = None;
            }
            self.flush(acceptor);
        }
        self.drain_acceptor(acceptor);
    }

    fn drain_acceptor(&mut self, acceptor: usize) {
        loop {
            let command = Arc::make_mut(&mut self.acceptors[acceptor]).machine.poll_command();
            let Some(command) = command else { return };
            match command {
                AcceptorCommand::Persist { sequence, state, .. } => {
                    let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                    node.disk = state;
                    node.machine.handle_persisted(sequence);
                }
                AcceptorCommand::Truncate { to } => {
                    let summary = self.summary(chunks(to));
                    let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                    node.log.truncate(chunks(to));
                    node.durable = node.log.len();
                    // A position inside a record, which only a planted bug can ask for, is taken as it is.
                    node.machine.handle_truncated(FrameSummary { record_end: to, ..summary });
                }
                AcceptorCommand::CatchUp(task) => {
                    Arc::make_mut(&mut self.acceptors[acceptor]).task = Some(task);
                }
                AcceptorCommand::AskPeers => Arc::make_mut(&mut self.acceptors[acceptor]).asking = true,
                AcceptorCommand::Reply { connection, message } => {
                    self.answer(acceptor, connection, message.into_message());
                }
                AcceptorCommand::ReplyFence { request, result } => {
                    if result.is_ok() {
                        self.fence_answered(request, acceptor);
                    }
                }
                AcceptorCommand::ReplyConfiguration { .. } => {}
            }
        }
    }

    /// An acceptor starts again with what its disk holds.
    fn restart_acceptor(&mut self, acceptor: usize) {
        let summary = self.summary(self.acceptors[acceptor].durable);
        let node = Arc::make_mut(&mut self.acceptors[acceptor]);
        node.log.truncate(chunks(summary.record_end));
        node.durable = node.log.len();
        node.task = None;
        node.asking = false;
        let identity = node.machine.identity().clone();
        match Acceptor::new(identity, node.disk.clone(), summary, APPEND_TIME) {
            Ok(machine) => node.machine = machine,
            Err(error) => self.violate(format!("acceptor {acceptor} cannot start: {error}")),
        }
    }

    fn fence_answered(&mut self, term: u64, acceptor: usize) {
        if term != self.operator.begun || term == self.operator.granted {
            return;
        }
        self.operator.answered |= 1 << acceptor;
        if self.operator.answered.count_ones() as usize >= MAJORITY {
            self.operator.granted = term;
            self.operator.answered = 0;
            // All that statuses tell is the attempt, and a new term has none.
            self.start_writer(writer_of(term), term, ACCEPTORS - 1);
        }
    }

    // ---- writers ----

    /// A run of the writer begins; what the run before it has sent goes on.
    fn start_writer(&mut self, writer: usize, term: u64, last: usize) {
        let connection = self.next_connection;
        self.next_connection += 1;
        let run = self.writers[writer].run + 1;
        let grant = Grant { term: Term(term), writer: writer_id(writer) };
        let machine = Some(Proposer::new(grant, Incarnation([run; 16]), configuration()));
        self.writers[writer] = Arc::new(WriterNode { term, run, machine, connection, ..WriterNode::created() });
        for acceptor in (0..ACCEPTORS).filter(|acceptor| *acceptor != last).chain([last]) {
            self.connect(writer, acceptor);
        }
        self.drain_writer(writer);
    }

    fn end_writer(&mut self, writer: usize) {
        let (term, run) = (self.writers[writer].term, self.writers[writer].run);
        self.writers[writer] = Arc::new(WriterNode { term, run, ..WriterNode::created() });
    }

    fn connect(&mut self, writer: usize, acceptor: usize) {
        let status = self.acceptors[acceptor].machine.status();
        let node = Arc::make_mut(&mut self.writers[writer]);
        if let Some(machine) = &mut node.machine {
            machine.handle_connected(member_id(acceptor), &status, self.now);
        }
    }

    /// The connection breaks, with all that is under way when the network is calm, and is made again.
    fn reconnect(&mut self, writer: usize, acceptor: usize) {
        let node = Arc::make_mut(&mut self.writers[writer]);
        let Some(machine) = &mut node.machine else { return };
        machine.handle_disconnected(member_id(acceptor), self.now);
        let connection = node.connection;
        if self.calm {
            self.network[writer][acceptor] = Arc::default();
            Arc::make_mut(&mut self.acceptors[acceptor]).machine.handle_disconnected(connection);
        }
        self.connect(writer, acceptor);
        self.drain_writer(writer);
    }

    /// An answer arrives, and a second time.
    fn answer(&mut self, acceptor: usize, connection: u64, message: AcceptorMessage) {
        if !self.calm && is_only_news(&message) {
            return;
        }
        let Some(writer) = (0..WRITERS).find(|writer| self.writers[*writer].connection == connection) else { return };
        for _ in 0..2 {
            let now = self.now;
            let node = Arc::make_mut(&mut self.writers[writer]);
            let Some(machine) = &mut node.machine else { return };
            if let AcceptorMessage::Voted(voted) = &message
                && Some(voted.ballot) == machine.ballot()
            {
                let log = self.acceptors[acceptor].log[..chunks(voted.flush.record_end)].to_vec();
                node.votes.retain(|(vote, _)| vote.ballot == voted.ballot && vote.member != voted.member);
                node.votes.push((voted.clone(), log));
            }
            machine.handle_message(member_id(acceptor), message.clone(), now);
            self.drain_writer(writer);
        }
    }

    fn drain_writer(&mut self, writer: usize) {
        loop {
            let node = Arc::make_mut(&mut self.writers[writer]);
            let Some(command) = node.machine.as_mut().and_then(Proposer::poll_command) else { return };
            match command {
                ProposerCommand::Connect { member, .. } => {
                    // The first connections of a run are made by `start_writer`, in its order.
                    if self.calm {
                        self.connect(writer, member.0 as usize - 1);
                    }
                }
                ProposerCommand::Disconnect { member } => {
                    if self.calm {
                        self.network[writer][member.0 as usize - 1] = Arc::default();
                    }
                }
                ProposerCommand::Send { member, message } => self.send(writer, member.0 as usize - 1, message),
                ProposerCommand::SendWal { member, append } => self.send_wal(writer, member.0 as usize - 1, &append),
                ProposerCommand::Elected { start, .. } => self.decided(writer, chunks(start.record_end)),
                ProposerCommand::Committed { commit_lsn } => self.commits(writer, chunks(commit_lsn)),
                ProposerCommand::Fenced { .. } => self.end_writer(writer),
                ProposerCommand::Trouble { trouble: Trouble::EndOfLogBelowCommit { end, commit_lsn }, .. } => {
                    self.violate(format!("a majority elects a log that ends at {end}, below the commit {commit_lsn}"));
                }
                ProposerCommand::Lease { .. } | ProposerCommand::Quorum { .. } | ProposerCommand::Trouble { .. } => {}
            }
        }
    }

    fn send(&mut self, writer: usize, acceptor: usize, mut message: ProposerMessage) {
        let told = self.commit_is_told();
        match &mut message {
            // Heartbeats change nothing that is checked here but what acceptors know to be committed, and that comes
            // with appends, too.
            ProposerMessage::Append(_) if !self.calm => return,
            ProposerMessage::Elected(elected) => {
                let other = |node: &Arc<AcceptorNode>| {
                    let state = node.machine.state();
                    let follows = state.elected == elected.ballot && state.ballot == elected.ballot;
                    follows && state.incarnation != elected.incarnation
                };
                if self.acceptors.iter().any(other) {
                    self.violate(format!("ballot {} was won by two runs", elected.ballot));
                }
                if !told {
                    elected.commit_lsn = Lsn::INVALID;
                }
                let node = Arc::make_mut(&mut self.writers[writer]);
                if node.elected != Some(elected.ballot) {
                    let elects = |voted: &Voted| {
                        voted.flush.record_end == elected.start.record_end
                            && voted.history.continued(elected.ballot, voted.flush.record_end) == elected.history
                    };
                    let chosen = node.votes.iter().find(|(voted, _)| elects(voted));
                    node.log = chosen.expect("the elected log is a voter's").1.clone();
                    node.elected = Some(elected.ballot);
                    node.decided = false;
                }
                // Later votes do not change the election.
                node.votes.clear();
            }
            // Whoever has it may give it.
            ProposerMessage::CatchUp(catch_up) => catch_up.donors.clear(),
            ProposerMessage::Append(_) | ProposerMessage::Vote(_) => {}
        }
        self.put(writer, acceptor, Message::Header(message));
    }

    /// WAL travels in the smallest pieces.
    fn send_wal(&mut self, writer: usize, acceptor: usize, append: &Append) {
        for chunk in chunks(append.begin_lsn)..chunks(append.end_lsn) {
            let commit_lsn = if self.commit_is_told() { append.commit_lsn } else { Lsn::INVALID };
            let piece = Append { begin_lsn: lsn(chunk), end_lsn: lsn(chunk + 1), commit_lsn, ..append.clone() };
            let content = vec![self.writers[writer].log[chunk]];
            self.put(writer, acceptor, Message::Wal(piece, content));
        }
    }

    fn put(&mut self, writer: usize, acceptor: usize, message: Message) {
        let connection = self.writers[writer].connection;
        let sent = &self.network[writer][acceptor];
        let known = |sent: &Sent| sent.connection == connection && sent.message.is_as_good_as(&message);
        if self.calm || !sent.iter().any(known) {
            Arc::make_mut(&mut self.network[writer][acceptor]).push(Sent { connection, message });
        }
    }

    fn commit_is_told(&self) -> bool {
        self.calm || self.bounds.commit_told
    }

    // ---- properties ----

    /// X is decided: it is committed, and the writer begins to write.
    fn decided(&mut self, writer: usize, start: usize) {
        self.commits(writer, start);
        let node = Arc::make_mut(&mut self.writers[writer]);
        if node.decided {
            return self.violate(format!("writer {writer} was told twice that it is elected"));
        }
        node.decided = true;
        let Some(machine) = &mut node.machine else { return };
        let ballot = machine.ballot().expect("elected");
        let first = ballot.term == Term(1) && ballot.attempt.0 == 1;
        let records = if first { self.bounds.records.0 } else { self.bounds.records.1 };
        let mark = (ballot.term.0 * 16 + u64::from(ballot.attempt.0)) as u8;
        for _ in 0..records * self.bounds.chunks_per_record {
            node.log.push(mark);
        }
        machine.handle_wal(lsn(start), lsn(node.log.len()), self.now);
    }

    /// The writer reports that its log is committed up to `end`.
    fn commits(&mut self, writer: usize, end: usize) {
        let node = &self.writers[writer];
        let ballot = node.machine.as_ref().and_then(Proposer::ballot).expect("commits have a ballot");
        if end > node.log.len() {
            return self.violate(format!("ballot {ballot} commits {end}, but its log ends at {}", node.log.len()));
        }
        let content = node.log[..end].to_vec();
        let mut broken = Vec::new();
        if !end.is_multiple_of(self.bounds.chunks_per_record as usize) {
            broken.push(format!("ballot {ballot} commits {end}, inside a record"));
        }
        if !is_prefix(&content, &self.committed) && !is_prefix(&self.committed, &content) {
            broken.push(format!("ballot {ballot} commits {content:?}, committed was {:?}", self.committed));
        }
        // A disk that was lost may have been one of the majority.
        if self.used.replaced_disks == 0 {
            let holds = |node: &&Arc<AcceptorNode>| node.durable >= end && node.log[..end] == content[..];
            if self.acceptors.iter().filter(holds).count() < MAJORITY {
                broken.push(format!("ballot {ballot} commits {end}, which no majority has on disk"));
            }
            // A fenced acceptor takes nothing from earlier terms, so what it holds of them was written before the
            // fence; a majority is fenced before a later term is granted.
            let fenced = |node: &&Arc<AcceptorNode>| node.machine.state().ballot.term > ballot.term;
            let held_back = self.acceptors.iter().filter(fenced).any(|node| holds(&node));
            if self.operator.granted > ballot.term.0 && !held_back {
                broken.push(format!("ballot {ballot} commits {end}, written after the fence of a later term"));
            }
        }
        if content.len() > self.committed.len() {
            self.committed = content;
        }
        for what in broken {
            self.violate(what);
        }
    }

    /// What must hold in every world.
    fn check(&mut self) {
        let committed = &self.committed;
        let per_record = self.bounds.chunks_per_record as usize;
        let mut broken = None;
        for (n, node) in self.acceptors.iter().enumerate() {
            for end in [chunks(node.machine.commit_lsn()), chunks(node.machine.readable_until())] {
                if !end.is_multiple_of(per_record) {
                    broken = Some(format!("acceptor {n} serves up to {end}, inside a record"));
                } else if end > node.durable || end > committed.len() || node.log[..end] != committed[..end] {
                    let log = &node.log;
                    broken = Some(format!("acceptor {n} serves {end} of {log:?}, but committed is {committed:?}"));
                }
            }
        }
        // Whatever happens now, any majority elects a log with everything committed: every disk as it is.
        let voter = |node: &AcceptorNode| {
            let end = node.durable / per_record * per_record;
            ((node.disk.history.ballot_at(lsn(end)), end), node.log[..end].to_vec())
        };
        for left_out in 0..ACCEPTORS {
            let may_vote =
                |n: &usize| *n != left_out && (self.acceptors[*n].listed || cfg!(feature = "bug-replaced-disk-votes"));
            let voters: Vec<usize> = (0..ACCEPTORS).filter(may_vote).collect();
            if voters.len() < MAJORITY {
                continue;
            }
            let best = voters.iter().map(|n| voter(&self.acceptors[*n])).max_by_key(|(rank, _)| *rank);
            if let Some((_, log)) = best
                && !is_prefix(committed, &log)
            {
                broken = Some(format!("acceptors {voters:?} elect {log:?}, but committed is {committed:?}"));
            }
        }
        if let Some(broken) = broken {
            self.violate(broken);
        }
    }

    // ---- what must come about ----

    /// One round in which everything that was sent arrives and every disk does its work. Whether it came to the end.
    fn round(&mut self, known: &mut dyn FnMut(&World) -> bool) -> bool {
        let owner = writer_of(self.operator.begun);
        if self.operator.granted == self.operator.begun && self.writers[owner].machine.is_none() {
            self.start_writer(owner, self.operator.begun, ACCEPTORS - 1);
        }
        for _ in 0..STEPS_MAX {
            if self.is_served() || known(self) {
                return true;
            }
            if !self.calm_step() {
                break;
            }
        }
        for writer in 0..WRITERS {
            self.apply(Action::Timer { writer });
        }
        false
    }

    /// The next thing that happens when nothing fails; false if nothing does.
    fn calm_step(&mut self) -> bool {
        for acceptor in 0..ACCEPTORS {
            let others = move || (0..ACCEPTORS).filter(move |other| *other != acceptor);
            if self.acceptors[acceptor].durable < self.acceptors[acceptor].log.len() {
                self.flush(acceptor);
                return true;
            }
            if self.acceptors[acceptor].asking {
                others().for_each(|peer| self.apply(Action::Ask { acceptor, peer }));
                return true;
            }
            if self.acceptors[acceptor].task.is_some() {
                let before = self.acceptors[acceptor].log.len();
                others().for_each(|donor| self.apply(Action::Fetch { acceptor, donor }));
                if self.acceptors[acceptor].log.len() == before {
                    // Nobody has it: it is asked for again.
                    Arc::make_mut(&mut self.acceptors[acceptor]).task = None;
                }
                return true;
            }
            for writer in 0..WRITERS {
                if !self.network[writer][acceptor].is_empty() {
                    let sent = Arc::make_mut(&mut self.network[writer][acceptor]).remove(0);
                    self.deliver(acceptor, sent);
                    return true;
                }
            }
        }
        false
    }

    fn is_served(&self) -> bool {
        let node = &self.writers[writer_of(self.operator.begun)];
        let Some(machine) = &node.machine else { return false };
        let (Some(start), Some(ballot)) = (machine.start(), machine.ballot()) else { return false };
        let serves = |node: &Arc<AcceptorNode>| {
            let follows = node.machine.state().elected == ballot;
            !node.listed || follows && node.machine.readable_until() >= start.record_end
        };
        node.term == self.operator.begun && self.acceptors.iter().all(serves)
    }

    fn hash_acceptor(&self, acceptor: usize) -> u64 {
        let mut mix = Mix::default();
        let node = &self.acceptors[acceptor];
        // A connection is known by its writer if it is the present one; others are dead and alike.
        let name = |connection: u64| {
            (0..WRITERS)
                .find(|writer| self.writers[*writer].connection == connection)
                .map_or(0, |writer| writer as u64 + 1)
        };
        node.machine.hash_protocol_state(name, &mut mix);
        let disk = &node.disk;
        (disk.ballot, disk.writer, disk.incarnation, disk.elected, &disk.history, disk.commit_lsn).hash(&mut mix);
        (&node.log, node.durable, node.asking, node.listed).hash(&mut mix);
        node.task.as_ref().map(|task| (task.ballot, task.until)).hash(&mut mix);
        for writer in 0..WRITERS {
            let sent = &self.network[writer][acceptor];
            if self.calm {
                sent.iter().for_each(|sent| (name(sent.connection), sent.message.fingerprint()).hash(&mut mix));
            } else {
                // In which order they were sent does not matter.
                let of = |sent: &Sent| sent.message.fingerprint() ^ name(sent.connection).wrapping_mul(0x9E37_79B9);
                sent.iter().map(of).fold(0, u64::wrapping_add).hash(&mut mix);
            }
            if let Some(machine) = &self.writers[writer].machine {
                machine.hash_peer_state(member_id(acceptor), &mut mix);
            }
            let votes = &self.writers[writer].votes;
            votes.iter().find(|(voted, _)| voted.member == member_id(acceptor)).map(|(_, log)| log).hash(&mut mix);
        }
        (self.operator.answered & (1 << acceptor) != 0).hash(&mut mix);
        mix.finish()
    }
}

impl Message {
    fn ballot(&self) -> Ballot {
        match self {
            Message::Wal(append, _) | Message::Header(ProposerMessage::Append(append)) => append.ballot,
            Message::Header(ProposerMessage::Vote(vote)) => vote.ballot,
            Message::Header(ProposerMessage::Elected(elected)) => elected.ballot,
            Message::Header(ProposerMessage::CatchUp(catch_up)) => catch_up.ballot,
        }
    }

    /// Whether it says what the other says, or more; sequences do not matter here.
    fn is_as_good_as(&self, other: &Message) -> bool {
        match (self, other) {
            (Message::Wal(a, _), Message::Wal(b, _)) => {
                a.ballot == b.ballot && a.begin_lsn == b.begin_lsn && a.commit_lsn >= b.commit_lsn
            }
            (Message::Header(ProposerMessage::Elected(a)), Message::Header(ProposerMessage::Elected(b))) => {
                a.ballot == b.ballot && a.commit_lsn >= b.commit_lsn
            }
            _ => self == other,
        }
    }

    fn fingerprint(&self) -> u64 {
        let mut mix = Mix::default();
        match self {
            Message::Wal(append, content) => {
                (1, append.ballot, append.begin_lsn, append.commit_lsn, content).hash(&mut mix)
            }
            Message::Header(ProposerMessage::Append(append)) => {
                (2, append.ballot, append.begin_lsn, append.commit_lsn).hash(&mut mix);
            }
            Message::Header(ProposerMessage::Vote(vote)) => (3, vote.ballot, vote.incarnation).hash(&mut mix),
            Message::Header(ProposerMessage::Elected(elected)) => {
                (4, elected.ballot, elected.incarnation, &elected.history, elected.commit_lsn).hash(&mut mix);
            }
            Message::Header(ProposerMessage::CatchUp(catch_up)) => (5, catch_up.ballot, catch_up.until).hash(&mut mix),
        }
        mix.finish()
    }
}

/// Refusals that only tell a writer that its time is over, or to send again what the network keeps anyway. Without them
/// it goes on for longer, which is worse.
fn is_only_news(message: &AcceptorMessage) -> bool {
    match message {
        AcceptorMessage::Refused(refused) => refused.reason != Refusal::StaleAttempt,
        _ => false,
    }
}

impl AcceptorNode {
    fn created(acceptor: usize, disk: DiskId) -> AcceptorNode {
        let start = FrameSummary { record_end: START, timeline: PgTimeline(1), ..FrameSummary::default() };
        let identity = AcceptorIdentity {
            log: LogId::default(),
            system: SystemId(1),
            member: member_id(acceptor),
            disk,
            segment_bytes: 16 << 20,
            start,
        };
        let state = AcceptorState::created(configuration(), START, PgTimeline(1));
        let machine = Acceptor::new(identity, state.clone(), start, APPEND_TIME).expect("an empty log starts");
        AcceptorNode { machine, disk: state, log: Vec::new(), durable: 0, task: None, asking: false, listed: true }
    }
}

impl AcceptorNode {
    /// Whether its log would be cut for one of this history.
    fn parts_from(&self, history: &TermHistory) -> bool {
        let end = lsn(self.log.len());
        self.disk.history.parts_from(history).is_some_and(|parts| parts < end)
    }
}

impl WriterNode {
    fn created() -> WriterNode {
        WriterNode {
            term: 0,
            run: 0,
            machine: None,
            connection: 0,
            elected: None,
            log: Vec::new(),
            decided: false,
            votes: Vec::new(),
        }
    }
}
