//! Replays a server's WAL in memory and compares each page with the image that `wal_consistency_checking` put into the
//! record: the page as PostgreSQL saw it afterwards.

mod damage;
pub mod record_types;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use damage::{Random, try_damaged};
use pgtypes::{Lsn, PgTimeline};
use record_types::{Proof, kind_of, missing, type_of};
use redo::{Applied, BlockTag, Context, Event, PAGE_BYTES, Page, Reason, RedoError, apply, blocks_of, events_of, mask};
use wal::{Decoder, Fork, RECORD_BYTES_MAX, Record, RelFileLocator, Scanner, restore_image, rmgr_name};

/// Mismatches that are described before the rest is only counted.
const FAULTS_DESCRIBED: usize = 20;
/// One record in so many is applied damaged, too.
const DAMAGED_EVERY: u64 = 100;
/// One compared page of a type of records in so many is compared again with a byte changed.
const FLIPPED_EVERY: u64 = 16;
/// Resource manager of page images.
const XLOG: u8 = 0;
const SEQUENCE: u8 = 15;
/// Records that make pages.
const FPI: u8 = 0xB0;
/// Blocks of a file of a relation (`RELSEG_SIZE`).
const SEGMENT_BLOCKS: u32 = 131_072;

/// Pages of a data directory that was shut down cleanly.
pub struct Files(pub PathBuf);

impl Files {
    fn path(&self, relation: RelFileLocator, fork: Fork, segment: u32) -> PathBuf {
        let directory = match relation.tablespace {
            1664 => self.0.join("global"),
            _ => self.0.join("base").join(relation.database.to_string()),
        };
        let mut name = relation.relation.to_string();
        name += match fork {
            Fork::Main => "",
            Fork::FreeSpaceMap => "_fsm",
            Fork::VisibilityMap => "_vm",
            Fork::Init => "_init",
        };
        if segment > 0 {
            write!(name, ".{segment}").expect("a string grows");
        }
        directory.join(name)
    }

    /// The page, if the file has it.
    pub fn page(&self, tag: BlockTag) -> Option<Page> {
        let mut file = File::open(self.path(tag.relation, tag.fork, tag.block / SEGMENT_BLOCKS)).ok()?;
        let offset = u64::from(tag.block % SEGMENT_BLOCKS) * PAGE_BYTES as u64;
        file.seek(SeekFrom::Start(offset)).expect("a file");
        let mut page = Page::ZERO;
        file.read_exact(&mut page.0).ok()?;
        Some(page)
    }
}

/// A page in memory.
struct Held {
    page: Box<Page>,
    /// Whose record was the last one; says how to mask it.
    rmgr: u8,
    /// A record that is not supported changed it.
    unsupported: bool,
    /// A page of the visibility map that came as an image without its bits: `CREATE DATABASE` logs it as if they were
    /// unused space, so a standby's has fewer bits than the primary's.
    hollow: bool,
    /// A byte that the last record changed, of some records.
    changed: Option<usize>,
}

/// Pages in memory, on top of those that the data directory had at the start.
pub struct Oracle {
    base: Files,
    context: Context,
    pages: HashMap<BlockTag, Held>,
    /// Forks that were created, or cut to that many blocks, since the start.
    cut: BTreeMap<(RelFileLocator, u8), u32>,
    /// Databases that were copied as files.
    copies: HashMap<u32, u32>,
    /// All records by their types.
    pub seen: BTreeMap<(u8, u8), u64>,
    /// Images that were compared.
    pub compared: BTreeMap<(u8, u8), u64>,
    /// Blocks that came as images.
    pub restored: BTreeMap<(u8, u8), u64>,
    /// Blocks whose record is not supported.
    pub unsupported: BTreeMap<(u8, u8), u64>,
    /// Records.
    pub records: u64,
    pub implied: u64,
    /// Bytes that records lost when they were trimmed to a block, as page servers get them.
    pub trimmed_bytes: u64,
    /// Of whole relations and databases.
    pub events: BTreeMap<&'static str, u64>,
    pub faults: u64,
    /// Pages of each resource manager with a byte changed on purpose, one that the record before the comparison had changed:
    /// how many, and how many of them were found.
    pub flipped: BTreeMap<u8, (u64, u64)>,
    random: Random,
    /// Damaged records and pages that were refused.
    pub refused: usize,
    pub descriptions: Vec<String>,
}

