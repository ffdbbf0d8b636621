//! The WAL of a data directory: its segments in order, and the records in them.

use std::{
    error::Error,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use pgtypes::{Lsn, PgTimeline};
use wal::{Decoder, RECORD_BYTES_MAX, Record, Scanner};

use crate::Failed;

/// WAL that is read at a time; PostgreSQL reads a page of it.
const READ_BYTES: usize = 128 << 10;

/// Segments from a position on, oldest first.
pub struct Segments {
    segment_bytes: u64,
    segments: Vec<(Lsn, PathBuf)>,
}

/// Finds the segments of timeline 1 in `directory` that end behind `from`.
///
/// # Errors
/// There are none, or the directory cannot be read.
pub fn of(directory: &Path, from: Lsn) -> Result<Segments, Box<dyn Error>> {
    let mut segments = Vec::new();
    let mut segment_bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().into_string().unwrap_or_default();
        if name.len() == 24 && name.starts_with("00000001") && name.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            segment_bytes = entry.metadata()?.len();
            segments.push((name, entry.path()));
        }
    }
    if segment_bytes == 0 {
        return Err(Failed(format!("{}: no segments of timeline 1", directory.display())).into());
    }
    let mut placed = Vec::new();
    for (name, path) in segments {
        // XLogFileName: timeline, upper and lower half of the segment's number.
        let word = |at: usize| u64::from_str_radix(&name[at..at + 8], 16);
        let begin = Lsn((word(8)? * ((1 << 32) / segment_bytes) + word(16)?) * segment_bytes);
        if begin.advance(segment_bytes) > from {
            placed.push((begin, path));
        }
    }
    placed.sort();
    Ok(Segments { segment_bytes, segments: placed })
}

impl Segments {
    /// Hands every record that starts at or behind `from` to `each`, up to the end of the WAL.
    ///
    /// # Errors
    /// A segment cannot be read, or those of `each`.
    pub fn decode(&self, from: Lsn, mut each: impl FnMut(&Record) -> Result<(), Failed>) -> Result<(), Box<dyn Error>> {
        let Some((first, _)) = self.segments.first() else { return Ok(()) };
        let scanner = Scanner::at_segment_start(*first, self.segment_bytes, 0, PgTimeline(1));
        let mut decoder = Decoder::new(scanner, RECORD_BYTES_MAX);
        let mut bytes = vec![0; READ_BYTES];
        for (begin, path) in &self.segments {
            // Recycled segments lie behind the end.
            if *begin > decoder.position() {
                break;
            }
            let mut file = File::open(path)?;
            loop {
                let count = file.read(&mut bytes)?;
                if count == 0 {
                    break;
                }
                let mut rest = &bytes[..count];
                while !rest.is_empty() {
                    // What is no WAL is behind its end: the server was killed.
                    let Ok(taken) = decoder.feed(rest) else { return Ok(()) };
                    rest = &rest[taken..];
                    if let Some(record) = decoder.poll_record().filter(|record| record.info.start >= from) {
                        each(&record)?;
                    }
                }
            }
        }
        Ok(())
    }
}
