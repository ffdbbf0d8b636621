//! One log of a safekeeper: acceptor, scanner, segments and control file as one machine.
//!
//! Knows nothing about files, sockets and clocks. After each `handle_*` the shell carries out what
//! [`Log::poll_command`] returns until it returns `None`; each disk operation is reported by [`Log::handle_done`].
//! Which promise needs which durability is decided in `consensus::Acceptor`; here is decided what is on the disk when.
//! Read `planner.rs` for the writes, `truncation.rs` for the end of a log, `recovery.rs` for its start.

use alloc::{
    boxed::Box,
    collections::VecDeque,
    string::{String, ToString},
    vec::Vec,
};
use core::time::Duration;

use consensus::{
    Acceptor, AcceptorCommand, AcceptorIdentity, AcceptorState, Configuration,
    message::{AcceptorStatus, Append, ProposerMessage, Refusal},
};
use layers::{ShardGeneration, ShardId};
use pgtypes::{Ballot, FrameSummary, Instant, Lsn, Term, WriterId};
use wal::Scanner;

use crate::{
    buffer::Buffer,
    command::{LogCommand, OpId, OpResult},
    control::{CONSUMER_NAME_BYTES_MAX, CONSUMERS_MAX, Consumer, ControlFile},
    control_writer::{Contents, ControlWriter},
    planner::Planner,
    segment::{BLOCK_BYTES, Geometry, TRAILER_BYTES, Trailer},
    segment_list::{SegmentList, SegmentView},
    shards::{Shard, ShardError, Shards, Urgency},
    truncation::{Step, Truncation},
};

/// Bytes accepted and not yet durable at which [`Log::has_room`] says no: four writes in flight and as much behind.
pub const UNDURABLE_BYTES_MAX: u64 = 8 << 20;

/// Largest append or fetched piece.
pub const APPEND_BYTES_MAX: usize = 1 << 20;

/// Record ends remembered between acceptance and durability. Beyond, the newest replaces the one before, which only
/// coarsens acknowledgements.
const MARKS_MAX: usize = 1024;

/// Record ends remembered between durability and commit as future starts of a recovery scan.
const SCAN_CANDIDATES_MAX: usize = 64;

/// How long changes of the control file that nobody waits for are gathered.
const CONTROL_DELAY: Duration = Duration::from_secs(10);

/// How often a full disk is tried again.
const NO_SPACE_DELAY: Duration = Duration::from_secs(1);

/// Without traffic for so long, the buffers are given back.
const IDLE_DELAY: Duration = Duration::from_secs(1);

/// Who reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reader {
    /// Anyone entitled: reads what is committed.
    Anyone,
    /// A safekeeper that catches up and names the ballot whose election it accepted.
    Peer(Ballot),
}

/// Why nothing can be read at a position.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// It was removed.
    #[error("WAL below {oldest_lsn} was removed")]
    Removed {
        /// First position still held.
        oldest_lsn: Lsn,
    },
    /// The segment failed its checksum.
    #[error("the segment at {start} is damaged and is not served")]
    Damaged {
        /// Start of the segment.
        start: Lsn,
    },
}

/// A registration that was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConsumerError {
    /// Empty or longer than 64 bytes.
    #[error("a consumer's name must have 1 to {CONSUMER_NAME_BYTES_MAX} bytes")]
    Name,
    /// [`CONSUMERS_MAX`] exist.
    #[error("the log has {CONSUMERS_MAX} consumers already")]
    TooMany,
}

/// What the admin API and metrics show of a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogStatus {
    /// As the acceptor tells it to anyone.
    pub acceptor: AcceptorStatus,
    /// Behind the last byte accepted.
    pub receive_lsn: Lsn,
    /// Behind the last durable byte.
    pub durable_lsn: Lsn,
    /// Segment files.
    pub segments: usize,
    /// Segments below have a trailer.
    pub sealed_lsn: Lsn,
    /// Starts of segments that failed a verification.
    pub damaged: Vec<Lsn>,
    /// Who follows the log.
    pub consumers: Vec<Consumer>,
    /// For which shards WAL is kept.
    pub shards: Vec<Shard>,
    /// What was found at the start is synced, promises can be given.
    pub ready: bool,
    /// Appends are refused until space returns.
    pub disk_full: bool,
    /// Takes part in nothing until the process starts again.
    pub disk_failed: bool,
}

/// Where a write goes, and how.
#[derive(Clone, Copy, Debug)]
struct Place {
    segment: Lsn,
    offset: u64,
    durable: bool,
}

/// What an operation under way is for.
#[derive(Debug)]
enum Purpose {
    Write(Place),
    Flush,
    Take {
        start: Lsn,
    },
    Control,
    StartSync,
    Truncate,
    Seal,
    /// `needed`: the log relies on its being gone.
    Remove {
        needed: bool,
    },
}

#[derive(Debug)]
enum SealStep {
    /// Reads the data, whose checksum is not known.
    Read {
        next: Lsn,
        crc: u32,
    },
    Write {
        crc: u32,
    },
    Sync,
}

#[derive(Debug)]
struct Sealing {
    start: Lsn,
    data_begin: Lsn,
    step: SealStep,
    op: Option<OpId>,
}

/// See the module.
#[derive(Debug)]
pub struct Log {
    geometry: Geometry,
    acceptor: Acceptor,
    /// Behind the last byte accepted.
    scanner: Scanner,
    planner: Planner,
    segments: SegmentList,
    control: ControlWriter,
    consumers: Vec<Consumer>,
    shards: Shards,
    /// Of consumers and shards.
    consumers_version: u64,

    /// Record ends that are accepted but not durable.
    marks: VecDeque<FrameSummary>,
    /// Record ends that are durable but not committed.
    scan_candidates: VecDeque<FrameSummary>,
    /// A durable, committed record end.
    scan_start: FrameSummary,
    oldest_lsn: Lsn,
    /// Below, nobody needs WAL any more.
    horizon: Lsn,

