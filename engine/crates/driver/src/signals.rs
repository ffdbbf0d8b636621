//! Signals as events of a core.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        OnceLock,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
};

use crate::{EventFd, wake::EventFdWaiter};

static PENDING: AtomicU64 = AtomicU64::new(0);
static BELL: AtomicI32 = AtomicI32::new(-1);
static OWNER: OnceLock<EventFd> = OnceLock::new();

extern "C" fn handle(signal: libc::c_int) {
    // Only what is allowed in a signal handler: an atomic and write(2); errno is restored for the interrupted code.
    // SAFETY: errno's address is valid for the running thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    PENDING.fetch_or(1 << signal, Ordering::Release);
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight readable bytes; the descriptor lives as long as the process.
    unsafe { libc::write(BELL.load(Ordering::Acquire), one.as_ptr().cast(), one.len()) };
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Signals of this process, waited for on one core. At most one per process.
///
/// Uses handlers and not a signal mask, because executed programs inherit a mask but not handlers.
pub struct Signals {
    waiter: EventFdWaiter,
}

impl Signals {
    /// Catches `signals` (numbers 1 to 63) from now on.
    ///
    /// # Errors
    /// A signal cannot be caught, or signals are already caught in this process.
    pub fn catch(signals: &[i32]) -> io::Result<Self> {
        let bell = EventFd::new()?;
        let waiter = bell.waiter()?;
        let fd = bell.as_raw_fd();
        if OWNER.set(bell).is_err() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "signals of this process are already caught"));
        }
        BELL.store(fd, Ordering::Release);
        for &signal in signals {
            // SAFETY: an all-zero sigaction is valid; the handler does only what a handler may.
            let result = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handle as extern "C" fn(libc::c_int) as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal, &raw const action, std::ptr::null_mut())
            };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self { waiter })
    }

    /// Waits for signals; returns the numbers of those that arrived since the last call. Dropping the future loses nothing.
    ///
    /// # Errors
    /// As [`EventFdWaiter::wait`]: does not happen to a descriptor of our own.
    pub async fn wait(&mut self) -> io::Result<Vec<i32>> {
        loop {
            let pending = PENDING.swap(0, Ordering::AcqRel);
            if pending != 0 {
                return Ok((1..64).filter(|signal| pending & (1 << signal) != 0).collect());
            }
            self.waiter.wait().await?;
        }
    }
}
