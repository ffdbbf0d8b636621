//! What can be wrong with a record on its way into values, and with values on their way into a page.

use alloc::string::String;

use layers::{Key, KeyKind};
use metadata::MetadataError;
use pgtypes::Lsn;
use redo::RedoError;
use thiserror::Error;
use wal::RecordFault;

/// A record that ingest could not follow in everything. Ingest goes on; the shell logs the fault and shows it.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("record that ends at {lsn}: {cause}")]
pub struct IngestFault {
    /// End of the record.
    pub lsn: Lsn,
    /// What is wrong.
    pub cause: IngestCause,
}

/// Why ingest could not follow a record.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum IngestCause {
    /// Nothing of the record is known: it was damaged on its way here, or the sender is of another version. The shard lacks
    /// whatever the record did, and the shell had better ask for it again.
    #[error("it is no stored record: {0}")]
    Undecodable(#[from] RecordFault),
    /// What it does to relations was done; what it does to metadata was not.
    #[error("its metadata cannot be read: {0}")]
    Metadata(#[from] MetadataError),
    /// The shard of hash 0 was attached without a value of the checkpoint: metadata was not followed.
    #[error("the shard has no value of the checkpoint")]
    NoCheckpoint,
    /// Database `{0}` was copied, but its relation map is not known: the copy has none.
    #[error("database {0} has no relation map to be copied")]
    NoRelationMap(u32),
}

/// A page, or another value, that cannot be made of its values: it is *poisoned* until a record makes it anew.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{}: value of {lsn}: {cause}", Name(.key))]
pub struct RebuildError {
    /// Whose values.
    pub key: Key,
    /// End of the record, or position of the image, that does not fit.
    pub lsn: Lsn,
    /// Why.
    pub cause: PoisonCause,
}

/// Why a value does not fit to those before it.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum PoisonCause {
    /// The record does not go into the page.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// The record does not go into the page of an SLRU.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The value is no stored record.
    #[error("no stored record: {0}")]
    Stored(#[from] RecordFault),
    /// The record does not touch the block whose value it is.
    #[error("its record does not touch it")]
    NotTouched,
    /// An image of a page has another length than a page.
    #[error("a page of {0} bytes")]
    ImageLength(usize),
    /// A record under a key whose values are images.
    #[error("a record where only images are kept")]
    UnexpectedRecord,
    /// It was poisoned where it was ingested ([`crate::poison`]).
    #[error("poisoned: {0}")]
    Poisoned(String),
    /// The key is none that has a value of this kind.
    #[error("it is not the key of a page")]
    Key,
}

/// A key as a person reads it.
struct Name<'a>(&'a Key);

impl core::fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0.kind() {
            Ok(KeyKind::Block { relation, fork, block }) => write!(
                f,
                "relation {}/{}/{}, fork {fork:?}, block {block}",
                relation.tablespace, relation.database, relation.relation
            ),
            Ok(kind) => write!(f, "{kind:?}"),
            Err(_) => write!(f, "{:?}", self.0),
        }
    }
}
