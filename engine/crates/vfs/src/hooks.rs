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
    real,
    relation::Relations,
    report,
    server::{self, Server},
    wal,
};
use core::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use libc::{iovec, mode_t, off_t, size_t, sockaddr, socklen_t, ssize_t};
use vfs_abi::blocks::{FileKey, FileRef};

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
        PathKind::WalSegment { .. } | PathKind::Relation(_) if !fd_table::can_track(fd) => {
            report::line(format_args!("descriptor {fd} is too high for a WAL segment or a relation"));
            // SAFETY: opened a moment ago, for nobody else.
            unsafe { real::close(fd) };
            return fail(libc::EMFILE);
        }
        PathKind::Relation(key) => match &server.relations {
            None => Entry::Local,
            Some(relations) => match relations.opened(server, &key, fd, flags) {
                Ok(file) => file.map_or(Entry::Local, Entry::Relation),
                Err(errno) => {
                    // SAFETY: opened a moment ago, for nobody else.
                    unsafe { real::close(fd) };
                    return fail(errno);
                }
            },
        },
        PathKind::WalSegment { timeline, high, low } => Entry::Wal(server.wal_file(timeline, high, low, flags)),
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

/// The tracked relation file that `fd` stands for.
#[inline]
fn relation(fd: c_int) -> Option<(&'static Server, &'static Relations, FileRef)> {
    let file = fd_table::relation(fd)?;
    let server = server::get()?;
    Some((server, server.relations.as_ref()?, file))
}

