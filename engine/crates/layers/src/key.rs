//! Keys: what a page server stores values under, in one total order.
//!
//! A key names a thing, not a version of it: the LSN stands beside it. Neither does it name a branch: a layer belongs
//! to exactly one ([`crate::LayerIdentity`]), so that the same key means the same thing in a branch and its parent.

use core::fmt;

use wal::{Fork, RelFileLocator};

/// Bytes of a key.
pub const KEY_BYTES: usize = 22;

/// A key. Big-endian fields, so that the order of the bytes is the order of the keys:
/// `hash u32, kind u8, tablespace u32, database u32, relation u32, fork u8, block u32`.
///
/// The hash is that of relation number and stripe (`docs/formats/layers.md`); 0 is that of all metadata.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key([u8; KEY_BYTES]);

/// What a key names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum KeyKind {
    /// State of the cluster that is not pages; on the shard of hash 0.
    Metadata(Metadata),
    /// A page of an SLRU; on the shard of hash 0.
    Slru(Slru, u32),
    /// Length in blocks of what lies in one stripe of a fork, and with it whether the relation exists.
    StripeSize {
        /// Whose.
        relation: RelFileLocator,
        /// Of which fork.
        fork: Fork,
        /// Number of the stripe.
        stripe: u32,
    },
    /// A block of a relation.
    Block {
        /// Whose.
        relation: RelFileLocator,
        /// Of which fork.
        fork: Fork,
        /// Block number.
        block: u32,
    },
}

/// Metadata of a cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Metadata {
    /// What `pg_control` needs: checkpoint, counters, parameters.
    Checkpoint,
    /// `pg_filenode.map` of a database (database 0: the global one).
    RelationMap {
        /// Tablespace.
        tablespace: u32,
        /// Database.
        database: u32,
    },
    /// That a database has a directory in a tablespace.
    Database {
        /// Tablespace.
        tablespace: u32,
        /// Database.
        database: u32,
    },
    /// State of a prepared transaction, by its full transaction id.
    TwoPhase(u64),
    /// Progress of a replication origin.
    Origin(u16),
    /// Advisory state of a number that the page server gives (statistics, free-space maps).
    Advisory(u32),
}

/// The SLRUs whose pages WAL describes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Slru {
    /// `pg_xact`.
    TransactionStatus,
    /// `pg_multixact/offsets`.
    MultixactOffsets,
    /// `pg_multixact/members`.
    MultixactMembers,
    /// `pg_commit_ts`.
    CommitTimestamps,
}

/// The bytes are not a key that this version knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("unknown kind of key")]
pub struct UnknownKey;

/// Persisted numbers of [`KeyKind`].
mod kind {
    pub const METADATA: u8 = 0;
    pub const SLRU: u8 = 1;
    pub const STRIPE_SIZE: u8 = 2;
    pub const BLOCK: u8 = 3;
}

/// Persisted numbers of [`Metadata`].
mod metadata {
    pub const CHECKPOINT: u8 = 0;
    pub const RELATION_MAP: u8 = 1;
    pub const DATABASE: u8 = 2;
    pub const TWO_PHASE: u8 = 3;
    pub const ORIGIN: u8 = 4;
    pub const ADVISORY: u8 = 5;
}

/// How relations are cut into runs of blocks that stay on one shard. A constant of a lakebase (`cluster.json`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Striping {
    /// Blocks of a stripe, above 0.
    pub stripe_blocks: u32,
}

impl Striping {
    /// 16 MiB, the default.
    pub const DEFAULT: Striping = Striping { stripe_blocks: 2048 };

    /// The stripe that a block lies in.
    pub const fn stripe_of(self, block: u32) -> u32 {
        block / self.stripe_blocks
    }

    /// Key of a block of a relation.
    pub fn block(self, relation: RelFileLocator, fork: Fork, block: u32) -> Key {
        let hash = stripe_hash(relation.relation, self.stripe_of(block));
        Key::relation(hash, kind::BLOCK, relation, fork, block)
    }

