//! Names and help texts of the metrics, in one place.

use std::sync::atomic::AtomicU64;

use pgtypes::{LogId, Lsn};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// Seconds; a flush takes 50 µs on the fastest disks and a second on one that is failing.
const FLUSH_BUCKETS: [f64; 14] =
    [0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0];

/// Which log.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LogLabels {
    cluster: String,
    branch: String,
}

impl From<LogId> for LogLabels {
    fn from(log: LogId) -> Self {
        Self { cluster: log.cluster.to_string(), branch: log.branch.to_string() }
    }
}

/// Why something was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    /// A fixed word.
    pub reason: &'static str,
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PurposeLabels {
    /// A fixed word.
    pub purpose: &'static str,
}

/// How WAL was decoded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecoderLabels {
    decoder: &'static str,
}

/// Which shard of which log.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ShardLabels {
    cluster: String,
    branch: String,
    shard: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriverLabels {
    driver: &'static str,
}

/// All metrics of the process. Clones of a metric share its value.
#[derive(Clone)]
pub struct Metrics {
    /// Bytes of WAL made durable on behalf of proposers.
    pub appended_bytes: Family<LogLabels, Counter>,
    /// Durable end of each log.
    pub flush_lsn: Family<LogLabels, Gauge>,
    /// Committed end of each log.
    pub commit_lsn: Family<LogLabels, Gauge>,
    /// First position that each log still holds.
    pub oldest_lsn: Family<LogLabels, Gauge>,
    /// Disk synchronisations of segments, durable writes among them.
    pub flushes: Counter,
    /// Duration of each.
    pub flush_seconds: Histogram,
    /// Bytes fetched from peers.
    pub caught_up_bytes: Counter,
    /// Refusals sent.
    pub refused: Family<ReasonLabels, Counter>,
    /// Open connections.
    pub connections: Family<PurposeLabels, Gauge>,
    /// Sealed segments that failed their checksum.
    pub damaged_segments: Counter,
    /// Free bytes of the data disk.
    pub disk_free_bytes: Gauge<u64, AtomicU64>,
    /// 1 while new segments are refused because of the headroom.
    pub disk_full: Gauge,
    /// Pre-zeroed segments ready.
    pub spare_segments: Gauge,
    /// Logs.
    pub logs: Gauge,
    /// Bytes sent to page servers.
    pub feed_sent_bytes: Counter,
    feed_decoded_bytes: Family<DecoderLabels, Counter>,
    feed_received_lsn: Family<ShardLabels, Gauge>,
    feed_durable_lsn: Family<ShardLabels, Gauge>,
    driver: Family<DriverLabels, Gauge>,
}

