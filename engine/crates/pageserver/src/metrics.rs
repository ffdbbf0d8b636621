//! Names and help texts of the metrics, in one place.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// Seconds: a page from memory takes 10 µs, from a local disk 100 µs, from object storage 10 ms and more.
const READ_BUCKETS: [f64; 15] =
    [0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 2.0, 10.0];

/// Seconds: of a layer of 64 MiB, on the way to object storage.
const UPLOAD_BUCKETS: [f64; 10] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// What is counted per read: layers, blocks, values.
const COUNT_BUCKETS: [f64; 8] = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 128.0];

/// A fixed word.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    /// Why.
    pub reason: &'static str,
}

/// What was asked of object storage.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OperationLabels {
    operation: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriverLabels {
    driver: &'static str,
}

/// All metrics of the process. Clones of a metric share its value.
#[derive(Clone)]
pub struct Metrics {
    /// Everything up to here can be read.
    pub ingested_lsn: Gauge,
    /// Everything up to here is in object storage.
    pub durable_lsn: Gauge,
    /// Committed, as far as known.
    pub commit_lsn: Gauge,
    /// Nothing before this can be read.
    pub horizon_lsn: Gauge,
    /// WAL positions that were taken in, as bytes.
    pub ingested_bytes: Counter,
    /// Bytes received from safekeepers.
    pub received_bytes: Counter,
    /// Records taken in.
    pub items: Counter,
    /// Records that could not be understood.
    pub poisoned: Counter,
    /// Connections to safekeepers that ended, by reason.
    pub feed_ends: Family<ReasonLabels, Counter>,
    /// Pages answered.
    pub pages: Counter,
    /// Time from request to answer of a request for pages.
    pub read_seconds: Histogram,
    /// Layers that a page needed, open and frozen ones included.
    pub layers_visited: Histogram,
    /// Blocks that a page needed from layer files.
    pub blocks_read: Histogram,
    /// Values that a page was made from.
    pub values_applied: Histogram,
    /// Requests that failed, by code.
    pub failures: Family<ReasonLabels, Counter>,
    /// Connections of readers.
    pub connections: Gauge,
    /// Blocks of layers read from local files.
    pub local_reads: Counter,
    /// Blocks of layers read from object storage, because the file is not here.
    pub remote_reads: Counter,
    /// Local files that were damaged, and fetched again.
    pub damaged_files: Counter,
    /// Layers whose object is lost or damaged.
    pub lost_layers: Gauge,
    /// Bytes of local layer files.
    pub local_bytes: Gauge<u64, AtomicU64>,
    /// Local files removed to make room.
    pub evictions: Counter,
    /// Bytes in memory: the open layer and frozen ones.
    pub memory_bytes: Gauge<u64, AtomicU64>,
    /// Bytes in memory: indexes of layer files.
    pub index_bytes: Gauge<u64, AtomicU64>,
    /// Layers that older owners left in object storage, removed.
    pub orphans: Counter,
    /// Bytes of layers that object storage does not have yet.
    pub backlog_bytes: Gauge<u64, AtomicU64>,
    /// Layers uploaded.
    pub uploads: Counter,
    /// Bytes uploaded.
    pub uploaded_bytes: Counter,
    /// Time of an upload.
    pub upload_seconds: Histogram,
    /// Work with object storage that failed in all attempts of a call, and is begun again.
    pub storage_retries: Counter,
    /// Calls of object storage that ended, by operation.
    pub storage_calls: Family<OperationLabels, Counter>,
    /// Those that failed.
    pub storage_failures: Family<OperationLabels, Counter>,
    /// Attempts beyond the first of a call.
    pub storage_attempts: Family<OperationLabels, Counter>,
    /// Bytes of objects that were transferred.
    pub storage_bytes: Family<OperationLabels, Counter>,
    /// Layers in the map.
    pub layers: Gauge,
    /// Compactions done, by kind.
    pub compactions: Family<ReasonLabels, Counter>,
    /// Layers removed.
    pub collected: Counter,
    driver: Family<DriverLabels, Gauge>,
}

