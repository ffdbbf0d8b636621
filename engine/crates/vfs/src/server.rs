//! What every hook needs to know: set once by the constructor, inherited by every process that the postmaster forks.
#![allow(unsafe_code)]

use crate::{
    fd_table::WalFile,
    futex::KeepErrno,
    paths::{PathKind, classify, segment_start},
    real,
    relation::Relations,
    report,
};
use core::{
    ffi::{CStr, c_int},
    mem::MaybeUninit,
    sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed},
};
use std::sync::OnceLock;
use vfs_abi::Area;

/// A PostgreSQL server that belongs to an agent.
pub struct Server {
    /// The shared area, mapped for the life of the process.
    pub area: &'static Area,
    /// Eventfd that wakes the agent.
    pub doorbell: c_int,
    /// Read end of the pipe whose other end the agent holds.
    pub agent: c_int,
    /// The block map; none when relation files are local files.
    pub relations: Option<Relations>,
    /// Absolute path of PGDATA, without a trailing slash.
    pub pgdata: &'static [u8],
    /// Device and inode of PGDATA.
    pub pgdata_identity: (u64, u64),
    /// Process that ran the constructor: the postmaster.
    pub postmaster: u32,
    /// PostgreSQL's own `enableFsync` (the setting `fsync`).
    pub enable_fsync: &'static AtomicBool,
    /// PostgreSQL's own `wal_segment_size`, bytes.
    pub wal_segment_size: &'static AtomicI32,
}

static SERVER: OnceLock<Server> = OnceLock::new();

/// Makes this process a server. Called once, by the constructor.
pub fn set(server: Server) {
    let fresh = SERVER.set(server).is_ok();
    assert!(fresh, "the constructor runs once");
}

/// The server that this process belongs to; none before the constructor and in programs that are not PostgreSQL.
pub fn get() -> Option<&'static Server> {
    SERVER.get()
}

impl Server {
    /// Whether the agent still holds its end of the pipe.
    pub fn agent_lives(&self) -> bool {
        let mut entry = libc::pollfd { fd: self.agent, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry, no waiting.
        let ready = unsafe { libc::poll(&raw mut entry, 1, 0) };
        // Nothing is ever written to the pipe: any event is its end. A poll that fails (EINTR, ENOMEM) says nothing.
        ready <= 0
    }

    /// Ends this process if the writer is fenced or the agent is gone.
    pub fn end_if_fenced(&self) {
        if self.area.is_fenced() {
            report::end(format_args!("this writer is fenced by its agent: the process ends"));
        }
    }

    /// Ends this process if the agent is gone: nobody can settle WAL or renew the lease any more.
    pub fn end_if_agent_is_gone(&self) {
        if !self.agent_lives() {
            let pid = self.area.agent_pid.load(Relaxed);
            report::end(format_args!("the compute agent (process {pid}) is gone: the process ends"));
        }
    }

    /// Wakes the agent for WAL.
    pub fn ring(&self) {
        ring(self.doorbell);
    }

    /// What opening `path` means. A WAL segment of a server that is not configured as the agent believes ends it.
    pub fn classify(&self, path: &CStr) -> PathKind {
        classify(path.to_bytes(), self.pgdata)
    }

    /// The WAL segment that was opened, after checking that it is one of this server.
    ///
    /// The checks are those that would otherwise make a commit local only: the server's data directory (`postgres -D`)
    /// and segment size are those that the agent knows.
    pub fn wal_file(&self, timeline: u32, high: u32, low: u32, flags: c_int) -> WalFile {
        let _keep = KeepErrno::new();
        if file_identity(c".") != Some(self.pgdata_identity) {
            let pgdata = self.pgdata.escape_ascii();
            report::refuse(format_args!("the server runs in another data directory than its agent's, {pgdata}"));
        }
        let expected = self.area.segment_bytes.load(Relaxed);
        let actual = self.wal_segment_size.load(Relaxed);
        if u64::try_from(actual) != Ok(expected) {
            report::refuse(format_args!("WAL segments have {actual} bytes, but the agent expects {expected}"));
        }
        match segment_start(high, low, expected) {
            Some(start_lsn) => {
                WalFile { timeline, start_lsn, synchronous: flags & (libc::O_SYNC | libc::O_DSYNC) != 0 }
            }
            None => report::refuse(format_args!(
                "no WAL segment {timeline:08X}{high:08X}{low:08X} exists with segments of {expected} bytes"
            )),
        }
    }
}

/// Adds to an eventfd on which a thread of the agent sleeps.
pub fn ring(doorbell: c_int) {
    let _keep = KeepErrno::new();
    let one: u64 = 1;
    // SAFETY: an eventfd takes exactly these 8 bytes.
    let written = unsafe { real::write(doorbell, (&raw const one).cast(), size_of::<u64>()) };
    // EAGAIN: the counter is at its maximum, so the agent has been called already.
    if written != 8 && crate::futex::errno() != libc::EAGAIN {
        let error = std::io::Error::last_os_error();
        report::end(format_args!("cannot wake the compute agent: {error}"));
    }
}

/// Device and inode of a path.
pub fn file_identity(path: &CStr) -> Option<(u64, u64)> {
    let mut status = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: a C string and room for the result.
    if unsafe { libc::stat(path.as_ptr(), status.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: stat succeeded, so it filled the structure.
    let status = unsafe { status.assume_init() };
    Some((status.st_dev, status.st_ino))
}
