//! The world of one seed: machines, their processes, and what happens between them.
//!
//! One loop takes the next event; each part of the world handles its own in its own file. Everything that is decided
//! comes from `Random`, everything that is kept in order is in vectors and B-trees: a seed has one trace.

use std::hash::Hasher;

use consensus::{Configuration, Member};
use logstore::Geometry;
use pgtypes::{
    BranchId, ClusterId, DiskId, FrameSummary, Generation, Instant, LogId, Lsn, MemberId, PgTimeline, SystemId,
};

use crate::{
    checker::{Broken, Checker},
    event::{Event, MICROSECOND, MILLISECOND, Node, OPERATOR, SECOND, Schedule, Time, WRITER_HOST},
    faults::Plan,
    follower::Follower,
    network::{Connection, Network},
    operator::Operator,
    random::Random,
    safekeeper::Safekeeper,
    trace::Trace,
    writer::Writer,
};

/// Sizes so small that the ends of segments and writes are met all the time.
pub const GEOMETRY: Geometry = Geometry {
    segment_bytes: 32 << 10,
    write_bytes_max: 16 << 10,
    take_ahead_bytes: 8 << 10,
    scan_step_bytes: 1 << 10,
};

/// Of PostgreSQL.
pub const PG_SEGMENT_BYTES: u64 = 1 << 20;
/// Where the log begins.
pub const LOG_START: Lsn = Lsn(0x300_0000);
/// Whose it is.
pub const SYSTEM: SystemId = SystemId(0x1122_3344_5566_7788);

/// The log of the run.
pub fn log_id() -> LogId {
    LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) }
}

/// The empty log.
pub fn log_start() -> FrameSummary {
    FrameSummary { record_end: LOG_START, timeline: PgTimeline(1), max_full_xid: 700, ..FrameSummary::default() }
}

/// What a run counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Events.
    pub events: u64,
    /// Faults.
    pub faults: u64,
    /// Commits acknowledged to clients.
    pub acknowledged: u64,
    /// Reads answered under a lease.
    pub reads: u64,
    /// Elections decided.
    pub elections: u64,
    /// Bytes read by followers.
    pub followed_bytes: u64,
    /// Bytes fetched from peers.
    pub fetched_bytes: u64,
    /// Writers that were told that their term is over.
    pub fenced: u64,
    /// Changes of the membership that were completed.
    pub memberships: u64,
    /// Disks that failed an operation.
    pub failed_disks: u64,
    /// Times that a disk was full.
    pub full_disks: u64,
    /// Segments that failed their verification.
    pub damaged: u64,
}

impl Counts {
    /// Adds those of another run.
    pub fn add(&mut self, other: &Counts) {
        self.events += other.events;
        self.faults += other.faults;
        self.acknowledged += other.acknowledged;
        self.reads += other.reads;
        self.elections += other.elections;
        self.followed_bytes += other.followed_bytes;
        self.fetched_bytes += other.fetched_bytes;
        self.fenced += other.fenced;
        self.memberships += other.memberships;
        self.failed_disks += other.failed_disks;
        self.full_disks += other.full_disks;
        self.damaged += other.damaged;
    }
}

/// Which rules count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rules {
    /// All of them.
    All,
    /// What must never happen, but not what must happen in the end: for planted bugs, which also stop progress.
    Safety,
}

/// The outcome of a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Which.
    pub seed: u64,
    /// Of all events in their order: equal for equal seeds.
    pub trace_hash: u64,
    /// What happened.
    pub counts: Counts,
    /// The rule that was broken, if any.
    pub broken: Option<String>,
}

/// How far the run is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Things go wrong.
    Faults,
    /// Nothing goes wrong any more; there must be progress. `committed`: when the faults ended.
    Healing { committed: Lsn },
    /// All is well that ends well.
    Done,
}