impl Metrics {
    /// Registers everything in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("lakebase_pageserver");
        let m = Self {
            ingested_lsn: Gauge::default(),
            durable_lsn: Gauge::default(),
            commit_lsn: Gauge::default(),
            horizon_lsn: Gauge::default(),
            ingested_bytes: Counter::default(),
            received_bytes: Counter::default(),
            items: Counter::default(),
            poisoned: Counter::default(),
            feed_ends: Family::default(),
            pages: Counter::default(),
            read_seconds: Histogram::new(READ_BUCKETS),
            layers_visited: Histogram::new(COUNT_BUCKETS),
            blocks_read: Histogram::new(COUNT_BUCKETS),
            values_applied: Histogram::new(COUNT_BUCKETS),
            failures: Family::default(),
            connections: Gauge::default(),
            local_reads: Counter::default(),
            remote_reads: Counter::default(),
            damaged_files: Counter::default(),
            lost_layers: Gauge::default(),
            local_bytes: Gauge::default(),
            evictions: Counter::default(),
            memory_bytes: Gauge::default(),
            index_bytes: Gauge::default(),
            orphans: Counter::default(),
            backlog_bytes: Gauge::default(),
            uploads: Counter::default(),
            uploaded_bytes: Counter::default(),
            upload_seconds: Histogram::new(UPLOAD_BUCKETS),
            storage_retries: Counter::default(),
            storage_calls: Family::default(),
            storage_failures: Family::default(),
            storage_attempts: Family::default(),
            storage_bytes: Family::default(),
            layers: Gauge::default(),
            compactions: Family::default(),
            collected: Counter::default(),
            driver: Family::default(),
        };
        m.register_ingest(registry);
        m.register_reads(registry);
        m.register_layers(registry);
        m
    }

    fn register_ingest(&self, registry: &mut Registry) {
        registry.register("ingested_lsn", "Everything up to here can be read", self.ingested_lsn.clone());
        registry.register("durable_lsn", "Everything up to here is in object storage", self.durable_lsn.clone());
        registry.register("commit_lsn", "Committed end of the log, as far as known", self.commit_lsn.clone());
        registry.register("horizon_lsn", "Nothing before this can be read", self.horizon_lsn.clone());
        registry.register_with_unit(
            "ingested",
            "Distance in the log that was taken in",
            Unit::Bytes,
            self.ingested_bytes.clone(),
        );
        registry.register_with_unit(
            "received",
            "Received from safekeepers and the WAL archive",
            Unit::Bytes,
            self.received_bytes.clone(),
        );
        registry.register("items", "Records taken in", self.items.clone());
        registry.register("poisoned", "Records that could not be understood", self.poisoned.clone());
        registry.register("feed_ends", "Ends of connections to safekeepers, by reason", self.feed_ends.clone());
    }

    fn register_reads(&self, registry: &mut Registry) {
        registry.register("pages", "Pages answered", self.pages.clone());
        registry.register_with_unit(
            "read",
            "Time of a request for pages, waiting for WAL included",
            Unit::Seconds,
            self.read_seconds.clone(),
        );
        registry.register("layers_visited", "Layers that a page needed", self.layers_visited.clone());
        registry.register("blocks_read", "Blocks of layer files that a page needed", self.blocks_read.clone());
        registry.register("values_applied", "Values that a page was made from", self.values_applied.clone());
        registry.register("failures", "Requests that failed, by code", self.failures.clone());
        registry.register("connections", "Open connections of readers", self.connections.clone());
        registry.register("local_reads", "Blocks of layers read from local files", self.local_reads.clone());
        registry.register("remote_reads", "Blocks of layers read from object storage", self.remote_reads.clone());
    }

    fn register_layers(&self, registry: &mut Registry) {
        registry.register("damaged_files", "Local layer files that were damaged", self.damaged_files.clone());
        registry.register("lost_layers", "Layers whose object is lost or damaged", self.lost_layers.clone());
        registry.register_with_unit("local", "Local layer files", Unit::Bytes, self.local_bytes.clone());
        registry.register("evictions", "Local layer files removed to make room", self.evictions.clone());
        registry.register_with_unit("memory", "Open and frozen layers", Unit::Bytes, self.memory_bytes.clone());
        registry.register_with_unit("index", "Indexes of layer files in memory", Unit::Bytes, self.index_bytes.clone());
        registry.register("orphans", "Layers of older owners that nobody named, removed", self.orphans.clone());
        registry.register_with_unit("backlog", "Layers not uploaded yet", Unit::Bytes, self.backlog_bytes.clone());
        registry.register("uploads", "Layers uploaded", self.uploads.clone());
        registry.register_with_unit("uploaded", "Layers uploaded", Unit::Bytes, self.uploaded_bytes.clone());
        registry.register_with_unit("upload", "Time of an upload", Unit::Seconds, self.upload_seconds.clone());
        registry.register("storage_retries", "Work with object storage begun again", self.storage_retries.clone());
        registry.register("storage_calls", "Calls of object storage", self.storage_calls.clone());
        registry.register("storage_failures", "Calls of object storage that failed", self.storage_failures.clone());
        registry.register(
            "storage_attempts",
            "Attempts beyond the first of a call of object storage",
            self.storage_attempts.clone(),
        );
        registry.register_with_unit(
            "storage",
            "Transferred from and to object storage",
            Unit::Bytes,
            self.storage_bytes.clone(),
        );
        registry.register("layers", "Layers in the map", self.layers.clone());
        registry.register("compactions", "Compactions done, by kind", self.compactions.clone());
        registry.register("collected", "Layers removed", self.collected.clone());
        registry.register("io_driver", "1 for the way in which I/O reaches the kernel", self.driver.clone());
    }

    /// Brings the figures of object storage up to date, which only rise.
    pub fn show_storage(&self, storage: &remote_storage::Metrics) {
        for now in storage.snapshot() {
            let labels = OperationLabels { operation: now.operation.name() };
            for (family, value) in [
                (&self.storage_calls, now.calls),
                (&self.storage_failures, now.failures),
                (&self.storage_attempts, now.retries),
                (&self.storage_bytes, now.bytes),
            ] {
                let counter = family.get_or_create(&labels);
                counter.inc_by(value.saturating_sub(counter.get()));
            }
        }
    }

    /// Says how I/O reaches the kernel.
    pub fn set_driver(&self, kind: driver::DriverKind) {
        self.driver.get_or_create(&DriverLabels { driver: kind.as_str() }).set(1);
    }
}
