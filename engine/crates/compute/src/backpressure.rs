//! How much a WAL flush is slowed while the page service lags.
//!
//! Pure. A delay is never a stop: page servers need commits to go on to catch up, and readers that write back dirty pages
//! flush WAL, too. PostgreSQL waits at most [`DELAY_MAX`] in each flush.

use std::time::Duration;

use pgtypes::Lsn;

use crate::page_service_config::BackpressureConfig;

/// Longest delay of one flush, from twice the limit on.
pub const DELAY_MAX: Duration = Duration::from_millis(10);

/// How far the page service is behind the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lag {
    /// Committed bytes that the slowest shard has not ingested.
    pub ingest_bytes: u64,
    /// Committed bytes that the slowest shard has not brought to object storage.
    pub durable_bytes: u64,
}

impl Lag {
    /// Of shards that have all ingested `ingested` and brought `durable` to object storage.
    pub fn behind(commit_lsn: Lsn, ingested: Lsn, durable: Lsn) -> Self {
        Lag { ingest_bytes: commit_lsn.bytes_since(ingested), durable_bytes: commit_lsn.bytes_since(durable) }
    }

    /// What each flush is to be slowed by.
    pub fn flush_delay(self, limits: &BackpressureConfig) -> Duration {
        let ingest = delay(self.ingest_bytes, limits.ingest_lag_bytes);
        ingest.max(delay(self.durable_bytes, limits.durable_lag_bytes))
    }
}

/// Nothing up to `limit`, from there on in proportion, [`DELAY_MAX`] at twice `limit`.
fn delay(lag: u64, limit: u64) -> Duration {
    let above = lag.saturating_sub(limit).min(limit);
    let nanoseconds = DELAY_MAX.as_nanos() * u128::from(above) / u128::from(limit);
    // At most that of the longest delay.
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BackpressureConfig = BackpressureConfig { ingest_lag_bytes: 1000, durable_lag_bytes: 100_000 };

    #[test]
    fn delays_rise_from_the_limit_to_twice_the_limit_and_no_further() {
        for (ingest, durable, expected_us) in [
            (0, 0, 0),
            (1000, 100_000, 0),
            (1100, 0, 1000),
            (1500, 0, 5000),
            (2000, 0, 10_000),
            (u64::MAX, 0, 10_000),
            (0, 150_000, 5000),
            (1100, 190_000, 9000),
            (1900, 110_000, 9000),
        ] {
            let lag = Lag { ingest_bytes: ingest, durable_bytes: durable };
            assert_eq!(Duration::from_micros(expected_us), lag.flush_delay(&LIMITS), "{lag:?}");
        }
    }

    /// A shard that hears of WAL before the agent knows that it is committed.
    #[test]
    fn a_shard_ahead_does_not_lag() {
        let lag = Lag::behind(Lsn(100), Lsn(200), Lsn(40));
        assert_eq!(Lag { ingest_bytes: 0, durable_bytes: 60 }, lag);
    }
}
