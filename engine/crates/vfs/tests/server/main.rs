//! The library in a real PostgreSQL 17, with a test in the place of the compute agent.
//!
//! Needs PostgreSQL's programs: their directory in `LAKEBASE_TEST_PG`, or `pg_config` on PATH. As root the server runs
//! as the user `LAKEBASE_TEST_USER` (default `postgres`).
#![allow(clippy::unwrap_used, reason = "clippy's own exception knows only functions marked as tests")]

mod agent;
mod blocks;
mod client;
mod cluster;
mod commits;
mod files;
mod lease;
mod overhead;
mod pages;
mod start;

use std::time::{Duration, Instant};

/// Waits until `condition` holds, for at most `limit`; returns whether it did.
fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Longer than anything takes on a loaded machine; reached only by a failing test.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a test watches that something does not happen.
const WATCH: Duration = Duration::from_millis(400);
