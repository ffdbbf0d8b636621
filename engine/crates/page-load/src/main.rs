//! `page-load`: a reader without PostgreSQL, for the benchmarks of one page server (P6, P7, P8, P14).
//!
//! Keeps a fixed number of requests for random blocks of one relation in flight over one connection, checks every page that
//! arrives, and prints one line of JSON. One thread and blocking calls, as the yardstick's client: what a client of its own
//! costs is then the same on both sides. Knows nothing about shards: the relation lies on the server that is asked.
#![forbid(unsafe_code)]

mod connection;
mod cpu;
mod measure;

use std::{error::Error, path::PathBuf, time::Duration};

use clap::Parser;
use connection::Connection;
use layers::{ShardGeneration, ShardId};
use measure::Measure;
use pgtypes::{LogId, Lsn, SystemId};
use wal::{Fork, RelFileLocator};
use wire::page::{
    GetPages, NEWEST, PAGE_BYTES, PAGES_MAX, PageHello, PageMessage, Pages, ReaderRole, encode, encode_to_vec,
};

/// Requests in flight at most: what a page server works on for one connection.
const DEPTH_MAX: usize = 1024;

/// Reads random blocks of one relation from one page server.
#[derive(Parser)]
struct Arguments {
    /// `host:port` of the page protocol.
    #[arg(long)]
    address: String,
    /// `cluster/branch`.
    #[arg(long)]
    log: LogId,
    /// Number of the shard at `address`.
    #[arg(long, default_value_t = 0)]
    shard: u32,
    /// `tablespace/database/relation`, as numbers.
    #[arg(long, value_parser = relation)]
    relation: RelFileLocator,
    /// The relation's first blocks, of which one is taken at random for each request.
    #[arg(long)]
    blocks: u32,
    /// Blocks of one request; above 1, requests begin at multiples of it.
    #[arg(long, default_value_t = 1)]
    count: u16,
    /// Another number takes other blocks: those of a run before may be in memory still.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Requests in flight.
    #[arg(long, default_value_t = 1)]
    depth: usize,
    /// Reads every block once before the clock starts, so that all are where the server keeps them.
    #[arg(long)]
    warm_up: bool,
    /// Seconds that are measured, after a quarter of a second that is not.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Process id of the server: its CPU time is reported.
    #[arg(long)]
    pid: Option<u32>,
    /// Directory of `ca.pem`, `NAME.pem` and `NAME.key`; without it the connection is plain TCP.
    #[arg(long, requires = "tls_name")]
    tls_dir: Option<PathBuf>,
    /// NAME in `--tls-dir`.
    #[arg(long)]
    tls_name: Option<String>,
}

/// The server did something else than answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unexpected(pub String);

