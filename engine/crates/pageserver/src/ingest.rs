//! WAL in: a batch of records becomes values of the open layer.
//!
//! Where batches come from: `feed.rs`. What a record is to its keys: crate `shard`.

use std::time::Duration;

use filter::{Batch, Item};
use layers::{Key, PutError, ValueKind};
use pgtypes::Lsn;
use redo::Page;
use shard::{DatabaseCopy, IngestCause, Presence, poison};

use crate::{
    owner::Owner,
    read::{ReadFault, yield_now},
};

/// Frozen layers in memory, at most: beside the one that is being written another one may be full. Ingest waits at it.
const FROZEN_MAX: usize = 2;

/// Records that are taken in before readers of the same core get their turn.
const ITEMS_PER_TURN: usize = 512;

/// Pages of a database copy that are read before other tasks get their turn.
const COPIED_PER_TURN: usize = 32;

/// Of a page.
const BLOCK_BYTES: u64 = 8192;

/// Pause between attempts to read a page for a database copy from object storage that does not answer.
const COPY_PAUSE: Duration = Duration::from_secs(1);

/// A batch was not taken in, or not to its end. Asking again from the same position does no harm.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// It does not follow what is there.
    #[error("batch begins at {after}, this shard is at {position}")]
    Gap {
        /// Where it begins.
        after: Lsn,
        /// Where it should.
        position: Lsn,
    },
    /// A record is no record: damaged on its way, or the sender is of another version. What it does is not known, so nothing
    /// behind it can be taken in.
    #[error("{0}")]
    Undecodable(String),
    /// A fault of this program.
    #[error("value of {key:?} at {lsn}: {cause}")]
    Put {
        /// Of what.
        key: Key,
        /// At which position.
        lsn: Lsn,
        /// Why the open layer refuses it.
        cause: PutError,
    },
    /// The process is ending.
    #[error("stopping")]
    Stopping,
}

impl Owner {
    /// Takes in a batch. Batches that are known already, whole or in part, are passed over.
    ///
    /// # Errors
    /// [`IngestError`].
    pub async fn take_in(&self, batch: Batch) -> Result<(), IngestError> {
        self.hear(batch.term, batch.commit_lsn);
        let position = self.ingested();
        if batch.after != position {
            // A heartbeat or a batch that was sent twice.
            let is_known = batch.through <= position;
            return if is_known { Ok(()) } else { Err(IngestError::Gap { after: batch.after, position }) };
        }
        if batch.through <= position {
            return Ok(());
        }
        self.until_room().await?;
        for (number, item) in batch.items.into_iter().enumerate() {
            // Taken in before the connection broke in the middle of this batch.
            if item.end > self.applied() {
                self.take_item(item).await?;
            }
            if number % ITEMS_PER_TURN == ITEMS_PER_TURN - 1 {
                yield_now().await;
            }
        }
        let mut refused = None;
        {
            let mut state = self.state.borrow_mut();
            let mut put = putter(&mut state, &mut refused);
            self.ingest.borrow_mut().end_of_batch(&batch.summary, &mut put);
        }
        refused.map_or(Ok(()), Err)?;
        self.state.borrow_mut().advance(batch.through);
        self.put_advisories(batch.through)?;
        self.set_position(batch.summary);
        self.freeze_if_due();
        Ok(())
    }

    async fn take_item(&self, item: Item) -> Result<(), IngestError> {
        let end = item.end;
        let mut refused = None;
        let done = {
            let mut state = self.state.borrow_mut();
            let mut put = putter(&mut state, &mut refused);
            self.ingest.borrow_mut().item(item.start, end, item.stored, &mut put)
        };
        refused.map_or(Ok(()), Err)?;
        if let Some(fault) = done.fault {
            if let IngestCause::Undecodable(_) = fault.cause {
                return Err(IngestError::Undecodable(fault.to_string()));
            }
            self.count_fault(&fault);
        }
        self.set_applied(end);
        self.process.metrics.items.inc();
        if self.open_since.get().is_none() {
            self.open_since.set(Some(driver::now()));
        }
        if let Some(copy) = done.copy {
            self.copy_database(&copy).await?;
        }
        Ok(())
    }

