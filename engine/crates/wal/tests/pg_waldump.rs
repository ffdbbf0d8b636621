//! Oracle: every record of real WAL against what `pg_waldump` says about it, and transaction ids against recovery.
//!
//! `LAKEBASE_TEST_WAL` names a directory that `tests/wal/regress_wal.sh` made; it is compared on top of the WAL that
//! these tests make themselves. PostgreSQL is found as `postgres/mod.rs` says.

mod postgres;

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use pgtypes::{FrameSummary, Lsn, PgTimeline};
use postgres::{ControlData, Directory, Postgres, Server, output};
use wal::{
    BlockRef, Compression, Decoder, Fork, RECORD_BYTES_MAX, Record, Scanner, WalErrorKind, restore_image, rmgr_name,
    xlog_info,
};

/// Images that one run of `pg_waldump --save-fullpage` writes: 40 MB of files at a time.
const IMAGES_AT_ONCE: usize = 5000;
/// All images of that many runs are compared with the files that `pg_waldump` writes, and then those of one run in eight:
/// writing a million files takes longer than everything else together.
const RUNS_IN_FULL: u32 = 8;

/// A directory of segments that follow each other, all named as of one timeline.
struct Segments {
    directory: PathBuf,
    start: Lsn,
    segment_bytes: u64,
    files: Vec<PathBuf>,
}

impl Segments {
    fn of(directory: &Path) -> Segments {
        let is_segment = |name: &str| name.len() == 24 && name.bytes().all(|digit| digit.is_ascii_hexdigit());
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap_or_else(|error| panic!("{directory:?}: {error}"))
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name"))
            .filter(|name| is_segment(name))
            .collect();
        names.sort();
        let first =
            fs::metadata(directory.join(names.first().expect("a directory with WAL segments"))).expect("a file");
        let segment_bytes = first.len();
        let number = |name: &str| {
            let word = |at: usize| u64::from_str_radix(&name[at..at + 8], 16).expect("hexadecimal");
            word(8) * ((1 << 32) / segment_bytes) + word(16)
        };
        let start = Lsn(number(&names[0]) * segment_bytes);
        for (i, name) in names.iter().enumerate() {
            assert_eq!(number(&names[0]) + i as u64, number(name), "a segment is missing before {name}");
            assert_eq!(names[0][..8], name[..8], "more than one timeline");
        }
        let files = names.iter().map(|name| directory.join(name)).collect();
        Segments { directory: directory.to_owned(), start, segment_bytes, files }
    }

    fn scanner(&self) -> Scanner {
        Scanner::at_segment_start(self.start, self.segment_bytes, 0, PgTimeline(1))
    }

    fn waldump(&self, postgres: &Postgres, start: Lsn) -> Command {
        let mut command = postgres.tool("pg_waldump");
        command.arg("--path").arg(&self.directory).args(["--start", &start.to_string()]);
        command
    }

    /// Tells `each` every record; returns what they add up to, from the scanner, and why there are no more.
    fn decode(&self, mut each: impl FnMut(Record)) -> (FrameSummary, WalErrorKind) {
        let mut decoder = Decoder::new(self.scanner(), RECORD_BYTES_MAX);
        let mut scanner = self.scanner();
        for file in &self.files {
            let bytes = fs::read(file).expect("a readable segment");
            // Slices that fit neither pages nor records.
            let scanned = bytes.chunks(100_003).try_for_each(|slice| scanner.feed(slice, |_| ()));
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                match decoder.feed(rest) {
                    Ok(taken) => rest = &rest[taken..],
                    Err(error) => {
                        assert_eq!(Err(error), scanned, "scanner and decoder disagree");
                        assert_eq!(decoder.summary(), scanner.summary());
                        return (scanner.summary(), error.kind);
                    }
                }
                decoder.poll_record().into_iter().for_each(&mut each);
            }
        }
        assert_eq!(decoder.summary(), scanner.summary());
        (scanner.summary(), WalErrorKind::EndOfWal)
    }
}

fn fork_name(fork: Fork) -> &'static str {
    match fork {
        Fork::Main => "main",
        Fork::FreeSpaceMap => "fsm",
        Fork::VisibilityMap => "vm",
        Fork::Init => "init",
    }
}

/// `XLogDumpDisplayRecord`, up to the description.
fn head_line(record: &Record) -> String {
    let info = &record.info;
    let image_bytes = |block| record.block_image(block).map_or(0, |image| image.bytes.len() as u32);
    let without_images = info.total_len - record.blocks.iter().map(image_bytes).sum::<u32>();
    let lsn = |lsn: Lsn| format!("{:X}/{:08X}", lsn.0 >> 32, lsn.0 as u32);
    format!(
        "rmgr: {:<11} len (rec/tot): {:>6}/{:>6}, tx: {:>10}, lsn: {}, prev {}, ",
        rmgr_name(info.rmgr).expect("a resource manager of PostgreSQL"),
        without_images,
        info.total_len,
        info.xid,
        lsn(info.start),
        lsn(info.prev),
    )
}

