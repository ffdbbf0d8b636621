//! The messages between proposer and acceptor. Their bytes are in the `wire` crate (`docs/formats/append-protocol.md`).

use alloc::{string::String, vec::Vec};
use core::time::Duration;

use pgtypes::{Ballot, DiskId, FrameSummary, Generation, Incarnation, Lsn, MemberId, PgTimeline, Term, WriterId};

use crate::{Configuration, TermHistory, TimelineHistory};

/// What a proposer (the compute agent) says to an acceptor (one log of a safekeeper).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ProposerMessage {
    /// Asks for the acceptor's vote in `ballot`.
    Vote(Vote),
    /// Announces the election: the end of the log and the histories that hold from now on.
    Elected(Elected),
    /// Appends WAL, or (empty) is a heartbeat. The bytes travel behind the header, not in it.
    Append(Append),
    /// Tells an acceptor that lacks WAL the proposer no longer has where to fetch it.
    CatchUp(CatchUp),
}

/// Asks for a vote.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Vote {
    /// The granted term and this writer's attempt in it.
    pub ballot: Ballot,
    /// To whom the term was granted.
    pub writer: WriterId,
    /// Tells two runs of one writer apart.
    pub incarnation: Incarnation,
    /// The configuration that the proposer counts quorums with. An acceptor that knows an older one adopts it with
    /// the vote, so that no proposer with an older one can count this acceptor any more.
    pub configuration: Configuration,
}

/// The election's result. Durable on an acceptor before it answers; on a majority it commits `start`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Elected {
    /// The ballot that won.
    pub ballot: Ballot,
    /// The run that won it.
    pub incarnation: Incarnation,
    /// Of the configuration that the proposer counts quorums with.
    pub generation: Generation,
    /// X, the end of the log, with its summary. The last entry of `history` starts here.
    pub start: FrameSummary,
    /// Which ballot wrote which part of the log, up to and including this one.
    pub history: TermHistory,
    /// Which PostgreSQL timeline which part of the log belongs to, with the texts of the history files.
    pub timelines: TimelineHistory,
    /// Known to be committed by earlier ballots.
    pub commit_lsn: Lsn,
}

/// Header of an append. `end_lsn == begin_lsn` is a heartbeat.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Append {
    /// Of the elected proposer.
    pub ballot: Ballot,
    /// Of the configuration that the proposer counts quorums with.
    pub generation: Generation,
    /// Numbers this proposer's appends to this acceptor, from 1; the reply names it, so that a lease counts from the
    /// moment of sending.
    pub sequence: u64,
    /// First byte: must be where the acceptor's log ends, scratch included.
    pub begin_lsn: Lsn,
    /// Behind the last byte; may fall inside a record.
    pub end_lsn: Lsn,
    /// Committed so far, as counted with `generation`; [`Lsn::INVALID`] while the proposer cannot say, just elected or
    /// just changed to a new configuration.
    pub commit_lsn: Lsn,
    /// A PostgreSQL timeline that begins inside `[begin_lsn, end_lsn)`; durable before the bytes are acknowledged.
    pub timeline: Option<TimelineEntry>,
}

/// A section of the log and PostgreSQL's history file of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TimelineEntry {
    /// The timeline.
    pub timeline: PgTimeline,
    /// Where it begins: the end of its parent.
    pub start_lsn: Lsn,
    /// Contents of `NNNNNNNN.history`; empty for the first timeline.
    pub history_file: Vec<u8>,
}

/// Tells an acceptor to fetch `[its end, until)` from one of `donors`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct CatchUp {
    /// Of the elected proposer. A donor serves only when its own last elected ballot is this one.
    pub ballot: Ballot,
    /// Of the configuration that the proposer counts quorums with.
    pub generation: Generation,
    /// A record end that every donor holds.
    pub until: Lsn,
    /// Address (`host:port` of the append protocol) of members that hold the bytes, best first.
    pub donors: Vec<Donor>,
}

/// A member to fetch WAL from.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Donor {
    /// Its number.
    pub member: MemberId,
    /// `host:port` of its append protocol.
    pub address: String,
}

/// What an acceptor answers.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum AcceptorMessage {
    /// First message on a connection: who and where the acceptor is. Grants nothing.
    Status(AcceptorStatus),
    /// The vote is persisted.
    Voted(Voted),
    /// The election is persisted, divergent WAL is gone.
    ElectedAccepted(ElectedAccepted),
    /// WAL is durable, or a heartbeat was heard.
    Appended(Appended),
    /// The request was not carried out; nothing was changed.
    Refused(Refused),
}

