//! The shared-memory area between the compute agent and `liblakebase_vfs.so` in every PostgreSQL process.
//!
//! One memfd or file of [`AREA_BYTES`], mapped by both sides. All words are atomics; waiting is by (shared) futex on
//! 32-bit words. Byte-exact description: `docs/formats/vfs-area.md`. Both halves of each hand-over are methods here, so
//! that the order of their stores is written once. Knows nothing about WAL records: the agent alone decides which byte
//! position is settled.
#![no_std]
#![forbid(unsafe_code)]

pub mod blocks;

use core::sync::atomic::{
    AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, Ordering::SeqCst,
};

/// First word of the area: `LBVFS` and the layout's version. A library that finds another number refuses to start.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LBVFS\0\0\x01");

/// Size of the mapping, bytes.
pub const AREA_BYTES: usize = 4096;

/// Environment variable: the area, either the decimal number of an inherited descriptor (memfd) or an absolute path.
pub const ENV_AREA: &str = "LAKEBASE_VFS_AREA";
/// Environment variable: absolute path of PGDATA.
pub const ENV_PGDATA: &str = "LAKEBASE_VFS_PGDATA";
/// Environment variable: `cluster/term/attempt/nonce`, must equal the file [`TRUST_FILE`] in PGDATA (rule V7).
pub const ENV_TRUST: &str = "LAKEBASE_VFS_TRUST";
/// Environment variable: number of the inherited eventfd that wakes the agent.
pub const ENV_DOORBELL: &str = "LAKEBASE_VFS_DOORBELL";
/// Environment variable: number of the inherited read end of a pipe. Only the agent holds the write end (close-on-exec,
/// nothing is ever written): end of file means that the agent is gone. A process id could not say so: it may be
/// invisible in PostgreSQL's PID namespace, or belong to another process by now.
pub const ENV_AGENT_FD: &str = "LAKEBASE_VFS_AGENT_FD";
/// File in PGDATA that says for whom its contents are true; one line, a trailing newline is allowed.
pub const TRUST_FILE: &str = "lakebase.trust";
/// File name of the library: its entry is taken out of `LD_PRELOAD` before PostgreSQL can start other programs.
pub const LIBRARY_FILE: &str = "liblakebase_vfs.so";

/// [`Area::role`]: WAL flushes wait for nobody (the WAL came from the safekeepers).
pub const ROLE_REPLICA: u32 = 1;
/// [`Area::role`]: WAL flushes wait for the quorum, sends check the lease.
pub const ROLE_WRITER: u32 = 2;

/// Exit status of a PostgreSQL process that was refused at its start (`EX_CONFIG`): the reason is one line on stderr.
pub const EXIT_REFUSED: i32 = 78;
/// Exit status of a PostgreSQL process that found its writer fenced or its agent gone. Anything but 0 and 1 is a crash
/// to the postmaster, which then ends every other process (`HandleChildCrash`, postmaster.c).
pub const EXIT_FENCED: i32 = 2;

/// Longest delay of one WAL flush for backpressure, microseconds: a flush holds `WALWriteLock` and also stops readers
/// that evict dirty buffers (`FlushBuffer`, bufmgr.c), so it is slowed and never stopped.
pub const FLUSH_DELAY_US_MAX: u32 = 10_000;

/// Size of a WAL page: `XLOG_BLCKSZ` of every packaged PostgreSQL. The agent compares it with `pg_control`.
pub const WAL_PAGE_BYTES: u64 = 8192;

