//! Figures of followers.

use pgtypes::LogId;
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

type LogLabels = [(&'static str, String); 2];

/// Figures of followers, of all cores together.
#[derive(Clone, Default)]
pub struct FollowerMetrics {
    /// Open connections.
    pub followers: Gauge,
    /// WAL sent.
    pub sent_bytes: Counter,
    /// Slots that were removed because of lag or silence.
    pub slots_expired: Counter,
    /// Logins refused.
    pub refused: Counter,
    slots: Family<LogLabels, Gauge>,
}

impl FollowerMetrics {
    /// Registers everything in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("lakebase_safekeeper");
        registry.register("followers", "Open connections of followers", metrics.followers.clone());
        registry.register_with_unit("followed", "WAL sent to followers", Unit::Bytes, metrics.sent_bytes.clone());
        registry.register(
            "slots_expired",
            "Replication slots removed for lag or silence",
            metrics.slots_expired.clone(),
        );
        registry.register("followers_refused", "Followers that were not let in", metrics.refused.clone());
        registry.register("slots", "Replication slots", metrics.slots.clone());
        metrics
    }

    pub(super) fn count_slots(&self, log: LogId, count: usize) {
        self.slots.get_or_create(&labels(log)).set(count as i64);
    }

    pub(super) fn forget(&self, log: LogId) {
        self.slots.remove(&labels(log));
    }
}

fn labels(log: LogId) -> LogLabels {
    [("cluster", log.cluster.to_string()), ("branch", log.branch.to_string())]
}
