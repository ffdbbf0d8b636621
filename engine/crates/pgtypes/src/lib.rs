//! Words of the domain, without logic: log positions, identities, terms.
//!
//! Knows nothing about files, sockets or clocks. Everything else in the engine is written in these words; see
//! `docs/glossary.md` for what each of them means.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod consensus_ids;
mod ids;
mod lsn;
mod summary;
mod time;

pub use consensus_ids::{Attempt, Ballot, Generation, Incarnation, Term, WriterId};
pub use ids::{BranchId, ClusterId, DiskId, LogId, MemberId, ParseIdError, PgTimeline, SystemId};
pub use lsn::{Lsn, ParseLsnError};
pub use summary::FrameSummary;
pub use time::Instant;
