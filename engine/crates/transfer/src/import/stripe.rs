//! The stripes of a shard, in the order of their keys: what makes an import one pass in bounded memory.

use layers::{HashRange, Striping, stripe_hash};

use crate::relations::ForkFiles;

/// A run of blocks that lie beside each other in a file and in the order of keys.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Stripe {
    /// Its place. First: keys begin with it.
    pub(crate) hash: u32,
    /// Where its blocks are.
    pub(crate) files: ForkFiles,
    /// Its number.
    pub(crate) number: u32,
    /// Its first block.
    pub(crate) first: u32,
    /// How many blocks it has; 0 only as the first stripe of an empty fork.
    pub(crate) blocks: u32,
}

/// All stripes of a shard. About 50 bytes each, for 16 MiB of pages; relations that share a hash follow each other.
pub(crate) fn stripes_of(forks: &[ForkFiles], striping: Striping, range: HashRange) -> Vec<Stripe> {
    let mut stripes = Vec::new();
    for files in forks {
        for number in 0..files.blocks.div_ceil(striping.stripe_blocks).max(1) {
            let hash = stripe_hash(files.relation.relation, number);
            if (range.begin..range.end).contains(&u64::from(hash)) {
                let first = number * striping.stripe_blocks;
                let blocks = (files.blocks - first).min(striping.stripe_blocks);
                stripes.push(Stripe { hash, files: *files, number, first, blocks });
            }
        }
    }
    stripes.sort_unstable();
    stripes
}

#[cfg(test)]
mod tests {
    use layers::Key;
    use wal::{Fork, RelFileLocator};

    use super::*;

    /// The writer of a layer takes keys in their order only; forks of a relation and copies of a database share hashes.
    #[test]
    fn stripes_are_in_the_order_of_their_keys_and_each_is_on_one_shard() {
        let striping = Striping { stripe_blocks: 4 };
        let mut forks = Vec::new();
        for (database, relation) in [(5, 1259), (5, 16384), (6, 16384), (5, 99)] {
            for (fork, blocks) in [(Fork::Main, relation % 50), (Fork::VisibilityMap, 1)] {
                let relation = RelFileLocator { tablespace: 1663, database, relation };
                forks.push(ForkFiles { relation, fork, blocks });
            }
        }
        forks.sort_unstable();
        let mut seen = Vec::new();
        for index in 0..3 {
            let mut last = Key::MIN;
            let stripes = stripes_of(&forks, striping, HashRange::even_part(index, 3));
            for of_hash in stripes.chunk_by(|a, b| a.hash == b.hash) {
                let sizes = of_hash.iter().map(|s| striping.stripe_size(s.files.relation, s.files.fork, s.number));
                let blocks = of_hash.iter().flat_map(|s| {
                    (s.first..s.first + s.blocks).map(move |b| striping.block(s.files.relation, s.files.fork, b))
                });
                for key in sizes.chain(blocks) {
                    assert!(last < key, "{last:?} {key:?}");
                    last = key;
                }
            }
            seen.extend(stripes);
        }

        let blocks: u32 = seen.iter().map(|stripe| stripe.blocks).sum();
        assert_eq!(forks.iter().map(|files| files.blocks).sum::<u32>(), blocks);
        let whole: usize = forks.iter().map(|files| files.blocks.div_ceil(4).max(1) as usize).sum();
        assert_eq!(whole, seen.len());
    }
}
