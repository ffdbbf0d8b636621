//! Rule V7: before PostgreSQL runs, this process is proved to belong to the agent that prepared PGDATA, or it ends.
#![allow(unsafe_code)]

use crate::{
    backend::Backend,
    fd_table::{self, Entry},
    real,
    relation::Relations,
    server::{Server, file_identity},
};
use core::{
    ffi::{CStr, c_int, c_void},
    fmt,
    sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed},
};
use std::{
    env,
    ffi::{CString, OsString},
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
};
use vfs_abi::{
    AREA_BYTES, Area, ENV_AGENT_FD, ENV_AREA, ENV_DOORBELL, ENV_PGDATA, ENV_TRUST, LIBRARY_FILE, MAGIC, ROLE_REPLICA,
    ROLE_WRITER, TRUST_FILE,
    blocks::{BlockMap, ENV_BLOCKS, ENV_BLOCKS_DOORBELL, HEADER_WORDS, Layout, LayoutFault},
};

/// Why this server may not start. Each is one line for a person.
#[derive(Debug)]
pub enum Refusal {
    MissingVariable(&'static str),
    BadVariable(&'static str, OsString),
    NotPostgres(&'static str),
    Descriptor(&'static str, c_int, io::Error),
    Area(io::Error),
    AreaSize(u64),
    Blocks(io::Error),
    BlocksSize { expected: u64, found: u64 },
    BlocksLayout(LayoutFault),
    Magic(u64),
    SegmentBytes(u64),
    Role(u32),
    DataDirectory(OsString),
    NoTrust(OsString, io::Error),
    Trust { expected: String, found: String },
    AgentGone,
    Fenced,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingVariable(name) => write!(f, "{name} is not set: no compute agent started this server"),
            Self::BadVariable(name, value) => write!(f, "{name} has the bad value {value:?}"),
            Self::NotPostgres(symbol) => write!(f, "this PostgreSQL does not export {symbol}"),
            Self::Descriptor(name, fd, error) => write!(f, "{name} names descriptor {fd}, which is not open: {error}"),
            Self::Area(error) => write!(f, "cannot map the area of the compute agent: {error}"),
            Self::AreaSize(bytes) => write!(f, "the area has {bytes} bytes instead of {AREA_BYTES}"),
            Self::Blocks(error) => write!(f, "cannot map the block map of the compute agent: {error}"),
            Self::BlocksSize { expected, found } => {
                write!(f, "the block map has {found} bytes instead of the {expected} of its header")
            }
            Self::BlocksLayout(fault) => fault.fmt(f),
            Self::Magic(found) => write!(
                f,
                "the area has the magic number {found:#018x} instead of {MAGIC:#018x}: \
                 the compute agent is of another version"
            ),
            Self::SegmentBytes(bytes) => write!(f, "the area names an impossible WAL segment size of {bytes} bytes"),
            Self::Role(role) => write!(f, "the area names the unknown role {role}"),
            Self::DataDirectory(path) => write!(f, "there is no data directory {path:?}"),
            Self::NoTrust(path, error) => {
                write!(f, "cannot read {path:?}, which says for whom PGDATA is true: {error}")
            }
            Self::Trust { expected, found } => {
                write!(f, "PGDATA belongs to {found:?}, but the compute agent is {expected:?}")
            }
            Self::AgentGone => f.write_str("the compute agent is gone"),
            Self::Fenced => f.write_str("this writer is fenced"),
        }
    }
}

/// Whether this program is the PostgreSQL server, told by a function that only it exports. Shells and wrappers on the
/// way to it keep their environment and pass everything through.
pub fn is_postgres_server() -> bool {
    symbol(c"PostmasterMain").is_some()
}

/// Checks everything, takes our variables out of the environment and returns what the hooks need.
pub fn establish() -> Result<Server, Refusal> {
    let enable_fsync = symbol(c"enableFsync").ok_or(Refusal::NotPostgres("enableFsync"))?;
    let wal_segment_size = symbol(c"wal_segment_size").ok_or(Refusal::NotPostgres("wal_segment_size"))?;
    // SAFETY: both are variables of the main program, which is never unloaded: `bool enableFsync` (xlog.c, as 0 or 1
    // in one byte) and `int wal_segment_size`. PostgreSQL is single-threaded.
    let (enable_fsync, wal_segment_size) =
        unsafe { (AtomicBool::from_ptr(enable_fsync.cast()), AtomicI32::from_ptr(wal_segment_size.cast())) };

    let area = variable(ENV_AREA)?;
    let pgdata = variable(ENV_PGDATA)?;
    let trust = variable(ENV_TRUST)?;
    let doorbell = descriptor(ENV_DOORBELL)?;
    let agent = descriptor(ENV_AGENT_FD)?;

    let area = map_area(&area)?;
    let relations = match env::var_os(ENV_BLOCKS) {
        None => None,
        Some(_) => {
            let map = map_blocks(&variable(ENV_BLOCKS)?)?;
            let doorbell = descriptor(ENV_BLOCKS_DOORBELL)?;
            fd_table::set(doorbell, Entry::Own);
            let backend = Backend::find(|name| symbol(name).ok_or_else(|| Refusal::NotPostgres(name_of(name))))?;
            Some(Relations { map, doorbell, backend, pinned_below: area.segment_bytes.load(Relaxed) })
        }
    };
    let pgdata = absolute_directory(pgdata)?;
    let pgdata_identity = CString::new(pgdata.as_bytes())
        .ok()
        .and_then(|path| file_identity(&path))
        .ok_or_else(|| Refusal::DataDirectory(pgdata.clone()))?;
    compare_trust(&pgdata, &trust)?;

    // The postmaster dies with the thread that started it, also when it was started through a wrapper. The launcher
    // has asked for it, too; here it is certain, since changing the user would have cleared it (prctl(2)).
    // SAFETY: integer arguments only.
    unsafe { real::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64, 0, 0, 0) };

    let server = Server {
        area,
        doorbell,
        agent,
        relations,
        pgdata: Box::leak(pgdata.into_vec().into_boxed_slice()),
        pgdata_identity,
        postmaster: std::process::id(),
        enable_fsync,
        wal_segment_size,
    };
    // After the death signal was set: an agent that died before it is found here.
    if !server.agent_lives() {
        return Err(Refusal::AgentGone);
    }
    if area.is_fenced() {
        return Err(Refusal::Fenced);
    }
    fd_table::set(doorbell, Entry::Own);
    fd_table::set(agent, Entry::Own);
    clean_environment();
    Ok(server)
}

fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a C string; RTLD_DEFAULT searches the main program first.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// The value is copied: PostgreSQL overwrites the original environment for `ps` (`save_ps_display_args`).
fn variable(name: &'static str) -> Result<OsString, Refusal> {
    env::var_os(name).filter(|value| !value.is_empty()).ok_or(Refusal::MissingVariable(name))
}

/// An inherited descriptor, made close-on-exec: what PostgreSQL starts (archive commands, COPY PROGRAM) must not hold
/// it.
fn descriptor(name: &'static str) -> Result<c_int, Refusal> {
    let value = variable(name)?;
    let fd: c_int = value
        .to_str()
        .and_then(|text| text.parse().ok())
        .filter(|fd| *fd > libc::STDERR_FILENO && fd_table::can_track(*fd))
        .ok_or(Refusal::BadVariable(name, value))?;
    // SAFETY: integer arguments; a number that is not open is refused by the kernel.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(Refusal::Descriptor(name, fd, io::Error::last_os_error()));
    }
    Ok(fd)
}

