//! The counters of `pg_control`, as recovery follows them through WAL.
//!
//! Sources: `xlog_redo` (`access/transam/xlog.c`), `multixact_redo`, `commit_ts_redo`, `TransactionTreeSetCommitTsData`.

use pgformat::{CHECKPOINT_BYTES, CheckPoint, ControlFile, ServerSettings, WalLevel};
use pgtypes::{Lsn, PgTimeline};
use wal::{Record, rmgr, xlog_info};

use crate::{
    MetadataError,
    change::Context,
    multixact::Multixact,
    precedes,
    reader::Reader,
    rmgr_id,
    transaction::{Ending, FIRST_NORMAL_XID},
};

/// Kind of record of resource manager XLOG: settings that standbys need.
pub(crate) const PARAMETER_CHANGE: u8 = 0x60;
const NEXT_OID: u8 = 0x30;
const FULL_PAGE_WRITES_CHANGE: u8 = 0x80;
const COMMIT_TIMESTAMPS_TRUNCATE: u8 = 0x10;

/// What a checkpoint would say, were one made after the last record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counters {
    /// The last checkpoint, with counters that moved on. As after a recovery, the next oid is that up to which oids were
    /// logged as used, and the oldest ids are those that a checkpoint named. `redo`, `time` and `oldest_active_xid` are
    /// the last checkpoint's.
    pub checkpoint: CheckPoint,
    /// Start of the last checkpoint's record.
    pub checkpoint_lsn: Lsn,
    /// Settings at the last start of a server.
    pub settings: ServerSettings,
}

impl Counters {
    /// Begins with a cleanly shut down server.
    pub fn from_control(control: &ControlFile) -> Counters {
        Counters { checkpoint: control.checkpoint, checkpoint_lsn: control.checkpoint_lsn, settings: control.settings }
    }

    /// What [`crate::changes_of`] needs to know.
    pub fn context(&self) -> Context {
        Context {
            track_commit_timestamp: self.settings.track_commit_timestamp,
            next_full_xid: self.checkpoint.next_full_xid,
        }
    }

    /// Follows a record. `max_full_xid` is that of the frame summary at its end: every record counts for the next
    /// transaction id, those that a filtered log leaves out, too.
    ///
    /// # Errors
    /// The record is not laid out like its kind.
    pub fn replay(&mut self, record: &Record, max_full_xid: u64) -> Result<(), MetadataError> {
        match record.info.rmgr {
            rmgr::XLOG => self.replay_xlog(record)?,
            rmgr::XACT if self.settings.track_commit_timestamp => {
                let newest = Ending::of(record)?.filter(|ending| ending.committed).map(|ending| ending.newest_xid());
                advance(&mut self.checkpoint.newest_commit_ts_xid, newest);
            }
            rmgr::MULTIXACT => self.replay_multixact(record)?,
            rmgr_id::COMMIT_TIMESTAMP if record.info.info & 0xF0 == COMMIT_TIMESTAMPS_TRUNCATE => {
                let mut main = Reader::new(record.main_data());
                main.skip(8)?;
                let oldest = main.u32()?;
                if self.checkpoint.oldest_commit_ts_xid != 0 {
                    advance(&mut self.checkpoint.oldest_commit_ts_xid, Some(oldest));
                }
            }
            _ => {}
        }
        self.observe(max_full_xid);
        Ok(())
    }

    /// Takes note of transaction ids that were seen elsewhere, up to this one.
    pub fn observe(&mut self, max_full_xid: u64) {
        let mut next = max_full_xid.saturating_add(1);
        // The first ids of each epoch have fixed meanings.
        if (next as u32) < FIRST_NORMAL_XID {
            next = next & !0xFFFF_FFFF | u64::from(FIRST_NORMAL_XID);
        }
        self.checkpoint.next_full_xid = self.checkpoint.next_full_xid.max(next);
    }

