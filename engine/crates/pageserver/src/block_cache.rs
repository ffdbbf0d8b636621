//! Unpacked blocks of layers, in memory: neighbouring pages share blocks of delta layers, and hot pages come again.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
};

use layers::LayerId;

/// Which block.
type Place = (LayerId, u32);

struct Cached {
    block: Rc<Vec<u8>>,
    used: Cell<bool>,
}

/// Keeps up to a number of bytes. What was used since it was last looked at gets a second chance.
pub struct BlockCache {
    bytes_max: usize,
    bytes: Cell<usize>,
    blocks: RefCell<HashMap<Place, Cached>>,
    /// Each block of `blocks` once, longest there first.
    order: RefCell<VecDeque<Place>>,
}

impl BlockCache {
    /// An empty one for `bytes_max` bytes of blocks.
    pub fn new(bytes_max: usize) -> BlockCache {
        BlockCache { bytes_max, bytes: Cell::new(0), blocks: RefCell::default(), order: RefCell::default() }
    }

    /// The block, if it is here.
    pub fn get(&self, layer: LayerId, block: u32) -> Option<Rc<Vec<u8>>> {
        let blocks = self.blocks.borrow();
        let cached = blocks.get(&(layer, block))?;
        cached.used.set(true);
        Some(cached.block.clone())
    }

    /// Keeps a block, and drops others for it.
    pub fn put(&self, layer: LayerId, number: u32, block: Rc<Vec<u8>>) {
        if block.len() > self.bytes_max / 8 {
            return;
        }
        let mut blocks = self.blocks.borrow_mut();
        let mut order = self.order.borrow_mut();
        let bytes = block.len();
        if blocks.insert((layer, number), Cached { block, used: Cell::new(false) }).is_some() {
            // Two reads fetched it at once: the bytes are the same.
            return;
        }
        order.push_back((layer, number));
        let mut total = self.bytes.get() + bytes;
        while total > self.bytes_max {
            let Some(oldest) = order.pop_front() else { break };
            match blocks.get(&oldest) {
                Some(cached) if cached.used.replace(false) => order.push_back(oldest),
                Some(cached) => {
                    total -= cached.block.len();
                    blocks.remove(&oldest);
                }
                None => {}
            }
        }
        self.bytes.set(total);
    }
}

#[cfg(test)]
mod tests {
    use layers::{ShardGeneration, ShardId};

    use super::*;

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let layer = LayerId { shard: ShardId(1), generation: ShardGeneration(1), number: 1 };
        let cache = BlockCache::new(1000);
        for number in 0..100 {
            cache.put(layer, number, Rc::new(vec![0; 100]));
            assert!(cache.get(layer, 0).is_some(), "block 0 was used after each of {number} others");
            assert!(cache.bytes.get() <= 1000);
        }
        assert!(cache.get(layer, 99).is_some() && cache.get(layer, 50).is_none());
        cache.put(layer, 200, Rc::new(vec![0; 500]));
        assert!(cache.get(layer, 200).is_none(), "half of the cache for one block");
    }
}
