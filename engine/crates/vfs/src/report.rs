//! One line on stderr (PostgreSQL's log), without allocating.
#![allow(unsafe_code)]

use crate::{futex::KeepErrno, real};
use core::fmt::{self, Write};

/// Longest line, bytes: longer ones are cut. One `write` of at most `PIPE_BUF` (4096) is not torn by other writers.
const LINE_BYTES_MAX: usize = 1024;

struct Line {
    bytes: [u8; LINE_BYTES_MAX],
    used: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // The last byte is kept for the newline.
        let room = &mut self.bytes[self.used..LINE_BYTES_MAX - 1];
        let count = text.len().min(room.len());
        room[..count].copy_from_slice(&text.as_bytes()[..count]);
        self.used += count;
        Ok(())
    }
}

/// Writes `lakebase_vfs[pid]: message` to stderr. `errno` stays as it is.
pub fn line(message: fmt::Arguments<'_>) {
    let _keep = KeepErrno::new();
    let mut line = Line { bytes: [0; LINE_BYTES_MAX], used: 0 };
    let written = write!(line, "lakebase_vfs[{}]: {message}", std::process::id());
    // `Line` itself accepts everything; an error could only come from a `Display` and leaves a shorter line.
    debug_assert!(written.is_ok());
    line.bytes[line.used] = b'\n';
    // SAFETY: the buffer holds `used + 1` bytes. A failing write to stderr has nowhere to be reported.
    unsafe { real::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.used + 1) };
}

/// Reports `message` and ends this process with [`vfs_abi::EXIT_REFUSED`].
pub fn refuse(message: fmt::Arguments<'_>) -> ! {
    line(message);
    // SAFETY: ends the process without running PostgreSQL's exit handlers, which must not act in this state.
    unsafe { libc::_exit(vfs_abi::EXIT_REFUSED) }
}

/// Reports `message` and ends this process with [`vfs_abi::EXIT_FENCED`]: to the postmaster a crash, which ends them all.
pub fn end(message: fmt::Arguments<'_>) -> ! {
    line(message);
    // SAFETY: as in `refuse`.
    unsafe { libc::_exit(vfs_abi::EXIT_FENCED) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line that is too long is cut and still ends in a newline.
    #[test]
    fn long_lines_are_cut() {
        let mut line = Line { bytes: [0; LINE_BYTES_MAX], used: 0 };
        for _ in 0..300 {
            assert!(line.write_str("12345678").is_ok());
        }
        assert_eq!(LINE_BYTES_MAX - 1, line.used);
    }
}