/// The acceptor's state as anyone entitled may see it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct AcceptorStatus {
    /// Its place in the configuration.
    pub member: MemberId,
    /// The identity of its disk.
    pub disk: DiskId,
    /// The highest ballot it was fenced to or voted for.
    pub ballot: Ballot,
    /// To whom that term was granted.
    pub writer: WriterId,
    /// The configuration it knows.
    pub configuration: Configuration,
    /// End of its log.
    pub flush: FrameSummary,
    /// Committed, as far as it knows.
    pub commit_lsn: Lsn,
    /// First position that it still holds.
    pub oldest_lsn: Lsn,
}

/// A vote given.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Voted {
    /// The ballot voted for.
    pub ballot: Ballot,
    /// The run voted for.
    pub incarnation: Incarnation,
    /// Which acceptor; checked against the configuration by disk.
    pub member: MemberId,
    /// The identity of its disk.
    pub disk: DiskId,
    /// Of the configuration it has persisted: the vote counts in this generation and older ones.
    pub generation: Generation,
    /// Last ballot of its history whose start is at or below `flush.record_end`.
    pub last_ballot: Ballot,
    /// Durable end of its log, a record end.
    pub flush: FrameSummary,
    /// Its term history.
    pub history: TermHistory,
    /// Its timelines.
    pub timelines: TimelineHistory,
    /// Committed, as far as it knows.
    pub commit_lsn: Lsn,
    /// First position that it still holds.
    pub oldest_lsn: Lsn,
    /// How long its promise of a lease to the earlier writer still runs, from the moment of this answer.
    pub promise_remaining: Duration,
}

/// An election accepted.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ElectedAccepted {
    /// The ballot.
    pub ballot: Ballot,
    /// Durable end of its log after the truncation: appends continue here.
    pub flush_lsn: Lsn,
}

/// WAL made durable.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Appended {
    /// The ballot.
    pub ballot: Ballot,
    /// Highest sequence of this ballot whose append was *heard* (not: made durable): renews the lease.
    pub sequence: u64,
    /// Durable end of its log: the end of its last complete durable record.
    pub flush_lsn: Lsn,
    /// Behind its last durable byte, unfinished record included: for flow control only, commits nothing.
    pub durable_lsn: Lsn,
    /// Its disk is full: appends are refused until space returns.
    pub disk_full: bool,
}

/// A refusal, with what the proposer needs to act on it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Refused {
    /// Why.
    pub reason: Refusal,
    /// Sequence of the refused append; 0 when something else was refused.
    pub sequence: u64,
    /// The acceptor's ballot.
    pub ballot: Ballot,
    /// The writer of that ballot.
    pub writer: WriterId,
    /// The acceptor's configuration.
    pub configuration: Configuration,
}

/// Why an acceptor refused.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Refusal {
    /// A later term was granted, to another writer: this proposer is fenced.
    Fenced,
    /// The term was granted to another writer. (Never happens unless two operators granted one term.)
    OtherWriter,
    /// The acceptor has not heard of this term's grant yet; it asks its peers. Try again.
    TermNotGranted {
        /// What it knows.
        known: Term,
    },
    /// Another attempt, or another run in this attempt, of the same writer was voted for: raise the attempt.
    StaleAttempt,
    /// The proposer's configuration is older than the acceptor's; adopt `configuration`.
    StaleGeneration,
    /// The acceptor's disk is not in its configuration: it takes part in nothing.
    NotAMember,
    /// Elected, append or catch-up without the vote or election before it in this ballot.
    NotElected,
    /// `begin_lsn` is not the end of the acceptor's log, which is given.
    Gap {
        /// Where its log ends, scratch included.
        expected: Lsn,
    },
    /// The bytes are not WAL: page header, CRC, or link to the record before.
    BadWal {
        /// Where.
        lsn: Lsn,
        /// What is wrong.
        detail: String,
    },
    /// The message contradicts itself or what the log has committed; a defect or two grants of one term.
    Malformed {
        /// What is wrong.
        detail: String,
    },
    /// The disk keeps its headroom; appends resume when space returns.
    DiskFull,
    /// A disk operation failed; the log is read-only until the process is restarted.
    DiskFailed,
}