/// The area. `repr(C)`: the layout is part of the format. One 64-byte cache line per group of words that one side
/// writes, so that sends, which read the lease, do not wait for the line that every WAL write changes.
#[repr(C)]
pub struct Area {
    /// [`MAGIC`]; stored last by the agent.
    pub magic: AtomicU64,
    /// WAL segment size, bytes.
    pub segment_bytes: AtomicU64,
    /// Process id of the agent, for log lines only.
    pub agent_pid: AtomicU32,
    /// [`ROLE_REPLICA`] or [`ROLE_WRITER`]; set by the agent.
    pub role: AtomicU32,
    /// 0, or 1 once the agent decided that this writer is fenced: waits never return, backends exit.
    pub fenced: AtomicU32,
    /// Milliseconds that a send may wait for the lease before its client is given up.
    pub lease_wait_timeout_ms: AtomicU32,
    reserved_agent: [u64; 4],
    /// End of WAL bytes written by PostgreSQL (`pwrite` of a WAL segment): rises only. Set by the library.
    pub written_lsn: AtomicU64,
    /// Bytes below this (and below `written_lsn`) are final: all but the last page of the last `pwrite`. Rises only.
    pub final_lsn: AtomicU64,
    /// PostgreSQL timeline of the file that was written last.
    pub written_timeline: AtomicU32,
    /// 1 while the agent sleeps and wants the doorbell rung; the ringer swaps it to 0 first.
    pub agent_sleeps: AtomicU32,
    /// Number of WAL writes so far, raised after the words above. Flushes wait for *writes*, not for positions: XLogWrite
    /// writes the same last page again and again with more records in it, and its end position stays the same.
    pub write_sequence: AtomicU64,
    reserved_written: [u64; 4],
    /// Every complete record in the bytes of the first so many writes is durable on a quorum. Rises only. Set by the agent.
    pub settled_sequence: AtomicU64,
    /// Changes whenever `settled_sequence`, `fenced` or `role` changes: the futex of WAL flushes.
    pub settled_futex: AtomicU32,
    /// Number of processes waiting on `settled_futex`; the agent skips the wake at 0. A process that is killed while it
    /// waits stays counted: that costs wakes without a sleeper, never a missed one.
    pub settled_waiters: AtomicU32,
    /// Backpressure: microseconds that a WAL flush is to be delayed (the library sleeps at most [`FLUSH_DELAY_US_MAX`] of
    /// them). Set by the agent, in proportion to how far page servers lag; 0 is none.
    pub flush_delay_us: AtomicU32,
    reserved_delay: u32,
    reserved_settled: [u64; 5],
    /// The read lease ends here: nanoseconds of `CLOCK_BOOTTIME`; 0 = none yet. Set by the agent.
    pub lease_until_ns: AtomicU64,
    /// Changes whenever the lease is renewed while somebody waits, or `fenced` or `role` changes: the futex of sends.
    pub lease_futex: AtomicU32,
    /// Number of processes waiting on `lease_futex`, counted as `settled_waiters`.
    pub lease_waiters: AtomicU32,
    reserved_lease: [u64; 6],
    /// For the agent's metrics: WAL flushes in the role of writer.
    pub wal_flushes: AtomicU64,
    /// For the agent's metrics: sends that found the lease expired.
    pub lease_waits: AtomicU64,
}

const _: () = assert!(core::mem::size_of::<Area>() <= AREA_BYTES);

/// WAL that PostgreSQL has written, as the agent sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Number of writes that the positions below cover (at least): settle this number once their records are committed.
    pub sequence: u64,
    /// End of the bytes written.
    pub written_lsn: u64,
    /// Bytes below this are final; never above `written_lsn`.
    pub final_lsn: u64,
    /// Timeline of the file that was written last. It may be newer than `written_lsn` by one write, so bytes of an older
    /// segment are found under this timeline's name or, where that file does not exist, under its parent's.
    pub timeline: u32,
}

/// What the library does when a WAL write has returned, and before it waits.
impl Area {
    /// Publishes that the bytes of `timeline` up to `end_lsn` (exclusive, above 0) are in the page cache.
    ///
    /// Returns whether the caller must ring the doorbell. `final_lsn` becomes the start of the last page of this write:
    /// `XLogWrite` (xlog.c) waits for the insertions below its target, so only that page can hold half-copied records.
    pub fn publish_write(&self, timeline: u32, end_lsn: u64) -> bool {
        self.written_timeline.store(timeline, Release);
        self.final_lsn.fetch_max((end_lsn - 1) & !(WAL_PAGE_BYTES - 1), Release);
        self.written_lsn.fetch_max(end_lsn, Release);
        self.write_sequence.fetch_add(1, SeqCst);
        // Sequentially consistent against `prepare_sleep`: either this load sees the agent asleep, or the agent's
        // second look sees `write_sequence`.
        self.agent_sleeps.load(SeqCst) == 1 && self.agent_sleeps.swap(0, SeqCst) == 1
    }

    /// What a WAL flush that begins now must wait for: every write that has returned so far.
    pub fn flush_target(&self) -> u64 {
        self.write_sequence.load(SeqCst)
    }

    /// Whether every complete record in the first `target` writes is durable on a quorum.
    pub fn is_settled(&self, target: u64) -> bool {
        self.settled_sequence.load(SeqCst) >= target
    }

