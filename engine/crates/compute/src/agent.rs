//! The agent: takes a grant, elects, brings PGDATA to the end of the log, runs PostgreSQL, and ends it when it must.
//!
//! Runs on the main thread, step by step; the core (`core.rs`) does everything that has to be quick. While a step takes long
//! (restoring), a fence or a stop reaches it through [`Mailbox`].

mod cold_start;
mod free_space;
mod launch;
mod run_end;

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{Receiver, Sender, sync_channel},
    },
    time::{Duration, Instant},
};

use consensus::{Configuration, Grant, Member};
use identity::Tls;
use pgtypes::{Ballot, DiskId, Generation, Incarnation, Lsn, PgTimeline, SystemId, WriterId};
use vfs_abi::Written;

use self::{
    cold_start::{ADVISORY_INTERVAL, AdvisoryKeeper},
    run_end::{Hurry, RunEnd},
};
use crate::{
    area::SharedArea,
    base::{self, Base},
    cache::SharedBlocks,
    cold_start::ColdStartError,
    config::Config,
    core::{Core, CoreEnded},
    data_dir::{CleanMark, DataDir, DataDirError},
    framer::FramerError,
    isolation::{Isolation, User},
    metrics::Metrics,
    page_service_config::PageServiceConfig,
    pages::{Pages, PagesCommand},
    postgres::{Ended, Postgres, PostgresEvent, postmaster_status},
    recovery::{BasePosition, Plan, PlanError, Situation, plan},
    restore::{self, RestoreError},
    routes::{GrantRefused, Request},
    session::{Attachment, CoreCommand, CoreEvent, ElectedEvent, KillSlot},
    shard_map::{ShardMap, ShardMapRefused},
    shared_memory,
    status::{State, Status},
};

/// How often a starting PostgreSQL is asked whether it is ready.
const READY_INTERVAL: Duration = Duration::from_millis(5);
/// How long an end without a checkpoint may take before PostgreSQL is killed.
const IMMEDIATE_LIMIT: Duration = Duration::from_secs(5);
/// How long the last WAL of a cleanly ended PostgreSQL may take to be committed: it waited for that itself already.
const FINISH_LIMIT: Duration = Duration::from_secs(5);
/// A PostgreSQL that ran for this long had a good start: the next end of it is answered at once.
const GOOD_RUN: Duration = Duration::from_secs(30);
/// Longest pause before another attempt.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// First pause, after a PostgreSQL that did not run for long.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// Everything that reaches the agent.
pub enum Event {
    /// From the admin port.
    Request(Request),
    /// SIGTERM or SIGINT.
    Signal,
    /// From the core, with its session.
    Core(u64, CoreEvent),
    /// From PostgreSQL, with its run.
    Postgres(u64, PostgresEvent),
    /// A page server knows a later writer; with the run of PostgreSQL whose blocks were asked for.
    StaleTerm(u64, String),
}

/// What other threads may do to the agent while it is busy.
#[derive(Clone)]
pub struct Mailbox {
    events: Sender<Event>,
    interrupted: Arc<AtomicBool>,
}

impl Mailbox {
    /// A mailbox and its other end. Unbounded: admin connections are bounded, and a session or run has a handful of events.
    pub fn new() -> (Self, Receiver<Event>) {
        let (events, received) = std::sync::mpsc::channel();
        (Self { events, interrupted: Arc::default() }, received)
    }

    /// Hands an event over.
    pub fn post(&self, event: Event) {
        let interrupts =
            matches!(event, Event::Signal | Event::Request(Request::Stop) | Event::Core(_, CoreEvent::Fenced { .. }));
        if interrupts {
            self.interrupted.store(true, SeqCst);
        }
        // The agent has ended: nobody is left to care.
        let _unheard = self.events.send(event);
    }
}

/// Why the agent ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its directory is unusable.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A thread of it ended.
    #[error(transparent)]
    Core(#[from] CoreEnded),
}