    fn replay_xlog(&mut self, record: &Record) -> Result<(), MetadataError> {
        let mut main = Reader::new(record.main_data());
        match record.info.info & 0xF0 {
            xlog_info::CHECKPOINT_SHUTDOWN => {
                self.checkpoint = checkpoint_of(record)?;
                self.checkpoint_lsn = record.info.start;
            }
            xlog_info::CHECKPOINT_ONLINE => {
                let theirs = checkpoint_of(record)?;
                self.checkpoint_lsn = record.info.start;
                self.follow_online(theirs);
            }
            xlog_info::END_OF_RECOVERY => {
                main.skip(8)?;
                self.checkpoint.timeline = PgTimeline(main.u32()?);
                self.checkpoint.previous_timeline = PgTimeline(main.u32()?);
            }
            NEXT_OID => self.checkpoint.next_oid = main.u32()?,
            FULL_PAGE_WRITES_CHANGE => self.checkpoint.full_page_writes = main.bool()?,
            PARAMETER_CHANGE => {
                let settings = settings_of(record)?;
                let (oldest, newest) =
                    (&mut self.checkpoint.oldest_commit_ts_xid, &mut self.checkpoint.newest_commit_ts_xid);
                if !settings.track_commit_timestamp {
                    (*oldest, *newest) = (0, 0);
                } else if *oldest == 0 {
                    let next = self.checkpoint.next_full_xid as u32;
                    (*oldest, *newest) = (next, next);
                }
                self.settings = settings;
                self.checkpoint.wal_level = settings.wal_level;
            }
            _ => {}
        }
        Ok(())
    }

    /// A checkpoint of a running server was begun before its record: counters may be ahead of it already.
    fn follow_online(&mut self, theirs: CheckPoint) {
        let ours = self.checkpoint;
        // What it says of the next oid may be older than the last record that did.
        self.checkpoint = CheckPoint { next_oid: ours.next_oid, ..theirs };
        let now = &mut self.checkpoint;
        now.next_full_xid = now.next_full_xid.max(ours.next_full_xid);
        for (now, ours) in [
            (&mut now.next_multi, ours.next_multi),
            (&mut now.next_multi_offset, ours.next_multi_offset),
            (&mut now.newest_commit_ts_xid, ours.newest_commit_ts_xid),
            (&mut now.oldest_commit_ts_xid, ours.oldest_commit_ts_xid),
        ] {
            advance(now, Some(ours));
        }
        if precedes(now.oldest_xid, ours.oldest_xid) {
            (now.oldest_xid, now.oldest_xid_database) = (ours.oldest_xid, ours.oldest_xid_database);
        }
        if precedes(now.oldest_multi, ours.oldest_multi) {
            (now.oldest_multi, now.oldest_multi_database) = (ours.oldest_multi, ours.oldest_multi_database);
        }
    }

    fn replay_multixact(&mut self, record: &Record) -> Result<(), MetadataError> {
        match Multixact::of(record)? {
            Some(Multixact::Create(creation)) => {
                advance(&mut self.checkpoint.next_multi, Some(creation.next_id()));
                advance(&mut self.checkpoint.next_multi_offset, Some(creation.end_offset()));
            }
            Some(Multixact::Truncate(truncation)) => {
                self.checkpoint.oldest_multi = truncation.oldest;
                self.checkpoint.oldest_multi_database = truncation.database;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Moves an id forward in its circle.
fn advance(id: &mut u32, to: Option<u32>) {
    if let Some(to) = to.filter(|to| precedes(*id, *to)) {
        *id = to;
    }
}

fn checkpoint_of(record: &Record) -> Result<CheckPoint, MetadataError> {
    let bytes = record.main_data().first_chunk::<CHECKPOINT_BYTES>();
    let bytes = bytes.ok_or(MetadataError::Record("its data end too early"))?;
    CheckPoint::parse(bytes).map_err(|_| MetadataError::Record("there is no such wal_level"))
}

/// `xl_parameter_change`.
pub(crate) fn settings_of(record: &Record) -> Result<ServerSettings, MetadataError> {
    let mut main = Reader::new(record.main_data());
    let mut number = || main.u32().map(|number| number as i32);
    let (max_connections, max_worker_processes, max_wal_senders) = (number()?, number()?, number()?);
    let (max_prepared_transactions, max_locks_per_transaction, wal_level) = (number()?, number()?, number()?);
    let levels = [WalLevel::Minimal, WalLevel::Replica, WalLevel::Logical];
    let wal_level = levels.into_iter().find(|level| *level as i32 == wal_level);
    Ok(ServerSettings {
        wal_level: wal_level.ok_or(MetadataError::Record("there is no such wal_level"))?,
        wal_log_hints: main.bool()?,
        max_connections,
        max_worker_processes,
        max_wal_senders,
        max_prepared_transactions,
        max_locks_per_transaction,
        track_commit_timestamp: main.bool()?,
    })
}