/// `XLogRecGetBlockRefInfo` with details.
fn block_line(record: &Record, block: &BlockRef) -> String {
    let BlockRef { id, relation, fork, block: number, .. } = block;
    let (tablespace, database, file) = (relation.tablespace, relation.database, relation.relation);
    let fork = fork_name(*fork);
    let mut line = format!("\tblkref #{id}: rel {tablespace}/{database}/{file} fork {fork} blk {number}");
    if let Some(image) = record.block_image(block) {
        let apply = if image.apply { "" } else { " for WAL verification" };
        let hole = image.hole.end - image.hole.start;
        line += &format!(" (FPW{apply}); hole: offset: {}, length: {hole}", image.hole.start);
        let method = match image.compression {
            None => None,
            Some(Compression::Pglz) => Some("pglz"),
            Some(Compression::Lz4) => Some("lz4"),
            Some(Compression::Zstd) => Some("zstd"),
        };
        if let Some(method) = method {
            let saved = 8192 - usize::from(hole) - image.bytes.len();
            line += &format!(", compression saved: {saved}, method: {method}");
        }
    }
    line
}

/// What a comparison went through, so that a test can insist on having seen it.
#[derive(Default, Debug)]
struct Seen {
    records: u64,
    blocks: u64,
    /// By method, and whether redo applies it.
    images: BTreeMap<(Option<String>, bool), u64>,
    switches: u64,
    overwritten: u64,
    pages_crossed: u64,
    unsupported: Vec<String>,
    timelines: Vec<PgTimeline>,
}

/// Compares each record's lines and each restored image; returns what the WAL added up to.
fn compare(postgres: &Postgres, segments: &Segments) -> (Seen, FrameSummary) {
    let mut child = segments
        .waldump(postgres, segments.start)
        .arg("--bkp-details")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("pg_waldump starts");
    let mut errors = child.stderr.take().expect("a pipe");
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text)
    });
    let mut lines = BufReader::with_capacity(1 << 20, child.stdout.take().expect("a pipe"))
        .split(b'\n')
        .map(|line| String::from_utf8_lossy(&line.expect("a line")).into_owned())
        .filter(|line| line.starts_with("rmgr: ") || line.starts_with("\tblkref #"));

    let mut seen = Seen::default();
    let (summary, end) = segments.decode(|record| {
        let info = &record.info;
        let line = lines.next().unwrap_or_else(|| panic!("pg_waldump ends before {}", info.start));
        assert!(line.starts_with(&(head_line(&record) + "desc: ")), "\nours {}\ntheirs {line}", head_line(&record));
        for block in &record.blocks {
            assert_eq!(lines.next().as_deref(), Some(&*block_line(&record, block)), "{}", info.start);
            seen.blocks += 1;
            if let Some(image) = record.block_image(block) {
                let method = image.compression.map(|method| format!("{method:?}"));
                *seen.images.entry((method, image.apply)).or_default() += 1;
            }
        }
        seen.records += 1;
        seen.switches += u64::from(info.rmgr == 0 && info.info & 0xF0 == xlog_info::SWITCH);
        seen.overwritten += u64::from(info.rmgr == 0 && info.info & 0xF0 == xlog_info::OVERWRITE_CONTRECORD);
        seen.pages_crossed += u64::from(info.start.floor(8192) != info.end.floor(8192));
        seen.unsupported.extend(info.unsupported().map(|reason| reason.to_string()));
        if seen.timelines.last() != Some(&info.timeline) {
            seen.timelines.push(info.timeline);
        }
    });
    assert_eq!(None, lines.next(), "our decoder ends too early: {end}, {summary:?}");
    child.wait().expect("pg_waldump ends");
    let errors = errors.join().expect("no panic").expect("text");
    // pg_waldump says behind which record it found no other.
    assert!(errors.contains(&format!("error in WAL record at {}:", summary.record_start)), "{errors}");
    compare_images(postgres, segments);
    (seen, summary)
}

