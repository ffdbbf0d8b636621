//! The agent's side of the shared area: settles what is written and renews the lease, as long as the test lets it.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};
use vfs_abi::{AREA_BYTES, Area};

const LEASE: Duration = Duration::from_millis(1500);

/// What the agent may do.
#[derive(Default)]
struct Control {
    settles: AtomicBool,
    renews: AtomicBool,
    stops: AtomicBool,
}

pub struct Agent {
    pub area: &'static Area,
    pub memory: OwnedFd,
    pub doorbell: Arc<OwnedFd>,
    pub pipe: OwnedFd,
    alive: Mutex<Option<OwnedFd>>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

pub fn checked(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

pub fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(checked(fd)) }
}

pub fn boottime_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable.
    checked(unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) });
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

pub fn wake(word: &AtomicU32) {
    // SAFETY: the word is in shared memory that stays mapped.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

impl Agent {
    /// An agent that settles and renews.
    pub fn new(role: u32, segment_bytes: u64) -> Agent {
        // SAFETY: plain system calls with valid arguments; results are checked.
        let (memory, doorbell, ends) = unsafe {
            let memory = owned(libc::memfd_create(c"vfs-area".as_ptr(), libc::MFD_CLOEXEC));
            checked(libc::ftruncate(memory.as_raw_fd(), AREA_BYTES as i64));
            let doorbell = owned(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK));
            let mut ends = [0; 2];
            checked(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC));
            (memory, doorbell, ends)
        };
        // SAFETY: a new shared mapping of the whole file, never unmapped; all words are atomics.
        let area = unsafe {
            let address = libc::mmap(
                std::ptr::null_mut(),
                AREA_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                0,
            );
            assert_ne!(libc::MAP_FAILED, address);
            &*address.cast::<Area>()
        };
        area.initialise(segment_bytes, std::process::id(), role, 60_000);
        let mut agent = Agent {
            area,
            memory,
            doorbell: Arc::new(doorbell),
            pipe: owned(ends[0]),
            alive: Mutex::new(Some(owned(ends[1]))),
            control: Arc::new(Control::default()),
            thread: None,
        };
        agent.let_settle(true);
        agent.let_renew(true);
        let (control, doorbell) = (agent.control.clone(), agent.doorbell.clone());
        agent.thread = Some(std::thread::spawn(move || run(area, &control, &doorbell)));
        agent
    }

    /// Whether flushes are answered. Off is a quorum that is away.
    pub fn let_settle(&self, allowed: bool) {
        self.control.settles.store(allowed, SeqCst);
    }

    /// Whether the lease is renewed. Off is a cut between the agent and the safekeepers.
    pub fn let_renew(&self, allowed: bool) {
        self.control.renews.store(allowed, SeqCst);
    }

    /// Stops renewing and returns once the lease has run out.
    pub fn lose_lease(&self) {
        self.let_renew(false);
        // The agent's thread may be about to renew once more.
        std::thread::sleep(Duration::from_millis(100));
        let lost = crate::within(crate::PATIENCE, || boottime_ns() >= self.area.lease_until_ns.load(SeqCst));
        assert!(lost, "the lease still runs");
    }

    pub fn fence(&self) {
        self.area.fence();
        wake(&self.area.settled_futex);
        wake(&self.area.lease_futex);
    }

    /// Ends the agent as its death would: nobody settles or renews, and its end of the pipe is closed.
    pub fn die(&self) {
        self.let_settle(false);
        self.let_renew(false);
        *self.alive.lock().unwrap() = None;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.control.stops.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking());
        }
    }
}

fn run(area: &Area, control: &Control, doorbell: &OwnedFd) {
    let mut bell = File::from(doorbell.try_clone().unwrap());
    while !control.stops.load(SeqCst) {
        area.agent_sleeps.store(0, SeqCst);
        let written = area.written().sequence;
        if control.settles.load(SeqCst) && area.settle(written) {
            wake(&area.settled_futex);
        }
        if control.renews.load(SeqCst) && area.renew_lease(boottime_ns() + LEASE.as_nanos() as u64) {
            wake(&area.lease_futex);
        }
        if area.prepare_sleep(written) {
            let mut entry = libc::pollfd { fd: doorbell.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // The upper bound is for the controls above, which ring no bell.
            // SAFETY: one valid entry.
            if unsafe { libc::poll(&raw mut entry, 1, 20) } > 0 {
                bell.read_exact(&mut [0; 8]).unwrap();
            }
        }
    }
}
