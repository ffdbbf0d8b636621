//! The acceptor: one log of one safekeeper, as consensus sees it.
//!
//! Knows nothing about segments, disks or connections: the `logstore` crate scans the bytes, performs the commands and
//! reports back what the disk did. A reply that promises durability is held back until the event that proves it
//! (`durability.rs`). The rules are in `docs/design/2026-11-22-consensus.md`; the other side is `proposer.rs`.

use alloc::{collections::VecDeque, string::String, vec::Vec};
use core::{
    hash::{Hash, Hasher},
    time::Duration,
};

use pgtypes::{
    Ballot, DiskId, FrameSummary, Generation, Incarnation, Instant, LogId, Lsn, MemberId, PgTimeline, SystemId, Term,
    WriterId,
};

use crate::{
    Configuration, ConfigurationError, LEASE_LENGTH, TermHistory, TimelineHistory,
    durability::{Flushed, Persisted, Released},
    message::{
        AcceptorStatus, Append, Appended, CatchUp, Donor, Elected, ElectedAccepted, ProposerMessage, Refusal, Refused,
        TimelineEntry, Vote, Voted,
    },
};

/// Most requests that wait for the disk at one time. At the bound the oldest is dropped: whoever asked it times out
/// and asks again, all of them are idempotent.
pub const HELD_MAX: usize = 64;

/// What never changes in the life of an acceptor.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct AcceptorIdentity {
    /// Which log.
    pub log: LogId,
    /// PostgreSQL's system identifier; bytes of another are never WAL of this log.
    pub system: SystemId,
    /// Its place in the configuration.
    pub member: MemberId,
    /// The identity of its disk.
    pub disk: DiskId,
    /// Size of a WAL segment.
    pub segment_bytes: u64,
    /// Where the log began on this acceptor.
    pub start: FrameSummary,
}

/// What an acceptor must not forget. Written as a whole by [`AcceptorCommand::Persist`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct AcceptorState {
    /// The highest ballot that it was fenced to (attempt 0) or voted for.
    pub ballot: Ballot,
    /// To whom that term was granted.
    pub writer: WriterId,
    /// The run that it voted for; zero after a fence.
    pub incarnation: Incarnation,
    /// The last ballot whose election it accepted.
    pub elected: Ballot,
    /// The configuration that it knows.
    pub configuration: Configuration,
    /// Which ballot wrote which part of the log.
    pub history: TermHistory,
    /// Which PostgreSQL timeline covers which part of the log.
    pub timelines: TimelineHistory,
    /// Committed as far as it knows. Lazy: what is on the disk may be older, never newer than the truth.
    pub commit_lsn: Lsn,
    /// The newest generation that a commit which it heard of was counted with.
    pub commit_generation: Generation,
}

impl AcceptorState {
    /// The state of a log that nobody has written to.
    pub fn created(configuration: Configuration, start_lsn: Lsn, timeline: PgTimeline) -> AcceptorState {
        let first = TimelineEntry { timeline, start_lsn, history_file: Vec::new() };
        AcceptorState {
            ballot: Ballot::default(),
            writer: WriterId::default(),
            incarnation: Incarnation::default(),
            elected: Ballot::default(),
            configuration,
            history: TermHistory::default(),
            timelines: TimelineHistory([first].into()),
            commit_lsn: start_lsn,
            commit_generation: Generation::default(),
        }
    }
}

/// What the store found at its start cannot be this log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The disk lost WAL that was acknowledged: the log must not take part in anything.
    #[error("the log ends at {end}, but was committed up to {commit_lsn}: the disk lost WAL")]
    EndsBelowCommit {
        /// Last record end found.
        end: Lsn,
        /// Committed according to the control file.
        commit_lsn: Lsn,
    },
    /// The log ends before it began.
    #[error("the log ends at {end}, but begins at {start}")]
    EndsBelowStart {
        /// Last record end found.
        end: Lsn,
        /// Where the log began on this acceptor.
        start: Lsn,
    },
}

/// What the store has to do, in this order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum AcceptorCommand {
    /// Write the state durably, then call [`Acceptor::handle_persisted`]. A later one replaces an earlier one that was
    /// not begun; reporting a sequence reports all before it.
    Persist {
        /// To be reported.
        sequence: u64,
        /// To be written.
        state: AcceptorState,
        /// WAL accepted so far that is not on its way to the disk yet, and all accepted from now on, is written only
        /// after this state is durable: it belongs to a timeline that the state on the disk does not know.
        before_writes: bool,
    },
    /// Drop what was accepted beyond `to` (a record end), wait for writes under way, zero behind it, sync, then call
    /// [`Acceptor::handle_truncated`]. No append is accepted meanwhile.
    Truncate {
        /// New end of the log.
        to: Lsn,
    },
    /// Fetch `[from, until)` from one of the donors, handing each piece to [`Acceptor::check_fetched`] and
    /// [`Acceptor::fetched`]. Replaces an earlier one; ends when refused.
    CatchUp(CatchUpTask),
    /// Ask the members of the configuration for their ballots and hand the answers to
    /// [`Acceptor::handle_peer_ballot`]. One round at a time is enough.
    AskPeers,
    /// Send on the connection.
    Reply {
        /// As handed in with the request.
        connection: u64,
        /// May leave at once.
        message: Released,
    },
    /// Answer [`Acceptor::handle_fence`].
    ReplyFence {
        /// As handed in.
        request: u64,
        /// The outcome.
        result: Result<FenceAccepted, Refused>,
    },
    /// Answer [`Acceptor::handle_configuration`].
    ReplyConfiguration {
        /// As handed in.
        request: u64,
        /// The generation that is durable, or why not.
        result: Result<Generation, ConfigurationError>,
    },
}

