//! A disk in memory that loses what was not synced, and a log on it whose operations end in any order.

use std::collections::BTreeMap;

use consensus::{
    AcceptorIdentity, Configuration, Member, TermEntry, TermHistory,
    message::{AcceptorMessage, Append, Elected, ProposerMessage, Vote},
};
use logstore::{Geometry, Log, LogCommand, OpId, OpResult, ReadFailed, Recovered, SegmentReader};
use pgtypes::{
    Attempt, Ballot, BranchId, ClusterId, DiskId, FrameSummary, Generation, Incarnation, Instant, LogId, Lsn, MemberId,
    PgTimeline, SystemId, Term, WriterId,
};
use wal::{RecordSpec, WalWriter, main_data, rmgr};

/// So small that a test meets the ends of segments and writes all the time.
pub const SMALL: Geometry = Geometry {
    segment_bytes: 32 << 10,
    write_bytes_max: 16 << 10,
    take_ahead_bytes: 8 << 10,
    scan_step_bytes: 1 << 10,
};

pub const START: Lsn = Lsn(0x300_0000);
pub const WRITER: WriterId = WriterId([7; 16]);
pub const RUN: Incarnation = Incarnation([8; 16]);
const PG_SEGMENT_BYTES: u64 = 1 << 20;

/// Deterministic numbers (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

type Block = [u8; 4096];

#[derive(Clone, Default)]
pub struct Disk {
    pub segments: BTreeMap<Lsn, BTreeMap<u64, Block>>,
    /// Written and not synced, in order.
    pending: Vec<(Lsn, u64, Block)>,
    pub controls: [Option<Vec<u8>>; 2],
}

impl Disk {
    fn write(&mut self, segment: Lsn, offset: u64, bytes: &[u8]) {
        assert!(self.segments.contains_key(&segment), "write to a segment that does not exist: {segment}");
        for (i, block) in bytes.chunks_exact(4096).enumerate() {
            self.pending.push((segment, offset / 4096 + i as u64, block.try_into().unwrap()));
        }
    }

    /// This write alone, which replaces what was written to its blocks before.
    fn write_durably(&mut self, segment: Lsn, offset: u64, bytes: &[u8]) {
        let blocks = self.segments.get_mut(&segment).expect("a durable write to a segment that does not exist");
        for (i, block) in bytes.chunks_exact(4096).enumerate() {
            let index = offset / 4096 + i as u64;
            self.pending.retain(|(s, b, _)| (*s, *b) != (segment, index));
            blocks.insert(index, block.try_into().unwrap());
        }
    }

    pub fn read_at(&self, segment: Lsn, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailed> {
        let blocks = self.segments.get(&segment).ok_or(ReadFailed)?;
        for (i, target) in buffer.chunks_exact_mut(4096).enumerate() {
            let index = offset / 4096 + i as u64;
            let written = self.pending.iter().rev().find(|(s, b, _)| (*s, *b) == (segment, index)).map(|(_, _, b)| b);
            target.copy_from_slice(written.or(blocks.get(&index)).unwrap_or(&[0; 4096]));
        }
        Ok(())
    }

    fn sync(&mut self, first: Lsn, last: Lsn) {
        for (segment, index, block) in std::mem::take(&mut self.pending) {
            if segment < first || segment > last {
                self.pending.push((segment, index, block));
            } else if let Some(blocks) = self.segments.get_mut(&segment) {
                blocks.insert(index, block);
            }
        }
    }

    /// Power is lost: each sector (512 or 4096 bytes) of what was not synced is there or not.
    pub fn crash(&mut self, random: &mut Random) {
        let sector = if random.one_in(2) { 512 } else { 4096 };
        for (segment, index, block) in std::mem::take(&mut self.pending) {
            let Some(blocks) = self.segments.get_mut(&segment) else { continue };
            let target = blocks.entry(index).or_insert([0; 4096]);
            for (old, new) in target.chunks_exact_mut(sector).zip(block.chunks_exact(sector)) {
                if random.one_in(2) {
                    old.copy_from_slice(new);
                }
            }
        }
    }

    /// The log's bytes `[begin, end)` as they are on the disk.
    pub fn wal(&self, geometry: Geometry, begin: Lsn, end: Lsn) -> Vec<u8> {
        let mut bytes = Vec::new();
        let first = begin.floor(4096);
        let mut at = first;
        while at < end {
            let mut block = [0; 4096];
            self.read_at(at.floor(geometry.segment_bytes), at.offset_in(geometry.segment_bytes), &mut block).unwrap();
            bytes.extend_from_slice(&block);
            at = at.advance(4096);
        }
        bytes[begin.bytes_since(first) as usize..][..end.bytes_since(begin) as usize].to_vec()
    }
}

impl SegmentReader for Disk {
    fn starts(&mut self) -> Result<Vec<Lsn>, ReadFailed> {
        Ok(self.segments.keys().copied().rev().collect())
    }