fn compare_images(postgres: &Postgres, segments: &Segments) {
    let mut runs = 0;
    let mut expected = BTreeMap::new();
    let mut range: Option<(Lsn, Lsn)> = None;
    segments.decode(|record| {
        for block in &record.blocks {
            if let Some(image) = record.block_image(block) {
                let page = restore_image(&image).unwrap_or_else(|error| panic!("{}: {error}", record.info.start));
                let relation = &block.relation;
                let name = format!(
                    "{:08X}-{:08X}.{}.{}.{}.{}_{}",
                    record.info.start.0 >> 32,
                    record.info.start.0 as u32,
                    relation.tablespace,
                    relation.database,
                    relation.relation,
                    block.block,
                    fork_name(block.fork),
                );
                expected.insert(name, page);
            }
        }
        range = Some((range.map_or(record.info.start, |(start, _)| start), record.info.end));
        if expected.len() >= IMAGES_AT_ONCE {
            if runs < RUNS_IN_FULL || runs % 8 == 0 {
                compare_saved_images(postgres, segments, range, &expected);
            }
            runs += 1;
            expected.clear();
            range = None;
        }
    });
    compare_saved_images(postgres, segments, range, &expected);
}

fn compare_saved_images(
    postgres: &Postgres,
    segments: &Segments,
    range: Option<(Lsn, Lsn)>,
    expected: &BTreeMap<String, [u8; 8192]>,
) {
    let Some((start, end)) = range else { return };
    let directory = postgres.directory();
    let saved = directory.0.join("images");
    let mut command = segments.waldump(postgres, start);
    command.args(["--end", &end.to_string(), "--quiet", "--fullpage"]).arg("--save-fullpage").arg(&saved);
    output(&mut command);
    let mut found = 0;
    for entry in fs::read_dir(&saved).expect("a directory of images") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a plain name");
        // The name begins with the timeline that pg_waldump believes in.
        let page = expected.get(&name[9..]).unwrap_or_else(|| panic!("we have no image {name}"));
        assert!(fs::read(&path).expect("a page") == page, "image {name} differs");
        found += 1;
    }
    assert_eq!(expected.len(), found, "images from {start} to {end}");
}

fn next_full_xid(control: &ControlData) -> u64 {
    let (epoch, xid) = control.get("Latest checkpoint's NextXID").split_once(':').expect("epoch:xid");
    epoch.parse::<u64>().expect("an epoch") << 32 | xid.parse::<u64>().expect("an xid")
}

/// Settings under which no WAL is removed, whatever the tests do.
const SETTINGS: &str = "fsync = off\nwal_level = logical\nwal_keep_size = 10GB\nmax_prepared_transactions = 5\n\
    allow_in_place_tablespaces = on\nwal_compression = pglz\nautovacuum = off\ncheckpoint_timeout = 1h\n\
    restore_command = 'false'\nrecovery_target_timeline = 'current'\n";

/// Every kind of record that mentions transactions, in one session.
const TRANSACTIONS: &str = "
    create table subs (i int primary key, t text);
    do $$ begin
        for i in 1..200 loop
            begin insert into subs values (i, repeat('x', i)); exception when others then null; end;
        end loop;
    end $$;
    begin; insert into subs values (1001, ''); savepoint a; insert into subs values (1002, '');
        select * from subs where i = 5 for share; savepoint b; update subs set t = 'multi' where i = 5;
        prepare transaction 'committed later';
    begin; savepoint a; insert into subs values (1003, ''); drop table if exists nothing; create table dropped (i int);
        savepoint b; create table also_dropped as select generate_series(1, 10) i; prepare transaction 'aborted later';
    begin; savepoint a; insert into subs values (1004, ''); savepoint b; insert into subs values (1005, ''); rollback;
    commit prepared 'committed later';
    rollback prepared 'aborted later';
    select pg_log_standby_snapshot();
";

fn use_compression(server: &Server<'_>, method: &str) {
    server.psql(&format!("alter system set wal_compression = '{method}'"));
    server.psql("select pg_reload_conf()");
    server.psql("checkpoint");
}

fn pgbench(server: &Server<'_>, transactions: u32) {
    let transactions = transactions.to_string();
    output(server.client("pgbench").args(["--no-vacuum", "--client=4", "--transactions", &transactions]));
}

/// Breaks off a long record at a segment's end, as PostgreSQL's own test `026_overwrite_contrecord` does: the server
/// dies, and the segment with the record's end has not reached the disk.
fn break_off_a_record(server: &mut Server<'_>) {
    server.psql("select pg_logical_emit_message(true, 'broken off', repeat('0123456789', 150000))");
    let last = server.psql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    server.stop("immediate");
    fs::remove_file(server.data.join("pg_wal").join(last.trim())).expect("the segment exists");
    server.start();
}

