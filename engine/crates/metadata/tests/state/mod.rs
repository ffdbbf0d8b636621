//! State in memory: loaded from the files of a data directory, moved on by records, compared with other files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use metadata::{Change, Counters, Origins, SLRU_PAGE_BYTES, Slru, SlruPage, apply_slru, changes_of, two_phase_file};
use pgformat::{CHECKPOINT_BYTES, CheckPoint, ControlFile};
use pgtypes::{Lsn, PgTimeline};
use redo::{Database, Event};
use wal::{Decoder, RECORD_BYTES_MAX, Record, Scanner};

/// Changes that the workload must have, each at least once.
pub const KINDS: &[&str] = &[
    "page of pg_xact",
    "page of pg_multixact/offsets",
    "page of pg_multixact/members",
    "page of pg_commit_ts",
    "cut of pg_xact",
    "cut of pg_multixact/offsets",
    "cut of pg_multixact/members",
    "cut of pg_commit_ts",
    "relation map",
    "prepare",
    "finish prepared",
    "advance origin",
    "drop origin",
    "counters",
    "drop relation",
    "drop database",
    "create database",
    "copy database",
];

/// What a checkpoint said, and what was known without it.
#[derive(Debug)]
pub struct Shutdown {
    pub ours: CheckPoint,
    pub theirs: CheckPoint,
}

#[derive(Debug)]
pub struct State {
    pub counters: Counters,
    pages: BTreeMap<(Slru, u32), Box<SlruPage>>,
    maps: BTreeMap<Database, Vec<u8>>,
    two_phase: BTreeMap<u64, Vec<u8>>,
    origins: Origins,
    pub shutdowns: Vec<Shutdown>,
    pub counts: BTreeMap<String, u64>,
    pub faults: Vec<String>,
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name")).collect()
}

impl State {
    pub fn load(data: &Path) -> State {
        let control = fs::read(data.join("global/pg_control")).expect("a control file");
        let mut pages = BTreeMap::new();
        for slru in Slru::ALL {
            let directory = data.join(slru.directory());
            for name in names(&directory) {
                let first = slru.first_page(&name).expect("a file of an SLRU");
                let bytes = fs::read(directory.join(&name)).expect("a readable file");
                for (page, number) in bytes.chunks_exact(SLRU_PAGE_BYTES).zip(first..) {
                    assert_eq!((name.clone(), number - first), slru.file(number));
                    pages.insert((slru, number), Box::new(page.try_into().expect("a page")));
                }
            }
        }
        let mut maps = BTreeMap::new();
        let global = Database { tablespace: 1664, database: 0 };
        maps.insert(global, fs::read(data.join("global/pg_filenode.map")).expect("a relation map"));
        for name in names(&data.join("base")) {
            let map = fs::read(data.join("base").join(&name).join("pg_filenode.map")).expect("a relation map");
            maps.insert(Database { tablespace: 1663, database: name.parse().expect("an oid") }, map);
        }
        let two_phase = data.join("pg_twophase");
        let two_phase = names(&two_phase).into_iter().map(|name| {
            let state = fs::read(two_phase.join(&name)).expect("a readable file");
            (u64::from_str_radix(&name, 16).expect("a full transaction id"), state)
        });
        let mut origins = match fs::read(data.join("pg_logical/replorigin_checkpoint")) {
            Ok(file) => Origins::parse(&file).expect("a sound file"),
            Err(_) => Origins::default(),
        };
        origins.0.retain(|_, lsn| *lsn != Lsn::INVALID);
        State {
            counters: Counters::from_control(&ControlFile::parse(&control).expect("PostgreSQL 17")),
            pages,
            maps,
            two_phase: two_phase.collect(),
            origins,
            shutdowns: Vec::new(),
            counts: BTreeMap::new(),
            faults: Vec::new(),
        }
    }

    pub fn replay(&mut self, record: &Record, max_full_xid: u64) {
        let changes = changes_of(record, &self.counters.context()).expect("PostgreSQL's record");
        for change in &changes {
            let name = self.change(record, change);
            *self.counts.entry(name).or_default() += 1;
        }
        let before = self.counters.clone();
        let is_shutdown = record.info.rmgr == 0 && record.info.info & 0xF0 == 0;
        self.counters.replay(record, max_full_xid).expect("PostgreSQL's record");
        if is_shutdown {
            let bytes: &[u8; CHECKPOINT_BYTES] = record.main_data().first_chunk().expect("a checkpoint");
            let theirs = CheckPoint::parse(bytes).expect("a checkpoint");
            let ours = CheckPoint {
                redo: theirs.redo,
                time: theirs.time,
                oldest_active_xid: theirs.oldest_active_xid,
                ..before.checkpoint
            };
            self.shutdowns.push(Shutdown { ours, theirs });
        } else if before != self.counters && !changes.contains(&Change::Counters) {
            // Every record may have a transaction id; nothing else moves without being announced.
            let xid = self.counters.checkpoint.next_full_xid;
            let mut moved = before;
            moved.checkpoint.next_full_xid = xid;
            assert_eq!(self.counters, moved, "{:?}", record.info);
        }
    }

