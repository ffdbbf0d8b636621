//! A safekeeper: a machine with a disk, and on it, mostly, a process that drives one log as the shell does.

use std::collections::BTreeMap;

use consensus::{
    AcceptorIdentity, CatchUpTask, Configuration,
    message::{AcceptorMessage, Refusal},
};
use logstore::{Log, LogCommand, OpId, OpResult, Reader, RecoverError};
use pgtypes::{Ballot, DiskId, Lsn, MemberId, Term, WriterId};

use crate::{
    checker::Broken,
    disk::Disk,
    event::{Event, MICROSECOND, MILLISECOND, Node, Time},
    network::Message,
    world::{GEOMETRY, PG_SEGMENT_BYTES, Phase, SYSTEM, World, log_id, log_start},
};

/// Most bytes that a donor gives at once.
const FETCH_BYTES: u64 = 20 << 10;

/// A disk operation under way.
struct Operation {
    command: LogCommand,
    /// What a sync covers.
    up_to: u64,
}

/// A catch-up under way.
struct CatchUp {
    number: u64,
    task: CatchUpTask,
    position: Lsn,
    donor: usize,
    donor_index: Option<usize>,
    answer: Option<Vec<u8>>,
    failures: u32,
}

/// A running process.
pub struct Process {
    /// What it is about.
    pub log: Log,
    running: BTreeMap<u64, Operation>,
    timer_at: Option<Time>,
    catch_up: Option<CatchUp>,
    tasks: u64,
    /// Segments that failed their verification.
    pub damaged: u64,
}

impl Process {
    /// The donor that is asked at present.
    pub fn donor_index(&self) -> Option<usize> {
        self.catch_up.as_ref()?.donor_index
    }
}

/// What is wrong with a disk.
#[derive(Default)]
struct DiskState {
    full_until: Time,
    slow_until: Time,
    /// The next write or sync fails.
    fails: bool,
}

/// See the module.
pub struct Safekeeper {
    /// Its number in the configuration.
    pub member: MemberId,
    /// Identity of its disk.
    pub disk_id: DiskId,
    /// Its files.
    pub disk: Disk,
    /// Runs, or not.
    pub process: Option<Process>,
    /// Counts processes.
    pub epoch: u32,
    state: DiskState,
    /// The configuration that the log is created with when the disk is empty.
    pub create_with: Option<Configuration>,
    /// Only a person can bring it back: its log refused to start.
    destroyed: bool,
}

impl Safekeeper {
    /// With an empty disk.
    pub fn new(member: MemberId, disk_id: DiskId) -> Safekeeper {
        Safekeeper {
            member,
            disk_id,
            disk: Disk::new(GEOMETRY),
            process: None,
            epoch: 0,
            state: DiskState::default(),
            create_with: None,
            destroyed: false,
        }
    }

    /// The disk works again.
    pub fn repair(&mut self) {
        self.state = DiskState::default();
    }

    /// No segment can be taken until `until`.
    pub fn fill(&mut self, until: Time) {
        self.state.full_until = until;
    }

    /// Operations take 30 times as long until `until`.
    pub fn slow_down(&mut self, until: Time) {
        self.state.slow_until = until;
    }

    /// The next write or sync fails.
    pub fn fail_next(&mut self) {
        self.state.fails = true;
    }

