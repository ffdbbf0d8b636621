//! The lease, with time: no writer reports a commit of its own while an earlier one may still answer reads.
//!
//! Time moves in ticks of half a lease. Heartbeats of the old writer arrive at any later time or never, and it is
//! frozen whenever its timers do not fire; fences and votes reach one acceptor after the other; an acceptor that starts
//! again has forgotten what it promised. Everything else happens at once: the new writer is as fast, and the old one
//! hears as much, as can be, which is the worst for the property.

use std::{
    collections::VecDeque,
    hash::{Hash, Hasher},
    sync::Arc,
};

use consensus::{
    Acceptor, AcceptorCommand, AcceptorIdentity, AcceptorState, Configuration, Grant, LEASE_LENGTH, Member, Proposer,
    ProposerCommand, message::ProposerMessage,
};
use pgtypes::{
    DiskId, FrameSummary, Generation, Incarnation, Instant, LogId, Lsn, MemberId, PgTimeline, SystemId, Term, WriterId,
};

use crate::search::{Mix, Model};

const ACCEPTORS: usize = 3;
const MAJORITY: usize = 2;
const START: Lsn = Lsn(16 << 20);
const RECORD_BYTES: u64 = 8;
const TICKS_PER_LEASE: u32 = 2;

#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub ticks: u64,
    pub restarts: u8,
}

#[derive(Clone, Copy, Debug)]
pub enum Action {
    /// Half a lease passes for everybody.
    Tick,
    /// The timers of the old writer fire: heartbeats.
    Timer,
    /// The acceptor takes the next message, and answers at once.
    Deliver {
        writer: usize,
        acceptor: usize,
    },
    /// The fence of term 2 reaches an acceptor.
    Fence {
        acceptor: usize,
    },
    Restart {
        acceptor: usize,
    },
}

#[derive(Clone)]
struct Node {
    machine: Acceptor,
    disk: AcceptorState,
    end: Lsn,
}

#[derive(Clone)]
pub struct LeaseWorld {
    bounds: Bounds,
    restarts: u8,
    tick: u64,
    acceptors: [Arc<Node>; ACCEPTORS],
    writers: [Option<Arc<Proposer>>; 2],
    /// What is under way, and since when.
    queues: [[VecDeque<(ProposerMessage, Instant)>; ACCEPTORS]; 2],
    /// Up to when each writer was told that nobody else commits.
    leases: [Instant; 2],
    answered: u8,
    violation: Option<String>,
}

fn member_id(acceptor: usize) -> MemberId {
    MemberId(acceptor as u32 + 1)
}

fn disk(acceptor: usize) -> DiskId {
    DiskId([acceptor as u8 + 1; 16])
}

fn configuration() -> Configuration {
    let member = |n: usize| Member { member: member_id(n), disk: disk(n), address: String::new() };
    Configuration { generation: Generation(1), members: (0..ACCEPTORS).map(member).collect(), new_members: None }
}

fn summary(end: Lsn) -> FrameSummary {
    FrameSummary { record_end: end, timeline: PgTimeline(1), ..FrameSummary::default() }
}

fn writer_id(writer: usize) -> WriterId {
    WriterId([writer as u8 + 1; 16])
}

/// A writer has one connection to each acceptor.
fn connection(writer: usize) -> u64 {
    writer as u64 + 1
}

fn is_heartbeat(message: &ProposerMessage) -> bool {
    matches!(message, ProposerMessage::Append(append) if append.begin_lsn == append.end_lsn)
}

impl LeaseWorld {
    /// Writer 0 is elected in term 1; its first heartbeats are under way.
    pub fn new(bounds: Bounds) -> LeaseWorld {
        let node = |n: usize| {
            let identity = AcceptorIdentity {
                log: LogId::default(),
                system: SystemId(1),
                member: member_id(n),
                disk: disk(n),
                segment_bytes: 16 << 20,
                start: summary(START),
            };
            let disk = AcceptorState::created(configuration(), START, PgTimeline(1));
            let machine = Acceptor::new(identity, disk.clone(), summary(START), Instant(0)).expect("starts");
            Arc::new(Node { machine, disk, end: START })
        };
        let mut world = LeaseWorld {
            bounds,
            restarts: 0,
            tick: 0,
            acceptors: [node(0), node(1), node(2)],
            writers: [None, None],
            queues: Default::default(),
            leases: [Instant(0); 2],
            answered: 0,
            violation: None,
        };
        for acceptor in 0..ACCEPTORS {
            let machine = &mut Arc::make_mut(&mut world.acceptors[acceptor]).machine;
            machine.handle_fence(1, Term(1), writer_id(0), Instant(0));
            world.drain_acceptor(acceptor);
        }
        world.start_writer(0, 1);
        world.settle();
        world
    }

    fn now(&self) -> Instant {
        Instant::default().after(LEASE_LENGTH / TICKS_PER_LEASE * self.tick as u32)
    }