/// See the module.
pub struct World {
    /// Now.
    pub now: Time,
    /// Of this seed.
    pub random: Random,
    /// What is to come.
    pub schedule: Schedule,
    /// What has been.
    pub trace: Trace,
    /// The rules.
    pub checker: Checker,
    /// What may go wrong in this run.
    pub plan: Plan,
    /// How far it is.
    pub phase: Phase,
    /// What happened.
    pub counts: Counts,
    rules: Rules,
    /// Wires.
    pub network: Network,
    /// All connections that ever were.
    pub connections: Vec<Connection>,
    /// Machines with disks.
    pub safekeepers: Vec<Safekeeper>,
    /// All writer processes that ever were.
    pub writers: Vec<Writer>,
    /// Grants terms, changes the membership.
    pub operator: Operator,
    /// Read what is committed.
    pub followers: Vec<Follower>,
    /// Each machine's clock runs at the same rate from another origin.
    clock_origins: Vec<u64>,
    /// Until when a machine stands still.
    frozen: Vec<(Node, Time)>,
}

impl World {
    /// The world of `seed`. `print`: tell every event.
    pub fn new(seed: u64, rules: Rules, print: bool) -> World {
        let mut random = Random::new(seed);
        let plan = Plan::choose(&mut random);
        let member = |index: usize, random: &mut Random| Member {
            member: MemberId(index as u32 + 1),
            disk: DiskId(random.id()),
            address: format!("sk-{index}"),
        };
        let members: Vec<Member> = (0..plan.members).map(|index| member(index, &mut random)).collect();
        let configuration = Configuration { generation: Generation(1), members: members.clone(), new_members: None };
        let safekeepers = members.iter().map(|m| Safekeeper::new(m.member, m.disk)).collect();
        let clock_origins = (0..128).map(|_| random.below(1 << 50)).collect();
        let mut world = World {
            now: 0,
            random,
            schedule: Schedule::default(),
            trace: Trace::new(print),
            checker: Checker::new(LOG_START),
            plan,
            phase: Phase::Faults,
            counts: Counts::default(),
            rules,
            network: Network::default(),
            connections: Vec::new(),
            safekeepers,
            writers: Vec::new(),
            operator: Operator::new(configuration),
            followers: vec![Follower::default()],
            clock_origins,
            frozen: Vec::new(),
        };
        for safekeeper in 0..world.safekeepers.len() {
            world.schedule.at(0, Event::Start { safekeeper });
        }
        world.schedule.at(5 * MILLISECOND, Event::Operate);
        world.schedule.at(50 * MILLISECOND, Event::Follow { follower: 0 });
        let first_fault = world.random.range(20 * MILLISECOND, 500 * MILLISECOND);
        world.schedule.at(first_fault, Event::Fault);
        world.schedule.at(world.plan.fault_time, Event::Heal);
        world
    }

    /// Runs to the end.
    pub fn run(mut self, seed: u64) -> Outcome {
        let broken = loop {
            let Some((at, event)) = self.schedule.next() else {
                break Some("the world stands still".to_string());
            };
            self.now = at;
            self.counts.events += 1;
            self.trace.event(at, &event);
            if let Err(rule) = self.handle(event) {
                break Some(rule);
            }
            if self.phase == Phase::Done {
                break self.final_checks().err();
            }
        };
        self.trace.hasher().write_u8(u8::from(broken.is_some()));
        let found = self.safekeepers.iter().filter_map(|safekeeper| safekeeper.process.as_ref());
        self.counts.damaged += found.map(|process| process.damaged).sum::<u64>();
        let counts = Counts {
            faults: self.plan.done,
            acknowledged: self.checker.acknowledged,
            reads: self.checker.reads,
            elections: self.checker.elections,
            followed_bytes: self.checker.followed_bytes,
            ..self.counts
        };
        Outcome { seed, trace_hash: self.trace.hash(), counts, broken }
    }

