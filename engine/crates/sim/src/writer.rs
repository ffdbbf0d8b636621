//! A writer: the compute agent's proposer, and a PostgreSQL that writes WAL for its clients.

use std::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use consensus::{
    Configuration, Grant, Proposer, ProposerCommand, TermHistory,
    message::{Append, TimelineEntry},
};
use pgtypes::{Ballot, FrameSummary, Incarnation, Instant, Lsn, MemberId, PgTimeline};
use wal::{RecordSpec, WalWriter, main_data, rmgr};

use crate::{
    checker::{Broken, Proposal},
    event::{Event, MICROSECOND, MILLISECOND, Node, Time},
    network::{Connection, Message, Pipe},
    world::{PG_SEGMENT_BYTES, Phase, SYSTEM, World},
};

/// WAL that a run may write in all; bounds the time of a seed.
const WAL_BYTES_MAX: u64 = 300 << 10;

/// What an elected writer has.
struct Reign {
    ballot: Ballot,
    start: FrameSummary,
    history: TermHistory,
    wal: WalWriter,
    /// PostgreSQL is up: the base backup was replayed to the end of the log.
    up_at: Time,
    /// First byte that the machine still has.
    available_from: Lsn,
    /// Offered to the proposer so far.
    offered: Lsn,
    /// Commits that clients wait for.
    waiting: VecDeque<Lsn>,
    xid: u32,
}

/// A process of a writer. It stays in the list when it has ended.
pub struct Writer {
    /// Its machine.
    pub host: Node,
    /// Its grant.
    pub grant: Grant,
    proposer: Option<Proposer>,
    connections: BTreeMap<MemberId, usize>,
    timer_at: Option<Time>,
    reign: Option<Reign>,
    lease_until: Instant,
    /// It was told that its term is over.
    pub fenced: bool,
}

impl Writer {
    /// Whether the process runs.
    pub fn is_running(&self) -> bool {
        self.proposer.is_some()
    }

    /// The ballot that it was elected in.
    pub fn ballot(&self) -> Option<Ballot> {
        self.reign.as_ref().map(|reign| reign.ballot)
    }

    /// For a report; nothing for those that have ended.
    pub fn describe(&self) -> Option<String> {
        let proposer = self.proposer.as_ref()?;
        let members: Vec<_> = proposer.members().map(|(m, follows, flush)| (m.0, follows, flush)).collect();
        Some(format!(
            "term {} ballot {:?} start {:?} commit {} generation {} members {members:?}",
            self.grant.term.0,
            proposer.ballot(),
            proposer.start().map(|start| start.record_end),
            proposer.commit_lsn(),
            proposer.configuration().generation.0,
        ))
    }
}

impl World {
    /// A process of the writer that holds `grant` starts on `host`.
    pub(crate) fn start_writer(&mut self, host: Node, grant: Grant, configuration: Configuration) -> Broken {
        let incarnation = Incarnation(self.random.id());
        self.trace.note("writer starts", (self.writers.len(), grant.term.0));
        self.writers.push(Writer {
            host,
            grant,
            proposer: Some(Proposer::new(grant, incarnation, configuration)),
            connections: BTreeMap::new(),
            timer_at: None,
            reign: None,
            lease_until: Instant::default(),
            fenced: false,
        });
        self.pump_writer(self.writers.len() - 1)
    }

    /// The process ends, PostgreSQL with it.
    pub(crate) fn kill_writer(&mut self, index: usize) {
        let writer = &mut self.writers[index];
        if writer.proposer.take().is_none() {
            return;
        }
        writer.reign = None;
        for connection in std::mem::take(&mut writer.connections).into_values() {
            self.close_client(connection);
        }
    }

