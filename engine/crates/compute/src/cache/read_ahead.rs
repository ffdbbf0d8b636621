//! Which blocks to ask for ahead of a reader that goes through a file.
//!
//! PostgreSQL leaves that to the kernel for sequential scans: it announces nothing and reads 128 KiB at a time, so each of them
//! would be a round trip. Pure; sees only blocks that were not there, so a reader shows itself once per window, at its end.

use std::ops::Range;

use vfs_abi::blocks::FileRef;

/// Readers that are followed at once. At the bound the one that has not shown itself for longest is forgotten.
const READERS_MAX: usize = 64;
/// First window of a reader, blocks: as much as it read itself.
const WINDOW_MIN: u32 = 16;
/// Longest window, blocks: 2 MiB, which makes one round trip a small part of its transfer.
const WINDOW_MAX: u32 = 256;
/// Part of the cache's limit that one window may be: what is read ahead must not drive out what is wanted.
const CACHE_PART: u64 = 32;

/// Readers that go forward through files.
pub struct ReadAhead {
    readers: Vec<Reader>,
    window_max: u32,
    clock: u64,
}

struct Reader {
    file: FileRef,
    /// The first block that was neither read nor asked for ahead.
    next: u32,
    window: u32,
    seen: u64,
}

impl ReadAhead {
    /// For a cache of so many bytes; 0 is without limit.
    pub fn new(cache_bytes: u64) -> Self {
        let part = match cache_bytes {
            0 => u64::from(WINDOW_MAX),
            bytes => bytes / vfs_abi::blocks::BLOCK_BYTES / CACHE_PART,
        };
        // Far below 2^32.
        let window_max = (part as u32).clamp(WINDOW_MIN, WINDOW_MAX);
        Self { readers: Vec::new(), window_max, clock: 0 }
    }

    /// Somebody waits for `blocks`; returns what to ask for beside them.
    pub fn note(&mut self, file: FileRef, blocks: Range<u32>) -> Option<Range<u32>> {
        self.clock += 1;
        if let Some(reader) = self.readers.iter_mut().find(|reader| reader.file == file && reader.next == blocks.start)
        {
            reader.window = (reader.window * 2).clamp(WINDOW_MIN, self.window_max);
            reader.next = blocks.end.saturating_add(reader.window);
            reader.seen = self.clock;
            return Some(blocks.end..reader.next);
        }
        let reader = Reader { file, next: blocks.end, window: 0, seen: self.clock };
        if self.readers.len() < READERS_MAX {
            self.readers.push(reader);
        } else if let Some(oldest) = self.readers.iter_mut().min_by_key(|reader| reader.seen) {
            *oldest = reader;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileRef = FileRef { slot: 3, incarnation: 1 };
    const OTHER: FileRef = FileRef { slot: 4, incarnation: 1 };

    #[test]
    fn windows_grow_while_a_reader_goes_on() {
        let mut ahead = ReadAhead::new(0);
        assert_eq!(None, ahead.note(FILE, 0..16));
        let mut next = 16;
        for window in [16, 32, 64, 128, 256, 256] {
            let asked = ahead.note(FILE, next..next + 16).expect("a window");
            assert_eq!(next + 16..next + 16 + window, asked);
            next = asked.end;
        }
    }

    #[test]
    fn reads_here_and_there_ask_for_nothing_ahead() {
        let mut ahead = ReadAhead::new(0);
        for block in [5, 900, 6000, 5, 7, 800] {
            assert_eq!(None, ahead.note(FILE, block..block + 1));
        }
        assert_eq!(None, ahead.note(OTHER, 801..802), "another file");
    }

    #[test]
    fn readers_of_two_files_do_not_disturb_each_other() {
        let mut ahead = ReadAhead::new(0);
        for at in [0, 16] {
            let expected = (at == 16).then_some(32..48);
            assert_eq!(expected, ahead.note(FILE, at..at + 16));
            assert_eq!(expected, ahead.note(OTHER, at..at + 16));
        }
    }

    #[test]
    fn windows_are_a_small_part_of_the_cache() {
        let mut ahead = ReadAhead::new(16 << 20);
        ahead.note(FILE, 0..16);
        let mut next = 16;
        for window in [16, 32, 64, 64] {
            let asked = ahead.note(FILE, next..next + 16).expect("a window");
            assert_eq!(window, asked.end - asked.start);
            next = asked.end;
        }
    }

    #[test]
    fn the_longest_silent_reader_is_forgotten() {
        let mut ahead = ReadAhead::new(0);
        for reader in 0..=READERS_MAX as u32 {
            ahead.note(FileRef { slot: reader, incarnation: 1 }, 0..16);
        }
        assert_eq!(None, ahead.note(FileRef { slot: 0, incarnation: 1 }, 16..32));
        assert!(ahead.note(FileRef { slot: 2, incarnation: 1 }, 16..32).is_some());
    }
}
