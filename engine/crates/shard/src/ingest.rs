//! Records in, values out: what each record of the shard's feed is to the shard's keys.
//!
//! Values depend on the log alone: not on where batches are cut, nor on where a shard was attached. The one exception is
//! the next transaction id in values of the checkpoint, see [`Ingest::end_of_batch`].

use alloc::vec::Vec;

use layers::{HashRange, Key, KeyKind, Striping, ValueKind};
use pgtypes::{FrameSummary, Lsn};
use redo::{Event, Reason, Touch, blocks_of, events_of};
use wal::{Fork, Record, rmgr};

use crate::{
    copy::DatabaseCopy,
    error::IngestFault,
    lengths::{Lengths, StripeOf},
    metadata_state::{LoadError, MetadataState},
    stripe_size::{StripeSize, StripeSizeError},
    values::{Put, Values},
};

/// What is left to do about a record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[must_use = "a copy of a database is made before the next record, and a fault is shown"]
pub struct Done {
    /// Pages to be copied before the next record is ingested.
    pub copy: Option<DatabaseCopy>,
    /// What could not be followed. Everything else that the record does was put.
    pub fault: Option<IngestFault>,
}

/// A value that the shard was to begin with is damaged.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{key:?}: {cause}")]
pub struct AttachError {
    /// Whose value.
    pub key: Key,
    /// What is wrong with it.
    #[source]
    pub cause: AttachCause,
}