/// WAL to be fetched from a peer.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct CatchUpTask {
    /// Of the elected proposer; to be named to the donor and to [`Acceptor::check_fetched`].
    pub ballot: Ballot,
    /// First byte wanted.
    pub from: Lsn,
    /// A record end, behind the last byte wanted.
    pub until: Lsn,
    /// Whom to ask, best first; never this acceptor itself.
    pub donors: Vec<Donor>,
}

/// The answer to a fence, durable.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct FenceAccepted {
    /// The term fenced to.
    pub term: Term,
    /// Its writer.
    pub writer: WriterId,
    /// The ballot that wrote the end of the log.
    pub last_ballot: Ballot,
    /// End of the log.
    pub flush_lsn: Lsn,
    /// Of the acceptor's configuration: a fence counts for the majorities of this generation.
    pub generation: Generation,
    /// How long its promise of a lease to earlier writers still runs.
    pub promise_remaining: Duration,
}

/// A request that waits for the disk.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Held {
    /// State that must be durable first.
    sequence: u64,
    request: HeldRequest,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum HeldRequest {
    Vote { connection: u64, ballot: Ballot, incarnation: Incarnation, promise_remaining: Duration },
    Elected { connection: u64, ballot: Ballot },
    Fence { request: u64, term: Term, promise_remaining: Duration },
    Configuration { request: u64, generation: Generation },
}

/// An election that waits for the truncation before it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Electing {
    connection: u64,
    elected: Elected,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Acceptor {
    identity: AcceptorIdentity,
    state: AcceptorState,
    /// Number of the last state handed to the store.
    sequence: u64,
    persisted: Persisted,
    flushed: Flushed,
    /// Behind the last byte accepted, unfinished record included.
    receive_lsn: Lsn,
    /// End of the last complete record accepted.
    received: FrameSummary,
    /// The disk may hold bytes behind `receive_lsn` (found so at the start): to be cut off before the next append.
    tail_unknown: bool,
    truncating: Option<Lsn>,
    electing: Option<Electing>,
    /// The last ballot whose election is durable here.
    elected_durable: Ballot,
    /// The connection that brought the election: appends come from there, acknowledgements go there.
    writer_connection: Option<u64>,
    /// Highest sequence heard in `elected_durable`.
    heard: u64,
    /// When the first append of that ballot was heard in this run.
    following_since: Option<Instant>,
    /// Highest commit announced; counts as far as the log reaches.
    announced_commit: Lsn,
    /// The state that makes the newest timeline durable, and where it begins.
    timeline_pending: Option<(u64, Lsn)>,
    /// End of the lease promised to ballots before `state.ballot`, and to that ballot.
    promised_earlier: Instant,
    promised: Instant,
    /// First position that the store still holds.
    oldest_lsn: Lsn,
    /// `commit_lsn` of the last state handed to the store.
    commit_handed: Lsn,
    disk_full: bool,
    disk_failed: bool,
    held: VecDeque<Held>,
    commands: VecDeque<AcceptorCommand>,
}

impl Acceptor {
    /// An acceptor that starts, or starts again, with what the disk holds: `state` as last persisted and `flush`, the
    /// end of the last complete record, synced.
    ///
    /// # Errors
    /// The disk does not hold what it must: see [`RecoveryError`].
    pub fn new(
        identity: AcceptorIdentity,
        mut state: AcceptorState,
        flush: FrameSummary,
        now: Instant,
    ) -> Result<Acceptor, RecoveryError> {
        if flush.record_end < identity.start.record_end {
            return Err(RecoveryError::EndsBelowStart { end: flush.record_end, start: identity.start.record_end });
        }
        if flush.record_end < state.commit_lsn {
            return Err(RecoveryError::EndsBelowCommit { end: flush.record_end, commit_lsn: state.commit_lsn });
        }
        // Planted for the tests: an acceptor that starts again has never voted.
        if cfg!(feature = "bug-forget-term-on-restart") {
            state.ballot = Ballot::default();
            state.writer = WriterId::default();
            state.incarnation = Incarnation::default();
        }
        // Promises are not persisted: it may have given one just before it stopped. Without an election accepted there
        // was no append to promise anything to.
        let promised_earlier = match state.elected == Ballot::default() || cfg!(feature = "bug-forget-promises") {
            true => Instant::default(),
            false => now.after(LEASE_LENGTH),
        };
        Ok(Acceptor {
            sequence: 0,
            persisted: Persisted::START,
            flushed: Flushed::reported(flush, flush.record_end),
            receive_lsn: flush.record_end,
            received: flush,
            tail_unknown: true,
            truncating: None,
            electing: None,
            elected_durable: state.elected,
            writer_connection: None,
            heard: 0,
            following_since: None,
            announced_commit: state.commit_lsn,
            timeline_pending: None,
            promised_earlier,
            promised: Instant::default(),
            oldest_lsn: identity.start.record_end,
            commit_handed: state.commit_lsn,
            disk_full: false,
            disk_failed: false,
            held: VecDeque::new(),
            commands: VecDeque::new(),
            identity,
            state,
        })
    }

    // ---- what the store and the shell may look at ----

    /// Who it is.
    pub fn identity(&self) -> &AcceptorIdentity {
        &self.identity
    }

    /// Its state, not all of which is durable.
    pub fn state(&self) -> &AcceptorState {
        &self.state
    }

