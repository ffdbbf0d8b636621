//! Consensus of one log: one writer (the proposer), three or five acceptors, sticky fence.
//!
//! Pure state machines: no clocks, sockets, files or randomness. Time, identities and messages come in through
//! `handle_*`, everything to do comes out of `poll_command`. A reply that promises durability is released only by
//! the event that proves it. Read `message.rs` first, then `acceptor.rs`, then `proposer.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod configuration;
mod history;
pub mod message;

pub use configuration::{Configuration, Member};
pub use history::{TermEntry, TermHistory, TimelineHistory};
