//! Why a record does not go into a page.

use thiserror::Error;
use wal::ImageError;

/// The record was not applied; what is left in the page is of no use.
///
/// Whoever owns the page marks it as poisoned: its next image, or a record that makes it anew, heals it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum RedoError {
    /// This engine does not know how to replay the record.
    #[error("resource manager {rmgr}, info {info:#04x}: this engine cannot replay it")]
    Unsupported {
        /// `xl_rmid`.
        rmgr: u8,
        /// `xl_info & 0xF0`.
        info: u8,
    },
    /// The block does not belong to the record: a mistake of the caller.
    #[error("the record does not touch this block")]
    NotTouched,
    /// The record's data are not what its type has.
    #[error("record: {0}")]
    Record(&'static str),
    /// The page is not one that the record could have been written for.
    #[error("page: {0}")]
    Page(&'static str),
    /// The record's image of the page is broken.
    #[error("record: {0}")]
    Image(#[from] ImageError),
}
