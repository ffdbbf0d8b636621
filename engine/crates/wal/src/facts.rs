//! The few facts that the frame summary takes from inside records, read while the bytes stream by.
//!
//! Only the kinds of records that carry such a fact are looked into; none of them has block references. A record may
//! come in slices of any size, so what is kept is one word and counters.

use pgtypes::{Lsn, PgTimeline};

use crate::{
    RecordFault, RecordHeader,
    format::{rmgr, xact_info, xlog_info},
};

/// Ids of the parts of a record that are not block references (`access/xlogrecord.h`).
pub(crate) mod part_id {
    pub const BLOCK_MAX: u8 = 32;
    pub const TOPLEVEL_XID: u8 = 252;
    pub const ORIGIN: u8 = 253;
    pub const DATA_LONG: u8 = 254;
    pub const DATA_SHORT: u8 = 255;
}

/// `xl_info & 0x70` of resource managers that hide the highest bit, `xl_info & 0xF0` of the others.
const STANDBY_RUNNING_XACTS: u8 = 0x10;
const MULTIXACT_CREATE_ID: u8 = 0x20;
const TABLESPACE_CREATE: u8 = 0x00;

/// Flags of `xl_xact_xinfo` that tell what lies before and behind the subtransactions.
mod xinfo {
    pub const DBINFO: u32 = 1 << 0;
    pub const SUBXACTS: u32 = 1 << 1;
    pub const RELFILELOCATORS: u32 = 1 << 2;
    pub const INVALS: u32 = 1 << 3;
    pub const TWOPHASE: u32 = 1 << 4;
    pub const DROPPED_STATS: u32 = 1 << 8;
}

/// First transaction id that PostgreSQL assigns (`FirstNormalTransactionId`); smaller ones have fixed meanings.
const FIRST_NORMAL_XID: u32 = 3;

/// The largest full transaction id of `max_full_xid` and `xid`, the epoch of which is that of its neighbourhood.
///
/// The rule of `AdvanceNextFullTransactionIdPastXid` (`access/transam/varsup.c`).
pub(crate) fn widen_xid(max_full_xid: u64, xid: u32) -> u64 {
    if xid < FIRST_NORMAL_XID {
        return max_full_xid;
    }
    let mut next = max_full_xid.wrapping_add(1);
    if (next as u32) < FIRST_NORMAL_XID {
        next = next & !0xFFFF_FFFF | u64::from(FIRST_NORMAL_XID);
    }
    let distance = xid.wrapping_sub(next as u32);
    if distance as i32 >= 0 { next.saturating_add(u64::from(distance)) } else { max_full_xid }
}

/// What the next word of the record is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Nothing more is of interest.
    Done,
    /// Id of a part in front of the main data.
    PartId,
    /// Its length, which is of no interest: the main data begins behind it.
    DataLength,
    XactTime,
    XactFlags,
    SubxactCount,
    RelationCount,
    StatsCount,
    InvalCount,
    PreparedXid,
    PrepareSubxactCount,
    PrepareGidLength,
    AssignmentTop,
    AssignmentCount,
    CheckpointTimeline,
    CheckpointNextXid,
    RecoveryTimeline,
    RunningNextXid,
    MemberCount,
    /// A transaction id of an array, `items` of which (this included) are left.
    Xid,
    OverwrittenLsn,
    TablespacePath,
}