/// The relation file of this path, if files are tracked.
///
/// # Safety
/// `path` is a C string.
unsafe fn relation_path(path: *const c_char) -> Option<(&'static Server, &'static Relations, FileKey)> {
    let server = server::get()?;
    let relations = server.relations.as_ref()?;
    // SAFETY: promised by the caller.
    match server.classify(unsafe { CStr::from_ptr(path) }) {
        PathKind::Relation(key) => Some((server, relations, key)),
        _ => None,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pread(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::pread(fd, buffer, count, offset) };
    match relation(fd) {
        None => call(),
        Some((server, relations, file)) => relations.read(server, fd, file, offset, count as u64, call),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pread64(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments; `off_t` has 64 bits.
    unsafe { pread(fd, buffer, count, offset) }
}

/// The buffers of a vectored call.
///
/// # Safety
/// As for the call itself: `count` vectors lie at `vectors`, unless the kernel is to refuse them.
unsafe fn buffers<'a>(vectors: *const iovec, count: c_int) -> &'a [iovec] {
    match usize::try_from(count) {
        // SAFETY: promised by the caller.
        Ok(count) if count > 0 && !vectors.is_null() => unsafe { core::slice::from_raw_parts(vectors, count) },
        _ => &[],
    }
}

fn total(buffers: &[iovec]) -> u64 {
    buffers.iter().fold(0, |sum: u64, buffer| sum.saturating_add(buffer.iov_len as u64))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn preadv(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::preadv(fd, vectors, count, offset) };
    match relation(fd) {
        None => call(),
        Some((server, relations, file)) => {
            // SAFETY: the caller's arguments.
            let bytes = total(unsafe { buffers(vectors, count) });
            relations.read(server, fd, file, offset, bytes, call)
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn preadv64(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    unsafe { preadv(fd, vectors, count, offset) }
}

/// A read at the descriptor's own position, which may have to be repeated.
///
/// # Safety
/// As `read`.
#[cold]
unsafe fn read_relation(
    (server, relations, file): (&Server, &Relations, FileRef),
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
) -> ssize_t {
    // SAFETY: integer arguments.
    let offset = unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) };
    if offset < 0 {
        return -1;
    }
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::pread(fd, buffer, count, offset) };
    let result = relations.read(server, fd, file, offset, count as u64, call);
    if result > 0 {
        // SAFETY: integer arguments; the position lies in the file.
        unsafe { libc::lseek(fd, offset + result as off_t, libc::SEEK_SET) };
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t {
    match relation(fd) {
        // SAFETY: the caller's arguments.
        None => unsafe { real::read(fd, buffer, count) },
        // SAFETY: the caller's arguments.
        Some(tracked) => unsafe { read_relation(tracked, fd, buffer, count) },
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __read_chk(fd: c_int, buffer: *mut c_void, count: size_t, room: size_t) -> ssize_t {
    match relation(fd) {
        // SAFETY: the caller's arguments.
        Some(tracked) if count <= room => unsafe { read_relation(tracked, fd, buffer, count) },
        // SAFETY: the caller's arguments; the C library ends the process when they do not fit.
        _ => unsafe { real::__read_chk(fd, buffer, count, room) },
    }
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

/// `pd_lsn` of a page: two words of 32 bits in the machine's order, the upper half first (`PageXLogRecPtr`, bufpage.h).
fn page_lsn(bytes: [u8; 8]) -> u64 {
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    u64::from(word(0)) << 32 | u64::from(word(4))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::pwrite(fd, buffer, count, offset) };
    let Some((server, relations, file)) = relation(fd) else { return positioned(fd, offset, call()) };
    // SAFETY: asked only for pages that the call above has written from this buffer.
    let lsn_at = |at: u64| page_lsn(unsafe { buffer.cast::<u8>().add(at as usize).cast::<[u8; 8]>().read_unaligned() });
    relations.write(server, fd, file, offset, count as u64, Some(&lsn_at), call)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite64(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    unsafe { pwrite(fd, buffer, count, offset) }
}

/// The first 8 bytes of the page that starts `at` bytes into the buffers; they may lie in several.
///
/// # Safety
/// The buffers can be read and hold that many bytes.
unsafe fn page_start(buffers: &[iovec], at: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    let (mut index, mut at) = (0, at as usize);
    for byte in &mut bytes {
        while at >= buffers[index].iov_len {
            at -= buffers[index].iov_len;
            index += 1;
        }
        // SAFETY: `at` is below the buffer's length; readable as promised by the caller.
        *byte = unsafe { *buffers[index].iov_base.cast::<u8>().add(at) };
        at += 1;
    }
    bytes
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::pwritev(fd, vectors, count, offset) };
    let Some((server, relations, file)) = relation(fd) else { return positioned(fd, offset, call()) };
    // SAFETY: the caller's arguments.
    let buffers = unsafe { buffers(vectors, count) };
    // SAFETY: asked only for pages that the call above has written from these buffers.
    let lsn_at = |at: u64| page_lsn(unsafe { page_start(buffers, at) });
    relations.write(server, fd, file, offset, total(buffers), Some(&lsn_at), call)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev64(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    unsafe { pwritev(fd, vectors, count, offset) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::write(fd, buffer, count) };
    if let Some((server, relations, file)) = relation(fd) {
        // SAFETY: integer arguments; the descriptor is an open file.
        let offset = unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) };
        return relations.write(server, fd, file, offset, count as u64, None, call);
    }
    let written = call();
    if written > 0 && matches!(fd_table::get(fd), Entry::Wal(_)) {
        // SAFETY: integer arguments; the descriptor is an open file.
        let end = unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) };
        return positioned(fd, end - written as off_t, written);
    }
    written
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ftruncate(fd: c_int, length: off_t) -> c_int {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::ftruncate(fd, length) };
    match relation(fd) {
        None => call(),
        Some((server, relations, file)) => relations.truncate(server, file, length, call),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ftruncate64(fd: c_int, length: off_t) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { ftruncate(fd, length) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn truncate(path: *const c_char, length: off_t) -> c_int {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::truncate(path, length) };
    // SAFETY: the caller's C string.
    match unsafe { relation_path(path) } {
        None => call(),
        Some((server, relations, key)) => relations.truncate_path(server, &key, length, call),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn truncate64(path: *const c_char, length: off_t) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { truncate(path, length) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: the caller's arguments.
    let call = || unsafe { real::unlink(path) };
    // SAFETY: the caller's C string.
    match unsafe { relation_path(path) } {
        None => call(),
        Some((server, relations, key)) => relations.unlink(server, &key, call),
    }
}

/// PostgreSQL never renames a relation file, and the page service would not know the new name.
#[unsafe(no_mangle)]
unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the caller's C strings.
    if unsafe { relation_path(from).is_some() || relation_path(to).is_some() } {
        report::line(format_args!("a relation file cannot be renamed on the virtual disk"));
        return fail(libc::EPERM);
    }
    // SAFETY: the caller's arguments.
    unsafe { real::rename(from, to) }
}

/// PostgreSQL's prefetch. What is local is left to the kernel's read-ahead.
#[unsafe(no_mangle)]
unsafe extern "C" fn posix_fadvise(fd: c_int, offset: off_t, count: off_t, advice: c_int) -> c_int {
    if advice == libc::POSIX_FADV_WILLNEED
        && let Some((server, relations, file)) = relation(fd)
        && !relations.prefetch(server, file, offset, count)
    {
        return 0;
    }
    // SAFETY: the caller's arguments.
    unsafe { real::posix_fadvise(fd, offset, count, advice) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_fadvise64(fd: c_int, offset: off_t, count: off_t, advice: c_int) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { posix_fadvise(fd, offset, count, advice) }
}

/// What a flush of `fd` means: `None` asks for the real call.
fn flushed(fd: c_int) -> Option<c_int> {
    let server = server::get()?;
    match fd_table::get(fd) {
        Entry::Wal(file) => wal::flush(server, file),
        // The local disk is a cache: what must survive is in the WAL.
        Entry::Local | Entry::Relation(_) => {}
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
        PathKind::Inside | PathKind::Relation(_) => Some(0),
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
    if server::get().is_some() && matches!(fd_table::get(fd), Entry::Local | Entry::Relation(_) | Entry::Wal(_)) {
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