/// Why an attempt was not finished.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// What the page service gave does not make a PGDATA.
    #[error("the page service's base backup: {0}")]
    Backup(#[from] backup::PlanError),
    #[error("cold start: {0}")]
    ColdStart(ColdStartError),
    #[error("start PostgreSQL: {0}")]
    Launch(#[from] std::io::Error),
}

impl From<ColdStartError> for AttemptError {
    fn from(error: ColdStartError) -> Self {
        match error {
            ColdStartError::Restore(error) => AttemptError::Restore(error),
            error => AttemptError::ColdStart(error),
        }
    }
}

impl From<DataDirError> for AttemptError {
    fn from(error: DataDirError) -> Self {
        AttemptError::Agent(error.into())
    }
}

impl From<CoreEnded> for AttemptError {
    fn from(error: CoreEnded) -> Self {
        AttemptError::Agent(error.into())
    }
}

/// How an attempt ended.
enum Outcome {
    /// The agent was told to stop, and PostgreSQL is gone.
    Stop,
    /// The log belongs to another writer.
    Fenced,
    /// PostgreSQL ended, or did not start: try again with the next attempt.
    Again(String),
    /// A higher term was granted to this writer.
    Regranted,
    /// A person must act.
    Failed(String),
}

/// What does not change while the agent runs.
pub struct Settings {
    /// The configuration.
    pub config: Config,
    /// Where PGDATA comes from.
    pub source: Source,
    /// Our own binary.
    pub helper: PathBuf,
    /// How PostgreSQL's processes are held together.
    pub isolation: Isolation,
    /// Whom PostgreSQL runs as, when not as the agent.
    pub user: Option<User>,
    /// Certificates; `None` by the development flag.
    pub tls: Option<Tls>,
}

/// Where PGDATA comes from.
pub enum Source {
    /// A base backup, and the log behind it.
    BaseBackup(Box<Base>),
    /// The page service, as of the end of the log.
    PageService(PageServiceConfig),
}

impl Source {
    /// Name in the log.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Source::BaseBackup(_) => "base_backup",
            Source::PageService(_) => "page_service",
        }
    }

    /// The system identifier that safekeepers compare with theirs; 0 where nobody has told it yet.
    pub fn system_id(&self) -> SystemId {
        match self {
            Source::BaseBackup(base) => base.control.system_id,
            Source::PageService(_) => SystemId::default(),
        }
    }
}

/// A PGDATA that is ready to be started.
struct Prepared {
    /// Its WAL segment size.
    segment_bytes: u64,
    /// Its system identifier.
    system_id: SystemId,
    /// WAL in it that continues the log.
    continues: Option<Written>,
    /// The start of the last record that it must replay from the safekeepers.
    replay_to: Option<Lsn>,
    /// Hint bits must be in WAL for the page service to know them, and no checksums see to it.
    hints_need_wal: bool,
    /// Where its blocks are, and what the page service has of the rest; none where all of it is local.
    cache: Option<(SharedBlocks, AdvisoryKeeper)>,
}

/// The agent.
pub struct Agent {
    settings: Settings,
    data_dir: DataDir,
    core: Core,
    pages: Option<Pages>,
    mailbox: Mailbox,
    events: Receiver<Event>,
    status: Status,
    metrics: Metrics,
    grant: Option<Grant>,
    /// The term in which this writer was fenced last.
    fenced_term: Option<u64>,
    /// PGDATA is a fresh copy of the base backup that no PostgreSQL has touched.
    pristine: bool,
    stop_wishes: u32,
    sessions: u64,
    runs: u64,
}

impl Agent {
    /// An agent that remembers what its directory says.
    ///
    /// # Errors
    /// The directory holds a damaged grant.
    pub fn new(
        settings: Settings,
        data_dir: DataDir,
        core: Core,
        pages: Option<Pages>,
        (mailbox, events): (Mailbox, Receiver<Event>),
        status: Status,
        metrics: Metrics,
    ) -> Result<Self, AgentError> {
        let kept = data_dir.read_grant()?;
        // Of an earlier identity of this directory: worth nothing, and no reason to fail.
        let grant = kept.filter(|grant| grant.writer == settings.config.writer);
        if let Source::PageService(service) = &settings.source {
            status.facts().shard_map = Some(service.shard_map());
        }
        Ok(Self {
            settings,
            data_dir,
            core,
            pages,
            mailbox,
            events,
            status,
            metrics,
            grant,
            fenced_term: None,
            pristine: false,
            stop_wishes: 0,
            sessions: 0,
            runs: 0,
        })
    }

