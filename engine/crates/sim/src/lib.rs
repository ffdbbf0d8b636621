//! Simulation: the pure machines of writers and safekeepers over simulated disks, wires and clocks, under a seed.
//!
//! [`run`] plays one seed; the same seed gives the same trace. Faults: `faults.rs`; rules: `checker.rs`; how to replay
//! one: `docs/testing.md`.
#![forbid(unsafe_code)]

mod checker;
mod disk;
mod event;
mod faults;
mod follower;
mod network;
mod operator;
mod random;
mod safekeeper;
mod trace;
mod world;
mod writer;

pub use world::{Counts, Outcome, Rules};

/// Plays a seed. `print`: tell every event on standard output.
pub fn run(seed: u64, rules: Rules, print: bool) -> Outcome {
    let played = std::panic::catch_unwind(|| world::World::new(seed, rules, print).run(seed));
    played.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
        Outcome { seed, trace_hash: 0, counts: Counts::default(), broken: Some(format!("panic: {text}")) }
    })
}
