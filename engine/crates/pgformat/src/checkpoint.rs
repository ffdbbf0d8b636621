//! The body of a checkpoint record, of which `pg_control` keeps a copy.

use pgtypes::{Lsn, PgTimeline};

use crate::bytes::{i32_at, put_i32, put_u32, put_u64, u32_at, u64_at};

/// Bytes of a checkpoint (`sizeof(CheckPoint)`).
pub const CHECKPOINT_BYTES: usize = 88;

/// How much PostgreSQL writes to WAL (`WalLevel`, `access/xlog.h`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum WalLevel {
    /// Enough for crash recovery.
    Minimal = 0,
    /// Enough for standbys.
    Replica = 1,
    /// Enough for logical decoding.
    Logical = 2,
}

impl WalLevel {
    pub(crate) fn from_number(number: i32) -> Option<WalLevel> {
        [WalLevel::Minimal, WalLevel::Replica, WalLevel::Logical].into_iter().find(|level| *level as i32 == number)
    }
}

/// State of the counters at a checkpoint (`CheckPoint`, `catalog/pg_control.h`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckPoint {
    /// Where replay begins.
    pub redo: Lsn,
    /// Timeline of the record.
    pub timeline: PgTimeline,
    /// Timeline before, if the record begins one; else the same.
    pub previous_timeline: PgTimeline,
    /// Setting `full_page_writes`.
    pub full_page_writes: bool,
    /// Setting `wal_level`.
    pub wal_level: WalLevel,
    /// Next transaction id, with its epoch.
    pub next_full_xid: u64,
    /// Next object id.
    pub next_oid: u32,
    /// Next multixact id.
    pub next_multi: u32,
    /// Next place of a multixact member.
    pub next_multi_offset: u32,
    /// Oldest transaction id that tables may hold unfrozen, in the whole cluster.
    pub oldest_xid: u32,
    /// Database that holds it.
    pub oldest_xid_database: u32,
    /// Oldest multixact id that tables may hold.
    pub oldest_multi: u32,
    /// Database that holds it.
    pub oldest_multi_database: u32,
    /// Seconds since 1970 (`pg_time_t`).
    pub time: i64,
    /// Oldest transaction with a stored commit time.
    pub oldest_commit_ts_xid: u32,
    /// Newest transaction with a stored commit time.
    pub newest_commit_ts_xid: u32,
    /// Oldest transaction in progress; 0 at a shutdown.
    pub oldest_active_xid: u32,
}

impl CheckPoint {
    /// Reads a checkpoint from its bytes: the main data of its record, or its place in `pg_control`.
    ///
    /// # Errors
    /// The number of the WAL level, when there is none such.
    pub fn parse(bytes: &[u8; CHECKPOINT_BYTES]) -> Result<CheckPoint, i32> {
        let wal_level = i32_at(bytes, 20);
        Ok(CheckPoint {
            redo: Lsn(u64_at(bytes, 0)),
            timeline: PgTimeline(u32_at(bytes, 8)),
            previous_timeline: PgTimeline(u32_at(bytes, 12)),
            full_page_writes: bytes[16] != 0,
            wal_level: WalLevel::from_number(wal_level).ok_or(wal_level)?,
            next_full_xid: u64_at(bytes, 24),
            next_oid: u32_at(bytes, 32),
            next_multi: u32_at(bytes, 36),
            next_multi_offset: u32_at(bytes, 40),
            oldest_xid: u32_at(bytes, 44),
            oldest_xid_database: u32_at(bytes, 48),
            oldest_multi: u32_at(bytes, 52),
            oldest_multi_database: u32_at(bytes, 56),
            time: u64_at(bytes, 64) as i64,
            oldest_commit_ts_xid: u32_at(bytes, 72),
            newest_commit_ts_xid: u32_at(bytes, 76),
            oldest_active_xid: u32_at(bytes, 80),
        })
    }

    /// The checkpoint's bytes; padding is zero.
    pub fn to_bytes(&self) -> [u8; CHECKPOINT_BYTES] {
        let mut bytes = [0; CHECKPOINT_BYTES];
        put_u64(&mut bytes, 0, self.redo.0);
        put_u32(&mut bytes, 8, self.timeline.0);
        put_u32(&mut bytes, 12, self.previous_timeline.0);
        bytes[16] = u8::from(self.full_page_writes);
        put_i32(&mut bytes, 20, self.wal_level as i32);
        put_u64(&mut bytes, 24, self.next_full_xid);
        put_u32(&mut bytes, 32, self.next_oid);
        put_u32(&mut bytes, 36, self.next_multi);
        put_u32(&mut bytes, 40, self.next_multi_offset);
        put_u32(&mut bytes, 44, self.oldest_xid);
        put_u32(&mut bytes, 48, self.oldest_xid_database);
        put_u32(&mut bytes, 52, self.oldest_multi);
        put_u32(&mut bytes, 56, self.oldest_multi_database);
        put_u64(&mut bytes, 64, self.time as u64);
        put_u32(&mut bytes, 72, self.oldest_commit_ts_xid);
        put_u32(&mut bytes, 76, self.newest_commit_ts_xid);
        put_u32(&mut bytes, 80, self.oldest_active_xid);
        bytes
    }
}
