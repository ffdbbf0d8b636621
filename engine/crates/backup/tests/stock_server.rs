//! The judge of a plan is stock PostgreSQL: data directories that are made by plans, from the files of a server and its log
//! up to some record, start without recovery and are what the server was.
//!
//! The server is stopped cleanly, so that its files are those as of its last record, and its shutdown checkpoint is taken
//! off: the synthetic one takes its place. PostgreSQL is found as `../../wal/tests/postgres/mod.rs` says.

#[path = "../../shard/tests/harness/files.rs"]
#[allow(dead_code, reason = "the other crate uses more")]
mod files;
#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;

use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use backup::{Plan, RelationPages, Source, plan};
use files::Files;
use layers::{Key, Metadata};
use metadata::Counters;
use pgformat::{ControlFile, segment_file_name};
use pgtypes::{FrameSummary, Lsn, PgTimeline};
use postgres::{Directory, Postgres, Server, output};
use shard::Advisory;
use wal::{Fork, PAGE_BYTES, RecordInfo, Scanner, page_header_bytes};

const SEGMENT: u64 = 1 << 20;
const SETTINGS: &str = "fsync = off\nfull_page_writes = off\nwal_keep_size = 10GB\nmax_prepared_transactions = 20\n\
    autovacuum = off\ncheckpoint_timeout = 1h\nwal_level = replica\nbgwriter_delay = 10s\n";

const WORKLOAD: &str = "
    create extension amcheck;
    create table t (i int primary key, k int, s text);
    insert into t select g, g % 10, repeat('x', 200) from generate_series(1, 5000) g;
    update t set k = k + 1 where i % 3 = 0;
    delete from t where i % 7 = 0;
    vacuum (freeze) t;
    create index on t using gin (string_to_array(s, 'x'));
    create unlogged table u (i int primary key, s text);
    insert into u select g, repeat('y', 100) from generate_series(1, 3000) g;
    create unlogged sequence us;
    select nextval('us');
    create sequence q;
    select nextval('q');
    create database other;
    begin; insert into t values (-1, 0); savepoint a; insert into t values (-2, 0); prepare transaction 'open';
    begin; insert into t values (-3, 0); rollback;
    create table never_read (i int);
    begin; insert into never_read values (1); rollback;
    begin; select i from t where i between 1 and 5 for share; prepare transaction 'locks';
    begin; select i from t where i between 1 and 5 for key share; savepoint a; select i from t where i = 2 for share; commit;
    select pg_replication_origin_create('a');
    select pg_replication_origin_advance('a', '0/5000');
    vacuum full pg_class;
";

/// What must be the same before and after.
const FACTS: &str = "select count(*), sum(i), sum(k), sum(length(s)) from t union all
    select count(*), 0, 0, 0 from pg_prepared_xacts union all
    select count(*), 0, 0, 0 from pg_database union all
    select (remote_lsn - '0/0')::bigint, 0, 0, 0 from pg_replication_origin_status";

/// Where X is put: place in its page, and which page.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// This place of any page within a segment.
    InPage(u64),
    /// So many bytes before the end of a segment.
    BeforeSegmentEnd(u64),
}

impl Place {
    fn is(self, x: Lsn) -> bool {
        match self {
            Place::InPage(offset) => x.offset_in(PAGE_BYTES) == offset && x.offset_in(SEGMENT) >= PAGE_BYTES,
            Place::BeforeSegmentEnd(bytes) => (x.0 + bytes).is_multiple_of(SEGMENT),
        }
    }

    /// The first such position that is at least `bytes` behind `lsn`.
    fn after(self, lsn: Lsn, bytes: u64) -> Lsn {
        let mut x = lsn.advance(bytes).align8();
        while !self.is(x) {
            x = x.advance(8);
        }
        x
    }
}

/// Everything a plan needs, at the end of the log.
struct End {
    summary: FrameSummary,
    page_before: Vec<u8>,
}

