//! `redo-load`: replays the WAL of a stopped server on pages in memory, for the benchmark of redo (P9).
//!
//! Does what PostgreSQL's startup process does in a recovery and nothing else: reads WAL, decodes every record, and applies it
//! to its pages, which are read from PGDATA when they are first touched. Prints one line of JSON. Writes nothing. Only the kinds
//! of events that the benchmark's WAL has are followed: a record that drops or cuts a relation is refused.
#![forbid(unsafe_code)]

mod pages;
mod segments;

use std::{error::Error, fs, io, path::PathBuf, time::Instant};

use clap::Parser;
use pages::Pages;
use pgtypes::Lsn;
use redo::{Context, Event, apply, blocks_of, events_of};
use wal::Record;

/// Replays `PGDATA/pg_wal` from a position to its end.
#[derive(Parser)]
struct Arguments {
    /// Data directory of a server that was killed, as of a checkpoint that wrote everything.
    #[arg(long)]
    pgdata: PathBuf,
    /// The checkpoint's redo position; WAL is read from the start of its segment.
    #[arg(long)]
    from: Lsn,
}

/// What went wrong, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let segments = segments::of(&arguments.pgdata.join("pg_wal"), arguments.from)?;
    let mut replay = Replay { pages: Pages::new(arguments.pgdata), records: 0, touches: 0 };
    let begun = Instant::now();
    let cpu_begun = cpu_nanoseconds()?;
    let mut end = arguments.from;
    segments.decode(arguments.from, |record| {
        end = record.info.end;
        replay.record(record)
    })?;
    let cpu = cpu_nanoseconds()? - cpu_begun;
    println!(
        "{}",
        serde_json::json!({
            "records": replay.records,
            "touches": replay.touches,
            "pages": replay.pages.count(),
            "wal_bytes": end.bytes_since(arguments.from),
            "seconds": begun.elapsed().as_secs_f64(),
            "cpu_seconds": cpu as f64 / 1e9,
        })
    );
    Ok(())
}

/// CPU time of this thread, user and system.
fn cpu_nanoseconds() -> io::Result<u64> {
    let schedstat = fs::read_to_string("/proc/thread-self/schedstat")?;
    let first = schedstat.split_whitespace().next().and_then(|field| field.parse().ok());
    first.ok_or_else(|| io::Error::other("no time in /proc/thread-self/schedstat"))
}

struct Replay {
    pages: Pages,
    records: u64,
    touches: u64,
}

impl Replay {
    fn record(&mut self, record: &Record) -> Result<(), Failed> {
        self.records += 1;
        for event in events_of(record) {
            if !matches!(event, Event::CreateFork(..)) {
                return Err(Failed(format!("{}: {event:?} is not followed here", record.info.start)));
            }
        }
        for touch in blocks_of(record) {
            self.touches += 1;
            let page = self.pages.page(touch.tag).map_err(|error| Failed(format!("{:?}: {error}", touch.tag)))?;
            apply(record, &touch, page, &Context { hint_bits_logged: true })
                .map_err(|error| Failed(format!("{}, {:?}: {error}", record.info.start, touch.tag)))?;
        }
        Ok(())
    }
}
