//! What a storage did and how long it took, for whoever publishes it.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// What is asked of a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// An object, or a range of one.
    Get,
    /// A write over whatever is there.
    Put,
    /// A write that never overwrites.
    PutNew,
    /// Names of objects.
    List,
    /// Removal.
    Delete,
    /// A part of a large object.
    PutPart,
    /// A local file to an object, its parts included.
    Upload,
    /// An object to a local file, its parts included.
    Download,
}

impl Operation {
    /// All of them, in the order of [`Metrics::snapshot`].
    pub const ALL: [Operation; 8] = [
        Operation::Get,
        Operation::Put,
        Operation::PutNew,
        Operation::List,
        Operation::Delete,
        Operation::PutPart,
        Operation::Upload,
        Operation::Download,
    ];

    /// As a label of a metric.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Get => "get",
            Operation::Put => "put",
            Operation::PutNew => "put_new",
            Operation::List => "list",
            Operation::Delete => "delete",
            Operation::PutPart => "put_part",
            Operation::Upload => "upload",
            Operation::Download => "download",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::PutNew => "create",
            Operation::PutPart => "put a part of",
            operation => operation.name(),
        })
    }
}

/// Upper bounds of the buckets of [`OperationMetrics::latency_buckets`], seconds. Slower ones are in none.
pub const LATENCY_BUCKETS: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

#[derive(Default)]
struct Counters {
    calls: AtomicU64,
    failures: AtomicU64,
    retries: AtomicU64,
    bytes: AtomicU64,
    latency_us: AtomicU64,
    buckets: [AtomicU64; LATENCY_BUCKETS.len()],
}

/// Counts of every operation since the storage was opened.
#[derive(Default)]
pub struct Metrics([Counters; Operation::ALL.len()]);

/// Counts of one operation. They only rise.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct OperationMetrics {
    /// Which.
    pub operation: Operation,
    /// Calls that ended, failed ones included; an attempt is not a call.
    pub calls: u64,
    /// Calls that ended with an error other than that the object is not there.
    pub failures: u64,
    /// Attempts beyond the first of a call.
    pub retries: u64,
    /// Bytes of objects that were transferred.
    pub bytes: u64,
    /// Sum over the calls, with retries and pauses; seconds.
    pub latency_seconds: f64,
    /// Calls by duration: bucket `i` counts those of at most [`LATENCY_BUCKETS`]`[i]` that no lower one counts.
    pub latency_buckets: [u64; LATENCY_BUCKETS.len()],
}

impl Metrics {
    fn of(&self, operation: Operation) -> &Counters {
        &self.0[operation as usize]
    }

    pub(crate) fn retried(&self, operation: Operation) {
        self.of(operation).retries.fetch_add(1, Relaxed);
    }

    pub(crate) fn transferred(&self, operation: Operation, bytes: u64) {
        self.of(operation).bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn ended(&self, operation: Operation, took: Duration, failed: bool) {
        let counters = self.of(operation);
        counters.calls.fetch_add(1, Relaxed);
        counters.failures.fetch_add(u64::from(failed), Relaxed);
        counters.latency_us.fetch_add(took.as_micros() as u64, Relaxed);
        let seconds = took.as_secs_f64();
        if let Some(bucket) = LATENCY_BUCKETS.iter().position(|bound| seconds <= *bound) {
            counters.buckets[bucket].fetch_add(1, Relaxed);
        }
    }

    /// The counts now.
    pub fn snapshot(&self) -> [OperationMetrics; Operation::ALL.len()] {
        Operation::ALL.map(|operation| {
            let counters = self.of(operation);
            OperationMetrics {
                operation,
                calls: counters.calls.load(Relaxed),
                failures: counters.failures.load(Relaxed),
                retries: counters.retries.load(Relaxed),
                bytes: counters.bytes.load(Relaxed),
                latency_seconds: counters.latency_us.load(Relaxed) as f64 / 1e6,
                latency_buckets: std::array::from_fn(|bucket| counters.buckets[bucket].load(Relaxed)),
            }
        })
    }
}
