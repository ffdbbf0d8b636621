//! The word of a block: its state and a version. Knows nothing about where words lie.

/// State of a block. The numbers are part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Local, and not to be evicted before it is written again: the page service may not have it. What no base backup
    /// named is in this state (rule V1), so zeroed memory says it.
    Pinned = 0,
    /// Local; the page service has it once the horizon is committed.
    Present = 1,
    /// Not local.
    Absent = 2,
    /// Asked for.
    Filling = 3,
    /// A write is going on over a block that was local.
    Writing = 4,
    /// A write is going on over a block that was not local, by PostgreSQL or by a fill.
    Overwriting = 5,
    /// Its bytes are being given back.
    Evicting = 6,
    /// Not local, and the last fill failed.
    Failed = 7,
}

impl Kind {
    /// Whether the local bytes are those of the block.
    pub fn is_readable(self) -> bool {
        matches!(self, Kind::Pinned | Kind::Present)
    }

    /// Whether nobody is at work on it and its bytes are not local.
    pub fn is_claimable(self) -> bool {
        matches!(self, Kind::Absent | Kind::Failed)
    }

    /// Whether a local system call is going on; it ends without the network.
    pub fn is_local_work(self) -> bool {
        matches!(self, Kind::Writing | Kind::Overwriting | Kind::Evicting)
    }
}

/// Bits of the state.
const KIND_BITS: u32 = 3;

/// Kind in the low 3 bits, version in the upper 29. The version rises whenever local bytes of the block stop being true
/// or another process takes charge of it, so that whoever comes late notices; it wraps after 5 x 10^8 such changes of one
/// block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(pub u32);

impl Word {
    /// A word of its parts.
    pub fn of(kind: Kind, version: u32) -> Word {
        Word(version << KIND_BITS | kind as u32)
    }

    /// The state.
    pub fn kind(self) -> Kind {
        match self.0 & 7 {
            0 => Kind::Pinned,
            1 => Kind::Present,
            2 => Kind::Absent,
            3 => Kind::Filling,
            4 => Kind::Writing,
            5 => Kind::Overwriting,
            6 => Kind::Evicting,
            _ => Kind::Failed,
        }
    }

    /// The version: 29 bits.
    pub fn version(self) -> u32 {
        self.0 >> KIND_BITS
    }

    /// Another state of the same version.
    pub fn with(self, kind: Kind) -> Word {
        Word(self.0 & !7 | kind as u32)
    }

    /// Another state of the next version.
    pub fn next(self, kind: Kind) -> Word {
        Word::of(kind, self.version().wrapping_add(1))
    }
}
