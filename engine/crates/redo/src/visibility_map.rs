//! Pages of the visibility map: two bits for each page of a heap.
//!
//! Source: `access/heap/visibilitymap.c`.

use crate::page::{HEADER_BYTES, PAGE_BYTES, Page};

/// Both bits of a heap block (`VISIBILITYMAP_VALID_BITS`).
pub(crate) const ALL_BITS: u8 = 0x03;
/// The bit that says that all rows are frozen (`VISIBILITYMAP_ALL_FROZEN`).
pub(crate) const ALL_FROZEN: u8 = 0x02;

const HEAP_BLOCKS_PER_BYTE: u32 = 4;
const HEAP_BLOCKS_PER_PAGE: u32 = (PAGE_BYTES - HEADER_BYTES) as u32 * HEAP_BLOCKS_PER_BYTE;

/// The map's block that holds the bits of `heap_block`.
pub(crate) const fn map_block(heap_block: u32) -> u32 {
    heap_block / HEAP_BLOCKS_PER_PAGE
}

/// Whether a truncation of the heap to `heap_blocks` leaves a page of the map with bits of blocks that are gone.
pub(crate) const fn cuts_page(heap_blocks: u32) -> bool {
    !heap_blocks.is_multiple_of(HEAP_BLOCKS_PER_PAGE)
}

/// Byte in the page, and shift in the byte.
fn place(heap_block: u32) -> (usize, u32) {
    let in_page = heap_block % HEAP_BLOCKS_PER_PAGE;
    (HEADER_BYTES + (in_page / HEAP_BLOCKS_PER_BYTE) as usize, heap_block % HEAP_BLOCKS_PER_BYTE * 2)
}

fn init_if_new(map: &mut Page) {
    if map.is_new() {
        map.init(0);
    }
}

/// Clears bits of a heap block; returns whether any was set (`visibilitymap_clear_locked`).
pub(crate) fn clear(map: &mut Page, heap_block: u32, bits: u8) -> bool {
    init_if_new(map);
    let (byte, shift) = place(heap_block);
    let mask = bits << shift;
    let was_set = map.0[byte] & mask != 0;
    map.0[byte] &= !mask;
    was_set
}

/// Sets bits of a heap block; returns whether PostgreSQL would have changed the page (`visibilitymap_set`).
pub(crate) fn set(map: &mut Page, heap_block: u32, bits: u8) -> bool {
    init_if_new(map);
    let (byte, shift) = place(heap_block);
    let differs = map.0[byte] >> shift & ALL_BITS != bits;
    map.0[byte] |= bits << shift;
    differs
}

/// Clears the bits of heap blocks from `heap_blocks` on (`visibilitymap_prepare_truncate`).
pub(crate) fn truncate(map: &mut Page, heap_blocks: u32) {
    init_if_new(map);
    let (byte, shift) = place(heap_blocks);
    map.0[byte] &= (1u8 << shift) - 1;
    map.0[byte + 1..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_one_block_leave_the_others() {
        let mut map = Page::ZERO;
        for block in 0..HEAP_BLOCKS_PER_PAGE {
            assert!(set(&mut map, block, ALL_BITS));
        }
        assert!(!set(&mut map, 7, ALL_BITS));
        assert!(clear(&mut map, 5, ALL_FROZEN));
        assert!(!clear(&mut map, 5, ALL_FROZEN));
        assert_eq!(0b1111_0111, map.0[HEADER_BYTES + 1]);
        assert!(clear(&mut map, HEAP_BLOCKS_PER_PAGE - 1, ALL_BITS));
        assert_eq!(0b0011_1111, map.0[PAGE_BYTES - 1]);
    }

    /// A table that grows again must not find old bits: index-only scans would return rows that are not there.
    #[test]
    fn truncation_forgets_the_tail() {
        let mut map = Page::ZERO;
        for block in 0..HEAP_BLOCKS_PER_PAGE {
            set(&mut map, block, ALL_BITS);
        }
        truncate(&mut map, 6);
        assert_eq!([0xFF, 0x0F, 0], map.0[HEADER_BYTES..HEADER_BYTES + 3]);
        assert!(map.0[HEADER_BYTES + 2..].iter().all(|byte| *byte == 0));
        assert!(cuts_page(6) && !cuts_page(HEAP_BLOCKS_PER_PAGE) && !cuts_page(0));
    }
}