    fn apply(&mut self, action: Action) {
        let now = self.now();
        match action {
            Action::Tick => {
                self.tick += 1;
                self.fire(1);
            }
            Action::Timer => self.fire(0),
            Action::Deliver { writer, acceptor } => self.deliver(writer, acceptor),
            Action::Fence { acceptor } => {
                let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                node.machine.handle_fence(2, Term(2), writer_id(1), now);
                self.drain_acceptor(acceptor);
            }
            Action::Restart { acceptor } => {
                self.restarts += 1;
                let node = Arc::make_mut(&mut self.acceptors[acceptor]);
                let identity = node.machine.identity().clone();
                node.machine =
                    Acceptor::new(identity, node.disk.clone(), summary(node.end), now).expect("starts again");
                for writer in 0..2 {
                    self.queues[writer][acceptor].clear();
                    if let Some(machine) = &mut self.writers[writer] {
                        let machine = Arc::make_mut(machine);
                        machine.handle_disconnected(member_id(acceptor), now);
                        machine.handle_connected(member_id(acceptor), &self.acceptors[acceptor].machine.status(), now);
                    }
                    self.drain_writer(writer);
                }
            }
        }
    }

    fn fire(&mut self, writer: usize) {
        let now = self.now();
        if let Some(machine) = &mut self.writers[writer] {
            Arc::make_mut(machine).handle_timeout(now);
        }
        self.drain_writer(writer);
    }

    /// Delivers what does not wait.
    fn settle(&mut self) {
        loop {
            let waits = |writer: usize, message: &ProposerMessage| match writer {
                0 => is_heartbeat(message),
                _ => matches!(message, ProposerMessage::Vote(_)),
            };
            let next = (0..2).flat_map(|writer| (0..ACCEPTORS).map(move |acceptor| (writer, acceptor))).find(
                |(writer, acceptor)| {
                    self.queues[*writer][*acceptor].front().is_some_and(|(message, _)| !waits(*writer, message))
                },
            );
            let Some((writer, acceptor)) = next else { return };
            self.deliver(writer, acceptor);
        }
    }

    fn start_writer(&mut self, writer: usize, term: u64) {
        let grant = Grant { term: Term(term), writer: writer_id(writer) };
        let mut machine = Proposer::new(grant, Incarnation([writer as u8 + 1; 16]), configuration());
        while machine.poll_command().is_some() {}
        for acceptor in 0..ACCEPTORS {
            machine.handle_connected(member_id(acceptor), &self.acceptors[acceptor].machine.status(), self.now());
        }
        self.writers[writer] = Some(Arc::new(machine));
        self.drain_writer(writer);
    }

    fn deliver(&mut self, writer: usize, acceptor: usize) {
        let now = self.now();
        let Some((message, _)) = self.queues[writer][acceptor].pop_front() else { return };
        let node = Arc::make_mut(&mut self.acceptors[acceptor]);
        match message {
            ProposerMessage::Append(append) if append.end_lsn > append.begin_lsn => {
                match node.machine.check_append(connection(writer), &append) {
                    Err(refused) => node.machine.refuse(connection(writer), refused),
                    Ok(()) => {
                        node.end = append.end_lsn;
                        node.machine.appended(connection(writer), &append, summary(append.end_lsn), now);
                        node.machine.handle_flushed(summary(append.end_lsn), append.end_lsn);
                    }
                }
            }
            message => node.machine.handle_message(connection(writer), message, now),
        }
        self.drain_acceptor(acceptor);
    }

    fn drain_acceptor(&mut self, acceptor: usize) {
        loop {
            let node = Arc::make_mut(&mut self.acceptors[acceptor]);
            let Some(command) = node.machine.poll_command() else { return };
            match command {
                AcceptorCommand::Persist { sequence, state, .. } => {
                    node.disk = state;
                    node.machine.handle_persisted(sequence);
                }
                AcceptorCommand::Truncate { to } => {
                    node.end = to;
                    node.machine.handle_truncated(summary(to));
                }
                AcceptorCommand::Reply { connection, message } => {
                    let (writer, now) = (connection as usize - 1, self.now());
                    if let Some(machine) = &mut self.writers[writer] {
                        Arc::make_mut(machine).handle_message(member_id(acceptor), message.into_message(), now);
                    }
                    self.drain_writer(writer);
                }
                AcceptorCommand::ReplyFence { request: 2, result: Ok(_) } => {
                    self.answered |= 1 << acceptor;
                    if self.answered.count_ones() as usize >= MAJORITY && self.writers[1].is_none() {
                        self.start_writer(1, 2);
                    }
                }
                // Logs here differ by one record at most, which nobody has to fetch.
                AcceptorCommand::CatchUp(_)
                | AcceptorCommand::AskPeers
                | AcceptorCommand::ReplyFence { .. }
                | AcceptorCommand::ReplyConfiguration { .. } => {}
            }
        }
    }

