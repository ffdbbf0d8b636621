//! Proofs of durability: a reply that promises something durable cannot be built without them.
//!
//! [`Flushed`] and [`Persisted`] come into being only where the store reports the event (`Acceptor::handle_*`), and
//! [`Released`], the only thing that leaves the acceptor for a peer, only from one of them or from a refusal.

use pgtypes::{FrameSummary, Lsn};

use crate::message::{AcceptorMessage, Appended, ElectedAccepted, Refused, Voted};

/// What the disk holds for certain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Flushed {
    summary: FrameSummary,
    durable_lsn: Lsn,
}

impl Flushed {
    /// The store found this at its start, or said that it synced up to here.
    pub(crate) fn reported(summary: FrameSummary, durable_lsn: Lsn) -> Flushed {
        // Planted for the tests: an unfinished record counts, so that what is voted with, committed and served may end
        // inside a record.
        if cfg!(feature = "bug-serve-incomplete-record") && durable_lsn > summary.record_end {
            return Flushed { summary: FrameSummary { record_end: durable_lsn, ..summary }, durable_lsn };
        }
        Flushed { summary, durable_lsn: durable_lsn.max(summary.record_end) }
    }

    pub(crate) fn summary(&self) -> FrameSummary {
        self.summary
    }

    /// End of the last complete record.
    pub(crate) fn end(&self) -> Lsn {
        self.summary.record_end
    }

    /// Behind the last byte, unfinished record included.
    pub(crate) fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }
}

/// The state up to a sequence is on the disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Persisted(u64);

impl Persisted {
    /// What the acceptor was started with.
    pub(crate) const START: Persisted = Persisted(0);

    /// The store said so.
    pub(crate) fn reported(sequence: u64) -> Persisted {
        Persisted(sequence)
    }

    /// Whether the state of `sequence` is durable.
    pub(crate) fn covers(self, sequence: u64) -> bool {
        self.0 >= sequence
    }
}

/// A message whose conditions hold: it may leave at once.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Released(AcceptorMessage);

impl Released {
    /// The message, to be sent.
    pub fn into_message(self) -> AcceptorMessage {
        self.0
    }

    /// The message.
    pub fn message(&self) -> &AcceptorMessage {
        &self.0
    }

    /// A refusal promises nothing.
    pub(crate) fn refused(refused: Refused) -> Released {
        Released(AcceptorMessage::Refused(refused))
    }

    pub(crate) fn appended(flushed: &Flushed, build: impl FnOnce(&Flushed) -> Appended) -> Released {
        Released(AcceptorMessage::Appended(build(flushed)))
    }

    /// `None` while the state of `sequence` is not durable.
    pub(crate) fn voted(
        persisted: Persisted,
        sequence: u64,
        flushed: &Flushed,
        build: impl FnOnce(&Flushed) -> Voted,
    ) -> Option<Released> {
        persisted.covers(sequence).then(|| Released(AcceptorMessage::Voted(build(flushed))))
    }

    /// `None` while the state of `sequence` is not durable.
    pub(crate) fn elected(
        persisted: Persisted,
        sequence: u64,
        flushed: &Flushed,
        build: impl FnOnce(&Flushed) -> ElectedAccepted,
    ) -> Option<Released> {
        persisted.covers(sequence).then(|| Released(AcceptorMessage::ElectedAccepted(build(flushed))))
    }
}