    fn handle(&mut self, event: Event) -> Broken {
        if let Some(until) = self.stands_still(&event) {
            self.schedule.at(until, event);
            return Ok(());
        }
        match event {
            Event::Deliver { connection, to_server } => self.deliver(connection, to_server),
            Event::ConnectArrives { connection } => self.connect_arrives(connection),
            Event::Closed { connection, at_server } => self.closed(connection, at_server),
            Event::DiskDone { safekeeper, epoch, op } => self.disk_done(safekeeper, epoch, op),
            Event::LogTimer { safekeeper, epoch } => self.log_timer(safekeeper, epoch),
            Event::Start { safekeeper } => self.start_safekeeper(safekeeper),
            Event::ProposerTimer { writer } => self.proposer_timer(writer),
            Event::Work { writer } => self.work(writer),
            Event::Operate => self.operate(),
            Event::FenceArrives { safekeeper, term, writer } => self.fence_arrives(safekeeper, term, writer),
            Event::FenceAnswered { safekeeper, term } => self.fence_answered(safekeeper, term),
            Event::MembershipArrives { safekeeper, generation } => self.membership_arrives(safekeeper, generation),
            Event::MembershipAnswered { safekeeper, generation, accepted } => {
                self.membership_answered(safekeeper, generation, accepted)
            }
            Event::AskArrives { from, to, epoch } => self.ask_arrives(from, to, epoch),
            Event::AskAnswered { safekeeper, epoch, term, writer, .. } => {
                self.ask_answered(safekeeper, epoch, term, writer)
            }
            Event::FetchArrives { safekeeper, epoch, task } => self.fetch_arrives(safekeeper, epoch, task),
            Event::FetchAnswered { safekeeper, epoch, task } => self.fetch_answered(safekeeper, epoch, task),
            Event::Follow { follower } => self.follow(follower),
            Event::Fault => self.fault(),
            Event::Heal => self.heal(),
            Event::Deadline => self.deadline(),
        }
    }

    /// Until when the machine that the event is for stands still, if it does.
    fn stands_still(&self, event: &Event) -> Option<Time> {
        if self.frozen.is_empty() {
            return None;
        }
        let node = match *event {
            Event::Deliver { connection, to_server } | Event::Closed { connection, at_server: to_server } => {
                match to_server {
                    true => self.connections[connection].safekeeper as Node,
                    false => self.connections[connection].host,
                }
            }
            Event::ConnectArrives { connection } => self.connections[connection].safekeeper as Node,
            Event::DiskDone { safekeeper, .. }
            | Event::LogTimer { safekeeper, .. }
            | Event::FenceArrives { safekeeper, .. }
            | Event::MembershipArrives { safekeeper, .. }
            | Event::AskAnswered { safekeeper, .. }
            | Event::FetchAnswered { safekeeper, .. } => safekeeper as Node,
            Event::AskArrives { to, .. } => to as Node,
            Event::FetchArrives { safekeeper, .. } => {
                let donor = self.safekeepers[safekeeper].process.as_ref().and_then(|process| process.donor_index());
                donor? as Node
            }
            Event::ProposerTimer { writer } | Event::Work { writer } => self.writers[writer].host,
            _ => return None,
        };
        self.frozen_until(node)
    }

    /// Until when `node` stands still, if it does.
    pub fn frozen_until(&self, node: Node) -> Option<Time> {
        self.frozen.iter().filter(|(of, until)| *of == node && self.now < *until).map(|(_, until)| *until).max()
    }

    /// Lets a machine stand still; its clock runs on.
    pub fn freeze(&mut self, node: Node, until: Time) {
        self.frozen.retain(|(_, until)| self.now < *until);
        self.frozen.push((node, until));
    }

    /// What `node`'s clock says.
    pub fn clock(&self, node: Node) -> Instant {
        Instant(self.clock_origins[node as usize % self.clock_origins.len()] + self.now)
    }

    /// The simulated moment that `node`'s clock calls `instant`.
    pub fn time_of(&self, node: Node, instant: Instant) -> Time {
        instant.0.saturating_sub(self.clock_origins[node as usize % self.clock_origins.len()])
    }