    /// Its log takes part in nothing until the process starts again.
    pub fn is_failed(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.log.is_failed())
    }

    /// Only a person can bring it back.
    pub fn is_destroyed(&self) -> bool {
        self.destroyed
    }

    /// Its disk is gone; another one is in its place, with nothing on it.
    pub fn replace_disk(&mut self, member: MemberId, disk_id: DiskId, configuration: Configuration) {
        self.disk = Disk::new(GEOMETRY);
        self.member = member;
        self.disk_id = disk_id;
        self.create_with = Some(configuration);
    }

    /// Whether it runs and holds everything up to `end`.
    pub fn has_committed(&self, end: Lsn) -> bool {
        let holds = |process: &Process| process.log.acceptor().commit_lsn() >= end && process.log.is_ready();
        self.process.as_ref().is_some_and(holds)
    }

    /// For a report.
    pub fn describe(&self) -> String {
        match &self.process {
            None => format!("member {} is down, destroyed: {}", self.member.0, self.destroyed),
            Some(process) => {
                let acceptor = process.log.acceptor();
                format!(
                    "member {} ballot {} elected {} flush {} receive {} commit {} ready {} failed {} full {} generation {} destroyed {}",
                    self.member.0,
                    acceptor.state().ballot,
                    acceptor.state().elected,
                    acceptor.flush().record_end,
                    acceptor.receive_lsn(),
                    acceptor.commit_lsn(),
                    process.log.is_ready(),
                    process.log.is_failed(),
                    process.log.status().disk_full,
                    acceptor.state().configuration.generation.0,
                    self.destroyed,
                )
            }
        }
    }
}

impl World {
    /// The process starts: creates its log or recovers it.
    pub(crate) fn start_safekeeper(&mut self, index: usize) -> Broken {
        let now = self.clock(index as Node);
        let operators = self.operator.configuration.clone();
        let safekeeper = &mut self.safekeepers[index];
        if safekeeper.process.is_some() || safekeeper.destroyed {
            return Ok(());
        }
        let empty = safekeeper.disk.controls.iter().all(Option::is_none);
        let log = if empty {
            let identity = AcceptorIdentity {
                log: log_id(),
                system: SYSTEM,
                member: safekeeper.member,
                disk: safekeeper.disk_id,
                segment_bytes: PG_SEGMENT_BYTES,
                start: log_start(),
            };
            let configuration = safekeeper.create_with.clone().unwrap_or(operators);
            Log::create_with(GEOMETRY, identity, configuration, now).map_err(|error| format!("create: {error}"))?
        } else {
            let controls = safekeeper.disk.controls.clone();
            let copies = [controls[0].as_deref(), controls[1].as_deref()];
            let recovered =
                Log::recover_with(GEOMETRY, log_id(), safekeeper.disk_id, copies, &mut safekeeper.disk, now);
            match recovered {
                Ok(recovered) => recovered.log,
                // The first write of the file was torn: the log was never created, nothing was promised.
                Err(RecoverError::Control(_)) if controls.iter().any(Option::is_none) => {
                    safekeeper.disk.controls = [None, None];
                    return self.start_safekeeper(index);
                }
                Err(RecoverError::DamagedSegment(_)) if self.plan.rotted => {
                    safekeeper.destroyed = true;
                    self.counts.damaged += 1;
                    self.trace.note("refused to start: damaged segment", index);
                    return Ok(());
                }
                Err(error) => return Err(format!("safekeeper {index} does not start: {error}")),
            }
        };
        self.trace.note("started, its log ends at", (index, log.acceptor().flush().record_end.0));
        safekeeper.epoch += 1;
        let (running, catch_up) = (BTreeMap::new(), None);
        safekeeper.process = Some(Process { log, running, timer_at: None, catch_up, tasks: 0, damaged: 0 });
        self.drive(index)
    }

