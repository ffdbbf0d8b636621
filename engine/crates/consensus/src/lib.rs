//! Consensus of one log: one writer (the proposer), three or five acceptors, sticky fence.
//!
//! Pure state machines: no clocks, sockets, files or randomness. Time, identities and messages come in through
//! `handle_*`, everything to do comes out of `poll_command`. A reply that promises durability is released only by
//! the event that proves it. Read `message.rs` first, then `acceptor.rs`, then `proposer.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use core::time::Duration;

mod acceptor;
mod configuration;
mod durability;
mod history;
pub mod message;
mod peer;
mod proposer;

pub use acceptor::{
    Acceptor, AcceptorCommand, AcceptorIdentity, AcceptorState, CatchUpTask, FenceAccepted, HELD_MAX, RecoveryError,
};
pub use configuration::{Configuration, ConfigurationError, MEMBERS_MAX, Member};
pub use durability::Released;
pub use history::{TermEntry, TermHistory, TimelineHistory};
pub use proposer::{
    ANNOUNCE_DELAY, APPEND_BYTES_MAX, Grant, HEARTBEAT_INTERVAL, IN_FLIGHT_BYTES_MAX, Proposer, ProposerCommand,
    RETRY_DELAY, RETRY_DELAY_MAX, SILENCE_MAX, Trouble,
};

/// How long an acceptor's answer promises the writer that no later writer reports a commit: the writer may answer
/// reads from its own memory meanwhile. Also the longest that a new writer waits for the promises to the last one.
pub const LEASE_LENGTH: Duration = Duration::from_millis(1500);
