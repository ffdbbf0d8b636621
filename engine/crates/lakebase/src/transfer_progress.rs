//! How far an import or export is, for a person at a terminal, and Ctrl-C.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use transfer::Progress;

/// Between two lines on the terminal.
const INTERVAL: Duration = Duration::from_millis(500);
/// `signal(7)`.
const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;

/// Prints to standard error where that is a terminal.
struct Terminal {
    is_terminal: bool,
    interrupted: AtomicBool,
    done: AtomicU64,
    line: Mutex<Line>,
}

struct Line {
    what: String,
    total: u64,
    began: Instant,
    printed: Option<Instant>,
}

impl Progress for Terminal {
    fn begin(&self, what: &str, bytes: u64) {
        self.done.store(0, Ordering::Relaxed);
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        *line = Line { what: what.to_owned(), total: bytes, began: Instant::now(), printed: None };
    }

    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if !self.is_terminal {
            return;
        }
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if line.printed.is_some_and(|printed| now - printed < INTERVAL) && done < line.total {
            return;
        }
        line.printed = Some(now);
        let text = describe(&line.what, done, line.total, now - line.began);
        // A terminal that is gone is no reason to end.
        let _ = write!(io::stderr(), "\r\x1b[K{text}");
    }

    fn wait(&self, why: &str) {
        let _ = writeln!(io::stderr(), "lakebase: {why}");
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

/// `import: 1.2 of 4.0 GiB (30 %), 210 MiB/s, 14 s left`.
fn describe(what: &str, done: u64, total: u64, passed: Duration) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let percent = (100 * done).checked_div(total).unwrap_or(100);
    let rate = done as f64 / passed.as_secs_f64().max(0.001);
    let left = total.saturating_sub(done) as f64 / rate.max(1.0);
    format!(
        "{what}: {:.2} of {:.2} GiB ({percent} %), {:.0} MiB/s, {left:.0} s left",
        gib(done),
        gib(total),
        rate / f64::from(1 << 20)
    )
}

/// Runs `work` on a thread beside one that waits for SIGINT and SIGTERM; returns what it returns, also after a signal.
///
/// # Errors
/// The thread or the runtime cannot be made.
pub(crate) fn with_progress<T: Send + 'static>(
    work: impl FnOnce(&dyn Progress) -> T + Send + 'static,
) -> io::Result<T> {
    let line = Line { what: String::new(), total: 0, began: Instant::now(), printed: None };
    let progress = Arc::new(Terminal {
        is_terminal: io::stderr().is_terminal(),
        interrupted: AtomicBool::new(false),
        done: AtomicU64::new(0),
        line: Mutex::new(line),
    });
    let result = driver::run_core({
        let progress = progress.clone();
        async move {
            let mut signals = driver::Signals::catch(&[SIGINT, SIGTERM])?;
            let watcher = driver::spawn({
                let progress = progress.clone();
                async move {
                    while signals.wait().await.is_ok() {
                        progress.interrupted.store(true, Ordering::Relaxed);
                    }
                }
            });
            let result = driver::unblock({
                let progress = progress.clone();
                move || work(&*progress)
            })
            .await;
            watcher.cancel();
            Ok(result)
        }
    })?;
    let printed = progress.line.lock().unwrap_or_else(PoisonError::into_inner).printed.is_some();
    if printed && progress.is_terminal {
        let _ = writeln!(io::stderr());
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_how_fast_and_how_long() {
        let text = describe("import", 1 << 30, 4 << 30, Duration::from_secs(10));
        assert_eq!("import: 1.00 of 4.00 GiB (25 %), 102 MiB/s, 30 s left", text);
        assert_eq!("import: 0.00 of 0.00 GiB (100 %), 0 MiB/s, 0 s left", describe("import", 0, 0, Duration::ZERO));
    }
}
