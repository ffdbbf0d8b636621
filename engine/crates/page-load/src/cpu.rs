//! CPU time of a process, from /proc.

use std::{fs, io};

/// `USER_HZ`, in which /proc counts: 100 on every Linux of ours.
const TICKS_PER_SECOND: f64 = 100.0;

/// Seconds of user and system time of all threads of a process, those that ended included, in steps of 10 ms.
///
/// # Errors
/// There is no such process.
pub fn seconds(pid: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; utime and stime are the 12th and 13th field behind it.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS_PER_SECOND)
}
