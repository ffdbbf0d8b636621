//! All metadata of a cluster at one position, out of the values of hash 0: what a cold start and an export begin with.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use layers::{Key, KeyKind, Metadata, Slru};
use metadata::{Counters, Origins};
use redo::Database;

use crate::{
    advisory::{Advisory, AdvisoryError},
    metadata_state::{LoadError, origin_of_value},
};

/// Metadata of a cluster at one position.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MetadataListing {
    /// Counters of `pg_control`; there always are some in a sound lakebase.
    pub counters: Option<Counters>,
    /// `pg_filenode.map` of each database; that of database 0 is the global one.
    pub relation_maps: BTreeMap<Database, Vec<u8>>,
    /// Databases with a directory.
    pub databases: BTreeSet<Database>,
    /// Files in `pg_twophase`, by full transaction id.
    pub two_phase: BTreeMap<u64, Vec<u8>>,
    /// Replication origins.
    pub origins: Origins,
    /// Files outside WAL.
    pub advisory: Vec<Advisory>,
    /// Pages of SLRUs.
    pub slru_pages: BTreeMap<(Slru, u32), Vec<u8>>,
}

/// A value is damaged.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ListingError {
    /// Metadata.
    #[error(transparent)]
    Metadata(#[from] LoadError),
    /// A file outside WAL.
    #[error(transparent)]
    Advisory(#[from] AdvisoryError),
    /// A key of relations, or of a later version.
    #[error("{0:?} is no key of metadata")]
    Key(Key),
}

impl MetadataListing {
    /// Takes a value as it was rebuilt; `Absent` ones are left out by the caller.
    ///
    /// # Errors
    /// It is damaged, or none of metadata.
    pub fn add(&mut self, key: Key, value: Vec<u8>) -> Result<(), ListingError> {
        let what = match key.kind() {
            Ok(KeyKind::Metadata(what)) => what,
            Ok(KeyKind::Slru(slru, page)) => {
                self.slru_pages.insert((slru, page), value);
                return Ok(());
            }
            _ => return Err(ListingError::Key(key)),
        };
        match what {
            Metadata::Checkpoint => self.counters = Some(Counters::from_bytes(&value).map_err(LoadError::from)?),
            Metadata::RelationMap { tablespace, database } => {
                self.relation_maps.insert(Database { tablespace, database }, value);
            }
            Metadata::Database { tablespace, database } => {
                self.databases.insert(Database { tablespace, database });
            }
            Metadata::TwoPhase(full_xid) => {
                self.two_phase.insert(full_xid, value);
            }
            Metadata::Origin(id) => {
                self.origins.0.insert(id, origin_of_value(&value)?);
            }
            Metadata::Advisory(_) => self.advisory.push(Advisory::from_bytes(&value)?),
        }
        Ok(())
    }
}
