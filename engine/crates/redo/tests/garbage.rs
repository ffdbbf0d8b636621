//! Broken records and pages make errors: they never panic, whatever is in them.
//!
//! A record comes from a peer and a page from a disk; redo of one page must not end a page server.

mod records;

use proptest::{collection::vec, prelude::*};
use records::{Block, record};
use redo::{Context, PAGE_BYTES, Page, apply, blocks_of, events_of, mask};
use wal::Fork;

/// Small numbers are what gets past the first checks.
fn bytes(length_max: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![3 => 0u8..4, 2 => 0u8..64, 1 => any::<u8>()], 0..length_max)
}

/// Pages from entirely broken to nearly sound.
fn pages() -> impl Strategy<Value = Page> {
    let places = (0usize..400, 0usize..8192, prop_oneof![Just(0usize), Just(8), Just(16), Just(24), 0usize..9000]);
    let content = (any::<u64>(), prop_oneof![Just(0usize), Just(200), Just(PAGE_BYTES)], bytes(800));
    (any::<bool>(), places, content).prop_map(|(sound, (items, upper, special), (seed, noise, head))| {
        let mut page = Page::ZERO;
        let mut state = seed | 1;
        for byte in page.0.iter_mut().rev().take(noise) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = (state >> 59) as u8;
        }
        page.0[24..24 + head.len()].copy_from_slice(&head);
        page.0[..24].fill(0);
        let (mut lower, mut upper, mut special) = (24 + 4 * items, upper, 8192usize.wrapping_sub(special));
        if sound {
            special = special.clamp(24, 8192) & !7;
            lower = lower.min(special);
            upper = upper.clamp(lower, special);
            // Line pointers to places among the items, with lengths that may be too long.
            for item in 0..(lower - 24) / 4 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let offset = (upper + (state >> 40) as usize % (8192 - upper).max(1)) & !7;
                let word = offset as u32 & 0x7FFF
                    | ((state >> 30) as u32 % 5).min(1) << 15
                    | ((state >> 50) as u32 % 200) << 17;
                page.0[24 + 4 * item..28 + 4 * item].copy_from_slice(&word.to_le_bytes());
            }
        }
        for (at, value) in [(12, lower), (14, upper), (16, special)] {
            page.0[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
        page
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics(
        rmgr in prop_oneof![3 => 9u8..12, 3 => 12u8..18, 1 => 0u8..22],
        info in (0u8..16).prop_map(|info| info << 4),
        blocks in vec((any::<bool>(), prop_oneof![0u32..3, any::<u32>()], bytes(400)), 0..5),
        main in bytes(80),
        page in pages(),
        hint_bits_logged: bool,
    ) {
        let blocks: Vec<_> = blocks
            .into_iter()
            .zip(0..)
            .map(|((will_init, block, data), id)| Block { id, will_init, block, data })
            .collect();
        let Some(record) = record(rmgr, info, &blocks, &main) else { return Ok(()) };
        let _ = events_of(&record).count();
        for touch in blocks_of(&record) {
            let mut page = page.clone();
            let _ = apply(&record, &touch, &mut page, &Context { hint_bits_logged });
            let _ = mask::mask(rmgr, touch.tag.fork, touch.tag.block, &mut page);
        }
        let _ = mask::mask(rmgr, Fork::Main, 0, &mut page.clone());
    }
}
