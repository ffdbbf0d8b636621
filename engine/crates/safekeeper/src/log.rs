//! One log on its core: performs what `logstore` decides and reports back.
//!
//! Knows nothing about sockets: connections hand messages in and own an [`Outbox`] that replies go to. Read
//! `logstore::Log` first; every `handle_*` here is its namesake there, followed by carrying out its commands.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    rc::{Rc, Weak},
    sync::Arc,
};

use consensus::{
    CatchUpTask, Configuration, ConfigurationError, FenceAccepted,
    message::{AcceptorMessage, AcceptorStatus, Append, ProposerMessage, Refusal, Refused},
};
use driver::{AlignedBuffer, Event, oneshot};
use layers::{ShardGeneration, ShardId};
use logstore::{Buffer, ConsumerError, Log, LogCommand, OpId, OpResult, Reader, ShardError};
use pgtypes::{Generation, Instant, LogId, Lsn, SystemId, Term, WriterId};
use wire::append::{ErrorCode, ErrorFrame, Message};

use crate::{
    api::LogStatus,
    core::Core,
    feed::Feeds,
    files::{LogFiles, ReadError},
    metrics::LogMetrics,
    outbox::Outbox,
    peers,
    process::Process,
    spares::TakeError,
};

/// A log that this core serves.
pub struct LogDriver {
    id: LogId,
    process: Arc<Process>,
    core: Weak<Core>,
    /// For the tasks that outlive a call.
    this: Weak<LogDriver>,
    machine: RefCell<Log>,
    files: LogFiles,
    metrics: LogMetrics,
    /// What the metrics were told last.
    measured: Cell<Lsn>,
    /// Where replies go, by connection.
    outboxes: RefCell<BTreeMap<u64, Rc<Outbox>>>,
    feeds: Rc<Feeds>,
    fences: RefCell<BTreeMap<u64, oneshot::Sender<Result<FenceAccepted, Refused>>>>,
    configurations: RefCell<BTreeMap<u64, oneshot::Sender<Result<Generation, ConfigurationError>>>>,
    next_request: Cell<u64>,
    /// Set after every event: positions or room may have changed.
    changed: Event,
    timer: Cell<Option<Instant>>,
    /// Number of the latest catch-up; an older one ends.
    catch_up: Cell<u64>,
    /// A round of asking peers for ballots is under way.
    asking: Cell<bool>,
    /// Disk operations under way.
    operations: Cell<usize>,
    /// No command is carried out any more.
    closed: Cell<bool>,
}

impl LogDriver {
    /// Serves `machine`, whose files are `files`, on `core`.
    pub fn start(core: &Rc<Core>, id: LogId, machine: Log, files: LogFiles) -> Rc<Self> {
        let process = core.process.clone();
        let metrics = process.metrics.of_log(id);
        let flush_lsn = machine.acceptor().flush().record_end;
        let log = Rc::new_cyclic(|this| LogDriver {
            id,
            core: Rc::downgrade(core),
            this: this.clone(),
            machine: RefCell::new(machine),
            files,
            metrics,
            measured: Cell::new(flush_lsn),
            outboxes: RefCell::default(),
            feeds: Rc::default(),
            fences: RefCell::default(),
            configurations: RefCell::default(),
            next_request: Cell::new(1),
            changed: Event::new(),
            timer: Cell::new(None),
            catch_up: Cell::new(0),
            asking: Cell::new(false),
            operations: Cell::new(0),
            closed: Cell::new(false),
            process,
        });
        core.add(log.clone());
        log.pump();
        log
    }

    /// Which log.
    pub fn id(&self) -> LogId {
        self.id
    }

    /// The process that it belongs to.
    pub fn process(&self) -> &Arc<Process> {
        &self.process
    }

    /// Its files.
    pub fn files(&self) -> &LogFiles {
        &self.files
    }

    /// Page servers that it feeds.
    pub fn feeds(&self) -> &Rc<Feeds> {
        &self.feeds
    }

    /// Makes everybody who waits for the log look at it again.
    pub fn wake(&self) {
        self.changed.set();
    }

    /// Looks at the machine.
    pub fn with<T>(&self, look: impl FnOnce(&Log) -> T) -> T {
        look(&self.machine.borrow())
    }