    /// Key of the length of a fork within a stripe; it lies where the stripe lies.
    pub fn stripe_size(self, relation: RelFileLocator, fork: Fork, stripe: u32) -> Key {
        Key::relation(stripe_hash(relation.relation, stripe), kind::STRIPE_SIZE, relation, fork, stripe)
    }
}

/// Place of a stripe in the hash space, above 0. Persisted: it may never change.
///
/// Tablespace and database are left out, so that a database copy stays within each shard. The mixing is that of
/// SplitMix64's output (Steele, Lea, Flood: *Fast splittable pseudorandom number generators*, 2014).
pub fn stripe_hash(relation: u32, stripe: u32) -> u32 {
    let mut mixed = (u64::from(relation) << 32 | u64::from(stripe)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^= mixed >> 31;
    ((mixed >> 32) as u32).max(1)
}

impl Key {
    /// At or before every key.
    pub const MIN: Key = Key([0; KEY_BYTES]);
    /// Behind every key: no kind has this number.
    pub const MAX: Key = Key([0xFF; KEY_BYTES]);

    /// The smallest key of a place in the hash space.
    pub fn first_of_hash(hash: u32) -> Key {
        let mut bytes = [0; KEY_BYTES];
        bytes[..4].copy_from_slice(&hash.to_be_bytes());
        Key(bytes)
    }

    fn relation(hash: u32, kind: u8, relation: RelFileLocator, fork: Fork, number: u32) -> Key {
        let numbers = [relation.tablespace, relation.database, relation.relation];
        Key::compose(hash, kind, numbers, fork_number(fork), number)
    }

    /// Key of a piece of metadata.
    pub fn metadata(what: Metadata) -> Key {
        let (number, [a, b, c]) = match what {
            Metadata::Checkpoint => (metadata::CHECKPOINT, [0; 3]),
            Metadata::RelationMap { tablespace, database } => (metadata::RELATION_MAP, [tablespace, database, 0]),
            Metadata::Database { tablespace, database } => (metadata::DATABASE, [tablespace, database, 0]),
            Metadata::TwoPhase(xid) => (metadata::TWO_PHASE, [0, (xid >> 32) as u32, xid as u32]),
            Metadata::Origin(id) => (metadata::ORIGIN, [0, 0, u32::from(id)]),
            Metadata::Advisory(id) => (metadata::ADVISORY, [0, 0, id]),
        };
        Key::compose(0, kind::METADATA, [a, b, c], number, 0)
    }

    /// Key of a page of an SLRU.
    pub fn slru(slru: Slru, page: u32) -> Key {
        Key::compose(0, kind::SLRU, [0; 3], slru as u8, page)
    }

    fn compose(hash: u32, kind: u8, numbers: [u32; 3], fork: u8, block: u32) -> Key {
        let mut bytes = [0; KEY_BYTES];
        bytes[..4].copy_from_slice(&hash.to_be_bytes());
        bytes[4] = kind;
        for (to, number) in bytes[5..17].chunks_exact_mut(4).zip(numbers) {
            to.copy_from_slice(&number.to_be_bytes());
        }
        bytes[17] = fork;
        bytes[18..].copy_from_slice(&block.to_be_bytes());
        Key(bytes)
    }

    /// The key of these bytes, known kind or not: bounds of ranges need no kind.
    pub const fn from_bytes(bytes: [u8; KEY_BYTES]) -> Key {
        Key(bytes)
    }

    /// The bytes, as in files.
    pub const fn to_bytes(self) -> [u8; KEY_BYTES] {
        self.0
    }

    fn u32_at(&self, at: usize) -> u32 {
        self.0[at..at + 4].iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
    }

    /// Place in the hash space.
    pub fn hash(self) -> u32 {
        self.u32_at(0)
    }

    /// What the key names.
    ///
    /// # Errors
    /// A bound of a range, or a key of a later version.
    pub fn kind(self) -> Result<KeyKind, UnknownKey> {
        let [tablespace, database, relation, block] = [5, 9, 13, 18].map(|at| self.u32_at(at));
        let fork = self.0[17];
        let locator = RelFileLocator { tablespace, database, relation };
        Ok(match self.0[4] {
            kind::METADATA => KeyKind::Metadata(match fork {
                metadata::CHECKPOINT => Metadata::Checkpoint,
                metadata::RELATION_MAP => Metadata::RelationMap { tablespace, database },
                metadata::DATABASE => Metadata::Database { tablespace, database },
                metadata::TWO_PHASE => Metadata::TwoPhase(u64::from(database) << 32 | u64::from(relation)),
                metadata::ORIGIN => Metadata::Origin(relation as u16),
                metadata::ADVISORY => Metadata::Advisory(relation),
                _ => return Err(UnknownKey),
            }),
            kind::SLRU => {
                let slrus =
                    [Slru::TransactionStatus, Slru::MultixactOffsets, Slru::MultixactMembers, Slru::CommitTimestamps];
                KeyKind::Slru(*slrus.get(usize::from(fork)).ok_or(UnknownKey)?, block)
            }
            kind::STRIPE_SIZE => KeyKind::StripeSize { relation: locator, fork: fork_of_number(fork)?, stripe: block },
            kind::BLOCK => KeyKind::Block { relation: locator, fork: fork_of_number(fork)?, block },
            _ => return Err(UnknownKey),
        })
    }

    /// The next key in order; [`Key::MAX`] is its own.
    #[must_use]
    pub fn next(self) -> Key {
        let mut bytes = self.0;
        for byte in bytes.iter_mut().rev() {
            let (next, overflowed) = byte.overflowing_add(1);
            *byte = next;
            if !overflowed {
                return Key(bytes);
            }
        }
        Key::MAX
    }
}

/// PostgreSQL's `ForkNumber`.
fn fork_number(fork: Fork) -> u8 {
    match fork {
        Fork::Main => 0,
        Fork::FreeSpaceMap => 1,
        Fork::VisibilityMap => 2,
        Fork::Init => 3,
    }
}

fn fork_of_number(number: u8) -> Result<Fork, UnknownKey> {
    let forks = [Fork::Main, Fork::FreeSpaceMap, Fork::VisibilityMap, Fork::Init];
    forks.get(usize::from(number)).copied().ok_or(UnknownKey)
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            Ok(kind) => write!(f, "{:08X} {kind:?}", self.hash()),
            Err(_) => self.0.iter().try_for_each(|byte| write!(f, "{byte:02X}")),
        }
    }
}