fn relation(text: &str) -> Result<RelFileLocator, String> {
    let numbers: Result<Vec<u32>, _> = text.split('/').map(str::parse).collect();
    match numbers.map_err(|error| error.to_string())?[..] {
        [tablespace, database, relation] => Ok(RelFileLocator { tablespace, database, relation }),
        _ => Err("not tablespace/database/relation".to_owned()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let is_sane = (1..=DEPTH_MAX).contains(&arguments.depth) && (1..=PAGES_MAX).contains(&arguments.count);
    if !is_sane || arguments.blocks < u32::from(arguments.count) {
        return Err(Unexpected(format!("--depth up to {DEPTH_MAX}, --count up to {PAGES_MAX} and --blocks")).into());
    }
    let mut load = Load::open(&arguments)?;
    if arguments.warm_up {
        load.read_all()?;
    }
    println!("{}", load.run()?);
    Ok(())
}

/// A reader and its requests.
struct Load<'a> {
    arguments: &'a Arguments,
    connection: Connection,
    /// Requests that are to be sent.
    requests: Vec<u8>,
    random: u64,
}

impl<'a> Load<'a> {
    fn open(arguments: &'a Arguments) -> Result<Load<'a>, Box<dyn Error>> {
        let tls = arguments.tls_dir.as_deref().zip(arguments.tls_name.as_deref());
        let mut connection = Connection::open(&arguments.address, tls)?;
        let hello = PageHello {
            log: arguments.log,
            system_id: SystemId(0),
            shard: ShardId(arguments.shard),
            generation: ShardGeneration(0),
            role: ReaderRole::Tool,
        };
        connection.send(&encode_to_vec(&PageMessage::PageHello(hello))?)?;
        let mut is_welcome = false;
        while !is_welcome {
            connection.receive(|message| match message {
                PageMessage::PageWelcome(_) => {
                    is_welcome = true;
                    Ok(())
                }
                other => Err(Unexpected(format!("no welcome: {other:?}"))),
            })?;
        }
        // Spread over all bits, and never 0, where xorshift would stay.
        let random = arguments.seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Ok(Load { arguments, connection, requests: Vec::new(), random })
    }

    /// Queues the request `id` for `count` blocks.
    fn ask(&mut self, id: u64, first_block: u32, count: u16) -> Result<(), Box<dyn Error>> {
        let get = GetPages {
            id,
            relation: self.arguments.relation,
            fork: Fork::Main,
            first_block,
            count,
            request_lsn: NEWEST,
            not_modified_since: Lsn::INVALID,
        };
        encode(&PageMessage::GetPages(get), &mut self.requests)?;
        Ok(())
    }

    fn send(&mut self) -> Result<(), Box<dyn Error>> {
        if !self.requests.is_empty() {
            self.connection.send(&self.requests)?;
            self.requests.clear();
        }
        Ok(())
    }

    /// Waits for answers; returns their requests.
    fn answers(&mut self, blocks: usize) -> Result<Vec<u64>, Box<dyn Error>> {
        let mut ids = Vec::new();
        self.connection.receive(|message| match message {
            PageMessage::Pages(pages) => {
                check(&pages, blocks)?;
                ids.push(pages.id);
                Ok(())
            }
            PageMessage::PageProgress(_) => Ok(()),
            other => Err(Unexpected(format!("no pages: {other:?}"))),
        })?;
        Ok(ids)
    }

    /// Every block once.
    fn read_all(&mut self) -> Result<(), Box<dyn Error>> {
        for block in 0..self.arguments.blocks {
            self.ask(u64::from(block) + 1, block, 1)?;
            self.send()?;
            while self.answers(1)?.is_empty() {}
        }
        Ok(())
    }

    /// Marsaglia's xorshift, as the yardstick's client has it.
    fn random_block(&mut self) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let count = u64::from(self.arguments.count);
        let places = u64::from(self.arguments.blocks) / count;
        u32::try_from(self.random % places * count).expect("below the number of blocks, which is a u32")
    }

    fn run(&mut self) -> Result<serde_json::Value, Box<dyn Error>> {
        let Arguments { depth, count, seconds, pid, .. } = *self.arguments;
        let mut measure = Measure::new(depth, Duration::from_secs_f64(seconds), pid)?;
        for id in 1..=depth as u64 {
            let block = self.random_block();
            self.ask(id, block, count)?;
            measure.asked(id);
        }
        self.send()?;
        while measure.goes_on()? {
            let ids = self.answers(usize::from(count))?;
            measure.answered(&ids)?;
            for id in ids {
                let block = self.random_block();
                self.ask(id, block, count)?;
                measure.asked(id);
            }
            self.send()?;
        }
        Ok(measure.into_json(count)?)
    }
}

fn check(pages: &Pages<'_>, blocks: usize) -> Result<(), Unexpected> {
    if pages.bytes.len() != blocks * PAGE_BYTES || !pages.is_intact() {
        return Err(Unexpected(format!("answer {} is no answer of {blocks} blocks, or damaged", pages.id)));
    }
    Ok(())
}
