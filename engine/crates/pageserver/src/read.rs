//! Pages and other values as of a position: what the layers have, and redo.
//!
//! All that a read needs of the layers is taken at once; then blocks are read, and the page is made. Read next: `state.rs`.

use std::{rc::Rc, sync::Arc};

use layers::{Index, Key, KeyKind, LayerId, OpenValue, PlanError, ValueEntry, ValueKind};
use pgtypes::Lsn;
use redo::Page;
use shard::{Presence, RebuildError, Rebuilt, StripeSize, rebuild, rebuild_page, stripe_size_key_of};

use crate::{
    layer_files::LayerFault,
    owner::Owner,
    state::{Chain, Wanted},
};

/// How often a read looks at the map again because a layer was replaced under it. Once is rare.
const ATTEMPTS_MAX: usize = 10;

/// Keys of an enumeration that are read before other tasks get their turn.
const KEYS_PER_TURN: usize = 64;

/// A value cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadFault {
    /// The position was given up.
    #[error("{lsn} is no longer kept: the oldest position is {horizon}")]
    BelowHorizon {
        /// That was asked for.
        lsn: Lsn,
        /// The oldest that can be read.
        horizon: Lsn,
    },
    /// The time is before the history that is kept.
    #[error("{timestamp} us since 2000 is before the history that is kept, which begins at {horizon}")]
    Before {
        /// That was asked for.
        timestamp: i64,
        /// Where the history begins.
        horizon: Lsn,
    },
    /// The key is another shard's.
    #[error("{key:?} is not of this shard")]
    OtherShard {
        /// Which.
        key: Key,
    },
    /// The relation is not there, or not so long.
    #[error("{key:?} does not exist at {lsn}")]
    NoSuchBlock {
        /// Which.
        key: Key,
        /// When.
        lsn: Lsn,
    },
    /// A layer is not to be had.
    #[error(transparent)]
    Layer(#[from] LayerFault),
    /// A record does not fit to the page.
    #[error("{0}")]
    Poisoned(#[from] RebuildError),
    /// A fault of this program, or of whoever wrote the layers.
    #[error("{0}")]
    Internal(String),
}

/// What a read found, newest first.
pub struct Found {
    memory: Vec<OpenValue>,
    blocks: Vec<FoundBlock>,
    /// Layers that were asked.
    pub layers_visited: u32,
}

struct FoundBlock {
    index: Arc<Index>,
    block: Rc<Vec<u8>>,
    /// Newest first.
    values: Vec<ValueEntry>,
}

impl Found {
    /// Its values, oldest first. What the index names and the block has not is empty, and poisons the page: a faulty writer.
    pub fn values(&self) -> impl Iterator<Item = (Lsn, ValueKind, &[u8])> {
        let from_files = self.blocks.iter().rev().flat_map(|found| {
            let value = |entry: &ValueEntry| found.index.value(entry, &found.block).unwrap_or_default();
            found.values.iter().rev().map(move |entry| (entry.lsn, entry.kind, value(entry)))
        });
        let from_memory = self.memory.iter().rev().map(|value| (value.lsn, value.kind, &value.value[..]));
        from_files.chain(from_memory)
    }

    /// How many values there are.
    pub fn value_count(&self) -> usize {
        self.memory.len() + self.blocks.iter().map(|block| block.values.len()).sum::<usize>()
    }
}

impl Owner {
    /// Everything that is known of `key` up to `lsn`, back to a value that starts the page. Values at or before `floor` are of
    /// an earlier relation.
    ///
    /// # Errors
    /// [`ReadFault`], but neither `NoSuchBlock` nor `Poisoned`.
    pub async fn find(&self, key: Key, lsn: Lsn, floor: Lsn) -> Result<Found, ReadFault> {
        for _ in 0..ATTEMPTS_MAX {
            let chain = self.state.borrow().chain(key, lsn, floor);
            match chain {
                Ok(chain) => match self.fetch(chain).await {
                    Err(LayerFault::Gone(_)) => {}
                    result => return Ok(result?),
                },
                Err(PlanError::IndexNeeded(layer)) => match self.need_index(layer).await {
                    Err(LayerFault::Gone(_)) => {}
                    result => result?,
                },
                Err(error) => return Err(plan_fault(key, error)),
            }
        }
        Err(ReadFault::Internal(format!("{key:?}: its layers were replaced {ATTEMPTS_MAX} times while it was read")))
    }

    async fn fetch(&self, chain: Chain) -> Result<Found, LayerFault> {
        let mut found = Found { memory: chain.memory, blocks: Vec::new(), layers_visited: chain.layers_visited };
        if chain.plan.reads.is_empty() {
            return Ok(found);
        }
        let reads: Vec<_> = {
            let state = self.state.borrow();
            let with_index = chain.plan.reads.into_iter().map(|read| {
                let index = state.indexes().get(read.layer).ok_or(LayerFault::Gone(read.layer))?;
                Ok((index, read))
            });
            with_index.collect::<Result<_, LayerFault>>()?
        };
        let fetches = reads.iter().map(|(index, read)| self.files.read_block(read.layer, index, read.block));
        let blocks = futures_util::future::try_join_all(fetches).await?;
        let found_blocks = reads.into_iter().zip(blocks);
        found.blocks =
            found_blocks.map(|((index, read), block)| FoundBlock { index, block, values: read.values }).collect();
        Ok(found)
    }

    /// [`Owner::find`] where everything is in memory; `None` where it is not, or something is wrong.
    pub fn find_in_memory(&self, key: Key, lsn: Lsn, floor: Lsn) -> Option<Found> {
        let state = self.state.borrow();
        let chain = state.chain(key, lsn, floor).ok()?;
        let block = |read: layers::PlannedRead| {
            let block = self.files.block_in_memory(read.layer, read.block)?;
            Some(FoundBlock { index: state.indexes().get(read.layer)?, block, values: read.values })
        };
        let blocks = chain.plan.reads.into_iter().map(block).collect::<Option<_>>()?;
        Some(Found { memory: chain.memory, blocks, layers_visited: chain.layers_visited })
    }

    /// Brings the index of a layer into memory.
    ///
    /// # Errors
    /// [`LayerFault`].
    pub async fn need_index(&self, layer: LayerId) -> Result<(), LayerFault> {
        let description = self.state.borrow().map().layer(layer).copied().ok_or(LayerFault::Gone(layer))?;
        let index = self.files.load_index(&description).await?;
        self.state.borrow_mut().add_index(layer, index);
        Ok(())
    }

    /// A value other than a page, or a page without the rules of relations: what the layers say.
    ///
    /// # Errors
    /// [`ReadFault`], but not `NoSuchBlock`.
    pub async fn value(&self, key: Key, lsn: Lsn) -> Result<Rebuilt, ReadFault> {
        let found = self.find(key, lsn, Lsn::INVALID).await?;
        Ok(rebuild(key, found.values())?)
    }

    /// The stripe that a block lies in, as of `lsn`; `None` where there is nothing.
    ///
    /// # Errors
    /// [`ReadFault`], but not `NoSuchBlock`.
    pub async fn stripe_at(&self, block: Key, lsn: Lsn) -> Result<Option<StripeSize>, ReadFault> {
        let Some((stripe, _)) = stripe_size_key_of(self.striping, block) else { return Ok(None) };
        if !self.range().contains(block) {
            return Err(ReadFault::OtherShard { key: block });
        }
        self.check_attached(stripe)?;
        // The state of ingest is that of the last record.
        if self.applied() <= lsn {
            return Ok(self.ingest.borrow().stripe_of(block));
        }
        match self.value(stripe, lsn).await? {
            Rebuilt::Bytes(bytes) => StripeSize::from_bytes(&bytes)
                .map(Some)
                .map_err(|error| ReadFault::Internal(format!("{stripe:?}: {error}"))),
            Rebuilt::Absent => Ok(None),
            Rebuilt::Page(_) => Err(ReadFault::Internal(format!("{stripe:?}: a page instead of a length"))),
        }
    }

    /// [`Owner::stripe_at`] where the state of ingest says it and no layer is lost; otherwise, and where there is nothing, `None`.
    pub fn stripe_in_memory(&self, block: Key, lsn: Lsn) -> Option<StripeSize> {
        let is_known = self.applied() <= lsn && self.range().contains(block) && !self.files.has_lost();
        self.ingest.borrow().stripe_of(block).filter(|_| is_known)
    }

    /// Refuses keys whose length was in a layer that was lost when the shard was attached: what ingest knows of it began
    /// without it, and would let a page pass for empty.
    fn check_attached(&self, stripe: Key) -> Result<(), ReadFault> {
        if !self.files.has_lost() {
            return Ok(());
        }
        let state = self.state.borrow();
        // Compaction may have given up the position by now; then it has read the layers that were needed.
        match state.map().plan_kept(stripe, self.attached_at, Lsn::INVALID, state.indexes()) {
            Err(PlanError::IndexNeeded(layer)) => match self.files.lost().remove(&layer) {
                Some(cause) => Err(LayerFault::Lost { layer, cause }.into()),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// Makes the page of a block as of `lsn` in `page`, without its checksum.
    ///
    /// # Errors
    /// [`ReadFault`].
    pub async fn page(
        &self,
        key: Key,
        lsn: Lsn,
        stripe: Option<StripeSize>,
        page: &mut Page,
    ) -> Result<Presence, ReadFault> {
        let Ok(KeyKind::Block { block, .. }) = key.kind() else {
            return Err(ReadFault::Internal(format!("{key:?} is no block")));
        };
        let stripe = stripe.filter(|stripe| stripe.has_block(self.striping, block));
        let floor = stripe.ok_or(ReadFault::NoSuchBlock { key, lsn })?.floor;
        let found = self.find(key, lsn, floor).await?;
        self.count_page(&found);
        Ok(rebuild_page(key, found.values(), page)?)
    }

    /// Counts what a page was made of.
    pub fn count_page(&self, found: &Found) {
        let metrics = &self.process.metrics;
        metrics.layers_visited.observe(found.layers_visited.into());
        metrics.blocks_read.observe(found.blocks.len() as f64);
        metrics.values_applied.observe(found.value_count() as f64);
    }

    /// All keys of a kind that the layers name at `lsn`; those whose value is absent are among them. Layers that are lost
    /// are left out if `lost_left_out`.
    ///
    /// # Errors
    /// [`ReadFault`].
    pub async fn keys_at(&self, lsn: Lsn, wanted: Wanted, lost_left_out: bool) -> Result<Vec<Key>, ReadFault> {
        let keys = match wanted {
            Wanted::StripeSizes => self.keys(),
            Wanted::Metadata => layers::KeyRange { begin: Key::MIN, end: Key::first_of_hash(1) },
        };
        loop {
            let lost = self.files.lost();
            let skip = |layer| lost_left_out && lost.contains_key(&layer);
            let result = self.state.borrow().keys_at(keys, lsn, wanted, skip);
            match result {
                Ok(keys) => return Ok(keys),
                Err(PlanError::IndexNeeded(layer)) => match self.need_index(layer).await {
                    Err(LayerFault::Gone(_)) => {}
                    Err(LayerFault::Lost { .. }) if lost_left_out => {}
                    result => result?,
                },
                Err(error) => return Err(plan_fault(Key::MIN, error)),
            }
        }
    }

    /// The values of keys as of `lsn`, without those that are absent.
    ///
    /// # Errors
    /// [`ReadFault`] of the first that cannot be had.
    pub async fn values_of(&self, keys: &[Key], lsn: Lsn) -> Result<Vec<(Key, Vec<u8>)>, ReadFault> {
        let mut values = Vec::new();
        for some in keys.chunks(KEYS_PER_TURN) {
            let reads = some.iter().map(|key| self.value(*key, lsn));
            for (key, value) in some.iter().zip(futures_util::future::join_all(reads).await) {
                match value? {
                    Rebuilt::Bytes(bytes) => values.push((*key, bytes)),
                    Rebuilt::Page(page) => values.push((*key, page.0.to_vec())),
                    Rebuilt::Absent => {}
                }
            }
            yield_now().await;
        }
        Ok(values)
    }
}

fn plan_fault(key: Key, error: PlanError) -> ReadFault {
    match error {
        PlanError::BelowHorizon { lsn, horizon } => ReadFault::BelowHorizon { lsn, horizon },
        PlanError::OtherShard => ReadFault::OtherShard { key },
        PlanError::IndexNeeded(_) | PlanError::MissingLayer(_) => ReadFault::Internal(format!("{key:?}: {error}")),
    }
}

/// Lets other tasks of the core have their turn.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(move |context| {
        if std::mem::replace(&mut yielded, true) {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}