/// Keys from `begin` up to, not including, `end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct KeyRange {
    /// First key.
    pub begin: Key,
    /// Behind the last key.
    pub end: Key,
}

impl KeyRange {
    /// All keys.
    pub const ALL: KeyRange = KeyRange { begin: Key::MIN, end: Key::MAX };

    /// Whether `key` is in the range.
    pub fn contains(&self, key: Key) -> bool {
        self.begin <= key && key < self.end
    }

    /// Whether the range holds no key.
    pub fn is_empty(&self) -> bool {
        self.begin >= self.end
    }

    /// The keys in both; empty if there are none.
    #[must_use]
    pub fn intersection(&self, other: &KeyRange) -> KeyRange {
        KeyRange { begin: self.begin.max(other.begin), end: self.end.min(other.end) }
    }
}

/// A shard: places of the hash space from `begin` up to, not including, `end` (at most 2^32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HashRange {
    /// First place. The shard that begins with 0 has the metadata.
    pub begin: u64,
    /// Behind the last place.
    pub end: u64,
}

impl HashRange {
    /// The whole space.
    pub const ALL: HashRange = HashRange { begin: 0, end: 1 << 32 };

    /// The part of number `index` when the space is cut into `count` parts of one size; `index < count`.
    pub fn even_part(index: u32, count: u32) -> HashRange {
        let bound = |index: u64| (index << 32) / u64::from(count);
        HashRange { begin: bound(u64::from(index)), end: bound(u64::from(index) + 1) }
    }

