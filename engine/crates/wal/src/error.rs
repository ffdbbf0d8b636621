//! Why a stream of WAL ends or is refused.

use pgtypes::Lsn;
use thiserror::Error;

/// The bytes from `lsn` on are not a continuation of the log.
///
/// At the tail of a log that a crash left behind any kind is simply the end; on bytes that a peer vouched for, every
/// kind is that peer's fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("WAL at {lsn}: {kind}")]
pub struct WalError {
    /// Start of the page or record that was refused.
    pub lsn: Lsn,
    /// What is wrong with it.
    pub kind: WalErrorKind,
}

/// What is wrong with a stream of WAL.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum WalErrorKind {
    /// Zeros where a record or a page begins: nothing was written here yet.
    #[error("end of WAL (zeros)")]
    EndOfWal,
    /// A page header does not belong here.
    #[error("page header: {0}")]
    PageHeader(PageFault),
    /// `xl_tot_len` is below a header's length or above the maximum.
    #[error("record length {0} is out of range")]
    RecordLength(u32),
    /// `xl_rmid` is neither PostgreSQL 17's nor in the range of custom resource managers.
    #[error("resource manager {0} does not exist")]
    ResourceManager(u8),
    /// `xl_prev` does not lead to the record before.
    #[error("record has back-link {found}, expected {expected}")]
    PrevLink {
        /// Start of the record before; [`Lsn::INVALID`] when it is not known and `found` is not even earlier.
        expected: Lsn,
        /// What the record says.
        found: Lsn,
    },
    /// The record's checksum is another.
    #[error("record checksum does not match")]
    Crc,
    /// The rest of a segment behind `XLOG_SWITCH` is not zero.
    #[error("segment is not zero behind its switch record")]
    SwitchRest,
    /// The bytes between a record and the next multiple of 8 are not zero. No checksum covers them, and PostgreSQL
    /// always writes zeros (`AdvanceXLInsertBuffer`): what is left of a recycled segment behind a torn write.
    #[error("padding behind a record is not zero")]
    Padding,
    /// The checksum matches, but the record is not laid out as PostgreSQL 17 does.
    #[error("record layout: {0}")]
    Record(RecordFault),
}

/// What is wrong with a page header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PageFault {
    /// Not PostgreSQL 17's magic number.
    #[error("magic number is {0:04X}, expected D116")]
    Magic(u16),
    /// Unknown flags, or a long header elsewhere than at a segment's start.
    #[error("flags {0:04X} are not valid here")]
    Flags(u16),
    /// The page is of another place: a recycled segment.
    #[error("page address is {0}")]
    Address(Lsn),
    /// The timeline is older than that of the page before.
    #[error("timeline {found} follows timeline {previous}")]
    Timeline {
        /// Timeline of the log so far.
        previous: u32,
        /// Timeline of this page.
        found: u32,
    },
    /// The log of another PostgreSQL cluster.
    #[error("system identifier is {found}, expected {expected}")]
    SystemId {
        /// Of this log.
        expected: u64,
        /// Of the page.
        found: u64,
    },
    /// The segment size is another.
    #[error("segment size is {0}")]
    SegmentSize(u32),
    /// The page size is not 8192.
    #[error("page size is {0}")]
    PageSize(u32),
    /// The page does not continue the record in progress with what is left of it.
    #[error("page continues a record with {found} bytes, expected {expected}")]
    Continuation {
        /// Bytes that the record in progress lacks; 0 when there is none.
        expected: u32,
        /// `xlp_rem_len`, or 0 when the page continues no record.
        found: u32,
    },
}

/// How a record with a valid checksum departs from PostgreSQL 17's layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum RecordFault {
    /// A part is longer than what is left of the record, or the parts do not fill it.
    #[error("parts do not add up to its length")]
    Length,
    /// An unknown block or data id, or one out of order.
    #[error("id {0} is not valid here")]
    Id(u8),
    /// Flags or lengths of a block reference contradict each other.
    #[error("block reference {0} contradicts itself")]
    Block(u8),
    /// `XLOG_OVERWRITE_CONTRECORD` names another record than the one that was broken off.
    #[error("overwrites record {found}, but the record broken off is {expected}")]
    Overwritten {
        /// Start of the record that was broken off.
        expected: Lsn,
        /// What the record says.
        found: Lsn,
    },
}
