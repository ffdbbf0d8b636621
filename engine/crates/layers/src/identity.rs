//! Whose a layer is, what it covers: the words of layer files and of the layer map.

use core::fmt;

use pgtypes::{LogId, Lsn};

use crate::key::KeyRange;

/// Number of a shard, given by the planner and never used again. Not its place in the hash space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct ShardId(pub u32);

/// Number of an ownership of a shard, granted by the planner; rises with each owner.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct ShardGeneration(pub u64);

/// Name of a layer within its branch. Two owners of one shard cannot make the same one, since their generations differ.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct LayerId {
    /// The shard whose owner wrote it. Other shards may refer to it after a split or merge.
    pub shard: ShardId,
    /// The generation of that owner.
    pub generation: ShardGeneration,
    /// Counts the layers of that owner, from 1.
    pub number: u64,
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}/{:016x}-{:016x}", self.shard.0, self.generation.0, self.number)
    }
}

/// What a layer's checksums begin with, so that no byte of another layer passes for one of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LayerIdentity {
    /// Lakebase and branch. A branch refers to its parent's layers under the parent's identity.
    pub log: LogId,
    /// The layer.
    pub id: LayerId,
    /// [`crate::Striping::stripe_blocks`] of the lakebase.
    pub stripe_blocks: u32,
}

/// Record ends above `after`, up to and including `through`: a value's LSN is the *end* of its record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LsnRange {
    /// The record end before.
    pub after: Lsn,
    /// The last record end.
    pub through: Lsn,
}

impl LsnRange {
    /// Whether `lsn` is in the range.
    pub fn contains(&self, lsn: Lsn) -> bool {
        self.after < lsn && lsn <= self.through
    }
}

/// Kind of a layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LayerKind {
    /// What happened to its keys within a range of LSNs.
    Delta,
    /// Every key of its range that has a value at one LSN: what it lacks has none.
    Image,
}

/// What is known about a layer without its index. All that a manifest keeps of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LayerDescription {
    /// Which.
    pub id: LayerId,
    /// Of what kind.
    pub kind: LayerKind,
    /// 0: a frozen open layer, all keys of the shard. 1: compacted.
    pub level: u8,
    /// The keys that it answers for.
    pub keys: KeyRange,
    /// The positions that it answers for; of an image layer, `after` is `through`.
    pub lsns: LsnRange,
    /// Length of the file. A layer without values has a file, too.
    pub file_bytes: u64,
    /// Values in it.
    pub values: u64,
    /// The most values that one of its keys needs, back to one that starts the page or to the layer's beginning.
    pub chain_max: u32,
}

/// What a value does to the page of its key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum ValueKind {
    /// A WAL record that changes what is there. Persisted as 1, and so on.
    Record = 1,
    /// A WAL record that makes the page anew, or carries it.
    InitRecord = 2,
    /// The page itself.
    Image = 3,
    /// There is nothing any more. Its value is empty.
    Absent = 4,
}

impl ValueKind {
    /// Whether a read needs nothing older.
    pub const fn starts_page(self) -> bool {
        !matches!(self, ValueKind::Record)
    }

    pub(crate) const fn from_number(number: u8) -> Option<ValueKind> {
        Some(match number {
            1 => ValueKind::Record,
            2 => ValueKind::InitRecord,
            3 => ValueKind::Image,
            4 => ValueKind::Absent,
            _ => return None,
        })
    }
}

/// A value with its key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What it is about.
    pub key: crate::Key,
    /// End of the record that it comes from.
    pub lsn: Lsn,
    /// What it does.
    pub kind: ValueKind,
    /// WAL record or page.
    pub value: alloc::vec::Vec<u8>,
}
