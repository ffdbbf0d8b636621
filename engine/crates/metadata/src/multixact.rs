//! Records of multixacts.
//!
//! Source: `multixact_redo`, `RecordNewMultiXact` (`access/transam/multixact.c`).

use wal::{Record, rmgr};

use crate::{MetadataError, reader::Reader};

/// Bytes of a member in a record: transaction and status.
const MEMBER_BYTES: usize = 8;
/// First multixact id (`FirstMultiXactId`).
const FIRST_MULTIXACT: u32 = 1;

/// A record of resource manager MultiXact.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Multixact<'a> {
    ZeroOffsets(u32),
    ZeroMembers(u32),
    Create(Creation<'a>),
    Truncate(Truncation),
}

/// `xl_multixact_create`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Creation<'a> {
    pub id: u32,
    /// Place of its first member.
    pub offset: u32,
    members: &'a [u8],
}

/// `xl_multixact_truncate`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Truncation {
    pub database: u32,
    /// Oldest multixact that is left.
    pub oldest: u32,
    pub first_member: u32,
    pub end_member: u32,
}

impl<'a> Multixact<'a> {
    /// `None` for other records.
    pub fn of(record: &'a Record) -> Result<Option<Multixact<'a>>, MetadataError> {
        if record.info.rmgr != rmgr::MULTIXACT {
            return Ok(None);
        }
        let mut main = Reader::new(record.main_data());
        Ok(Some(match record.info.info & 0xF0 {
            0x00 => Multixact::ZeroOffsets(main.page()?),
            0x10 => Multixact::ZeroMembers(main.page()?),
            0x20 => {
                let (id, offset, count) = (main.u32()?, main.u32()?, main.u32()? as usize);
                Multixact::Create(Creation { id, offset, members: main.take(count.saturating_mul(MEMBER_BYTES))? })
            }
            0x30 => {
                let database = main.u32()?;
                // The oldest one before is of no use: cutting twice does no harm.
                main.skip(4)?;
                let oldest = main.u32()?;
                let (first_member, end_member) = (main.u32()?, main.u32()?);
                Multixact::Truncate(Truncation { database, oldest, first_member, end_member })
            }
            _ => return Err(MetadataError::Record("there is no such record of multixacts")),
        }))
    }
}

impl<'a> Creation<'a> {
    /// The id that follows (`NextMultiXactId`).
    pub fn next_id(&self) -> u32 {
        self.id.wrapping_add(1).max(FIRST_MULTIXACT)
    }

    /// Place behind its members; 0 when that is the end of the circle.
    pub fn end_offset(&self) -> u32 {
        self.offset.wrapping_add((self.members.len() / MEMBER_BYTES) as u32)
    }

    /// Place of the next multixact's first member: 0 means that none was written, so it is left out.
    pub fn next_offset(&self) -> u32 {
        self.end_offset().max(1)
    }

    /// Place, transaction and status of each member.
    pub fn members(&self) -> impl Iterator<Item = (u32, u32, u8)> + use<'a> {
        let mut offset = self.offset;
        self.members.chunks_exact(MEMBER_BYTES).map(move |member| {
            let at = offset;
            offset = offset.wrapping_add(1);
            (at, u32::from_le_bytes([member[0], member[1], member[2], member[3]]), member[4])
        })
    }
}

/// The id before (`PreviousMultiXactId`).
pub(crate) fn previous(id: u32) -> u32 {
    if id <= FIRST_MULTIXACT { u32::MAX } else { id - 1 }
}