impl Metrics {
    /// Registers everything in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("lakebase_safekeeper");
        let metrics = Self {
            appended_bytes: Family::default(),
            flush_lsn: Family::default(),
            commit_lsn: Family::default(),
            oldest_lsn: Family::default(),
            flushes: Counter::default(),
            flush_seconds: Histogram::new(FLUSH_BUCKETS),
            caught_up_bytes: Counter::default(),
            refused: Family::default(),
            connections: Family::default(),
            damaged_segments: Counter::default(),
            disk_free_bytes: Gauge::default(),
            disk_full: Gauge::default(),
            spare_segments: Gauge::default(),
            logs: Gauge::default(),
            feed_sent_bytes: Counter::default(),
            feed_decoded_bytes: Family::default(),
            feed_received_lsn: Family::default(),
            feed_durable_lsn: Family::default(),
            driver: Family::default(),
        };
        let m = &metrics;
        registry.register_with_unit(
            "appended",
            "WAL made durable for proposers",
            Unit::Bytes,
            m.appended_bytes.clone(),
        );
        registry.register("flush_lsn", "Durable end of the log", m.flush_lsn.clone());
        registry.register("commit_lsn", "Committed end of the log, as far as known", m.commit_lsn.clone());
        registry.register("oldest_lsn", "First position that is still held", m.oldest_lsn.clone());
        registry.register("flushes", "Disk synchronisations of segments", m.flushes.clone());
        registry.register_with_unit("flush", "Time of a disk synchronisation", Unit::Seconds, m.flush_seconds.clone());
        registry.register_with_unit("caught_up", "WAL fetched from peers", Unit::Bytes, m.caught_up_bytes.clone());
        registry.register("refused", "Requests refused, by reason", m.refused.clone());
        registry.register("connections", "Open connections, by purpose", m.connections.clone());
        registry.register("damaged_segments", "Segments that failed their checksum", m.damaged_segments.clone());
        registry.register_with_unit("disk_free", "Free space of the data disk", Unit::Bytes, m.disk_free_bytes.clone());
        registry.register("disk_full", "1 while appends are refused to keep the headroom", m.disk_full.clone());
        registry.register("spare_segments", "Pre-zeroed segments that are ready", m.spare_segments.clone());
        registry.register("logs", "Logs on this safekeeper", m.logs.clone());
        registry.register_with_unit("feed_sent", "Sent to page servers", Unit::Bytes, m.feed_sent_bytes.clone());
        registry.register_with_unit(
            "feed_decoded",
            "WAL decoded for page servers: once for all that follow closely, or for one that is behind",
            Unit::Bytes,
            m.feed_decoded_bytes.clone(),
        );
        registry.register(
            "feed_received_lsn",
            "Taken in by the shard, as its page server says",
            m.feed_received_lsn.clone(),
        );
        registry.register(
            "feed_durable_lsn",
            "On object storage, as the shard's page server says",
            m.feed_durable_lsn.clone(),
        );
        registry.register("io_driver", "1 for the way in which I/O reaches the kernel", m.driver.clone());
        metrics
    }

    /// Says how I/O reaches the kernel.
    pub fn set_driver(&self, kind: driver::DriverKind) {
        self.driver.get_or_create(&DriverLabels { driver: kind.as_str() }).set(1);
    }

    /// Counts a refusal.
    pub fn count_refusal(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Counts a connection until the guard is dropped.
    pub fn count_connection(&self, purpose: &'static str) -> ConnectionGuard {
        let gauge = self.connections.get_or_create(&PurposeLabels { purpose }).clone();
        gauge.inc();
        ConnectionGuard(gauge)
    }

    /// Counts WAL that was decoded, `shared` by all page servers near the end of the log or for one on its `own`.
    pub fn count_decoded(&self, decoder: &'static str, bytes: u64) {
        self.feed_decoded_bytes.get_or_create(&DecoderLabels { decoder }).inc_by(bytes);
    }

    /// How far a shard is.
    pub fn set_progress(&self, log: LogId, shard: u32, received: Lsn, durable: Lsn) {
        let labels = shard_labels(log, shard);
        self.feed_received_lsn.get_or_create(&labels).set(received.0 as i64);
        self.feed_durable_lsn.get_or_create(&labels).set(durable.0 as i64);
    }

    /// Forgets a shard.
    pub fn remove_shard(&self, log: LogId, shard: u32) {
        let labels = shard_labels(log, shard);
        self.feed_received_lsn.remove(&labels);
        self.feed_durable_lsn.remove(&labels);
    }

    /// The metrics of one log, looked up once.
    pub fn of_log(&self, log: LogId) -> LogMetrics {
        let labels = LogLabels::from(log);
        LogMetrics {
            appended_bytes: self.appended_bytes.get_or_create(&labels).clone(),
            flush_lsn: self.flush_lsn.get_or_create(&labels).clone(),
            commit_lsn: self.commit_lsn.get_or_create(&labels).clone(),
            oldest_lsn: self.oldest_lsn.get_or_create(&labels).clone(),
        }
    }

    /// Forgets a deleted log.
    pub fn remove_log(&self, log: LogId) {
        let labels = LogLabels::from(log);
        self.appended_bytes.remove(&labels);
        self.flush_lsn.remove(&labels);
        self.commit_lsn.remove(&labels);
        self.oldest_lsn.remove(&labels);
    }
}

fn shard_labels(log: LogId, shard: u32) -> ShardLabels {
    ShardLabels { cluster: log.cluster.to_string(), branch: log.branch.to_string(), shard }
}

/// Counts one open connection.
pub struct ConnectionGuard(Gauge);

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The metrics of one log.
pub struct LogMetrics {
    /// See [`Metrics`].
    pub appended_bytes: Counter,
    /// See [`Metrics`].
    pub flush_lsn: Gauge,
    /// See [`Metrics`].
    pub commit_lsn: Gauge,
    /// See [`Metrics`].
    pub oldest_lsn: Gauge,
}