    /// Of the acceptor's newest state.
    acceptor_sequence: u64,
    /// No WAL is written before this state of the acceptor is durable.
    writes_after: u64,
    /// What was found at the start and is not known to be durable: first and last segment.
    start_sync: Option<(Lsn, Lsn)>,
    /// A trailer was found that the control file does not vouch for: nothing is served before the start sync has succeeded.
    unsynced_trailer: bool,
    start_sync_running: bool,
    /// Files that do not belong to the log, to be removed first.
    orphans: Vec<Lsn>,
    /// The disk may hold bytes behind the end that were found at the start and are no WAL.
    tail_unknown: bool,
    truncation: Option<Truncation>,
    sealing: Option<Sealing>,
    removing: Option<OpId>,
    taking: Option<OpId>,
    /// The disk was full when a segment was to be taken.
    no_segment: bool,
    /// Writes that a full disk handed back.
    stalled: Vec<(OpId, Place, Buffer)>,
    retry_at: Option<Instant>,
    control_due: Option<Instant>,
    failed: bool,

    operations: Vec<(OpId, Purpose)>,
    next_op: u64,
    commands: VecDeque<LogCommand>,
    now: Instant,
    last_traffic: Instant,
}

/// What a log continues with: see `recovery.rs`.
pub(crate) struct Start {
    pub(crate) geometry: Geometry,
    pub(crate) acceptor: Acceptor,
    pub(crate) scan_start: FrameSummary,
    pub(crate) oldest_lsn: Lsn,
    pub(crate) segments: SegmentList,
    pub(crate) consumers: Vec<Consumer>,
    pub(crate) shards: Vec<Shard>,
    pub(crate) control_sequence: u64,
    pub(crate) control_copy: Option<u8>,
    pub(crate) control_durable: bool,
    pub(crate) sync: Option<(Lsn, Lsn)>,
    pub(crate) unsynced_trailer: bool,
    pub(crate) orphans: Vec<Lsn>,
}

impl Log {
    /// A log that does not exist yet. It is ready ([`Log::is_ready`]) once its control file is durable.
    ///
    /// # Errors
    /// The arguments contradict each other.
    pub fn create(
        identity: AcceptorIdentity,
        configuration: Configuration,
        now: Instant,
    ) -> Result<Log, consensus::RecoveryError> {
        Log::create_with(Geometry::STANDARD, identity, configuration, now)
    }

    /// [`Log::create`] with other sizes.
    ///
    /// # Errors
    /// As there.
    pub fn create_with(
        geometry: Geometry,
        identity: AcceptorIdentity,
        configuration: Configuration,
        now: Instant,
    ) -> Result<Log, consensus::RecoveryError> {
        let start = identity.start;
        let state = AcceptorState::created(configuration, start.record_end, start.timeline);
        let segments = SegmentList::new(geometry.segment_bytes, start.record_end, Lsn::INVALID);
        Ok(Log::new(
            Start {
                geometry,
                acceptor: Acceptor::new(identity, state, start, now)?,
                scan_start: start,
                oldest_lsn: start.record_end,
                segments,
                consumers: Vec::new(),
                shards: Vec::new(),
                control_sequence: 0,
                control_copy: None,
                control_durable: false,
                sync: None,
                unsynced_trailer: false,
                orphans: Vec::new(),
            },
            now,
        ))
    }

    pub(crate) fn new(start: Start, now: Instant) -> Log {
        let end = start.acceptor.received();
        let identity = start.acceptor.identity();
        let scanner = Scanner::resume(end, identity.segment_bytes).with_system_id(identity.system);
        let contents = Contents {
            acceptor_sequence: 0,
            scan_start: start.scan_start,
            oldest_lsn: start.oldest_lsn,
            sealed_lsn: start.segments.sealed_lsn(),
            consumers_version: 0,
        };
        let durable = start.control_durable.then_some(contents);
        let mut log = Log {
            geometry: start.geometry,
            scanner,
            // What is in the block of the end is read by the truncation that precedes the first append.
            planner: Planner::new(
                start.geometry,
                end.record_end,
                alloc::vec![0; end.record_end.offset_in(BLOCK_BYTES) as usize],
            ),
            segments: start.segments,
            control: ControlWriter::new(start.control_sequence, start.control_copy, durable),
            consumers: start.consumers,
            shards: Shards(start.shards),
            consumers_version: 0,
            marks: VecDeque::new(),
            scan_candidates: VecDeque::new(),
            scan_start: start.scan_start,
            oldest_lsn: start.oldest_lsn,
            horizon: Lsn::INVALID,
            acceptor_sequence: 0,
            writes_after: 0,
            start_sync: start.sync,
            unsynced_trailer: start.unsynced_trailer,
            start_sync_running: false,
            orphans: start.orphans,
            tail_unknown: true,
            truncation: None,
            sealing: None,
            removing: None,
            taking: None,
            no_segment: false,
            stalled: Vec::new(),
            retry_at: None,
            control_due: None,
            failed: false,
            operations: Vec::new(),
            next_op: 1,
            commands: VecDeque::new(),
            now,
            last_traffic: now,
            acceptor: start.acceptor,
        };
        log.acceptor.handle_oldest(log.oldest_lsn);
        log.remember_scan_candidate(end);
        log
    }

    // ---- looking ----

    /// The acceptor: ballots, histories, configuration, positions.
    pub fn acceptor(&self) -> &Acceptor {
        &self.acceptor
    }

    /// What was found at the start is durable, so that promises are given. Requests are taken before, too.
    pub fn is_ready(&self) -> bool {
        self.start_sync.is_none() && self.control.durable().is_some()
    }

    /// A disk operation failed: the log takes part in nothing until the process starts again.
    pub fn is_failed(&self) -> bool {
        self.failed
    }

    /// Whether another append may be handed in. While not, the shell leaves the bytes in the socket: the append that
    /// is handed in all the same is accepted, but memory is bounded only by this.
    pub fn has_room(&self) -> bool {
        self.planner.undurable_bytes() < UNDURABLE_BYTES_MAX
    }