    /// Durable end of the log: the end of the last complete record.
    pub fn flush(&self) -> FrameSummary {
        self.flushed.summary()
    }

    /// End of the last complete record accepted: where the scan of the next bytes goes on.
    pub fn received(&self) -> FrameSummary {
        self.received
    }

    /// Where the next byte goes, unfinished record included.
    pub fn receive_lsn(&self) -> Lsn {
        self.receive_lsn
    }

    /// Committed as far as this acceptor knows; never beyond what it holds durably.
    pub fn commit_lsn(&self) -> Lsn {
        self.state.commit_lsn
    }

    /// Up to where anyone entitled may read.
    pub fn readable_until(&self) -> Lsn {
        self.state.commit_lsn.min(self.flushed.end())
    }

    /// Up to where a peer may read that names the ballot whose election it accepted last: all of the log if it is
    /// this acceptor's, too, for then the log is a part of that ballot's log; else what is committed.
    pub fn readable_until_by(&self, peer: Ballot) -> Lsn {
        let same = peer != Ballot::default() && peer == self.elected_durable && peer == self.state.elected;
        match same && self.truncating.is_none() && !self.disk_failed {
            true => self.flushed.end(),
            false => self.readable_until(),
        }
    }

    /// Whether WAL up to `end` may be given to a peer that names `peer`; see [`Acceptor::readable_until_by`].
    pub fn may_serve(&self, peer: Ballot, end: Lsn) -> bool {
        end <= self.readable_until_by(peer)
    }

    /// Its state as anyone entitled may see it: the first message on a connection.
    pub fn status(&self) -> AcceptorStatus {
        AcceptorStatus {
            member: self.identity.member,
            disk: self.identity.disk,
            ballot: self.state.ballot,
            writer: self.state.writer,
            configuration: self.state.configuration.clone(),
            flush: self.flushed.summary(),
            commit_lsn: self.state.commit_lsn,
            oldest_lsn: self.oldest_lsn,
        }
    }

    /// A refusal as this acceptor would send it; `sequence` of the append, or 0.
    pub fn refusal(&self, reason: Refusal, sequence: u64) -> Refused {
        Refused {
            reason,
            sequence,
            ballot: self.state.ballot,
            writer: self.state.writer,
            configuration: self.state.configuration.clone(),
        }
    }

    /// What the store has to do next; to be asked until `None` after every event.
    pub fn poll_command(&mut self) -> Option<AcceptorCommand> {
        self.commands.pop_front()
    }

    // ---- messages of a proposer ----

    /// Takes a message of a proposer. Appends that carry bytes go through [`Acceptor::check_append`] and
    /// [`Acceptor::appended`]; here one without its bytes is refused.
    pub fn handle_message(&mut self, connection: u64, message: ProposerMessage, now: Instant) {
        match message {
            ProposerMessage::Vote(vote) => self.handle_vote(connection, &vote, now),
            ProposerMessage::Elected(elected) => self.handle_elected(connection, elected),
            ProposerMessage::CatchUp(catch_up) => self.handle_catch_up(connection, catch_up),
            ProposerMessage::Append(append) => {
                let checked = match append.begin_lsn == append.end_lsn {
                    true => self.check_append(connection, &append),
                    false => Err(self.refusal(malformed("append without its bytes"), append.sequence)),
                };
                match checked {
                    Ok(()) => {
                        self.appended(connection, &append, self.received, now);
                        // An append before it got lost and none follows that would show it.
                        if append.begin_lsn > self.receive_lsn {
                            let gap = Refusal::Gap { expected: self.receive_lsn };
                            self.refuse(connection, self.refusal(gap, append.sequence));
                        }
                    }
                    Err(refused) => self.refuse(connection, refused),
                }
            }
        }
    }

    /// Sends a refusal, be it of [`Acceptor::check_append`] or of the store's own (bytes that are not WAL).
    pub fn refuse(&mut self, connection: u64, refused: Refused) {
        if matches!(refused.reason, Refusal::TermNotGranted { .. })
            && !self.commands.contains(&AcceptorCommand::AskPeers)
        {
            self.commands.push_back(AcceptorCommand::AskPeers);
        }
        self.commands.push_back(AcceptorCommand::Reply { connection, message: Released::refused(refused) });
    }

    /// The connection is gone: nothing is sent on it any more.
    pub fn handle_disconnected(&mut self, connection: u64) {
        self.held.retain(|held| match held.request {
            HeldRequest::Vote { connection: of, .. } => of != connection,
            // The election itself goes on; its release notices that nobody waits for it.
            HeldRequest::Elected { .. } | HeldRequest::Fence { .. } | HeldRequest::Configuration { .. } => true,
        });
        if self.writer_connection == Some(connection) {
            self.writer_connection = None;
        }
    }

    fn handle_vote(&mut self, connection: u64, vote: &Vote, now: Instant) {
        if let Err(reason) = self.check_vote(vote) {
            return self.refuse(connection, self.refusal(reason, 0));
        }
        let mut changed = false;
        if vote.configuration.generation > self.state.configuration.generation {
            self.state.configuration = vote.configuration.clone();
            changed = true;
        }
        if vote.ballot > self.state.ballot {
            self.raise_ballot(vote.ballot, vote.writer, vote.incarnation);
            changed = true;
        }
        if changed {
            self.persist(false);
        }
        let promise_remaining = self.promised_earlier.since(now);
        let (ballot, incarnation) = (vote.ballot, vote.incarnation);
        self.held.retain(|held| !matches!(held.request, HeldRequest::Vote { connection: of, .. } if of == connection));
        self.hold(HeldRequest::Vote { connection, ballot, incarnation, promise_remaining });
    }