    fn change(&mut self, record: &Record, change: &Change<'_>) -> String {
        match change {
            Change::SlruPage(slru, number) => {
                let page = self.pages.entry((*slru, *number)).or_insert_with(|| Box::new([0; SLRU_PAGE_BYTES]));
                apply_slru(record, *slru, *number, page).expect("PostgreSQL's record");
                return format!("page of {}", slru.directory());
            }
            Change::CutSlru(cut) => {
                self.pages.retain(|(slru, page), _| *slru != cut.slru || !cut.removes(*page));
                return format!("cut of {}", cut.slru.directory());
            }
            Change::RelationMap { database, map } => {
                self.maps.insert(*database, map.to_vec());
                "relation map"
            }
            Change::Prepare { full_xid, state } => {
                self.two_phase.insert(*full_xid, two_phase_file(state));
                "prepare"
            }
            Change::FinishPrepared { full_xid } => {
                assert!(self.two_phase.remove(full_xid).is_some(), "{full_xid} was not prepared");
                "finish prepared"
            }
            Change::AdvanceOrigin { id, lsn, backward } => {
                self.origins.advance(*id, *lsn, *backward);
                "advance origin"
            }
            Change::DropOrigin(id) => {
                self.origins.0.remove(id);
                "drop origin"
            }
            Change::Whole(Event::CopyDatabase { to, from }) => {
                let map = self.maps.get(from).expect("a map").clone();
                self.maps.insert(*to, map);
                "copy database"
            }
            Change::Whole(Event::DropDatabase(database)) => {
                self.maps.remove(database);
                "drop database"
            }
            Change::Whole(Event::CreateDatabase(_)) => "create database",
            Change::Whole(Event::DropRelation(_)) => "drop relation",
            Change::Whole(Event::CreateFork(..)) => "create fork",
            Change::Whole(Event::Truncate(_)) => "truncate",
            Change::Counters => "counters",
        }
        .to_owned()
    }

    /// A file begins with its first page, whatever the first one that was written: what lies before it is zero.
    fn fill_holes(&mut self) {
        for (slru, page) in self.pages.keys().copied().collect::<Vec<_>>() {
            for before in page - slru.file(page).1..page {
                self.pages.entry((slru, before)).or_insert_with(|| Box::new([0; SLRU_PAGE_BYTES]));
            }
        }
    }

    /// Notes what differs; returns what was compared.
    pub fn compare(&mut self, theirs: &State) -> String {
        self.fill_holes();
        let pages = differences("page", &self.pages, &theirs.pages);
        let maps = differences("relation map", &self.maps, &theirs.maps);
        let two_phase = differences("two-phase file", &self.two_phase, &theirs.two_phase);
        let origins = differences("origin", &self.origins.0, &theirs.origins.0);
        for found in [&pages, &maps, &two_phase, &origins] {
            self.faults.extend(found.iter().cloned());
        }
        let used =
            |slru| theirs.pages.iter().filter(|((of, _), page)| *of == slru && page.iter().any(|b| *b != 0)).count();
        format!(
            "{} SLRU pages, of these not zero {:?}; {} relation maps, {} two-phase files, {} origins; {:?}",
            theirs.pages.len(),
            Slru::ALL.map(used),
            theirs.maps.len(),
            theirs.two_phase.len(),
            theirs.origins.0.len(),
            self.counts
        )
    }
}

fn differences<K: Ord + Copy + std::fmt::Debug, V: PartialEq>(
    what: &str,
    ours: &BTreeMap<K, V>,
    theirs: &BTreeMap<K, V>,
) -> Vec<String> {
    let keys: BTreeSet<K> = ours.keys().chain(theirs.keys()).copied().collect();
    let differ = keys.into_iter().filter(|key| ours.get(key) != theirs.get(key));
    differ
        .map(|key| match (ours.get(&key), theirs.get(&key)) {
            (Some(_), Some(_)) => format!("{what} {key:?} differs"),
            (Some(_), None) => format!("{what} {key:?} is not the server's"),
            _ => format!("{what} {key:?} is missing"),
        })
        .collect()
}

/// Tells `each` every record behind the checkpoint that `control` names, and the largest transaction id up to it.
pub fn decode(directory: &Path, control: &ControlFile, mut each: impl FnMut(&Record, u64)) {
    let segment_bytes = u64::from(control.segment_bytes);
    let checkpoint = control.checkpoint_lsn;
    let first = Lsn(checkpoint.0 - checkpoint.offset_in(segment_bytes));
    let max_full_xid = control.checkpoint.next_full_xid - 1;
    let scanner = Scanner::at_segment_start(first, segment_bytes, max_full_xid, PgTimeline(1));
    let mut decoder = Decoder::new(scanner, RECORD_BYTES_MAX);
    for segment in first.0 / segment_bytes.. {
        let per_id = (1 << 32) / segment_bytes;
        let name = format!("00000001{:08X}{:08X}", segment / per_id, segment % per_id);
        let Ok(bytes) = fs::read(directory.join(name)) else { return };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match decoder.feed(rest) {
                Ok(taken) => rest = &rest[taken..],
                Err(_) => return,
            }
            if let Some(record) = decoder.poll_record().filter(|record| record.info.start > checkpoint) {
                each(&record, decoder.summary().max_full_xid);
            }
        }
    }
}