    /// First position still held.
    pub fn oldest_lsn(&self) -> Lsn {
        self.oldest_lsn
    }

    /// The segment file that holds `lsn`, if any.
    pub fn segment(&self, lsn: Lsn) -> Option<SegmentView> {
        let segment = self.segments.get(lsn).filter(|segment| segment.taken)?;
        Some(SegmentView { start: segment.start, sealed: segment.sealed, damaged: segment.damaged })
    }

    /// Up to where `reader` may read from `begin` on; at or below `begin` when nothing is there yet.
    ///
    /// A sealed segment ([`Log::segment`]) must be verified before its first byte is sent.
    ///
    /// # Errors
    /// [`ReadError`]: nothing at `begin` can be served, now or later.
    pub fn readable(&self, begin: Lsn, reader: Reader) -> Result<Lsn, ReadError> {
        if begin < self.oldest_lsn {
            return Err(ReadError::Removed { oldest_lsn: self.oldest_lsn });
        }
        if self.unsynced_trailer {
            return Ok(begin);
        }
        let end = match reader {
            Reader::Peer(ballot) if self.is_ready() => self.acceptor.readable_until_by(ballot),
            Reader::Peer(_) | Reader::Anyone => self.acceptor.readable_until(),
        };
        match self.segments.first_damaged(begin, end) {
            Some(start) if start <= begin => Err(ReadError::Damaged { start }),
            Some(start) => Ok(start),
            None => Ok(end),
        }
    }

    /// Everything that the admin API and metrics show.
    pub fn status(&self) -> LogStatus {
        LogStatus {
            acceptor: self.acceptor.status(),
            receive_lsn: self.planner.end(),
            durable_lsn: self.planner.durable(),
            segments: self.segments.len(),
            sealed_lsn: self.segments.sealed_lsn(),
            damaged: self.segments.damaged(),
            consumers: self.consumers.clone(),
            shards: self.shards.0.clone(),
            ready: self.is_ready(),
            disk_full: self.is_disk_full(),
            disk_failed: self.failed,
        }
    }

    // ---- requests ----

    /// A proposer's message, except appends, which bring bytes: [`Log::handle_append`].
    pub fn handle_message(&mut self, connection: u64, message: ProposerMessage, now: Instant) {
        self.tick(now);
        self.acceptor.handle_message(connection, message, now);
    }

    /// An append with its bytes, or a heartbeat without.
    ///
    /// The bytes are scanned first: if they are not WAL, nothing of them is accepted and the append is refused.
    pub fn handle_append(&mut self, connection: u64, append: &Append, bytes: &[u8], now: Instant) {
        self.tick(now);
        if append.begin_lsn == append.end_lsn && bytes.is_empty() {
            self.acceptor.handle_message(connection, ProposerMessage::Append(append.clone()), now);
            return;
        }
        if let Err(refused) = self.acceptor.check_append(connection, append) {
            self.acceptor.refuse(connection, refused);
            return;
        }
        let announced = append.end_lsn.bytes_since(append.begin_lsn);
        if announced != bytes.len() as u64 || bytes.len() > APPEND_BYTES_MAX {
            let detail = String::from("the append's positions do not match the number of its bytes");
            return self.refuse(connection, append.sequence, Refusal::Malformed { detail });
        }
        match self.accept(bytes) {
            Ok(summary) => self.acceptor.appended(connection, append, summary, now),
            Err(refusal) => self.refuse(connection, append.sequence, refusal),
        }
    }

    /// WAL fetched from a peer for the catch-up of `ballot`, which begins at `begin_lsn`.
    ///
    /// # Errors
    /// [`Refusal::Gap`] names where to go on; after [`Refusal::BadWal`] another donor is to be asked; after any other
    /// the catch-up is over.
    pub fn handle_fetched(
        &mut self,
        ballot: Ballot,
        begin_lsn: Lsn,
        bytes: &[u8],
        now: Instant,
    ) -> Result<(), Refusal> {
        self.tick(now);
        if self.tail_unknown {
            return Err(Refusal::NotElected);
        }
        self.acceptor.check_fetched(ballot, begin_lsn)?;
        if bytes.len() > APPEND_BYTES_MAX {
            return Err(Refusal::Malformed { detail: String::from("a fetched piece is too long") });
        }
        let summary = self.accept(bytes)?;
        self.acceptor.fetched(self.planner.end(), summary);
        Ok(())
    }

    /// Fences all terms below `term`, which is granted to `writer`. Answered by [`LogCommand::ReplyFence`].
    pub fn handle_fence(&mut self, request: u64, term: Term, writer: WriterId, now: Instant) {
        self.tick(now);
        self.acceptor.handle_fence(request, term, writer, now);
    }

    /// A peer's ballot, after [`LogCommand::AskPeers`].
    pub fn handle_peer_ballot(&mut self, term: Term, writer: WriterId, now: Instant) {
        self.tick(now);
        self.acceptor.handle_peer_ballot(term, writer);
    }

    /// Changes the membership. Answered by [`LogCommand::ReplyConfiguration`].
    pub fn handle_configuration(&mut self, request: u64, configuration: Configuration, now: Instant) {
        self.tick(now);
        self.acceptor.handle_configuration(request, configuration, now);
    }

    /// The connection is gone.
    pub fn handle_disconnected(&mut self, connection: u64) {
        self.acceptor.handle_disconnected(connection);
    }

    /// Nobody needs WAL below `horizon` any more (the shell's minimum over consumers); it is removed as far as it is
    /// committed. Never moves back.
    pub fn handle_horizon(&mut self, horizon: Lsn, now: Instant) {
        self.tick(now);
        self.horizon = self.horizon.max(horizon);
    }

