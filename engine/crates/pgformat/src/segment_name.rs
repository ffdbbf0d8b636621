//! Names of WAL segment files: timeline and number in 24 hexadecimal digits (`XLogFileName`).

use alloc::{format, string::String};

use pgtypes::PgTimeline;

/// Segments per 4 GiB: the number is written as two words, the lower of which counts up to here.
const fn segments_per_high(segment_bytes: u64) -> u64 {
    (1 << 32) / segment_bytes
}

/// Name of segment `number` (its start divided by `segment_bytes`, a valid segment size).
pub fn segment_file_name(timeline: PgTimeline, number: u64, segment_bytes: u64) -> String {
    let per_high = segments_per_high(segment_bytes);
    format!("{:08X}{:08X}{:08X}", timeline.0, number / per_high, number % per_high)
}

/// Timeline and number of a segment, or `None` when `name` is no segment's name with segments of this size.
pub fn parse_segment_file_name(name: &str, segment_bytes: u64) -> Option<(PgTimeline, u64)> {
    let plain = |digit: u8| digit.is_ascii_digit() || (b'A'..=b'F').contains(&digit);
    if name.len() != 24 || !name.bytes().all(plain) {
        return None;
    }
    let word = |at: usize| u32::from_str_radix(&name[at..at + 8], 16).ok();
    let (timeline, high, low) = (word(0)?, u64::from(word(8)?), u64::from(word(16)?));
    let per_high = segments_per_high(segment_bytes);
    (low < per_high).then_some((PgTimeline(timeline), high * per_high + low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (timeline, number, segment_bytes, name) in [
            (1, 1, 16 << 20, "000000010000000000000001"),
            (0xAB, 256, 16 << 20, "000000AB0000000100000000"),
            (2, 5, 1 << 30, "000000020000000100000001"),
            (2, 4095, 1 << 20, "000000020000000000000FFF"),
        ] {
            assert_eq!(name, segment_file_name(PgTimeline(timeline), number, segment_bytes));
            assert_eq!(Some((PgTimeline(timeline), number)), parse_segment_file_name(name, segment_bytes));
        }
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "",
            "00000001000000000000000",
            "0000000100000000000000011",
            "00000001000000000000000g",
            "00000001000000000000000a",
            "000000010000000000000100",
            "00000001.history",
            "00000001000000000000000\u{e4}",
        ] {
            assert_eq!(None, parse_segment_file_name(name, 16 << 20), "{name}");
        }
    }
}
