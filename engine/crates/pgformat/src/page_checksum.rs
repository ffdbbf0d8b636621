//! The checksum of a page of a relation.
//!
//! Source: the description in `storage/checksum_impl.h`. 32 sums run over the page side by side, word `i` of each 32 going
//! to sum `i`; a round is FNV-1a's with the high bits folded back in, and two more rounds of zeros mix the last words. The
//! sums are combined with exclusive or, then the block number, and the result is brought into 1 … 65,535.

/// Bytes of a page (`BLCKSZ`).
pub const PAGE_BYTES: usize = 8192;

const SUMS: usize = 32;
/// Of FNV-1a.
const PRIME: u32 = 16_777_619;
/// Place of `pd_checksum`.
const CHECKSUM: usize = 8;
/// Place of `pd_upper`.
const UPPER: usize = 14;
/// Where the sums begin: chosen at random by PostgreSQL's developers, never to change.
const OFFSETS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// One round of all sums: 32 independent lanes, which the compiler turns into vectors.
#[inline(always)]
fn round(sums: &mut [u32; SUMS], words: &[u32; SUMS]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ word;
        *sum = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

/// The checksum that the page has as block `block` of its relation's fork (`pg_checksum_page`), whatever stands in its
/// checksum field.
///
/// A page that is new (all zeros) has none: [`is_new_page`].
pub fn page_checksum(page: &[u8; PAGE_BYTES], block: u32) -> u16 {
    let mut sums = OFFSETS;
    let (rows, _) = page.as_chunks::<{ 4 * SUMS }>();
    let words = |row: &[u8; 4 * SUMS]| {
        let mut words = [0; SUMS];
        for (word, bytes) in words.iter_mut().zip(row.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    };
    if let [first, rest @ ..] = rows {
        let mut words_of_first = words(first);
        // The checksum itself counts as zero.
        words_of_first[CHECKSUM / 4] &= 0xFFFF_0000;
        round(&mut sums, &words_of_first);
        for row in rest {
            round(&mut sums, &words(row));
        }
    }
    round(&mut sums, &[0; SUMS]);
    round(&mut sums, &[0; SUMS]);
    let sum = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    (sum % 65_535 + 1) as u16
}

/// Whether the page was never written (`PageIsNew`): it carries no checksum, and none is checked.
pub fn is_new_page(page: &[u8; PAGE_BYTES]) -> bool {
    page[UPPER] == 0 && page[UPPER + 1] == 0
}

/// Sets the checksum that the page has as block `block`; a new page stays as it is (`PageSetChecksumInplace`).
pub fn set_page_checksum(page: &mut [u8; PAGE_BYTES], block: u32) {
    if !is_new_page(page) {
        let checksum = page_checksum(page, block);
        page[CHECKSUM..CHECKSUM + 2].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// Whether the page is sound as block `block`: its checksum is right, or it is new and all zeros (`PageIsVerifiedExtended`).
pub fn is_page_sound(page: &[u8; PAGE_BYTES], block: u32) -> bool {
    if is_new_page(page) {
        return page.iter().all(|byte| *byte == 0);
    }
    page_checksum(page, block) == u16::from_le_bytes([page[CHECKSUM], page[CHECKSUM + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at * 31 + (at >> 8)) as u8;
        }
        page
    }

    #[test]
    fn every_bit_counts_but_those_of_the_checksum() {
        let mut page = page();
        let sum = page_checksum(&page, 7);
        for at in 0..PAGE_BYTES {
            for bit in 0..8 {
                page[at] ^= 1 << bit;
                let differs = page_checksum(&page, 7) != sum;
                assert_eq!(!(CHECKSUM..CHECKSUM + 2).contains(&at), differs, "byte {at} bit {bit}");
                page[at] ^= 1 << bit;
            }
        }
        assert_ne!(sum, page_checksum(&page, 8), "a page in another's place");
    }

    #[test]
    fn a_page_with_its_checksum_is_sound_and_a_new_one_has_none() {
        let mut page = page();
        set_page_checksum(&mut page, 7);
        assert!(is_page_sound(&page, 7) && !is_page_sound(&page, 6));
        let mut new = [0; PAGE_BYTES];
        set_page_checksum(&mut new, 7);
        assert!(new == [0; PAGE_BYTES] && is_page_sound(&new, 7));
        new[100] = 1;
        assert!(!is_page_sound(&new, 7), "a page without places, but with contents");
    }
}