    fn read(&mut self, start: Lsn, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailed> {
        self.read_at(start, offset, buffer)
    }
}

/// What the disk does to operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// No segment can be taken.
    pub full: bool,
    /// Writes and syncs fail.
    pub failing: bool,
}

pub struct Node {
    pub log: Log,
    pub disk: Disk,
    pub now: Instant,
    pub faults: Faults,
    pub geometry: Geometry,
    /// Operations under way, carried out when they end.
    running: Vec<LogCommand>,
    /// What left the log.
    pub replies: Vec<AcceptorMessage>,
    /// One line for each command, to be compared.
    pub trace: Vec<String>,
    /// Former spares: what a taken segment may hold.
    spares: Vec<(Lsn, BTreeMap<u64, Block>)>,
}

pub fn identity() -> AcceptorIdentity {
    AcceptorIdentity {
        log: LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) },
        system: SystemId(42),
        member: MemberId(1),
        disk: DiskId([1; 16]),
        segment_bytes: PG_SEGMENT_BYTES,
        start: FrameSummary { record_end: START, timeline: PgTimeline(1), max_full_xid: 10, ..FrameSummary::default() },
    }
}

pub fn configuration() -> Configuration {
    let member = |n: u32| Member { member: MemberId(n), disk: DiskId([n as u8; 16]), address: format!("sk-{n}:1") };
    Configuration { generation: Generation(1), members: (1..=3).map(member).collect(), new_members: None }
}

pub fn ballot(term: u64, attempt: u32) -> Ballot {
    Ballot { term: Term(term), attempt: Attempt(attempt) }
}

impl Node {
    pub fn create(geometry: Geometry) -> Node {
        let log = Log::create_with(geometry, identity(), configuration(), Instant(0)).unwrap();
        Node {
            log,
            disk: Disk::default(),
            now: Instant(0),
            faults: Faults::default(),
            geometry,
            running: Vec::new(),
            replies: Vec::new(),
            trace: Vec::new(),
            spares: Vec::new(),
        }
    }

    /// Created, and with its control file on the disk.
    pub fn ready(geometry: Geometry) -> Node {
        let mut node = Node::create(geometry);
        node.settle();
        assert!(node.log.is_ready());
        node.trace.clear();
        node
    }

    /// Takes the commands without ending any operation.
    pub fn poll(&mut self) {
        while let Some(command) = self.log.poll_command() {
            match command {
                LogCommand::Reply { message, .. } => {
                    self.trace.push(format!("reply {}", short(&message)));
                    self.replies.push(message);
                }
                LogCommand::ReplyFence { result, .. } => {
                    self.trace.push(format!("fenced {:?}", result.map(|fence| fence.flush_lsn)));
                }
                LogCommand::ReplyConfiguration { result, .. } => self.trace.push(format!("configured {result:?}")),
                LogCommand::AskPeers => self.trace.push("ask peers".into()),
                LogCommand::CatchUp(task) => self.trace.push(format!("catch up {}..{}", task.from, task.until)),
                operation => {
                    self.trace.push(match &operation {
                        LogCommand::TakeSegment { start, .. } => format!("take {start}"),
                        LogCommand::Write { segment, offset, buffer, durable, .. } => {
                            self.check_overlap(*segment, *offset, buffer.len());
                            let how = if *durable { " durably" } else { "" };
                            format!("write {segment}+{offset} {}{how}", buffer.len())
                        }
                        LogCommand::Read { segment, offset, buffer, .. } => {
                            format!("read {segment}+{offset} {}", buffer.len())
                        }
                        LogCommand::Sync { first, last, .. } => format!("sync {first}..={last}"),
                        LogCommand::RemoveSegment { start, complete, .. } => format!("remove {start} {complete}"),
                        LogCommand::WriteControl { copy, .. } => format!("control {copy}"),
                        other => panic!("{other:?}"),
                    });
                    self.running.push(operation);
                }
            }
        }
    }

