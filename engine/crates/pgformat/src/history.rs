//! Timeline history files (`NNNNNNNN.history`): from which timelines a timeline descends, and where each ended.
//!
//! Source: `readTimeLineHistory` and `writeTimeLineHistory` (`access/transam/timeline.c`).

use alloc::{format, string::String, vec::Vec};

use pgtypes::{Lsn, PgTimeline};
use thiserror::Error;

/// Longest file that is read: 1 MiB holds more than 10,000 promotions.
pub const HISTORY_FILE_BYTES_MAX: usize = 1 << 20;

/// A timeline's ancestors.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HistoryFile {
    /// Oldest first; timelines rise.
    pub entries: Vec<HistoryEntry>,
}

/// One ancestor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HistoryEntry {
    /// The ancestor.
    pub timeline: PgTimeline,
    /// Where it ends, and the next timeline begins.
    pub end_lsn: Lsn,
    /// Why, in words for people.
    pub reason: String,
}

/// A line that is not part of a history.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("timeline history, line {line}: {fault}")]
pub struct HistoryError {
    /// From 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong with it.
    pub fault: HistoryFault,
}

/// What is wrong with a line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum HistoryFault {
    /// The file is longer than [`HISTORY_FILE_BYTES_MAX`].
    #[error("longer than {HISTORY_FILE_BYTES_MAX} bytes")]
    TooLong,
    /// The first field is no number.
    #[error("expected a timeline number")]
    Timeline,
    /// The second field is no position.
    #[error("expected a position behind the timeline")]
    Position,
    /// The timeline is not higher than the one before, or not lower than the file's own.
    #[error("timelines do not rise")]
    Order,
}

impl HistoryFile {
    /// Reads the history file of `timeline`.
    ///
    /// Empty lines and comments (`#`) are passed over, as PostgreSQL does.
    ///
    /// # Errors
    /// At the first line that PostgreSQL would refuse.
    pub fn parse(timeline: PgTimeline, file: &[u8]) -> Result<HistoryFile, HistoryError> {
        let error = |line, fault| HistoryError { line, fault };
        if file.len() > HISTORY_FILE_BYTES_MAX {
            return Err(error(0, HistoryFault::TooLong));
        }
        let mut entries: Vec<HistoryEntry> = Vec::new();
        for (index, line) in file.split(|byte| *byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line[0] == b'#' {
                continue;
            }
            let (number, behind) = field(line);
            let (position, reason) = field(behind);
            let number = parse_decimal(number).ok_or(error(index + 1, HistoryFault::Timeline))?;
            let end_lsn = str::from_utf8(position).ok().and_then(|position| position.parse().ok());
            let end_lsn = end_lsn.ok_or(error(index + 1, HistoryFault::Position))?;
            if number >= timeline.0 || entries.last().is_some_and(|last| last.timeline.0 >= number) {
                return Err(error(index + 1, HistoryFault::Order));
            }
            let reason = String::from_utf8_lossy(reason).into_owned();
            entries.push(HistoryEntry { timeline: PgTimeline(number), end_lsn, reason });
        }
        Ok(HistoryFile { entries })
    }

    /// The file's bytes in PostgreSQL's form: an empty line between entries.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = Vec::new();
        for (index, entry) in self.entries.iter().enumerate() {
            if index > 0 {
                file.push(b'\n');
            }
            file.extend_from_slice(line(entry).as_bytes());
        }
        file
    }

    /// The ancestor that WAL at `lsn` belongs to; `None` when it is of the file's own timeline
    /// (`tliOfPointInHistory`).
    pub fn ancestor_at(&self, lsn: Lsn) -> Option<PgTimeline> {
        self.entries.iter().find(|entry| lsn < entry.end_lsn).map(|entry| entry.timeline)
    }
}

/// Splits a line at its first blanks.
fn field(line: &[u8]) -> (&[u8], &[u8]) {
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    (&line[..end], line[end..].trim_ascii_start())
}

fn parse_decimal(digits: &[u8]) -> Option<u32> {
    // `parse` alone would take a sign.
    if digits.iter().all(u8::is_ascii_digit) { str::from_utf8(digits).ok()?.parse().ok() } else { None }
}

fn line(entry: &HistoryEntry) -> String {
    // A line break in the reason would begin an entry.
    let reason = entry.reason.replace('\n', " ");
    format!("{}\t{}\t{}\n", entry.timeline.0, entry.end_lsn, reason)
}

