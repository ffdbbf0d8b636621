//! A server's life as test data, shards that hold their values in memory, and the comparison of the two.
#![allow(dead_code, reason = "each test crate uses its own part")]

pub mod capture;
pub mod files;
pub mod judge;
pub mod store;