    /// Carries out what the proposer wants.
    fn pump_writer(&mut self, index: usize) -> Broken {
        loop {
            let Some(proposer) = self.writers[index].proposer.as_mut() else { return Ok(()) };
            let Some(command) = proposer.poll_command() else { break };
            match command {
                ProposerCommand::Connect { member, address } => self.connect(index, member, &address),
                ProposerCommand::Disconnect { member } => {
                    if let Some(connection) = self.writers[index].connections.remove(&member) {
                        self.close_client(connection);
                    }
                }
                ProposerCommand::Send { member, message } => {
                    if let Some(&connection) = self.writers[index].connections.get(&member) {
                        let message = match message {
                            consensus::message::ProposerMessage::Append(append) => {
                                Message::Append(append, Rc::from([]))
                            }
                            other => {
                                if self.trace.prints() {
                                    println!("{:>16} writer {index} -> {} {other:?}", "", member.0);
                                }
                                Message::Request(other)
                            }
                        };
                        self.send(connection, true, message);
                    }
                }
                ProposerCommand::SendWal { member, append } => self.send_wal(index, member, append),
                ProposerCommand::Elected { ballot, start, history, timelines } => {
                    self.reign_begins(index, ballot, start, history, timelines.0.last().map(|last| last.timeline))?;
                }
                ProposerCommand::Committed { commit_lsn } => self.commit(index, commit_lsn)?,
                ProposerCommand::Lease { until } => self.writers[index].lease_until = until,
                ProposerCommand::Quorum { .. } => {}
                ProposerCommand::Trouble { member, trouble } => {
                    if self.trace.prints() {
                        println!("{:>16} writer {index} trouble with {}: {trouble:?}", "", member.0);
                    }
                }
                ProposerCommand::Fenced { .. } => {
                    self.trace.note("fenced: writer", index);
                    self.writers[index].fenced = true;
                    self.counts.fenced += 1;
                    self.kill_writer(index);
                    return Ok(());
                }
            }
        }
        let host = self.writers[index].host;
        let Some(instant) = self.writers[index].proposer.as_ref().and_then(Proposer::poll_timeout) else {
            return Ok(());
        };
        let at = self.time_of(host, instant).max(self.now);
        let writer = &mut self.writers[index];
        if writer.timer_at.is_none_or(|earlier| at < earlier) {
            writer.timer_at = Some(at);
            self.schedule.at(at, Event::ProposerTimer { writer: index });
        }
        Ok(())
    }

    pub(crate) fn proposer_timer(&mut self, index: usize) -> Broken {
        let now = self.clock(self.writers[index].host);
        let writer = &mut self.writers[index];
        // A later event was scheduled for an earlier moment.
        if writer.timer_at.is_none_or(|at| at > self.now) {
            return Ok(());
        }
        writer.timer_at = None;
        let Some(proposer) = &mut writer.proposer else { return Ok(()) };
        proposer.handle_timeout(now);
        self.pump_writer(index)
    }

    // ---- PostgreSQL ----

    fn reign_begins(
        &mut self,
        index: usize,
        ballot: Ballot,
        start: FrameSummary,
        history: TermHistory,
        timeline: Option<PgTimeline>,
    ) -> Broken {
        self.trace.note("elected: writer, start", (index, start.record_end.0));
        // An honest proposer has not written before it was elected; the checker must know the ballot's first byte.
        let proposals = &mut self.checker.proposals;
        proposals.entry(ballot).or_insert_with(|| Proposal { start, ..Proposal::default() });
        self.checker.elected(index, ballot, start, &history)?;
        let last = timeline.unwrap_or(start.timeline);
        // A promoted server begins a timeline; one that was stopped cleanly goes on with its own.
        let promoted = start.record_start.is_valid() && self.random.chance(80);
        let timeline = if promoted { PgTimeline(last.0 + 1) } else { last };
        if promoted && let Some(proposer) = &mut self.writers[index].proposer {
            let text = format!("{}\t{}\tpromoted\n", last.0, start.record_end);
            let history_file = text.into_bytes();
            proposer.handle_timeline(TimelineEntry { timeline, start_lsn: start.record_end, history_file });
        }
        let wal = WalWriter::new(start.record_end, start.record_start, PG_SEGMENT_BYTES, SYSTEM, timeline);
        let replay = self.random.range(MILLISECOND, 60 * MILLISECOND);
        self.writers[index].reign = Some(Reign {
            ballot,
            start,
            history,
            wal,
            up_at: self.now + replay,
            available_from: start.record_end,
            offered: start.record_end,
            waiting: VecDeque::new(),
            xid: start.max_full_xid as u32,
        });
        self.schedule.at(self.now + replay, Event::Work { writer: index });
        Ok(())
    }