/// History file of a timeline that branches off `parent.timeline` at `parent.end_lsn`, byte for byte as PostgreSQL
/// writes it. `parent_file` is the parent's own file, `None` for the first timeline.
pub fn child_history_file(parent_file: Option<&[u8]>, parent: &HistoryEntry) -> Vec<u8> {
    let mut file = Vec::new();
    if let Some(parent_file) = parent_file {
        file.extend_from_slice(parent_file);
        file.push(b'\n');
    }
    file.extend_from_slice(line(parent).as_bytes());
    file
}

/// `NNNNNNNN.history`.
pub fn history_file_name(timeline: PgTimeline) -> String {
    format!("{:08X}.history", timeline.0)
}

/// Timeline of a history file, or `None` when `name` is no history file's.
pub fn parse_history_file_name(name: &str) -> Option<PgTimeline> {
    let digits = name.strip_suffix(".history")?;
    let plain = |digit: u8| digit.is_ascii_digit() || (b'A'..=b'F').contains(&digit);
    if digits.len() != 8 || !digits.bytes().all(plain) {
        return None;
    }
    u32::from_str_radix(digits, 16).ok().map(PgTimeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(timeline: u32, end_lsn: u64, reason: &str) -> HistoryEntry {
        HistoryEntry { timeline: PgTimeline(timeline), end_lsn: Lsn(end_lsn), reason: reason.into() }
    }

    #[test]
    fn file_of_postgresql_is_read_and_written_alike() {
        let file = b"1\t0/3000148\tno recovery target specified\n\n3\tA/5000000\tat restore point \"x y\"\n";
        let history = HistoryFile::parse(PgTimeline(4), file).expect("a valid file");
        let expected =
            [entry(1, 0x300_0148, "no recovery target specified"), entry(3, 0xA_0500_0000, "at restore point \"x y\"")];
        assert_eq!(&expected[..], &history.entries[..]);
        assert_eq!(&file[..], &history.to_bytes()[..]);
        let parent = child_history_file(None, &expected[0]);
        assert_eq!(&file[..], &child_history_file(Some(&parent), &expected[1])[..]);
    }

    #[test]
    fn comments_and_blanks_are_passed_over() {
        let file = b"# made by hand\n\n  \t\r\n 1  0/10\r\n2\t0/20\t\n";
        let history = HistoryFile::parse(PgTimeline(3), file).expect("a valid file");
        assert_eq!([entry(1, 0x10, ""), entry(2, 0x20, "")], history.entries[..]);
    }

    #[test]
    fn malformed_lines_are_refused() {
        for (file, line, fault) in [
            (&b"x\t0/10\tr\n"[..], 1, HistoryFault::Timeline),
            (b"1\t0/10\tr\n\n4294967296\t0/10\n", 3, HistoryFault::Timeline),
            (b"1\n", 1, HistoryFault::Position),
            (b"1\t010\tr\n", 1, HistoryFault::Position),
            (b"2\t0/10\tr\n2\t0/20\tr\n", 2, HistoryFault::Order),
            (b"9\t0/10\tr\n", 1, HistoryFault::Order),
        ] {
            assert_eq!(Err(HistoryError { line, fault }), HistoryFile::parse(PgTimeline(9), file));
        }
        let long = alloc::vec![b'\n'; HISTORY_FILE_BYTES_MAX + 1];
        let error = HistoryError { line: 0, fault: HistoryFault::TooLong };
        assert_eq!(Err(error), HistoryFile::parse(PgTimeline(9), &long));
    }

    #[test]
    fn ancestor_ends_where_the_next_timeline_begins() {
        let history = HistoryFile { entries: alloc::vec![entry(1, 0x10, ""), entry(2, 0x20, "")] };
        let at = |lsn| history.ancestor_at(Lsn(lsn)).map(|timeline| timeline.0);
        assert_eq!([Some(1), Some(2), None], [at(0xF), at(0x10), at(0x20)]);
    }

    #[test]
    fn names_round_trip() {
        assert_eq!("0000002A.history", history_file_name(PgTimeline(42)));
        assert_eq!(Some(PgTimeline(42)), parse_history_file_name("0000002A.history"));
        for name in ["2A.history", "0000002a.history", "0000002A", "0000002A.history.x", "+000002A.history"] {
            assert_eq!(None, parse_history_file_name(name), "{name}");
        }
    }
}
