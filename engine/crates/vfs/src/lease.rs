//! Rule V6: no byte leaves for a client unless the read lease runs.
//!
//! The check is the last thing before the system call. What it cannot see: the few instructions between the two, and
//! bytes that the kernel has already taken.

use crate::{
    futex::{self, KeepErrno, Wait},
    report,
    server::Server,
    wal::AGENT_CHECK_MS,
};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, SeqCst},
};

/// When this process first found the lease expired (nanoseconds of `CLOCK_BOOTTIME`), 0 while it runs. A wait that a
/// signal interrupts is taken up again by PostgreSQL's next `send`, and its time goes on.
static WAITING_SINCE_NS: AtomicU64 = AtomicU64::new(0);

/// What a `send` may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Send.
    Send,
    /// Wait for at most this long, then look again.
    Wait { ms: u32 },
    /// The time to wait is over: the client is given up.
    GiveUp,
}

/// Decides by the clock. `until_ns` is the end of the lease; a lease ends *at* its end.
fn verdict(now_ns: u64, until_ns: u64, waiting_since_ns: u64, timeout_ms: u32) -> Verdict {
    if now_ns < until_ns {
        return Verdict::Send;
    }
    let waited_ms = now_ns.saturating_sub(waiting_since_ns) / 1_000_000;
    match u64::from(timeout_ms).saturating_sub(waited_ms) {
        0 => Verdict::GiveUp,
        left => Verdict::Wait { ms: left.min(u64::from(AGENT_CHECK_MS)) as u32 },
    }
}

/// Returns when the caller may send to a client.
///
/// # Errors
/// The `errno` to fail with. `EAGAIN`: a signal arrived; PostgreSQL's sockets are non-blocking, so it waits for socket
/// or latch, acts on a pending termination (`ProcessClientWriteInterrupt`) and sends again. `ECONNRESET`: the lease was
/// away for `lease_wait_timeout_ms`; the backend ends by itself ("connection to client lost", `ProcessInterrupts`)
/// and its transaction rolls back. Exiting here would make the postmaster end the whole server.
pub fn permit(server: &Server) -> Result<(), i32> {
    if !server.area.is_writer() {
        return Ok(());
    }
    server.end_if_fenced();
    if futex::boottime_ns() < server.area.lease_until_ns.load(Acquire) {
        if WAITING_SINCE_NS.load(Relaxed) != 0 {
            WAITING_SINCE_NS.store(0, Relaxed);
        }
        return Ok(());
    }
    wait_for_lease(server)
}

#[cold]
fn wait_for_lease(server: &Server) -> Result<(), i32> {
    let _keep = KeepErrno::new();
    // The postmaster serves everybody and must not sleep; it sends only when it cannot fork (`report_fork_failure_to_client`).
    if std::process::id() == server.postmaster {
        return Err(libc::EAGAIN);
    }
    if WAITING_SINCE_NS.load(Relaxed) == 0 {
        WAITING_SINCE_NS.store(futex::boottime_ns(), Relaxed);
        server.area.lease_waits.fetch_add(1, Relaxed);
    }
    server.area.lease_waiters.fetch_add(1, SeqCst);
    let result = loop {
        let seen = server.area.lease_futex.load(SeqCst);
        server.end_if_fenced();
        let timeout_ms = server.area.lease_wait_timeout_ms.load(Relaxed);
        let until_ns = server.area.lease_until_ns.load(SeqCst);
        match verdict(futex::boottime_ns(), until_ns, WAITING_SINCE_NS.load(Relaxed), timeout_ms) {
            Verdict::Send => {
                WAITING_SINCE_NS.store(0, Relaxed);
                break Ok(());
            }
            Verdict::GiveUp => {
                report::line(format_args!("no read lease for {timeout_ms} ms: the client's connection is given up"));
                break Err(libc::ECONNRESET);
            }
            Verdict::Wait { ms } => match futex::wait(&server.area.lease_futex, seen, ms) {
                Wait::Interrupted => break Err(libc::EAGAIN),
                Wait::TimedOut => server.end_if_agent_is_gone(),
                Wait::LookAgain => {}
            },
        }
    };
    server.area.lease_waiters.fetch_sub(1, SeqCst);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_decides_before_the_timeout() {
        const MS: u64 = 1_000_000;
        let table = [
            // now, until, waiting since, expected
            (10 * MS, 11 * MS, 10 * MS, Verdict::Send),
            (11 * MS, 11 * MS, 11 * MS, Verdict::Wait { ms: 250 }),
            (11 * MS, 0, 11 * MS, Verdict::Wait { ms: 250 }),
            (11 * MS + 900 * MS, 11 * MS, 11 * MS, Verdict::Wait { ms: 100 }),
            (11 * MS + 1000 * MS, 11 * MS, 11 * MS, Verdict::GiveUp),
            (11 * MS + 9000 * MS, 10_000 * MS, 11 * MS, Verdict::Send),
        ];
        for (now_ns, until_ns, since_ns, expected) in table {
            assert_eq!(expected, verdict(now_ns, until_ns, since_ns, 1000), "{now_ns} {until_ns} {since_ns}");
        }
    }
}