    fn check_vote(&self, vote: &Vote) -> Result<(), Refusal> {
        let (known, offered) = (&self.state.configuration, &vote.configuration);
        if offered.check().is_err() || (offered.generation == known.generation && offered != known) {
            return Err(malformed("the vote's configuration is not one, or another of the same generation"));
        }
        let newest = if offered.generation > known.generation { offered } else { known };
        self.check_takes_part(newest, offered.generation)?;
        let mine = &self.state;
        if vote.ballot.term < mine.ballot.term {
            return Err(Refusal::Fenced);
        }
        if vote.ballot.term > mine.ballot.term || vote.ballot.term == Term(0) {
            return Err(Refusal::TermNotGranted { known: mine.ballot.term });
        }
        if vote.writer != mine.writer {
            return Err(Refusal::OtherWriter);
        }
        let again = vote.ballot == mine.ballot && vote.incarnation == mine.incarnation && vote.ballot.attempt.0 > 0;
        match vote.ballot > mine.ballot || again {
            true => Ok(()),
            false => Err(Refusal::StaleAttempt),
        }
    }

    fn handle_elected(&mut self, connection: u64, elected: Elected) {
        if let Err(reason) = self.check_elected(&elected) {
            return self.refuse(connection, self.refusal(reason, 0));
        }
        self.electing = Some(Electing { connection, elected });
        if self.truncating.is_none() {
            self.advance_election();
        }
    }

    fn check_elected(&self, elected: &Elected) -> Result<(), Refusal> {
        self.check_takes_part(&self.state.configuration, elected.generation)?;
        self.check_ballot(elected.ballot)?;
        let own = elected.history.0.last();
        let ends_here = own.is_some_and(|e| e.ballot == elected.ballot && e.start_lsn == elected.start.record_end);
        if !ends_here || !elected.history.is_ordered() || !elected.timelines.is_ordered() {
            return Err(malformed("the histories are not in order, or do not end with this election"));
        }
        let again = self.state.elected == elected.ballot;
        if again && (self.state.history != elected.history || self.state.incarnation != elected.incarnation) {
            return Err(malformed("another election was accepted in this ballot"));
        }
        Ok(())
    }

    /// Cuts the log down to what it has in common with the elected one, or, that done, makes the election durable.
    fn advance_election(&mut self) {
        let Some(electing) = &self.electing else { return };
        let flush_lsn = self.flushed.end();
        // A log without a byte has nothing that could differ; a new member's log begins anywhere below X.
        let empty = flush_lsn == self.identity.start.record_end;
        let parts = self.state.history.parts_from(&electing.elected.history).filter(|_| !empty);
        let common = parts.map_or(flush_lsn, |parts| parts.min(flush_lsn));
        let connection = electing.connection;
        let beyond = empty && flush_lsn > electing.elected.start.record_end;
        if beyond || common < self.state.commit_lsn || common < self.identity.start.record_end {
            self.electing = None;
            return self.refuse(connection, self.refusal(malformed("the election would cut off committed WAL"), 0));
        }
        if common < flush_lsn || self.receive_lsn > flush_lsn || self.tail_unknown {
            self.truncating = Some(common);
            self.commands.push_back(AcceptorCommand::Truncate { to: common });
            return;
        }
        let Some(Electing { elected, .. }) = self.electing.take() else { return };
        if self.writer_connection != Some(connection) || self.state.elected != elected.ballot {
            self.heard = 0;
        }
        // Each acceptor votes for one run in a ballot, so at most one run is elected in it; an acceptor that voted for
        // another follows all the same.
        let changed = self.state.elected != elected.ballot
            || self.state.incarnation != elected.incarnation
            || self.state.history != elected.history
            || self.state.timelines != elected.timelines;
        if self.state.elected != elected.ballot {
            self.following_since = None;
        }
        self.state.elected = elected.ballot;
        self.state.incarnation = elected.incarnation;
        self.state.history = elected.history;
        self.state.timelines = elected.timelines;
        self.announced_commit = self.announced_commit.max(elected.commit_lsn);
        self.raise_commit();
        self.writer_connection = Some(connection);
        if changed {
            // No byte is accepted before the history that it belongs to is durable: else, after a crash, it would be
            // voted with as if an earlier ballot had written it.
            self.elected_durable = Ballot::default();
            self.timeline_pending = None;
            self.persist(false);
        }
        self.held.retain(|held| !matches!(held.request, HeldRequest::Elected { .. }));
        self.hold(HeldRequest::Elected { connection, ballot: elected.ballot });
    }

    fn handle_catch_up(&mut self, connection: u64, catch_up: CatchUp) {
        let checked = self
            .check_takes_part(&self.state.configuration, catch_up.generation)
            .and_then(|()| self.check_follows(catch_up.ballot));
        if let Err(reason) = checked {
            return self.refuse(connection, self.refusal(reason, 0));
        }
        if catch_up.until <= self.receive_lsn {
            return self.acknowledge();
        }
        let donors = catch_up.donors.into_iter().filter(|donor| donor.member != self.identity.member);
        let donors: Vec<Donor> = donors.take(2 * crate::configuration::MEMBERS_MAX).collect();
        let task = CatchUpTask { ballot: catch_up.ballot, from: self.receive_lsn, until: catch_up.until, donors };
        self.commands.push_back(AcceptorCommand::CatchUp(task));
    }