    /// The process ends; what it wrote stays in the kernel.
    pub(crate) fn kill_safekeeper(&mut self, index: usize) {
        let safekeeper = &mut self.safekeepers[index];
        let Some(process) = safekeeper.process.take() else { return };
        for operation in process.running.into_values() {
            // Some of what was handed to the kernel is carried out nevertheless.
            if self.random.chance(50) {
                match operation.command {
                    LogCommand::Write { segment, offset, buffer, .. } => {
                        safekeeper.disk.write(segment, offset, buffer.as_bytes());
                    }
                    LogCommand::TakeSegment { start, .. } => safekeeper.disk.take_segment(start),
                    LogCommand::RemoveSegment { start, complete, .. } => {
                        safekeeper.disk.remove_segment(start, complete);
                    }
                    LogCommand::WriteControl { copy, buffer, .. } => {
                        safekeeper.disk.controls[usize::from(copy)] = Some(buffer.as_bytes().to_vec());
                    }
                    _ => {}
                }
            } else if let LogCommand::WriteControl { copy, buffer, .. } = operation.command
                && self.random.chance(50)
            {
                // Torn: the rest of the file is what was there before.
                let mut bytes = buffer.as_bytes().to_vec();
                let at = self.random.below(bytes.len() as u64) as usize / 512 * 512;
                let before = safekeeper.disk.controls[usize::from(copy)].take().unwrap_or_default();
                for (i, byte) in bytes.iter_mut().enumerate().skip(at) {
                    *byte = before.get(i).copied().unwrap_or(0);
                }
                safekeeper.disk.controls[usize::from(copy)] = Some(bytes);
            }
        }
        for connection in 0..self.connections.len() {
            let of = &mut self.connections[connection];
            if of.safekeeper == index && of.server_open {
                of.server_open = false;
                // A machine that lost its power does not say good-bye.
                if self.random.chance(70) {
                    let wait = self.random.range(100 * MICROSECOND, 2 * MILLISECOND);
                    self.schedule.at(self.now + wait, Event::Closed { connection, at_server: false });
                }
            }
        }
    }

    /// The machine loses power.
    pub(crate) fn power_off(&mut self, index: usize) {
        self.kill_safekeeper(index);
        let World { safekeepers, random, .. } = self;
        safekeepers[index].disk.lose_power(random);
    }

    /// Carries out what the log wants.
    pub(crate) fn drive(&mut self, index: usize) -> Broken {
        loop {
            let Some(process) = self.safekeepers[index].process.as_mut() else { return Ok(()) };
            let Some(command) = process.log.poll_command() else { break };
            match command {
                LogCommand::Reply { connection, message } => {
                    if self.trace.prints() {
                        println!("{:>16} sk {index} -> {connection} {}", "", summary(&message));
                    }
                    self.answer(connection as usize, message);
                }
                LogCommand::ReplyFence { request, result } => {
                    if let Ok(accepted) = result {
                        let term = accepted.term;
                        debug_assert_eq!(request, term.0);
                        let wait = self.latency(index as Node, World::OPERATOR);
                        if !self.is_cut(index as Node, World::OPERATOR) {
                            self.schedule.at(self.now + wait, Event::FenceAnswered { safekeeper: index, term });
                        }
                    }
                }
                LogCommand::ReplyConfiguration { request, result } => {
                    let wait = self.latency(index as Node, World::OPERATOR);
                    if !self.is_cut(index as Node, World::OPERATOR) {
                        let (generation, accepted) = (request as u32, result.is_ok());
                        let event = Event::MembershipAnswered { safekeeper: index, generation, accepted };
                        self.schedule.at(self.now + wait, event);
                    }
                }
                LogCommand::AskPeers => self.ask_peers(index),
                LogCommand::CatchUp(task) => self.begin_catch_up(index, task),
                operation => self.begin_operation(index, operation),
            }
        }
        self.schedule_log_timer(index);
        Ok(())
    }

    fn schedule_log_timer(&mut self, index: usize) {
        let Some(process) = &self.safekeepers[index].process else { return };
        let Some(instant) = process.log.poll_timeout() else { return };
        let at = self.time_of(index as Node, instant).max(self.now);
        let epoch = self.safekeepers[index].epoch;
        if let Some(process) = &mut self.safekeepers[index].process
            && process.timer_at.is_none_or(|earlier| at < earlier)
        {
            process.timer_at = Some(at);
            self.schedule.at(at, Event::LogTimer { safekeeper: index, epoch });
        }
    }

    pub(crate) fn log_timer(&mut self, index: usize, epoch: u32) -> Broken {
        let now = self.clock(index as Node);
        let Some(process) = self.process_of(index, epoch) else { return Ok(()) };
        process.timer_at = None;
        process.log.handle_timeout(now);
        self.drive(index)
    }