    /// Whether the shard has the key.
    pub fn contains(&self, key: Key) -> bool {
        (self.begin..self.end).contains(&u64::from(key.hash()))
    }

    /// The shard's keys: a range, since the hash comes first in a key.
    pub fn keys(&self) -> KeyRange {
        let bound = |hash: u64| u32::try_from(hash).map_or(Key::MAX, Key::first_of_hash);
        KeyRange { begin: bound(self.begin), end: bound(self.end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELATION: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };

    #[test]
    fn a_key_says_what_it_names() {
        let striping = Striping::DEFAULT;
        let table = [
            (Key::metadata(Metadata::Checkpoint), KeyKind::Metadata(Metadata::Checkpoint)),
            (Key::metadata(Metadata::TwoPhase(7 << 32 | 9)), KeyKind::Metadata(Metadata::TwoPhase(7 << 32 | 9))),
            (Key::metadata(Metadata::Origin(9)), KeyKind::Metadata(Metadata::Origin(9))),
            (Key::slru(Slru::CommitTimestamps, 3), KeyKind::Slru(Slru::CommitTimestamps, 3)),
            (
                striping.stripe_size(RELATION, Fork::Init, 2),
                KeyKind::StripeSize { relation: RELATION, fork: Fork::Init, stripe: 2 },
            ),
            (
                striping.block(RELATION, Fork::VisibilityMap, 5000),
                KeyKind::Block { relation: RELATION, fork: Fork::VisibilityMap, block: 5000 },
            ),
        ];
        for (key, kind) in table {
            assert_eq!(Ok(kind), key.kind());
            assert_eq!(key, Key::from_bytes(key.to_bytes()));
        }
        assert_eq!(Err(UnknownKey), Key::MAX.kind());
    }

    /// A read of many blocks then is one range, and the length of a stripe lies beside it.
    #[test]
    fn blocks_of_a_stripe_follow_each_other_and_metadata_comes_first() {
        let key = |block| Striping::DEFAULT.block(RELATION, Fork::Main, block);
        assert!((0..2047).all(|block| key(block).next() == key(block + 1)));
        assert_eq!(key(2047).hash(), key(0).hash());
        assert_ne!(key(2048).hash(), key(0).hash());
        assert_eq!(key(2048).hash(), Striping::DEFAULT.stripe_size(RELATION, Fork::Main, 1).hash());
        assert!(Key::slru(Slru::CommitTimestamps, u32::MAX) < Key::first_of_hash(1));
    }

    /// A copy of a database is made by each shard for itself.
    #[test]
    fn a_database_copy_stays_on_its_shard() {
        let copy = RelFileLocator { database: 6, ..RELATION };
        let hash = |relation| Striping::DEFAULT.block(relation, Fork::Main, 77).hash();
        assert_eq!(hash(RELATION), hash(copy));
    }

    /// Every layer of a lakebase is lost if this changes.
    #[test]
    fn the_hash_of_a_stripe_is_for_ever() {
        assert_eq!([0xE220_A839, 0x910A_2DEC], [stripe_hash(0, 0), stripe_hash(0, 1)]);
    }

    #[test]
    fn shards_divide_the_keys_among_them() {
        for count in [1, 2, 3, 7, 100] {
            let shards: alloc::vec::Vec<_> = (0..count).map(|index| HashRange::even_part(index, count)).collect();
            assert_eq!(Key::MIN, shards[0].keys().begin);
            assert_eq!(Key::MAX, shards[count as usize - 1].keys().end);
            for (left, right) in shards.iter().zip(&shards[1..]) {
                assert_eq!(left.keys().end, right.keys().begin);
            }
            for block in (0..2_000_000).step_by(2048) {
                let key = Striping::DEFAULT.block(RELATION, Fork::Main, block);
                assert_eq!(1, shards.iter().filter(|shard| shard.contains(key) && shard.keys().contains(key)).count());
            }
        }
    }

    #[test]
    fn stripes_are_spread_evenly() {
        let mut counts = [0u32; 16];
        for stripe in 0..16_000 {
            counts[(stripe_hash(16384, stripe) >> 28) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
