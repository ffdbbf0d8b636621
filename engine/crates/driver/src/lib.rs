//! Everything between the shells and the kernel: a runtime per core, TCP, TLS over it, files, timers, events, wake-ups
//! from other threads and processes.
//!
//! The only place that names the I/O runtime. Knows nothing about logs, protocols or roles. One [`run_core`] per thread;
//! what it spawns stays on that thread, so state is shared by `Rc` and [`Event`], and nothing here is `Send` unless it
//! says so ([`Detached`], the channels, [`EventFd`]).
//!
//! Two rules that the types cannot enforce:
//! - never drop a [`Reader::read`] on a connection that will be read again: bytes of a receive that had completed are
//!   lost. Select over events and timers only; end a waiting read with [`Closer::close`].
//! - a write is durable only after [`File::sync_data`] that was *called* after the write returned.

mod clock;
mod connection;
mod core;
mod event;
mod file;
mod signals;
mod tls;
mod wake;

pub use futures_channel::{mpsc, oneshot};

pub use crate::{
    clock::{now, sleep, sleep_until, timeout},
    connection::{Closer, Connection, Detached, Listener, Reader, Writer, bind, connect},
    core::{DriverKind, Task, kind, probe, run_core, spawn, start_core, unblock},
    event::Event,
    file::{AlignedBuffer, BLOCK_BYTES, Bytes, File, OpenOptions, direct_io_works, fill_with_zeros, sync_directory},
    signals::Signals,
    wake::{EventFd, EventFdWaiter},
};
