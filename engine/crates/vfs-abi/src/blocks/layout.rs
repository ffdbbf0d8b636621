//! Where everything in the region lies. All sizes follow from two numbers, which are in its header.

use super::sync::{AtomicU64, Ordering::Acquire};

/// First word of the region: `LBBLK` and the layout's version.
pub const MAP_MAGIC: u64 = u64::from_le_bytes(*b"LBBLK\0\0\x01");

/// Bytes of a block: `BLCKSZ` of every packaged PostgreSQL.
pub const BLOCK_BYTES: u64 = 8192;

/// Blocks of a chunk: 16 MiB of a file. The model has small ones, since it visits every word.
pub const CHUNK_BLOCKS: u32 = if cfg!(feature = "loom") { 2 } else { 2048 };
/// Blocks that share a horizon: 128 KiB.
pub const EXTENT_BLOCKS: u32 = if cfg!(feature = "loom") { 2 } else { 16 };
/// Chunks of a file; together 1 GiB, PostgreSQL's segment of a relation (`RELSEG_SIZE`).
pub const FILE_CHUNKS: u32 = if cfg!(feature = "loom") { 1 } else { 64 };
/// Blocks of a file at most.
pub const FILE_BLOCKS_MAX: u32 = FILE_CHUNKS * CHUNK_BLOCKS;
/// Requests that may be under way to the agent; a power of two. At the bound reads wait and prefetches are dropped.
pub const RING_ENTRIES: u32 = if cfg!(feature = "loom") { 4 } else { 4096 };
/// Counters of hits, each on a line of its own, since every read of every process adds to one.
pub const HIT_LANES: usize = if cfg!(feature = "loom") { 2 } else { 16 };

/// Extents of a chunk.
pub const CHUNK_EXTENTS: u32 = CHUNK_BLOCKS / EXTENT_BLOCKS;

/// Files at most: beyond it a table of slots would need more than 1.3 GB.
const FILES_LIMIT: u32 = 1 << 22;
/// Chunks at most: 64 TiB of blocks that were touched.
const CHUNKS_LIMIT: u32 = 1 << 22;

/// Words of 64 bits in the header.
pub mod wide {
    pub const MAGIC: usize = 0;
    pub const FILES_MAX: usize = 1;
    pub const CHUNKS_MAX: usize = 2;
    pub const BASE_HORIZON: usize = 3;
    pub const COMMIT_LSN: usize = 4;
    pub const FILLS: usize = 8;
    pub const EVICTIONS: usize = 9;
    pub const WAITS: usize = 10;
    pub const PREFETCHES: usize = 11;
    pub const PREFETCHES_DROPPED: usize = 12;
    pub const FAILURES: usize = 13;
    pub const PRESENT: usize = 14;
    /// Lanes of 8 words.
    pub const HITS: usize = 16;
    pub const HEADER: usize = HITS + 8 * super::HIT_LANES;
}

/// Words of 32 bits in the header; each group on a line of its own.
pub mod narrow {
    pub const LOCK: usize = 0;
    pub const FILES_HIGH: usize = 1;
    pub const FILES_FREE: usize = 2;
    pub const CHUNKS_HIGH: usize = 3;
    pub const CHUNKS_FREE: usize = 4;
    pub const CHUNKS_USED: usize = 5;
    pub const WAITERS: usize = 16;
    pub const EVICT_MODE: usize = 32;
    pub const RING_TAIL: usize = 48;
    pub const RING_HEAD: usize = 64;
    pub const RING_WAITERS: usize = 65;
    pub const AGENT_SLEEPS: usize = 66;
    pub const HEADER: usize = 80;
}

/// Words of an entry of the request ring.
pub mod ring {
    pub const TURN: usize = 0;
    pub const SLOT: usize = 1;
    pub const INCARNATION: usize = 2;
    pub const CHUNK: usize = 3;
    pub const BLOCK: usize = 4;
    pub const VERSION: usize = 5;
    pub const PREFETCH: usize = 6;
    pub const WORDS: usize = 8;
}

/// Words of a file slot.
pub mod slot {
    pub const TABLESPACE: usize = 0;
    pub const DATABASE: usize = 1;
    pub const RELATION: usize = 2;
    pub const FORK: usize = 3;
    pub const SEGMENT: usize = 4;
    /// Next slot of the bucket or of the free list, plus 1.
    pub const NEXT: usize = 5;
    /// Odd while the slot is in use; rises with each use and each end of one.
    pub const INCARNATION: usize = 6;
    pub const ABSENT_BELOW: usize = 7;
    pub const PINNED: usize = 8;
    pub const WORDS: usize = 16;
}

