//! One core: the logs that it owns, their timers, and requests from other threads.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use driver::{Event, mpsc};
use futures_util::{StreamExt, future::Either};
use pgtypes::{Instant, LogId};

use crate::{
    followers::Followers,
    log::LogDriver,
    process::{Job, Process},
};

/// A log whose files were not used for this long holds none open.
const IDLE: Duration = Duration::from_secs(60);

/// State of one core. Everything in it stays on its thread.
pub struct Core {
    /// What all cores share.
    pub process: Arc<Process>,
    /// Which core this is.
    pub index: usize,
    /// Stock followers of its logs.
    pub followers: Rc<Followers>,
    logs: RefCell<BTreeMap<LogId, Rc<LogDriver>>>,
    /// Logs that are being created or deleted.
    busy: RefCell<BTreeSet<LogId>>,
    timers: RefCell<BTreeSet<(Instant, LogId)>>,
    timers_changed: Event,
    stopping: Event,
}

impl Core {
    /// A core without logs.
    pub fn new(process: Arc<Process>, index: usize) -> Rc<Self> {
        Rc::new(Self {
            followers: Followers::new(process.admission.clone()),
            process,
            index,
            logs: RefCell::default(),
            busy: RefCell::default(),
            timers: RefCell::default(),
            timers_changed: Event::new(),
            stopping: Event::new(),
        })
    }

    /// The log, when this core owns it and it exists.
    pub fn log(&self, log: LogId) -> Option<Rc<LogDriver>> {
        self.logs.borrow().get(&log).cloned()
    }

    /// All logs of this core, in order.
    pub fn logs(&self) -> Vec<Rc<LogDriver>> {
        self.logs.borrow().values().cloned().collect()
    }

    /// Serves a log from now on.
    pub fn add(&self, log: Rc<LogDriver>) {
        self.process.metrics.logs.inc();
        let before = self.logs.borrow_mut().insert(log.id(), log);
        assert!(before.is_none(), "a log is added once");
    }

    /// Serves a log no longer.
    pub fn remove(&self, log: LogId) -> Option<Rc<LogDriver>> {
        let removed = self.logs.borrow_mut().remove(&log)?;
        self.process.metrics.logs.dec();
        self.process.metrics.remove_log(log);
        for shard in removed.with(|machine| machine.shards().to_vec()) {
            self.process.metrics.remove_shard(log, shard.shard.0);
        }
        Some(removed)
    }

    /// Claims a log for a creation or deletion, until the claim is dropped; `None` while another one has it.
    pub fn begin(self: &Rc<Self>, log: LogId) -> Option<Claim> {
        self.busy.borrow_mut().insert(log).then(|| Claim { core: self.clone(), log })
    }

    /// Moves a log's timer.
    pub fn set_timer(&self, log: LogId, before: Option<Instant>, after: Option<Instant>) {
        if before == after {
            return;
        }
        let mut timers = self.timers.borrow_mut();
        if let Some(before) = before {
            timers.remove(&(before, log));
        }
        if let Some(after) = after {
            timers.insert((after, log));
        }
        // The timer task sleeps until the first: only an earlier one concerns it.
        let earlier = after.is_some_and(|after| timers.first() == Some(&(after, log)));
        drop(timers);
        if earlier {
            self.timers_changed.set();
        }
    }

    /// Waits until the process is ending.
    pub async fn until_stopping(&self) {
        self.stopping.until(|| self.process.is_stopping().then_some(())).await;
    }

    /// Fires timers for ever.
    pub async fn run_timers(self: Rc<Self>) {
        let first = || self.timers.borrow().first().map(|(at, _)| *at);
        loop {
            let Some(at) = first() else {
                self.timers_changed.until(first).await;
                continue;
            };
            let due = std::pin::pin!(driver::sleep_until(at));
            let earlier = std::pin::pin!(self.timers_changed.until(|| first().filter(|first| *first < at)));
            if let Either::Right(_) = futures_util::future::select(due, earlier).await {
                continue;
            }
            let now = driver::now();
            let due: Vec<_> =
                self.timers.borrow().iter().take_while(|(at, _)| *at <= now).map(|(_, log)| *log).collect();
            for log in due {
                if let Some(log) = self.log(log) {
                    log.handle_timeout(now);
                }
            }
        }
    }

    /// Closes the files of logs that nobody has written to or read from for a while, for ever: a thousand idle logs then
    /// hold no descriptors.
    pub async fn close_idle_files(self: Rc<Self>) {
        loop {
            driver::sleep(IDLE).await;
            for log in self.logs() {
                log.files().close_if_idle();
            }
        }
    }

    /// Carries out what other threads ask, until the process is ending.
    pub async fn run_jobs(self: &Rc<Self>, mut jobs: mpsc::Receiver<Job>) {
        while !self.process.is_stopping() {
            match jobs.next().await {
                Some(job) => job(self),
                None => break,
            }
        }
        self.stopping.set();
    }
}

/// A log that is being created or deleted.
pub struct Claim {
    core: Rc<Core>,
    log: LogId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.core.busy.borrow_mut().remove(&self.log);
    }
}