    /// Runs until it is told to stop.
    ///
    /// # Errors
    /// Its directory is unusable, or a thread ended.
    pub fn run(mut self) -> Result<(), AgentError> {
        let mut idle = State::WaitingForGrant;
        loop {
            let grant = match self.grant {
                Some(grant) if idle == State::WaitingForGrant => grant,
                _ => match self.wait_for_grant(idle)? {
                    Some(grant) => grant,
                    None => return Ok(()),
                },
            };
            idle = match self.reign(grant)? {
                Outcome::Stop => return Ok(()),
                Outcome::Regranted | Outcome::Again(_) => State::WaitingForGrant,
                Outcome::Fenced => {
                    self.fenced_term = Some(grant.term.0);
                    match self.grant {
                        // Granted while the earlier term was being lost.
                        Some(later) if later.term > grant.term => State::WaitingForGrant,
                        _ => State::Fenced,
                    }
                }
                Outcome::Failed(message) => {
                    tracing::error!("{message}");
                    self.status.facts().last_error = Some(message);
                    State::Failed
                }
            };
        }
    }

    /// Waits in `state` until there is something to do; `None` to stop.
    fn wait_for_grant(&mut self, state: State) -> Result<Option<Grant>, AgentError> {
        self.core.send(CoreCommand::End)?;
        self.pages_send(PagesCommand::End)?;
        self.status.set_state(state);
        if state == State::WaitingForGrant
            && let Err(error) = self.restore_ahead()
        {
            // The attempt will say it again, if it is still so.
            tracing::info!(%error, "the base backup cannot be restored ahead of the grant");
        }
        loop {
            if self.stop_wishes > 0 {
                return Ok(None);
            }
            match self.next_event(None) {
                Some(Event::Request(Request::Grant { grant, reply })) => {
                    let answer = self.take_grant(grant);
                    let taken = answer.is_ok();
                    let _unheard = reply.send(answer);
                    if taken {
                        return Ok(Some(grant));
                    }
                }
                Some(event) => self.handle_late(event),
                None => return Ok(None),
            }
        }
    }

    /// Asks the pages' core for something, where there is one.
    fn pages_send(&mut self, command: PagesCommand) -> Result<(), CoreEnded> {
        self.pages.as_mut().map_or(Ok(()), |pages| pages.send(command))
    }

    /// Attempt after attempt, until the term is over.
    fn reign(&mut self, grant: Grant) -> Result<Outcome, AgentError> {
        let mut backoff = Duration::ZERO;
        loop {
            let started = Instant::now();
            let outcome = match self.attempt(grant) {
                Ok(outcome) => outcome,
                Err(AttemptError::Agent(error)) => return Err(error),
                Err(AttemptError::Plan(error)) => Outcome::Failed(error.to_string()),
                Err(AttemptError::Restore(RestoreError::Interrupted)) => self.interrupted_outcome(),
                Err(error) => Outcome::Again(error.to_string()),
            };
            let Outcome::Again(reason) = outcome else { return Ok(outcome) };
            tracing::warn!("{reason}: recovering from the safekeepers");
            self.status.facts().last_error = Some(reason);
            backoff = match started.elapsed() > GOOD_RUN {
                true => Duration::ZERO,
                false => (backoff * 2).clamp(BACKOFF_MIN, BACKOFF_MAX),
            };
            let until = Instant::now() + backoff;
            while self.stop_wishes == 0 {
                let left = until.saturating_duration_since(Instant::now());
                match self.next_event(Some(left)) {
                    Some(event) => self.handle_late(event),
                    None => break,
                }
            }
            if self.stop_wishes > 0 {
                return Ok(Outcome::Stop);
            }
        }
    }