    /// PostgreSQL's identifier.
    pub fn system(&self) -> SystemId {
        self.with(|log| log.acceptor().identity().system)
    }

    /// As the first message on a connection says it.
    pub fn status(&self) -> AcceptorStatus {
        self.with(|log| log.acceptor().status())
    }

    /// As the admin port says it.
    pub fn api_status(&self) -> LogStatus {
        self.with(|log| {
            let identity = log.acceptor().identity();
            let timelines = &log.acceptor().state().timelines;
            LogStatus::new(identity, timelines, &log.status(), &self.feeds.subscribers())
        })
    }

    /// Waits until `condition` gives a value; it is evaluated again after every event of the log. Dropping the future
    /// loses nothing.
    pub async fn until<T>(&self, mut condition: impl FnMut(&Log) -> Option<T>) -> T {
        self.changed.until(|| condition(&self.machine.borrow())).await
    }

    /// Waits until the machine has room for more WAL, so that memory stays bounded while the disk is slow. A log that takes
    /// no more has room: it refuses.
    pub async fn until_room(&self) {
        let condition = || {
            let machine = self.machine.borrow();
            self.closed.get() || machine.has_room() || machine.is_failed()
        };
        self.changed.until(|| condition().then_some(())).await;
    }

    /// Replies to `connection` go to `outbox` from now on.
    pub fn connect(&self, connection: u64, outbox: Rc<Outbox>) {
        self.outboxes.borrow_mut().insert(connection, outbox);
    }

    /// The connection has ended.
    pub fn disconnect(&self, connection: u64) {
        self.outboxes.borrow_mut().remove(&connection);
        self.event(|log| log.handle_disconnected(connection));
    }

    /// A message that carries no WAL.
    pub fn handle_message(&self, connection: u64, message: ProposerMessage, now: Instant) {
        self.event(|log| log.handle_message(connection, message, now));
    }

    /// An append and its WAL.
    pub fn handle_append(&self, connection: u64, append: &Append, payload: &[u8], now: Instant) {
        self.event(|log| log.handle_append(connection, append, payload, now));
    }

    /// The time that the machine asked for has come.
    pub fn handle_timeout(&self, now: Instant) {
        self.event(|log| log.handle_timeout(now));
    }

    /// Fences all terms below `term`; the answer arrives when it is durable.
    pub fn fence(&self, term: Term, writer: WriterId, answer: oneshot::Sender<Result<FenceAccepted, Refused>>) {
        let request = self.next_request.replace(self.next_request.get() + 1);
        self.fences.borrow_mut().insert(request, answer);
        self.event(|log| log.handle_fence(request, term, writer, driver::now()));
    }

    /// Changes the membership; the answer arrives when it is durable.
    pub fn configure(
        &self,
        configuration: Configuration,
        answer: oneshot::Sender<Result<Generation, ConfigurationError>>,
    ) {
        let request = self.next_request.replace(self.next_request.get() + 1);
        self.configurations.borrow_mut().insert(request, answer);
        self.event(|log| log.handle_configuration(request, configuration, driver::now()));
    }

    /// What a peer knows of the ballots.
    pub fn handle_peer_ballot(&self, term: Term, writer: WriterId) {
        self.event(|log| log.handle_peer_ballot(term, writer, driver::now()));
    }

    /// WAL fetched from a peer.
    ///
    /// # Errors
    /// As [`Log::handle_fetched`].
    pub fn handle_fetched(&self, task: &CatchUpTask, begin: Lsn, bytes: &[u8]) -> Result<(), Refusal> {
        self.event(|log| log.handle_fetched(task.ballot, begin, bytes, driver::now()))
    }

    /// Registers a consumer of WAL or moves its position; WAL below all consumers' positions is removed.
    ///
    /// # Errors
    /// [`ConsumerError`]: nothing was changed.
    pub fn set_consumer(&self, name: &str, confirmed_lsn: Lsn) -> Result<(), ConsumerError> {
        self.event(|log| {
            let now = driver::now();
            log.set_consumer(name, confirmed_lsn, now)?;
            raise_horizon(log, now);
            Ok(())
        })
    }

    /// Forgets a consumer; `false` when there is none of that name.
    pub fn remove_consumer(&self, name: &str) -> bool {
        self.event(|log| {
            let now = driver::now();
            let known = log.remove_consumer(name, now);
            raise_horizon(log, now);
            known
        })
    }

