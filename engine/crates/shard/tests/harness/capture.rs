//! One life of a PostgreSQL server: the files that it began with, its WAL, and the files that it left.

use std::{collections::BTreeMap, fs, path::Path};

use filter::{Cutter, Routed, Router};
use layers::{HashRange, Striping};
use pgtypes::{FrameSummary, Lsn, PgTimeline, Term};
use wal::{Decoder, RECORD_BYTES_MAX, Scanner};

use super::files::Files;
use crate::{
    postgres::{Directory, Postgres, Server, output},
    workload,
};

/// Small enough that relations of a test have many stripes.
pub const STRIPING: Striping = Striping { stripe_blocks: 64 };

/// A clean shutdown.
pub struct Moment {
    /// End of its checkpoint's record.
    pub lsn: Lsn,
    pub files: Files,
    /// Resource manager that says how to mask pages, by database and file number (`pg_class`, `pg_am`).
    pub access_methods: BTreeMap<(u32, u32), u8>,
    /// A stock recovery that was stopped there made the files: what WAL does not define is the same, too.
    pub is_recovery: bool,
}

pub struct Capture {
    pub base: Files,
    /// After each part of the server's life.
    pub moments: Vec<Moment>,
    /// Bytes from the start of a segment on.
    pub wal: (Lsn, Vec<u8>),
    pub segment_bytes: u64,
    /// What the log adds up to at the end of the base.
    pub from: FrameSummary,
}

/// A part of a server's life, at the end of which it runs.
pub type Part = fn(&Postgres, &mut Server<'_>);

impl Capture {
    pub fn take(settings: &str, parts: &[Part]) -> Capture {
        let postgres = Postgres::find();
        let directory = postgres.directory();
        let mut server = new_server(&postgres, &directory, settings);
        let base = Files::load(&server.data);

        let mut ends = Vec::new();
        for part in parts {
            server.start();
            part(&postgres, &mut server);
            let access_methods = access_methods(&server);
            server.stop("fast");
            output(postgres.command("pg_checksums").arg("--check").arg("-D").arg(&server.data));
            ends.push((Files::load(&server.data), access_methods));
        }

        let mut capture = Capture::of(base, &server.data);
        let moments = ends.into_iter().map(|(files, access_methods)| Moment {
            lsn: summary_of_shutdown(&files, &capture.wal, capture.segment_bytes).record_end,
            files,
            access_methods,
            is_recovery: false,
        });
        capture.moments = moments.collect();
        capture
    }

    /// A life without moments, of the server whose directory is `data`.
    pub fn of(base: Files, data: &Path) -> Capture {
        let wal = read_wal(&data.join("pg_wal"), &base);
        let segment_bytes = u64::from(base.control.segment_bytes);
        let from = summary_of_shutdown(&base, &wal, segment_bytes);
        Capture { base, moments: Vec::new(), wal, segment_bytes, from }
    }

    /// Everything that some shard needs of the WAL.
    pub fn records(&self) -> Vec<Routed> {
        let mut router = Router::new(self.from, self.segment_bytes, STRIPING);
        let (start, bytes) = &self.wal;
        let mut rest = &bytes[self.from.record_end.bytes_since(*start) as usize..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            // Behind the end lie zeros, or an old segment.
            let Ok(taken) = router.feed(rest) else { break };
            rest = &rest[taken..];
            records.extend(router.poll());
        }
        records
    }
}

/// A server that was shut down, whose WAL can be recovered from here on.
pub fn new_server<'a>(postgres: &'a Postgres, directory: &Directory, settings: &str) -> Server<'a> {
    let mut server = postgres.initdb(directory, "data", &["--data-checksums", "--wal-segsize=4"]);
    server.append_configuration(settings);
    workload::move_on(postgres, &server);
    // `pg_resetwal` says that WAL was minimal.
    server.start();
    server.script("update pg_database set datallowconn = true where datname = 'template0'");
    server.stop("fast");
    server
}

/// Batches of one shard that are cut where `is_cut` says, after each record.
pub fn batches(
    from: FrameSummary,
    records: &[Routed],
    range: HashRange,
    mut is_cut: impl FnMut() -> bool,
    mut each: impl FnMut(filter::Batch),
) {
    let mut cutter = Cutter::new(from, range, STRIPING);
    for record in records {
        cutter.push(record);
        if is_cut() {
            each(cutter.take_batch(record.summary.record_end, Term(1)).expect("a record has ended"));
        }
    }
    let end = cutter.through();
    cutter.take_batch(end, Term(1)).into_iter().for_each(each);
}

fn segment_name(segment: u64, segment_bytes: u64) -> String {
    let per_id = (1 << 32) / segment_bytes;
    format!("00000001{:08X}{:08X}", segment / per_id, segment % per_id)
}

fn read_wal(directory: &Path, base: &Files) -> (Lsn, Vec<u8>) {
    let segment_bytes = u64::from(base.control.segment_bytes);
    let start = base.control.checkpoint_lsn.floor(segment_bytes);
    let mut wal = Vec::new();
    for segment in start.0 / segment_bytes.. {
        let Ok(bytes) = fs::read(directory.join(segment_name(segment, segment_bytes))) else { break };
        wal.extend(bytes);
    }
    (start, wal)
}

fn summary_of_shutdown(files: &Files, wal: &(Lsn, Vec<u8>), segment_bytes: u64) -> FrameSummary {
    let checkpoint = files.control.checkpoint_lsn;
    let max_full_xid = files.control.checkpoint.next_full_xid - 1;
    let scanner = Scanner::at_segment_start(wal.0, segment_bytes, max_full_xid, PgTimeline(1));
    let mut decoder = Decoder::new(scanner, RECORD_BYTES_MAX);
    let mut rest = &wal.1[..];
    loop {
        let taken = decoder.feed(rest).expect("WAL up to the checkpoint");
        assert!(taken > 0, "no record at {checkpoint}");
        rest = &rest[taken..];
        if decoder.poll_record().is_some_and(|record| record.info.start == checkpoint) {
            return decoder.summary();
        }
    }
}

/// Of every relation with files, in every database.
fn access_methods(server: &Server<'_>) -> BTreeMap<(u32, u32), u8> {
    let query = "select case when c.reltablespace = 1664 then 0 else (select oid from pg_database \
                 where datname = current_database()) end, pg_relation_filenode(c.oid), \
                 case when c.relkind = 'S' then 'sequence' else am.amhandler::regproc::text end \
                 from pg_class c left join pg_am am on am.oid = c.relam where pg_relation_filenode(c.oid) is not null";
    let mut methods = BTreeMap::new();
    for database in server.psql("select datname from pg_database").lines() {
        let mut command = server.client("psql");
        command.args(["-X", "-q", "-A", "-t", "-F", ",", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", query]);
        for line in output(&mut command).lines() {
            let fields: Vec<&str> = line.split(',').collect();
            let number = |at: usize| fields[at].parse::<u32>().expect("a number");
            let rmgr = match fields[2] {
                "heap_tableam_handler" => 10,
                "bthandler" => 11,
                "hashhandler" => 12,
                "ginhandler" => 13,
                "gisthandler" => 14,
                "sequence" => 15,
                "spghandler" => 16,
                "brinhandler" => 17,
                "blhandler" => 20,
                other => panic!("access method {other}"),
            };
            methods.insert((number(0), number(1)), rmgr);
        }
    }
    methods
}