    /// One election and, if it is won, one run of PostgreSQL.
    fn attempt(&mut self, grant: Grant) -> Result<Outcome, AttemptError> {
        {
            let mut facts = self.status.facts();
            facts.ballot = Some(Ballot { term: grant.term, ..Ballot::default() });
            facts.end_of_log = None;
            facts.postgres_pid = None;
            facts.recovery = None;
        }
        self.status.set_state(State::Electing);
        self.sessions += 1;
        self.mailbox.interrupted.store(self.stop_wishes > 0, SeqCst);
        let incarnation = Incarnation(random()?);
        self.metrics.elections.inc();
        self.core.send(CoreCommand::Elect {
            session: self.sessions,
            grant,
            incarnation,
            configuration: self.configured_members(),
        })?;
        // While the votes are under way.
        if let Source::PageService(service) = &self.settings.source {
            self.begin_pages(&service.clone(), Ballot { term: grant.term, ..Ballot::default() })?;
        }
        self.restore_ahead()?;
        let elected = match self.wait_for_election(grant)? {
            Ok(elected) => elected,
            Err(outcome) => return Ok(outcome),
        };
        tracing::info!(ballot = %elected.ballot, end_of_log = %elected.end_of_log.record_end, "elected");
        self.status.facts().ballot = Some(elected.ballot);
        self.status.facts().end_of_log = Some(elected.end_of_log.record_end);
        self.status.set_state(State::Recovering);
        self.recover_and_run(&elected)
    }

    /// Restores the base backup unless PGDATA may be used as it is; where the log ends does not matter for that.
    fn restore_ahead(&mut self) -> Result<(), AttemptError> {
        if self.data_dir.read_clean()?.is_none() {
            self.restore_base()?;
        }
        Ok(())
    }

    fn restore_base(&mut self) -> Result<(), RestoreError> {
        let Settings { config, source, user, .. } = &self.settings;
        let (false, Source::BaseBackup(base), Some(base_backup)) = (self.pristine, source, &config.base_backup) else {
            return Ok(());
        };
        self.forget_shared_memory();
        restore::restore(base_backup, base, &self.data_dir.pgdata(), user.as_ref(), &self.mailbox.interrupted)?;
        self.pristine = true;
        Ok(())
    }

    /// Left behind when a whole container was killed: once PGDATA is replaced nothing names it any more.
    fn forget_shared_memory(&self) {
        if let Err(error) = shared_memory::remove_left_behind(&self.data_dir.pgdata()) {
            tracing::warn!(%error, "shared memory of an earlier PostgreSQL stays behind (ipcs -m)");
        }
    }

    fn wait_for_election(&mut self, grant: Grant) -> Result<Result<Box<ElectedEvent>, Outcome>, AgentError> {
        loop {
            if self.stop_wishes > 0 {
                return Ok(Err(Outcome::Stop));
            }
            if self.grant.is_some_and(|later| later.term > grant.term) {
                return Ok(Err(Outcome::Regranted));
            }
            match self.next_event(None) {
                Some(Event::Core(session, CoreEvent::Elected(elected))) if session == self.sessions => {
                    return Ok(Ok(elected));
                }
                Some(Event::Core(session, CoreEvent::Fenced { ballot, writer })) if session == self.sessions => {
                    self.note_fenced(ballot, writer);
                    return Ok(Err(Outcome::Fenced));
                }
                Some(event) => self.handle_late(event),
                // Every sender is gone: the process is ending.
                None => return Ok(Err(Outcome::Stop)),
            }
        }
    }

    /// Why the restore was interrupted: by a wish to stop, or by the fence.
    fn interrupted_outcome(&mut self) -> Outcome {
        while let Some(event) = self.next_event(Some(Duration::ZERO)) {
            match event {
                Event::Core(_, CoreEvent::Fenced { ballot, writer }) => self.note_fenced(ballot, writer),
                event => self.handle_late(event),
            }
        }
        if self.stop_wishes > 0 { Outcome::Stop } else { Outcome::Fenced }
    }

