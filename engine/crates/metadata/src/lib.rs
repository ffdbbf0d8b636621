//! What WAL says beside the pages of relations: the state that a page server keeps under keys and a cold start needs.
//!
//! [`changes_of`] names what a record changes, [`apply_slru`] does to one page of an SLRU what the record says, and
//! [`Counters::replay`] follows the counters of `pg_control`. [`two_phase_file`] and [`Origins`] make the files of prepared
//! transactions and replication origins. All are functions of their arguments: records come in the order of the log, and
//! nothing here knows where values are kept.
//!
//! SLRU pages carry no LSN. A record may be replayed twice, but not after a later one.
//!
//! Left out, because no cold start reads it: `pg_subtrans` (it serves transactions in progress, of which there are none
//! after a start; PostgreSQL empties it), `pg_notify`, `pg_serial`, `pg_snapshots`, replication slots. Logical messages
//! change nothing; tablespaces never enter the log. Pages of relations are the crate `redo`'s.
//!
//! The judge is PostgreSQL itself: `tests/files_of_a_server.rs`. Read next: `change.rs`, `slru.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod change;
mod counters;
mod counters_codec;
mod multixact;
mod origin;
mod reader;
mod slru;
mod slru_part;
mod transaction;
mod two_phase;

pub use change::{Change, Context, changes_of};
pub use counters::Counters;
pub use counters_codec::CountersError;
pub use origin::{Origins, OriginsError};
pub use slru::{SLRU_PAGE_BYTES, Slru, SlruCut, SlruPage, apply_slru};
pub use slru_part::slru_part;
pub use two_phase::two_phase_file;

/// The record's data are not those of its kind, or the page is not one that it changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MetadataError {
    /// The record was not written by PostgreSQL 17.
    #[error("the record does not fit its kind: {0}")]
    Record(&'static str),
    /// The caller's mistake.
    #[error("the record does not change this page")]
    NotTouched,
}

/// Numbers of resource managers (`access/rmgrlist.h`) that `wal` has no name for.
mod rmgr_id {
    pub const CLOG: u8 = 3;
    pub const RELATION_MAP: u8 = 7;
    pub const COMMIT_TIMESTAMP: u8 = 18;
    pub const REPLICATION_ORIGIN: u8 = 19;
}

/// Whether `a` is before `b` in the circle of 32-bit ids (`TransactionIdPrecedes`, `MultiXactIdPrecedes`).
fn precedes(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}
