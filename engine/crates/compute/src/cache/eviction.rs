//! Gives blocks back when the cache passes its limit or the disk runs full.
//!
//! Which ones is the clock's choice (`vfs_abi::blocks`): those that nobody has read since it came by, and whose changes are
//! committed. All of it is local work of microseconds, done in portions between which the core's other tasks run.

use std::{pin::pin, rc::Rc, time::Duration};

use futures_util::future::select;
use vfs_abi::blocks::{BLOCK_BYTES, ClockHand};

use super::{
    Cache,
    files::{available_bytes, punch},
    map::Futex,
};
use crate::{core::yield_now, page_service_config::Evict};

/// How often the limits are looked at when no fill asks for it: PostgreSQL's writes fill the cache, too.
const INTERVAL: Duration = Duration::from_millis(200);
/// The same, when the last look found nothing to give back.
const INTERVAL_IN_VAIN: Duration = Duration::from_secs(1);
/// Room that is kept free on the disk, for WAL, sorts and new relations.
const HEADROOM_BYTES: u64 = 256 << 20;
/// Blocks given back at once: about a millisecond of hole punching.
const PORTION_BLOCKS: u64 = 512;
/// Blocks given back when a write finds the disk full.
const ROOM_BLOCKS: u64 = 2048;

/// Blocks above which some are given back, and down to which.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Marks {
    high: u64,
    low: u64,
}

impl Marks {
    /// Of a limit in bytes: begin at 15/16, so that fills under way find room, stop at 7/8. `None` without a limit.
    fn of(cache_bytes: u64) -> Option<Marks> {
        let blocks = cache_bytes / BLOCK_BYTES;
        (cache_bytes > 0).then_some(Marks { high: blocks - blocks / 16, low: blocks - blocks / 8 })
    }
}

/// Wakes [`keep_room`] when there is something to do. Called after fills.
pub(super) fn look(cache: &Cache) {
    let marks = Marks::of(cache.setup.config.cache_bytes);
    if marks.is_some_and(|marks| cache.setup.blocks.map().present_blocks() > marks.high) {
        cache.pressed.set();
    }
}

/// Gives blocks back until the end.
pub(super) async fn keep_room(cache: Rc<Cache>) {
    if cache.setup.config.evict == Evict::Always {
        // The library does.
        return;
    }
    let marks = Marks::of(cache.setup.config.cache_bytes);
    let mut hand = ClockHand::default();
    let mut trouble = Trouble::default();
    while !cache.ended.get() {
        let map = cache.setup.blocks.map();
        let present = map.present_blocks();
        let over = marks.filter(|marks| present > marks.high).map_or(0, |marks| present - marks.low);
        let short = match available_bytes(&cache.setup.pgdata) {
            Ok(available) => HEADROOM_BYTES.saturating_sub(available).div_ceil(BLOCK_BYTES).min(present),
            Err(error) => {
                trouble.note(&error);
                0
            }
        };
        let mut wanted = over.max(short);
        let mut vain = false;
        while wanted > 0 && !cache.ended.get() {
            let given = evict(&cache, &mut hand, wanted.min(PORTION_BLOCKS), false, &mut trouble);
            wanted = wanted.saturating_sub(given);
            if given == 0 {
                // Once more past those that were only read lately; then the rest is not committed, or not ours to give.
                vain = evict(&cache, &mut hand, wanted.min(PORTION_BLOCKS), true, &mut trouble) == 0;
                if vain {
                    break;
                }
            }
            yield_now().await;
        }
        let interval = if vain { INTERVAL_IN_VAIN } else { INTERVAL };
        let high = marks.map_or(u64::MAX, |marks| marks.high);
        let pressed = cache.pressed.until(|| {
            let pressed = !vain && cache.setup.blocks.map().present_blocks() > high;
            (pressed || cache.ended.get()).then_some(())
        });
        select(pin!(driver::sleep(interval)), pin!(pressed)).await;
    }
}

/// Gives back some blocks, recently read or not: a write found the disk full.
pub(super) fn make_room_at_once(cache: &Cache) {
    let given = evict(cache, &mut ClockHand::default(), ROOM_BLOCKS, true, &mut Trouble::default());
    tracing::debug!(blocks = given, "the disk is full: blocks were given back");
}

/// Gives back about `wanted` blocks; returns how many.
fn evict(cache: &Cache, hand: &mut ClockHand, wanted: u64, hurry: bool, trouble: &mut Trouble) -> u64 {
    let map = cache.setup.blocks.map();
    let mut given = 0;
    while given < wanted {
        let Some(mut candidate) = map.next_candidate(hand, hurry) else { break };
        while let Some(run) = map.begin_evict(&mut candidate, &Futex) {
            let file = cache.files.borrow_mut().get(run.file, &run.key);
            let result = file.and_then(|file| punch(&file, run.first_block, run.blocks));
            map.finish_evict(&run, result.is_ok(), &Futex);
            match result {
                Ok(()) => given += u64::from(run.blocks),
                Err(error) => {
                    trouble.note(&error);
                    return given;
                }
            }
        }
    }
    given
}

/// Says once what keeps blocks from being given back.
#[derive(Default)]
struct Trouble(bool);

impl Trouble {
    fn note(&mut self, error: &std::io::Error) {
        if !std::mem::replace(&mut self.0, true) {
            tracing::error!(%error, "blocks cannot be given back to the file system: the cache will pass its limit");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_leave_room_for_fills_under_way() {
        assert_eq!(None, Marks::of(0));
        assert_eq!(Some(Marks { high: 7680, low: 7168 }), Marks::of(64 << 20));
        let smallest = Marks::of(16 << 20).expect("a limit");
        assert!(smallest.low < smallest.high && smallest.high + 64 < 2048, "{smallest:?}");
    }
}