/// Words of a chunk's head.
pub mod chunk {
    pub const SLOT: usize = 0;
    /// Incarnation of the file that owns it; 0 while free.
    pub const INCARNATION: usize = 1;
    /// Number of the chunk within its file.
    pub const ORDINAL: usize = 2;
    /// Next of the free list, plus 1.
    pub const NEXT: usize = 3;
    /// Bits of extents that were read since the clock came by.
    pub const REFERENCED: usize = 4;
    pub const WORDS: usize = 8;
}

const _: () = assert!(CHUNK_EXTENTS.div_ceil(32) as usize + chunk::REFERENCED <= chunk::WORDS);
const _: () = assert!(RING_ENTRIES.is_power_of_two());

/// Sizes of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    files_max: u32,
    chunks_max: u32,
}

/// Why a region is none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutFault {
    /// Another version, or something else.
    #[error(
        "the block map has the magic number {0:#018x} instead of {MAP_MAGIC:#018x}: the compute agent is of another version"
    )]
    Magic(u64),
    /// Impossible sizes.
    #[error("the block map names impossible sizes: {files} files, {chunks} chunks")]
    Sizes {
        /// Files that the header names.
        files: u64,
        /// Chunks that the header names.
        chunks: u64,
    },
}

/// Words at the start of the region that [`Layout::read`] needs.
pub const HEADER_WORDS: usize = 3;

impl Layout {
    /// A region for so many files and chunks (16 MiB of blocks each); only touched pages of it take memory.
    ///
    /// # Errors
    /// A number is 0 or above 2^22.
    pub fn new(files_max: u32, chunks_max: u32) -> Result<Layout, LayoutFault> {
        if (1..=FILES_LIMIT).contains(&files_max) && (1..=CHUNKS_LIMIT).contains(&chunks_max) {
            Ok(Layout { files_max, chunks_max })
        } else {
            Err(LayoutFault::Sizes { files: files_max.into(), chunks: chunks_max.into() })
        }
    }

    /// The sizes that a region names in its first [`HEADER_WORDS`] words.
    ///
    /// # Errors
    /// No region of this version.
    ///
    /// # Panics
    /// `header` is shorter.
    pub fn read(header: &[AtomicU64]) -> Result<Layout, LayoutFault> {
        let magic = header[wide::MAGIC].load(Acquire);
        if magic != MAP_MAGIC {
            return Err(LayoutFault::Magic(magic));
        }
        let (files, chunks) = (header[wide::FILES_MAX].load(Acquire), header[wide::CHUNKS_MAX].load(Acquire));
        match (u32::try_from(files), u32::try_from(chunks)) {
            (Ok(files), Ok(chunks)) => Layout::new(files, chunks),
            _ => Err(LayoutFault::Sizes { files, chunks }),
        }
    }

    /// Files at most.
    pub fn files_max(self) -> u32 {
        self.files_max
    }

    /// Chunks at most.
    pub fn chunks_max(self) -> u32 {
        self.chunks_max
    }

    /// Words of 64 bits, from the start of the region.
    pub fn wide_words(self) -> usize {
        wide::HEADER + self.chunks_max as usize * CHUNK_EXTENTS as usize
    }

    /// Words of 32 bits, after them.
    pub fn narrow_words(self) -> usize {
        self.blocks() + self.chunks_max as usize * CHUNK_BLOCKS as usize
    }

    /// Bytes of the region.
    pub fn region_bytes(self) -> u64 {
        self.wide_words() as u64 * 8 + self.narrow_words() as u64 * 4
    }

    /// First horizon.
    pub(super) fn horizons(self) -> usize {
        wide::HEADER
    }

    /// First entry of the ring.
    pub(super) fn ring(self) -> usize {
        narrow::HEADER
    }

    /// First bucket of the hash table.
    pub(super) fn buckets(self) -> usize {
        self.ring() + RING_ENTRIES as usize * ring::WORDS
    }

    /// Buckets; a power of two.
    pub(super) fn bucket_count(self) -> usize {
        self.files_max.next_power_of_two() as usize
    }

    /// First file slot.
    pub(super) fn slots(self) -> usize {
        self.buckets() + self.bucket_count()
    }

    /// First chunk number of the first file.
    pub(super) fn directories(self) -> usize {
        self.slots() + self.files_max as usize * slot::WORDS
    }

    /// First chunk head.
    pub(super) fn chunk_heads(self) -> usize {
        self.directories() + self.files_max as usize * FILE_CHUNKS as usize
    }

    /// First block word.
    pub(super) fn blocks(self) -> usize {
        self.chunk_heads() + self.chunks_max as usize * chunk::WORDS
    }
}