    /// Registers the owner of a shard; returns the version of the consumers that has to become durable.
    ///
    /// # Errors
    /// [`ShardError`]: nothing was changed.
    pub fn register_shard(&self, shard: ShardId, generation: ShardGeneration) -> Result<u64, ShardError> {
        self.event(|log| {
            let now = driver::now();
            log.register_shard(shard, generation, now)?;
            raise_horizon(log, now);
            Ok(log.consumers_version())
        })
    }

    /// Moves what a shard has on object storage; WAL below what everybody has is removed.
    ///
    /// # Errors
    /// As above.
    pub fn confirm_shard(
        &self,
        shard: ShardId,
        generation: ShardGeneration,
        durable_lsn: Lsn,
    ) -> Result<(), ShardError> {
        self.event(|log| {
            let now = driver::now();
            log.confirm_shard(shard, generation, durable_lsn, now)?;
            raise_horizon(log, now);
            Ok(())
        })
    }

    /// Forgets a shard; `false` when there is none of that number.
    pub fn remove_shard(&self, shard: ShardId) -> bool {
        self.event(|log| {
            let now = driver::now();
            let known = log.remove_shard(shard, now);
            raise_horizon(log, now);
            self.process.metrics.remove_shard(self.id, shard.0);
            known
        })
    }

    /// Reads WAL from `begin` on: at least one byte, at most `max`, none at or beyond `until` or beyond what `reader` may
    /// read. The bytes may end inside a record.
    ///
    /// # Errors
    /// [`ReadError`]; a damaged segment is reported once, and never served again.
    pub async fn read(&self, begin: Lsn, until: Lsn, max: usize, reader: Reader) -> Result<AlignedBuffer, ReadError> {
        let check = || {
            let machine = self.machine.borrow();
            let oldest = machine.oldest_lsn();
            match machine.readable(begin, reader) {
                Ok(readable) if readable > begin => {
                    let sealed = machine.segment(begin).is_some_and(|segment| segment.sealed);
                    Ok((readable.min(until), sealed))
                }
                Ok(readable) => Err(ReadError::NotAvailable { begin, oldest, readable }),
                Err(logstore::ReadError::Removed { oldest_lsn }) => Err(ReadError::NotAvailable {
                    begin,
                    oldest: oldest_lsn,
                    readable: machine.acceptor().commit_lsn(),
                }),
                Err(logstore::ReadError::Damaged { start }) => Err(ReadError::KnownDamaged { start }),
            }
        };
        let (until, sealed) = check()?;
        let result = self.files.read(begin, until, max, sealed).await;
        if let Err(ReadError::Damaged { start, .. }) = &result {
            self.event(|log| log.handle_damaged(*start));
        }
        let mut bytes = result.inspect_err(|error| self.report(error))?;
        // The segment may have been removed, and its file recycled, during the read: then the bytes are another's.
        let (still, _) = check()?;
        let length = bytes.len().min(still.bytes_since(begin) as usize);
        if length < bytes.len() {
            bytes = bytes.window(0, length);
        }
        Ok(bytes)
    }

    /// Reads committed WAL from `begin` on, for followers and readers; see [`LogDriver::read`].
    ///
    /// # Errors
    /// As there.
    pub async fn read_wal(&self, begin: Lsn, max: usize) -> Result<AlignedBuffer, ReadError> {
        self.read(begin, Lsn::MAX, max, Reader::Anyone).await
    }

    fn report(&self, error: &ReadError) {
        let start = match error {
            ReadError::NotAvailable { .. } | ReadError::KnownDamaged { .. } => return,
            ReadError::Damaged { start, .. } | ReadError::Io { start, .. } => start,
        };
        if self.process.notices.is_new(&format!("segment {start} of {}", self.id), driver::now()) {
            self.process.metrics.damaged_segments.inc();
            tracing::error!(log = %self.id, %error, "segment is not served; its WAL is to be had from another member");
        }
    }

