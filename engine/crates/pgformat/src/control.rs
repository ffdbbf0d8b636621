//! `global/pg_control` of PostgreSQL 17: read with all of PostgreSQL's checks, and written.
//!
//! Source: `catalog/pg_control.h` and `ReadControlFile` (`access/transam/xlog.c`).

use pgtypes::{Lsn, PgTimeline, SystemId};
use thiserror::Error;
use wal::{crc32c, segment_bytes_valid};

use crate::{
    bytes::{i32_at, put, put_i32, put_u32, put_u64, u32_at, u64_at},
    checkpoint::{CHECKPOINT_BYTES, CheckPoint, WalLevel},
};

/// Bytes of the file (`PG_CONTROL_FILE_SIZE`); what lies behind the data is zero.
pub const CONTROL_FILE_BYTES: usize = 8192;
/// Bytes of the data, all that PostgreSQL reads (`sizeof(ControlFileData)`).
pub const CONTROL_DATA_BYTES: usize = 296;
/// Version of the format, the same in all minor releases of PostgreSQL 17 (`PG_CONTROL_VERSION`).
pub const CONTROL_VERSION: u32 = 1700;

const CHECKPOINT_OFFSET: usize = 40;
const NONCE_OFFSET: usize = 256;
const CRC_OFFSET: usize = 288;
/// `FLOATFORMAT_VALUE`.
const FLOAT_FORMAT: f64 = 1_234_567.0;

/// What the server was doing when it last wrote the file (`DBState`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DatabaseState {
    /// Never written by a released server.
    StartingUp = 0,
    /// Shut down cleanly: the checkpoint is the last record.
    ShutDown = 1,
    /// A standby shut down cleanly.
    ShutDownInRecovery = 2,
    /// Died while shutting down.
    ShuttingDown = 3,
    /// Died in, or is in, crash recovery.
    InCrashRecovery = 4,
    /// A standby, or a restore.
    InArchiveRecovery = 5,
    /// Running, or died while running.
    InProduction = 6,
}

impl DatabaseState {
    const ALL: [DatabaseState; 7] = [
        DatabaseState::StartingUp,
        DatabaseState::ShutDown,
        DatabaseState::ShutDownInRecovery,
        DatabaseState::ShuttingDown,
        DatabaseState::InCrashRecovery,
        DatabaseState::InArchiveRecovery,
        DatabaseState::InProduction,
    ];
}

/// Settings of the server that standbys compare theirs with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerSettings {
    /// Setting `wal_level`.
    pub wal_level: WalLevel,
    /// Setting `wal_log_hints`.
    pub wal_log_hints: bool,
    /// Setting `max_connections`.
    pub max_connections: i32,
    /// Setting `max_worker_processes`.
    pub max_worker_processes: i32,
    /// Setting `max_wal_senders`.
    pub max_wal_senders: i32,
    /// Setting `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// Setting `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
    /// Setting `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
}

/// Contents of `pg_control`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControlFile {
    /// Of the PostgreSQL cluster.
    pub system_id: SystemId,
    /// Format of the system catalogs (`CATALOG_VERSION_NO`).
    pub catalog_version: u32,
    /// What the server was doing.
    pub state: DatabaseState,
    /// When the file was written, seconds since 1970 (`pg_time_t`).
    pub time: i64,
    /// Start of the last checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// That checkpoint.
    pub checkpoint: CheckPoint,
    /// Counter that unlogged relations use for positions.
    pub unlogged_lsn: Lsn,
    /// Position that recovery must reach before the data is consistent; invalid when not in archive recovery.
    pub min_recovery_point: Lsn,
    /// Timeline of that position.
    pub min_recovery_timeline: PgTimeline,
    /// Redo position of the base backup that is being recovered; invalid when none is, or its end was reached.
    pub backup_start: Lsn,
    /// Position where a base backup that was taken from a standby ends.
    pub backup_end: Lsn,
    /// Whether the record of the backup's end must be met.
    pub backup_end_required: bool,
    /// Settings at the last start.
    pub settings: ServerSettings,
    /// Blocks of 8 KiB in one file of a relation.
    pub relation_segment_blocks: u32,
    /// Bytes of a WAL segment.
    pub segment_bytes: u32,
    /// Bytes of an identifier, terminator included.
    pub name_bytes: u32,
    /// Columns that an index may have.
    pub index_columns_max: u32,
    /// Bytes of a piece of an out-of-line value.
    pub toast_chunk_bytes: u32,
    /// Bytes of a piece of a large object.
    pub large_object_chunk_bytes: u32,
    /// Whether 8-byte numbers are passed by value.
    pub float8_by_value: bool,
    /// Version of data checksums, 0 when they are off.
    pub data_checksum_version: u32,
    /// Random bytes that hide from clients which users exist.
    pub mock_authentication_nonce: [u8; 32],
}

