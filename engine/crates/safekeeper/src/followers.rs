//! Stock followers: PostgreSQL standbys, `pg_receivewal` and the like, over PostgreSQL's replication protocol.
//!
//! A follower is admitted ([`admission`]: TLS, which log, who it is), then served on the core that owns its log
//! ([`session`]: commands; [`stream`]: the copy stream), and may hold WAL by a slot ([`slots`]). It sees committed WAL
//! only. Knows nothing about `logstore`: a log is what [`FollowedLog`] says; [`shell`] ties both together. `docs/formats/replication-protocol.md` says
//! what of PostgreSQL is served.

mod admission;
mod inbound;
mod metrics;
mod session;
mod shell;
mod slots;
mod stream;
mod timelines;
mod users;

#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    ops::Deref,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use consensus::message::TimelineEntry;
use driver::{Closer, Event};
use pgtypes::{LogId, Lsn, SystemId};

use self::slots::SlotTable;
pub use self::{
    admission::{Admission, Admitted, AdmittedDetached},
    metrics::FollowerMetrics,
    shell::{accept, keep_slots},
    slots::SlotLimits,
};

/// Followers of one core at a time, admitted or not. More are told so and closed; a lakebase has a handful.
const FOLLOWERS_MAX: usize = 256;

/// How long a stopping core waits for followers to read their farewell.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Why a follower gets no WAL. The text is for it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FollowError {
    /// It was removed.
    #[error("requested WAL from {begin} has already been removed: this safekeeper holds it from {oldest} on")]
    Removed {
        /// First byte wanted.
        begin: Lsn,
        /// First position still held.
        oldest: Lsn,
    },
    /// The segment failed its checksum; another safekeeper has the bytes.
    #[error("{0}")]
    Damaged(String),
    /// The file system failed.
    #[error("{0}")]
    Failed(String),
}

/// A log, as far as followers see it. Lives on one core.
pub trait FollowedLog: 'static {
    /// Bytes of WAL.
    type Bytes: Deref<Target = [u8]>;

    /// Which log.
    fn id(&self) -> LogId;
    /// PostgreSQL's `system_identifier`.
    fn system(&self) -> SystemId;
    /// Size of PostgreSQL's segments.
    fn segment_bytes(&self) -> u64;
    /// First position still held.
    fn oldest_lsn(&self) -> Lsn;
    /// Committed, and durable here: what followers may see.
    fn readable_lsn(&self) -> Lsn;
    /// The log was deleted, or the process is ending.
    fn is_closed(&self) -> bool;
    /// PostgreSQL timelines in order of their start; at least one.
    fn with_timelines<T>(&self, look: impl FnOnce(&[TimelineEntry]) -> T) -> T;
    /// Waits until `condition` gives a value; evaluated at once and after every change of the log. Dropping the future
    /// loses nothing.
    fn until<T>(&self, condition: impl FnMut() -> Option<T>) -> impl Future<Output = T>;
    /// Reads at least one byte and at most `max` from `begin` on, below [`FollowedLog::readable_lsn`].
    fn read(&self, begin: Lsn, max: usize) -> impl Future<Output = Result<Self::Bytes, FollowError>>;
    /// Slots and what each has confirmed: WAL below is not held for it.
    fn slots(&self) -> Vec<(String, Lsn)>;
    /// What a slot has confirmed; `None` when there is no such slot.
    fn slot(&self, name: &str) -> Option<Lsn>;
    /// Creates a slot or moves it; false when there are too many. A move is durable within seconds, and what is lost of it
    /// only holds more WAL.
    fn set_slot(&self, name: &str, confirmed_lsn: Lsn) -> bool;
    /// Waits until the slots that there are have become durable; false when the disk failed.
    fn slots_durable(&self) -> impl Future<Output = bool>;
    /// Removes a slot; false when there was none.
    fn remove_slot(&self, name: &str) -> bool;
}

/// What a follower is doing, for the admin API.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FollowerStatus {
    /// Which log.
    pub log: LogId,
    /// Its user, or the member in its certificate.
    pub name: String,
    /// As it calls itself.
    pub application: String,
    /// Its slot.
    pub slot: Option<String>,
    /// Sent so far.
    pub sent_lsn: Lsn,
    /// What it says that it has written, made durable, replayed.
    pub confirmed: [Lsn; 3],
}

/// The followers of one core.
pub struct Followers {
    admission: Arc<Admission>,
    slots: RefCell<SlotTable>,
    sessions: RefCell<BTreeMap<u64, SessionEntry>>,
    next_session: Cell<u64>,
    stopping: Cell<bool>,
    /// Set when the core stops or a slot expires.
    changed: Event,
}