    /// Carries out no command any more and waits for the disk operations under way. Proposers are told why.
    pub async fn close(&self, code: ErrorCode, text: &str) {
        self.closed.set(true);
        self.catch_up.set(self.catch_up.get() + 1);
        for outbox in self.outboxes.borrow().values() {
            outbox.push(&Message::Error(ErrorFrame { code, text: text.to_owned() }));
            outbox.close();
        }
        self.changed.set();
        self.changed.until(|| (self.operations.get() == 0).then_some(())).await;
        if let Some(core) = self.core.upgrade() {
            core.set_timer(self.id, self.timer.take(), None);
        }
        // Whoever waits for an answer is told that there is none.
        self.fences.borrow_mut().clear();
        self.configurations.borrow_mut().clear();
    }

    /// Whether the log was deleted or the process is ending.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Whether the catch-up of that number is still wanted.
    pub fn is_current_catch_up(&self, number: u64) -> bool {
        self.catch_up.get() == number && !self.closed.get()
    }

    fn event<T>(&self, happen: impl FnOnce(&mut Log) -> T) -> T {
        let result = happen(&mut self.machine.borrow_mut());
        self.pump();
        result
    }

    /// Carries out what the machine wants.
    fn pump(&self) {
        loop {
            let command = self.machine.borrow_mut().poll_command();
            match command {
                Some(command) if !self.closed.get() => self.carry_out(command),
                Some(_) => {}
                None => break,
            }
        }
        let (timer, flush, commit, oldest) = {
            let machine = self.machine.borrow();
            (
                machine.poll_timeout(),
                machine.acceptor().flush().record_end,
                machine.acceptor().commit_lsn(),
                machine.oldest_lsn(),
            )
        };
        if let Some(core) = self.core.upgrade().filter(|_| !self.closed.get()) {
            core.set_timer(self.id, self.timer.replace(timer), timer);
        }
        self.metrics.appended_bytes.inc_by(flush.bytes_since(self.measured.replace(flush)));
        self.metrics.flush_lsn.set(flush.0 as i64);
        self.metrics.commit_lsn.set(commit.0 as i64);
        self.metrics.oldest_lsn.set(oldest.0 as i64);
        self.changed.set();
    }

    fn carry_out(&self, command: LogCommand) {
        match command {
            LogCommand::Reply { connection, message } => {
                if let AcceptorMessage::Refused(refused) = &message {
                    self.process.metrics.count_refusal(refusal_word(&refused.reason));
                    self.note_refusal(refused);
                }
                if let Some(outbox) = self.outboxes.borrow().get(&connection) {
                    outbox.push(&Message::Acceptor(message));
                }
            }
            LogCommand::ReplyFence { request, result } => {
                if let Some(answer) = self.fences.borrow_mut().remove(&request) {
                    // Whoever asked may have given up; the fence holds all the same.
                    let _ = answer.send(result);
                }
            }
            LogCommand::ReplyConfiguration { request, result } => {
                if let Some(answer) = self.configurations.borrow_mut().remove(&request) {
                    // As above.
                    let _ = answer.send(result);
                }
            }
            LogCommand::AskPeers => {
                if !self.asking.replace(true)
                    && let Some(this) = self.this.upgrade()
                {
                    driver::spawn(async move {
                        peers::ask_for_ballots(&this).await;
                        this.asking.set(false);
                    });
                }
            }
            LogCommand::CatchUp(task) => {
                let number = self.catch_up.get() + 1;
                self.catch_up.set(number);
                if let Some(this) = self.this.upgrade() {
                    driver::spawn(async move { peers::catch_up(&this, task, number).await });
                }
            }
            LogCommand::TakeSegment { op, start } => self.operate(op, async move |this| {
                let destination = this.files.segment_path(start);
                match this.process.spares.take(&destination, start).await {
                    Ok(()) => OpResult::Done,
                    Err(TakeError::DiskFull) => OpResult::NoSpace(None),
                    Err(TakeError::Io(error)) => this.failed("take a segment", &error, None),
                }
            }),
            LogCommand::Write { op, segment, offset, buffer, durable } => self.operate(op, async move |this| {
                let begun = driver::now();
                let (result, buffer) = this.files.write(segment, offset, buffer, durable).await;
                if durable && result.is_ok() {
                    this.flushed_since(begun);
                }
                this.written("write WAL", result, buffer)
            }),
            LogCommand::Read { op, segment, offset, buffer } => {
                self.operate(op, async move |this| match this.files.read_blocks(segment, offset, buffer).await {
                    (Ok(()), buffer) => OpResult::Read(buffer),
                    (Err(error), _) => this.failed("read WAL", &error, None),
                })
            }
            LogCommand::Sync { op, first, last } => self.operate(op, async move |this| {
                let begun = driver::now();
                match this.files.sync(first, last).await {
                    Ok(()) => {
                        this.flushed_since(begun);
                        OpResult::Done
                    }
                    // Also when the disk is full: what a failed sync has lost stays lost.
                    Err(error) => {
                        this.report_failure("sync WAL", &error);
                        OpResult::Failed
                    }
                }
            }),
            LogCommand::RemoveSegment { op, start, complete } => self.operate(op, async move |this| {
                this.files.forget(start);
                match this.process.spares.give(this.files.segment_path(start), start, complete).await {
                    Ok(()) => OpResult::Done,
                    Err(error) => this.failed("remove a segment", &error, None),
                }
            }),
            LogCommand::WriteControl { op, copy, buffer } => self.operate(op, async move |this| {
                let (result, buffer) = this.files.write_control(copy, buffer).await;
                this.written("write the control file", result, buffer)
            }),
        }
    }

