//! The block map: which blocks of which relation files are on the local disk, shared by the agent and every PostgreSQL
//! process.
//!
//! One memfd beside the shared area. Byte-exact description and the protocol in words: `docs/formats/block-map.md`; the
//! reasons: rules V1-V3 of the virtual disk. Both halves of the protocol are methods of [`BlockMap`], so that `loom` can
//! run them against each other (`tests/interleavings.rs`). Nothing here touches a file: callers read, write and punch
//! between two calls, and bring the futex ([`Signals`]).
//!
//! Where to read next: `word.rs` (states), `files.rs` (slots and chunks), `library.rs` (reads, writes, truncation),
//! `agent.rs` (fills, eviction), `ring.rs` (requests).

mod agent;
mod files;
mod layout;
mod library;
mod ring;
mod sync;
#[cfg(all(test, not(feature = "loom")))]
mod tests;
mod word;

pub use agent::{Candidate, ClockHand, EvictRun, FillRequest};
pub use files::{FileKey, FileRef, MapFull};
pub use layout::{
    BLOCK_BYTES, CHUNK_BLOCKS, EXTENT_BLOCKS, FILE_BLOCKS_MAX, HEADER_WORDS, Layout, LayoutFault, MAP_MAGIC,
    RING_ENTRIES,
};
pub use library::{Blocked, Purpose, Requested, WriteClaim, WriteOutcome};
pub use sync::{AtomicU32, AtomicU64};
pub use word::{Kind, Word};

use layout::{narrow, wide};
use sync::Ordering::{Relaxed, SeqCst};

/// Environment variable: the block map, either the decimal number of an inherited descriptor (memfd) or an absolute path.
/// Without it relation files are local files.
pub const ENV_BLOCKS: &str = "LAKEBASE_VFS_BLOCKS";
/// Environment variable: number of the inherited eventfd that wakes the agent for block requests.
pub const ENV_BLOCKS_DOORBELL: &str = "LAKEBASE_VFS_BLOCKS_DOORBELL";

/// [`BlockMap::evict_mode`]: the agent alone evicts.
pub const EVICT_BY_AGENT: u32 = 0;
/// [`BlockMap::evict_mode`]: test mode, the library evicts every clean block after each access.
pub const EVICT_ALWAYS: u32 = 1;

/// How this side waits and wakes. Words are shared between processes: never a private futex.
pub trait Signals {
    /// Sleeps until `word` is woken, unless it differs from `expected`. May return at any time.
    fn wait(&self, word: &AtomicU32, expected: u32);
    /// Wakes everybody who waits on `word`.
    fn wake_all(&self, word: &AtomicU32);
}

/// The map, as a view of memory that both sides share. Cheap to copy.
#[derive(Clone, Copy)]
pub struct BlockMap<'a> {
    layout: Layout,
    wide: &'a [AtomicU64],
    narrow: &'a [AtomicU32],
    #[cfg(feature = "loom")]
    plant: Option<Plant>,
}

/// Mistakes that the model can be asked to make: each must be found, or the model looks at nothing. Without the model they
/// are constants that the compiler drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// Eviction does not raise the version.
    EvictKeepsVersion,
    /// Truncation does not raise the version.
    TruncateKeepsVersion,
    /// A claim does not raise the version.
    ClaimKeepsVersion,
    /// A claim is a load and a store.
    ClaimWithoutSwap,
    /// The fill's write begins whatever the word says.
    FillWithoutSwap,
    /// A write leaves an outstanding fill its version.
    WriteKeepsVersion,
    /// A write may begin while a fill is being written.
    WriteIgnoresFill,
    /// Eviction looks at the horizon before its claim only.
    HorizonOnce,
    /// A write becomes visible as present before its horizon is.
    HorizonLate,
    /// Truncation does not wait for a fill that is being written.
    TruncateIgnoresFill,
    /// Eviction does not look whether the chunk still belongs to the file.
    OwnerUnchecked,
    /// No version ever rises.
    NoVersions,
}

/// What the agent shows as metrics. All but `present` only rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks read that were there.
    pub hits: u64,
    /// Blocks that a fill brought.
    pub fills: u64,
    /// Blocks that were evicted.
    pub evictions: u64,
    /// Waits of a read or write for a block.
    pub waits: u64,
    /// Blocks asked for in advance.
    pub prefetches: u64,
    /// Blocks not asked for in advance, because the ring was full.
    pub prefetches_dropped: u64,
    /// Fills that failed.
    pub failures: u64,
    /// Blocks in state Present: those that eviction can give back.
    pub present: u64,
    /// Chunks in use.
    pub chunks: u64,
}

impl<'a> BlockMap<'a> {
    /// A view of a region that the agent has initialised, or is about to ([`BlockMap::initialise`]).
    ///
    /// `wide` is the region from its start, `narrow` what follows: [`Layout::wide_words`], [`Layout::narrow_words`].
    ///
    /// # Panics
    /// A slice is shorter than the layout says: an error of the caller, who mapped the region by that layout.
    pub fn from_raw(layout: Layout, wide: &'a [AtomicU64], narrow: &'a [AtomicU32]) -> Self {
        assert!(wide.len() >= layout.wide_words() && narrow.len() >= layout.narrow_words(), "the region is too short");
        Self {
            layout,
            wide,
            narrow,
            #[cfg(feature = "loom")]
            plant: None,
        }
    }

    /// The same map, with a mistake in it.
    #[cfg(feature = "loom")]
    #[must_use]
    pub fn with_plant(mut self, plant: Option<Plant>) -> Self {
        self.plant = plant;
        self
    }

    #[cfg(feature = "loom")]
    fn planted(&self, plant: Plant) -> bool {
        use Plant::{ClaimKeepsVersion, EvictKeepsVersion, NoVersions, TruncateKeepsVersion, WriteKeepsVersion};
        let keeps = matches!(plant, EvictKeepsVersion | TruncateKeepsVersion | ClaimKeepsVersion | WriteKeepsVersion);
        self.plant == Some(plant) || keeps && self.plant == Some(NoVersions)
    }

    #[cfg(not(feature = "loom"))]
    const fn planted(&self, _: Plant) -> bool {
        false
    }

    /// Sizes of the region.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    fn narrow(&self, index: usize) -> &'a AtomicU32 {
        &self.narrow[index]
    }

    fn wide(&self, index: usize) -> &'a AtomicU64 {
        &self.wide[index]
    }

    /// Position below which WAL is durable on a quorum: what eviction may rely on.
    pub fn commit_lsn(&self) -> u64 {
        self.wide(wide::COMMIT_LSN).load(SeqCst)
    }

    /// Position of the base backup: no horizon lies below it.
    pub fn base_horizon(&self) -> u64 {
        self.wide(wide::BASE_HORIZON).load(Relaxed)
    }

    /// [`EVICT_BY_AGENT`] or [`EVICT_ALWAYS`].
    pub fn evict_mode(&self) -> u32 {
        self.narrow(narrow::EVICT_MODE).load(Relaxed)
    }

    fn count(&self, counter: usize, by: u64) {
        self.wide(counter).fetch_add(by, Relaxed);
    }

    /// Wakes those who wait on a block word, if there are any. The change of the word came before.
    fn wake_block(&self, word: &AtomicU32, signals: &impl Signals) {
        if self.narrow(narrow::WAITERS).load(SeqCst) != 0 {
            signals.wake_all(word);
        }
    }
}
