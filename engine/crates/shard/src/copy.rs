//! A database that begins as a copy of another's files: `CREATE DATABASE … STRATEGY FILE_COPY`.

use alloc::vec::Vec;

use layers::{Key, Striping};
use pgtypes::Lsn;
use redo::Database;
use wal::{Fork, RelFileLocator};

/// Pages that the shell has to copy before it ingests the next record.
///
/// For each of [`DatabaseCopy::blocks`] it reads `from` as of [`DatabaseCopy::lsn`] and puts the page under `to` with that
/// LSN as an `Image`; a block that was never written (it has no value) is left out, and one that is poisoned gets
/// [`crate::poison`] as a `Record`. Lengths and metadata of the copy are put by ingest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DatabaseCopy {
    /// End of the record. Values at or before it are what is copied.
    pub lsn: Lsn,
    /// The database that is copied, and the part of it that lies in one tablespace.
    pub from: Database,
    /// The new one.
    pub to: Database,
    pub(crate) striping: Striping,
    pub(crate) stripes: Vec<CopiedStripe>,
}

/// What is copied of one stripe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CopiedStripe {
    pub from: RelFileLocator,
    pub to: RelFileLocator,
    pub fork: Fork,
    pub first_block: u32,
    pub length: u32,
    /// Of the source.
    pub floor: Lsn,
}

/// A page to be copied. Both keys lie on this shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopiedBlock {
    /// The page that is read.
    pub from: Key,
    /// Values of `from` at or before this position do not belong to it.
    pub floor: Lsn,
    /// The page that it becomes.
    pub to: Key,
}

impl DatabaseCopy {
    /// The pages, in the order of relations and blocks.
    pub fn blocks(&self) -> impl Iterator<Item = CopiedBlock> + '_ {
        let striping = self.striping;
        self.stripes.iter().flat_map(move |stripe| {
            (stripe.first_block..stripe.first_block + stripe.length).map(move |block| CopiedBlock {
                from: striping.block(stripe.from, stripe.fork, block),
                floor: stripe.floor,
                to: striping.block(stripe.to, stripe.fork, block),
            })
        })
    }

    /// How many there are.
    pub fn block_count(&self) -> u64 {
        self.stripes.iter().map(|stripe| u64::from(stripe.length)).sum()
    }
}