    /// Registers a consumer, which is written at once ([`Log::consumers_durable`]), or moves its position, which is
    /// durable within 10 s.
    ///
    /// # Errors
    /// The registration is refused; nothing was changed.
    pub fn set_consumer(&mut self, name: &str, confirmed_lsn: Lsn, now: Instant) -> Result<(), ConsumerError> {
        self.tick(now);
        if name.is_empty() || name.len() > CONSUMER_NAME_BYTES_MAX {
            return Err(ConsumerError::Name);
        }
        match self.consumers.binary_search_by(|consumer| consumer.name.as_str().cmp(name)) {
            Ok(at) if self.consumers[at].confirmed_lsn == confirmed_lsn => return Ok(()),
            Ok(at) => self.consumers[at].confirmed_lsn = confirmed_lsn,
            Err(_) if self.consumers.len() >= CONSUMERS_MAX => return Err(ConsumerError::TooMany),
            Err(at) => {
                self.consumers.insert(at, Consumer { name: name.to_string(), confirmed_lsn });
                // A position that is lost was a lower one and keeps more WAL; a consumer that is lost keeps none.
                self.control.demand();
            }
        }
        self.consumers_version += 1;
        Ok(())
    }

    /// Forgets a consumer. Returns whether it was known.
    pub fn remove_consumer(&mut self, name: &str, now: Instant) -> bool {
        self.tick(now);
        let known = self.consumers.iter().position(|consumer| consumer.name == name);
        if let Some(at) = known {
            self.consumers.remove(at);
            self.consumers_version += 1;
        }
        known.is_some()
    }

    /// Registers the owner of a shard, which is written at once ([`Log::consumers_durable`]). A shard that is new here needs
    /// everything that is still held.
    ///
    /// # Errors
    /// The shard has a newer owner, or there are too many; nothing was changed.
    pub fn register_shard(
        &mut self,
        shard: ShardId,
        generation: ShardGeneration,
        now: Instant,
    ) -> Result<(), ShardError> {
        self.tick(now);
        let urgency = self.shards.register(shard, generation, self.oldest_lsn)?;
        self.shards_changed(urgency);
        // An owner that comes back waits for its registration, too, and what it confirmed before may still be written lazily.
        if !self.consumers_durable(self.consumers_version) {
            self.control.demand();
        }
        Ok(())
    }

    /// A shard needs nothing below `durable_lsn`; durable within 10 s. Moving back changes nothing.
    ///
    /// # Errors
    /// The owner is not the one that registered last; nothing was changed.
    pub fn confirm_shard(
        &mut self,
        shard: ShardId,
        generation: ShardGeneration,
        durable_lsn: Lsn,
        now: Instant,
    ) -> Result<(), ShardError> {
        self.tick(now);
        let urgency = self.shards.confirm(shard, generation, durable_lsn)?;
        self.shards_changed(urgency);
        Ok(())
    }

    /// Forgets a shard, for which WAL is held no longer. Returns whether it was known.
    pub fn remove_shard(&mut self, shard: ShardId, now: Instant) -> bool {
        self.tick(now);
        let urgency = self.shards.remove(shard);
        self.shards_changed(urgency);
        urgency != Urgency::Never
    }

    /// For which shards WAL is kept, sorted by number.
    pub fn shards(&self) -> &[Shard] {
        &self.shards.0
    }

    /// The shard, if it ever registered.
    pub fn shard(&self, shard: ShardId) -> Option<Shard> {
        self.shards.get(shard)
    }

    fn shards_changed(&mut self, urgency: Urgency) {
        if urgency != Urgency::Never {
            self.consumers_version += 1;
        }
        if urgency == Urgency::AtOnce {
            self.control.demand();
        }
    }

    /// Version of the consumers and shards: raised by each change.
    pub fn consumers_version(&self) -> u64 {
        self.consumers_version
    }

    /// Whether the consumers and shards as of `version` are durable.
    pub fn consumers_durable(&self, version: u64) -> bool {
        self.control.durable().is_some_and(|durable| durable.consumers_version >= version)
    }

    /// Who follows the log.
    pub fn consumers(&self) -> &[Consumer] {
        &self.consumers
    }

    /// The segment at `start` failed its verification: nothing of it is served any more.
    pub fn handle_damaged(&mut self, start: Lsn) {
        if let Some(segment) = self.segments.get_mut(start) {
            segment.damaged = true;
        }
    }

