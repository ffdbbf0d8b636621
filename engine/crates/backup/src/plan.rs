//! The plan: everything that a PGDATA as of X consists of.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};
use core::mem;

use layers::{Key, Slru};
use metadata::{Counters, two_phase_file};
use pgformat::{ControlError, ControlFile, DatabaseState, history_file_name};
use pgtypes::{FrameSummary, Lsn, PgTimeline};
use redo::Database;
use shard::{ListingError, MetadataListing};
use wal::{Fork, RelFileLocator};

use crate::{
    free_space::free_space_map_of,
    free_space_files::free_space_files,
    layout::{CONTROL_FILE, DIRECTORIES, VERSION, VERSION_FILE, is_advisory},
    relations::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE, RelationError, RelationFile, directory, relation_files},
    slru_files::{SlruError, metadata_slru, slru_files},
    synthetic_checkpoint::{SyntheticCheckpoint, WalPageError},
    transaction_ids::settle_next_xid,
};

/// What a PGDATA is made of, all as of one position X.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// X is `record_end`; the rest of the summary is that of X.
    pub summary: FrameSummary,
    /// Every value of metadata and every SLRU page: key and value.
    pub metadata: Vec<(Key, Vec<u8>)>,
    /// Length in blocks of every fork that exists.
    pub forks: &'a [(RelFileLocator, Fork, u32)],
    /// The log from the start of X's WAL page to X; none when X is a page's start.
    pub page_before: &'a [u8],
    /// History files of timelines, for those who follow the server to come.
    pub histories: &'a [(PgTimeline, Vec<u8>)],
    /// Seconds since 1970, for `pg_control` and its checkpoint.
    pub time: i64,
}

/// Everything that a PGDATA as of X consists of. To be made in this order: directories, files, relations, WAL, and
/// `pg_control` last, without which no server starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Parents first. Mode 0700.
    pub directories: Vec<String>,
    /// Files with their contents. Mode 0600.
    pub files: Vec<SmallFile>,
    /// Files of relations: their names and lengths.
    pub relations: Vec<RelationFile>,
    /// Blocks in a file of a relation.
    pub segment_blocks: u32,
    /// WAL from X to S, and the files with it.
    pub checkpoint: SyntheticCheckpoint,
    /// What `pg_control` says; [`Plan::control_file`] is the file.
    pub control: ControlFile,
    /// Paths of files outside WAL that may not be in a PGDATA; the caller says so in its log.
    pub left_out: Vec<String>,
    /// Paths of free-space maps that the page service keeps for nothing: a writer hands in an empty one, which removes it.
    pub useless_maps: Vec<String>,
    /// Databases and relations of tablespaces, which have no place in this PGDATA: an access to them is an error of PostgreSQL's,
    /// everything else works. The caller says so in its log.
    pub in_tablespaces: Vec<String>,
}

/// A file with its contents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SmallFile {
    /// Path in PGDATA.
    pub path: String,
    /// All of it.
    pub contents: Vec<u8>,
}