    /// Whether the agent has declared this writer fenced.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Acquire) != 0
    }

    /// Whether WAL flushes wait for the quorum and sends for the lease.
    pub fn is_writer(&self) -> bool {
        self.role.load(Acquire) == ROLE_WRITER
    }
}

/// What the agent does. Where a `bool` is returned, true asks the caller to wake all waiters of the futex named.
impl Area {
    /// Fills a zeroed area; the magic number comes last.
    pub fn initialise(&self, segment_bytes: u64, agent_pid: u32, role: u32, lease_wait_timeout_ms: u32) {
        self.segment_bytes.store(segment_bytes, Relaxed);
        self.agent_pid.store(agent_pid, Relaxed);
        self.role.store(role, Relaxed);
        self.lease_wait_timeout_ms.store(lease_wait_timeout_ms, Relaxed);
        self.magic.store(MAGIC, Release);
    }

    /// The WAL written so far.
    pub fn written(&self) -> Written {
        // First: what is read after it, the pages included, is at least as young as this number says.
        let sequence = self.write_sequence.load(SeqCst);
        let written_lsn = self.written_lsn.load(Acquire);
        let final_lsn = self.final_lsn.load(Acquire).min(written_lsn);
        Written { sequence, written_lsn, final_lsn, timeline: self.written_timeline.load(Acquire) }
    }

    /// Announces that the agent, which has processed the first `seen_sequence` writes, goes to sleep on the doorbell.
    ///
    /// Returns false when more was written meanwhile: the agent must not sleep then.
    pub fn prepare_sleep(&self, seen_sequence: u64) -> bool {
        self.agent_sleeps.store(1, SeqCst);
        if self.write_sequence.load(SeqCst) <= seen_sequence {
            return true;
        }
        self.agent_sleeps.store(0, SeqCst);
        false
    }

    /// Raises `settled_sequence`. True: wake `settled_futex`.
    #[must_use]
    pub fn settle(&self, sequence: u64) -> bool {
        if self.settled_sequence.fetch_max(sequence, SeqCst) >= sequence {
            return false;
        }
        self.settled_futex.fetch_add(1, SeqCst);
        self.settled_waiters.load(SeqCst) != 0
    }

    /// Raises the end of the read lease to `until_ns` (`CLOCK_BOOTTIME`). True: wake `lease_futex`.
    #[must_use]
    pub fn renew_lease(&self, until_ns: u64) -> bool {
        self.lease_until_ns.fetch_max(until_ns, SeqCst);
        if self.lease_waiters.load(SeqCst) == 0 {
            return false;
        }
        self.lease_futex.fetch_add(1, SeqCst);
        true
    }

    /// Changes the role. The caller wakes `settled_futex` and `lease_futex`.
    pub fn set_role(&self, role: u32) {
        self.role.store(role, SeqCst);
        self.settled_futex.fetch_add(1, SeqCst);
        self.lease_futex.fetch_add(1, SeqCst);
    }