/// The bytes are no `pg_control` of PostgreSQL 17, or of a build that this engine does not work with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ControlError {
    /// The file was cut off.
    #[error("pg_control has {0} bytes, expected {CONTROL_FILE_BYTES}")]
    TooShort(usize),
    /// Of another major version, or of a machine of other endianness.
    #[error("pg_control is of version {0}, expected {CONTROL_VERSION} (PostgreSQL 17, little-endian)")]
    Version(u32),
    /// Damaged.
    #[error("pg_control's checksum is {stored:08X}, expected {computed:08X}")]
    Crc {
        /// In the file.
        stored: u32,
        /// Of the file's contents.
        computed: u32,
    },
    /// No such state.
    #[error("pg_control has unknown state {0}")]
    State(u32),
    /// No such WAL level.
    #[error("pg_control has unknown wal_level {0}")]
    WalLevel(i32),
    /// PostgreSQL was built with other options, or for another machine.
    #[error("pg_control: {what} is {found}, expected {expected}")]
    Build {
        /// Which option.
        what: &'static str,
        /// Its value in the file.
        found: u32,
        /// The only value that works.
        expected: u32,
    },
    /// Of a machine with other numbers (`FLOATFORMAT_VALUE` reads differently).
    #[error("pg_control is of a machine with another floating-point format")]
    FloatFormat,
    /// Not a power of two between 1 MiB and 1 GiB.
    #[error("pg_control has invalid WAL segment size {0}")]
    SegmentSize(u32),
}

impl ControlFile {
    /// Reads the file.
    ///
    /// # Errors
    /// In the order of PostgreSQL's own checks: version before checksum, so that another version is called by its name.
    pub fn parse(file: &[u8]) -> Result<ControlFile, ControlError> {
        let Some((bytes, _)) = file.split_first_chunk::<CONTROL_DATA_BYTES>() else {
            return Err(ControlError::TooShort(file.len()));
        };
        let version = u32_at(bytes, 8);
        if version != CONTROL_VERSION {
            return Err(ControlError::Version(version));
        }
        let (stored, computed) = (u32_at(bytes, CRC_OFFSET), crc32c(0, &bytes[..CRC_OFFSET]));
        if stored != computed {
            return Err(ControlError::Crc { stored, computed });
        }
        for (what, at, expected) in
            [("maximum alignment", 204, 8), ("block size", 216, 8192), ("WAL page size", 224, 8192)]
        {
            let found = u32_at(bytes, at);
            if found != expected {
                return Err(ControlError::Build { what, found, expected });
            }
        }
        if f64::from_bits(u64_at(bytes, 208)) != FLOAT_FORMAT {
            return Err(ControlError::FloatFormat);
        }
        let segment_bytes = u32_at(bytes, 228);
        if !segment_bytes_valid(u64::from(segment_bytes)) {
            return Err(ControlError::SegmentSize(segment_bytes));
        }
        let state = u32_at(bytes, 16);
        let wal_level = |number| WalLevel::from_number(number).ok_or(ControlError::WalLevel(number));
        let mut checkpoint = [0; CHECKPOINT_BYTES];
        checkpoint.copy_from_slice(&bytes[CHECKPOINT_OFFSET..CHECKPOINT_OFFSET + CHECKPOINT_BYTES]);
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&bytes[NONCE_OFFSET..CRC_OFFSET]);