impl Oracle {
    pub fn new(base: Files, context: Context) -> Oracle {
        Oracle {
            base,
            context,
            pages: HashMap::new(),
            cut: BTreeMap::new(),
            copies: HashMap::new(),
            seen: BTreeMap::new(),
            compared: BTreeMap::new(),
            restored: BTreeMap::new(),
            unsupported: BTreeMap::new(),
            records: 0,
            implied: 0,
            trimmed_bytes: 0,
            events: BTreeMap::new(),
            faults: 0,
            flipped: BTreeMap::new(),
            random: Random(1),
            refused: 0,
            descriptions: Vec::new(),
        }
    }

    fn load(&self, tag: BlockTag) -> Page {
        let cut = self.cut.get(&(tag.relation, tag.fork as u8));
        if cut.is_some_and(|blocks| tag.block >= *blocks) {
            return Page::ZERO;
        }
        let mut relation = tag.relation;
        while let Some(source) = self.copies.get(&relation.database) {
            relation.database = *source;
        }
        self.base.page(BlockTag { relation, ..tag }).unwrap_or(Page::ZERO)
    }

    fn cut(&mut self, relation: RelFileLocator, fork: Fork, blocks: u32) {
        let entry = self.cut.entry((relation, fork as u8)).or_insert(blocks);
        *entry = (*entry).min(blocks);
        self.pages.retain(|tag, _| tag.relation != relation || tag.fork != fork || tag.block < blocks);
    }

    /// All files of a database, as they are at this moment.
    fn copy_database(&mut self, to: u32, from: u32) {
        self.copies.insert(to, from);
        let copied: Vec<_> = self
            .pages
            .iter()
            .filter(|(tag, _)| tag.relation.database == from)
            .map(|(tag, held)| {
                let relation = RelFileLocator { database: to, ..tag.relation };
                let held = Held {
                    page: held.page.clone(),
                    rmgr: held.rmgr,
                    unsupported: held.unsupported,
                    hollow: held.hollow,
                    changed: None,
                };
                (BlockTag { relation, ..*tag }, held)
            })
            .collect();
        self.pages.extend(copied);
        let cut: Vec<_> = self.cut.iter().filter(|((relation, _), _)| relation.database == from).collect();
        let cut: Vec<_> = cut
            .into_iter()
            .map(|((relation, fork), blocks)| ((RelFileLocator { database: to, ..*relation }, *fork), *blocks))
            .collect();
        self.cut.extend(cut);
    }

    fn drop_database(&mut self, database: u32) {
        self.pages.retain(|tag, _| tag.relation.database != database);
        self.cut.retain(|(relation, _), _| relation.database != database);
    }

