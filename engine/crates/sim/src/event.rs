//! What can happen, and when.

use std::{cmp::Ordering, collections::BinaryHeap};

use pgtypes::{Term, WriterId};

/// Simulated time in nanoseconds since the start of the run.
pub type Time = u64;

/// A microsecond.
pub const MICROSECOND: Time = 1_000;
/// A millisecond.
pub const MILLISECOND: Time = 1_000_000;
/// A second.
pub const SECOND: Time = 1_000_000_000;

/// A machine, or the operator. Safekeepers count from 0.
pub type Node = u32;
/// Where the operator runs.
pub const OPERATOR: Node = 50;
/// The first machine for writers.
pub const WRITER_HOST: Node = 60;

/// Something that happens to the world.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The next message of a connection arrives.
    Deliver { connection: usize, to_server: bool },
    /// A connection attempt reaches its safekeeper.
    ConnectArrives { connection: usize },
    /// A side learns that the connection is closed.
    Closed { connection: usize, at_server: bool },
    /// A disk operation ends.
    DiskDone { safekeeper: usize, epoch: u32, op: u64 },
    /// A log wants to be called.
    LogTimer { safekeeper: usize, epoch: u32 },
    /// A safekeeper's process is started.
    Start { safekeeper: usize },
    /// A proposer wants to be called.
    ProposerTimer { writer: usize },
    /// PostgreSQL does something.
    Work { writer: usize },
    /// The operator looks at the world.
    Operate,
    /// A fence reaches a safekeeper.
    FenceArrives { safekeeper: usize, term: Term, writer: WriterId },
    /// Its answer reaches the operator.
    FenceAnswered { safekeeper: usize, term: Term },
    /// A membership reaches a safekeeper.
    MembershipArrives { safekeeper: usize, generation: u32 },
    /// Its answer reaches the operator.
    MembershipAnswered { safekeeper: usize, generation: u32, accepted: bool },
    /// A safekeeper asks another for its ballot.
    AskArrives { from: usize, to: usize, epoch: u32 },
    /// The answer arrives.
    AskAnswered { safekeeper: usize, epoch: u32, from: usize, term: Term, writer: WriterId },
    /// A safekeeper asks a donor for WAL.
    FetchArrives { safekeeper: usize, epoch: u32, task: u64 },
    /// The WAL, or a refusal, arrives.
    FetchAnswered { safekeeper: usize, epoch: u32, task: u64 },
    /// Somebody reads what is committed.
    Follow { follower: usize },
    /// The next fault.
    Fault,
    /// The faults end.
    Heal,
    /// The end of the run, at the latest.
    Deadline,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Scheduled {
    at: Time,
    /// Ties are broken by the order of scheduling.
    number: u64,
    event: Event,
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Scheduled) -> Ordering {
        // The heap gives the largest first.
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Scheduled) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Events to come, by time.
#[derive(Default)]
pub struct Schedule {
    heap: BinaryHeap<Scheduled>,
    number: u64,
}

impl Schedule {
    /// Lets `event` happen at `at`.
    pub fn at(&mut self, at: Time, event: Event) {
        self.number += 1;
        self.heap.push(Scheduled { at, number: self.number, event });
    }

    /// The next event.
    pub fn next(&mut self) -> Option<(Time, Event)> {
        self.heap.pop().map(|scheduled| (scheduled.at, scheduled.event))
    }
}