        Ok(ControlFile {
            system_id: SystemId(u64_at(bytes, 0)),
            catalog_version: u32_at(bytes, 12),
            state: DatabaseState::ALL.get(state as usize).copied().ok_or(ControlError::State(state))?,
            time: u64_at(bytes, 24) as i64,
            checkpoint_lsn: Lsn(u64_at(bytes, 32)),
            checkpoint: CheckPoint::parse(&checkpoint).map_err(ControlError::WalLevel)?,
            unlogged_lsn: Lsn(u64_at(bytes, 128)),
            min_recovery_point: Lsn(u64_at(bytes, 136)),
            min_recovery_timeline: PgTimeline(u32_at(bytes, 144)),
            backup_start: Lsn(u64_at(bytes, 152)),
            backup_end: Lsn(u64_at(bytes, 160)),
            backup_end_required: bytes[168] != 0,
            settings: ServerSettings {
                wal_level: wal_level(i32_at(bytes, 172))?,
                wal_log_hints: bytes[176] != 0,
                max_connections: i32_at(bytes, 180),
                max_worker_processes: i32_at(bytes, 184),
                max_wal_senders: i32_at(bytes, 188),
                max_prepared_transactions: i32_at(bytes, 192),
                max_locks_per_transaction: i32_at(bytes, 196),
                track_commit_timestamp: bytes[200] != 0,
            },
            relation_segment_blocks: u32_at(bytes, 220),
            segment_bytes,
            name_bytes: u32_at(bytes, 232),
            index_columns_max: u32_at(bytes, 236),
            toast_chunk_bytes: u32_at(bytes, 240),
            large_object_chunk_bytes: u32_at(bytes, 244),
            float8_by_value: bytes[248] != 0,
            data_checksum_version: u32_at(bytes, 252),
            mock_authentication_nonce: nonce,
        })
    }

    /// The whole file, checksum included; padding is zero.
    pub fn to_bytes(&self) -> [u8; CONTROL_FILE_BYTES] {
        let mut file = [0; CONTROL_FILE_BYTES];
        let bytes = &mut file[..];
        put_u64(bytes, 0, self.system_id.0);
        put_u32(bytes, 8, CONTROL_VERSION);
        put_u32(bytes, 12, self.catalog_version);
        put_u32(bytes, 16, self.state as u32);
        put_u64(bytes, 24, self.time as u64);
        put_u64(bytes, 32, self.checkpoint_lsn.0);
        put(bytes, CHECKPOINT_OFFSET, &self.checkpoint.to_bytes());
        put_u64(bytes, 128, self.unlogged_lsn.0);
        put_u64(bytes, 136, self.min_recovery_point.0);
        put_u32(bytes, 144, self.min_recovery_timeline.0);
        put_u64(bytes, 152, self.backup_start.0);
        put_u64(bytes, 160, self.backup_end.0);
        bytes[168] = u8::from(self.backup_end_required);
        put_i32(bytes, 172, self.settings.wal_level as i32);
        bytes[176] = u8::from(self.settings.wal_log_hints);
        put_i32(bytes, 180, self.settings.max_connections);
        put_i32(bytes, 184, self.settings.max_worker_processes);
        put_i32(bytes, 188, self.settings.max_wal_senders);
        put_i32(bytes, 192, self.settings.max_prepared_transactions);
        put_i32(bytes, 196, self.settings.max_locks_per_transaction);
        bytes[200] = u8::from(self.settings.track_commit_timestamp);
        put_u32(bytes, 204, 8);
        put_u64(bytes, 208, FLOAT_FORMAT.to_bits());
        put_u32(bytes, 216, 8192);
        put_u32(bytes, 220, self.relation_segment_blocks);
        put_u32(bytes, 224, 8192);
        put_u32(bytes, 228, self.segment_bytes);
        put_u32(bytes, 232, self.name_bytes);
        put_u32(bytes, 236, self.index_columns_max);
        put_u32(bytes, 240, self.toast_chunk_bytes);
        put_u32(bytes, 244, self.large_object_chunk_bytes);
        bytes[248] = u8::from(self.float8_by_value);
        put_u32(bytes, 252, self.data_checksum_version);
        put(bytes, NONCE_OFFSET, &self.mock_authentication_nonce);
        let crc = crc32c(0, &bytes[..CRC_OFFSET]);
        put_u32(bytes, CRC_OFFSET, crc);
        file
    }
}