/// The step that the main data begins with; `Done` when it holds nothing of interest.
fn main_step(header: &RecordHeader) -> Step {
    match header.rmgr {
        rmgr::XLOG => match header.info & 0xF0 {
            xlog_info::CHECKPOINT_SHUTDOWN | xlog_info::CHECKPOINT_ONLINE => Step::CheckpointTimeline,
            xlog_info::END_OF_RECOVERY => Step::RecoveryTimeline,
            xlog_info::OVERWRITE_CONTRECORD => Step::OverwrittenLsn,
            _ => Step::Done,
        },
        rmgr::XACT => match header.info & xact_info::OPERATION_MASK {
            xact_info::COMMIT | xact_info::COMMIT_PREPARED | xact_info::ABORT | xact_info::ABORT_PREPARED => {
                Step::XactTime
            }
            xact_info::PREPARE => Step::PrepareSubxactCount,
            xact_info::ASSIGNMENT => Step::AssignmentTop,
            _ => Step::Done,
        },
        rmgr::STANDBY if header.info & 0xF0 == STANDBY_RUNNING_XACTS => Step::RunningNextXid,
        rmgr::MULTIXACT if header.info & 0xF0 == MULTIXACT_CREATE_ID => Step::MemberCount,
        rmgr::TABLESPACE if header.info & 0xF0 == TABLESPACE_CREATE => Step::TablespacePath,
        _ => Step::Done,
    }
}

/// What a record says that the summary needs, and the state of reading it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// Largest transaction id so far, this record's included.
    pub max_full_xid: u64,
    /// Commit or abort time.
    pub commit_timestamp: Option<i64>,
    /// Timeline that the record begins.
    pub timeline: Option<PgTimeline>,
    /// Which record it says was broken off.
    pub overwritten: Option<Lsn>,
    /// Whether it creates a tablespace outside PGDATA.
    pub tablespace_location: bool,
    fault: Option<RecordFault>,
    main: Step,
    step: Step,
    /// Bytes to pass over before the word.
    skip: u64,
    word: u64,
    word_filled: u8,
    word_bytes: u8,
    items: u32,
    /// Bytes from the end of one transaction id of an array to the next.
    items_gap: u8,
    prepare_subxacts: u32,
    xact_flags: u32,
    xact_is_commit: bool,
}

impl Facts {
    /// Begins a record: counts `xl_xid`. `None` when nothing inside is of interest, as in most records.
    #[inline]
    pub fn begin(header: &RecordHeader, max_full_xid: u64) -> Option<Facts> {
        match main_step(header) {
            Step::Done => None,
            main => Some(Facts::expecting(main, header, max_full_xid)),
        }
    }

    fn expecting(main: Step, header: &RecordHeader, max_full_xid: u64) -> Facts {
        let operation = header.info & xact_info::OPERATION_MASK;
        let mut facts = Facts {
            max_full_xid: widen_xid(max_full_xid, header.xid),
            commit_timestamp: None,
            timeline: None,
            overwritten: None,
            tablespace_location: false,
            fault: None,
            main,
            step: Step::Done,
            skip: 0,
            word: 0,
            word_filled: 0,
            word_bytes: 0,
            items: 0,
            items_gap: 0,
            prepare_subxacts: 0,
            // Without the flag word, a commit or abort is its time alone.
            xact_flags: u32::from(header.info & xact_info::HAS_INFO != 0),
            xact_is_commit: operation == xact_info::COMMIT || operation == xact_info::COMMIT_PREPARED,
        };
        facts.expect(Step::PartId, 0, 1);
        facts
    }

    /// Whether [`Facts::payload`] has nothing more to find.
    #[inline]
    pub fn is_done(&self) -> bool {
        self.step == Step::Done
    }

