//! What each descriptor of this process stands for. A child inherits a copy with `fork`, as it inherits the descriptors.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use vfs_abi::blocks::FileRef;

/// Descriptors at and above this are not tracked: opening a WAL segment or a relation there fails (`EMFILE`), all else is
/// treated as [`Entry::Unknown`]. PostgreSQL uses at most `max_files_per_process` (1,000 by default) and a few.
pub const CAPACITY: usize = 65_536;

/// What a descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not opened by an intercepted call, or outside PGDATA.
    Unknown,
    /// A file or directory in PGDATA that is neither a WAL segment nor tracked by the block map.
    Local,
    /// A socket that this process connected: its peer is a server, not a client.
    Outbound,
    /// The doorbell or the agent's pipe: PostgreSQL may not close it.
    Own,
    /// A WAL segment.
    Wal(WalFile),
    /// A relation file that the block map tracks.
    Relation(FileRef),
}

/// An open WAL segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalFile {
    /// PostgreSQL timeline in the file's name.
    pub timeline: u32,
    /// First log position of the segment; a multiple of the segment size, at least 1 MiB.
    pub start_lsn: u64,
    /// Opened with `O_SYNC` or `O_DSYNC` (`wal_sync_method = open_datasync`): each write is a flush.
    pub synchronous: bool,
}

// The low 20 bits of a segment's start are zero, since segments are at least 1 MiB: the tag lives there. The slot of a
// relation is shifted by as much.
const TAG_BITS: u64 = (1 << 20) - 1;
const TAG_LOCAL: u64 = 1;
const TAG_OUTBOUND: u64 = 2;
const TAG_OWN: u64 = 3;
const TAG_WAL: u64 = 4;
const TAG_WAL_SYNCHRONOUS: u64 = 5;
const TAG_RELATION: u64 = 6;

// 768 KiB of zero pages, of which a process touches those of the descriptors that it uses.
static STATE: [AtomicU64; CAPACITY] = [const { AtomicU64::new(0) }; CAPACITY];
/// Timeline of a WAL segment, incarnation of a relation.
static DETAIL: [AtomicU32; CAPACITY] = [const { AtomicU32::new(0) }; CAPACITY];

fn slot(fd: i32) -> Option<usize> {
    usize::try_from(fd).ok().filter(|slot| *slot < CAPACITY)
}

/// Whether `fd` can be tracked.
pub fn can_track(fd: i32) -> bool {
    slot(fd).is_some()
}

/// What `fd` stands for.
pub fn get(fd: i32) -> Entry {
    let Some(slot) = slot(fd) else { return Entry::Unknown };
    let state = STATE[slot].load(Relaxed);
    let wal = |synchronous| {
        Entry::Wal(WalFile { timeline: DETAIL[slot].load(Relaxed), start_lsn: state & !TAG_BITS, synchronous })
    };
    match state & TAG_BITS {
        TAG_LOCAL => Entry::Local,
        TAG_OUTBOUND => Entry::Outbound,
        TAG_OWN => Entry::Own,
        TAG_WAL => wal(false),
        TAG_WAL_SYNCHRONOUS => wal(true),
        TAG_RELATION => Entry::Relation(FileRef {
            slot: (state >> TAG_BITS.count_ones()) as u32,
            incarnation: DETAIL[slot].load(Relaxed),
        }),
        _ => Entry::Unknown,
    }
}

/// The relation file that `fd` stands for: the question of every read.
#[inline]
pub fn relation(fd: i32) -> Option<FileRef> {
    match get(fd) {
        Entry::Relation(file) => Some(file),
        _ => None,
    }
}

/// Records what `fd` stands for from now on.
pub fn set(fd: i32, entry: Entry) {
    let Some(slot) = slot(fd) else { return };
    let state = match entry {
        Entry::Unknown => 0,
        Entry::Local => TAG_LOCAL,
        Entry::Outbound => TAG_OUTBOUND,
        Entry::Own => TAG_OWN,
        Entry::Relation(file) => {
            DETAIL[slot].store(file.incarnation, Relaxed);
            u64::from(file.slot) << TAG_BITS.count_ones() | TAG_RELATION
        }
        Entry::Wal(file) => {
            DETAIL[slot].store(file.timeline, Relaxed);
            file.start_lsn | if file.synchronous { TAG_WAL_SYNCHRONOUS } else { TAG_WAL }
        }
    };
    STATE[slot].store(state, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_round_trip() {
        let wal = |synchronous| Entry::Wal(WalFile { timeline: 7, start_lsn: 0x12_3450_0000, synchronous });
        let relation = Entry::Relation(FileRef { slot: (1 << 22) - 1, incarnation: u32::MAX });
        for entry in [relation, wal(false), wal(true), Entry::Local, Entry::Outbound, Entry::Own, Entry::Unknown] {
            set(4000, entry);
            assert_eq!(entry, get(4000));
        }
    }

    #[test]
    fn numbers_out_of_range_are_unknown() {
        for fd in [-1, 65_536, i32::MAX] {
            set(fd, Entry::Local);
            assert_eq!(Entry::Unknown, get(fd));
            assert!(!can_track(fd));
        }
        assert!(can_track(65_535));
    }
}
