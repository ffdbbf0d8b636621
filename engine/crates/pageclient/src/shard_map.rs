//! Which shard has a place of the hash space.

use std::rc::Rc;

use layers::HashRange;

use crate::{config::ShardAddress, link::Link};

/// The shards do not divide the hash space among them. The caller's fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShardMapError {
    /// A place has no shard.
    #[error("shard map: no shard has hash {0:#010x}")]
    Gap(u64),
    /// A place has two.
    #[error("shard map: two shards have hash {0:#010x}")]
    Overlap(u64),
}

/// Links in the order of their ranges.
pub struct ShardMap {
    links: Vec<Rc<Link>>,
}

impl ShardMap {
    /// A map of links that `link_of` gives for each shard; none is asked for when the map is refused.
    pub fn new(
        mut shards: Vec<ShardAddress>,
        mut link_of: impl FnMut(ShardAddress) -> Rc<Link>,
    ) -> Result<ShardMap, ShardMapError> {
        shards.sort_by_key(|shard| (shard.range.begin, shard.range.end));
        let mut begin = HashRange::ALL.begin;
        for shard in &shards {
            if shard.range.begin > begin {
                return Err(ShardMapError::Gap(begin));
            }
            if shard.range.begin < begin || shard.range.end <= begin {
                return Err(ShardMapError::Overlap(shard.range.begin));
            }
            begin = shard.range.end;
        }
        if begin < HashRange::ALL.end {
            return Err(ShardMapError::Gap(begin));
        }
        Ok(ShardMap { links: shards.into_iter().map(&mut link_of).collect() })
    }

    /// All of them; the first has the metadata.
    pub fn links(&self) -> &[Rc<Link>] {
        &self.links
    }

    /// The one that has a place.
    pub fn link(&self, hash: u32) -> &Rc<Link> {
        let index = self.links.partition_point(|link| link.address().range.end <= u64::from(hash));
        &self.links[index]
    }
}
