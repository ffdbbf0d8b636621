//! Figures about the agent, and what the core shows of itself to the other threads.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use pgtypes::{Instant, Lsn, MemberId};
use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::{area::SharedArea, backpressure::Lag, cache::SharedBlocks};

/// A safekeeper as the proposer sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberView {
    /// Its number.
    pub member: MemberId,
    /// Whether it follows this writer.
    pub follows: bool,
    /// Record end up to which its log is durable in this ballot.
    pub flush_lsn: Lsn,
    /// What is wrong with it, when it said so.
    pub trouble: Option<String>,
}

/// Written by the core, read by the admin and metrics threads. Counted in plain atomics, so that a commit pays nothing.
#[derive(Debug, Default)]
pub struct CoreView {
    commit_lsn: AtomicU64,
    record_end: AtomicU64,
    lease_until_ns: AtomicU64,
    quorum: AtomicBool,
    ingest_lag_bytes: AtomicU64,
    durable_lag_bytes: AtomicU64,
    flush_delay_us: AtomicU64,
    members: Mutex<Vec<MemberView>>,
}

impl CoreView {
    /// The committed position.
    pub fn commit_lsn(&self) -> Lsn {
        Lsn(self.commit_lsn.load(Relaxed))
    }

    /// End of the last record that PostgreSQL wrote.
    pub fn record_end(&self) -> Lsn {
        Lsn(self.record_end.load(Relaxed))
    }

    /// End of the read lease.
    pub fn lease_until(&self) -> Instant {
        Instant(self.lease_until_ns.load(Relaxed))
    }

    /// Whether a majority follows.
    pub fn has_quorum(&self) -> bool {
        self.quorum.load(Relaxed)
    }

    /// How far the page service is behind, as last seen, and what each flush is slowed by for it.
    pub fn lag(&self) -> (Lag, Duration) {
        let lag = Lag {
            ingest_bytes: self.ingest_lag_bytes.load(Relaxed),
            durable_bytes: self.durable_lag_bytes.load(Relaxed),
        };
        (lag, Duration::from_micros(self.flush_delay_us.load(Relaxed)))
    }

    /// The safekeepers; at most one heartbeat old.
    pub fn members(&self) -> Vec<MemberView> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_commit_lsn(&self, lsn: Lsn) {
        self.commit_lsn.store(lsn.0, Relaxed);
    }

    pub(crate) fn set_record_end(&self, lsn: Lsn) {
        self.record_end.store(lsn.0, Relaxed);
    }

    pub(crate) fn set_lease_until(&self, until: Instant) {
        self.lease_until_ns.store(until.0, Relaxed);
    }

    pub(crate) fn set_quorum(&self, present: bool) {
        self.quorum.store(present, Relaxed);
    }

    pub(crate) fn set_lag(&self, lag: Lag, flush_delay: Duration) {
        self.ingest_lag_bytes.store(lag.ingest_bytes, Relaxed);
        self.durable_lag_bytes.store(lag.durable_bytes, Relaxed);
        // At most `backpressure::DELAY_MAX`.
        self.flush_delay_us.store(flush_delay.as_micros() as u64, Relaxed);
    }

    pub(crate) fn set_members(&self, members: Vec<MemberView>) {
        *self.members.lock().unwrap_or_else(PoisonError::into_inner) = members;
    }
}

/// The metrics that somebody counts as things happen.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// From the agent's look at a WAL write to its commit, seconds.
    pub commit_wait_seconds: Histogram,
    /// WAL bytes handed to connections, all safekeepers together.
    pub sent_bytes: Counter,
    /// Starts of PostgreSQL.
    pub postgres_starts: Counter,
    /// Elections begun.
    pub elections: Counter,
    /// Free-space maps that the page service took.
    pub maps_handed_in: Counter,
    /// Free-space maps that are too long for it.
    pub maps_left_out: Gauge,
    /// 1 for the present state, 0 for the others.
    pub state: Family<StateLabel, Gauge>,
    /// The area of the present PostgreSQL.
    pub area: Arc<Mutex<Option<SharedArea>>>,
    /// Its block map, where the page service is used.
    pub blocks: Arc<Mutex<Option<SharedBlocks>>>,
}

/// Label of the state gauge.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub struct StateLabel {
    /// The state's name.
    pub state: &'static str,
}