    /// PostgreSQL writes a few records, flushes, answers reads, recycles a segment.
    pub(crate) fn work(&mut self, index: usize) -> Broken {
        let now = self.clock(self.writers[index].host);
        let busy = self.plan.busy;
        let healing = matches!(self.phase, Phase::Healing { .. });
        let World { writers, random, checker, .. } = self;
        let Writer { proposer: Some(proposer), reign: Some(reign), lease_until, .. } = &mut writers[index] else {
            return Ok(());
        };
        debug_assert!(self.now >= reign.up_at);
        let Some(proposal) = checker.proposals.get_mut(&reign.ballot) else { return Ok(()) };
        let room = WAL_BYTES_MAX > reign.wal.position().bytes_since(reign.start.record_end);
        let backlog = reign.waiting.len() > 60;
        if (room && !backlog && random.chance(70)) || (healing && !backlog) {
            for _ in 0..=random.below(3) {
                let length = match random.below(24) {
                    0 => random.range(1_000, 12_000),
                    1 | 2 => {
                        // Up to the end of a block: where old and new bytes could be mistaken for each other.
                        let position = reign.wal.position();
                        let header = if position.offset_in(8192) == 0 { 24 } else { 0 };
                        (4096 - position.offset_in(4096)).saturating_sub(header + 24 + 5).max(8)
                    }
                    _ => random.range(8, 200),
                };
                reign.xid += 1;
                let payload = main_data(&vec![reign.xid as u8; length as usize]);
                let record = RecordSpec { rmgr: rmgr::XLOG, info: 0x20, xid: reign.xid, payload: &payload };
                let (_, end) = reign.wal.append(record);
                proposal.bytes.extend_from_slice(&reign.wal.take_bytes());
                proposal.ends.push(end);
                reign.waiting.push_back(end);
            }
        }
        let written = reign.wal.position();
        if written > reign.offered {
            // What a `pwrite` brings may end inside a record.
            let whole = healing || random.chance(70);
            reign.offered = match whole {
                true => written,
                false => Lsn(random.range(reign.offered.0 + 1, written.0 + 1)),
            };
            proposer.handle_wal(reign.available_from, reign.offered, now);
        }
        if random.chance(3) {
            // PostgreSQL recycles a segment behind a checkpoint, which is committed; not everyone may have got it.
            let limit = proposer.commit_lsn().max(reign.available_from).min(reign.offered);
            reign.available_from = Lsn(random.range(reign.available_from.0, limit.0 + 1));
            proposer.handle_wal(reign.available_from, reign.offered, now);
        }
        if now < *lease_until {
            checker.read(reign.ballot)?;
        }
        let wait = if busy { random.range(300, 6_000) } else { random.range(2_000, 60_000) } * MICROSECOND;
        self.schedule.at(self.now + wait, Event::Work { writer: index });
        self.pump_writer(index)
    }

    fn commit(&mut self, index: usize, commit_lsn: Lsn) -> Broken {
        self.trace.note("committed: writer, position", (index, commit_lsn.0));
        let World { writers, checker, .. } = self;
        let writer = &mut writers[index];
        let Some(reign) = &mut writer.reign else { return Ok(()) };
        checker.committed_by(reign.ballot, writer.grant.writer, &reign.history, commit_lsn)?;
        while reign.waiting.front().is_some_and(|end| *end <= commit_lsn) {
            reign.waiting.pop_front();
            checker.acknowledge(reign.ballot);
        }
        self.check_progress();
        Ok(())
    }

    fn send_wal(&mut self, index: usize, member: MemberId, append: Append) {
        let now = self.clock(self.writers[index].host);
        let World { writers, checker, .. } = self;
        let Writer { proposer: Some(proposer), reign: Some(reign), connections, .. } = &mut writers[index] else {
            return;
        };
        if append.begin_lsn < reign.available_from {
            return proposer.handle_unavailable(member, append.begin_lsn, reign.available_from, now);
        }
        let Some(proposal) = checker.proposals.get(&reign.ballot) else { return };
        let at = |lsn: Lsn| lsn.bytes_since(proposal.start.record_end) as usize;
        let bytes: Rc<[u8]> = Rc::from(&proposal.bytes[at(append.begin_lsn)..at(append.end_lsn)]);
        if let Some(&connection) = connections.get(&member) {
            self.send(connection, true, Message::Append(append, bytes));
        }
    }

    // ---- connections ----

    fn connect(&mut self, index: usize, member: MemberId, address: &str) {
        let host = self.writers[index].host;
        let Some(safekeeper) = self.at_address(address) else { return };
        let connection = self.connections.len();
        self.connections.push(Connection {
            writer: index,
            host,
            safekeeper,
            member,
            epoch: None,
            client_open: true,
            server_open: false,
            greeted: false,
            requests: Pipe::default(),
            answers: Pipe::default(),
        });
        if let Some(earlier) = self.writers[index].connections.insert(member, connection) {
            self.close_client(earlier);
        }
        let node = safekeeper as Node;
        if self.is_cut(host, node) || self.is_cut(node, host) {
            // Nobody answers: the attempt times out.
            let wait = self.random.range(200 * MILLISECOND, 1000 * MILLISECOND);
            self.schedule.at(self.now + wait, Event::Closed { connection, at_server: false });
        } else {
            let wait = self.latency(host, node);
            self.schedule.at(self.now + wait, Event::ConnectArrives { connection });
        }
    }

    pub(crate) fn connect_arrives(&mut self, connection: usize) -> Broken {
        let index = self.connections[connection].safekeeper;
        let Some(process) = &self.safekeepers[index].process else {
            let wait = self.latency(index as Node, self.connections[connection].host);
            self.schedule.at(self.now + wait, Event::Closed { connection, at_server: false });
            return Ok(());
        };
        let status = process.log.acceptor().status();
        let of = &mut self.connections[connection];
        of.epoch = Some(self.safekeepers[index].epoch);
        of.server_open = true;
        self.answer(connection, consensus::message::AcceptorMessage::Status(status));
        Ok(())
    }