    /// Whether the append may be carried out; to be asked before its bytes are touched. Changes nothing.
    ///
    /// # Errors
    /// The refusal to be sent, by [`Acceptor::refuse`].
    #[expect(clippy::result_large_err, reason = "a refusal is rare, and sent as it is")]
    pub fn check_append(&self, connection: u64, append: &Append) -> Result<(), Refused> {
        self.may_append(connection, append).map_err(|reason| self.refusal(reason, append.sequence))
    }

    fn may_append(&self, connection: u64, append: &Append) -> Result<(), Refusal> {
        self.check_takes_part(&self.state.configuration, append.generation)?;
        self.check_follows(append.ballot)?;
        if self.writer_connection != Some(connection) {
            return Err(Refusal::NotElected);
        }
        if append.end_lsn < append.begin_lsn {
            return Err(malformed("append ends before it begins"));
        }
        if let Some(entry) = &append.timeline
            && !self.state.timelines.0.contains(entry)
        {
            let last = self.state.timelines.0.last();
            let follows = last.is_none_or(|l| l.timeline < entry.timeline && l.start_lsn <= entry.start_lsn);
            if !follows || entry.start_lsn < append.begin_lsn || entry.start_lsn >= append.end_lsn {
                return Err(malformed("the timeline does not begin in this append or does not follow the last one"));
            }
        }
        if append.begin_lsn == append.end_lsn {
            return Ok(());
        }
        if self.disk_full {
            return Err(Refusal::DiskFull);
        }
        match append.begin_lsn == self.receive_lsn {
            true => Ok(()),
            false => Err(Refusal::Gap { expected: self.receive_lsn }),
        }
    }

    /// The bytes of an append that [`Acceptor::check_append`] let pass are WAL and will be written; `summary` is the end
    /// of the last complete record accepted, these bytes included. A heartbeat brings [`Acceptor::received`].
    pub fn appended(&mut self, connection: u64, append: &Append, summary: FrameSummary, now: Instant) {
        self.writer_connection = Some(connection);
        self.heard = self.heard.max(append.sequence);
        self.following_since = self.following_since.or(Some(now));
        self.promised = self.promised.max(now.after(LEASE_LENGTH));
        if append.end_lsn > append.begin_lsn {
            self.receive_lsn = append.end_lsn;
            self.received = summary;
        }
        if let Some(entry) = &append.timeline
            && !self.state.timelines.0.contains(entry)
        {
            self.state.timelines.0.push(entry.clone());
            self.persist(true);
            self.timeline_pending = Some((self.sequence, entry.start_lsn));
        }
        if append.commit_lsn.is_valid() {
            self.announced_commit = self.announced_commit.max(append.commit_lsn);
            self.state.commit_generation = self.state.commit_generation.max(append.generation);
            self.raise_commit();
        }
        // Planted for the tests: what was accepted counts as if the disk had it.
        if cfg!(feature = "bug-ack-before-flush") {
            self.flushed = Flushed::reported(summary, self.receive_lsn);
            return self.acknowledge();
        }
        // A heartbeat is answered at once, bytes when the disk has them.
        if append.begin_lsn == append.end_lsn {
            self.acknowledge();
        }
    }

    /// Whether bytes `[begin_lsn, ..)` fetched from a peer for the catch-up of `ballot` may be written.
    ///
    /// # Errors
    /// Why the catch-up is over, or (gap) where it has to go on.
    pub fn check_fetched(&self, ballot: Ballot, begin_lsn: Lsn) -> Result<(), Refusal> {
        self.check_takes_part(&self.state.configuration, self.state.configuration.generation)?;
        self.check_follows(ballot)?;
        if self.disk_full {
            return Err(Refusal::DiskFull);
        }
        match begin_lsn == self.receive_lsn {
            true => Ok(()),
            false => Err(Refusal::Gap { expected: self.receive_lsn }),
        }
    }

    /// Bytes up to `end_lsn` that [`Acceptor::check_fetched`] let pass are WAL and will be written.
    pub fn fetched(&mut self, end_lsn: Lsn, summary: FrameSummary) {
        self.receive_lsn = self.receive_lsn.max(end_lsn);
        self.received = summary;
    }

    // ---- the operator, and peers ----

    /// Fences all terms below `term`, which is granted to `writer`. The answer comes when it is durable. Idempotent.
    pub fn handle_fence(&mut self, request: u64, term: Term, writer: WriterId, now: Instant) {
        if let Err(reason) = self.check_fence(term, writer) {
            let result = Err(self.refusal(reason, 0));
            return self.commands.push_back(AcceptorCommand::ReplyFence { request, result });
        }
        self.adopt_fence(term, writer);
        let promise_remaining = self.promised_earlier.since(now);
        self.hold(HeldRequest::Fence { request, term, promise_remaining });
    }

    fn check_fence(&self, term: Term, writer: WriterId) -> Result<(), Refusal> {
        self.check_takes_part(&self.state.configuration, self.state.configuration.generation)?;
        if term < self.state.ballot.term {
            return Err(Refusal::Fenced);
        }
        if term == Term(0) {
            return Err(malformed("term 0 is nobody's"));
        }
        match term == self.state.ballot.term && writer != self.state.writer {
            true => Err(Refusal::OtherWriter),
            false => Ok(()),
        }
    }

    fn adopt_fence(&mut self, term: Term, writer: WriterId) {
        if term > self.state.ballot.term {
            self.raise_ballot(Ballot { term, ..Ballot::default() }, writer, Incarnation::default());
            self.persist(false);
        }
    }

