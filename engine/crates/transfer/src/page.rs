//! Pages of relations are believed only after a check, on the way in and on the way out.
//!
//! Source: `PageIsVerifiedExtended` (`storage/page/bufpage.c`).

use std::path::PathBuf;

use pgformat::page_checksum;
use pgtypes::Lsn;

use crate::relations::BLOCK_BYTES;

/// `PD_VALID_FLAG_BITS`.
const VALID_FLAGS: u16 = 0x0007;

/// A page is damaged.
#[derive(Debug, thiserror::Error)]
#[error("{}: block {block} {fault}", path.display())]
pub struct PageError {
    /// The file.
    pub path: PathBuf,
    /// Number of the block in its fork.
    pub block: u32,
    /// What is wrong.
    pub fault: PageFault,
}

/// What is wrong with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageFault {
    /// Its data checksum.
    #[error("has checksum {stored:04X}, expected {computed:04X}")]
    Checksum {
        /// In the page.
        stored: u16,
        /// Of the page.
        computed: u16,
    },
    /// Its header makes no sense.
    #[error("has no page header")]
    Header,
    /// Its LSN.
    #[error("has LSN {0}, which is behind the end of the server's WAL")]
    Future(Lsn),
}

/// What pages must be like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageRules {
    /// They have data checksums.
    pub(crate) has_checksums: bool,
    /// No page was changed behind this.
    pub(crate) end_bound: Lsn,
}

impl PageRules {
    /// Whether a page has contents; one of zeros was never initialised.
    ///
    /// # Errors
    /// It is damaged.
    pub(crate) fn check(self, page: &[u8; BLOCK_BYTES], block: u32) -> Result<bool, PageFault> {
        if page.as_chunks::<16>().0.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0) {
            return Ok(false);
        }
        let number = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        if self.has_checksums {
            let (stored, computed) = (number(8), page_checksum(page, block));
            if stored != computed {
                return Err(PageFault::Checksum { stored, computed });
            }
        }
        let (flags, lower, upper, special) = (number(10), number(12), number(14), number(16));
        let is_sound = flags & !VALID_FLAGS == 0
            && upper > 0
            && lower <= upper
            && upper <= special
            && usize::from(special) <= BLOCK_BYTES
            && special % 8 == 0;
        if !is_sound {
            return Err(PageFault::Header);
        }
        // Two halves, the upper one first (`PageXLogRecPtr`).
        let half = |at: usize| u64::from(number(at)) | u64::from(number(at + 2)) << 16;
        let lsn = Lsn(half(0) << 32 | half(4));
        if lsn > self.end_bound { Err(PageFault::Future(lsn)) } else { Ok(true) }
    }
}