    pub fn replay(&mut self, record: &Record) {
        self.records += 1;
        self.classify(record);
        for event in events_of(record) {
            match event {
                Event::CreateFork(relation, fork) => self.cut(relation, fork, 0),
                Event::DropRelation(relation) => {
                    for fork in [Fork::Main, Fork::FreeSpaceMap, Fork::VisibilityMap, Fork::Init] {
                        self.cut(relation, fork, 0);
                    }
                }
                Event::CopyDatabase { to, from } => self.copy_database(to.database, from.database),
                Event::DropDatabase(database) => self.drop_database(database.database),
                // After the record's other effects, one of which is on a block that stays.
                Event::Truncate(_) | Event::CreateDatabase(_) => {}
            }
            *self.events.entry(name_of_event(&event)).or_default() += 1;
        }
        let rmgr = record.info.rmgr;
        let kind = kind_of(rmgr, record.info.info);
        let is_flipped = self.compared.get(&kind).copied().unwrap_or(0) % FLIPPED_EVERY == 0;
        if self.records.is_multiple_of(DAMAGED_EVERY) && !record.blocks.is_empty() {
            let pages: Vec<_> = blocks_of(record)
                .map(|touch| {
                    self.pages.get(&touch.tag).map_or_else(|| self.load(touch.tag), |held| (*held.page).clone())
                })
                .collect();
            self.refused += try_damaged(&mut self.random, record, &pages, &self.context);
        }
        for touch in blocks_of(record).collect::<Vec<_>>() {
            let trimmed = trimmed_to(record, touch.tag);
            self.trimmed_bytes += (record.payload().len() - trimmed.payload().len()) as u64;
            if blocks_of(&trimmed).ne(blocks_of(record)) || events_of(&trimmed).ne(events_of(record)) {
                self.fault(record, touch.tag, "trimmed to this block, the record touches others");
            }
            let mut held = self.pages.remove(&touch.tag).unwrap_or_else(|| Held {
                page: Box::new(self.load(touch.tag)),
                rmgr,
                unsupported: false,
                hollow: false,
                changed: None,
            });
            if matches!(touch.reason, Reason::Registered(_)) {
                // An image for a hint says nothing about whose page it is.
                if rmgr != XLOG || is_remade(record, touch.reason) && record.info.info & 0xF0 == FPI {
                    held.rmgr = rmgr;
                }
            } else {
                self.implied += 1;
            }
            held.hollow |= touch.tag.fork == Fork::VisibilityMap && rmgr == XLOG;
            let before = is_flipped.then(|| held.page.clone());
            let mut from_trimmed = held.page.clone();
            let outcome_of_trimmed = apply(&trimmed, &touch, &mut from_trimmed, &self.context);
            let outcome = apply(record, &touch, &mut held.page, &self.context);
            if outcome != outcome_of_trimmed || outcome.is_ok() && from_trimmed.0 != held.page.0 {
                let what = format!("trimmed to this block, the record gives another page: {outcome_of_trimmed:?}");
                self.fault(record, touch.tag, &what);
            }
            held.changed = before.and_then(|before| self.random.changed_byte(&before, &held.page));
            match outcome {
                Ok(Applied::AlreadyThere) => self.fault(record, touch.tag, "the page already has the record"),
                Ok(_) => held.unsupported &= !is_remade(record, touch.reason),
                Err(RedoError::Unsupported { .. }) => {
                    *self.unsupported.entry(kind).or_default() += 1;
                    held.unsupported = true;
                }
                Err(_) if held.unsupported => {}
                Err(error) => self.fault(record, touch.tag, &error.to_string()),
            }
            self.pages.insert(touch.tag, held);
        }
        for event in events_of(record) {
            let Event::Truncate(truncation) = event else { continue };
            if truncation.main {
                self.cut(truncation.relation, Fork::Main, truncation.heap_blocks);
            }
            if truncation.visibility_map {
                self.cut(truncation.relation, Fork::VisibilityMap, truncation.visibility_map_blocks());
            }
        }
        let images = record.blocks.iter().filter_map(|block| record.block_image(block));
        let images = images.filter(|image| image.apply).count() as u64;
        if images > 0 {
            *self.restored.entry(kind).or_default() += images;
        }
        self.compare(record);
    }

    /// A type that PostgreSQL 17 does not have, or with effects that its proof does not look at, is a fault.
    fn classify(&mut self, record: &Record) {
        let kind = kind_of(record.info.rmgr, record.info.info);
        *self.seen.entry(kind).or_default() += 1;
        let (touches, events) = (blocks_of(record).next().is_some(), events_of(record).next().is_some());
        let is_as_listed = match type_of(kind).map(|(.., proof)| *proof) {
            Some(Proof::Compared | Proof::Image) => touches && !events,
            Some(Proof::Whole) => events,
            // Transactions drop relations at their end.
            Some(Proof::State) => !touches,
            Some(Proof::Nothing | Proof::Refused) => !touches && !events,
            Some(Proof::Never) | None => false,
        };
        if !is_as_listed {
            self.faults += 1;
            let name = record_types::name_of(kind);
            self.descriptions.push(format!("{} {name}: blocks {touches}, events {events}", record.info.start));
        }
    }

    /// Compares with the record's images, as `verifyBackupPageConsistency` does.
    fn compare(&mut self, record: &Record) {
        for block in &record.blocks {
            let Some(image) = record.block_image(block).filter(|image| !image.apply) else { continue };
            let tag = BlockTag { relation: block.relation, fork: block.fork, block: block.block };
            let theirs = restore_image(&image).expect("an image");
            let Some(held) = self.pages.get_mut(&tag) else { continue };
            if held.unsupported {
                held.page.0 = theirs;
                continue;
            }
            let kind = kind_of(record.info.rmgr, record.info.info);
            let mut theirs = Page(theirs);
            if held.hollow {
                keep_common_bits(&held.page, &mut theirs);
            }
            let flipped = held.changed.take().map(|at| {
                let mut flipped = held.page.clone();
                flipped.0[at] ^= 0x10;
                flipped
            });
            if let Some(difference) = difference(record.info.rmgr, tag, &held.page, &theirs) {
                *held.page = theirs.clone();
                self.fault(record, tag, &difference);
            }
            *self.compared.entry(kind).or_default() += 1;
            if let Some(flipped) = flipped {
                let found = difference(record.info.rmgr, tag, &flipped, &theirs).is_some();
                let (tried, sum) = self.flipped.entry(record.info.rmgr).or_default();
                *tried += 1;
                *sum += u64::from(found);
            }
        }
    }

