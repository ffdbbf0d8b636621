//! The intercepted calls. Each does its real call, or what stands for it; why each is here says `calls.txt`.
//!
//! `open` and `prctl` are variadic in C. On x86-64 a caller passes integer arguments of a variadic function in the same
//! registers as those of an ordinary one, so a definition with all arguments fixed receives them; one that the caller
//! did not pass is an arbitrary register, which the real function ignores as it does for a C caller.
#![allow(unsafe_code)]

use crate::{
    fd_table::{self, Entry},
    futex::set_errno,
    lease,
    paths::{PathKind, is_tablespace_link},
    real, report,
    server::{self, Server},
    wal,
};
use core::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use libc::{iovec, mode_t, off_t, size_t, sockaddr, socklen_t, ssize_t};

fn fail<T: From<i8>>(errno: c_int) -> T {
    set_errno(errno);
    T::from(-1)
}

/// Records what a descriptor that `open` returned stands for.
///
/// # Safety
/// `path` is the C string that was opened.
unsafe fn opened(fd: c_int, path: *const c_char, flags: c_int) -> c_int {
    let Some(server) = server::get() else { return fd };
    if fd < 0 {
        return fd;
    }
    // SAFETY: promised by the caller; the kernel has just read it.
    let path = unsafe { CStr::from_ptr(path) };
    let entry = match server.classify(path) {
        PathKind::Outside => Entry::Unknown,
        PathKind::Inside => Entry::Local,
        PathKind::WalSegment { timeline, high, low } => {
            if !fd_table::can_track(fd) {
                report::line(format_args!("descriptor {fd} is too high for a WAL segment"));
                // SAFETY: opened a moment ago, for nobody else.
                unsafe { real::close(fd) };
                return fail(libc::EMFILE);
            }
            Entry::Wal(server.wal_file(timeline, high, low, flags))
        }
    };
    fd_table::set(fd, entry);
    fd
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { opened(real::open(path, flags, mode), path, flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { opened(real::open64(path, flags, mode), path, flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    match fd_table::get(fd) {
        Entry::Unknown => {}
        // A program that closes everything above stderr must not free these numbers for a WAL segment.
        Entry::Own => return fail(libc::EBADF),
        // Before the real call: afterwards the number may already mean something else.
        _ => fd_table::set(fd, Entry::Unknown),
    }
    // SAFETY: the caller's argument.
    unsafe { real::close(fd) }
}

/// What a copy of `fd` stands for: the same, but only the original of our own descriptors is guarded.
fn entry_of_copy(fd: c_int) -> Entry {
    match fd_table::get(fd) {
        Entry::Own => Entry::Unknown,
        entry => entry,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: the caller's argument.
    let copy = unsafe { real::dup(fd) };
    fd_table::set(copy, entry_of_copy(fd));
    copy
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(fd: c_int, target: c_int) -> c_int {
    if fd_table::get(target) == Entry::Own && fd != target {
        return fail(libc::EBADF);
    }
    // SAFETY: the caller's arguments.
    let copy = unsafe { real::dup2(fd, target) };
    if copy >= 0 && fd != target {
        fd_table::set(copy, entry_of_copy(fd));
    }
    copy
}

/// Publishes a positioned write that returned `written`.
fn positioned(fd: c_int, offset: off_t, written: ssize_t) -> ssize_t {
    if written > 0
        && let Entry::Wal(file) = fd_table::get(fd)
        && let Some(server) = server::get()
    {
        // Offsets of a write that succeeded are not negative, and below the segment's size.
        wal::published(server, file, offset as u64 + written as u64);
    }
    written
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    positioned(fd, offset, unsafe { real::pwrite(fd, buffer, count, offset) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite64(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    positioned(fd, offset, unsafe { real::pwrite64(fd, buffer, count, offset) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    positioned(fd, offset, unsafe { real::pwritev(fd, vectors, count, offset) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev64(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    positioned(fd, offset, unsafe { real::pwritev64(fd, vectors, count, offset) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    let written = unsafe { real::write(fd, buffer, count) };
    if written > 0 && matches!(fd_table::get(fd), Entry::Wal(_)) {
        // SAFETY: integer arguments; the descriptor is an open file.
        let end = unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) };
        return positioned(fd, end - written as off_t, written);
    }
    written
}

/// What a flush of `fd` means: `None` asks for the real call.
fn flushed(fd: c_int) -> Option<c_int> {
    let server = server::get()?;
    match fd_table::get(fd) {
        Entry::Wal(file) => wal::flush(server, file),
        // The local disk is a cache: what must survive is in the WAL.
        Entry::Local => {}
        Entry::Unknown | Entry::Outbound | Entry::Own => return flushed_unknown(server, fd),
    }
    Some(0)
}

/// A descriptor that no intercepted call opened. Rare (files outside PGDATA), so the kernel is asked for its name: a WAL
/// segment among them means that this build of PostgreSQL opens files by a call that we do not know, and its commits
/// would be local only.
#[cold]
fn flushed_unknown(server: &Server, fd: c_int) -> Option<c_int> {
    let mut link = [0u8; 32];
    let mut name = [0u8; libc::PATH_MAX as usize];
    {
        use std::io::Write;
        let mut rest = &mut link[..31];
        write!(rest, "/proc/self/fd/{fd}").ok()?;
    }
    // SAFETY: `link` ends in a zero byte, and `name` has one more byte than may be written.
    let length = unsafe { libc::readlink(link.as_ptr().cast(), name.as_mut_ptr().cast(), name.len() - 1) };
    let path = CStr::from_bytes_until_nul(name.get(..=usize::try_from(length).ok()?)?).ok()?;
    match server.classify(path) {
        PathKind::Outside => None,
        PathKind::Inside => Some(0),
        PathKind::WalSegment { .. } => report::refuse(format_args!(
            "the WAL segment {path:?} was opened by a call that is not intercepted: commits would be local only"
        )),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    // SAFETY: the caller's argument.
    flushed(fd).unwrap_or_else(|| unsafe { real::fsync(fd) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    // SAFETY: the caller's argument.
    flushed(fd).unwrap_or_else(|| unsafe { real::fdatasync(fd) })
}

/// A hint to write back early, never a promise: for PGDATA, a cache, there is nothing to do.
#[unsafe(no_mangle)]
unsafe extern "C" fn sync_file_range(fd: c_int, offset: off_t, count: off_t, flags: c_uint) -> c_int {
    if server::get().is_some() && matches!(fd_table::get(fd), Entry::Local | Entry::Wal(_)) {
        return 0;
    }
    // SAFETY: the caller's arguments.
    unsafe { real::sync_file_range(fd, offset, count, flags) }
}

/// A socket that this process connects leads to a server (WAL receiver, logical replication, dblink), not to a client
/// of ours: the lease does not hold it back. Everything else that `send` is used on is checked.
#[unsafe(no_mangle)]
unsafe extern "C" fn connect(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    if server::get().is_some() && fd_table::get(fd) == Entry::Unknown {
        fd_table::set(fd, Entry::Outbound);
    }
    // SAFETY: the caller's arguments.
    unsafe { real::connect(fd, address, length) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn send(fd: c_int, buffer: *const c_void, count: size_t, flags: c_int) -> ssize_t {
    if let Some(server) = server::get()
        && fd_table::get(fd) != Entry::Outbound
        && let Err(errno) = lease::permit(server)
    {
        return fail::<ssize_t>(errno);
    }
    // SAFETY: the caller's arguments.
    unsafe { real::send(fd, buffer, count, flags) }
}

/// PostgreSQL's children ask for SIGPWR when the postmaster dies, a mere flag to a running query
/// (`PostmasterDeathSignalInit`, pmsignal.c). They get SIGKILL, so that killing the postmaster ends them all.
#[unsafe(no_mangle)]
unsafe extern "C" fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int {
    let Some(server) = server::get() else {
        // SAFETY: the caller's arguments.
        return unsafe { real::prctl(option, a, b, c, d) };
    };
    if option != libc::PR_SET_PDEATHSIG || a != libc::SIGPWR as c_ulong {
        // SAFETY: the caller's arguments.
        return unsafe { real::prctl(option, a, b, c, d) };
    }
    // SAFETY: integer arguments only.
    let result = unsafe { real::prctl(option, libc::SIGKILL as c_ulong, 0, 0, 0) };
    // The postmaster may have died before the call, which would then never fire.
    // SAFETY: no arguments.
    let parent = unsafe { libc::getppid() };
    if result == 0 && u32::try_from(parent) != Ok(server.postmaster) {
        report::end(format_args!("the postmaster is gone: the process ends"));
    }
    result
}

/// Tablespaces with a location of their own would lie outside the virtual disk; in-place ones are directories.
#[unsafe(no_mangle)]
unsafe extern "C" fn symlink(target: *const c_char, path: *const c_char) -> c_int {
    if let Some(server) = server::get() {
        // SAFETY: the caller's C string.
        let name = unsafe { CStr::from_ptr(path) };
        if is_tablespace_link(name.to_bytes(), server.pgdata) {
            report::line(format_args!(
                "a tablespace with a location is refused: only in-place tablespaces \
                 (allow_in_place_tablespaces, LOCATION '') are on the virtual disk"
            ));
            return fail(libc::EPERM);
        }
    }
    // SAFETY: the caller's arguments.
    unsafe { real::symlink(target, path) }
}
