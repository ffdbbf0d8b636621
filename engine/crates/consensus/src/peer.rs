//! One acceptor as the proposer sees it.

use alloc::collections::VecDeque;
use core::time::Duration;

use pgtypes::{Ballot, FrameSummary, Generation, Instant, Lsn, WriterId};

use crate::{LEASE_LENGTH, Member, TermHistory, TimelineHistory, proposer::Trouble};

/// Most moments of sending that are remembered to one acceptor. At the bound newer ones are not: a lease then counts
/// from an earlier moment, which is shorter, never longer than promised.
const SENT_MAX: usize = 1024;

/// How far the conversation on the present connection has come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Stage {
    /// No connection; one will be tried at `Peer::retry_at`.
    Disconnected,
    /// The shell tries.
    Connecting,
    /// Connected, status heard; a vote is sent when the attempt is known, or at `Peer::retry_at`.
    Ready,
    /// Vote sent.
    Voting,
    /// Voted; waits for the election.
    Voted,
    /// Elected sent.
    Electing,
    /// Election accepted: appends flow.
    Following,
}

/// What a vote told.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct VoteHeard {
    pub(crate) last_ballot: Ballot,
    pub(crate) flush: FrameSummary,
    pub(crate) history: TermHistory,
    pub(crate) timelines: TimelineHistory,
    pub(crate) commit_lsn: Lsn,
    /// When the last lease that it promised to an earlier ballot is over.
    pub(crate) promised_until: Instant,
}

/// Catch-up under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct CatchingUp {
    pub(crate) until: Lsn,
    /// When to ask again, should nothing have arrived by then.
    pub(crate) again_at: Instant,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Peer {
    pub(crate) member: Member,
    pub(crate) stage: Stage,
    pub(crate) retry_at: Option<Instant>,
    pub(crate) retry_delay: Duration,
    /// When the answer to the vote, the election or a heartbeat is overdue and the connection is given up.
    pub(crate) silent_at: Instant,
    /// A status was heard in this run: its attempt is part of the highest known.
    pub(crate) status_heard: bool,
    /// Granted to somebody else, or attempted by another run: what it said.
    pub(crate) lost: Option<(Ballot, WriterId)>,
    /// The newest generation that it is known to have persisted.
    pub(crate) generation: Generation,
    pub(crate) vote: Option<VoteHeard>,
    /// The election of the present ballot is durable there; for good, connected or not.
    pub(crate) accepted: bool,
    /// Record end up to which its log is durable in the present ballot; for good.
    pub(crate) flush_lsn: Lsn,
    /// Behind its last durable byte.
    pub(crate) durable_lsn: Lsn,
    /// Behind the last byte sent to it.
    pub(crate) sent_lsn: Lsn,
    pub(crate) oldest_lsn: Lsn,
    pub(crate) next_sequence: u64,
    /// Refusals of appends before this sequence were acted on.
    pub(crate) valid_from: u64,
    pub(crate) sent: VecDeque<(u64, Instant)>,
    /// When the last append was sent that it is known to have heard.
    pub(crate) heard_sent_at: Option<Instant>,
    pub(crate) heartbeat_at: Instant,
    /// Commit position last announced to it.
    pub(crate) announced: Lsn,
    pub(crate) disk_full: bool,
    /// How many timelines it was told.
    pub(crate) timelines_told: usize,
    pub(crate) catching_up: Option<CatchingUp>,
    /// What was last reported about it.
    pub(crate) trouble: Option<Trouble>,
}

impl Peer {
    pub(crate) fn new(member: Member) -> Peer {
        Peer {
            member,
            stage: Stage::Disconnected,
            retry_at: None,
            retry_delay: Duration::ZERO,
            silent_at: Instant::default(),
            status_heard: false,
            lost: None,
            generation: Generation::default(),
            vote: None,
            accepted: false,
            flush_lsn: Lsn::INVALID,
            durable_lsn: Lsn::INVALID,
            sent_lsn: Lsn::INVALID,
            oldest_lsn: Lsn::INVALID,
            next_sequence: 1,
            valid_from: 1,
            sent: VecDeque::new(),
            heard_sent_at: None,
            heartbeat_at: Instant::default(),
            announced: Lsn::INVALID,
            disk_full: false,
            timelines_told: 0,
            catching_up: None,
            trouble: None,
        }
    }

    /// Forgets what holds for one ballot only.
    pub(crate) fn begin_ballot(&mut self) {
        self.vote = None;
        self.accepted = false;
        self.flush_lsn = Lsn::INVALID;
        self.durable_lsn = Lsn::INVALID;
        self.sent_lsn = Lsn::INVALID;
        self.next_sequence = 1;
        self.valid_from = 1;
        self.sent.clear();
        self.heard_sent_at = None;
        self.announced = Lsn::INVALID;
        self.catching_up = None;
    }

    pub(crate) fn is_connected(&self) -> bool {
        !matches!(self.stage, Stage::Disconnected | Stage::Connecting)
    }

    /// Whether its word counts in a configuration of `generation`: its election is durable, and so is a generation
    /// that lets nobody count it in an older configuration any more.
    pub(crate) fn counts_in(&self, generation: Generation) -> bool {
        self.accepted && self.generation >= generation
    }

    /// End of the lease that it promised, counted from the moment of sending.
    pub(crate) fn lease_until(&self) -> Option<Instant> {
        self.heard_sent_at.map(|sent_at| sent_at.after(LEASE_LENGTH))
    }

    /// Numbers an append that is sent now.
    pub(crate) fn number(&mut self, now: Instant) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        if self.sent.len() < SENT_MAX {
            self.sent.push_back((sequence, now));
        }
        sequence
    }

    /// The append of `sequence`, and so all before it, was heard.
    pub(crate) fn heard(&mut self, sequence: u64) {
        while let Some(&(sent, sent_at)) = self.sent.front()
            && sent <= sequence
        {
            self.heard_sent_at = self.heard_sent_at.max(Some(sent_at));
            self.sent.pop_front();
        }
    }
}