/// The whole log of a server, from the checkpoint of `initdb` up to the record before its last.
fn end_of_log(data: &Path, base: &ControlFile) -> End {
    let control = control(data);
    let begin = base.checkpoint_lsn.floor(SEGMENT);
    let timeline = base.checkpoint.timeline;
    let mut scanner = Scanner::at_segment_start(begin, SEGMENT, 0, timeline).with_system_id(base.system_id);
    let mut last: Option<RecordInfo> = None;
    let mut log = Vec::new();
    while scanner.position() < control.checkpoint_lsn {
        let position = scanner.position();
        let name = |timeline| segment_file_name(timeline, position.0 / SEGMENT, SEGMENT);
        let path = |timeline| data.join("pg_wal").join(name(timeline));
        // Of the newest timeline: it begins with what the one before had written.
        let path = [control.checkpoint.timeline, timeline].map(path).into_iter().find(|path| path.exists());
        let mut bytes = fs::read(path.expect("a segment")).expect("a readable segment");
        // Up to the checkpoint, or to the start of its page, in whose header a record cannot end.
        let x = control.checkpoint_lsn;
        let x = match x.offset_in(PAGE_BYTES) == page_header_bytes(x.floor(PAGE_BYTES), SEGMENT) as u64 {
            true => x.floor(PAGE_BYTES),
            false => x,
        };
        if position == x {
            break;
        }
        bytes.truncate(x.bytes_since(position).min(SEGMENT) as usize);
        scanner.feed(&bytes, |record| last = Some(*record)).expect("the server's WAL");
        log = bytes;
    }
    let summary = scanner.summary();
    assert_eq!(summary.record_end, last.expect("records").end);
    assert_eq!(summary.record_end, scanner.position(), "the checkpoint is behind the last record");
    let in_page = summary.record_end.offset_in(PAGE_BYTES) as usize;
    End { summary, page_before: log[log.len() - in_page..].to_vec() }
}

fn control(data: &Path) -> ControlFile {
    ControlFile::parse(&fs::read(data.join("global/pg_control")).expect("a control file")).expect("PostgreSQL 17")
}

/// History files of a server's timelines.
fn histories(data: &Path) -> Vec<(PgTimeline, Vec<u8>)> {
    let read = |number| Some((PgTimeline(number), fs::read(data.join(format!("pg_wal/{number:08X}.history"))).ok()?));
    (2..=control(data).checkpoint.timeline.0).filter_map(read).collect()
}

/// What page servers would give as of the end of the log. `template`: any earlier `pg_control`.
fn metadata_of(files: &Files, data: &Path, template: &[u8], counters: &Counters) -> Vec<(Key, Vec<u8>)> {
    let mut values = vec![(Key::metadata(Metadata::Checkpoint), counters.to_bytes())];
    for (database, map) in &files.maps {
        let (tablespace, database) = (database.tablespace, database.database);
        values.push((Key::metadata(Metadata::RelationMap { tablespace, database }), map.clone()));
        if database != 0 {
            values.push((Key::metadata(Metadata::Database { tablespace, database }), vec![]));
        }
    }
    values.extend(files.slru_pages.iter().map(|((slru, page), bytes)| (Key::slru(*slru, *page), bytes.clone())));
    let two_phase = files.two_phase.iter();
    values.extend(two_phase.map(|(xid, file)| (Key::metadata(Metadata::TwoPhase(*xid)), file.clone())));
    let origins = files.origins.0.iter();
    values.extend(origins.map(|(id, lsn)| (Key::metadata(Metadata::Origin(*id)), lsn.0.to_le_bytes().to_vec())));
    let mut advisory = vec![Advisory { name: "global/pg_control".to_owned(), contents: template.to_vec() }];
    for name in ["PG_VERSION", "postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"] {
        advisory.push(Advisory { name: name.to_owned(), contents: fs::read(data.join(name)).expect("a file") });
    }
    // A server would wait for a primary.
    advisory.push(Advisory { name: "standby.signal".to_owned(), contents: vec![] });
    values.extend(advisory.iter().map(|file| (file.key(), file.to_bytes().expect("a short file"))));
    values
}

/// Makes the data directory of a plan; pages come from the files of the server.
fn build(plan: &Plan, files: &Files, data: &Path) {
    fs::create_dir(data).expect("a new directory");
    for directory in &plan.directories {
        fs::create_dir(data.join(directory)).expect("a new directory");
    }
    for file in plan.files.iter().chain([&plan.control_file()]) {
        fs::write(data.join(&file.path), &file.contents).expect("a written file");
    }
    for file in &plan.relations {
        let fork = match file.pages {
            RelationPages::Service => file.fork,
            RelationPages::CopyOfInit => Fork::Init,
        };
        let bytes = &files.forks[&(file.relation, fork)];
        let begin = (u64::from(file.segment) * u64::from(plan.segment_blocks) * PAGE_BYTES) as usize;
        let bytes = &bytes[begin..begin + file.blocks as usize * PAGE_BYTES as usize];
        fs::write(data.join(&file.path), bytes).expect("a written file");
    }
    for file in &plan.checkpoint.files {
        let to = fs::File::create(data.join(&file.path)).expect("a new file");
        to.set_len(file.length).expect("a hole");
        file.pieces.iter().for_each(|piece| to.write_all_at(&piece.bytes, piece.offset).expect("written bytes"));
    }
    fs::set_permissions(data, fs::Permissions::from_mode(0o700)).expect("own directory");
}