    /// Compares every page that is held with the files of the server after its shutdown.
    pub fn compare_files(&mut self, files: &Files) -> u64 {
        let mut compared = 0;
        let mut faults = Vec::new();
        for (tag, held) in &self.pages {
            // Pages that were only ever images have no access method that says how to mask them; the values of a sequence
            // are logged 32 at a time.
            let is_known = held.rmgr != XLOG && held.rmgr != SEQUENCE || tag.fork == Fork::VisibilityMap;
            if held.unsupported || !is_known || tag.fork == Fork::FreeSpaceMap {
                continue;
            }
            let Some(mut theirs) = files.page(*tag) else {
                faults.push(format!("{tag:?}, last changed by {}, is in no file", name_of(held.rmgr)));
                continue;
            };
            if held.hollow {
                keep_common_bits(&held.page, &mut theirs);
            }
            if let Some(difference) = difference(held.rmgr, *tag, &held.page, &theirs) {
                faults.push(format!("file of {tag:?}, last changed by {}: {difference}", name_of(held.rmgr)));
            }
            compared += 1;
        }
        self.faults += faults.len() as u64;
        self.descriptions.extend(faults.into_iter().take(FAULTS_DESCRIBED));
        compared
    }

    fn fault(&mut self, record: &Record, tag: BlockTag, what: &str) {
        self.faults += 1;
        if self.descriptions.len() < FAULTS_DESCRIBED {
            let (rmgr, info) = (name_of(record.info.rmgr), record.info.info);
            self.descriptions.push(format!("{} {rmgr} {info:#04x} {tag:?}: {what}", record.info.start));
        }
    }

    /// Records and comparisons per resource manager and record type.
    pub fn report(&self) -> String {
        let mut text = format!(
            "{} records, {} implied blocks, {} refused of those that were damaged, {} bytes trimmed\n{:?}\n",
            self.records, self.implied, self.refused, self.trimmed_bytes, self.events
        );
        writeln!(text, "{:<32} {:>9} {:>9} {:>9} {:>11}", "type", "records", "compared", "restored", "unsupported")
            .expect("a string grows");
        for (kind, seen) in &self.seen {
            let [compared, restored, unsupported] = [&self.compared, &self.restored, &self.unsupported]
                .map(|counts| counts.get(kind).copied().unwrap_or_default());
            let name = record_types::name_of(*kind);
            writeln!(text, "{name:<32} {seen:>9} {compared:>9} {restored:>9} {unsupported:>11}")
                .expect("a string grows");
        }
        for (rmgr, (tried, found)) in &self.flipped {
            writeln!(text, "{:<10} {found} of {tried} changed bytes found", name_of(*rmgr)).expect("a string grows");
        }
        text
    }

    /// Types of records whose proof is here and was not given.
    pub fn missing(&self) -> Vec<String> {
        let mut names = missing(&[Proof::Compared], |kind| self.compared.contains_key(kind));
        names.extend(missing(&[Proof::Image], |kind| self.restored.contains_key(kind)));
        names.extend(missing(&[Proof::Whole, Proof::Nothing], |kind| self.seen.contains_key(kind)));
        names
    }

    /// Resource managers of which no changed byte was found.
    pub fn never_flipped(&self) -> Vec<&'static str> {
        let compared = record_types::RECORD_TYPES.iter().filter(|(.., proof)| *proof == Proof::Compared);
        let rmgrs: BTreeSet<u8> = compared.map(|(rmgr, ..)| *rmgr).collect();
        let is_found = |rmgr: &u8| self.flipped.get(rmgr).is_some_and(|(_, found)| *found > 0);
        rmgrs.into_iter().filter(|rmgr| !is_found(rmgr)).map(name_of).collect()
    }
}