impl Metrics {
    /// All metrics, registered.
    pub fn register(registry: &mut Registry, view: Arc<CoreView>) -> Self {
        // 50 us to 1.6 s, each twice the one before: a commit takes 0.2 ms on one machine and a few ms across zones.
        let buckets = (0..16).map(|power| 50e-6 * f64::from(1 << power));
        let metrics = Metrics {
            commit_wait_seconds: Histogram::new(buckets),
            sent_bytes: Counter::default(),
            postgres_starts: Counter::default(),
            elections: Counter::default(),
            maps_handed_in: Counter::default(),
            maps_left_out: Gauge::default(),
            state: Family::default(),
            area: Arc::default(),
            blocks: Arc::default(),
        };
        let registry = registry.sub_registry_with_prefix("lakebase_compute");
        let wait = "Time from the agent's look at a WAL write to its commit by a quorum";
        registry.register_with_unit("commit_wait", wait, Unit::Seconds, metrics.commit_wait_seconds.clone());
        registry.register_with_unit("wal_sent", "WAL sent to safekeepers", Unit::Bytes, metrics.sent_bytes.clone());
        registry.register("postgres_starts", "Starts of PostgreSQL", metrics.postgres_starts.clone());
        registry.register("elections", "Elections begun", metrics.elections.clone());
        let handed_in = "Free-space maps that the page service took";
        registry.register("free_space_maps_handed_in", handed_in, metrics.maps_handed_in.clone());
        let left_out = "Free-space maps that are too long for the page service";
        registry.register("free_space_maps_left_out", left_out, metrics.maps_left_out.clone());
        registry.register("state", "1 for the agent's present state", metrics.state.clone());
        registry.register_collector(Box::new(ViewCollector {
            view,
            area: metrics.area.clone(),
            blocks: metrics.blocks.clone(),
        }));
        metrics
    }
}

/// Reads what changes too often to be counted elsewhere, when it is asked for.
#[derive(Debug)]
struct ViewCollector {
    view: Arc<CoreView>,
    area: Arc<Mutex<Option<SharedArea>>>,
    blocks: Arc<Mutex<Option<SharedBlocks>>>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct MemberLabel {
    member: u32,
}

impl prometheus_client::collector::Collector for ViewCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let view = &self.view;
        let mut gauge = |name: &str, help: &str, value: i64| {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        let lease = view.lease_until().since(driver::now());
        gauge("commit_lsn", "Committed position of the log", view.commit_lsn().0 as i64)?;
        gauge("record_end_lsn", "End of the last record that PostgreSQL wrote", view.record_end().0 as i64)?;
        gauge("lease_remaining_milliseconds", "How long the read lease still runs", lease.as_millis() as i64)?;
        gauge("quorum", "Whether a majority of safekeepers follows", i64::from(view.has_quorum()))?;
        let members = view.members();
        for (name, help) in [
            ("safekeeper_follows", "Whether a safekeeper follows this writer"),
            ("safekeeper_lag_bytes", "WAL that a safekeeper has not made durable yet"),
        ] {
            let family: Family<MemberLabel, Gauge<i64, AtomicI64>> = Family::default();
            for member in &members {
                let value = match name {
                    "safekeeper_follows" => i64::from(member.follows),
                    _ => view.record_end().bytes_since(member.flush_lsn) as i64,
                };
                family.get_or_create(&MemberLabel { member: member.member.0 }).set(value);
            }
            family.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        if let Some(area) = &*self.area.lock().unwrap_or_else(PoisonError::into_inner) {
            for (name, help, value) in [
                ("wal_writes", "WAL writes of the present PostgreSQL", area.write_sequence.load(Relaxed)),
                ("wal_flushes", "WAL flushes of the present PostgreSQL", area.wal_flushes.load(Relaxed)),
                ("lease_waits", "Sends that found the read lease expired", area.lease_waits.load(Relaxed)),
            ] {
                let metric = ConstCounter::new(value);
                metric.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
            }
        }
        if let Some(blocks) = &*self.blocks.lock().unwrap_or_else(PoisonError::into_inner) {
            let counters = blocks.map().counters();
            for (name, help, value) in [
                ("block_hits", "Blocks read that were in the cache", counters.hits),
                ("block_fills", "Blocks that came from the page service", counters.fills),
                ("block_waits", "Waits of PostgreSQL for a block", counters.waits),
                ("block_prefetches", "Blocks asked for in advance", counters.prefetches),
                (
                    "block_prefetches_dropped",
                    "Blocks not asked for in advance: too many were",
                    counters.prefetches_dropped,
                ),
                ("block_evictions", "Blocks given back", counters.evictions),
                (
                    "block_failures",
                    "Blocks that the page service did not give in time, or could not",
                    counters.failures,
                ),
            ] {
                let metric = ConstCounter::new(value);
                metric.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
            }
            let (lag, delay) = view.lag();
            for (name, help, value) in [
                ("cached_blocks", "Blocks in the cache that can be given back", counters.present),
                (
                    "page_service_ingest_lag_bytes",
                    "Committed WAL that the slowest shard cannot serve yet",
                    lag.ingest_bytes,
                ),
                (
                    "page_service_durable_lag_bytes",
                    "Committed WAL that the slowest shard has not brought to object storage",
                    lag.durable_bytes,
                ),
                (
                    "flush_delay_microseconds",
                    "How much each WAL flush is slowed for that lag",
                    delay.as_micros() as u64,
                ),
            ] {
                let metric = ConstGauge::new(value as i64);
                metric.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for SharedArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedArea").finish_non_exhaustive()
    }
}