    fn drain_writer(&mut self, writer: usize) {
        let now = self.now();
        loop {
            let Some(machine) = &mut self.writers[writer] else { return };
            let machine = Arc::make_mut(machine);
            let start_lsn = machine.start().map_or(Lsn::MAX, |start| start.record_end);
            let Some(command) = machine.poll_command() else { return };
            match command {
                ProposerCommand::Send { member, message } => {
                    let queue = &mut self.queues[writer][member.0 as usize - 1];
                    // A heartbeat that is overtaken might as well have been lost.
                    if is_heartbeat(&message) {
                        queue.retain(|(other, _)| !is_heartbeat(other));
                    }
                    queue.push_back((message, now));
                }
                ProposerCommand::SendWal { member, append } => {
                    self.queues[writer][member.0 as usize - 1].push_back((ProposerMessage::Append(append), now));
                }
                // The new writer writes one record, the commit of which shows whether it waited.
                ProposerCommand::Elected { .. } if writer == 1 => {
                    machine.handle_wal(start_lsn, start_lsn.advance(RECORD_BYTES), now);
                }
                ProposerCommand::Committed { commit_lsn } if commit_lsn > start_lsn => {
                    self.has_the_field(writer, "a commit")
                }
                ProposerCommand::Lease { until } => {
                    self.has_the_field(writer, "a lease");
                    self.leases[writer] = until;
                }
                ProposerCommand::Fenced { .. } => self.writers[writer] = None,
                _ => {}
            }
        }
    }

    fn hash_acceptor(&self, acceptor: usize) -> u64 {
        let mut mix = Mix::default();
        let node = &self.acceptors[acceptor];
        node.machine.hash_protocol_state(|connection| connection, &mut mix);
        node.machine.hash_promises(self.now(), &mut mix);
        (node.end, self.answered & (1 << acceptor) != 0).hash(&mut mix);
        for writer in 0..2 {
            for (message, sent_at) in &self.queues[writer][acceptor] {
                (std::mem::discriminant(message), is_heartbeat(message).then_some(self.now().since(*sent_at)))
                    .hash(&mut mix);
            }
            self.queues[writer][acceptor].len().hash(&mut mix);
            if let Some(machine) = &self.writers[writer] {
                machine.hash_peer_state(member_id(acceptor), &mut mix);
                machine.hash_peer_promise(member_id(acceptor), self.now(), &mut mix);
            }
        }
        mix.finish()
    }

    /// What the writer reports now is reported by nobody while another has a lease.
    fn has_the_field(&mut self, writer: usize, what: &str) {
        let (now, other) = (self.now(), self.leases[1 - writer]);
        if writer == 1 && other > now {
            let left = other.since(now);
            self.violation
                .get_or_insert(format!("the new writer reports {what} {left:?} before the old one's lease ends"));
        }
    }
}

impl Model for LeaseWorld {
    type Action = Action;

    fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.tick < self.bounds.ticks {
            actions.push(Action::Tick);
        }
        for writer in 0..2 {
            let Some(machine) = &self.writers[writer] else { continue };
            if writer == 0 && machine.poll_timeout().is_some_and(|at| at <= self.now()) {
                actions.push(Action::Timer);
            }
            for acceptor in 0..ACCEPTORS {
                if !self.queues[writer][acceptor].is_empty() {
                    actions.push(Action::Deliver { writer, acceptor });
                }
            }
        }
        for acceptor in 0..ACCEPTORS {
            if self.acceptors[acceptor].machine.state().ballot.term < Term(2) {
                actions.push(Action::Fence { acceptor });
            }
            if self.restarts < self.bounds.restarts {
                actions.push(Action::Restart { acceptor });
            }
        }
        actions
    }

    fn after(&self, action: Action) -> LeaseWorld {
        let mut world = self.clone();
        world.apply(action);
        world.settle();
        world
    }

    fn fingerprint(&self) -> u64 {
        let mut mix = Mix::default();
        (self.tick, self.restarts).hash(&mut mix);
        let mut parts: [u64; ACCEPTORS] = std::array::from_fn(|acceptor| self.hash_acceptor(acceptor));
        parts.sort_unstable();
        parts.hash(&mut mix);
        for (writer, lease) in self.writers.iter().zip(&self.leases) {
            lease.since(self.now()).hash(&mut mix);
            if let Some(machine) = writer {
                machine.hash_protocol_state(&mut mix);
            }
        }
        mix.finish()
    }

    fn violation(&self) -> Option<&String> {
        self.violation.as_ref()
    }

    /// Time is bounded here; that everything comes to a good end is checked without it.
    fn recovers(&self, _: &mut dyn FnMut(&LeaseWorld) -> bool) -> Result<(), String> {
        Ok(())
    }
}