    fn recover_and_run(&mut self, elected: &ElectedEvent) -> Result<Outcome, AttemptError> {
        let prepared = match &self.settings.source {
            Source::BaseBackup(base) => self.recover_from(&Base::clone(base), elected)?,
            Source::PageService(service) => match self.cold_start(&service.clone(), elected)? {
                Ok(prepared) => prepared,
                Err(outcome) => return Ok(outcome),
            },
        };
        self.run_postgres(elected, prepared)
    }

    /// Brings the base backup, or PGDATA as it is, to the end of the log.
    fn recover_from(&mut self, base: &Base, elected: &ElectedEvent) -> Result<Prepared, AttemptError> {
        let pgdata = self.data_dir.pgdata();
        let mark = self.data_dir.read_clean()?;
        let local_end = mark.and_then(|_| base::inspect(&pgdata).ok()).map(|local| local.end.record_end);
        let timelines: Vec<(PgTimeline, Lsn)> =
            elected.timelines.0.iter().map(|entry| (entry.timeline, entry.start_lsn)).collect();
        let plan = plan(&Situation {
            log: self.settings.config.log_id(),
            end_of_log: elected.end_of_log,
            timelines: &timelines,
            base: BasePosition { end: base.end.record_end, segment_start: base.start_lsn, timeline: base.timeline() },
            mark,
            local_end,
        })?;
        tracing::info!(?plan, "recovery");
        // Before anything changes PGDATA: from here on only a clean stop makes it trustworthy again.
        self.data_dir.remove_clean()?;
        if plan != Plan::Reuse {
            self.restore_base()?;
        }
        self.pristine = false;
        if let Plan::Replay { .. } = plan {
            restore::prepare_replay(&pgdata, &elected.timelines, self.settings.user.as_ref())?;
        }
        self.status.facts().recovery = Some(match plan {
            Plan::Reuse => "reuse",
            Plan::StartFromBase => "base_backup",
            Plan::Replay { .. } => "replay",
        });
        let base_end = base.end.record_end;
        // The base backup's own WAL behind X is the log's continuation.
        let continues = plan == Plan::StartFromBase && base_end > elected.end_of_log.record_end;
        Ok(Prepared {
            segment_bytes: base.segment_bytes(),
            system_id: base.control.system_id,
            continues: continues.then_some(written_to(base_end, base.timeline())),
            replay_to: match plan {
                Plan::Replay { last_record } => Some(last_record),
                Plan::Reuse | Plan::StartFromBase => None,
            },
            hints_need_wal: false,
            cache: None,
        })
    }

    fn run_postgres(&mut self, elected: &ElectedEvent, mut prepared: Prepared) -> Result<Outcome, AttemptError> {
        let config = &self.settings.config;
        let pgdata = self.data_dir.pgdata();
        let lease_wait_ms = u32::try_from(config.lease_wait_timeout.as_millis()).unwrap_or(u32::MAX);
        let area = SharedArea::create(prepared.segment_bytes, lease_wait_ms)?;
        *self.metrics.area.lock().unwrap_or_else(PoisonError::into_inner) = Some(area.clone());
        let killer: KillSlot = Arc::new(Mutex::new(None));
        let launch = self.launch(elected, &prepared, &area)?;
        self.serve_blocks(&prepared, &area)?;
        self.core.send(CoreCommand::Attach(Attachment {
            area,
            pgdata: pgdata.clone(),
            segment_bytes: prepared.segment_bytes,
            system_id: prepared.system_id,
            written_before: prepared.continues,
            blocks: prepared.cache.as_ref().map(|(blocks, _)| blocks.clone()),
            killer: killer.clone(),
        }))?;
        self.runs += 1;
        let run = self.runs;
        let mailbox = self.mailbox.clone();
        let postgres = Postgres::launch(&launch, move |event| mailbox.post(Event::Postgres(run, event)))?;
        *killer.lock().unwrap_or_else(PoisonError::into_inner) = Some(postgres.killer());
        self.metrics.postgres_starts.inc();
        let mut keeper = prepared.cache.take().map(|(_, keeper)| keeper);
        let ended = self.supervise(&postgres, &pgdata, keeper.as_mut());
        *killer.lock().unwrap_or_else(PoisonError::into_inner) = None;
        postgres.reap()?;
        self.status.facts().postgres_pid = None;
        self.pages_send(PagesCommand::Rest)?;
        *self.metrics.blocks.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if ended.how == Some(Ended::Exited(0)) && !ended.fenced && ended.broken.is_none() {
            match keeper {
                Some(keeper) => self.finish_with_pages(keeper)?,
                None => self.mark_clean(elected.ballot)?,
            }
        }
        Ok(ended.outcome(self.stop_wishes > 0))
    }