    /// A peer is fenced to `term`: so is this acceptor, if it is higher. Only an operator can have begun it.
    pub fn handle_peer_ballot(&mut self, term: Term, writer: WriterId) {
        if self.check_fence(term, writer).is_ok() {
            self.adopt_fence(term, writer);
        }
    }

    /// Changes the membership. The answer comes when it is durable. Idempotent; see [`Configuration::check_next`].
    ///
    /// [`ConfigurationError::NotCommitted`] is answered until this acceptor has heard, from a writer that it follows for
    /// a lease length, of a commit counted with the joint configuration: try again.
    pub fn handle_configuration(&mut self, request: u64, configuration: Configuration, now: Instant) {
        match self.check_configuration(&configuration, now) {
            Ok(()) => {
                let generation = configuration.generation;
                if self.state.configuration != configuration {
                    self.state.configuration = configuration;
                    self.persist(false);
                }
                self.hold(HeldRequest::Configuration { request, generation });
            }
            Err(error) => {
                self.commands.push_back(AcceptorCommand::ReplyConfiguration { request, result: Err(error) });
            }
        }
    }

    fn check_configuration(&self, next: &Configuration, now: Instant) -> Result<(), ConfigurationError> {
        let known = &self.state.configuration;
        let takes_part =
            |configuration: &Configuration| configuration.contains(self.identity.member, self.identity.disk);
        if self.disk_failed {
            return Err(ConfigurationError::DiskFailed);
        }
        if !takes_part(known) && !takes_part(next) {
            return Err(ConfigurationError::NotAMember);
        }
        if next == known {
            return Ok(());
        }
        if next.generation == known.generation {
            return Err(ConfigurationError::Conflict(known.generation));
        }
        known.check_next(next, self.state.commit_generation)?;
        // A voter of the new set alone may not know of leases that the old set promised to a writer before the one that
        // it hears: those are over one lease after that writer was followed.
        let settled = self.following_since.is_some_and(|since| now >= since.after(LEASE_LENGTH));
        let leaves_old = known.new_members.is_some() && next.members != known.members;
        match leaves_old && !settled {
            true => Err(ConfigurationError::NotCommitted),
            false => Ok(()),
        }
    }

    // ---- events of the store ----

    /// The state of `sequence`, and so all before it, is durable.
    pub fn handle_persisted(&mut self, sequence: u64) {
        self.persisted = self.persisted.max(Persisted::reported(sequence));
        if let Some((pending, _)) = self.timeline_pending
            && self.persisted.covers(pending)
        {
            self.timeline_pending = None;
            self.acknowledge();
        }
        self.release();
    }

    /// The log is durable up to `summary`, its bytes up to `durable_lsn`. One acknowledgement covers all of it.
    pub fn handle_flushed(&mut self, summary: FrameSummary, durable_lsn: Lsn) {
        // What the disk held before a truncation says nothing about the log behind it.
        if self.truncating.is_some() {
            return;
        }
        let flushed = Flushed::reported(summary, durable_lsn);
        let behind = flushed.end() < self.flushed.end() || flushed.durable_lsn() < self.flushed.durable_lsn();
        if behind || flushed == self.flushed {
            return;
        }
        self.flushed = flushed;
        self.raise_commit();
        self.acknowledge();
    }

    /// [`AcceptorCommand::Truncate`] is done: the log ends at `summary`, nothing is behind it, and that is durable.
    pub fn handle_truncated(&mut self, summary: FrameSummary) {
        if self.truncating != Some(summary.record_end) {
            return;
        }
        self.truncating = None;
        self.tail_unknown = false;
        self.flushed = Flushed::reported(summary, summary.record_end);
        self.receive_lsn = summary.record_end;
        self.received = summary;
        if self.state.timelines.0.iter().skip(1).any(|entry| entry.start_lsn >= summary.record_end) {
            self.state.timelines.truncate(summary.record_end);
            self.persist(false);
        }
        self.advance_election();
        self.release();
    }

    /// The disk has reached its headroom, or has space again: appends are refused meanwhile, and resume by themselves.
    pub fn handle_disk_full(&mut self, full: bool) {
        if self.disk_full != full {
            self.disk_full = full;
            self.acknowledge();
        }
    }

    /// A disk operation failed: what the disk holds is unknown until the process starts again, so nothing that waits
    /// for it is answered but by a refusal.
    pub fn handle_disk_failed(&mut self) {
        self.disk_failed = true;
        let refused = self.refusal(Refusal::DiskFailed, 0);
        // Answers that the store has not taken yet: until it is ready it holds back even those that waited for nothing
        // (a fence repeated, a vote repeated), because what it found at its start is not known to be durable.
        for command in &mut self.commands {
            match command {
                AcceptorCommand::Reply { message, .. } => *message = Released::refused(refused.clone()),
                AcceptorCommand::ReplyFence { result, .. } => *result = Err(refused.clone()),
                AcceptorCommand::ReplyConfiguration { result, .. } => *result = Err(ConfigurationError::DiskFailed),
                _ => {}
            }
        }
        if let Some(electing) = self.electing.take() {
            self.refuse(electing.connection, refused.clone());
        }
        for held in core::mem::take(&mut self.held) {
            match held.request {
                HeldRequest::Vote { connection, .. } | HeldRequest::Elected { connection, .. } => {
                    self.refuse(connection, refused.clone());
                }
                HeldRequest::Fence { request, .. } => {
                    let result = Err(refused.clone());
                    self.commands.push_back(AcceptorCommand::ReplyFence { request, result });
                }
                HeldRequest::Configuration { request, .. } => {
                    let result = Err(ConfigurationError::DiskFailed);
                    self.commands.push_back(AcceptorCommand::ReplyConfiguration { request, result });
                }
            }
        }
        if let Some(connection) = self.writer_connection {
            self.refuse(connection, refused);
        }
    }