    /// The process, if it is still that one.
    pub(crate) fn process_of(&mut self, index: usize, epoch: u32) -> Option<&mut Process> {
        let safekeeper = &mut self.safekeepers[index];
        if safekeeper.epoch == epoch { safekeeper.process.as_mut() } else { None }
    }

    // ---- disk ----

    fn begin_operation(&mut self, index: usize, command: LogCommand) {
        if self.trace.prints() {
            println!("{:>16} sk {index} {command:?}", "");
        }
        let (op, usual) = match &command {
            LogCommand::Write { op, durable: false, .. } => (*op, (30, 200)),
            LogCommand::Write { op, durable: true, .. } => (*op, (130, 1700)),
            LogCommand::Read { op, .. } => (*op, (30, 150)),
            LogCommand::Sync { op, .. } => (*op, (100, 1500)),
            LogCommand::TakeSegment { op, .. } | LogCommand::RemoveSegment { op, .. } => (*op, (100, 800)),
            LogCommand::WriteControl { op, .. } => (*op, (150, 1500)),
            _ => return,
        };
        let mut wait = self.random.range(usual.0, usual.1) * MICROSECOND;
        let safekeeper = &mut self.safekeepers[index];
        if self.now < safekeeper.state.slow_until {
            wait *= 30;
        }
        let up_to = safekeeper.disk.last_write();
        let epoch = safekeeper.epoch;
        if let Some(process) = &mut safekeeper.process {
            process.running.insert(op.0, Operation { command, up_to });
        }
        self.schedule.at(self.now + wait, Event::DiskDone { safekeeper: index, epoch, op: op.0 });
    }

    pub(crate) fn disk_done(&mut self, index: usize, epoch: u32, op: u64) -> Broken {
        let now = self.clock(index as Node);
        let World { safekeepers, random, counts, .. } = self;
        let safekeeper = &mut safekeepers[index];
        if safekeeper.epoch != epoch {
            return Ok(());
        }
        let Some(process) = &mut safekeeper.process else { return Ok(()) };
        let Some(operation) = process.running.remove(&op) else { return Ok(()) };
        let result = perform(&mut safekeeper.disk, &mut safekeeper.state, operation, self.now, random);
        counts.failed_disks += u64::from(matches!(result, OpResult::Failed));
        counts.full_disks += u64::from(matches!(result, OpResult::NoSpace(_)));
        process.log.handle_done(OpId(op), result, now);
        self.drive(index)?;
        if matches!(self.phase, Phase::Healing { .. }) {
            self.check_progress();
        }
        Ok(())
    }

    // ---- peers ----

    fn ask_peers(&mut self, index: usize) {
        let Some(process) = &self.safekeepers[index].process else { return };
        let configuration = process.log.acceptor().state().configuration.clone();
        let epoch = self.safekeepers[index].epoch;
        for member in configuration.all_members() {
            let Some(to) = self.at_address(&member.address).filter(|to| *to != index) else { continue };
            if !self.is_cut(index as Node, to as Node) {
                let wait = self.latency(index as Node, to as Node);
                self.schedule.at(self.now + wait, Event::AskArrives { from: index, to, epoch });
            }
        }
    }

    pub(crate) fn ask_arrives(&mut self, from: usize, to: usize, epoch: u32) -> Broken {
        let Some(process) = &self.safekeepers[to].process else { return Ok(()) };
        if self.is_cut(to as Node, from as Node) {
            return Ok(());
        }
        let status = process.log.acceptor().status();
        let wait = self.latency(to as Node, from as Node);
        let (term, writer) = (status.ballot.term, status.writer);
        self.schedule.at(self.now + wait, Event::AskAnswered { safekeeper: from, epoch, from: to, term, writer });
        Ok(())
    }