fn promote(server: &mut Server<'_>) {
    server.stop("fast");
    fs::write(server.data.join("recovery.signal"), "").expect("writable");
    server.start();
    while server.psql("select pg_is_in_recovery()").trim() != "f" {
        std::thread::yield_now();
    }
}

/// The segments of the latest timeline, and before its first one those of its ancestors, under one timeline's name.
fn collect_segments(server: &Server<'_>, directory: &Directory) -> Segments {
    let collected = directory.0.join("segments");
    fs::create_dir(&collected).expect("a new directory");
    let mut names: Vec<String> = fs::read_dir(server.data.join("pg_wal"))
        .expect("pg_wal")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name"))
        .filter(|name| name.len() == 24)
        .collect();
    // Later timelines come later and overwrite the segment that they share with their parent.
    names.sort();
    let mut first_of_timeline = BTreeMap::new();
    for name in &names {
        first_of_timeline.entry(name[..8].to_owned()).or_insert(name[8..].to_owned());
    }
    for name in &names {
        let later = first_of_timeline.iter().any(|(timeline, first)| **timeline > name[..8] && **first <= name[8..]);
        if !later {
            fs::copy(server.data.join("pg_wal").join(name), collected.join(format!("00000001{}", &name[8..])))
                .expect("a copy");
        }
    }
    Segments::of(&collected)
}

/// WAL of pgbench, of every kind of transaction record, with all compressions, a broken-off record, switches, and a
/// change of timeline.
#[test]
fn records_of_a_server_agree_with_pg_waldump() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let location = directory.0.join("located");
    fs::create_dir(&location).expect("a new directory");
    postgres.own(&location);
    let mut server = postgres.initdb(&directory, "data", &["--data-checksums", "--wal-segsize=1"]);
    server.append_configuration(SETTINGS);
    server.start();
    output(server.client("pgbench").args(["--initialize", "--quiet", "--scale=1"]));
    for method in ["pglz", "lz4", "zstd", "off"] {
        use_compression(&server, method);
        pgbench(&server, 100);
        server.psql("select pg_switch_wal()");
    }
    server.psql("alter system set wal_consistency_checking = 'all'");
    use_compression(&server, "lz4");
    server.script(TRANSACTIONS);
    server.psql("alter system reset wal_consistency_checking");
    use_compression(&server, "zstd");
    server.psql("create tablespace in_place location ''");
    server.psql("create table placed (i int) tablespace in_place; drop table placed");
    server.psql(&format!("create tablespace located location '{}'", location.display()));
    server
        .script("create index on pgbench_accounts (abalance); vacuum full pgbench_accounts; truncate pgbench_history;");
    break_off_a_record(&mut server);
    pgbench(&server, 50);
    promote(&mut server);
    pgbench(&server, 50);
    server.stop("fast");

    let segments = collect_segments(&server, &directory);
    let (seen, summary) = compare(&postgres, &segments);

    assert!(seen.records > 5000 && seen.blocks > 5000, "{seen:?}");
    assert!(seen.switches >= 4 && seen.pages_crossed > 500, "{seen:?}");
    assert_eq!(1, seen.overwritten, "{seen:?}");
    assert_eq!([PgTimeline(1), PgTimeline(2)], seen.timelines[..]);
    assert_eq!(1, seen.unsupported.len(), "only the tablespace with a location: {:?}", seen.unsupported);
    assert!(seen.unsupported[0].contains("Tablespace"));
    for method in [None, Some("Pglz"), Some("Lz4"), Some("Zstd")] {
        assert!(seen.images.contains_key(&(method.map(str::to_owned), true)), "{method:?}: {seen:?}");
    }
    assert!(seen.images.iter().any(|((_, apply), _)| !apply), "{seen:?}");

    let control = server.control_data();
    assert_eq!(next_full_xid(&control) - 1, summary.max_full_xid);
    assert_eq!(control.get("Latest checkpoint location"), summary.record_start.to_string());
    assert_eq!(PgTimeline(2), summary.timeline);

    if let Some(directory) = env::var_os("LAKEBASE_TEST_WAL") {
        compare_regression_suite(&postgres, Path::new(&directory));
    }
}

/// What `tests/wal/regress_wal.sh` made.
fn compare_regression_suite(postgres: &Postgres, directory: &Path) {
    let (seen, summary) = compare(postgres, &Segments::of(directory));
    println!("{seen:?}");
    assert!(seen.records > 1_000_000, "{seen:?}");
    for method in [None, Some("Pglz"), Some("Lz4"), Some("Zstd")] {
        assert!(seen.images.contains_key(&(method.map(str::to_owned), true)), "{method:?}: {seen:?}");
    }
    let control = ControlData::parse(&fs::read_to_string(directory.join("controldata")).expect("controldata"));
    assert_eq!(next_full_xid(&control) - 1, summary.max_full_xid);
    assert_eq!(control.get("Latest checkpoint location"), summary.record_start.to_string());
}