    /// WAL below `oldest_lsn` is gone from this acceptor.
    pub fn handle_oldest(&mut self, oldest_lsn: Lsn) {
        self.oldest_lsn = oldest_lsn;
    }

    // ---- rules used above ----

    /// Whether this acceptor takes part in anything, and the sender's generation is not older than its own.
    fn check_takes_part(&self, configuration: &Configuration, generation: Generation) -> Result<(), Refusal> {
        if !configuration.contains(self.identity.member, self.identity.disk) {
            return Err(Refusal::NotAMember);
        }
        if generation < configuration.generation {
            return Err(Refusal::StaleGeneration);
        }
        match self.disk_failed {
            true => Err(Refusal::DiskFailed),
            false => Ok(()),
        }
    }

    /// Whether `ballot` is the one that this acceptor voted for last.
    fn check_ballot(&self, ballot: Ballot) -> Result<(), Refusal> {
        let mine = self.state.ballot;
        if ballot == mine && ballot.attempt.0 > 0 {
            return Ok(());
        }
        Err(match ballot.term.cmp(&mine.term) {
            core::cmp::Ordering::Less => Refusal::Fenced,
            core::cmp::Ordering::Greater => Refusal::TermNotGranted { known: mine.term },
            core::cmp::Ordering::Equal if ballot < mine => Refusal::StaleAttempt,
            core::cmp::Ordering::Equal => Refusal::NotElected,
        })
    }

    /// Whether `ballot` is current and its election durable here, so that WAL of its log may be accepted.
    fn check_follows(&self, ballot: Ballot) -> Result<(), Refusal> {
        // Planted for the tests: a ballot that was fenced or outvoted goes on as long as no other election came.
        if !(cfg!(feature = "bug-accept-stale-term") && ballot < self.state.ballot) {
            self.check_ballot(ballot)?;
        }
        let follows = self.state.elected == ballot && self.elected_durable == ballot;
        match follows && self.truncating.is_none() && self.electing.is_none() {
            true => Ok(()),
            false => Err(Refusal::NotElected),
        }
    }

    fn raise_ballot(&mut self, ballot: Ballot, writer: WriterId, incarnation: Incarnation) {
        self.state.ballot = ballot;
        self.state.writer = writer;
        self.state.incarnation = incarnation;
        self.promised_earlier = self.promised_earlier.max(self.promised);
        self.promised = Instant::default();
        // An election of an earlier ballot that still waits for its truncation is over.
        if let Some(electing) = self.electing.take() {
            let reason = self.check_ballot(electing.elected.ballot).err().unwrap_or(Refusal::StaleAttempt);
            self.refuse(electing.connection, self.refusal(reason, 0));
        }
    }

    /// Raises the commit position to what was announced, as far as the log reaches.
    fn raise_commit(&mut self) {
        let commit_lsn = self.announced_commit.min(self.flushed.end());
        if commit_lsn <= self.state.commit_lsn {
            return;
        }
        self.state.commit_lsn = commit_lsn;
        // Often enough that a restart finds the commit position at most one segment behind, and rare enough to stay
        // off the commit path.
        if commit_lsn.floor(self.identity.segment_bytes) > self.commit_handed {
            self.persist(false);
        }
    }

    fn persist(&mut self, before_writes: bool) {
        if self.disk_failed {
            return;
        }
        self.sequence += 1;
        self.commit_handed = self.state.commit_lsn;
        // A state that the store has not taken yet is replaced, so the queue holds at most one.
        let mut before_writes = before_writes;
        self.commands.retain(|command| match command {
            AcceptorCommand::Persist { before_writes: earlier, .. } => {
                before_writes |= earlier;
                false
            }
            _ => true,
        });
        let (sequence, state) = (self.sequence, self.state.clone());
        self.commands.push_back(AcceptorCommand::Persist { sequence, state, before_writes });
    }

    /// Keeps a request until the present state is durable; answers it now if it is.
    fn hold(&mut self, request: HeldRequest) {
        if self.held.len() >= HELD_MAX {
            self.held.pop_front();
        }
        self.held.push_back(Held { sequence: self.sequence, request });
        self.release();
    }

    /// Answers the requests whose conditions hold by now.
    fn release(&mut self) {
        for held in core::mem::take(&mut self.held) {
            if !self.try_release(&held) {
                self.held.push_back(held);
            }
        }
    }

