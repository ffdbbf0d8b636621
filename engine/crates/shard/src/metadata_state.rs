//! Metadata that later records build on: counters, origins, relation maps, and which pages of SLRUs there are.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use layers::{Key, Metadata, Slru, ValueKind};
use metadata::{Change, Counters, CountersError, Origins, changes_of, slru_part, two_phase_file};
use pgtypes::{FrameSummary, Lsn};
use redo::{Database, Event};
use wal::{Record, rmgr};

use crate::{error::IngestCause, values::Values};

/// WAL between two values of the checkpoint if nothing but the next transaction id moves.
const CHECKPOINT_EVERY_BYTES: u64 = 64 << 10;

/// Metadata of a value that is damaged.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint.
    #[error(transparent)]
    Counters(#[from] CountersError),
    /// The position of a replication origin.
    #[error("position of a replication origin: {0} bytes instead of 8")]
    Origin(usize),
}

/// As of the last record.
#[derive(Debug, Default)]
pub(crate) struct MetadataState {
    counters: Option<Counters>,
    origins: Origins,
    maps: BTreeMap<Database, Vec<u8>>,
    slru_pages: BTreeSet<(Slru, u32)>,
    /// Where the checkpoint was put last, and with which next transaction id.
    put_at: Lsn,
    put_full_xid: u64,
}

/// The value of a replication origin: the position up to which it was replayed.
pub(crate) fn origin_of_value(value: &[u8]) -> Result<Lsn, LoadError> {
    let bytes: [u8; 8] = value.try_into().map_err(|_| LoadError::Origin(value.len()))?;
    Ok(Lsn(u64::from_le_bytes(bytes)))
}

impl MetadataState {
    pub fn counters(&self) -> Option<&Counters> {
        self.counters.as_ref()
    }

    pub fn load_slru(&mut self, slru: Slru, page: u32) {
        self.slru_pages.insert((slru, page));
    }

    pub fn load(&mut self, what: Metadata, value: &[u8]) -> Result<(), LoadError> {
        match what {
            Metadata::Checkpoint => {
                let counters = Counters::from_bytes(value)?;
                self.put_full_xid = counters.checkpoint.next_full_xid;
                self.counters = Some(counters);
            }
            Metadata::RelationMap { tablespace, database } => {
                self.maps.insert(Database { tablespace, database }, Vec::from(value));
            }
            Metadata::Origin(id) => {
                self.origins.0.insert(id, origin_of_value(value)?);
            }
            Metadata::Database { .. } | Metadata::TwoPhase(_) | Metadata::Advisory(_) => {}
        }
        Ok(())
    }

    /// Follows a record. After an error nothing of its metadata was followed, except where the error says otherwise.
    pub fn record(&mut self, record: &Record, stored: &[u8], values: &mut Values) -> Result<(), IngestCause> {
        let counters = self.counters.as_ref().ok_or(IngestCause::NoCheckpoint)?;
        let context = counters.context();
        let changes = changes_of(record, &context)?;
        let mut done = Ok(());
        let mut counters_change = false;
        for change in changes {
            match change {
                Change::SlruPage(slru, page) => {
                    let value = slru_part(record, slru, page)?.unwrap_or_else(|| Vec::from(stored));
                    self.slru_page(layers_slru(slru), page, record, value, values);
                }
                Change::Counters => counters_change = true,
                Change::Whole(event) => done = done.and(self.database(&event, values)),
                change => self.change(&change, values),
            }
        }
        let counters = self.counters.as_mut().ok_or(IngestCause::NoCheckpoint)?;
        let before = counters.clone();
        let max_full_xid = match record.info.xid {
            0 => before.checkpoint.next_full_xid.saturating_sub(1),
            xid => context.full_xid(xid),
        };
        counters.replay(record, max_full_xid)?;
        let mut moved = before;
        moved.checkpoint.next_full_xid = counters.checkpoint.next_full_xid;
        if counters_change && moved != *counters {
            self.put_checkpoint(record.info.end, values);
        }
        done
    }

    fn put_checkpoint(&mut self, lsn: Lsn, values: &mut Values) {
        if let Some(counters) = &self.counters {
            values.image(Key::metadata(Metadata::Checkpoint), counters.to_bytes());
            self.put_at = lsn;
            self.put_full_xid = counters.checkpoint.next_full_xid;
        }
    }

    pub fn end_of_batch(&mut self, summary: &FrameSummary, values: &mut Values) {
        let Some(counters) = &mut self.counters else { return };
        counters.observe(summary.max_full_xid);
        let moved = counters.checkpoint.next_full_xid != self.put_full_xid;
        if moved && summary.record_end.bytes_since(self.put_at) >= CHECKPOINT_EVERY_BYTES {
            self.put_checkpoint(summary.record_end, values);
        }
    }