    /// Runs a disk operation beside everything else and hands its result to the machine.
    fn operate(&self, op: OpId, operation: impl AsyncFnOnce(&Rc<LogDriver>) -> OpResult + 'static) {
        let Some(this) = self.this.upgrade() else { return };
        self.operations.set(self.operations.get() + 1);
        driver::spawn(async move {
            let result = operation(&this).await;
            this.operations.set(this.operations.get() - 1);
            this.event(|log| log.handle_done(op, result, driver::now()));
        });
    }

    fn flushed_since(&self, begun: Instant) {
        self.process.metrics.flushes.inc();
        self.process.metrics.flush_seconds.observe(driver::now().since(begun).as_secs_f64());
    }

    fn written(&self, what: &str, result: io::Result<()>, buffer: Buffer) -> OpResult {
        match result {
            Ok(()) => OpResult::Written(buffer),
            Err(error) => self.failed(what, &error, Some(buffer)),
        }
    }

    fn failed(&self, what: &str, error: &io::Error, buffer: Option<Buffer>) -> OpResult {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            if self.process.notices.is_new("disk full", driver::now()) {
                tracing::error!(log = %self.id, what, %error, "data disk is full: appends are refused until space returns");
            }
            return OpResult::NoSpace(buffer);
        }
        self.report_failure(what, error);
        OpResult::Failed
    }

    fn report_failure(&self, what: &str, error: &io::Error) {
        if self.process.notices.is_new(&format!("disk of {}", self.id), driver::now()) {
            tracing::error!(log = %self.id, what, %error, "the disk failed: this log is read-only until the process is restarted");
        }
    }

    fn note_refusal(&self, refused: &Refused) {
        let word = refusal_word(&refused.reason);
        if self.process.notices.is_new(&format!("{word} {}", self.id), driver::now()) {
            tracing::warn!(
                log = %self.id,
                reason = ?refused.reason,
                known_ballot = %refused.ballot,
                known_writer = %refused.writer,
                "refused a proposer"
            );
        }
    }
}

/// WAL below what all consumers and shards have confirmed is needed by nobody. A log with neither keeps everything.
fn raise_horizon(log: &mut Log, now: Instant) {
    let consumers = log.consumers().iter().map(|consumer| consumer.confirmed_lsn);
    let shards = log.shards().iter().map(|shard| shard.durable_lsn);
    if let Some(horizon) = consumers.chain(shards).min() {
        log.handle_horizon(horizon, now);
    }
}

fn refusal_word(reason: &Refusal) -> &'static str {
    match reason {
        Refusal::Fenced => "fenced",
        Refusal::OtherWriter => "other_writer",
        Refusal::TermNotGranted { .. } => "term_not_granted",
        Refusal::StaleAttempt => "stale_attempt",
        Refusal::StaleGeneration => "stale_generation",
        Refusal::NotAMember => "not_a_member",
        Refusal::NotElected => "not_elected",
        Refusal::Gap { .. } => "gap",
        Refusal::BadWal { .. } => "bad_wal",
        Refusal::Malformed { .. } => "malformed",
        Refusal::DiskFull => "disk_full",
        Refusal::DiskFailed => "disk_failed",
    }
}
