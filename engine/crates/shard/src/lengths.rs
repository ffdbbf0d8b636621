//! How long every fork is in each stripe of the shard, as of the last record.

use alloc::{collections::BTreeMap, vec::Vec};
use core::ops::RangeInclusive;

use layers::{HashRange, Striping};
use pgtypes::Lsn;
use redo::{Database, Truncation};
use wal::{Fork, RelFileLocator};

use crate::{copy::CopiedStripe, stripe_size::StripeSize, values::Values};

/// A stripe of a fork.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StripeOf {
    /// Whose.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// Number of the stripe.
    pub stripe: u32,
}

impl StripeOf {
    fn all_of_fork(relation: RelFileLocator, fork: Fork) -> RangeInclusive<StripeOf> {
        StripeOf { relation, fork, stripe: 0 }..=StripeOf { relation, fork, stripe: u32::MAX }
    }

    fn all_of_relation(relation: RelFileLocator) -> RangeInclusive<StripeOf> {
        StripeOf { relation, fork: Fork::Main, stripe: 0 }..=StripeOf { relation, fork: Fork::Init, stripe: u32::MAX }
    }

    fn all_of_database(database: Database) -> RangeInclusive<StripeOf> {
        let Database { tablespace, database } = database;
        let relation = |relation| RelFileLocator { tablespace, database, relation };
        StripeOf { relation: relation(0), fork: Fork::Main, stripe: 0 }..=StripeOf {
            relation: relation(u32::MAX),
            fork: Fork::Init,
            stripe: u32::MAX,
        }
    }
}

/// Lengths of the shard's stripes. Every change is put as a value, so that an attach finds the same again.
#[derive(Debug)]
pub(crate) struct Lengths {
    striping: Striping,
    range: HashRange,
    stripes: BTreeMap<StripeOf, StripeSize>,
}

/// The floor of a stripe that begins with the record that ends at `lsn`: that record's own values count.
fn floor_before(lsn: Lsn) -> Lsn {
    Lsn(lsn.0.saturating_sub(1))
}

impl Lengths {
    pub fn new(striping: Striping, range: HashRange) -> Lengths {
        Lengths { striping, range, stripes: BTreeMap::new() }
    }

    pub fn load(&mut self, of: StripeOf, size: StripeSize) {
        self.stripes.insert(of, size);
    }

    pub fn get(&self, of: &StripeOf) -> Option<StripeSize> {
        self.stripes.get(of).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = (StripeOf, StripeSize)> + '_ {
        self.stripes.iter().map(|(of, size)| (*of, *size))
    }

    pub fn has_block(&self, relation: RelFileLocator, fork: Fork, block: u32) -> bool {
        let of = StripeOf { relation, fork, stripe: self.striping.stripe_of(block) };
        self.get(&of).is_some_and(|size| size.has_block(self.striping, block))
    }

    /// A record writes a block, which lies on this shard.
    pub fn touch(&mut self, relation: RelFileLocator, fork: Fork, block: u32, lsn: Lsn, values: &mut Values) {
        let of = StripeOf { relation, fork, stripe: self.striping.stripe_of(block) };
        let length = block % self.striping.stripe_blocks + 1;
        let size = self.stripes.entry(of).or_insert(StripeSize { length: 0, floor: floor_before(lsn) });
        if size.length < length {
            size.length = length;
            values.stripe_size(self.striping.stripe_size(relation, fork, of.stripe), *size);
        }
    }

    pub fn create_fork(&mut self, relation: RelFileLocator, fork: Fork, lsn: Lsn, values: &mut Values) {
        self.remove(StripeOf::all_of_fork(relation, fork), values);
        let key = self.striping.stripe_size(relation, fork, 0);
        if self.range.contains(key) {
            let size = StripeSize { length: 0, floor: floor_before(lsn) };
            self.stripes.insert(StripeOf { relation, fork, stripe: 0 }, size);
            values.stripe_size(key, size);
        }
    }

    pub fn drop_relation(&mut self, relation: RelFileLocator, values: &mut Values) {
        self.remove(StripeOf::all_of_relation(relation), values);
    }

    pub fn drop_database(&mut self, database: Database, values: &mut Values) {
        self.remove(StripeOf::all_of_database(database), values);
    }

    fn remove(&mut self, range: RangeInclusive<StripeOf>, values: &mut Values) {
        let gone: Vec<StripeOf> = self.stripes.range(range).map(|(of, _)| *of).collect();
        for of in gone {
            self.stripes.remove(&of);
            values.absent(self.striping.stripe_size(of.relation, of.fork, of.stripe));
        }
    }

    pub fn truncate(&mut self, truncation: &Truncation, lsn: Lsn, values: &mut Values) {
        if truncation.main {
            self.cut(truncation.relation, Fork::Main, truncation.heap_blocks, lsn, values);
        }
        if truncation.visibility_map {
            self.cut(truncation.relation, Fork::VisibilityMap, truncation.visibility_map_blocks(), lsn, values);
        }
    }

    /// Cuts a fork to `blocks`. A stripe that is gone loses its value; stripe 0 stays, since it says that the fork exists.
    fn cut(&mut self, relation: RelFileLocator, fork: Fork, blocks: u32, lsn: Lsn, values: &mut Values) {
        let striping = self.striping;
        let cut_stripe = striping.stripe_of(blocks);
        let cut_length = blocks % striping.stripe_blocks;
        let affected = StripeOf { relation, fork, stripe: cut_stripe }..=StripeOf { relation, fork, stripe: u32::MAX };
        let affected: Vec<_> = self.stripes.range(affected).map(|(of, size)| (*of, *size)).collect();
        for (of, size) in affected {
            let key = striping.stripe_size(relation, fork, of.stripe);
            let length = if of.stripe == cut_stripe { cut_length } else { 0 };
            if length > 0 {
                if length < size.length {
                    let first = of.stripe * striping.stripe_blocks;
                    for block in first + length..first + size.length {
                        values.absent(striping.block(relation, fork, block));
                    }
                    let size = StripeSize { length, ..size };
                    self.stripes.insert(of, size);
                    values.stripe_size(key, size);
                }
            } else if of.stripe == 0 {
                if size.length > 0 {
                    let size = StripeSize { length: 0, floor: floor_before(lsn) };
                    self.stripes.insert(of, size);
                    values.stripe_size(key, size);
                }
            } else {
                self.stripes.remove(&of);
                values.absent(key);
            }
        }
    }

    /// The new database's stripes; returns what has to be copied into them.
    pub fn copy_database(&mut self, from: Database, to: Database, lsn: Lsn, values: &mut Values) -> Vec<CopiedStripe> {
        self.drop_database(to, values);
        let sources: Vec<_> =
            self.stripes.range(StripeOf::all_of_database(from)).map(|(of, size)| (*of, *size)).collect();
        let mut copied = Vec::new();
        for (source, StripeSize { length, floor }) in sources {
            let Database { tablespace, database } = to;
            let relation = RelFileLocator { tablespace, database, relation: source.relation.relation };
            let size = StripeSize { length, floor: floor_before(lsn) };
            self.stripes.insert(StripeOf { relation, ..source }, size);
            values.stripe_size(self.striping.stripe_size(relation, source.fork, source.stripe), size);
            copied.push(CopiedStripe {
                from: source.relation,
                to: relation,
                fork: source.fork,
                first_block: source.stripe * self.striping.stripe_blocks,
                length,
                floor,
            });
        }
        copied
    }
}
