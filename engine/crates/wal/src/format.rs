//! Page and record headers, flags and numbers of PostgreSQL 17's WAL.
//!
//! Sources: `access/xlog_internal.h`, `access/xlogrecord.h`, `access/rmgrlist.h`, `catalog/pg_control.h`, `access/xact.h`.

use alloc::vec::Vec;

use pgtypes::{Lsn, PgTimeline, SystemId};

/// Bytes of a WAL page (`XLOG_BLCKSZ`).
pub const PAGE_BYTES: u64 = 8192;
/// Magic number of PostgreSQL 17's pages (`XLOG_PAGE_MAGIC`).
pub const PAGE_MAGIC: u16 = 0xD116;
/// Bytes of a page header (`SizeOfXLogShortPHD`).
pub const SHORT_PAGE_HEADER_BYTES: usize = 24;
/// Bytes of the header of a segment's first page (`SizeOfXLogLongPHD`).
pub const LONG_PAGE_HEADER_BYTES: usize = 40;
/// Bytes of a record header (`SizeOfXLogRecord`).
pub const RECORD_HEADER_BYTES: usize = 24;
/// Largest `xl_tot_len` that PostgreSQL writes (`XLogRecordMaxSize`).
pub const RECORD_BYTES_MAX: u32 = 1020 * 1024 * 1024;

/// Flags of a page (`xlp_info`).
pub mod page_flags {
    /// The page begins with the rest of a record.
    pub const FIRST_IS_CONTRECORD: u16 = 0x0001;
    /// The header is the long one.
    pub const LONG_HEADER: u16 = 0x0002;
    /// Page images that start here are optional; nobody writes it.
    pub const BKP_REMOVABLE: u16 = 0x0004;
    /// The record before was broken off by a crash and will not be continued.
    pub const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
    /// All of them.
    pub const ALL: u16 = 0x000F;
}

/// Resource managers (`xl_rmid`).
pub mod rmgr {
    /// Checkpoints, segment switches, page images.
    pub const XLOG: u8 = 0;
    /// Transactions.
    pub const XACT: u8 = 1;
    /// Files of relations.
    pub const SMGR: u8 = 2;
    /// Pages of transaction status.
    pub const CLOG: u8 = 3;
    /// Databases.
    pub const DBASE: u8 = 4;
    /// Tablespaces.
    pub const TABLESPACE: u8 = 5;
    /// Multixacts.
    pub const MULTIXACT: u8 = 6;
    /// Relation maps.
    pub const RELATION_MAP: u8 = 7;
    /// Running transactions and exclusive locks.
    pub const STANDBY: u8 = 8;
    /// Pages of commit timestamps.
    pub const COMMIT_TIMESTAMP: u8 = 18;
    /// Replication origins.
    pub const REPLICATION_ORIGIN: u8 = 19;
    /// Last one that PostgreSQL 17 defines itself (`RM_LOGICALMSG_ID`).
    pub const BUILTIN_LAST: u8 = 21;
    /// First number of extensions (`RM_MIN_CUSTOM_ID`).
    pub const CUSTOM_FIRST: u8 = 128;
}

/// Names of the resource managers as `pg_waldump` prints them, by number.
const RMGR_NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// Name of one of PostgreSQL's own resource managers; `None` for an extension's and for numbers without owner.
pub fn rmgr_name(rmgr: u8) -> Option<&'static str> {
    RMGR_NAMES.get(usize::from(rmgr)).copied()
}

/// Record kinds of resource manager XLOG: `xl_info & 0xF0`.
pub mod xlog_info {
    /// Checkpoint of a shutdown or of the end of a recovery.
    pub const CHECKPOINT_SHUTDOWN: u8 = 0x00;
    /// Checkpoint of a running server.
    pub const CHECKPOINT_ONLINE: u8 = 0x10;
    /// Nothing.
    pub const NOOP: u8 = 0x20;
    /// The rest of the segment is unused.
    pub const SWITCH: u8 = 0x40;
    /// First record of a timeline after a fast promotion.
    pub const END_OF_RECOVERY: u8 = 0x90;
    /// Image of a page with changed hint bits.
    pub const FPI_FOR_HINT: u8 = 0xA0;
    /// Images of pages.
    pub const FPI: u8 = 0xB0;
    /// Names the record that was broken off before this page.
    pub const OVERWRITE_CONTRECORD: u8 = 0xD0;
}

/// Record kinds of resource manager Transaction: `xl_info & 0x70`, and the flag in the highest bit.
pub mod xact_info {
    /// Commit.
    pub const COMMIT: u8 = 0x00;
    /// First phase of a two-phase commit.
    pub const PREPARE: u8 = 0x10;
    /// Abort.
    pub const ABORT: u8 = 0x20;
    /// Commit of a prepared transaction.
    pub const COMMIT_PREPARED: u8 = 0x30;
    /// Abort of a prepared transaction.
    pub const ABORT_PREPARED: u8 = 0x40;
    /// Subtransactions of a transaction.
    pub const ASSIGNMENT: u8 = 0x50;
    /// Cache invalidations of a transaction in progress.
    pub const INVALIDATIONS: u8 = 0x60;
    /// The mask of the kinds above.
    pub const OPERATION_MASK: u8 = 0x70;
    /// A word of flags follows the time.
    pub const HAS_INFO: u8 = 0x80;
}

