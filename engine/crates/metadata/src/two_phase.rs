//! Prepared transactions: their records hold what `pg_twophase` does.
//!
//! Source: `RecreateTwoPhaseFile`, `PrepareRedoAdd` (`access/transam/twophase.c`), `xl_xact_prepare` (`access/xact.h`).

use alloc::vec::Vec;

use pgtypes::Lsn;
use wal::{Record, crc32c, rmgr, xact_info};

use crate::{MetadataError, reader::Reader};

/// A record that prepares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Preparation {
    pub xid: u32,
    /// Position at the replication origin.
    pub origin_lsn: Lsn,
}

impl Preparation {
    /// `None` for other records.
    pub fn of(record: &Record) -> Result<Option<Preparation>, MetadataError> {
        let kind = record.info.info & xact_info::OPERATION_MASK;
        if record.info.rmgr != rmgr::XACT || kind != xact_info::PREPARE {
            return Ok(None);
        }
        let mut main = Reader::new(record.main_data());
        main.skip(8)?;
        let xid = main.u32()?;
        main.skip(44)?;
        let origin_lsn = Lsn(main.u64()?);
        main.skip(8)?;
        Ok(Some(Preparation { xid, origin_lsn }))
    }
}

/// Contents of the file in `pg_twophase` that keeps a prepared transaction: its state and the checksum of it.
pub fn two_phase_file(state: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(state.len() + 4);
    file.extend_from_slice(state);
    file.extend_from_slice(&crc32c(0, state).to_le_bytes());
    file
}
