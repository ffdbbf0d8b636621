//! Rule V4: what PostgreSQL writes to WAL is published, and a flush of it returns when the agent has settled it.

use crate::{
    fd_table::WalFile,
    futex::{self, KeepErrno, Wait},
    report,
    server::Server,
};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use vfs_abi::{Area, FLUSH_DELAY_US_MAX};

/// A waiting process looks after the agent's pipe this often.
pub const AGENT_CHECK_MS: u32 = 250;

/// Publishes that bytes of `file` ending at `end_offset` (exclusive, above 0) have been written.
///
/// The pages are in the page cache, where the agent reads them. The backend that flushes may be another one, so the
/// extent lives in the area; `WALWriteLock` (on a replica: there is one WAL receiver) orders the writers.
pub fn published(server: &Server, file: WalFile, end_offset: u64) {
    // With fsync = off PostgreSQL would acknowledge commits without ever asking us.
    if server.area.is_writer() && !server.enable_fsync.load(Relaxed) {
        report::refuse(format_args!("fsync is off: commits would not wait for the safekeepers"));
    }
    if server.area.publish_write(file.timeline, file.start_lsn + end_offset) {
        server.ring();
    }
    if file.synchronous {
        flush(server, file);
    }
}

/// Returns when the WAL written to this segment and before it is durable: on a quorum in the role of writer, at once in
/// the role of replica, whose WAL came from there. A fenced writer's wait never returns: the process ends.
pub fn flush(server: &Server, file: WalFile) {
    if !server.area.is_writer() || is_unused(server.area, file) {
        return;
    }
    let _keep = KeepErrno::new();
    server.area.wal_flushes.fetch_add(1, Relaxed);
    // A number of writes, not a position: the last page is written again and again with the same end (vfs-abi).
    let target = server.area.flush_target();
    server.end_if_fenced();
    // Backpressure, while the WAL is on its way to the safekeepers: page servers that lag slow the writer down.
    let delay_us = server.area.flush_delay_us.load(Relaxed).min(FLUSH_DELAY_US_MAX);
    if delay_us != 0 {
        futex::sleep_us(delay_us);
    }
    if server.area.is_settled(target) {
        return;
    }
    server.area.settled_waiters.fetch_add(1, SeqCst);
    loop {
        // The futex word first: a change after this load makes the wait return at once.
        let seen = server.area.settled_futex.load(SeqCst);
        server.end_if_fenced();
        if server.area.is_settled(target) {
            break;
        }
        // A signal handler that ran (EINTR) changes nothing here: its effect waits for the end of the critical section.
        if futex::wait(&server.area.settled_futex, seen, AGENT_CHECK_MS) == Wait::TimedOut {
            server.end_if_agent_is_gone();
        }
    }
    server.area.settled_waiters.fetch_sub(1, SeqCst);
}

/// Whether nothing has been written into this segment yet. A recycled segment is flushed under its future name with
/// `ControlFileLock` held (`InstallXLogFileSegment`), and nobody depends on what it holds.
fn is_unused(area: &Area, file: WalFile) -> bool {
    area.written_lsn.load(SeqCst) <= file.start_lsn
}
