//! Plans a read: which blocks of which layers, newest first, until a value that starts the page.

use alloc::vec::Vec;

use pgtypes::Lsn;
use thiserror::Error;

use crate::{
    format::ByteRange,
    identity::LayerId,
    index::{Index, ValueEntry},
    key::Key,
    map::LayerMap,
};

/// Finds the index of a layer in memory.
pub trait Indexes {
    /// The index; `None` if it must be read first.
    fn index(&self, layer: LayerId) -> Option<&Index>;
}

/// One block to read, and what of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedRead {
    /// From this layer.
    pub layer: LayerId,
    /// Number of the block: what [`Index::decode_block`] asks for.
    pub block: u32,
    /// Where it lies.
    pub place: ByteRange,
    /// The values, newest first.
    pub values: Vec<ValueEntry>,
}

/// What a read needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadPlan {
    /// Blocks, each once, newest values first: apply them in the opposite order.
    pub reads: Vec<PlannedRead>,
    /// The oldest value starts the page. Otherwise the key had no value before, and records begin on zeros.
    pub starts_page: bool,
    /// Layers whose index was asked.
    pub layers_visited: u32,
}

impl ReadPlan {
    /// Values to apply.
    pub fn value_count(&self) -> usize {
        self.reads.iter().map(|read| read.values.len()).sum()
    }
}

/// A read cannot be planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PlanError {
    /// The key is another shard's.
    #[error("key is not of this shard")]
    OtherShard,
    /// The position was given up.
    #[error("{lsn} is no longer kept: the oldest position is {horizon}")]
    BelowHorizon {
        /// That was asked for.
        lsn: Lsn,
        /// The oldest that can be read.
        horizon: Lsn,
    },
    /// Read this layer's index and plan again.
    #[error("index of layer {0} is not in memory")]
    IndexNeeded(LayerId),
    /// No layer answers for this position. Never the same as "nothing there".
    #[error("no layer has the changes up to {0}")]
    MissingLayer(Lsn),
}

impl LayerMap {
    /// Plans the read of `key` with all records that end at or before `lsn`.
    ///
    /// Changes that older relations of the same name made end at `floor`, the LSN of the creation or truncation that
    /// made the block anew ([`crate::KeyKind::StripeSize`] knows it); [`Lsn::INVALID`] if there was none.
    ///
    /// # Errors
    /// See [`PlanError`]; of them only `IndexNeeded` passes by itself.
    pub fn plan_read(&self, key: Key, lsn: Lsn, floor: Lsn, indexes: &impl Indexes) -> Result<ReadPlan, PlanError> {
        if lsn < self.horizon() {
            return Err(PlanError::BelowHorizon { lsn, horizon: self.horizon() });
        }
        self.plan_kept(key, lsn, floor, indexes)
    }

    /// [`LayerMap::plan_read`] below the horizon, too: for compaction, which reads at or above a tile's newest image.
    /// What is above that is never collected.
    ///
    /// # Errors
    /// As [`LayerMap::plan_read`]. Below the newest image layers may be missing, or values left out ([`crate::Retain`]).
    pub fn plan_kept(&self, key: Key, lsn: Lsn, floor: Lsn, indexes: &impl Indexes) -> Result<ReadPlan, PlanError> {
        let partition = self.partition_of(key).ok_or(PlanError::OtherShard)?;
        let mut plan = ReadPlan { reads: Vec::new(), starts_page: false, layers_visited: 0 };
        let mut cursor = lsn;
        while cursor > floor {
            let image = partition.image_at(cursor);
            if let Some((_, layer)) = image.filter(|(lsn, _)| *lsn == cursor) {
                plan.visit(layer, key, floor, cursor, indexes)?;
                break;
            }
            let (lsns, layer) = partition.delta_at(cursor).ok_or(PlanError::MissingLayer(cursor))?;
            let lowest = image.map_or(lsns.after, |(lsn, _)| lsn.max(lsns.after));
            plan.visit(layer, key, lowest.max(floor), cursor, indexes)?;
            if plan.starts_page {
                break;
            }
            cursor = lowest;
        }
        Ok(plan)
    }
}

impl ReadPlan {
    /// Adds the values of `key` above `after` and up to `through`, newest first, up to one that starts the page.
    fn visit(
        &mut self,
        layer: LayerId,
        key: Key,
        after: Lsn,
        through: Lsn,
        indexes: &impl Indexes,
    ) -> Result<(), PlanError> {
        let index = indexes.index(layer).ok_or(PlanError::IndexNeeded(layer))?;
        self.layers_visited += 1;
        let values = index.values_of(key);
        let newest = values.partition_point(|value| value.lsn <= through);
        for value in values[..newest].iter().rev().take_while(|value| value.lsn > after) {
            self.starts_page = value.kind.starts_page();
            match self.reads.last_mut().filter(|read| read.layer == layer && read.block == value.block) {
                Some(read) => read.values.push(*value),
                None => {
                    let place = index.block_place(value.block).unwrap_or(ByteRange { offset: 0, bytes: 0 });
                    self.reads.push(PlannedRead { layer, block: value.block, place, values: Vec::from([*value]) });
                }
            }
            if self.starts_page {
                break;
            }
        }
        Ok(())
    }
}