/// A file of shared memory, by the value of the variable `name`: a path, or an inherited descriptor.
fn shared_file(name: &'static str, value: &OsString, fault: fn(io::Error) -> Refusal) -> Result<fs::File, Refusal> {
    if value.as_bytes()[0] == b'/' {
        return fs::File::options().read(true).write(true).open(value).map_err(fault);
    }
    // SAFETY: the descriptor was made for us by the agent; nobody else in this process uses it, and it is closed once
    // mapped.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor(name)?) }.into())
}

/// Maps the first `bytes` of a file, for the life of the process.
fn map_shared(file: &fs::File, bytes: usize) -> io::Result<*mut c_void> {
    // SAFETY: a new shared mapping; nothing is replaced.
    let address = unsafe {
        libc::mmap(
            core::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) }
}

fn map_blocks(value: &OsString) -> Result<BlockMap<'static>, Refusal> {
    let file = shared_file(ENV_BLOCKS, value, Refusal::Blocks)?;
    let found = file.metadata().map_err(Refusal::Blocks)?.len();
    let header_bytes = HEADER_WORDS * size_of::<AtomicU64>();
    let bytes = usize::try_from(found).ok().filter(|bytes| *bytes >= header_bytes);
    let bytes = bytes.ok_or(Refusal::BlocksSize { expected: header_bytes as u64, found })?;
    let address = map_shared(&file, bytes).map_err(Refusal::Blocks)?;
    // SAFETY: page-aligned, mapped at least so long, never unmapped; all bit patterns of atomics are valid.
    let header = unsafe { core::slice::from_raw_parts(address.cast::<AtomicU64>(), HEADER_WORDS) };
    let layout = Layout::read(header).map_err(Refusal::BlocksLayout)?;
    if layout.region_bytes() != found {
        return Err(Refusal::BlocksSize { expected: layout.region_bytes(), found });
    }
    // SAFETY: as above; the two slices lie side by side and fill the region exactly, as was just compared.
    let (wide, narrow) = unsafe {
        let wide = address.cast::<AtomicU64>();
        let narrow = wide.add(layout.wide_words()).cast::<AtomicU32>();
        (
            core::slice::from_raw_parts(wide, layout.wide_words()),
            core::slice::from_raw_parts(narrow, layout.narrow_words()),
        )
    };
    Ok(BlockMap::from_raw(layout, wide, narrow))
}

