//! Files of PGDATA that WAL does not describe, as values: `postgresql.conf`, statistics, `pg_control` as a template.

use alloc::{string::String, vec::Vec};

use layers::{Key, Metadata};
use wal::crc32c;

/// Bytes of a file that may be kept: 8 MiB, far above what statistics of many tables take. Larger ones are refused.
pub const ADVISORY_BYTES_MAX: usize = 8 << 20;

/// A file: the value under [`Advisory::key`], `name length u16, name, contents`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Advisory {
    /// Path within PGDATA.
    pub name: String,
    /// What is in it.
    pub contents: Vec<u8>,
}

/// The bytes are no such value, or the file cannot be one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AdvisoryError {
    /// Too short for its name, or the name is no text.
    #[error("a file outside WAL: its value is damaged")]
    Damaged,
    /// The name does not fit.
    #[error("a file outside WAL: its name has {0} bytes, and no more than 65,535 are possible")]
    NameLength(usize),
    /// The contents do not fit.
    #[error("a file outside WAL: it has {0} bytes, and no more than {ADVISORY_BYTES_MAX} are kept")]
    Length(usize),
}

impl Advisory {
    /// Where the file of that name is kept.
    pub fn key_of(name: &str) -> Key {
        Key::metadata(Metadata::Advisory(crc32c(0, name.as_bytes())))
    }

    /// Where the file is kept.
    pub fn key(&self) -> Key {
        Advisory::key_of(&self.name)
    }

    /// The value.
    ///
    /// # Errors
    /// Name or contents are too long.
    pub fn to_bytes(&self) -> Result<Vec<u8>, AdvisoryError> {
        let name = self.name.as_bytes();
        let length = u16::try_from(name.len()).map_err(|_| AdvisoryError::NameLength(name.len()))?;
        if self.contents.len() > ADVISORY_BYTES_MAX {
            return Err(AdvisoryError::Length(self.contents.len()));
        }
        let mut bytes = Vec::with_capacity(2 + name.len() + self.contents.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(&self.contents);
        Ok(bytes)
    }

    /// Reads the value.
    ///
    /// # Errors
    /// It is damaged.
    pub fn from_bytes(value: &[u8]) -> Result<Advisory, AdvisoryError> {
        let (length, rest) = value.split_first_chunk::<2>().ok_or(AdvisoryError::Damaged)?;
        let length = usize::from(u16::from_le_bytes(*length));
        let (name, contents) = rest.split_at_checked(length).ok_or(AdvisoryError::Damaged)?;
        let name = core::str::from_utf8(name).map_err(|_| AdvisoryError::Damaged)?;
        Ok(Advisory { name: String::from(name), contents: Vec::from(contents) })
    }
}
