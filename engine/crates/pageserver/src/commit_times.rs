//! The position of a time: commits lie, as records of `pg_xact`, in the layers.
//!
//! Their positions come from indexes; their times are read from the records, of which a search by halves needs few. Times of commits
//! rise with positions but for milliseconds, since PostgreSQL takes the time before it writes the record.

use layers::{Key, KeyKind, LayerKind, Metadata, PlanError, Slru, ValueKind};
use metadata::Counters;
use pgtypes::Lsn;
use shard::Rebuilt;
use wal::{Record, rmgr, xact_info};

use crate::{layer_files::LayerFault, owner::Owner, read::ReadFault, state::State};

/// Microseconds of a second.
const SECOND: i64 = 1_000_000;

/// 2000-01-01 UTC in seconds since 1970.
const POSTGRES_EPOCH: i64 = 946_684_800;

/// Commits and aborts above the horizon that are still records, in the order of positions. A layer that was merged has an image
/// instead of one in sixteen.
fn transaction_ends(state: &State) -> Result<Vec<(Lsn, Key)>, PlanError> {
    let is_end = |key: Key| matches!(key.kind(), Ok(KeyKind::Slru(Slru::TransactionStatus, _)));
    let horizon = state.map().horizon();
    let mut ends = Vec::new();
    for layer in std::iter::once(state.open()).chain(state.frozen().iter().map(|frozen| &frozen.layer)) {
        let here = layer.values().take_while(|(key, _)| key.hash() == 0).filter(|(key, _)| is_end(*key));
        let records = here.filter(|(_, value)| value.kind == ValueKind::Record || value.kind == ValueKind::InitRecord);
        ends.extend(records.map(|(key, value)| (value.lsn, key)));
    }
    let keys = layers::KeyRange { begin: Key::MIN, end: Key::first_of_hash(1) };
    for layer in state.map().layers() {
        let is_older = layer.lsns.through <= horizon;
        if layer.kind == LayerKind::Image || layer.keys.intersection(&keys).is_empty() || is_older {
            continue;
        }
        let index = state.indexes().get(layer.id).ok_or(PlanError::IndexNeeded(layer.id))?;
        for (key, values) in index.keys_from(keys.begin).take_while(|(key, _)| *key < keys.end) {
            let records = values.iter().filter(|value| !matches!(value.kind, ValueKind::Image | ValueKind::Absent));
            ends.extend(records.filter(|value| is_end(key) && value.lsn > horizon).map(|value| (value.lsn, key)));
        }
    }
    ends.sort_unstable();
    // A transaction with subtransactions may have ended on two pages.
    ends.dedup_by_key(|(lsn, _)| *lsn);
    Ok(ends)
}

/// When the record says that a transaction ended, microseconds since 2000.
fn time_of(lsn: Lsn, stored: &[u8]) -> Option<i64> {
    let record = Record::from_stored(Lsn::INVALID, lsn, stored).ok()?;
    let operation = record.info.info & xact_info::OPERATION_MASK;
    let ends = [xact_info::COMMIT, xact_info::COMMIT_PREPARED, xact_info::ABORT, xact_info::ABORT_PREPARED];
    let is_end = record.info.rmgr == rmgr::XACT && ends.contains(&operation);
    // `xact_time` is the first field of `xl_xact_commit` and `xl_xact_abort`.
    let time = record.main_data().first_chunk::<8>()?;
    is_end.then(|| i64::from_le_bytes(*time))
}

impl Owner {
    /// The last position at which no transaction had ended after `timestamp` (microseconds since 2000), and the time of the last
    /// end before it; 0 if there is none within the history.
    ///
    /// # Errors
    /// [`ReadFault`]: `BelowHorizon` when the history begins later.
    pub async fn find_lsn(&self, timestamp: i64) -> Result<(Lsn, i64), ReadFault> {
        let ends = loop {
            let result = transaction_ends(&self.state.borrow());
            match result {
                Ok(ends) => break ends,
                Err(PlanError::IndexNeeded(layer)) => match self.need_index(layer).await {
                    Err(LayerFault::Gone(_)) => {}
                    result => result?,
                },
                Err(error) => return Err(ReadFault::Internal(error.to_string())),
            }
        };
        let newest = self.ingested();
        // Everything below `low` ended in time, with the newest time that was read; `high` and everything behind it later.
        let (mut low, mut high, mut before) = (0, ends.len(), 0);
        while low < high {
            let middle = low + (high - low) / 2;
            let Some((at, time)) = self.time_at_or_behind(&ends[middle..high]).await? else {
                // None of them says when: aborts of subtransactions, and records that set `pg_xact` up.
                high = middle;
                continue;
            };
            if time <= timestamp {
                (low, before) = (middle + at + 1, time);
            } else {
                high = middle;
            }
        }
        match ends[..low].last() {
            Some(_) if low == ends.len() => Ok((newest, before)),
            Some((lsn, _)) => Ok((*lsn, before)),
            None => {
                let horizon = self.horizon();
                let begun = self.checkpoint_time(horizon).await?;
                if ends.is_empty() && begun.is_none_or(|begun| begun <= timestamp) {
                    return Ok((newest, 0));
                }
                match begun {
                    Some(begun) if begun > timestamp => Err(ReadFault::Before { timestamp, horizon }),
                    _ => Ok((horizon, 0)),
                }
            }
        }
    }

    /// The first of `ends` that says when it was, and the time.
    async fn time_at_or_behind(&self, ends: &[(Lsn, Key)]) -> Result<Option<(usize, i64)>, ReadFault> {
        for (at, (lsn, key)) in ends.iter().enumerate() {
            // Just the value at that position.
            let found = self.find(*key, *lsn, Lsn(lsn.0 - 1)).await?;
            let time = found.values().find_map(|(lsn, _, value)| time_of(lsn, value));
            if let Some(time) = time {
                return Ok(Some((at, time)));
            }
        }
        Ok(None)
    }

    /// When the last checkpoint before `lsn` began, microseconds since 2000.
    async fn checkpoint_time(&self, lsn: Lsn) -> Result<Option<i64>, ReadFault> {
        match self.value(Key::metadata(Metadata::Checkpoint), lsn).await? {
            Rebuilt::Bytes(bytes) => {
                let counters = Counters::from_bytes(&bytes).map_err(|error| ReadFault::Internal(error.to_string()))?;
                Ok(Some((counters.checkpoint.time - POSTGRES_EPOCH).saturating_mul(SECOND)))
            }
            Rebuilt::Page(_) | Rebuilt::Absent => Ok(None),
        }
    }
}