/// Stops the server with X at `place`.
fn stop_at(server: &mut Server<'_>, place: Place) {
    // Reads that set hints, and what a new session does, log nothing the second time.
    server.psql(FACTS);
    let now: Lsn = server.psql("select pg_current_wal_insert_lsn()").trim().parse().expect("a position");
    // Position without the page's header.
    let begin = match now.offset_in(PAGE_BYTES) == page_header_bytes(now.floor(PAGE_BYTES), SEGMENT) as u64 {
        true => now.floor(PAGE_BYTES),
        false => now,
    };
    let x = place.after(begin, 1024);
    let mut usable = x.bytes_since(begin);
    let mut page = Lsn((begin.0).div_ceil(PAGE_BYTES) * PAGE_BYTES);
    while page < x {
        usable -= page_header_bytes(page, SEGMENT) as u64;
        page = page.advance(PAGE_BYTES);
    }
    // Record header, long header of its data, `xl_logical_message`, its prefix with terminator.
    let text = usable - (24 + 5 + 24 + 2);
    server.psql(&format!("select pg_logical_emit_message(false, 'x', repeat('z', {text}))"));
    server.stop("fast");
}

/// A remedy that is switched off, to see that the judge would miss it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Without {
    Nothing,
    /// B3: unlogged relations have no main fork.
    CopiesOfInitForks,
    /// A2: the next transaction id is what the last checkpoint said.
    SummaryOfIds,
}

struct Judge<'a> {
    postgres: &'a Postgres,
    directory: &'a Directory,
    template: Vec<u8>,
    counters: Counters,
    facts: String,
}

impl Judge<'_> {
    /// The plan of what `data` was before its last checkpoint, carried out.
    fn make(&self, data: &Path, without: Without) -> (Plan, PathBuf) {
        let files = Files::load(data);
        let base = ControlFile::parse(&self.template).expect("PostgreSQL 17");
        let mut end = end_of_log(data, &base);
        if without == Without::SummaryOfIds {
            end.summary.max_full_xid = 0;
        }
        let forks: Vec<_> = files
            .forks
            .iter()
            .map(|((relation, fork), bytes)| (*relation, *fork, (bytes.len() as u64 / PAGE_BYTES) as u32))
            .collect();
        let mut plan = plan(Source {
            summary: end.summary,
            metadata: metadata_of(&files, data, &self.template, &self.counters),
            forks: &forks,
            page_before: &end.page_before,
            histories: &histories(data),
            time: control(data).time,
        })
        .expect("a plan");
        assert_eq!(["standby.signal"], &plan.left_out[..]);
        if without == Without::CopiesOfInitForks {
            plan.relations.retain(|file| file.pages != RelationPages::CopyOfInit);
        }
        let built = self.directory.0.join("built");
        build(&plan, &files, &built);
        output(Command::new("chown").arg("-R").arg("--reference").arg(data).arg(&built));
        (plan, built)
    }

    /// Plans, builds and starts; returns X.
    fn judge(&self, data: &Path) -> Lsn {
        let (plan, built) = self.make(data, Without::Nothing);
        let checks = output(self.postgres.command("pg_checksums").arg("--check").arg("-D").arg(&built));
        assert!(checks.contains("Bad checksums:  0"), "{checks}");
        let mut server = self.postgres.server(self.directory, &built);
        server.start();
        self.use_server(&server);
        let log = fs::read_to_string(built.join("server.log")).expect("a log");
        server.stop("fast");
        assert!(log.contains("database system was shut down at"), "{log}");
        for word in ["redo starts", "not properly shut down", "PANIC", "FATAL", "WARNING"] {
            assert!(!log.contains(word), "{log}");
        }
        // The record that the server appended is behind the synthetic one, which is in its log as it was planned.
        let written = fs::read(built.join(&plan.checkpoint.files[0].path)).expect("a segment");
        let at = plan.begin().offset_in(SEGMENT) as usize;
        let length = plan.checkpoint.bytes.len().min(SEGMENT as usize - at);
        assert_eq!(plan.checkpoint.bytes[..length], written[at..at + length]);
        assert!(control(&built).checkpoint_lsn >= plan.end());
        fs::remove_dir_all(&built).expect("a directory that was ours");
        plan.begin()
    }

    /// What a server answers that was made without a remedy.
    fn answer_without(&self, data: &Path, without: Without, statements: &[&str]) -> String {
        let (_, built) = self.make(data, without);
        let mut server = self.postgres.server(self.directory, &built);
        server.start();
        let mut psql = server.client("psql");
        psql.args(["-X", "-A", "-t", "-q"]);
        for sql in statements {
            psql.args(["-c", sql]);
        }
        let result = psql.output().expect("psql runs");
        server.stop("immediate");
        fs::remove_dir_all(&built).expect("a directory that was ours");
        format!("{}{}", String::from_utf8_lossy(&result.stdout), String::from_utf8_lossy(&result.stderr))
    }

    fn use_server(&self, server: &Server<'_>) {
        assert_eq!(self.facts, server.psql(FACTS));
        // B3: unlogged relations are there, empty, and usable.
        assert_eq!("0", server.psql("select count(*) from u").trim());
        server.psql("insert into u values (1, 'a'), (2, 'b')");
        assert_eq!("b", server.psql("set enable_seqscan = off; select s from u where i = 2").trim());
        assert_eq!("1", server.psql("select nextval('us')").trim());
        server.psql("commit prepared 'open'");
        assert_eq!("2", server.psql("select count(*) from t where i in (-1, -2, -3)").trim());
        server.psql("rollback prepared 'locks'");
        server.psql(
            "insert into t values (-4, 0, ''); update t set k = 5 where i < 6; create table v as select * from t",
        );
        assert!(server.psql("select nextval('q')").trim().parse::<u32>().expect("a number") > 1);
        output(server.client("pg_amcheck").args(["--all", "--install-missing", "--heapallindexed", "--on-error-stop"]));
        output(server.client("psql").args(["-X", "-d", "other", "-c", "create table w (i int)"]));
    }
}