struct SessionEntry {
    closer: Closer,
    /// Present while it streams: such a session ends by itself when the core stops.
    streaming: Option<FollowerStatus>,
}

/// Keeps a session in the list of its core.
struct SessionGuard {
    followers: Rc<Followers>,
    number: u64,
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.followers.sessions.borrow_mut().remove(&self.number);
        self.followers.changed.set();
        self.followers.admission.metrics.followers.dec();
    }
}

impl Followers {
    /// None yet.
    pub fn new(admission: Arc<Admission>) -> Rc<Self> {
        Rc::new(Self {
            slots: RefCell::new(SlotTable::new(admission.limits)),
            admission,
            sessions: RefCell::default(),
            next_session: Cell::new(1),
            stopping: Cell::new(false),
            changed: Event::new(),
        })
    }

    /// Speaks with a follower on a fresh connection until it is known who it is and which of `logs` (of the whole
    /// process) it wants; `None` when it was refused, which it has been told.
    pub async fn admit(
        self: &Rc<Self>,
        connection: driver::Connection,
        logs: impl AsyncFnOnce() -> Vec<LogId>,
    ) -> Option<Admitted> {
        let guard = self.enter(connection.closer());
        let admitted = self.admission.admit(connection, logs, guard.is_some()).await;
        drop(guard);
        admitted
    }

    /// Serves an admitted follower of `log` until it leaves. `log` is `None` when it is gone since.
    pub async fn serve<L: FollowedLog>(self: &Rc<Self>, admitted: Admitted, log: Option<Rc<L>>) {
        let Some(guard) = self.enter(admitted.connection.closer()) else { return };
        let (log_id, name) = (admitted.log, admitted.name.clone());
        let result = session::run(self, guard.number, admitted, log).await;
        drop(guard);
        match result {
            Ok(()) => tracing::debug!(log = %log_id, follower = name, "follower left"),
            // Its machine or process died, which is its operator's business.
            Err(SessionError::Io(error)) => tracing::info!(log = %log_id, follower = name, %error, "follower is gone"),
            Err(error) => {
                if self.admission.is_new(&format!("follower {name} of {log_id}: {error}")) {
                    tracing::warn!(log = %log_id, follower = name, %error, "follower's connection ended");
                }
            }
        }
    }

    /// Removes slots of `log` that are too far behind or silent for too long. To be called every few seconds.
    pub fn expire_slots<L: FollowedLog>(&self, log: &L) {
        let expired = self.slots.borrow_mut().expire(log, driver::now());
        for (slot, why) in expired {
            self.admission.metrics.slots_expired.inc();
            tracing::warn!(log = %log.id(), slot, %why, "replication slot expired: its WAL is held no longer");
        }
        self.admission.metrics.count_slots(log.id(), log.slots().len());
        self.changed.set();
    }

    /// Forgets a deleted log.
    pub fn forget(&self, log: LogId) {
        self.slots.borrow_mut().forget(log);
        self.admission.metrics.forget(log);
    }

    /// Ends all sessions and waits for them: those that stream say farewell, the others are closed.
    pub async fn stop(&self) {
        self.stopping.set(true);
        for session in self.sessions.borrow().values() {
            if session.streaming.is_none() {
                session.closer.close();
            }
        }
        self.changed.set();
        let left = self.changed.until(|| self.sessions.borrow().is_empty().then_some(()));
        if driver::timeout(STOP_LIMIT, left).await.is_none() {
            for session in self.sessions.borrow().values() {
                session.closer.close();
            }
        }
    }

    /// Who streams.
    pub fn status(&self) -> Vec<FollowerStatus> {
        self.sessions.borrow().values().filter_map(|session| session.streaming.clone()).collect()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// A place for a session, `None` when all are taken or the core stops.
    fn enter(self: &Rc<Self>, closer: Closer) -> Option<SessionGuard> {
        let mut sessions = self.sessions.borrow_mut();
        if sessions.len() >= FOLLOWERS_MAX || self.is_stopping() {
            return None;
        }
        let number = self.next_session.replace(self.next_session.get() + 1);
        sessions.insert(number, SessionEntry { closer, streaming: None });
        self.admission.metrics.followers.inc();
        Some(SessionGuard { followers: self.clone(), number })
    }

    fn set_status(&self, session: u64, change: impl FnOnce(&mut Option<FollowerStatus>)) {
        if let Some(entry) = self.sessions.borrow_mut().get_mut(&session) {
            change(&mut entry.streaming);
        }
    }
}

/// Why a connection ended before the follower said farewell.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    /// Nobody is at the other end any more, or TLS failed.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error(transparent)]
    Protocol(#[from] wire::postgres::ProtocolError),
    /// It was told why.
    #[error("refused: {0}")]
    Refused(String),
}