    /// Watches a running PostgreSQL until all its processes are gone.
    fn supervise(
        &mut self,
        postgres: &Postgres,
        pgdata: &std::path::Path,
        mut keeper: Option<&mut AdvisoryKeeper>,
    ) -> RunEnd {
        let mut end = RunEnd::default();
        let mut ready = false;
        let mut stopping = false;
        let mut hurry = Hurry::default();
        loop {
            if self.stop_wishes > 0 && !stopping {
                stopping = true;
                self.status.set_state(State::Stopping);
                hurry.at = Some(Instant::now() + self.settings.config.postgres.stop_timeout);
                postgres.stop();
            }
            if stopping {
                hurry.up(postgres, self.stop_wishes);
            }
            let wait = match (ready || end.how.is_some(), hurry.at) {
                (false, _) => Some(READY_INTERVAL),
                (true, Some(at)) => Some(at.saturating_duration_since(Instant::now())),
                (true, None) => keeper.is_some().then_some(ADVISORY_INTERVAL),
            };
            if ready && let Some(keeper) = &mut keeper {
                self.keep_advisory(keeper);
                self.keep_maps(keeper);
            }
            let Some(event) = self.next_event(wait) else {
                if !ready && postmaster_status(pgdata).as_deref() == Some("ready") {
                    ready = true;
                    if !stopping && !end.fenced && end.how.is_none() {
                        self.status.facts().last_error = None;
                        self.status.set_state(State::Running);
                    }
                }
                continue;
            };
            match event {
                Event::Postgres(run, event) if run == self.runs => match event {
                    PostgresEvent::Postmaster(pid) => self.status.facts().postgres_pid = Some(pid),
                    PostgresEvent::Failed(reason) => end.failed = Some(reason),
                    PostgresEvent::Ended(how) => {
                        end.how = Some(how);
                        self.status.facts().postgres_pid = None;
                        if !stopping && !end.fenced {
                            self.status.set_state(State::Recovering);
                        }
                    }
                    PostgresEvent::Gone => return end,
                },
                Event::Core(session, CoreEvent::Fenced { ballot, writer }) if session == self.sessions => {
                    self.note_fenced(ballot, writer);
                    end.fenced = true;
                    self.status.set_state(State::Fenced);
                    postgres.killer().kill();
                }
                Event::Core(session, CoreEvent::Broken(error)) if session == self.sessions => {
                    if let FramerError::Unsupported { .. } = &error {
                        self.status.facts().unsupported_record = Some(error.to_string());
                    }
                    end.broken = Some(error.to_string());
                    postgres.killer().kill();
                }
                Event::StaleTerm(run, words) if run == self.runs => {
                    tracing::warn!("a page server says that this writer's term is over: {words}");
                    self.status.facts().last_error = Some(words);
                    end.fenced = true;
                    self.status.set_state(State::Fenced);
                    postgres.killer().kill();
                }
                event => self.handle_late(event),
            }
        }
    }

    fn note_fenced(&self, ballot: Ballot, writer: WriterId) {
        self.status.facts().last_error = Some(format!("fenced: term {} belongs to writer {writer}", ballot.term.0));
    }