    /// How long a message takes from `from` to `to`.
    pub fn latency(&mut self, from: Node, to: Node) -> Time {
        self.random.range(50 * MICROSECOND, 400 * MICROSECOND) + self.network.delay(from, to, self.now)
    }

    /// Which safekeeper has this address.
    pub fn at_address(&self, address: &str) -> Option<usize> {
        address.strip_prefix("sk-")?.parse().ok().filter(|index| *index < self.safekeepers.len())
    }

    /// A machine that a writer may run on.
    pub fn writer_host(number: u32) -> Node {
        WRITER_HOST + number % 40
    }

    /// The faults end: whatever is broken is repaired, except what only a person may.
    fn heal(&mut self) -> Broken {
        self.network.heal();
        self.frozen.clear();
        let members = self.operator.configuration.clone();
        for index in 0..self.safekeepers.len() {
            self.safekeepers[index].repair();
            let used = members.all_members().any(|m| self.at_address(&m.address) == Some(index));
            if self.safekeepers[index].process.is_none() && used {
                self.schedule.at(self.now + MILLISECOND, Event::Start { safekeeper: index });
            } else if self.safekeepers[index].is_failed() {
                self.kill_safekeeper(index);
                self.schedule.at(self.now + MILLISECOND, Event::Start { safekeeper: index });
            }
        }
        if self.plan.second_runs {
            // A safekeeper that voted for the last of several runs follows none of the others, and that run may be dead:
            // whoever supervises the writers ends them all, and one begins anew.
            (0..self.writers.len()).for_each(|writer| self.kill_writer(writer));
        }
        self.phase = Phase::Healing { committed: self.checker.committed() };
        self.schedule.at(self.now + 15 * SECOND, Event::Deadline);
        Ok(())
    }

    /// Called when something may have become durable everywhere: ends the run when all is well.
    pub fn check_progress(&mut self) {
        let Phase::Healing { committed } = self.phase else { return };
        let end = self.checker.committed();
        if end <= committed || self.operator.is_busy() {
            return;
        }
        let configuration = &self.operator.configuration;
        let all = configuration.all_members().all(|member| {
            let index = self.at_address(&member.address).map(|index| &self.safekeepers[index]);
            index.is_some_and(|safekeeper| {
                // A disk that is gone comes back by nobody's doing.
                let gone = safekeeper.is_destroyed() || safekeeper.disk_id != member.disk;
                gone || safekeeper.has_committed(end)
            })
        });
        if all {
            self.phase = Phase::Done;
        }
    }

    /// Nothing was wrong for 15 s, and yet there is no progress.
    fn deadline(&mut self) -> Broken {
        let Phase::Healing { committed } = self.phase else { return Ok(()) };
        if self.rules == Rules::Safety {
            self.phase = Phase::Done;
            return Ok(());
        }
        let states: Vec<String> = self.safekeepers.iter().map(Safekeeper::describe).collect();
        let writers: Vec<String> = self.writers.iter().filter_map(Writer::describe).collect();
        Err(format!(
            "no progress: committed {committed} when the faults ended, {} 15 s later; operator {}; safekeepers {states:?}; \
             writers {writers:?}",
            self.checker.committed(),
            self.operator.describe()
        ))
    }

    /// Every safekeeper holds the committed log, byte by byte, as far as it knows it.
    fn final_checks(&mut self) -> Broken {
        for index in 0..self.safekeepers.len() {
            let Some(process) = &self.safekeepers[index].process else { continue };
            let begin = process.log.oldest_lsn();
            self.follow_safekeeper(index, begin)?;
        }
        Ok(())
    }

    /// Whether the message of a node to itself or another is lost.
    pub fn is_cut(&self, from: Node, to: Node) -> bool {
        self.network.is_cut(from, to, self.now)
    }

    /// Node of the operator.
    pub const OPERATOR: Node = OPERATOR;
}