    /// Declares this writer fenced, for good. The caller wakes `settled_futex` and `lease_futex`, then kills PostgreSQL.
    pub fn fence(&self) {
        self.fenced.store(1, SeqCst);
        self.settled_futex.fetch_add(1, SeqCst);
        self.lease_futex.fetch_add(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    fn area() -> Area {
        Area {
            magic: AtomicU64::new(0),
            segment_bytes: AtomicU64::new(0),
            agent_pid: AtomicU32::new(0),
            role: AtomicU32::new(0),
            fenced: AtomicU32::new(0),
            lease_wait_timeout_ms: AtomicU32::new(0),
            reserved_agent: [0; 4],
            written_lsn: AtomicU64::new(0),
            final_lsn: AtomicU64::new(0),
            written_timeline: AtomicU32::new(0),
            agent_sleeps: AtomicU32::new(0),
            write_sequence: AtomicU64::new(0),
            reserved_written: [0; 4],
            settled_sequence: AtomicU64::new(0),
            settled_futex: AtomicU32::new(0),
            settled_waiters: AtomicU32::new(0),
            flush_delay_us: AtomicU32::new(0),
            reserved_delay: 0,
            reserved_settled: [0; 5],
            lease_until_ns: AtomicU64::new(0),
            lease_futex: AtomicU32::new(0),
            lease_waiters: AtomicU32::new(0),
            reserved_lease: [0; 6],
            wal_flushes: AtomicU64::new(0),
            lease_waits: AtomicU64::new(0),
        }
    }

    /// The offsets are the format: `docs/formats/vfs-area.md` lists the same numbers.
    #[test]
    fn offsets_are_those_of_the_format() {
        let offsets = [
            (0, offset_of!(Area, magic)),
            (8, offset_of!(Area, segment_bytes)),
            (16, offset_of!(Area, agent_pid)),
            (20, offset_of!(Area, role)),
            (24, offset_of!(Area, fenced)),
            (28, offset_of!(Area, lease_wait_timeout_ms)),
            (64, offset_of!(Area, written_lsn)),
            (72, offset_of!(Area, final_lsn)),
            (80, offset_of!(Area, written_timeline)),
            (84, offset_of!(Area, agent_sleeps)),
            (88, offset_of!(Area, write_sequence)),
            (128, offset_of!(Area, settled_sequence)),
            (136, offset_of!(Area, settled_futex)),
            (140, offset_of!(Area, settled_waiters)),
            (144, offset_of!(Area, flush_delay_us)),
            (192, offset_of!(Area, lease_until_ns)),
            (200, offset_of!(Area, lease_futex)),
            (204, offset_of!(Area, lease_waiters)),
            (256, offset_of!(Area, wal_flushes)),
            (264, offset_of!(Area, lease_waits)),
            (272, size_of::<Area>()),
        ];
        for (expected, actual) in offsets {
            assert_eq!(expected, actual);
        }
    }

    /// The page that a write ends in may hold half-copied records, also when the write ends exactly at its end.
    #[test]
    fn last_page_of_a_write_is_not_final() {
        for (end_lsn, final_lsn) in
            [(1, 0), (8191, 0), (8192, 0), (8193, 8192), (16384, 8192), (0x100_2000, 0x100_0000)]
        {
            let area = area();
            area.publish_write(1, end_lsn);
            let expected = Written { sequence: 1, written_lsn: end_lsn, final_lsn, timeline: 1 };
            assert_eq!(expected, area.written(), "{end_lsn}");
        }
    }

    /// XLogWrite writes the same last page again and again; a shorter write must not take anything back.
    #[test]
    fn positions_only_rise() {
        let area = area();
        area.publish_write(1, 32768);
        area.publish_write(2, 16384);
        assert_eq!(Written { sequence: 2, written_lsn: 32768, final_lsn: 24576, timeline: 2 }, area.written());
        assert!(!area.settle(0));
        area.settled_waiters.store(1, SeqCst);
        assert!(area.settle(100));
        assert!(!area.settle(50));
        assert_eq!(100, area.settled_sequence.load(SeqCst));
    }

    /// XLogWrite writes the last page again with one more record in it: the flush of that record must not find itself
    /// settled because the page's end was settled before, and the agent must be woken for it.
    #[test]
    fn rewriting_the_same_page_is_a_new_write() {
        let area = area();
        area.publish_write(1, 8192);
        let seen = area.written().sequence;
        assert!(!area.settle(seen));
        assert!(area.is_settled(area.flush_target()));
        assert!(area.prepare_sleep(seen));
        assert!(area.publish_write(1, 8192), "the doorbell rings");
        assert!(!area.is_settled(area.flush_target()));
        assert!(!area.prepare_sleep(seen));
    }

    /// `final_lsn` is raised before `written_lsn`: an agent that looks in between must not take it for written.
    #[test]
    fn final_never_exceeds_written() {
        let area = area();
        area.written_lsn.store(8192, SeqCst);
        area.final_lsn.store(65536, SeqCst);
        assert_eq!(8192, area.written().final_lsn);
    }

    /// One doorbell per sleep: further writes find the agent already called.
    #[test]
    fn doorbell_rings_once_per_sleep() {
        let area = area();
        assert!(!area.publish_write(1, 8192), "the agent is awake");
        assert!(!area.prepare_sleep(0), "the first write is unseen");
        assert!(area.prepare_sleep(1));
        assert!(area.publish_write(1, 16384));
        assert!(!area.publish_write(1, 24576));
    }

    /// Renewals that nobody waits for cost no system call.
    #[test]
    fn lease_renewal_wakes_only_waiters() {
        let area = area();
        assert!(!area.renew_lease(5));
        area.lease_waiters.store(1, SeqCst);
        assert!(area.renew_lease(6));
        assert!(area.renew_lease(4));
        assert_eq!(6, area.lease_until_ns.load(SeqCst));
    }
}