/// No PGDATA can be made of this. Whatever the cause, nothing is invented instead.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// A value of metadata is damaged.
    #[error(transparent)]
    Metadata(#[from] ListingError),
    /// There are no counters: the lakebase was never imported, or its first value was lost.
    #[error("metadata has no counters of pg_control")]
    NoCounters,
    /// There is no template of `pg_control`.
    #[error("metadata has no pg_control")]
    NoControl,
    /// The template is damaged.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A relation cannot be placed.
    #[error(transparent)]
    Relation(#[from] RelationError),
    /// An SLRU page is damaged.
    #[error(transparent)]
    Slru(#[from] SlruError),
    /// An SLRU page that PostgreSQL reads when it starts is not there.
    #[error("page {page} of {} is missing", metadata_slru(*.slru).directory())]
    MissingPage {
        /// Of which SLRU.
        slru: Slru,
        /// The page.
        page: u32,
    },
    /// A prepared transaction's file is damaged.
    #[error("the state of prepared transaction {0} is damaged")]
    TwoPhase(u64),
    /// The WAL in front of X is not what it should be.
    #[error(transparent)]
    WalPage(#[from] WalPageError),
}

impl Plan {
    /// `global/pg_control`: path and contents.
    pub fn control_file(&self) -> SmallFile {
        SmallFile { path: String::from(CONTROL_FILE), contents: Vec::from(self.control.to_bytes()) }
    }

    /// X.
    pub fn begin(&self) -> Lsn {
        self.checkpoint.begin
    }

    /// S: where the server goes on.
    pub fn end(&self) -> Lsn {
        self.checkpoint.end
    }
}

/// What a PGDATA as of X consists of.
///
/// # Errors
/// See [`PlanError`]: what was read is damaged, incomplete, or not of one position.
pub fn plan(mut source: Source<'_>) -> Result<Plan, PlanError> {
    let mut listing = MetadataListing::default();
    for (key, value) in mem::take(&mut source.metadata) {
        listing.add(key, value)?;
    }
    let mut counters = listing.counters.clone().ok_or(PlanError::NoCounters)?;
    settle_next_xid(&mut counters, source.summary.max_full_xid, &mut listing.slru_pages)?;
    let template = listing.advisory.iter().find(|file| file.name == CONTROL_FILE).ok_or(PlanError::NoControl)?;
    let template = ControlFile::parse(&template.contents)?;

    let segment_blocks = template.relation_segment_blocks;
    let in_tablespaces = leave_tablespaces_out(&mut listing, source.forks);
    let forks = source.forks.iter().copied().filter(|(relation, ..)| has_directory(*relation));
    let relations = relation_files(forks, &listing.databases, segment_blocks)?;
    let checkpoint = synthetic_checkpoint(&source, &counters, &template)?;
    let control = control(template, &counters, &checkpoint, source.time);
    let (mut files, mut left_out) = advisory_files(&listing);
    let maps = free_space_files(&listing.advisory, source.forks);
    files.extend(maps.files);
    left_out.extend(maps.left_out);
    files.extend(database_files(&listing));
    files.extend(slru_files(mem::take(&mut listing.slru_pages))?);
    files.extend(two_phase_files(&listing)?);
    files.push(SmallFile {
        path: String::from("pg_logical/replorigin_checkpoint"),
        contents: listing.origins.to_bytes(),
    });
    files.extend(source.histories.iter().map(|(timeline, contents)| SmallFile {
        path: format!("pg_wal/{}", history_file_name(*timeline)),
        contents: contents.clone(),
    }));
    let mut directories: Vec<String> = DIRECTORIES.iter().copied().map(String::from).collect();
    directories
        .extend(listing.databases.iter().filter_map(|database| directory(*database)).filter(|path| path != "global"));
    Ok(Plan {
        directories,
        files,
        relations,
        segment_blocks,
        checkpoint,
        control,
        left_out,
        useless_maps: maps.useless,
        in_tablespaces,
    })
}

fn has_directory(relation: RelFileLocator) -> bool {
    directory(Database { tablespace: relation.tablespace, database: relation.database }).is_some()
}

/// Takes the databases of tablespaces out of the listing; returns what is in tablespaces. They are a developer's option
/// (`allow_in_place_tablespaces`), which one statement of a superuser turns on: that must not keep the rest from starting.
fn leave_tablespaces_out(listing: &mut MetadataListing, forks: &[(RelFileLocator, Fork, u32)]) -> Vec<String> {
    let mut left_out: Vec<String> = listing
        .databases
        .iter()
        .filter(|database| directory(**database).is_none())
        .map(|database| format!("database {} in tablespace {}", database.database, database.tablespace))
        .collect();
    listing.databases.retain(|database| directory(*database).is_some());
    listing.relation_maps.retain(|database, _| directory(*database).is_some());
    let relations: BTreeSet<RelFileLocator> =
        forks.iter().map(|(relation, ..)| *relation).filter(|relation| !has_directory(*relation)).collect();
    left_out.extend(relations.iter().map(|relation| {
        let RelFileLocator { tablespace, database, relation } = relation;
        format!("relation {tablespace}/{database}/{relation}")
    }));
    left_out
}

fn synthetic_checkpoint(
    source: &Source<'_>,
    counters: &Counters,
    template: &ControlFile,
) -> Result<SyntheticCheckpoint, WalPageError> {
    let checkpoint =
        pgformat::CheckPoint { wal_level: counters.settings.wal_level, time: source.time, ..counters.checkpoint };
    let segment_bytes = u64::from(template.segment_bytes);
    SyntheticCheckpoint::new(&source.summary, checkpoint, template.system_id, segment_bytes, source.page_before)
}

/// What the cluster is from the template, what it has come to from the log.
fn control(template: ControlFile, counters: &Counters, checkpoint: &SyntheticCheckpoint, time: i64) -> ControlFile {
    ControlFile {
        state: DatabaseState::ShutDown,
        time,
        checkpoint_lsn: checkpoint.record_start,
        checkpoint: checkpoint.checkpoint,
        min_recovery_point: Lsn::INVALID,
        min_recovery_timeline: PgTimeline(0),
        backup_start: Lsn::INVALID,
        backup_end: Lsn::INVALID,
        backup_end_required: false,
        settings: counters.settings,
        ..template
    }
}

/// Files outside WAL, and the paths of those that may not be there.
fn advisory_files(listing: &MetadataListing) -> (Vec<SmallFile>, Vec<String>) {
    let mut files: BTreeMap<&str, &[u8]> = BTreeMap::from([(VERSION_FILE, VERSION)]);
    let mut left_out = Vec::new();
    for file in &listing.advisory {
        if is_advisory(&file.name) {
            files.insert(&file.name, &file.contents);
        } else if file.name != CONTROL_FILE && free_space_map_of(&file.name).is_none() {
            left_out.push(file.name.clone());
        }
    }
    let files = files.into_iter().map(|(path, contents)| SmallFile { path: path.into(), contents: contents.to_vec() });
    (files.collect(), left_out)
}

/// The version of each database, and its relation map. A database that is just being made may have no map yet.
fn database_files(listing: &MetadataListing) -> Vec<SmallFile> {
    let mut files = Vec::new();
    for database in &listing.databases {
        let Some(directory) = directory(*database) else { continue };
        if database.tablespace == DEFAULT_TABLESPACE {
            files.push(SmallFile { path: format!("{directory}/{VERSION_FILE}"), contents: Vec::from(VERSION) });
        }
    }
    for (database, map) in &listing.relation_maps {
        let Some(directory) = directory(*database) else { continue };
        if listing.databases.contains(database) || database.tablespace == GLOBAL_TABLESPACE {
            files.push(SmallFile { path: format!("{directory}/pg_filenode.map"), contents: map.clone() });
        }
    }
    files
}

/// `TwoPhaseFilePath`.
fn two_phase_files(listing: &MetadataListing) -> Result<Vec<SmallFile>, PlanError> {
    let files = listing.two_phase.iter().map(|(full_xid, contents)| {
        let state = contents.split_last_chunk::<4>().map(|(state, _)| state);
        match state.is_some_and(|state| two_phase_file(state) == *contents) {
            true => Ok(SmallFile { path: format!("pg_twophase/{full_xid:016X}"), contents: contents.clone() }),
            false => Err(PlanError::TwoPhase(*full_xid)),
        }
    });
    files.collect()
}
