//! From the end of the log to a PGDATA on an empty disk: the page service says what is in it, and keeps the pages.

use std::{
    io,
    path::Path,
    sync::{
        Arc, PoisonError,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use backup::{Plan, RelationPages, plan};
use pageclient::{BlockRead, ClientConfig};
use pgtypes::{Ballot, Lsn, SystemId};
use wal::Fork;
use wire::page::ReaderRole;

use super::{
    Agent, AgentError, AttemptError, Event, FINISH_LIMIT, Outcome, Prepared, Source, free_space::MapKeeper, random,
    written_to,
};
use crate::{
    advisory::{AdvisoryFiles, ChangedFile},
    area::SharedArea,
    cache::CacheSetup,
    cold_start,
    core::CoreEnded,
    free_space::FreeSpaceMaps,
    link::Greeting,
    page_service_config::PageServiceConfig,
    pages::{BaseBackup, HandedIn, PagesCommand},
    restore::{self, RestoreError},
    session::{CoreCommand, CoreEvent, ElectedEvent},
    shard_map::ShardConfig,
};

/// How long an answer is waited for before the mailbox is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// How often configuration files are looked at: a change that is younger may be lost with the machine.
pub(super) const ADVISORY_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before the page service is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

impl Agent {
    /// Tells the pages' core that an attempt begins: it connects while the votes are under way.
    pub(super) fn begin_pages(&mut self, service: &PageServiceConfig, ballot: Ballot) -> Result<(), CoreEnded> {
        let config = ClientConfig {
            log: self.settings.config.log_id(),
            system_id: SystemId::default(),
            role: ReaderRole::Writer { term: ballot.term },
            striping: service.striping(),
            shards: service.shards.iter().map(ShardConfig::address).collect(),
            tls: self.settings.tls.clone(),
        };
        self.pages_send(PagesCommand::Begin(Box::new(config)))
    }

    /// Makes PGDATA as of the end of the log, whatever was there before.
    pub(super) fn cold_start(
        &mut self,
        service: &PageServiceConfig,
        elected: &ElectedEvent,
    ) -> Result<Result<Prepared, Outcome>, AttemptError> {
        let started = Instant::now();
        let backup = match self.ask_for_base_backup(elected)? {
            Ok(backup) => backup,
            Err(outcome) => return Ok(Err(outcome)),
        };
        let asked = started.elapsed();
        let plan = self.plan_of(elected, backup)?;
        let planned = started.elapsed();
        for path in &plan.left_out {
            tracing::warn!(path, "not a file that a PGDATA may get from the page service: left out");
        }
        if let Some(first) = plan.in_tablespaces.first() {
            let count = plan.in_tablespaces.len();
            tracing::error!(count, first, "tablespaces are not supported: what is in them cannot be read or written");
        }
        let init_pages = match self.read_init_forks(&plan, elected)? {
            Ok(pages) => pages,
            Err(outcome) => return Ok(Err(outcome)),
        };
        let pgdata = self.data_dir.pgdata();
        self.forget_shared_memory();
        restore::put_aside(&pgdata)?;
        let draft = cold_start::draft_of(&pgdata, random()?);
        let user = self.settings.user.as_ref();
        cold_start::write_pgdata(&plan, &init_pages, &draft, &pgdata, user, &self.mailbox.interrupted)?;
        let written = started.elapsed();
        let blocks = cold_start::map_of(&plan, service.evict)?;
        let keeper = AdvisoryKeeper::of_cold_start(&pgdata, &plan.useless_maps)
            .map_err(|source| RestoreError::Io { path: pgdata.clone(), source })?;
        let control = &plan.control;
        tracing::info!(
            x = %plan.begin(),
            end = %plan.end(),
            relation_files = plan.relations.len(),
            asked_ms = asked.as_millis(),
            planned_ms = planned.as_millis(),
            written_ms = written.as_millis(),
            total_ms = started.elapsed().as_millis(),
            "cold start: PGDATA is made"
        );
        self.status.facts().recovery = Some("cold_start");
        Ok(Ok(Prepared {
            segment_bytes: u64::from(control.segment_bytes),
            system_id: control.system_id,
            continues: Some(written_to(plan.end(), control.checkpoint.timeline)),
            replay_to: None,
            hints_need_wal: control.data_checksum_version == 0,
            cache: Some((blocks, keeper)),
        }))
    }

    fn plan_of(&self, elected: &ElectedEvent, backup: BaseBackup) -> Result<Plan, AttemptError> {
        let forks: Vec<_> = backup.lengths.forks.iter().map(|fork| (fork.relation, fork.fork, fork.blocks)).collect();
        let histories: Vec<_> = elected
            .timelines
            .0
            .iter()
            .filter(|entry| !entry.history_file.is_empty())
            .map(|entry| (entry.timeline, entry.history_file.clone()))
            .collect();
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(plan(backup::Source {
            summary: elected.end_of_log,
            metadata: backup.metadata.values,
            forks: &forks,
            page_before: &backup.tail,
            histories: &histories,
            time: time.as_secs() as i64,
        })?)
    }

    /// Asks page servers and safekeepers until they have answered.
    fn ask_for_base_backup(&mut self, elected: &ElectedEvent) -> Result<Result<BaseBackup, Outcome>, AttemptError> {
        let greeting = Greeting {
            log: self.settings.config.log_id(),
            system_id: SystemId::default(),
            tls: self.settings.tls.clone(),
        };
        let safekeepers = self.holders_first(elected).map(|safekeeper| safekeeper.append.to_string());
        let safekeepers: Vec<String> = safekeepers.collect();
        self.ask_until_answered(elected, |reply| PagesCommand::BaseBackup {
            at: elected.end_of_log.record_end,
            safekeepers: safekeepers.clone(),
            greeting: Box::new(greeting.clone()),
            reply,
        })
    }

    /// Contents of the files that begin as copies of init forks, in the order of the plan.
    fn read_init_forks(
        &mut self,
        plan: &Plan,
        elected: &ElectedEvent,
    ) -> Result<Result<Vec<Vec<u8>>, Outcome>, AttemptError> {
        let x: Lsn = plan.begin();
        let copies = plan.relations.iter().filter(|file| file.pages == RelationPages::CopyOfInit);
        let reads: Vec<BlockRead> = copies
            .map(|file| BlockRead {
                relation: file.relation,
                fork: Fork::Init,
                first_block: 0,
                count: file.blocks,
                request_lsn: x,
                not_modified_since: x,
            })
            .collect();
        if reads.is_empty() {
            return Ok(Ok(Vec::new()));
        }
        self.ask_until_answered(elected, |reply| PagesCommand::Read { reads: reads.clone(), reply })
    }

    /// Asks until there is an answer that is no error; `Err` when the attempt is over before. What is wrong is in the status
    /// meanwhile, and in the log whenever it changes.
    fn ask_until_answered<T, E: std::fmt::Display>(
        &mut self,
        elected: &ElectedEvent,
        make: impl Fn(SyncSender<Result<T, E>>) -> PagesCommand,
    ) -> Result<Result<T, Outcome>, AttemptError> {
        let mut said = String::new();
        loop {
            let (reply, answer) = sync_channel(1);
            self.pages_send(make(reply))?;
            let error = match self.wait_for_pages(&answer, elected)? {
                Ok(Ok(answer)) => {
                    self.status.facts().last_error = None;
                    return Ok(Ok(answer));
                }
                Ok(Err(error)) => error.to_string(),
                Err(outcome) => return Ok(Err(outcome)),
            };
            if said != error {
                tracing::warn!("cold start waits for the page service: {error}");
                self.status.facts().last_error = Some(error.clone());
                said = error;
            }
            let again = Instant::now() + ASK_AGAIN;
            while Instant::now() < again {
                if let Some(outcome) = self.look_at_mailbox(elected, again - Instant::now()) {
                    return Ok(Err(outcome));
                }
            }
        }
    }

    /// Waits for the answer of the pages' core, or for the end of the attempt.
    fn wait_for_pages<T>(
        &mut self,
        answer: &Receiver<T>,
        elected: &ElectedEvent,
    ) -> Result<Result<T, Outcome>, AttemptError> {
        loop {
            match answer.try_recv() {
                Ok(answer) => return Ok(Ok(answer)),
                Err(TryRecvError::Disconnected) => return Err(CoreEnded.into()),
                Err(TryRecvError::Empty) => {}
            }
            if let Some(outcome) = self.look_at_mailbox(elected, LOOK_INTERVAL) {
                return Ok(Err(outcome));
            }
        }
    }

    /// Handles an event, if one comes; the outcome when it ends the attempt.
    fn look_at_mailbox(&mut self, elected: &ElectedEvent, wait: Duration) -> Option<Outcome> {
        match self.next_event(Some(wait)) {
            Some(Event::Core(session, CoreEvent::Fenced { ballot, writer })) if session == self.sessions => {
                self.note_fenced(ballot, writer);
                return Some(Outcome::Fenced);
            }
            Some(event) => self.handle_late(event),
            None => {}
        }
        if self.stop_wishes > 0 {
            return Some(Outcome::Stop);
        }
        self.grant.is_some_and(|later| later.term > elected.ballot.term).then_some(Outcome::Regranted)
    }

    /// Tells the pages' core to serve the PostgreSQL that is about to start.
    pub(super) fn serve_blocks(&mut self, prepared: &Prepared, area: &SharedArea) -> Result<(), CoreEnded> {
        let (Source::PageService(service), Some((blocks, _))) = (&self.settings.source, &prepared.cache) else {
            return Ok(());
        };
        *self.metrics.blocks.lock().unwrap_or_else(PoisonError::into_inner) = Some(blocks.clone());
        let mailbox = self.mailbox.clone();
        let run = self.runs + 1;
        let setup = CacheSetup {
            blocks: blocks.clone(),
            area: area.clone(),
            pgdata: self.data_dir.pgdata(),
            config: service.clone(),
            backpressure: self.settings.config.backpressure,
            view: self.status.view(),
            on_stale_term: Arc::new(move |words| mailbox.post(Event::StaleTerm(run, words))),
        };
        self.pages_send(PagesCommand::Serve(Box::new(setup)))
    }

    /// Hands in configuration files that changed, at most every [`ADVISORY_INTERVAL`].
    pub(super) fn keep_advisory(&mut self, keeper: &mut AdvisoryKeeper) {
        if let Some(answer) = &keeper.under_way {
            match answer.try_recv() {
                Ok((taken, trouble)) => keeper.note(&taken, trouble),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {}
            }
            keeper.under_way = None;
        }
        if keeper.next_look > Instant::now() {
            return;
        }
        keeper.next_look = Instant::now() + ADVISORY_INTERVAL;
        let files = match keeper.files.changed_configuration() {
            Ok(files) if files.is_empty() => return,
            Ok(files) => files,
            Err(error) => return keeper.note(&[], Some(error.to_string())),
        };
        let (reply, answer) = sync_channel(1);
        match self.pages_send(PagesCommand::HandIn { files, reply }) {
            Ok(()) => keeper.under_way = Some(answer),
            Err(error) => keeper.note(&[], Some(error.to_string())),
        }
    }

    /// After a clean stop: waits until all WAL is committed, and hands in what PostgreSQL left behind.
    pub(super) fn finish_with_pages(&mut self, mut keeper: AdvisoryKeeper) -> Result<(), AgentError> {
        let (reply, answer) = sync_channel(1);
        self.core.send(CoreCommand::Finish { limit: FINISH_LIMIT, reply })?;
        let committed = answer.recv().map_err(|_| CoreEnded)?;
        tracing::info!(?committed, "PostgreSQL was shut down cleanly");
        let files = match keeper.files.changed_at_stop() {
            Ok(files) => files,
            Err(error) => {
                keeper.note(&[], Some(error.to_string()));
                return Ok(());
            }
        };
        if !files.is_empty() {
            let (reply, answer) = sync_channel(1);
            self.pages_send(PagesCommand::HandIn { files, reply })?;
            let (taken, trouble) = answer.recv().map_err(|_| CoreEnded)?;
            keeper.note(&taken, trouble);
        }
        self.finish_maps(&mut keeper);
        Ok(())
    }
}

/// Brings configuration files to the page service while PostgreSQL runs.
pub(super) struct AdvisoryKeeper {
    files: AdvisoryFiles,
    next_look: Instant,
    under_way: Option<Receiver<HandedIn>>,
    said: Option<String>,
    pub(super) maps: MapKeeper,
}

impl AdvisoryKeeper {
    /// Of a PGDATA that was just made from what the page service has.
    fn of_cold_start(pgdata: &Path, useless_maps: &[String]) -> io::Result<Self> {
        Ok(Self {
            files: AdvisoryFiles::of_cold_start(pgdata)?,
            next_look: Instant::now() + ADVISORY_INTERVAL,
            under_way: None,
            said: None,
            maps: MapKeeper::new(FreeSpaceMaps::of_cold_start(pgdata, useless_maps)?),
        })
    }

    /// Says what is wrong whenever it changes.
    fn note(&mut self, taken: &[ChangedFile], trouble: Option<String>) {
        for file in taken {
            tracing::info!(file = file.name, bytes = file.contents.len(), "the page service keeps a file that changed");
            self.files.keep(file);
        }
        if trouble.is_some() && trouble != self.said {
            tracing::warn!(
                "changed configuration files are not with the page service yet: {}",
                trouble.as_deref().unwrap_or_default()
            );
        }
        self.said = trouble;
    }
}