/// The text of a symbol's name, for a message.
fn name_of(name: &'static CStr) -> &'static str {
    name.to_str().unwrap_or("a symbol")
}

fn map_area(value: &OsString) -> Result<&'static Area, Refusal> {
    let file = shared_file(ENV_AREA, value, Refusal::Area)?;
    let bytes = file.metadata().map_err(Refusal::Area)?.len();
    if bytes != AREA_BYTES as u64 {
        return Err(Refusal::AreaSize(bytes));
    }
    let address = map_shared(&file, AREA_BYTES).map_err(Refusal::Area)?;
    // SAFETY: page-aligned, AREA_BYTES >= size_of::<Area>() (asserted there), never unmapped; every word is an atomic,
    // for which all bit patterns are valid.
    let area = unsafe { &*address.cast::<Area>() };

    let magic = area.magic.load(Acquire);
    if magic != MAGIC {
        return Err(Refusal::Magic(magic));
    }
    let segment_bytes = area.segment_bytes.load(Relaxed);
    if !segment_bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&segment_bytes) {
        return Err(Refusal::SegmentBytes(segment_bytes));
    }
    match area.role.load(Relaxed) {
        ROLE_REPLICA | ROLE_WRITER => Ok(area),
        role => Err(Refusal::Role(role)),
    }
}

fn absolute_directory(path: OsString) -> Result<OsString, Refusal> {
    let mut bytes = path.as_bytes();
    while bytes.len() > 1 && bytes.ends_with(b"/") {
        bytes = &bytes[..bytes.len() - 1];
    }
    if bytes.len() < 2 || bytes[0] != b'/' {
        return Err(Refusal::BadVariable(ENV_PGDATA, path));
    }
    Ok(OsString::from_vec(bytes.to_vec()))
}

fn compare_trust(pgdata: &OsString, trust: &OsString) -> Result<(), Refusal> {
    let path = Path::new(pgdata).join(TRUST_FILE);
    let found = fs::read(&path).map_err(|error| Refusal::NoTrust(path.into_os_string(), error))?;
    let found = found.strip_suffix(b"\n").unwrap_or(&found);
    if found != trust.as_bytes() {
        let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        return Err(Refusal::Trust { expected: text(trust.as_bytes()), found: text(found) });
    }
    Ok(())
}

/// What PostgreSQL starts with `system` or `popen` must not load this library or see its settings.
fn clean_environment() {
    // SAFETY: the constructor runs before `main`, when the process has one thread.
    unsafe {
        for name in [ENV_AREA, ENV_PGDATA, ENV_TRUST, ENV_DOORBELL, ENV_AGENT_FD, ENV_BLOCKS, ENV_BLOCKS_DOORBELL] {
            env::remove_var(name);
        }
        if let Some(list) = env::var_os("LD_PRELOAD") {
            match without_library(list.as_bytes()) {
                Some(rest) => env::set_var("LD_PRELOAD", OsString::from_vec(rest)),
                None => env::remove_var("LD_PRELOAD"),
            }
        }
    }
}

/// `LD_PRELOAD` (separated by colons or spaces, ld.so(8)) without this library; `None` when nothing is left.
fn without_library(list: &[u8]) -> Option<Vec<u8>> {
    let ours = |entry: &&[u8]| entry.rsplit(|byte| *byte == b'/').next() == Some(LIBRARY_FILE.as_bytes());
    let rest: Vec<&[u8]> =
        list.split(|byte| matches!(byte, b':' | b' ')).filter(|entry| !entry.is_empty() && !ours(entry)).collect();
    (!rest.is_empty()).then(|| rest.join(&b':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_entry_leaves_the_preload_list() {
        let table: [(&str, Option<&str>); 6] = [
            ("/x/liblakebase_vfs.so", None),
            ("liblakebase_vfs.so", None),
            ("/a/libjemalloc.so:/x/liblakebase_vfs.so", Some("/a/libjemalloc.so")),
            ("/x/liblakebase_vfs.so /a/b.so  /c.so", Some("/a/b.so:/c.so")),
            ("/a/notliblakebase_vfs.so", Some("/a/notliblakebase_vfs.so")),
            ("", None),
        ];
        for (list, expected) in table {
            let expected = expected.map(|text| text.as_bytes().to_vec());
            assert_eq!(expected, without_library(list.as_bytes()), "{list}");
        }
    }

    #[test]
    fn data_directory_is_absolute_and_bare() {
        let normal =
            |text: &str| absolute_directory(OsString::from(text)).ok().and_then(|path| path.into_string().ok());
        assert_eq!(Some("/a/b".to_owned()), normal("/a/b//"));
        assert_eq!(None, normal("a/b"));
        assert_eq!(None, normal("/"));
        assert_eq!(None, normal(""));
    }
}
