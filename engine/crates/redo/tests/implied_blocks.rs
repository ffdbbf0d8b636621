//! Blocks that records change without referring to them, as WAL of 17.10 and older does with the visibility map.

mod records;

use records::{Block, record};
use redo::{Applied, Context, Event, Page, Reason, Touch, apply, blocks_of, events_of};
use wal::{Fork, Record};

const CONTEXT: Context = Context { hint_bits_logged: true };
/// Heap blocks that a page of the map is for.
const HEAP_BLOCKS: u32 = 32_672;

fn heap_record(info: u8, blocks: &[u32], main: &[u8]) -> Record {
    let block = |(id, block): (u8, &u32)| Block { id, will_init: false, block: *block, data: Vec::new() };
    let blocks: Vec<_> = (0..).zip(blocks).map(block).collect();
    record(10, info, &blocks, main).expect("a record")
}

fn implied(record: &Record) -> Vec<Touch> {
    blocks_of(record).filter(|touch| !matches!(touch.reason, Reason::Registered(_))).collect()
}

/// A page of the map with all bits set.
fn full_map() -> Page {
    let mut map = Page::ZERO;
    for (at, value) in [(12, 24), (14, 8192), (16, 8192), (18, 8196)] {
        map.0[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
    }
    map.0[24..].fill(0xFF);
    map
}

/// A delete that cleared the page's flag also clears both bits of the map, without a trace in the map's LSN.
#[test]
fn delete_clears_bits_of_a_map_that_it_does_not_refer_to() {
    // xmax, line pointer 1, no infobits, PD_ALL_VISIBLE was cleared.
    let main = [9, 0, 0, 0, 1, 0, 0, 1];
    let deleted = heap_record(0x10, &[HEAP_BLOCKS + 1], &main);
    let touches = implied(&deleted);
    assert_eq!(1, touches.len());
    assert_eq!((Fork::VisibilityMap, 1), (touches[0].tag.fork, touches[0].tag.block));
    let mut map = full_map();
    let lsn = map.lsn();

    assert_eq!(Ok(Applied::Changed), apply(&deleted, &touches[0], &mut map, &CONTEXT));
    assert_eq!(Ok(Applied::Unchanged), apply(&deleted, &touches[0], &mut map, &CONTEXT));

    assert_eq!([0b1111_0011, 0xFF], map.0[24..26]);
    assert_eq!(lsn, map.lsn());
}

#[test]
fn record_that_clears_nothing_implies_nothing() {
    assert!(implied(&heap_record(0x10, &[7], &[9, 0, 0, 0, 1, 0, 0, 0])).is_empty());
    // From 17.11 on the map's page is registered.
    assert!(implied(&heap_record(0x10, &[7, 0], &[9, 0, 0, 0, 1, 0, 0, 1])).is_empty());
}

/// Both rows' pages had bits, which are in different pages of the map.
#[test]
fn update_clears_bits_of_both_blocks() {
    let main = [9, 0, 0, 0, 1, 0, 0, 0b11, 0, 0, 0, 0, 2, 0];
    let touches = implied(&heap_record(0x20, &[3, HEAP_BLOCKS * 2], &main));
    let blocks: Vec<_> = touches.iter().map(|touch| (touch.tag.block, touch.reason)).collect();
    assert_eq!(
        [
            (2, Reason::ClearVisibility { heap_block: HEAP_BLOCKS * 2, bits: 3 }),
            (0, Reason::ClearVisibility { heap_block: 3, bits: 3 }),
        ],
        blocks[..]
    );
}

/// A table that grows again after a truncation must not find bits of its former pages.
#[test]
fn truncation_clears_the_tail_of_the_last_map_page() {
    let mut main = Vec::new();
    for word in [HEAP_BLOCKS + 6, 1663, 5, 16384, 7] {
        main.extend(u32::to_le_bytes(word));
    }
    let truncated = record(2, 0x20, &[], &main).expect("a record");
    let touches = implied(&truncated);
    assert_eq!(1, touches.len());
    assert_eq!((Fork::VisibilityMap, 1), (touches[0].tag.fork, touches[0].tag.block));
    let mut map = full_map();

    assert_eq!(Ok(Applied::Changed), apply(&truncated, &touches[0], &mut map, &CONTEXT));

    assert_eq!([0xFF, 0x0F, 0], map.0[24..27]);
    let Some(Event::Truncate(truncation)) = events_of(&truncated).next() else { panic!("no truncation") };
    assert_eq!(2, truncation.visibility_map_blocks());
}
