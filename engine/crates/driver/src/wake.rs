//! Wake-ups from other threads and processes.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use compio::runtime::fd::PollFd;

/// A kernel event counter (`eventfd(2)`): anyone who has the descriptor rings, one core waits.
///
/// May be sent to other threads and, by its descriptor, to other processes.
#[derive(Clone, Debug)]
pub struct EventFd(Arc<OwnedFd>);

impl EventFd {
    /// A counter at zero, closed in programs that this process executes.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the descriptor is ours alone.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given this descriptor to us.
        Ok(Self(Arc::new(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Takes over a descriptor that another process sent.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn from_owned(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: fcntl with these commands takes no pointers.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(Arc::new(fd)))
    }

    /// Adds one: the waiter wakes.
    pub fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes, as eventfd wants.
        let written = unsafe { libc::write(self.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        // Fails only when the counter is at its maximum, and then it is readable anyway.
        debug_assert!(written == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock);
    }

    /// The waiting side, on the core that calls this.
    ///
    /// # Errors
    /// The driver refuses the descriptor.
    pub fn waiter(&self) -> io::Result<EventFdWaiter> {
        Ok(EventFdWaiter { poll: PollFd::new(self.clone())? })
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Waits for an [`EventFd`] on one core.
pub struct EventFdWaiter {
    poll: PollFd<EventFd>,
}

impl EventFdWaiter {
    /// Waits until the counter is above zero, sets it to zero and returns what it was. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The descriptor is not an event counter.
    pub async fn wait(&self) -> io::Result<u64> {
        loop {
            let mut count = [0u8; 8];
            // SAFETY: eight writable bytes, as eventfd wants; the descriptor does not block.
            let read = unsafe { libc::read(self.poll.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
            if read == 8 {
                return Ok(u64::from_ne_bytes(count));
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => self.poll.read_ready().await?,
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }
}