/// What is wrong with a value.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttachCause {
    /// A stripe's length.
    #[error(transparent)]
    StripeSize(#[from] StripeSizeError),
    /// Metadata.
    #[error(transparent)]
    Metadata(#[from] LoadError),
    /// It is of another shard.
    #[error("the key lies outside of the shard")]
    OtherShard,
}

/// The state of one shard as of the last record.
#[derive(Debug)]
pub struct Ingest {
    striping: Striping,
    range: HashRange,
    lengths: Lengths,
    /// On the shard of hash 0.
    metadata: Option<MetadataState>,
    /// Of the record in progress; kept for their memory.
    values: Values,
    touched: Vec<Touched>,
}

/// A key of a block of the record in progress.
#[derive(Clone, Copy, Debug)]
struct Touched {
    key: Key,
    kind: ValueKind,
}

impl Ingest {
    /// The state of a shard without any value.
    pub fn new(striping: Striping, range: HashRange) -> Ingest {
        let metadata = (range.begin == 0).then(MetadataState::default);
        let lengths = Lengths::new(striping, range);
        Ingest { striping, range, lengths, metadata, values: Values::default(), touched: Vec::new() }
    }

    /// Takes a value as of the position from which ingest goes on: the newest of each key, unless it is `Absent`.
    ///
    /// Needed are all `StripeSize` values and, on the shard of hash 0, all values of that hash. Of SLRU pages only the key
    /// counts: `value` may be empty. Blocks are passed over.
    ///
    /// # Errors
    /// The value is damaged, or of another shard.
    pub fn load(&mut self, key: Key, value: &[u8]) -> Result<(), AttachError> {
        let error = |cause| AttachError { key, cause };
        if !self.range.contains(key) {
            return Err(error(AttachCause::OtherShard));
        }
        match (key.kind(), &mut self.metadata) {
            (Ok(KeyKind::StripeSize { relation, fork, stripe }), _) => {
                let size = StripeSize::from_bytes(value).map_err(|cause| error(cause.into()))?;
                self.lengths.load(StripeOf { relation, fork, stripe }, size);
            }
            (Ok(KeyKind::Slru(slru, page)), Some(metadata)) => metadata.load_slru(slru, page),
            (Ok(KeyKind::Metadata(what)), Some(metadata)) => {
                metadata.load(what, value).map_err(|cause| error(cause.into()))?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Ingests a record of the feed: `start` and `end` are its place in the log, `stored` is [`Record::to_stored`] with the
    /// data of this shard's blocks. Records come in order, each once.
    ///
    /// Nothing that is wrong with a record stops ingest. A record that does not go into a page is put all the same, and
    /// fails when that page is rebuilt.
    pub fn item(&mut self, start: Lsn, end: Lsn, stored: Vec<u8>, put: Put<'_>) -> Done {
        let record = match Record::from_stored(start, end, &stored) {
            Ok(record) => record,
            Err(fault) => {
                return Done { copy: None, fault: Some(IngestFault { lsn: end, cause: fault.into() }) };
            }
        };
        let fault = self.metadata.as_mut().and_then(|metadata| {
            let done = metadata.record(&record, &stored, &mut self.values);
            done.err().map(|cause| IngestFault { lsn: end, cause })
        });
        let copy = self.events_before_blocks(&record);
        self.blocks(&record, stored);
        for event in events_of(&record) {
            // After the record's touch of the visibility map's last page.
            if let Event::Truncate(truncation) = event {
                self.lengths.truncate(&truncation, end, &mut self.values);
            }
        }
        self.values.put_all(end, put);
        Done { copy, fault }
    }

    fn events_before_blocks(&mut self, record: &Record) -> Option<DatabaseCopy> {
        let (lsn, mut copy) = (record.info.end, None);
        let Ingest { lengths, values, .. } = self;
        for event in events_of(record) {
            match event {
                // Advisory, and not kept.
                Event::CreateFork(_, Fork::FreeSpaceMap) | Event::Truncate(_) => {}
                Event::CreateFork(relation, fork) => lengths.create_fork(relation, fork, lsn, values),
                Event::DropRelation(relation) => lengths.drop_relation(relation, values),
                Event::CopyDatabase { to, from } => {
                    let stripes = lengths.copy_database(from, to, lsn, values);
                    copy = Some(DatabaseCopy { lsn, from, to, striping: self.striping, stripes });
                }
                Event::CreateDatabase(database) | Event::DropDatabase(database) => {
                    lengths.drop_database(database, values);
                }
            }
        }
        copy.filter(|copy| !copy.stripes.is_empty())
    }

    /// The record as the value of every block that it touches.
    fn blocks(&mut self, record: &Record, stored: Vec<u8>) {
        self.touched.clear();
        if is_hint_without_image(record) {
            return;
        }
        for touch in blocks_of(record) {
            self.touch(record, &touch);
        }
        let key_of = |block: &wal::BlockRef| self.striping.block(block.relation, block.fork, block.block);
        match self.touched[..] {
            [] => {}
            [Touched { key, kind }] => self.values.push(key, kind, stored),
            _ => {
                for Touched { key, kind } in &self.touched {
                    self.values.push(*key, *kind, record.to_stored(|block| key_of(block) == *key));
                }
            }
        }
    }

    fn touch(&mut self, record: &Record, touch: &Touch) {
        let tag = touch.tag;
        // `InvalidBlockNumber` names no block.
        if tag.fork == Fork::FreeSpaceMap || tag.block == u32::MAX {
            return;
        }
        let key = self.striping.block(tag.relation, tag.fork, tag.block);
        if !self.range.contains(key) {
            return;
        }
        let kind = match touch.reason {
            Reason::Registered(id) if makes_page(record, id) => ValueKind::InitRecord,
            // A map without that page stays without it.
            Reason::TruncateVisibility { .. } if !self.lengths.has_block(tag.relation, tag.fork, tag.block) => return,
            _ => ValueKind::Record,
        };
        // The first touch says whether an older page is needed; the others find what it left.
        if self.touched.iter().all(|touched| touched.key != key) {
            self.touched.push(Touched { key, kind });
        }
        self.lengths.touch(tag.relation, tag.fork, tag.block, record.info.end, &mut self.values);
    }

    /// Ends a batch: `through` is its end and `summary` what the whole log adds up to there.
    ///
    /// On the shard of hash 0 this puts the checkpoint's value when the next transaction id has moved and it was not put for
    /// 64 KiB of WAL. Records of transactions in progress lie on other shards: only here the shard learns of their ids, and
    /// so where batches are cut decides which values of the checkpoint have them.
    pub fn end_of_batch(&mut self, summary: &FrameSummary, put: Put<'_>) {
        if let Some(metadata) = &mut self.metadata {
            metadata.end_of_batch(summary, &mut self.values);
            self.values.put_all(summary.record_end, put);
        }
    }

    /// All stripes of the shard that exist, as of the last record.
    pub fn sizes(&self) -> impl Iterator<Item = (StripeOf, StripeSize)> + '_ {
        self.lengths.iter()
    }

    /// The stripe that a block lies in, as of the last record; `None` when there is none, or for keys of other kinds.
    /// The block exists if the stripe [`StripeSize::has_block`], and its values are those above the floor.
    pub fn stripe_of(&self, key: Key) -> Option<StripeSize> {
        match key.kind() {
            Ok(KeyKind::Block { relation, fork, block }) => {
                self.lengths.get(&StripeOf { relation, fork, stripe: self.striping.stripe_of(block) })
            }
            _ => None,
        }
    }

    /// Position at or before which values of `key` do not belong to it, as of the last record; [`Lsn::INVALID`] if none.
    pub fn floor(&self, key: Key) -> Lsn {
        self.stripe_of(key).map_or(Lsn::INVALID, |size| size.floor)
    }

    /// The counters of `pg_control` as of the last record, on the shard of hash 0.
    pub fn counters(&self) -> Option<&metadata::Counters> {
        self.metadata.as_ref()?.counters()
    }
}

/// Whether the record says only that a hint was set in a page: what writers without full page writes log once for each page
/// and checkpoint. It changes nothing, and would make the page's chain longer.
fn is_hint_without_image(record: &Record) -> bool {
    /// `catalog/pg_control.h`.
    const FPI_FOR_HINT: u8 = 0xA0;
    record.info.rmgr == rmgr::XLOG
        && record.info.info & 0xF0 == FPI_FOR_HINT
        && record.blocks.iter().all(|block| record.block_image(block).is_none())
}

/// Whether the record needs no older version of that block.
fn makes_page(record: &Record, id: u8) -> bool {
    record
        .blocks
        .iter()
        .filter(|block| block.id == id)
        .any(|block| block.will_init || record.block_image(block).is_some_and(|image| image.apply))
}
