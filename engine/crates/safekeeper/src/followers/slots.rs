//! Slots: names for which WAL is held, who uses them, and when they expire.
//!
//! What a slot has confirmed is part of the log and durable; who uses it and when it was last heard of is not: after a
//! restart the silence counts from the start.

use std::{collections::BTreeMap, fmt, time::Duration};

use pgtypes::{Instant, LogId};

use super::FollowedLog;

/// When a slot expires.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotLimits {
    /// So far behind the committed end.
    pub lag_bytes_max: u64,
    /// So long without a connection.
    pub silence_max: Duration,
}

/// Why a slot expired.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Expiry {
    Lag { bytes: u64 },
    Silence { duration: Duration },
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expiry::Lag { bytes } => write!(f, "{bytes} bytes behind"),
            Expiry::Silence { duration } => write!(f, "not used for {} s", duration.as_secs()),
        }
    }
}

struct Usage {
    /// The session that uses it.
    session: Option<u64>,
    last_used: Instant,
}

/// The slots of one core's logs, as far as they are not part of the logs.
pub(super) struct SlotTable {
    limits: SlotLimits,
    usage: BTreeMap<(LogId, String), Usage>,
}

/// The slot is used by another connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct InUse;

impl SlotTable {
    pub(super) fn new(limits: SlotLimits) -> Self {
        Self { limits, usage: BTreeMap::new() }
    }

    /// `session` uses the slot from now on.
    pub(super) fn acquire(&mut self, log: LogId, slot: &str, session: u64, now: Instant) -> Result<(), InUse> {
        let usage = self.usage.entry((log, slot.to_owned())).or_insert(Usage { session: None, last_used: now });
        match usage.session {
            Some(other) if other != session => Err(InUse),
            _ => {
                usage.session = Some(session);
                Ok(())
            }
        }
    }

    /// `session` no longer uses the slot.
    pub(super) fn release(&mut self, log: LogId, slot: &str, session: u64, now: Instant) {
        if let Some(usage) = self.usage.get_mut(&(log, slot.to_owned()))
            && usage.session == Some(session)
        {
            *usage = Usage { session: None, last_used: now };
        }
    }

    /// The slot was just made.
    pub(super) fn used(&mut self, log: LogId, slot: &str, now: Instant) {
        self.usage.entry((log, slot.to_owned())).or_insert(Usage { session: None, last_used: now });
    }

    pub(super) fn is_in_use(&self, log: LogId, slot: &str) -> bool {
        self.usage.get(&(log, slot.to_owned())).is_some_and(|usage| usage.session.is_some())
    }

    /// The slot was dropped.
    pub(super) fn drop_slot(&mut self, log: LogId, slot: &str) {
        self.usage.remove(&(log, slot.to_owned()));
    }

    pub(super) fn forget(&mut self, log: LogId) {
        self.usage.retain(|(of, _), _| *of != log);
    }

    /// Removes what has expired at `now` and returns it.
    pub(super) fn expire<L: FollowedLog>(&mut self, log: &L, now: Instant) -> Vec<(String, Expiry)> {
        let (id, slots) = (log.id(), log.slots());
        self.usage.retain(|(of, name), usage| {
            *of != id || usage.session.is_some() || slots.iter().any(|(slot, _)| slot == name)
        });
        let mut expired = Vec::new();
        for (slot, confirmed_lsn) in slots {
            let usage = self.usage.entry((id, slot.clone())).or_insert(Usage { session: None, last_used: now });
            let lag = log.readable_lsn().bytes_since(confirmed_lsn);
            let silence = if usage.session.is_some() { Duration::ZERO } else { now.since(usage.last_used) };
            let why = if lag > self.limits.lag_bytes_max {
                Expiry::Lag { bytes: lag }
            } else if silence > self.limits.silence_max {
                Expiry::Silence { duration: silence }
            } else {
                continue;
            };
            log.remove_slot(&slot);
            if usage.session.is_none() {
                self.drop_slot(id, &slot);
            }
            expired.push((slot, why));
        }
        expired
    }
}
