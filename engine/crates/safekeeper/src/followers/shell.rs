//! Followers on the cores of a safekeeper: the port, and logs as followers see them.

use std::{rc::Rc, time::Duration};

use consensus::message::TimelineEntry;
use driver::{AlignedBuffer, Connection, Listener};
use futures_util::future::Either;
use pgtypes::{LogId, Lsn, SystemId};

use super::{Admitted, FollowError, FollowedLog};
use crate::{core::Core, files::ReadError, log::LogDriver, process::Process};

/// Pause after a failed `accept`, which fails at once again while the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often slots are looked at.
const SLOT_INTERVAL: Duration = Duration::from_secs(5);
/// Begins the names of consumers that are slots; no slot's name can have it. With it the longest slot name (63 bytes)
/// is as long as a consumer's may be.
const SLOT_PREFIX: &str = "@";

impl FollowedLog for LogDriver {
    type Bytes = AlignedBuffer;

    fn id(&self) -> LogId {
        LogDriver::id(self)
    }

    fn system(&self) -> SystemId {
        LogDriver::system(self)
    }

    fn segment_bytes(&self) -> u64 {
        self.with(|log| log.acceptor().identity().segment_bytes)
    }

    fn oldest_lsn(&self) -> Lsn {
        self.with(|log| log.oldest_lsn())
    }

    fn readable_lsn(&self) -> Lsn {
        self.with(|log| log.acceptor().readable_until())
    }

    fn is_closed(&self) -> bool {
        LogDriver::is_closed(self)
    }

    fn with_timelines<T>(&self, look: impl FnOnce(&[TimelineEntry]) -> T) -> T {
        self.with(|log| look(&log.acceptor().state().timelines.0))
    }

    async fn until<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        LogDriver::until(self, |_| condition()).await
    }

    async fn read(&self, begin: Lsn, max: usize) -> Result<AlignedBuffer, FollowError> {
        self.read_wal(begin, max).await.map_err(|error| match error {
            ReadError::NotAvailable { begin, oldest, .. } if begin < oldest => FollowError::Removed { begin, oldest },
            ReadError::Damaged { .. } | ReadError::KnownDamaged { .. } => FollowError::Damaged(error.to_string()),
            ReadError::NotAvailable { .. } | ReadError::Io { .. } => FollowError::Failed(error.to_string()),
        })
    }

    fn slots(&self) -> Vec<(String, Lsn)> {
        self.with(|log| {
            let slot = |consumer: &logstore::Consumer| {
                Some((consumer.name.strip_prefix(SLOT_PREFIX)?.to_owned(), consumer.confirmed_lsn))
            };
            log.consumers().iter().filter_map(slot).collect()
        })
    }

    fn slot(&self, name: &str) -> Option<Lsn> {
        self.with(|log| {
            let found = log.consumers().iter().find(|consumer| consumer.name.strip_prefix(SLOT_PREFIX) == Some(name));
            found.map(|consumer| consumer.confirmed_lsn)
        })
    }

    fn set_slot(&self, name: &str, confirmed_lsn: Lsn) -> bool {
        // Names were checked when the command was parsed: the only other error is that there are too many.
        self.set_consumer(&format!("{SLOT_PREFIX}{name}"), confirmed_lsn).is_ok()
    }

    async fn slots_durable(&self) -> bool {
        let version = self.with(|log| log.consumers_version());
        let settled = |log: &logstore::Log| {
            let durable = log.consumers_durable(version);
            (durable || log.is_failed() || self.is_closed()).then_some(durable)
        };
        LogDriver::until(self, settled).await
    }

    fn remove_slot(&self, name: &str) -> bool {
        self.remove_consumer(&format!("{SLOT_PREFIX}{name}"))
    }
}

/// Accepts connections of the replication port until the process is ending.
pub async fn accept(core: Rc<Core>, listener: Listener) {
    loop {
        let accepted = {
            let accept = std::pin::pin!(listener.accept());
            let stopping = std::pin::pin!(core.until_stopping());
            match futures_util::future::select(accept, stopping).await {
                Either::Left((accepted, _)) => accepted,
                Either::Right(_) => return,
            }
        };
        match accepted {
            Ok(connection) => {
                driver::spawn(follow(core.clone(), connection));
            }
            Err(error) => {
                if core.process.notices.is_new("accept followers", driver::now()) {
                    tracing::error!(%error, "cannot accept connections of the replication port");
                }
                driver::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Expires slots of this core's logs, for ever.
pub async fn keep_slots(core: Rc<Core>) {
    loop {
        driver::sleep(SLOT_INTERVAL).await;
        for log in core.logs() {
            core.followers.expire_slots(&*log);
        }
    }
}

async fn follow(core: Rc<Core>, connection: Connection) {
    let process = core.process.clone();
    let logs = process.clone();
    let Some(admitted) = core.followers.admit(connection, async move || all_logs(&logs).await).await else { return };
    let owner = process.core_of(admitted.log);
    if owner == core.index {
        return serve(core, admitted).await;
    }
    match admitted.detach() {
        Ok(moved) => {
            // A core that takes no requests is overloaded or ending: the follower sees its connection close and tries
            // again.
            let _ = process.send(owner, move |core| {
                let core = core.clone();
                match moved.attach() {
                    Ok(admitted) => {
                        driver::spawn(serve(core, admitted));
                    }
                    Err(error) => tracing::error!(%error, "follower cannot be moved to its core"),
                }
            });
        }
        Err(error) => tracing::error!(%error, "follower cannot be moved to its core"),
    }
}

async fn serve(core: Rc<Core>, admitted: Admitted) {
    let log = core.log(admitted.log);
    core.followers.serve(admitted, log).await;
}

/// All logs of the process, of those cores that answer.
async fn all_logs(process: &Process) -> Vec<LogId> {
    let mut logs = Vec::new();
    for core in 0..process.core_count() {
        let of_core = process.ask(core, |core, answer| {
            // Fails when the follower gave up.
            let _ = answer.send(core.logs().iter().map(|log| log.id()).collect::<Vec<_>>());
        });
        logs.extend(of_core.await.unwrap_or_default());
    }
    logs
}