    /// `CREATE DATABASE ... STRATEGY FILE_COPY`: every page of the source as of the record, under its new name.
    async fn copy_database(&self, copy: &DatabaseCopy) -> Result<(), IngestError> {
        const TOO_LARGE: &str = "ingest has stopped: a database is copied that does not fit into memory";
        let bytes_max = self.process.config.ingest.copy_bytes_max;
        let bytes = copy.block_count() * BLOCK_BYTES;
        tracing::info!(lsn = %copy.lsn, blocks = copy.block_count(), "copying a database");
        if bytes > bytes_max {
            // All of it belongs to one position, and so to one layer, which is in memory until it is written. Better to stop here,
            // where older positions are still read, than to be killed for the memory at each start.
            let trouble = format!(
                "CREATE DATABASE ... STRATEGY FILE_COPY at {} copies {bytes} bytes on this shard: give the process that memory, set ingest.copy_bytes_max above it, and restart",
                copy.lsn
            );
            self.report(TOO_LARGE, &trouble);
            self.until_stopping().await;
            return Err(IngestError::Stopping);
        }
        for (number, block) in copy.blocks().enumerate() {
            let value = loop {
                let found = self.find(block.from, copy.lsn, block.floor).await;
                let mut page = Page::ZERO;
                let made = found.and_then(|found| Ok(shard::rebuild_page(block.from, found.values(), &mut page)?));
                break match made {
                    Ok(Presence::Present) => Some((ValueKind::Image, page.0.to_vec())),
                    Ok(Presence::Absent) => None,
                    Err(ReadFault::Layer(crate::layer_files::LayerFault::Unavailable { cause, .. })) => {
                        self.report("a database cannot be copied: object storage does not answer", &cause);
                        if self.pause(COPY_PAUSE).await {
                            continue;
                        }
                        return Err(IngestError::Stopping);
                    }
                    Err(fault) => {
                        self.count_fault(&fault);
                        Some((ValueKind::Record, poison(&format!("its source was not to be read: {fault}"))))
                    }
                };
            };
            if let Some((kind, value)) = value {
                let result = self.state.borrow_mut().put(block.to, copy.lsn, kind, value);
                result.map_err(|cause| IngestError::Put { key: block.to, lsn: copy.lsn, cause })?;
            }
            if number % COPIED_PER_TURN == COPIED_PER_TURN - 1 {
                yield_now().await;
            }
        }
        self.solved("a database cannot be copied: object storage does not answer");
        Ok(())
    }

    /// Files outside WAL get the position of the batch that ends: they need one that no layer on its way to disk has.
    fn put_advisories(&self, lsn: Lsn) -> Result<(), IngestError> {
        let waiting = std::mem::take(&mut *self.advisories.borrow_mut());
        for (key, value) in waiting {
            let kind = if value.is_empty() { ValueKind::Absent } else { ValueKind::Image };
            let result = self.state.borrow_mut().put(key, lsn, kind, value);
            result.map_err(|cause| IngestError::Put { key, lsn, cause })?;
            self.open_since.set(self.open_since.get().or(Some(driver::now())));
        }
        Ok(())
    }

    /// Waits while too much is on its way to object storage.
    async fn until_room(&self) -> Result<(), IngestError> {
        const FULL: &str = "ingest waits: object storage or the local disk does not take layers";
        let backlog_max = self.process.config.ingest.backlog_bytes_max;
        let has_room = || self.state.borrow().frozen().len() < FROZEN_MAX && self.backlog_bytes() < backlog_max;
        if has_room() {
            return Ok(());
        }
        let room = std::pin::pin!(self.moved.until(|| (has_room() || self.is_stopping()).then_some(())));
        // A layer takes a second or so to be written: that is no trouble.
        let patience = std::pin::pin!(driver::sleep(Duration::from_secs(10)));
        if let futures_util::future::Either::Right(((), room)) = futures_util::future::select(room, patience).await {
            self.report(FULL, &format!("{} bytes wait", self.backlog_bytes()));
            room.await;
        }
        self.solved(FULL);
        if self.is_stopping() { Err(IngestError::Stopping) } else { Ok(()) }
    }

    /// Freezes the open layer when it is large or old.
    pub fn freeze_if_due(&self) {
        let config = &self.process.config.ingest;
        let is_large = self.state.borrow().open().bytes() >= config.freeze_bytes;
        let is_old = self.open_since.get().is_some_and(|since| driver::now().since(since) >= config.freeze_interval);
        // Without values it has no age; but as long as it is open, safekeepers keep all WAL that it answers for.
        let span = self.ingested().bytes_since(self.state.borrow().open().lsns().after);
        let is_long = self.open_since.get().is_none() && span >= config.freeze_bytes;
        if is_large || is_old || is_long {
            self.freeze();
        }
    }

    /// Freezes the open layer now, unless it answers for no position, or a batch is being taken in.
    pub fn freeze(&self) {
        if self.is_between_batches() && self.state.borrow_mut().freeze(self.position()) {
            self.open_since.set(None);
            self.moved.set();
        }
    }
}

/// Puts values into the open layer; the first one that is refused is remembered.
fn putter<'a>(
    state: &'a mut crate::state::State,
    refused: &'a mut Option<IngestError>,
) -> impl FnMut(Key, Lsn, ValueKind, Vec<u8>) + 'a {
    move |key, lsn, kind, value| {
        if let Err(cause) = state.put(key, lsn, kind, value) {
            refused.get_or_insert(IngestError::Put { key, lsn, cause });
        }
    }
}