    fn try_release(&mut self, held: &Held) -> bool {
        match held.request {
            HeldRequest::Vote { connection, ballot, incarnation, promise_remaining } => {
                if ballot != self.state.ballot || incarnation != self.state.incarnation {
                    let reason = self.check_ballot(ballot).err().unwrap_or(Refusal::StaleAttempt);
                    self.refuse(connection, self.refusal(reason, 0));
                    return true;
                }
                // The end of the log is unknown during a truncation: the vote names the end after it.
                if self.truncating.is_some() {
                    return false;
                }
                let message = Released::voted(self.persisted, held.sequence, &self.flushed, |flushed| Voted {
                    ballot,
                    incarnation,
                    member: self.identity.member,
                    disk: self.identity.disk,
                    generation: self.state.configuration.generation,
                    last_ballot: self.state.history.ballot_at(flushed.end()),
                    flush: flushed.summary(),
                    history: self.state.history.clone(),
                    timelines: self.state.timelines.clone(),
                    commit_lsn: self.state.commit_lsn,
                    oldest_lsn: self.oldest_lsn,
                    promise_remaining,
                });
                self.reply(connection, message)
            }
            HeldRequest::Elected { connection, ballot } => {
                if ballot != self.state.ballot {
                    let reason = self.check_ballot(ballot).err().unwrap_or(Refusal::StaleAttempt);
                    self.refuse(connection, self.refusal(reason, 0));
                    return true;
                }
                let message = Released::elected(self.persisted, held.sequence, &self.flushed, |flushed| {
                    ElectedAccepted { ballot, flush_lsn: flushed.end() }
                });
                let durable = message.is_some();
                if durable {
                    self.elected_durable = ballot;
                }
                // The connection may be gone; the election is durable all the same.
                match self.writer_connection == Some(connection) {
                    true => self.reply(connection, message),
                    false => durable,
                }
            }
            HeldRequest::Fence { request, term, promise_remaining } => {
                if term != self.state.ballot.term {
                    let result = Err(self.refusal(Refusal::Fenced, 0));
                    self.commands.push_back(AcceptorCommand::ReplyFence { request, result });
                    return true;
                }
                if self.truncating.is_some() || !self.persisted.covers(held.sequence) {
                    return false;
                }
                let flush_lsn = self.flushed.end();
                let result = Ok(FenceAccepted {
                    term,
                    writer: self.state.writer,
                    last_ballot: self.state.history.ballot_at(flush_lsn),
                    flush_lsn,
                    generation: self.state.configuration.generation,
                    promise_remaining,
                });
                self.commands.push_back(AcceptorCommand::ReplyFence { request, result });
                true
            }
            HeldRequest::Configuration { request, generation } => {
                if !self.persisted.covers(held.sequence) {
                    return false;
                }
                self.commands.push_back(AcceptorCommand::ReplyConfiguration { request, result: Ok(generation) });
                true
            }
        }
    }

    fn reply(&mut self, connection: u64, message: Option<Released>) -> bool {
        let Some(message) = message else { return false };
        self.commands.push_back(AcceptorCommand::Reply { connection, message });
        true
    }

    /// Tells the writer what is durable and what was heard, unless it is the writer no more.
    fn acknowledge(&mut self) {
        let Some(connection) = self.writer_connection else { return };
        let ballot = self.state.elected;
        if self.check_follows(ballot).is_err() {
            return;
        }
        // A timeline must be durable before the bytes that belong to it count.
        let flush_lsn_max = self.timeline_pending.map_or(Lsn::MAX, |(_, start_lsn)| start_lsn);
        let message = Released::appended(&self.flushed, |flushed| Appended {
            ballot,
            sequence: self.heard,
            flush_lsn: flushed.end().min(flush_lsn_max),
            durable_lsn: flushed.durable_lsn(),
            disk_full: self.disk_full,
        });
        // One acknowledgement covers all before it.
        self.commands.retain(|command| {
            !matches!(command, AcceptorCommand::Reply { connection: to, message }
                if *to == connection && matches!(message.message(), crate::message::AcceptorMessage::Appended(_)))
        });
        self.commands.push_back(AcceptorCommand::Reply { connection, message });
    }
}

/// For the exhaustive check (`tests/exhaustive`).
impl Acceptor {
    /// Hashes the promises that still run.
    #[doc(hidden)]
    pub fn hash_promises<H: Hasher>(&self, now: Instant, into: &mut H) {
        (self.promised_earlier.since(now), self.promised.since(now)).hash(into);
    }

    /// Whether appends on this connection are heard.
    #[doc(hidden)]
    pub fn hears(&self, connection: u64) -> bool {
        self.writer_connection == Some(connection)
    }

    /// Hashes what decides the acceptor's future apart from time: neither who it is, so that states which differ only
    /// in the numbering of acceptors are one, nor leases and sequences. `connection` gives connections stable names.
    #[doc(hidden)]
    pub fn hash_protocol_state<H: Hasher>(&self, connection: impl Fn(u64) -> u64, into: &mut H) {
        let state = &self.state;
        (state.ballot, state.writer, state.incarnation, state.elected, &state.history, state.commit_lsn).hash(into);
        (state.configuration.generation, state.commit_generation, state.timelines.0.len()).hash(into);
        (self.flushed.end(), self.flushed.durable_lsn(), self.receive_lsn, self.received.record_end).hash(into);
        // Whether the disk holds bytes behind the log decides only whether they are cut off.
        (self.truncating, self.elected_durable, self.announced_commit).hash(into);
        (self.writer_connection.map(&connection), self.timeline_pending.map(|(_, lsn)| lsn)).hash(into);
        (self.electing.as_ref().map(|electing| electing.elected.ballot), self.disk_full, self.disk_failed).hash(into);
        for held in &self.held {
            (self.sequence - held.sequence).hash(into);
            match &held.request {
                HeldRequest::Vote { connection: of, ballot, .. } => (1, connection(*of), ballot).hash(into),
                HeldRequest::Elected { connection: of, ballot } => (2, connection(*of), ballot).hash(into),
                HeldRequest::Fence { term, .. } => (3, term).hash(into),
                HeldRequest::Configuration { generation, .. } => (4, generation).hash(into),
            }
        }
    }
}

fn malformed(detail: &str) -> Refusal {
    Refusal::Malformed { detail: String::from(detail) }
}