/// Takes those bits from a page of the visibility map that a correct copy of it does not have.
fn keep_common_bits(ours: &Page, theirs: &mut Page) {
    const HEADER_BYTES: usize = 24;
    for (ours, theirs) in ours.0.iter().zip(&mut theirs.0).skip(HEADER_BYTES) {
        *theirs &= *ours;
    }
}

/// The record as a page server has it that holds this block only.
fn trimmed_to(record: &Record, tag: BlockTag) -> Record {
    let stored =
        record.to_stored(|block| BlockTag { relation: block.relation, fork: block.fork, block: block.block } == tag);
    Record::from_stored(record.info.start, record.info.end, &stored).expect("a stored record")
}

/// Whether the record makes the page anew, whatever it was.
fn is_remade(record: &Record, reason: Reason) -> bool {
    let Reason::Registered(id) = reason else { return false };
    record
        .blocks
        .iter()
        .filter(|block| block.id == id)
        .any(|block| block.will_init || record.block_image(block).is_some_and(|image| image.apply))
}

fn name_of_event(event: &Event) -> &'static str {
    match event {
        Event::CreateFork(..) => "create fork",
        Event::Truncate(_) => "truncate",
        Event::DropRelation(_) => "drop relation",
        Event::CopyDatabase { .. } => "copy database",
        Event::CreateDatabase(_) => "create database",
        Event::DropDatabase(_) => "drop database",
    }
}

fn name_of(rmgr: u8) -> &'static str {
    rmgr_name(rmgr).unwrap_or("custom")
}

/// How two pages differ after masking.
fn difference(rmgr: u8, tag: BlockTag, ours: &Page, theirs: &Page) -> Option<String> {
    let masked = |page: &Page| {
        let mut page = page.clone();
        mask::mask(rmgr, tag.fork, tag.block, &mut page).map(|()| page)
    };
    let (ours_masked, theirs_masked) = match (masked(ours), masked(theirs)) {
        (Ok(ours), Ok(theirs)) => (ours, theirs),
        (ours, theirs) => return Some(format!("mask: {:?}, {:?}", ours.err(), theirs.err())),
    };
    let at = ours_masked.0.iter().zip(&theirs_masked.0).position(|(ours, theirs)| ours != theirs)?;
    let count = ours_masked.0.iter().zip(&theirs_masked.0).filter(|(ours, theirs)| ours != theirs).count();
    let around = at & !7..(at & !7) + 16.min(PAGE_BYTES - (at & !7));
    Some(format!(
        "{count} bytes differ from {at} on: ours {:02x?}, theirs {:02x?}; {ours:?}, {theirs:?}",
        &ours_masked.0[around.clone()],
        &theirs_masked.0[around]
    ))
}

/// Tells `each` every record from `start` on in a directory of segments of one timeline.
pub fn decode(directory: &Path, start: Lsn, mut each: impl FnMut(&Record)) {
    let is_segment = |name: &str| name.len() == 24 && name.bytes().all(|digit| digit.is_ascii_hexdigit());
    let mut names: Vec<String> = fs::read_dir(directory)
        .expect("a directory of segments")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name"))
        .filter(|name| is_segment(name))
        .collect();
    names.sort();
    let segment_bytes = fs::metadata(directory.join(&names[0])).expect("a file").len();
    let position = |name: &str| {
        let word = |at: usize| u64::from_str_radix(&name[at..at + 8], 16).expect("hexadecimal");
        Lsn((word(8) * ((1 << 32) / segment_bytes) + word(16)) * segment_bytes)
    };
    names.retain(|name| position(name).advance(segment_bytes) > start);
    let first = position(&names[0]);
    let scanner = Scanner::at_segment_start(first, segment_bytes, 0, PgTimeline(1));
    let mut decoder = Decoder::new(scanner, RECORD_BYTES_MAX);
    for name in &names {
        // Recycled segments lie behind the end.
        if position(name) > decoder.position() {
            break;
        }
        let bytes = fs::read(directory.join(name)).expect("a readable segment");
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match decoder.feed(rest) {
                Ok(taken) => rest = &rest[taken..],
                Err(_) => return,
            }
            if let Some(record) = decoder.poll_record().filter(|record| record.info.start >= start) {
                each(&record);
            }
        }
    }
}