    /// Marks PGDATA as reusable if it ends exactly where the committed log does.
    fn mark_clean(&mut self, ballot: Ballot) -> Result<(), AgentError> {
        let local = match base::inspect(&self.data_dir.pgdata()) {
            Ok(local) => local.end.record_end,
            // A server stopped while it replayed, or without a checkpoint: it starts from the base backup again.
            Err(error) => {
                tracing::info!(%error, "PostgreSQL's data cannot be used again");
                return Ok(());
            }
        };
        let (reply, answer) = sync_channel(1);
        self.core.send(CoreCommand::Finish { limit: FINISH_LIMIT, reply })?;
        match answer.recv().map_err(|_| CoreEnded)? {
            Some(end) if end == local => {
                let log = self.settings.config.log_id();
                self.data_dir.write_clean(CleanMark { log, ballot, end })?;
                tracing::info!(%end, "PostgreSQL was shut down cleanly; its data can be used again");
            }
            committed => {
                tracing::info!(end = %local, ?committed, "the shutdown checkpoint is not the committed end of the log");
            }
        }
        Ok(())
    }

    /// The next event, `None` when `wait` has passed.
    fn next_event(&mut self, wait: Option<Duration>) -> Option<Event> {
        let event = match wait {
            None => self.events.recv().ok(),
            Some(wait) => self.events.recv_timeout(wait).ok(),
        };
        match event {
            Some(Event::Signal | Event::Request(Request::Stop)) => {
                self.stop_wishes += 1;
                event
            }
            event => event,
        }
    }

    /// An event that the present step does not wait for.
    fn handle_late(&mut self, event: Event) {
        match event {
            Event::Request(Request::Grant { grant, reply }) => {
                let answer = self.take_grant(grant);
                let _unheard = reply.send(answer);
            }
            Event::Request(Request::ReplaceShards { map, reply }) => {
                let answer = self.take_shards(map);
                let _unheard = reply.send(answer);
            }
            _ => {}
        }
    }

    /// Takes another shard map, for this attempt and those to come.
    fn take_shards(&mut self, map: ShardMap) -> Result<(), ShardMapRefused> {
        let Source::PageService(service) = &mut self.settings.source else {
            return Err(ShardMapRefused::NoPageService);
        };
        let mut current = service.shard_map();
        if !current.replace(map)? {
            return Ok(());
        }
        tracing::info!(version = current.version, shards = current.shards.len(), "the shard map was replaced");
        service.version = current.version;
        service.shards.clone_from(&current.shards);
        self.status.facts().shard_map = Some(current.clone());
        self.pages_send(PagesCommand::ReplaceShards(current.shards)).map_err(|_| ShardMapRefused::Stopping)
    }

    fn take_grant(&mut self, grant: Grant) -> Result<(), GrantRefused> {
        let own = self.settings.config.writer;
        let granted = grant.term.0;
        if grant.writer != own {
            return Err(GrantRefused::OtherWriter { granted: grant.writer.to_string(), own: own.to_string() });
        }
        if self.stop_wishes > 0 {
            return Err(GrantRefused::Stopping);
        }
        if self.fenced_term.is_some_and(|term| granted <= term) {
            return Err(GrantRefused::Fenced { granted });
        }
        match self.grant {
            Some(known) if granted < known.term.0 => {
                return Err(GrantRefused::StaleTerm { granted, known: known.term.0 });
            }
            Some(known) if known == grant => {}
            _ => {
                self.data_dir.write_grant(grant).map_err(|error| GrantRefused::NotKept(error.to_string()))?;
                tracing::info!(term = granted, "granted");
                self.grant = Some(grant);
            }
        }
        Ok(())
    }

    /// The safekeepers of the configuration file, as a configuration older than any: the acceptors know better.
    fn configured_members(&self) -> Configuration {
        let members = self.settings.config.safekeepers.iter().map(|safekeeper| Member {
            member: safekeeper.member,
            disk: DiskId::default(),
            address: safekeeper.append.to_string(),
        });
        Configuration { generation: Generation(0), members: members.collect(), new_members: None }
    }
}

/// WAL that is complete in its files up to `end`.
fn written_to(end: Lsn, timeline: PgTimeline) -> Written {
    Written { sequence: 0, written_lsn: end.0, final_lsn: end.0, timeline: timeline.0 }
}

fn random() -> std::io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(bytes)
}
