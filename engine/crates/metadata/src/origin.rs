//! How far each replication origin was replayed, and the file that keeps it.
//!
//! Source: `replorigin_advance`, `CheckPointReplicationOrigin`, `StartupReplicationOrigin` (`replication/logical/origin.c`).

use alloc::{collections::BTreeMap, vec::Vec};

use pgtypes::Lsn;
use wal::crc32c;

/// `REPLICATION_STATE_MAGIC`.
const MAGIC: u32 = 0x1257_DADE;
/// `sizeof(ReplicationStateOnDisk)`: a number of 16 bits, padding, a position.
const ENTRY_BYTES: usize = 16;

/// The file is not `pg_logical/replorigin_checkpoint` of PostgreSQL 17, or damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("replorigin_checkpoint: {0}")]
pub struct OriginsError(&'static str);

/// Position at each origin, by the origin's number.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Origins(pub BTreeMap<u16, Lsn>);

impl Origins {
    /// Moves an origin forward, or anywhere when `backward` allows it.
    pub fn advance(&mut self, id: u16, lsn: Lsn, backward: bool) {
        let entry = self.0.entry(id).or_insert(Lsn::INVALID);
        if backward || *entry < lsn {
            *entry = lsn;
        }
    }

    /// Reads `pg_logical/replorigin_checkpoint`.
    ///
    /// # Errors
    /// In PostgreSQL's words a PANIC: the file is damaged.
    pub fn parse(file: &[u8]) -> Result<Origins, OriginsError> {
        let (body, crc) = file.split_last_chunk::<4>().ok_or(OriginsError("it is too short"))?;
        if crc32c(0, body) != u32::from_le_bytes(*crc) {
            return Err(OriginsError("its checksum is wrong"));
        }
        let (magic, entries) = body.split_first_chunk::<4>().ok_or(OriginsError("it is too short"))?;
        if u32::from_le_bytes(*magic) != MAGIC || entries.len() % ENTRY_BYTES != 0 {
            return Err(OriginsError("it has another format"));
        }
        let mut origins = Origins::default();
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let lsn = entry.iter().skip(8).rev().fold(0, |lsn, byte| lsn << 8 | u64::from(*byte));
            origins.0.insert(u16::from_le_bytes([entry[0], entry[1]]), Lsn(lsn));
        }
        Ok(origins)
    }

    /// The file, origins in the order of their numbers; PostgreSQL's order is that of its slots in memory.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = Vec::from(MAGIC.to_le_bytes());
        for (id, lsn) in &self.0 {
            file.extend_from_slice(&u64::from(*id).to_le_bytes());
            file.extend_from_slice(&lsn.0.to_le_bytes());
        }
        let crc = crc32c(0, &file);
        file.extend_from_slice(&crc.to_le_bytes());
        file
    }
}
