//! Who may write, and since when: terms, attempts, writers, generations.

use core::fmt;

/// Number of a writer's reign, granted by the operator, never taken. 0 is "nobody yet".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Term(pub u64);

/// How often the writer of one term has elected itself again after a restart. 0 is "granted, not yet elected".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Attempt(pub u32);

/// A position in time: ordered first by term, then by attempt. Entries of a term history are ballots.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Ballot {
    /// Granted by the operator.
    pub term: Term,
    /// Raised by the writer of that term.
    pub attempt: Attempt,
}

impl fmt::Display for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term.0, self.attempt.0)
    }
}

/// Generation of a membership configuration; each change adds 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Generation(pub u32);

/// Identity of a writer that survives its restarts: on Kubernetes the pod's UID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WriterId(pub [u8; 16]);

/// Random number that one run of a writer process draws once: tells two runs of one writer apart in one attempt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Incarnation(pub [u8; 16]);

crate::ids::uuid_text!(WriterId);
crate::ids::uuid_text!(Incarnation);
