//! `liblakebase_vfs.so`: the virtual disk between an unmodified PostgreSQL and the kernel.
//!
//! Loaded with `LD_PRELOAD`. It publishes WAL writes to the compute agent, lets a flush of WAL return only when the
//! agent has settled it (rule V4), lets no byte leave for a client without a read lease (V6), and lets a read of a
//! relation return only blocks that are on the local disk, asking the agent for the others (V1-V3, V5). It decides nothing
//! about WAL records, terms, quorums or page servers: the agent does, through shared memory (`vfs-abi`).
//!
//! Rules for this code: PostgreSQL forks without exec, so state is process-wide and set once by [`start`], before
//! `main`; no threads; no allocation and no lock in a hook, since hooks run in critical sections and signal handlers;
//! `errno` is what the caller expects. A program that is not a PostgreSQL server is left alone; a PostgreSQL server
//! without a valid agent does not start (V7).
//!
//! Where to read next: `hooks.rs` (the calls), `wal.rs` (publish and wait), `lease.rs` (send), `relation.rs` (blocks),
//! `backend.rs` (what PostgreSQL itself is asked), `trust.rs` (start).
#![deny(unsafe_code)]
#![cfg_attr(test, allow(dead_code, reason = "hooks and constructor would replace the test program's own system calls"))]

pub mod backend;
pub mod fd_table;
pub mod futex;
#[cfg(not(test))]
mod hooks;
pub mod lease;
pub mod paths;
mod real;
pub mod relation;
pub mod report;
mod server;
mod trust;
pub mod wal;

/// The constructor: makes this process a server of the agent, leaves it alone, or ends it with one line on stderr.
#[cfg(not(test))]
extern "C" fn start() {
    real::resolve_all();
    if !trust::is_postgres_server() {
        return;
    }
    match trust::establish() {
        Ok(server) => server::set(server),
        Err(refusal) => report::refuse(format_args!("{refusal}; PostgreSQL is not started")),
    }
}

// SAFETY: `.init_array` holds pointers to functions that the loader calls once, before `main`, with (argc, argv,
// envp); a C function may ignore arguments. `start` needs nothing that is initialised later.
#[cfg(not(test))]
#[allow(unsafe_code)]
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