/// Whether PostgreSQL allows this segment size: a power of two from 1 MiB to 1 GiB (`IsValidWalSegSize`).
pub const fn segment_bytes_valid(segment_bytes: u64) -> bool {
    segment_bytes.is_power_of_two() && segment_bytes >= 1 << 20 && segment_bytes <= 1 << 30
}

/// Bytes of the header of the page at `page`: long at the start of a segment.
pub const fn page_header_bytes(page: Lsn, segment_bytes: u64) -> usize {
    if page.offset_in(segment_bytes) == 0 { LONG_PAGE_HEADER_BYTES } else { SHORT_PAGE_HEADER_BYTES }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Header of a WAL page (`XLogPageHeaderData`, `XLogLongPageHeaderData`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHeader {
    /// [`PAGE_MAGIC`].
    pub magic: u16,
    /// [`page_flags`].
    pub flags: u16,
    /// Timeline of the first record of the page.
    pub timeline: PgTimeline,
    /// Where the page is in the log.
    pub address: Lsn,
    /// Bytes that the record continued here lacks at the start of the page; 0 when none is continued.
    pub remaining_bytes: u32,
    /// On the first page of a segment.
    pub long: Option<LongPageHeader>,
}

/// What only the first page of a segment carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LongPageHeader {
    /// Of the PostgreSQL cluster.
    pub system_id: SystemId,
    /// Bytes of a segment.
    pub segment_bytes: u32,
    /// Bytes of a page.
    pub page_bytes: u32,
}

impl PageHeader {
    /// Reads a header from the 24 or 40 bytes that it has at its place; nothing is checked.
    ///
    /// `None` when `bytes` has another length.
    pub fn parse(bytes: &[u8]) -> Option<PageHeader> {
        let long = match bytes.len() {
            SHORT_PAGE_HEADER_BYTES => None,
            LONG_PAGE_HEADER_BYTES => Some(LongPageHeader {
                system_id: SystemId(u64_at(bytes, 24)),
                segment_bytes: u32_at(bytes, 32),
                page_bytes: u32_at(bytes, 36),
            }),
            _ => return None,
        };
        Some(PageHeader {
            magic: u16_at(bytes, 0),
            flags: u16_at(bytes, 2),
            timeline: PgTimeline(u32_at(bytes, 4)),
            address: Lsn(u64_at(bytes, 8)),
            remaining_bytes: u32_at(bytes, 16),
            long,
        })
    }

    /// Appends the header's bytes to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.magic.to_le_bytes());
        out.extend_from_slice(&self.flags.to_le_bytes());
        out.extend_from_slice(&self.timeline.0.to_le_bytes());
        out.extend_from_slice(&self.address.0.to_le_bytes());
        out.extend_from_slice(&self.remaining_bytes.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        if let Some(long) = &self.long {
            out.extend_from_slice(&long.system_id.0.to_le_bytes());
            out.extend_from_slice(&long.segment_bytes.to_le_bytes());
            out.extend_from_slice(&long.page_bytes.to_le_bytes());
        }
    }
}

/// Header of a record (`XLogRecord`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordHeader {
    /// Bytes of the record, header included.
    pub total_len: u32,
    /// Transaction that wrote it, 0 for none.
    pub xid: u32,
    /// Start of the record before.
    pub prev: Lsn,
    /// The resource manager's in the upper half, the WAL machinery's in the lower.
    pub info: u8,
    /// Resource manager.
    pub rmgr: u8,
    /// CRC-32C of the payload and then of the header's first 20 bytes.
    pub crc: u32,
}

impl RecordHeader {
    /// Where `xl_crc` is; the checksum covers the header up to here.
    pub const CRC_OFFSET: usize = 20;

    /// Reads a header; nothing is checked.
    pub fn parse(bytes: &[u8; RECORD_HEADER_BYTES]) -> RecordHeader {
        RecordHeader {
            total_len: u32_at(bytes, 0),
            xid: u32_at(bytes, 4),
            prev: Lsn(u64_at(bytes, 8)),
            info: bytes[16],
            rmgr: bytes[17],
            crc: u32_at(bytes, Self::CRC_OFFSET),
        }
    }

    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.total_len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.xid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.prev.0.to_le_bytes());
        bytes[16] = self.info;
        bytes[17] = self.rmgr;
        bytes[20..24].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }

    /// Whether the rest of the segment belongs to this record (`XLOG_SWITCH`).
    pub fn is_switch(&self) -> bool {
        self.rmgr == rmgr::XLOG && self.info & 0xF0 == xlog_info::SWITCH
    }
}
