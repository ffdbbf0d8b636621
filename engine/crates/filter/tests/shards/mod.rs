//! What every way of filtering must give: each shard what is its own, all shards together everything.
#![allow(dead_code, reason = "each test crate uses its own part")]

use std::collections::BTreeSet;

use filter::{Batch, Item, Route};
use layers::{HashRange, Key, Striping};
use redo::{Touch, blocks_of, events_of};
use wal::{Fork, Record};

/// Small, so that relations of a test lie on several shards.
pub const STRIPING: Striping = Striping { stripe_blocks: 8 };

pub fn ranges(count: u32) -> Vec<HashRange> {
    (0..count).map(|index| HashRange::even_part(index, count)).collect()
}

fn key(touch: &Touch) -> Key {
    STRIPING.block(touch.tag.relation, touch.tag.fork, touch.tag.block)
}

/// What a shard has to do for a record, of the blocks that are its own.
fn own_touches(record: &Record, range: HashRange) -> Vec<Touch> {
    blocks_of(record).filter(|touch| touch.tag.fork != Fork::FreeSpaceMap && range.contains(key(touch))).collect()
}

pub fn decode(item: &Item) -> Record {
    Record::from_stored(item.start, item.end, &item.stored).expect("a stored record")
}

/// Compares the items that shards got for one record with the record.
///
/// # Panics
/// When a shard lacks something of its own, or has something of another's.
pub fn assert_complete(record: &Record, items: &[(HashRange, Option<Item>)]) {
    let route = Route::of(record, STRIPING);
    let mut found = BTreeSet::new();
    for (range, item) in items {
        assert_eq!(route.concerns(*range), item.is_some(), "{record:?}");
        let expected = own_touches(record, *range);
        let Some(item) = item else {
            assert_eq!(Vec::<Touch>::new(), expected, "{record:?}");
            continue;
        };
        let trimmed = decode(item);
        assert_eq!((record.info.start, record.info.end), (trimmed.info.start, trimmed.info.end));
        assert_eq!(expected, own_touches(&trimmed, *range));
        assert!(events_of(record).eq(events_of(&trimmed)));
        assert_eq!(record.main_data(), trimmed.main_data());
        for (whole, block) in record.blocks.iter().zip(&trimmed.blocks) {
            let own = whole.fork != Fork::FreeSpaceMap
                && range.contains(STRIPING.block(whole.relation, whole.fork, whole.block));
            let (data, image) =
                if own { (record.block_data(whole), record.block_image(whole)) } else { (&[][..], None) };
            assert_eq!((data, image), (trimmed.block_data(block), trimmed.block_image(block)));
        }
        found.extend(expected.iter().map(key));
    }
    let all: BTreeSet<Key> =
        blocks_of(record).filter(|touch| touch.tag.fork != Fork::FreeSpaceMap).map(|touch| key(&touch)).collect();
    assert_eq!(all, found);
    if events_of(record).next().is_some() {
        assert!(items.iter().all(|(_, item)| item.is_some()), "{record:?}");
    }
}

/// Checks that batches follow each other and puts their items in one list.
pub fn joined(batches: &[Batch]) -> Vec<Item> {
    for (earlier, later) in batches.iter().zip(batches.iter().skip(1)) {
        assert_eq!(earlier.through, later.after);
    }
    for batch in batches {
        assert_eq!(batch.through, batch.summary.record_end);
        assert!(batch.after < batch.through && batch.through <= batch.commit_lsn);
        let ends: Vec<_> = batch.items.iter().map(|item| item.end).collect();
        assert!(ends.is_sorted() && ends.iter().all(|end| batch.after < *end && *end <= batch.through));
    }
    batches.iter().flat_map(|batch| batch.items.clone()).collect()
}