    pub(crate) fn ask_answered(&mut self, index: usize, epoch: u32, term: Term, writer: WriterId) -> Broken {
        let now = self.clock(index as Node);
        let Some(process) = self.process_of(index, epoch) else { return Ok(()) };
        process.log.handle_peer_ballot(term, writer, now);
        self.drive(index)
    }

    fn begin_catch_up(&mut self, index: usize, task: CatchUpTask) {
        let epoch = self.safekeepers[index].epoch;
        let Some(process) = &mut self.safekeepers[index].process else { return };
        process.tasks += 1;
        let number = process.tasks;
        let position = task.from;
        process.catch_up =
            Some(CatchUp { number, task, position, donor: 0, donor_index: None, answer: None, failures: 0 });
        self.ask_donor(index, epoch);
    }

    fn ask_donor(&mut self, index: usize, epoch: u32) {
        let Some(process) = self.process_of(index, epoch) else { return };
        let Some(catch_up) = &mut process.catch_up else { return };
        let Some(donor) = catch_up.task.donors.get(catch_up.donor) else {
            process.catch_up = None;
            return;
        };
        let (address, task) = (donor.address.clone(), catch_up.number);
        let to = self.at_address(&address);
        if let Some(catch_up) = self.process_of(index, epoch).and_then(|process| process.catch_up.as_mut()) {
            catch_up.donor_index = to;
            catch_up.answer = None;
        }
        let Some(to) = to else { return };
        let event = match self.is_cut(index as Node, to as Node) {
            true => Event::FetchAnswered { safekeeper: index, epoch, task },
            false => Event::FetchArrives { safekeeper: index, epoch, task },
        };
        let wait = self.latency(index as Node, to as Node);
        self.schedule.at(self.now + wait, event);
    }

    pub(crate) fn fetch_arrives(&mut self, index: usize, epoch: u32, task: u64) -> Broken {
        let Some(process) = self.process_of(index, epoch) else { return Ok(()) };
        let Some(catch_up) = process.catch_up.as_ref().filter(|catch_up| catch_up.number == task) else {
            return Ok(());
        };
        let (begin, until, ballot) = (catch_up.position, catch_up.task.until, catch_up.task.ballot);
        let Some(to) = catch_up.donor_index else { return Ok(()) };
        let answer = self.donate(to, begin, until, ballot);
        let lost = self.is_cut(to as Node, index as Node);
        if let Some(catch_up) = self.process_of(index, epoch).and_then(|process| process.catch_up.as_mut()) {
            catch_up.answer = answer.filter(|_| !lost);
        }
        let wait = self.latency(to as Node, index as Node);
        self.schedule.at(self.now + wait, Event::FetchAnswered { safekeeper: index, epoch, task });
        Ok(())
    }

    fn donate(&mut self, donor: usize, begin: Lsn, until: Lsn, ballot: Ballot) -> Option<Vec<u8>> {
        let safekeeper = &mut self.safekeepers[donor];
        let process = safekeeper.process.as_ref()?;
        let end = process.log.readable(begin, Reader::Peer(ballot)).ok()?.min(until).min(begin.advance(FETCH_BYTES));
        if end <= begin {
            return None;
        }
        safekeeper.read_wal(begin, end)
    }

    pub(crate) fn fetch_answered(&mut self, index: usize, epoch: u32, task: u64) -> Broken {
        let now = self.clock(index as Node);
        let Some(process) = self.process_of(index, epoch) else { return Ok(()) };
        let Some(catch_up) = process.catch_up.as_mut().filter(|catch_up| catch_up.number == task) else {
            return Ok(());
        };
        let mut fetched_bytes = 0;
        let goes_on = match catch_up.answer.take() {
            None => {
                catch_up.donor += 1;
                true
            }
            Some(bytes) => match process.log.handle_fetched(catch_up.task.ballot, catch_up.position, &bytes, now) {
                Ok(()) => {
                    catch_up.position = catch_up.position.advance(bytes.len() as u64);
                    fetched_bytes += bytes.len() as u64;
                    true
                }
                Err(Refusal::Gap { expected }) => {
                    catch_up.position = expected;
                    catch_up.failures += 1;
                    catch_up.failures < 10
                }
                Err(Refusal::BadWal { lsn, detail }) => {
                    return Err(format!("a donor of safekeeper {index} served bad WAL at {lsn}: {detail}"));
                }
                Err(_) => false,
            },
        };
        if goes_on && catch_up.position < catch_up.task.until {
            self.ask_donor(index, epoch);
        } else {
            process.catch_up = None;
        }
        self.counts.fetched_bytes += fetched_bytes;
        self.drive(index)
    }