    pub(crate) fn answer(&mut self, connection: usize, message: consensus::message::AcceptorMessage) {
        if self.connections[connection].server_open {
            self.send(connection, false, Message::Answer(message));
        }
    }

    pub(crate) fn send(&mut self, connection: usize, to_server: bool, message: Message) {
        let of = &self.connections[connection];
        let (host, node) = (of.host, of.safekeeper as Node);
        let (from, to) = if to_server { (host, node) } else { (node, host) };
        let latency = self.latency(from, to);
        let of = &mut self.connections[connection];
        let pipe = if to_server { &mut of.requests } else { &mut of.answers };
        let at = (self.now + latency).max(pipe.last_at);
        pipe.last_at = at;
        pipe.queue.push_back((at, message));
        if !pipe.scheduled {
            pipe.scheduled = true;
            self.schedule.at(at, Event::Deliver { connection, to_server });
        }
    }

    /// The writer gives its end up. What it has sent may still arrive.
    pub(crate) fn close_client(&mut self, connection: usize) {
        let of = &mut self.connections[connection];
        if !of.client_open {
            return;
        }
        of.client_open = false;
        if of.server_open {
            // The safekeeper learns of it at once, late, or when it next sends.
            let wait = match self.random.below(3) {
                0 => self.random.range(100 * MICROSECOND, MILLISECOND),
                1 => self.random.range(MILLISECOND, 50 * MILLISECOND),
                _ => self.random.range(50 * MILLISECOND, 2000 * MILLISECOND),
            };
            self.schedule.at(self.now + wait, Event::Closed { connection, at_server: true });
        }
    }

    pub(crate) fn closed(&mut self, connection: usize, at_server: bool) -> Broken {
        let of = &mut self.connections[connection];
        if at_server {
            if std::mem::replace(&mut of.server_open, false)
                && let (Some(epoch), index) = (of.epoch, of.safekeeper)
                && let Some(process) = self.process_of(index, epoch)
            {
                process.log.handle_disconnected(connection as u64);
                return self.drive(index);
            }
            return Ok(());
        }
        if !std::mem::replace(&mut of.client_open, false) {
            return Ok(());
        }
        let (writer, member, host) = (of.writer, of.member, of.host);
        let now = self.clock(host);
        let writer_of = &mut self.writers[writer];
        if writer_of.connections.get(&member) == Some(&connection) {
            writer_of.connections.remove(&member);
            if let Some(proposer) = &mut writer_of.proposer {
                proposer.handle_disconnected(member, now);
            }
            return self.pump_writer(writer);
        }
        Ok(())
    }

    pub(crate) fn deliver(&mut self, connection: usize, to_server: bool) -> Broken {
        let of = &self.connections[connection];
        let (host, node) = (of.host, of.safekeeper as Node);
        let (from, to) = if to_server { (host, node) } else { (node, host) };
        if self.is_cut(from, to) {
            // TCP sends it again and again.
            let wait = self.random.range(10 * MILLISECOND, 60 * MILLISECOND);
            self.schedule.at(self.now + wait, Event::Deliver { connection, to_server });
            return Ok(());
        }
        let now = self.now;
        let of = &mut self.connections[connection];
        let open = if to_server { of.server_open } else { of.client_open };
        let pipe = if to_server { &mut of.requests } else { &mut of.answers };
        if !open {
            pipe.queue.clear();
            pipe.scheduled = false;
            return Ok(());
        }
        let Some((_, message)) = pipe.queue.pop_front() else { return Ok(()) };
        let back = match message {
            Message::Answer(message) => {
                self.answered(connection, message)?;
                None
            }
            request => self.request(connection, request)?,
        };
        let of = &mut self.connections[connection];
        let pipe = if to_server { &mut of.requests } else { &mut of.answers };
        if let Some(message) = back {
            pipe.queue.push_front((now + MILLISECOND, message));
        }
        match pipe.queue.front() {
            Some((at, _)) => {
                let at = (*at).max(now);
                self.schedule.at(at, Event::Deliver { connection, to_server });
            }
            None => pipe.scheduled = false,
        }
        Ok(())
    }

    fn answered(&mut self, connection: usize, message: consensus::message::AcceptorMessage) -> Broken {
        let of = &mut self.connections[connection];
        let (index, member, host) = (of.writer, of.member, of.host);
        let first = !std::mem::replace(&mut of.greeted, true);
        let now = self.clock(host);
        let writer = &mut self.writers[index];
        if writer.connections.get(&member) != Some(&connection) {
            return Ok(());
        }
        let Some(proposer) = &mut writer.proposer else { return Ok(()) };
        match message {
            consensus::message::AcceptorMessage::Status(status) if first => {
                proposer.handle_connected(member, &status, now);
            }
            other => proposer.handle_message(member, other, now),
        }
        self.pump_writer(index)
    }
}
