//! The shared-memory area between the compute agent and `liblakebase_vfs.so` in every PostgreSQL process.
//!
//! One file (memfd or tmpfs) of [`AREA_BYTES`], mapped by both sides. All words are atomics; waiting is by futex on 32-bit
//! words. Byte-exact description: `docs/formats/vfs-area.md`. Knows nothing about WAL records: the agent alone decides
//! which byte position is settled.
#![no_std]
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU32, AtomicU64};

/// First word of the area: `LBVFS` and the layout's version. A library that finds another number refuses to start.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LBVFS\0\0\x01");

/// Size of the mapping, bytes.
pub const AREA_BYTES: usize = 4096;

/// Environment variable: path of the area (`/proc/<pid>/fd/<n>` or a file).
pub const ENV_AREA: &str = "LAKEBASE_VFS_AREA";
/// Environment variable: absolute path of PGDATA.
pub const ENV_PGDATA: &str = "LAKEBASE_VFS_PGDATA";
/// Environment variable: `cluster/term/attempt/nonce`, must equal the file [`TRUST_FILE`] in PGDATA (rule V7).
pub const ENV_TRUST: &str = "LAKEBASE_VFS_TRUST";
/// Environment variable: number of the inherited eventfd that wakes the agent.
pub const ENV_DOORBELL: &str = "LAKEBASE_VFS_DOORBELL";
/// File in PGDATA that says for whom its contents are true.
pub const TRUST_FILE: &str = "lakebase.trust";

/// [`Area::role`]: WAL flushes wait for nobody (the WAL came from the safekeepers).
pub const ROLE_REPLICA: u32 = 1;
/// [`Area::role`]: WAL flushes wait for the quorum, sends check the lease.
pub const ROLE_WRITER: u32 = 2;

/// The area. `repr(C)`: the layout is part of the format.
#[repr(C)]
pub struct Area {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// WAL segment size, bytes.
    pub segment_bytes: AtomicU64,
    /// Process id of the agent, for the log line only.
    pub agent_pid: AtomicU32,
    /// [`ROLE_REPLICA`] or [`ROLE_WRITER`]; set by the agent.
    pub role: AtomicU32,
    /// 0, or 1 once the agent decided that this writer is fenced: waits never return, backends exit.
    pub fenced: AtomicU32,
    /// Agent-side heartbeat is not used for safety; the lease is. Milliseconds that a send may wait for the lease.
    pub lease_wait_timeout_ms: AtomicU32,
    /// End of WAL bytes written by PostgreSQL (`pwrite` of a WAL segment): rises only. Set by the library.
    pub written_lsn: AtomicU64,
    /// Of the bytes below `written_lsn` those below this are final (all but the last page of the last `pwrite`).
    pub final_lsn: AtomicU64,
    /// PostgreSQL timeline of the file that was written last.
    pub written_timeline: AtomicU32,
    /// 1 while the agent sleeps and wants the doorbell rung; the ringer swaps it to 0 first.
    pub agent_sleeps: AtomicU32,
    /// Every complete record below this byte position is durable on a quorum. Rises only. Set by the agent.
    pub settled_lsn: AtomicU64,
    /// Changes whenever `settled_lsn`, `fenced` or `role` changes: the futex of WAL flushes.
    pub settled_futex: AtomicU32,
    /// Number of processes waiting on `settled_futex`; the agent skips the wake at 0.
    pub settled_waiters: AtomicU32,
    /// The read lease ends here: nanoseconds of `CLOCK_BOOTTIME`; 0 = none yet. Set by the agent.
    pub lease_until_ns: AtomicU64,
    /// Changes whenever the lease is renewed after a wait or `fenced` changes: the futex of sends.
    pub lease_futex: AtomicU32,
    /// Number of processes waiting on `lease_futex`.
    pub lease_waiters: AtomicU32,
    /// Counters for the agent's metrics: WAL writes, flushes that waited, sends that waited.
    pub wal_writes: AtomicU64,
    /// WAL flushes that went through the wait.
    pub wal_flushes: AtomicU64,
    /// Sends that found the lease expired.
    pub lease_waits: AtomicU64,
}

const _: () = assert!(core::mem::size_of::<Area>() <= AREA_BYTES);