    /// A disk may carry operations out in any order, so two writes in flight must not meet.
    fn check_overlap(&self, segment: Lsn, offset: u64, length: usize) {
        for command in &self.running {
            if let LogCommand::Write { segment: s, offset: o, buffer, .. } = command {
                let apart = *s != segment || o + buffer.len() as u64 <= offset || offset + length as u64 <= *o;
                assert!(apart, "two writes in flight touch {segment}+{offset}");
            }
        }
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Ends the operation at `index` of those under way.
    pub fn end(&mut self, index: usize) {
        let command = self.running.remove(index);
        let (op, result) = self.perform(command);
        self.log.handle_done(op, result, self.now);
        self.poll();
    }

    fn perform(&mut self, command: LogCommand) -> (OpId, OpResult) {
        let failing = self.faults.failing;
        match command {
            LogCommand::Write { op, .. }
            | LogCommand::Sync { op, .. }
            | LogCommand::WriteControl { op, .. }
            | LogCommand::TakeSegment { op, .. }
                if failing =>
            {
                (op, OpResult::Failed)
            }
            LogCommand::TakeSegment { op, .. } if self.faults.full => (op, OpResult::NoSpace(None)),
            LogCommand::TakeSegment { op, start } => {
                // The rule of the command: zeros, or a complete segment of another start.
                let spare = self.spares.iter().position(|(former, _)| *former != start);
                let contents = spare.map(|at| self.spares.swap_remove(at).1).unwrap_or_default();
                assert!(self.disk.segments.insert(start, contents).is_none(), "{start} was there already");
                (op, OpResult::Done)
            }
            LogCommand::Write { op, segment, offset, buffer, durable } => {
                match durable {
                    true => self.disk.write_durably(segment, offset, buffer.as_bytes()),
                    false => self.disk.write(segment, offset, buffer.as_bytes()),
                }
                (op, OpResult::Written(buffer))
            }
            LogCommand::Read { op, segment, offset, mut buffer } => {
                match self.disk.read_at(segment, offset, buffer.as_bytes_mut()) {
                    Ok(()) => (op, OpResult::Read(buffer)),
                    Err(ReadFailed) => (op, OpResult::Failed),
                }
            }
            LogCommand::Sync { op, first, last } => {
                self.disk.sync(first, last);
                (op, OpResult::Done)
            }
            LogCommand::RemoveSegment { op, start, complete } => {
                self.disk.sync(start, start);
                let contents = self.disk.segments.remove(&start).expect("removed twice");
                if complete {
                    self.spares.push((start, contents));
                }
                (op, OpResult::Done)
            }
            LogCommand::WriteControl { op, copy, buffer } => {
                self.disk.controls[usize::from(copy)] = Some(buffer.as_bytes().to_vec());
                (op, OpResult::Written(buffer))
            }
            other => panic!("{other:?}"),
        }
    }

    /// Ends everything that is under way and what follows from it, oldest first.
    pub fn settle(&mut self) {
        self.poll();
        while !self.running.is_empty() {
            self.end(0);
        }
    }

    /// Ends up to `count` operations in random order.
    pub fn shuffle(&mut self, random: &mut Random, count: u64) {
        self.poll();
        for _ in 0..count {
            if self.running.is_empty() {
                return;
            }
            self.end(random.below(self.running.len() as u64) as usize);
        }
    }

    /// The machine loses power and starts again. A control copy under way may be torn.
    pub fn crash(&mut self, random: &mut Random) {
        for command in std::mem::take(&mut self.running) {
            match command {
                LogCommand::Write { segment, offset, buffer, .. } if self.disk.segments.contains_key(&segment) => {
                    self.disk.write(segment, offset, buffer.as_bytes());
                }
                LogCommand::WriteControl { copy, buffer, .. } => {
                    let mut bytes = buffer.as_bytes().to_vec();
                    match random.below(3) {
                        0 => continue,
                        1 => {}
                        _ => bytes[16..].fill(0),
                    }
                    self.disk.controls[usize::from(copy)] = Some(bytes);
                }
                _ => {}
            }
        }
        self.disk.crash(random);
        self.restart();
    }

    pub fn restart(&mut self) {
        self.running.clear();
        self.replies.clear();
        self.trace.clear();
        let recovered = self.recover().unwrap();
        self.log = recovered.log;
        // A file that was never complete is not used again.
        self.poll();
    }

    pub fn recover(&mut self) -> Result<Recovered, logstore::RecoverError> {
        let controls = self.disk.controls.clone();
        let id = identity();
        let [first, second] = [0, 1].map(|copy: usize| controls[copy].as_deref());
        Log::recover_with(self.geometry, id.log, id.disk, [first, second], &mut self.disk, self.now)
    }

    pub fn fence(&mut self, term: u64) {
        self.log.handle_fence(1, Term(term), WRITER, self.now);
    }

    pub fn vote(&mut self, ballot: Ballot) {
        let vote = Vote { ballot, writer: WRITER, incarnation: RUN, configuration: configuration() };
        self.log.handle_message(1, ProposerMessage::Vote(vote), self.now);
    }

    pub fn elected(&mut self, ballot: Ballot, start: FrameSummary, history: &TermHistory) {
        let elected = Elected {
            ballot,
            incarnation: RUN,
            generation: Generation(1),
            start,
            history: history.clone(),
            timelines: self.log.acceptor().state().timelines.clone(),
            commit_lsn: START,
        };
        self.log.handle_message(1, ProposerMessage::Elected(elected), self.now);
    }

    /// Elected in `ballot` at its own end; everything settled.
    pub fn elect(&mut self, ballot: Ballot) {
        self.settle();
        let start = self.log.acceptor().flush();
        let history = self.log.acceptor().state().history.continued(ballot, start.record_end);
        self.elect_at(ballot, start, &history);
    }

    pub fn elect_at(&mut self, ballot: Ballot, start: FrameSummary, history: &TermHistory) {
        self.fence(ballot.term.0);
        self.settle();
        self.vote(ballot);
        self.settle();
        self.elected(ballot, start, history);
        self.settle();
        assert!(
            self.replies.iter().any(|r| matches!(r, AcceptorMessage::ElectedAccepted(e) if e.ballot == ballot)),
            "{:?}",
            self.replies
        );
        self.trace.clear();
        self.replies.clear();
    }

    pub fn append(&mut self, ballot: Ballot, begin: Lsn, bytes: &[u8], commit_lsn: Lsn) {
        let append = Append {
            ballot,
            generation: Generation(1),
            sequence: begin.0,
            begin_lsn: begin,
            end_lsn: begin.advance(bytes.len() as u64),
            commit_lsn,
            timeline: None,
        };
        self.log.handle_append(1, &append, bytes, self.now);
    }

    /// The highest end of the log that was acknowledged.
    pub fn acknowledged(&self) -> Lsn {
        let flush = |message: &AcceptorMessage| match message {
            AcceptorMessage::Appended(appended) => appended.flush_lsn,
            AcceptorMessage::ElectedAccepted(accepted) => accepted.flush_lsn,
            AcceptorMessage::Voted(voted) => voted.flush.record_end,
            _ => Lsn::INVALID,
        };
        self.replies.iter().map(flush).max().unwrap_or_default()
    }
}

fn short(message: &AcceptorMessage) -> String {
    match message {
        AcceptorMessage::Voted(voted) => format!("voted {} at {}", voted.ballot, voted.flush.record_end),
        AcceptorMessage::ElectedAccepted(accepted) => format!("elected {} at {}", accepted.ballot, accepted.flush_lsn),
        AcceptorMessage::Appended(appended) => {
            let full = if appended.disk_full { " full" } else { "" };
            format!("appended {} of {}{full}", appended.flush_lsn, appended.durable_lsn)
        }
        AcceptorMessage::Refused(refused) => format!("refused {:?}", refused.reason),
        AcceptorMessage::Status(_) => "status".into(),
    }
}

/// WAL of records whose contents begin with `mark`, from `start` on.
pub struct Writer {
    wal: WalWriter,
    /// Every byte since `start`.
    pub bytes: Vec<u8>,
    pub start: Lsn,
    /// End of each record.
    pub ends: Vec<FrameSummary>,
    xid: u32,
}

impl Writer {
    pub fn new(start: FrameSummary) -> Writer {
        let (lsn, last) = (start.record_end, start.record_start);
        let wal = WalWriter::new(lsn, last, PG_SEGMENT_BYTES, SystemId(42), PgTimeline(1));
        Writer { wal, bytes: Vec::new(), start: lsn, ends: vec![start], xid: 11 }
    }

    pub fn record(&mut self, mark: u8, length: usize) -> FrameSummary {
        self.xid += 1;
        let payload = main_data(&vec![mark; length]);
        let (start, end) =
            self.wal.append(RecordSpec { rmgr: rmgr::XLOG, info: 0x20, xid: self.xid, payload: &payload });
        self.bytes.extend_from_slice(&self.wal.take_bytes());
        let last = *self.ends.last().unwrap();
        let summary = FrameSummary {
            record_end: end,
            record_start: start,
            max_full_xid: last.max_full_xid.max(u64::from(self.xid)),
            ..last
        };
        self.ends.push(summary);
        summary
    }

    pub fn end(&self) -> Lsn {
        self.start.advance(self.bytes.len() as u64)
    }

    pub fn slice(&self, begin: Lsn, end: Lsn) -> &[u8] {
        &self.bytes[begin.bytes_since(self.start) as usize..end.bytes_since(self.start) as usize]
    }
}

pub fn history(entries: &[(Ballot, Lsn)]) -> TermHistory {
    TermHistory(entries.iter().map(|&(ballot, start_lsn)| TermEntry { ballot, start_lsn }).collect())
}