    /// To be called when [`Log::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.tick(now);
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.no_segment = false;
            for (op, place, buffer) in core::mem::take(&mut self.stalled) {
                let Place { segment, offset, durable } = place;
                self.operations.push((op, Purpose::Write(place)));
                self.commands.push_back(LogCommand::Write { op, segment, offset, buffer, durable });
            }
            if let Some((op, copy, buffer)) = self.control.take_stalled() {
                self.operations.push((op, Purpose::Control));
                self.commands.push_back(LogCommand::WriteControl { op, copy, buffer });
            }
        }
        if self.control_due.is_some_and(|at| at <= now) {
            self.control_due = None;
            self.control.demand();
        }
        if self.idle_at().is_some_and(|at| at <= now) {
            self.planner.release_memory();
            self.marks = VecDeque::new();
            self.commands.shrink_to_fit();
        }
    }

    /// When [`Log::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.failed {
            return None;
        }
        [self.retry_at, self.control_due, self.idle_at()].into_iter().flatten().min()
    }

    fn idle_at(&self) -> Option<Instant> {
        let idle = self.planner.holds_memory() && self.planner.is_idle();
        idle.then(|| self.last_traffic.after(IDLE_DELAY))
    }

    /// What the shell has to do next.
    pub fn poll_command(&mut self) -> Option<LogCommand> {
        loop {
            if let Some(command) = self.commands.pop_front() {
                return Some(command);
            }
            self.plan();
            if self.commands.is_empty() {
                return None;
            }
        }
    }

    // ---- completions ----

    /// A disk operation has ended.
    pub fn handle_done(&mut self, op: OpId, result: OpResult, now: Instant) {
        self.tick(now);
        let Some(at) = self.operations.iter().position(|(running, _)| *running == op) else { return };
        let (_, purpose) = self.operations.swap_remove(at);
        if self.failed {
            return;
        }
        match (purpose, result) {
            (Purpose::Write(_), OpResult::Written(buffer)) => {
                let before = self.planner.durable();
                self.planner.handle_written(op, buffer);
                if self.planner.durable() > before {
                    self.advance_flush();
                }
            }
            (Purpose::Write(place), OpResult::NoSpace(Some(buffer))) => {
                self.stalled.push((op, place, buffer));
                self.retry_later();
            }
            (Purpose::Flush, OpResult::Done) => {
                self.planner.handle_synced(op);
                self.advance_flush();
            }
            (Purpose::Take { start }, OpResult::Done) => {
                self.taking = None;
                if let Some(segment) = self.segments.get_mut(start) {
                    segment.taken = true;
                }
            }
            (Purpose::Take { .. }, OpResult::NoSpace(_)) => {
                self.taking = None;
                self.no_segment = true;
                self.retry_later();
            }
            (Purpose::Control, OpResult::Written(buffer)) => self.control_written(buffer),
            (Purpose::Control, OpResult::NoSpace(Some(buffer))) => {
                self.control.stall(buffer);
                self.retry_later();
            }
            (Purpose::StartSync, OpResult::Done) => {
                self.start_sync = None;
                self.start_sync_running = false;
                self.unsynced_trailer = false;
            }
            (Purpose::Truncate, result) => self.truncation_done(result),
            (Purpose::Seal, result) => self.seal_done(result),
            (Purpose::Remove { needed: false }, _) | (Purpose::Remove { .. }, OpResult::Done) => self.removing = None,
            (_, _) => self.fail(),
        }
    }

    fn control_written(&mut self, buffer: Buffer) {
        let op = self.new_op();
        if let Some(copy) = self.control.handle_written(op) {
            self.operations.push((op, Purpose::Control));
            self.commands.push_back(LogCommand::WriteControl { op, copy, buffer });
        } else if let Some(durable) = self.control.durable() {
            self.acceptor.handle_persisted(durable.acceptor_sequence);
        }
    }

    fn advance_flush(&mut self) {
        let durable = self.planner.durable();
        let mut summary = self.acceptor.flush();
        while let Some(mark) = self.marks.front().filter(|mark| mark.record_end <= durable) {
            summary = *mark;
            self.marks.pop_front();
        }
        self.acceptor.handle_flushed(summary, durable);
        self.remember_scan_candidate(summary);
    }

    /// A durable record end: a scan may start there once it is committed.
    fn remember_scan_candidate(&mut self, summary: FrameSummary) {
        let last = self.scan_candidates.back().unwrap_or(&self.scan_start).record_end;
        let far = summary.record_end.bytes_since(last) >= self.geometry.scan_step_bytes;
        if far && self.scan_candidates.len() < SCAN_CANDIDATES_MAX {
            self.scan_candidates.push_back(summary);
        }
    }

    fn advance_scan_start(&mut self) {
        let commit_lsn = self.acceptor.commit_lsn();
        while let Some(candidate) = self.scan_candidates.front().filter(|c| c.record_end <= commit_lsn) {
            self.scan_start = *candidate;
            self.scan_candidates.pop_front();
        }
        let flush = self.acceptor.flush();
        if self.truncation.is_none() && flush.record_end == commit_lsn && commit_lsn > self.scan_start.record_end {
            self.scan_start = flush;
            self.scan_candidates.clear();
        }
    }

    // ---- rules ----

    fn tick(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    fn refuse(&mut self, connection: u64, sequence: u64, refusal: Refusal) {
        let refused = self.acceptor.refusal(refusal, sequence);
        self.acceptor.refuse(connection, refused);
    }

    /// Takes bytes at the end of the log if they are WAL; returns the end of the last complete record.
    fn accept(&mut self, bytes: &[u8]) -> Result<FrameSummary, Refusal> {
        let mut scanner = self.scanner;
        scanner
            .feed(bytes, |_| {})
            .map_err(|error| Refusal::BadWal { lsn: error.lsn, detail: error.kind.to_string() })?;
        self.scanner = scanner;
        let begin = self.planner.end();
        let end = begin.advance(bytes.len() as u64);
        self.segments.want(begin, end.advance(self.geometry.take_ahead_bytes));
        self.segments.checksum(begin, bytes);
        self.planner.push(bytes);
        let summary = scanner.summary();
        let full = self.marks.len() >= MARKS_MAX;
        match self.marks.back_mut() {
            Some(last) if last.record_end == summary.record_end => {}
            Some(last) if full => *last = summary,
            _ if summary.record_end > self.acceptor.flush().record_end => self.marks.push_back(summary),
            _ => {}
        }
        self.last_traffic = self.now;
        Ok(summary)
    }

    fn new_op(&mut self) -> OpId {
        let op = OpId(self.next_op);
        self.next_op += 1;
        op
    }

    fn begin_op(&mut self, purpose: Purpose) -> OpId {
        let op = self.new_op();
        self.operations.push((op, purpose));
        op
    }

    fn retry_later(&mut self) {
        self.retry_at.get_or_insert(self.now.after(NO_SPACE_DELAY));
    }

    fn is_disk_full(&self) -> bool {
        let next_missing = || {
            self.segments
                .next_to_take()
                .is_some_and(|start| start < self.planner.end().advance(APPEND_BYTES_MAX as u64))
        };
        !self.stalled.is_empty() || self.control.is_stalled() || (self.no_segment && next_missing())
    }

    /// Nothing is known about the disk any more.
    fn fail(&mut self) {
        self.failed = true;
        self.truncation = None;
        self.sealing = None;
        self.stalled.clear();
        self.planner.drop_pending();
        self.commands.retain(|command| {
            matches!(
                command,
                LogCommand::Reply { .. } | LogCommand::ReplyFence { .. } | LogCommand::ReplyConfiguration { .. }
            )
        });
        self.acceptor.handle_disk_failed();
    }

    fn plan(&mut self) {
        if self.failed {
            return self.forward_replies();
        }
        self.acceptor.handle_disk_full(self.is_disk_full());
        self.plan_start();
        if self.is_ready() {
            self.forward_replies();
        }
        let ready = self.is_ready();
        if ready {
            self.advance_scan_start();
            self.plan_truncation();
            self.plan_removal();
        }
        self.plan_control();
        if ready {
            self.plan_segments();
            self.plan_writes();
            self.plan_sealing();
        }
    }

    /// Carries the acceptor's commands out or passes them on.
    fn forward_replies(&mut self) {
        while let Some(command) = self.acceptor.poll_command() {
            match command {
                AcceptorCommand::Persist { sequence, before_writes, .. } => {
                    self.acceptor_sequence = sequence;
                    if before_writes {
                        self.writes_after = sequence;
                    }
                    self.control.demand();
                }
                AcceptorCommand::Truncate { to } => {
                    if !self.failed {
                        self.marks.clear();
                        self.truncation = Some(Truncation::new(to));
                    }
                }
                AcceptorCommand::CatchUp(task) => self.commands.push_back(LogCommand::CatchUp(task)),
                AcceptorCommand::AskPeers => self.commands.push_back(LogCommand::AskPeers),
                AcceptorCommand::Reply { connection, message } => {
                    let message = message.into_message();
                    self.commands.push_back(LogCommand::Reply { connection, message });
                }
                AcceptorCommand::ReplyFence { request, result } => {
                    self.commands.push_back(LogCommand::ReplyFence { request, result });
                }
                AcceptorCommand::ReplyConfiguration { request, result } => {
                    self.commands.push_back(LogCommand::ReplyConfiguration { request, result });
                }
            }
        }
    }

    fn plan_start(&mut self) {
        if let Some((first, last)) = self.start_sync
            && !self.start_sync_running
        {
            self.start_sync_running = true;
            let op = self.begin_op(Purpose::StartSync);
            self.commands.push_back(LogCommand::Sync { op, first, last });
        }
    }

    // ---- control file ----

    fn contents(&self) -> Contents {
        Contents {
            acceptor_sequence: self.acceptor_sequence,
            scan_start: self.scan_start,
            oldest_lsn: self.oldest_lsn,
            sealed_lsn: self.segments.sealed_lsn(),
            consumers_version: self.consumers_version,
        }
    }

    fn plan_control(&mut self) {
        if let Some(durable) = self.control.durable()
            && !self.control.is_writing()
            && *durable != self.contents()
        {
            let scan = self.scan_start.record_end.bytes_since(durable.scan_start.record_end);
            // A recovery scans one segment or two.
            if scan >= self.geometry.segment_bytes || self.oldest_lsn > durable.oldest_lsn {
                self.control.demand();
            } else {
                self.control_due.get_or_insert(self.now.after(CONTROL_DELAY));
            }
        }
        if !self.control.wants_write() {
            return;
        }
        // While the start is not durable the acceptor's commands are held back, and so are states not handed out.
        self.control_due = None;
        let file = ControlFile {
            sequence: self.control.next_sequence(),
            identity: self.acceptor.identity().clone(),
            store_segment_bytes: self.geometry.segment_bytes,
            acceptor: self.acceptor.state().clone(),
            scan_start: self.scan_start,
            oldest_lsn: self.oldest_lsn,
            sealed_lsn: self.segments.sealed_lsn(),
            consumers: self.consumers.clone(),
            shards: self.shards.0.clone(),
        };
        let op = self.begin_op(Purpose::Control);
        let copy = self.control.begin(op, self.contents());
        self.commands.push_back(LogCommand::WriteControl { op, copy, buffer: Buffer::padded(&file.encode()) });
    }

    // ---- WAL ----

    fn plan_segments(&mut self) {
        if self.taking.is_some() || self.no_segment || self.truncation.is_some() || !self.orphans.is_empty() {
            return;
        }
        if let Some(start) = self.segments.next_to_take() {
            let op = self.begin_op(Purpose::Take { start });
            self.taking = Some(op);
            self.commands.push_back(LogCommand::TakeSegment { op, start });
        }
    }

    fn plan_writes(&mut self) {
        if self.truncation.is_some() {
            return;
        }
        let persisted = self.control.durable().map_or(0, |durable| durable.acceptor_sequence);
        while self.writes_after <= persisted
            && let Some(start) = self.planner.next_write_start()
            && self.segments.get(start).is_some_and(|segment| segment.taken)
        {
            let op = self.new_op();
            let Some(write) = self.planner.issue_write(op) else { break };
            let (segment, offset) = self.segments.place(write.start);
            let durable = write.durable;
            self.operations.push((op, Purpose::Write(Place { segment, offset, durable })));
            self.commands.push_back(LogCommand::Write { op, segment, offset, buffer: write.buffer, durable });
        }
        if self.planner.wants_sync() {
            let op = self.begin_op(Purpose::Flush);
            if let Some(sync) = self.planner.issue_sync(op) {
                let (first, last) = (self.segments.place(sync.from).0, self.segments.place(Lsn(sync.to.0 - 1)).0);
                self.commands.push_back(LogCommand::Sync { op, first, last });
            }
        }
    }

    // ---- end of the log ----

    fn plan_truncation(&mut self) {
        let Some(mut truncation) = self.truncation.take() else { return };
        while truncation.op.is_none() && !matches!(truncation.step, Step::Done) {
            if !self.advance_truncation(&mut truncation) {
                break;
            }
        }
        if self.failed {
            return;
        }
        if !matches!(truncation.step, Step::Done) {
            self.truncation = Some(truncation);
            return;
        }
        let (Some(summary), Some(tail)) = (truncation.summary, truncation.tail) else { return self.fail() };
        let identity = self.acceptor.identity();
        self.scanner = Scanner::resume(summary, identity.segment_bytes).with_system_id(identity.system);
        self.planner.restart(truncation.to, tail);
        self.segments.truncate_checksums(truncation.to);
        self.scan_candidates.retain(|candidate| candidate.record_end <= truncation.to);
        self.tail_unknown = false;
        self.acceptor.handle_truncated(summary);
        self.forward_replies();
    }

    /// Does one thing; returns whether something else can be done at once.
    fn advance_truncation(&mut self, truncation: &mut Truncation) -> bool {
        let to = truncation.to;
        let block = to.floor(BLOCK_BYTES);
        match &truncation.step {
            Step::Quiesce => {
                for (op, _, buffer) in core::mem::take(&mut self.stalled) {
                    self.planner.handle_abandoned(op, buffer);
                }
                self.planner.drop_pending();
                let busy = !self.planner.is_quiet() || self.taking.is_some() || self.removing.is_some();
                if busy || !self.orphans.is_empty() {
                    return false;
                }
                self.begin_truncation(truncation);
            }
            Step::Scan { next, .. } => {
                let length = Truncation::piece(self.geometry, *next, to);
                truncation.op = Some(self.read_for(*next, length));
            }
            Step::ReadTail => truncation.op = Some(self.read_for(block, BLOCK_BYTES as usize)),
            Step::Zero { tail_written: false, .. } => {
                let next = truncation.first_zero_block();
                if let Some(buffer) = truncation.tail_block() {
                    truncation.op = Some(self.write_for(block, buffer));
                    truncation.wrote = true;
                }
                truncation.step = Step::Zero { next, tail_written: true };
            }
            Step::Zero { next, .. } => {
                if *next >= truncation.zero_until {
                    truncation.step = Step::Remove;
                    return true;
                }
                let length = Truncation::piece(self.geometry, *next, truncation.zero_until);
                if truncation.look_first {
                    truncation.op = Some(self.read_for(*next, length));
                } else {
                    truncation.op = Some(self.write_for(*next, Buffer::zeroed(length)));
                    truncation.wrote = true;
                    truncation.step = Step::Zero { next: next.advance(length as u64), tail_written: true };
                }
            }
            Step::Remove => match self.segments.pop_behind(to) {
                Some(segment) if segment.taken => {
                    let op = self.begin_op(Purpose::Truncate);
                    truncation.op = Some(op);
                    let start = segment.start;
                    self.commands.push_back(LogCommand::RemoveSegment { op, start, complete: false });
                }
                Some(_) => {}
                None => truncation.step = Step::Sync,
            },
            Step::Sync if truncation.wrote => {
                let op = self.begin_op(Purpose::Truncate);
                truncation.op = Some(op);
                let (segment, _) = self.segments.place(to);
                self.commands.push_back(LogCommand::Sync { op, first: segment, last: segment });
            }
            Step::Sync => truncation.step = Step::Done,
            Step::Done => return false,
        }
        true
    }

    /// Nothing is under way any more: decides what there is to do.
    fn begin_truncation(&mut self, truncation: &mut Truncation) {
        let to = truncation.to;
        let flush = self.acceptor.flush();
        let known = [flush, self.scan_start].into_iter().chain(self.scan_candidates.iter().copied());
        truncation.summary = known.into_iter().find(|summary| summary.record_end == to);

        let untouched = !self.tail_unknown && self.planner.issued() == to && self.planner.durable() == to;
        if untouched && truncation.summary.is_some() {
            truncation.tail = Some(self.planner.tail().to_vec());
            truncation.step = Step::Done;
            return;
        }
        let exists = self.segments.get(to).is_some_and(|segment| segment.taken && segment.start < to);
        let segment_end = self.segments.place(to).0.advance(self.geometry.segment_bytes);
        truncation.look_first = self.tail_unknown;
        truncation.zero_until = match exists {
            true if self.tail_unknown => segment_end,
            true => Lsn(self.planner.issued().0.next_multiple_of(BLOCK_BYTES)).min(segment_end),
            false => to,
        };
        if !exists || to.offset_in(BLOCK_BYTES) == 0 {
            // Without a segment the log is empty; what is before it in its first block is no WAL.
            truncation.tail = Some(alloc::vec![0; to.offset_in(BLOCK_BYTES) as usize]);
        }
        truncation.step = if truncation.summary.is_none() {
            let identity = self.acceptor.identity();
            let scanner = Scanner::resume(self.scan_start, identity.segment_bytes).with_system_id(identity.system);
            Step::Scan { scanner: Box::new(scanner), next: self.scan_start.record_end.floor(BLOCK_BYTES) }
        } else if truncation.tail.is_none() {
            Step::ReadTail
        } else {
            // An empty log has no block to write.
            match exists {
                true => Step::Zero { next: Lsn::INVALID, tail_written: false },
                false => Step::Remove,
            }
        };
    }

    fn read_for(&mut self, lsn: Lsn, length: usize) -> OpId {
        let op = self.begin_op(Purpose::Truncate);
        let (segment, offset) = self.segments.place(lsn);
        self.commands.push_back(LogCommand::Read { op, segment, offset, buffer: Buffer::zeroed(length) });
        op
    }

    fn write_for(&mut self, lsn: Lsn, buffer: Buffer) -> OpId {
        let op = self.begin_op(Purpose::Truncate);
        let (segment, offset) = self.segments.place(lsn);
        self.commands.push_back(LogCommand::Write { op, segment, offset, buffer, durable: false });
        op
    }

    fn truncation_done(&mut self, result: OpResult) {
        let Some(truncation) = &mut self.truncation else { return };
        truncation.op = None;
        let to = truncation.to;
        let block = to.floor(BLOCK_BYTES);
        match (&mut truncation.step, result) {
            (Step::Scan { scanner, next }, OpResult::Read(buffer)) => {
                let bytes = buffer.as_bytes();
                let skipped = scanner.position().bytes_since(*next).min(bytes.len() as u64) as usize;
                let wanted = to.bytes_since(*next).min(bytes.len() as u64) as usize;
                // Everything up to here was scanned before it was accepted: the disk changed it since.
                if scanner.feed(&bytes[skipped..wanted], |_| {}).is_err() {
                    return self.fail();
                }
                if block >= *next && block < next.advance(bytes.len() as u64) && truncation.tail.is_none() {
                    truncation.tail = Some(bytes[block.bytes_since(*next) as usize..wanted].to_vec());
                }
                *next = next.advance(bytes.len() as u64);
                if *next < to {
                    return;
                }
                let summary = scanner.summary();
                if summary.record_end != to {
                    return self.fail();
                }
                truncation.summary = Some(summary);
                truncation.step = Step::Zero { next: Lsn::INVALID, tail_written: false };
            }
            (Step::ReadTail, OpResult::Read(buffer)) => {
                truncation.tail = Some(buffer.as_bytes()[..to.bytes_since(block) as usize].to_vec());
                truncation.step = Step::Zero { next: Lsn::INVALID, tail_written: false };
            }
            (Step::Zero { next, .. }, OpResult::Read(buffer)) => {
                let at = *next;
                *next = next.advance(buffer.len() as u64);
                if buffer.as_bytes().iter().any(|&byte| byte != 0) {
                    truncation.wrote = true;
                    let op = self.write_for(at, Buffer::zeroed(buffer.len()));
                    if let Some(truncation) = &mut self.truncation {
                        truncation.op = Some(op);
                    }
                }
            }
            (Step::Zero { .. }, OpResult::Written(_)) | (Step::Remove, OpResult::Done) => {}
            (Step::Sync, OpResult::Done) => truncation.step = Step::Done,
            (_, _) => self.fail(),
        }
    }

    // ---- complete segments ----

    fn plan_sealing(&mut self) {
        if self.sealing.is_none() {
            let committed = self.acceptor.commit_lsn().min(self.planner.durable());
            let Some(segment) = self.segments.next_to_seal(committed) else { return };
            let step = match segment.data_crc() {
                Some(crc) => SealStep::Write { crc },
                None => SealStep::Read { next: segment.start, crc: 0 },
            };
            let (start, data_begin) = (segment.start, segment.data_begin);
            self.sealing = Some(Sealing { start, data_begin, step, op: None });
        }
        let Some(mut sealing) = self.sealing.take() else { return };
        let waits_for_space = self.retry_at.is_some() && matches!(sealing.step, SealStep::Write { .. });
        if sealing.op.is_none() && !waits_for_space {
            let op = self.begin_op(Purpose::Seal);
            sealing.op = Some(op);
            let start = sealing.start;
            self.commands.push_back(match sealing.step {
                SealStep::Read { next, .. } => {
                    let buffer = Buffer::zeroed(self.geometry.write_bytes_max);
                    LogCommand::Read { op, segment: start, offset: next.bytes_since(start), buffer }
                }
                SealStep::Write { crc } => {
                    let log = self.acceptor.identity().log;
                    let trailer = Trailer {
                        log,
                        start_lsn: start,
                        data_begin: sealing.data_begin,
                        segment_bytes: self.geometry.segment_bytes,
                        data_crc: crc,
                    };
                    let buffer = Buffer::padded(&trailer.encode());
                    debug_assert_eq!(TRAILER_BYTES as usize, buffer.len());
                    LogCommand::Write {
                        op,
                        segment: start,
                        offset: self.geometry.segment_bytes,
                        buffer,
                        durable: false,
                    }
                }
                SealStep::Sync => LogCommand::Sync { op, first: start, last: start },
            });
        }
        self.sealing = Some(sealing);
    }

    fn seal_done(&mut self, result: OpResult) {
        let Some(mut sealing) = self.sealing.take() else { return };
        sealing.op = None;
        match (&sealing.step, result) {
            (&SealStep::Read { next, crc }, OpResult::Read(buffer)) => {
                let bytes = buffer.as_bytes();
                let skipped = sealing.data_begin.bytes_since(next).min(bytes.len() as u64) as usize;
                let crc = wal::crc32c(crc, &bytes[skipped..]);
                let next = next.advance(bytes.len() as u64);
                sealing.step = match next.bytes_since(sealing.start) < self.geometry.segment_bytes {
                    true => SealStep::Read { next, crc },
                    false => SealStep::Write { crc },
                };
            }
            (SealStep::Read { .. }, OpResult::Failed) => return self.handle_damaged(sealing.start),
            (SealStep::Write { .. }, OpResult::Written(_)) => sealing.step = SealStep::Sync,
            (SealStep::Sync, OpResult::Done) => {
                if let Some(segment) = self.segments.get_mut(sealing.start) {
                    segment.sealed = true;
                }
                return;
            }
            // A copy-on-write file system may need space even here; nobody waits for a trailer.
            (SealStep::Write { .. }, OpResult::NoSpace(_)) => self.retry_later(),
            (_, _) => return self.fail(),
        }
        self.sealing = Some(sealing);
    }

    fn plan_removal(&mut self) {
        if self.removing.is_some() {
            return;
        }
        if let Some(start) = self.orphans.pop() {
            // An orphan behind the end could be taken for WAL once the log has grown up to it.
            let op = self.begin_op(Purpose::Remove { needed: start >= self.oldest_lsn });
            self.removing = Some(op);
            return self.commands.push_back(LogCommand::RemoveSegment { op, start, complete: false });
        }
        let Some(durable) = self.control.durable().copied() else { return };
        let safe = self.horizon.min(self.acceptor.commit_lsn()).min(durable.scan_start.record_end);
        let first_end = self.segments.first().map_or(Lsn::MAX, |segment| segment.end);
        if safe >= first_end && self.segments.place(safe).0 > self.oldest_lsn {
            self.oldest_lsn = self.segments.place(safe).0;
            self.acceptor.handle_oldest(self.oldest_lsn);
            return;
        }
        let sealing = self.sealing.as_ref().map(|sealing| sealing.start);
        if self.segments.first().is_none_or(|first| sealing == Some(first.start)) {
            return;
        }
        if let Some(segment) = self.segments.pop_below(durable.oldest_lsn) {
            let complete = segment.data_begin == segment.start;
            let op = self.begin_op(Purpose::Remove { needed: false });
            self.removing = Some(op);
            self.commands.push_back(LogCommand::RemoveSegment { op, start: segment.start, complete });
        }
    }
}