    // ---- requests ----

    /// Hands a request to the log; returns it when the log has no room for it.
    pub(crate) fn request(&mut self, connection: usize, message: Message) -> Result<Option<Message>, String> {
        let index = self.connections[connection].safekeeper;
        let Some(epoch) = self.connections[connection].epoch else { return Ok(None) };
        let now = self.clock(index as Node);
        let Some(process) = self.process_of(index, epoch) else { return Ok(None) };
        match message {
            Message::Append(append, bytes) => {
                if !process.log.has_room() {
                    return Ok(Some(Message::Append(append, bytes)));
                }
                process.log.handle_append(connection as u64, &append, &bytes, now);
            }
            Message::Request(request) => process.log.handle_message(connection as u64, request, now),
            Message::Answer(_) => {}
        }
        self.drive(index)?;
        Ok(None)
    }
}

fn perform(
    disk: &mut Disk,
    state: &mut DiskState,
    operation: Operation,
    now: Time,
    random: &mut crate::random::Random,
) -> OpResult {
    let Operation { command, up_to } = operation;
    let durable =
        matches!(command, LogCommand::Write { .. } | LogCommand::Sync { .. } | LogCommand::WriteControl { .. });
    if durable && state.fails {
        state.fails = false;
        // What the kernel could not write it forgets: a later sync would succeed without it.
        disk.lose_power(random);
        return OpResult::Failed;
    }
    match command {
        LogCommand::TakeSegment { .. } if now < state.full_until => OpResult::NoSpace(None),
        LogCommand::TakeSegment { start, .. } => {
            disk.take_segment(start);
            OpResult::Done
        }
        LogCommand::Write { segment, offset, buffer, durable, .. } => {
            let exists = match durable {
                true => disk.write_durably(segment, offset, buffer.as_bytes()),
                false => disk.write(segment, offset, buffer.as_bytes()),
            };
            if exists { OpResult::Written(buffer) } else { OpResult::Failed }
        }
        LogCommand::Read { segment, offset, mut buffer, .. } => {
            let length = buffer.len();
            match disk.bytes(segment, offset, length) {
                Some(bytes) => {
                    buffer.as_mut().copy_from_slice(bytes);
                    OpResult::Read(buffer)
                }
                None => OpResult::Failed,
            }
        }
        LogCommand::Sync { first, last, .. } => {
            disk.sync(first, last, up_to);
            OpResult::Done
        }
        LogCommand::RemoveSegment { start, complete, .. } => {
            disk.remove_segment(start, complete);
            OpResult::Done
        }
        LogCommand::WriteControl { copy, buffer, .. } => {
            disk.controls[usize::from(copy)] = Some(buffer.as_bytes().to_vec());
            OpResult::Written(buffer)
        }
        _ => OpResult::Failed,
    }
}

/// One line of an answer, for the printed trace.
fn summary(message: &AcceptorMessage) -> String {
    match message {
        AcceptorMessage::Voted(voted) => {
            format!(
                "Voted {} at {} last {} remaining {:?}",
                voted.ballot, voted.flush.record_end, voted.last_ballot, voted.promise_remaining
            )
        }
        AcceptorMessage::Refused(refused) => format!("Refused {:?} (ballot {})", refused.reason, refused.ballot),
        AcceptorMessage::Status(status) => format!("Status ballot {} flush {}", status.ballot, status.flush.record_end),
        other => format!("{other:?}"),
    }
}