/// The next transaction id after a recovery that ends at X is the one behind our largest, whatever X is; the ids pass
/// from one epoch to the next on the way.
#[test]
fn largest_transaction_id_is_that_of_a_recovery() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let mut server = postgres.initdb(&directory, "data", &["--wal-segsize=1"]);
    server.append_configuration(SETTINGS);
    // Rows of the data directory's birth would lie in the future of ids that are large.
    server.start();
    output(server.client("vacuumdb").args(["--all", "--freeze", "--quiet"]));
    server.stop("fast");
    // 60 ids before the end of epoch 7. The page of pg_xact that holds them has to exist.
    let next = u32::MAX - 60;
    fs::write(server.data.join("pg_xact/0FFF"), vec![0; 262_144]).expect("writable");
    postgres.own(&server.data.join("pg_xact/0FFF"));
    let reset = ["-f", "-e", "7", "-x", &next.to_string(), "-u", &(next - 1_000_000).to_string(), "-D"];
    output(postgres.command("pg_resetwal").args(reset).arg(&server.data));
    // pg_resetwal writes a checkpoint of wal_level=minimal, from which no recovery may start.
    server.start();
    server.stop("fast");
    let base = directory.0.join("base");
    copy(&server.data, &base);
    let start_xid = next_full_xid(&server.control_data()) - 1;

    server.start();
    server.script(TRANSACTIONS);
    server.psql(
        "begin; savepoint a; insert into subs values (2001, ''); savepoint b; insert into subs values (2002, '')",
    );
    server.psql("checkpoint");
    server.psql("insert into subs values (2003, '')");
    server.stop("immediate");

    let segments = Segments::of(&server.data.join("pg_wal"));
    let mut scanner = Scanner::at_segment_start(segments.start, segments.segment_bytes, start_xid, PgTimeline(1));
    let mut points = Vec::new();
    let mut decoded = Vec::new();
    segments.decode(|record| decoded.push(record.info));
    for file in &segments.files {
        let mut bytes = &fs::read(file).expect("a segment")[..];
        while let Some(record) = decoded.get(points.len())
            && record.end <= segments_end(&scanner, bytes)
        {
            let (now, later) = bytes.split_at(record.end.bytes_since(scanner.position()) as usize);
            scanner.feed(now, |_| ()).expect("good WAL");
            points.push(scanner.summary());
            bytes = later;
        }
        if points.len() == decoded.len() {
            break;
        }
        scanner.feed(bytes, |_| ()).expect("good WAL");
    }
    let summary = *points.last().expect("records");
    assert_eq!(8, summary.max_full_xid >> 32, "the ids have reached the next epoch");
    assert!(summary.commit_timestamp > 0);

    // Recovery is slow: a few places, among them the ones around the change of epoch.
    let change = points.iter().position(|point| point.max_full_xid >> 32 == 8).expect("a change of epoch");
    for at in [change - 1, change, points.len() / 3, points.len() * 2 / 3, points.len() - 1] {
        let point = points[at];
        let recovered = directory.0.join(format!("recovered-{at}"));
        copy(&base, &recovered);
        let mut server = postgres.server(&directory, &recovered);
        copy(&segments.directory, &recovered.join("archive"));
        server.append_configuration(&format!(
            "restore_command = 'cp {}/archive/%f %p'\nrecovery_target_lsn = '{}'\nrecovery_target_action = promote\n",
            recovered.display(),
            point.record_start
        ));
        fs::write(recovered.join("recovery.signal"), "").expect("writable");
        server.start();
        while server.psql("select pg_is_in_recovery()").trim() != "f" {
            std::thread::yield_now();
        }
        let next = server.psql("select pg_current_xact_id()");
        assert_eq!(point.max_full_xid + 1, skip_reserved(next.trim().parse().expect("a number")), "{point:?}");
        server.stop("immediate");
    }
}

/// The last position that `bytes` reach from where the scanner stands.
fn segments_end(scanner: &Scanner, bytes: &[u8]) -> Lsn {
    scanner.position().advance(bytes.len() as u64)
}

/// Ids 0 to 2 of an epoch are reserved: behind `0xFFFF_FFFF` comes 3.
fn skip_reserved(next_full_xid: u64) -> u64 {
    if next_full_xid as u32 == 3 { next_full_xid - 3 } else { next_full_xid }
}

fn copy(from: &Path, to: &Path) {
    output(Command::new("cp").arg("-a").arg(from).arg(to));
}