    /// Reads the next bytes of the payload, which begins behind the record header.
    pub fn payload(&mut self, mut bytes: &[u8]) {
        while self.step != Step::Done && !bytes.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(bytes.len() as u64);
                self.skip -= skipped;
                bytes = &bytes[skipped as usize..];
                continue;
            }
            let missing = usize::from(self.word_bytes - self.word_filled).min(bytes.len());
            for byte in &bytes[..missing] {
                self.word |= u64::from(*byte) << (8 * self.word_filled);
                self.word_filled += 1;
            }
            bytes = &bytes[missing..];
            if self.word_filled == self.word_bytes {
                self.take_word(self.word);
            }
        }
    }

    /// Ends a record whose checksum matched.
    ///
    /// # Errors
    /// When the record ended too early for its kind, or had parts that its kind does not have.
    pub fn finish(&self) -> Result<(), RecordFault> {
        match (self.fault, self.step) {
            (Some(fault), _) => Err(fault),
            (None, Step::Done) => Ok(()),
            (None, _) => Err(RecordFault::Length),
        }
    }

    fn expect(&mut self, step: Step, skip: u64, word_bytes: u8) {
        self.step = step;
        self.skip = skip;
        self.word = 0;
        self.word_filled = 0;
        self.word_bytes = word_bytes;
    }

    fn expect_xids(&mut self, count: u32, skip: u64, gap: u8) {
        self.items = count;
        self.items_gap = gap;
        self.expect(Step::Xid, skip, 4);
    }

    fn observe_xid(&mut self, xid: u32) {
        self.max_full_xid = widen_xid(self.max_full_xid, xid);
    }

    fn take_word(&mut self, word: u64) {
        let low = word as u32;
        match self.step {
            Step::Done => {}
            Step::PartId => match word as u8 {
                part_id::ORIGIN => self.expect(Step::PartId, 2, 1),
                part_id::TOPLEVEL_XID => self.expect(Step::PartId, 4, 1),
                part_id::DATA_SHORT => self.expect(Step::DataLength, 0, 1),
                part_id::DATA_LONG => self.expect(Step::DataLength, 0, 4),
                other => {
                    self.fault = Some(RecordFault::Id(other));
                    self.step = Step::Done;
                }
            },
            Step::DataLength => match self.main {
                Step::XactTime => self.expect(Step::XactTime, 0, 8),
                // Offsets in xl_xact_prepare: nsubxacts 28, gidlen 54, 72 bytes in all.
                Step::PrepareSubxactCount => self.expect(Step::PrepareSubxactCount, 28, 4),
                Step::AssignmentTop => self.expect(Step::AssignmentTop, 0, 4),
                // Offsets in CheckPoint: ThisTimeLineID 8, nextXid 24.
                Step::CheckpointTimeline => self.expect(Step::CheckpointTimeline, 8, 4),
                Step::RecoveryTimeline => self.expect(Step::RecoveryTimeline, 8, 4),
                // Offset of nextXid in xl_running_xacts: 12.
                Step::RunningNextXid => self.expect(Step::RunningNextXid, 12, 4),
                // Offset of nmembers in xl_multixact_create: 8; each member is an xid and a status word.
                Step::MemberCount => self.expect(Step::MemberCount, 8, 4),
                Step::OverwrittenLsn => self.expect(Step::OverwrittenLsn, 0, 8),
                // Offset of ts_path in xl_tblspc_create_rec: 4. A tablespace in place has an empty path.
                Step::TablespacePath => self.expect(Step::TablespacePath, 4, 1),
                _ => self.step = Step::Done,
            },
            Step::XactTime => {
                self.commit_timestamp = Some(word as i64);
                if self.xact_flags == 0 {
                    self.step = Step::Done;
                } else {
                    self.expect(Step::XactFlags, 0, 4);
                }
            }
            Step::XactFlags => {
                self.xact_flags = low;
                let dbinfo_bytes = if low & xinfo::DBINFO != 0 { 8 } else { 0 };
                if low & xinfo::SUBXACTS != 0 {
                    self.expect(Step::SubxactCount, dbinfo_bytes, 4);
                } else {
                    self.expect_behind_subxacts(dbinfo_bytes);
                }
            }
            Step::SubxactCount if low == 0 => self.expect_behind_subxacts(0),
            Step::SubxactCount => self.expect_xids(low, 0, 0),
            Step::RelationCount => self.expect_behind_relations(u64::from(low) * 12),
            Step::StatsCount => self.expect_behind_stats(u64::from(low) * 12),
            Step::InvalCount => self.expect_behind_invals(u64::from(low) * 16),
            Step::PreparedXid => {
                self.observe_xid(low);
                self.step = Step::Done;
            }
            Step::PrepareSubxactCount => {
                self.prepare_subxacts = low;
                self.expect(Step::PrepareGidLength, 22, 2);
            }
            Step::PrepareGidLength if self.prepare_subxacts == 0 => self.step = Step::Done,
            Step::PrepareGidLength => self.expect_xids(self.prepare_subxacts, 16 + ((word + 7) & !7), 0),
            Step::AssignmentTop => {
                self.observe_xid(low);
                self.expect(Step::AssignmentCount, 0, 4);
            }
            Step::AssignmentCount if low == 0 => self.step = Step::Done,
            Step::AssignmentCount => self.expect_xids(low, 0, 0),
            Step::CheckpointTimeline => {
                self.timeline = Some(PgTimeline(low));
                self.expect(Step::CheckpointNextXid, 12, 8);
            }
            Step::CheckpointNextXid => {
                self.max_full_xid = self.max_full_xid.max(word.saturating_sub(1));
                self.step = Step::Done;
            }
            Step::RecoveryTimeline => {
                self.timeline = Some(PgTimeline(low));
                self.step = Step::Done;
            }
            Step::RunningNextXid => {
                // As ProcArrayApplyRecoveryInfo: the id before the next one has been assigned, whatever the log shows.
                match low {
                    0..FIRST_NORMAL_XID => {}
                    FIRST_NORMAL_XID => self.observe_xid(u32::MAX),
                    next => self.observe_xid(next - 1),
                }
                self.step = Step::Done;
            }
            Step::MemberCount if low == 0 => self.step = Step::Done,
            Step::MemberCount => self.expect_xids(low, 0, 4),
            Step::Xid => {
                self.observe_xid(low);
                self.items -= 1;
                if self.items > 0 {
                    let gap = u64::from(self.items_gap);
                    self.expect(Step::Xid, gap, 4);
                } else if self.main == Step::XactTime {
                    self.expect_behind_subxacts(0);
                } else {
                    self.step = Step::Done;
                }
            }
            Step::OverwrittenLsn => {
                self.overwritten = Some(Lsn(word));
                self.step = Step::Done;
            }
            Step::TablespacePath => {
                self.tablespace_location = word != 0;
                self.step = Step::Done;
            }
        }
    }

    /// Behind the subtransactions of a commit or abort only the xid of a prepared transaction is of interest; the
    /// arrays between are passed over in the order of `ParseCommitRecord` (`access/rmgrdesc/xactdesc.c`).
    fn expect_behind_subxacts(&mut self, skip: u64) {
        if self.xact_flags & xinfo::TWOPHASE == 0 {
            self.step = Step::Done;
        } else if self.xact_flags & xinfo::RELFILELOCATORS != 0 {
            self.expect(Step::RelationCount, skip, 4);
        } else {
            self.expect_behind_relations(skip);
        }
    }

    fn expect_behind_relations(&mut self, skip: u64) {
        if self.xact_flags & xinfo::DROPPED_STATS != 0 {
            self.expect(Step::StatsCount, skip, 4);
        } else {
            self.expect_behind_stats(skip);
        }
    }

    fn expect_behind_stats(&mut self, skip: u64) {
        if self.xact_is_commit && self.xact_flags & xinfo::INVALS != 0 {
            self.expect(Step::InvalCount, skip, 4);
        } else {
            self.expect_behind_invals(skip);
        }
    }

    fn expect_behind_invals(&mut self, skip: u64) {
        self.expect(Step::PreparedXid, skip, 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xid_takes_the_epoch_of_its_neighbourhood() {
        for (max, xid, expected) in [
            (0, 0, 0),
            (700, 2, 700),
            (0, 3, 3),
            (700, 699, 700),
            (700, 701, 701),
            (700, 0xFFFF_FFF0, 700),
            (0xFFFF_FFF0, 5, 0x1_0000_0005),
            (0xFFFF_FFFF, 3, 0x1_0000_0003),
            (0x1_0000_0005, 0xFFFF_FFF0, 0x1_0000_0005),
            (0x7_FFFF_FFFE, 0xFFFF_FFFF, 0x7_FFFF_FFFF),
        ] {
            assert_eq!(expected, widen_xid(max, xid), "{max:x} {xid:x}");
        }
    }
}
