//! A runtime per core: start, spawn, probe.

use std::{
    cell::Cell,
    fmt, io,
    panic::AssertUnwindSafe,
    pin::Pin,
    task::{Context, Poll},
    thread,
    time::Duration,
};

use compio::{
    driver::{DriverType, ProactorBuilder},
    runtime::{JoinHandle, Runtime, RuntimeBuilder},
};
use futures_util::FutureExt;

use crate::Event;

/// Environment variable that forces a driver: `polling` or `io_uring`. Unset: whatever the kernel allows.
const FORCE: &str = "LAKEBASE_IO";

/// Entries of the submission queue of a core.
const QUEUE_ENTRIES: u32 = 1024;

/// Rounds of tasks that woke each other before the kernel is asked again. An answer passes through two or three tasks; one
/// that wakes itself to let others have their turn must not keep I/O waiting for long.
const ROUNDS_MAX: usize = 4;

/// Blocking calls in flight on one core. The runtime's thread pool has 256 threads, and its loop spins when they are
/// all busy, so the rest wait here.
const BLOCKING_CALLS_MAX: usize = 64;

/// How I/O reaches the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DriverKind {
    /// Through io_uring.
    IoUring,
    /// io_uring is forbidden or absent: epoll for sockets, a thread pool for files.
    Polling,
}

impl DriverKind {
    /// Name in metrics, status and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            DriverKind::IoUring => "io_uring",
            DriverKind::Polling => "polling",
        }
    }
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<DriverType> for DriverKind {
    fn from(driver: DriverType) -> Self {
        if driver.is_iouring() { DriverKind::IoUring } else { DriverKind::Polling }
    }
}

thread_local! {
    static GATE: Gate = Gate::default();
}

/// Bounds the blocking calls of this thread.
#[derive(Default)]
struct Gate {
    in_flight: Cell<usize>,
    freed: Event,
    polling: Cell<bool>,
}

/// One place among the blocking calls of this thread, given back on drop.
pub(crate) struct Permit {
    counted: bool,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.counted {
            // Fails only while the thread ends, when nobody can wait any more.
            let _ = GATE.try_with(|gate| {
                gate.in_flight.set(gate.in_flight.get() - 1);
                gate.freed.set();
            });
        }
    }
}

async fn enter(counted: bool) -> Permit {
    if counted {
        std::future::poll_fn(|context| {
            GATE.with(|gate| {
                let mut wait = std::pin::pin!(gate.freed.until(|| {
                    let free = gate.in_flight.get() < BLOCKING_CALLS_MAX;
                    free.then(|| gate.in_flight.set(gate.in_flight.get() + 1))
                }));
                wait.as_mut().poll(context)
            })
        })
        .await;
    }
    Permit { counted }
}

/// A place for a file operation: counted only where files go through the thread pool.
pub(crate) async fn file_permit() -> Permit {
    enter(GATE.with(|gate| gate.polling.get())).await
}

fn forced_kind() -> io::Result<Option<DriverType>> {
    match std::env::var(FORCE).as_deref() {
        Err(_) | Ok("") => Ok(None),
        Ok("polling") => Ok(Some(DriverType::Poll)),
        Ok("io_uring") => Ok(Some(DriverType::IoUring)),
        Ok(other) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{FORCE}={other}: expected `polling` or `io_uring`"),
        )),
    }
}

fn build() -> io::Result<Runtime> {
    let mut proactor = ProactorBuilder::new();
    proactor.capacity(QUEUE_ENTRIES).single_issuer(true).defer_taskrun(true);
    if let Some(driver) = forced_kind()? {
        proactor.driver_type(driver);
    }
    RuntimeBuilder::new().with_proactor(proactor).build()
}

/// How I/O would reach the kernel from a core started now.
///
/// # Errors
/// Neither way works, or the environment asks for one that does not.
pub fn probe() -> io::Result<DriverKind> {
    Ok(build()?.driver_type().into())
}

/// How I/O reaches the kernel from this core.
///
/// # Panics
/// Outside [`run_core`].
pub fn kind() -> DriverKind {
    Runtime::with_current(Runtime::driver_type).into()
}

/// Runs `future` on this thread until it ends; tasks that it spawned and did not wait for are dropped then.
///
/// # Errors
/// The runtime cannot be created.
pub fn run_core<F: Future>(future: F) -> io::Result<F::Output> {
    let runtime = build()?;
    GATE.with(|gate| gate.polling.set(runtime.driver_type().is_polling()));
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| block_on(&runtime, future)));
    // Tasks are dropped here, not in the midst of a panic.
    drop(runtime);
    Ok(result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// `Runtime::block_on`, which asks the kernel after each round of tasks: whenever a task had woken another, that took four
/// system calls more, two of them to wake this very thread.
fn block_on<F: Future>(runtime: &Runtime, future: F) -> F::Output {
    runtime.enter(|| {
        let waker = runtime.waker();
        let mut context = Context::from_waker(&waker);
        let mut future = std::pin::pin!(future);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                runtime.run();
                return output;
            }
            if (0..ROUNDS_MAX).all(|_| runtime.run()) {
                runtime.poll_with(Some(Duration::ZERO));
            } else {
                runtime.poll();
            }
        }
    })
}

/// Starts a thread called `name` (15 bytes at most are shown by the kernel) that runs the future that `make` gives. A panic
/// in it ends the process, as in [`spawn`].
///
/// # Errors
/// The thread cannot be created. The thread's own result is an error when the runtime cannot be created.
pub fn start_core<T, F, M>(name: &str, make: M) -> io::Result<thread::JoinHandle<io::Result<T>>>
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
    M: FnOnce() -> F + Send + 'static,
{
    thread::Builder::new().name(name.to_owned()).spawn(move || run_core(async move { spawn(make()).await }))
}

/// Handle of a spawned task: await it for its output; dropping it lets the task run on.
pub struct Task<T>(Option<JoinHandle<T>>);

impl<T> Task<T> {
    /// Drops the task at its next suspension. Not for a task that reads a connection or owns a write in flight.
    pub fn cancel(mut self) {
        drop(self.0.take());
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let Some(handle) = self.0.as_mut() else { return Poll::Pending };
        Pin::new(handle).poll(context).map(|result| {
            self.0 = None;
            match result {
                Ok(value) => value,
                Err(_) => unreachable!("a panicking task ends the process, and a task is cancelled only by its owner"),
            }
        })
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            handle.detach();
        }
    }
}

/// Runs `future` on this core, beside the caller.
///
/// A panic in it ends the process: state shared with other tasks may be half changed, and a restart recovers from disk.
///
/// # Panics
/// Outside [`run_core`].
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    Task(Some(compio::runtime::spawn(async move {
        match AssertUnwindSafe(future).catch_unwind().await {
            Ok(value) => value,
            // The panic hook has printed the message and the place.
            Err(_) => std::process::abort(),
        }
    })))
}

/// Runs a blocking call on a thread of the pool; at most 64 of a core run at a time, the rest wait.
pub async fn unblock<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    let _permit = enter(true).await;
    match compio::runtime::spawn_blocking(call).await {
        Ok(value) => value,
        Err(_) => std::process::abort(),
    }
}
