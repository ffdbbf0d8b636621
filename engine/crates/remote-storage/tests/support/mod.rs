//! The stores that every test runs on: a local directory, and S3 where the environment names a server.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use layers::{HashRange, KeyRange, LayerDescription, LayerId, LayerKind, LsnRange, Manifest, ShardGeneration, ShardId};
use pgtypes::{BranchId, ClusterId, FrameSummary, LogId, Lsn, SystemId};
use remote_storage::{Faults, RemoteStorage, RetryPolicies, RetryPolicy};

/// A directory that is gone with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        let path = std::env::temp_dir().join(format!("lakebase-store-{:016x}", getrandom::u64().unwrap()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// URLs of empty stores, and the directory that they lie in. S3 is among them where `LAKEBASE_TEST_S3_URL` is set.
pub fn stores() -> (Scratch, Vec<String>) {
    let scratch = Scratch::new();
    let mut urls = vec![format!("file://{}/store", scratch.path().display())];
    match std::env::var("LAKEBASE_TEST_S3_URL") {
        Ok(url) => urls.push(format!("{url}/{:016x}", getrandom::u64().unwrap())),
        Err(_) => eprintln!("S3 is not tested: LAKEBASE_TEST_S3_URL is not set (eval \"$(scripts/s3-server start)\")"),
    }
    (scratch, urls)
}

/// Short budgets, for tests that go through them.
pub fn impatient() -> RetryPolicies {
    let policy = RetryPolicy {
        budget: Duration::from_secs(20),
        attempt_timeout: Duration::from_secs(10),
        attempts_max: 1000,
        pause_min: Duration::from_millis(1),
        pause_max: Duration::from_millis(20),
    };
    RetryPolicies { read: policy, write: policy, transfer: policy }
}

/// A store with faults.
pub fn faulty(url: &str, faults: &Faults) -> RemoteStorage {
    RemoteStorage::open_faulty(url, impatient(), faults.clone()).unwrap()
}

pub const LOG: LogId = LogId { cluster: ClusterId([0x11; 16]), branch: BranchId([0x22; 16]) };
pub const SHARD: ShardId = ShardId(3);

pub fn layer_id(generation: u64, number: u64) -> LayerId {
    LayerId { shard: SHARD, generation: ShardGeneration(generation), number }
}

pub fn description(id: LayerId) -> LayerDescription {
    LayerDescription {
        id,
        kind: LayerKind::Delta,
        level: 0,
        keys: KeyRange::ALL,
        lsns: LsnRange { after: Lsn(1), through: Lsn(2) },
        file_bytes: 100,
        values: 1,
        chain_max: 1,
    }
}

/// A manifest of these layers.
pub fn manifest(generation: u64, sequence: u64, layers: impl IntoIterator<Item = LayerId>) -> Manifest {
    Manifest {
        log: LOG,
        shard: SHARD,
        generation: ShardGeneration(generation),
        sequence,
        range: HashRange::ALL,
        stripe_blocks: 2048,
        system_id: SystemId(7),
        segment_bytes: 16 << 20,
        checksums: true,
        horizon: Lsn(1),
        through: FrameSummary { record_end: Lsn(100), ..FrameSummary::default() },
        next_layer: u64::MAX,
        layers: layers.into_iter().map(description).collect(),
    }
}