    fn slru_page(&mut self, slru: Slru, page: u32, record: &Record, value: Vec<u8>, values: &mut Values) {
        self.slru_pages.insert((slru, page));
        let kind = if zeroes(record, slru) { ValueKind::InitRecord } else { ValueKind::Record };
        values.push(Key::slru(slru, page), kind, value);
    }

    fn change(&mut self, change: &Change<'_>, values: &mut Values) {
        match *change {
            Change::CutSlru(cut) => {
                let slru = layers_slru(cut.slru);
                let gone: Vec<_> =
                    self.slru_pages.iter().copied().filter(|(of, page)| *of == slru && cut.removes(*page)).collect();
                for (of, page) in gone {
                    self.slru_pages.remove(&(of, page));
                    values.absent(Key::slru(of, page));
                }
            }
            Change::RelationMap { database, map } => self.put_map(database, Vec::from(map), values),
            Change::Prepare { full_xid, state } => {
                values.image(Key::metadata(Metadata::TwoPhase(full_xid)), two_phase_file(state));
            }
            Change::FinishPrepared { full_xid } => values.absent(Key::metadata(Metadata::TwoPhase(full_xid))),
            Change::AdvanceOrigin { id, lsn, backward } => {
                self.origins.advance(id, lsn, backward);
                let lsn = self.origins.0.get(&id).copied().unwrap_or(lsn);
                values.image(Key::metadata(Metadata::Origin(id)), Vec::from(lsn.0.to_le_bytes()));
            }
            Change::DropOrigin(id) => {
                self.origins.0.remove(&id);
                values.absent(Key::metadata(Metadata::Origin(id)));
            }
            Change::SlruPage(..) | Change::Whole(_) | Change::Counters => {}
        }
    }

    fn put_map(&mut self, Database { tablespace, database }: Database, map: Vec<u8>, values: &mut Values) {
        values.image(Key::metadata(Metadata::RelationMap { tablespace, database }), map.clone());
        self.maps.insert(Database { tablespace, database }, map);
    }

    fn database(&mut self, event: &Event, values: &mut Values) -> Result<(), IngestCause> {
        let key = |Database { tablespace, database }| Key::metadata(Metadata::Database { tablespace, database });
        match *event {
            Event::CreateDatabase(database) => values.image(key(database), Vec::new()),
            Event::CopyDatabase { to, from } => {
                values.image(key(to), Vec::new());
                let map = self.maps.get(&from).ok_or(IngestCause::NoRelationMap(from.database))?.clone();
                self.put_map(to, map, values);
            }
            Event::DropDatabase(gone) => {
                values.absent(key(gone));
                let Database { tablespace, database } = gone;
                if self.maps.remove(&gone).is_some() {
                    values.absent(Key::metadata(Metadata::RelationMap { tablespace, database }));
                }
            }
            Event::CreateFork(..) | Event::Truncate(_) | Event::DropRelation(_) => {}
        }
        Ok(())
    }
}

/// Whether the record makes a page of that SLRU anew, so that nothing older is needed.
fn zeroes(record: &Record, slru: Slru) -> bool {
    /// `access/rmgrlist.h`.
    const CLOG: u8 = 3;
    const COMMIT_TIMESTAMPS: u8 = 18;
    const ZERO_MEMBERS: u8 = 0x10;
    match (record.info.rmgr, slru) {
        (CLOG, Slru::TransactionStatus) | (COMMIT_TIMESTAMPS, Slru::CommitTimestamps) => true,
        (rmgr::MULTIXACT, Slru::MultixactMembers) => record.info.info & 0xF0 == ZERO_MEMBERS,
        // The first entry of a new page of offsets may be written before the page is made.
        _ => false,
    }
}

fn layers_slru(slru: metadata::Slru) -> Slru {
    match slru {
        metadata::Slru::TransactionStatus => Slru::TransactionStatus,
        metadata::Slru::MultixactOffsets => Slru::MultixactOffsets,
        metadata::Slru::MultixactMembers => Slru::MultixactMembers,
        metadata::Slru::CommitTimestamps => Slru::CommitTimestamps,
    }
}

pub(crate) fn metadata_slru(slru: Slru) -> metadata::Slru {
    match slru {
        Slru::TransactionStatus => metadata::Slru::TransactionStatus,
        Slru::MultixactOffsets => metadata::Slru::MultixactOffsets,
        Slru::MultixactMembers => metadata::Slru::MultixactMembers,
        Slru::CommitTimestamps => metadata::Slru::CommitTimestamps,
    }
}