#[test]
fn postgresql_starts_from_a_plan_at_any_place_and_is_what_it_was() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &["--data-checksums", "--wal-segsize=1"]);
    server.append_configuration(SETTINGS);
    let data = server.data.clone();
    let template = fs::read(data.join("global/pg_control")).expect("a control file");
    server.start();
    server.script(WORKLOAD);
    let facts = server.psql(FACTS);
    server.stop("fast");
    // Counters as a page server may have them: those of the last checkpoint but for ids, which the summary has.
    let mut counters = Counters::from_control(&control(&data));
    counters.checkpoint.next_full_xid = ControlFile::parse(&template).expect("PostgreSQL 17").checkpoint.next_full_xid;
    let judge = Judge { postgres: &postgres, directory: &directory, template, counters, facts };

    // The record has 114 bytes: whole in the page, cut in its header, in its data, and at a page's and a segment's ends.
    let mut places = vec![Place::InPage(0), Place::BeforeSegmentEnd(0)];
    places.extend([48, 4096, 8072, 8080, 8168, 8184].map(Place::InPage));
    places.extend([8, 24, 112].map(Place::BeforeSegmentEnd));
    for place in places {
        server.start();
        stop_at(&mut server, place);
        let x = judge.judge(&data);
        assert!(place.is(x), "the server logged something between: X is {x}, which is not {place:?}");
        println!("started at {x}: {place:?}");
    }

    // Promoted: X is in the page that began in the timeline before.
    server.start();
    stop_at(&mut server, Place::InPage(4096));
    let switched = control(&data).checkpoint_lsn;
    fs::write(data.join("standby.signal"), "").expect("a written file");
    postgres.own(&data.join("standby.signal"));
    server.start();
    server.psql("select pg_promote()");
    server.stop("fast");
    let x = judge.judge(&data);
    assert_eq!((PgTimeline(2), 1), (control(&data).checkpoint.timeline, histories(&data).len()));
    assert_eq!(switched.floor(PAGE_BYTES), x.floor(PAGE_BYTES));

    let answer = |without, statements: &[&str]| judge.answer_without(&data, without, statements);
    let unlogged = &["select count(*) from u"];
    assert_eq!("0", answer(Without::Nothing, unlogged).trim());
    let error = answer(Without::CopiesOfInitForks, unlogged);
    assert!(error.contains("could not open file"), "{error}");
    // A row that was rolled back comes back when its transaction's id is given again, and commits. Nobody has left a hint.
    let reuse = &[
        "do $$ begin for n in 1..100 loop perform pg_current_xact_id(); commit; end loop; end $$",
        "select count(*) from never_read",
    ];
    assert_eq!("0", answer(Without::Nothing, reuse).trim());
    assert_eq!("1", answer(Without::SummaryOfIds, reuse).trim());
}
