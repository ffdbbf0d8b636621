//! What a record does to whole relations and databases: it concerns every shard that may have blocks of them.
//!
//! Sources: `catalog/storage_xlog.h`, `access/xact.h` (`ParseCommitRecord`, `ParseAbortRecord`), `commands/dbcommands_xlog.h`.

use wal::{Fork, Record, RelFileLocator, rmgr, xact_info};

use crate::{
    RedoError,
    reader::Reader,
    visibility_map::{cuts_page, map_block},
};

/// A relation as `xl_smgr_truncate` cuts it off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Truncation {
    /// Whose files.
    pub relation: RelFileLocator,
    /// Length that the main fork is cut to, in blocks.
    pub heap_blocks: u32,
    /// The main fork is cut.
    pub main: bool,
    /// The visibility map is cut accordingly.
    pub visibility_map: bool,
    /// The free-space map is cut accordingly.
    pub free_space_map: bool,
}

impl Truncation {
    /// Blocks that the visibility map keeps; the last of them may lose bits ([`crate::Reason::TruncateVisibility`]).
    pub fn visibility_map_blocks(&self) -> u32 {
        let last = map_block(self.heap_blocks);
        if cuts_page(self.heap_blocks) { last + 1 } else { last }
    }
}

/// A change to more than single blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A fork begins, empty: blocks of an earlier relation of that number are gone.
    CreateFork(RelFileLocator, Fork),
    /// A relation becomes shorter.
    Truncate(Truncation),
    /// A relation is gone with all of its forks.
    DropRelation(RelFileLocator),
    /// A database begins as a copy of all files of another, as they are at this record. Page LSNs stay.
    CopyDatabase {
        /// The new database.
        to: Database,
        /// The one that is copied.
        from: Database,
    },
    /// A database begins empty; records follow for its blocks.
    CreateDatabase(Database),
    /// The part of a database that lies in one tablespace is gone.
    DropDatabase(Database),
}

/// The part of a database that lies in one tablespace.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Database {
    /// Tablespace.
    pub tablespace: u32,
    /// Database.
    pub database: u32,
}

/// Everything that the record does to whole relations and databases, in its order.
///
/// A record that is shorter than its kind ends the list early: the decoder has refused those that matter.
pub fn events_of(record: &Record) -> impl Iterator<Item = Event> + '_ {
    let first = match record.info.rmgr {
        rmgr::SMGR => truncation_of(record).map(Event::Truncate).or_else(|| creation_of(record)),
        rmgr::DBASE => created_database(record),
        _ => None,
    };
    let (relations, databases) = match record.info.rmgr {
        rmgr::XACT => (dropped_relations(record).unwrap_or_default(), None),
        rmgr::DBASE => (&[][..], dropped_databases(record)),
        _ => (&[][..], None),
    };
    let relations = relations.chunks_exact(LOCATOR_BYTES).filter_map(|bytes| locator(&mut Reader::new(bytes)).ok());
    let databases = databases.into_iter().flat_map(|(database, tablespaces)| {
        let tablespaces = tablespaces.chunks_exact(4).filter_map(|bytes| Reader::new(bytes).u32().ok());
        tablespaces.map(move |tablespace| Event::DropDatabase(Database { tablespace, database }))
    });
    first.into_iter().chain(relations.map(Event::DropRelation)).chain(databases)
}

/// Bytes of `RelFileLocator`.
const LOCATOR_BYTES: usize = 12;

fn locator(data: &mut Reader<'_>) -> Result<RelFileLocator, RedoError> {
    Ok(RelFileLocator { tablespace: data.u32()?, database: data.u32()?, relation: data.u32()? })
}

/// `xl_smgr_truncate`.
pub(crate) fn truncation_of(record: &Record) -> Option<Truncation> {
    const TRUNCATE: u8 = 0x20;
    if record.info.rmgr != rmgr::SMGR || record.info.info & 0xF0 != TRUNCATE {
        return None;
    }
    let mut main = Reader::new(record.main_data());
    let heap_blocks = main.u32().ok()?;
    let relation = locator(&mut main).ok()?;
    let flags = main.u32().ok()?;
    Some(Truncation {
        relation,
        heap_blocks,
        main: flags & 1 != 0,
        visibility_map: flags & 2 != 0,
        free_space_map: flags & 4 != 0,
    })
}

/// `xl_smgr_create`.
fn creation_of(record: &Record) -> Option<Event> {
    const CREATE: u8 = 0x10;
    if record.info.info & 0xF0 != CREATE {
        return None;
    }
    let mut main = Reader::new(record.main_data());
    let relation = locator(&mut main).ok()?;
    let fork = match main.u32().ok()? {
        0 => Fork::Main,
        1 => Fork::FreeSpaceMap,
        2 => Fork::VisibilityMap,
        3 => Fork::Init,
        _ => return None,
    };
    Some(Event::CreateFork(relation, fork))
}

/// The relations of a commit or abort, behind its database and subtransactions.
fn dropped_relations(record: &Record) -> Option<&[u8]> {
    const DBINFO: u32 = 1 << 0;
    const SUBXACTS: u32 = 1 << 1;
    const RELATIONS: u32 = 1 << 2;
    const TIME_BYTES: usize = 8;
    const DBINFO_BYTES: usize = 8;
    let kind = record.info.info & xact_info::OPERATION_MASK;
    let ends =
        matches!(kind, xact_info::COMMIT | xact_info::COMMIT_PREPARED | xact_info::ABORT | xact_info::ABORT_PREPARED);
    if !ends || record.info.info & xact_info::HAS_INFO == 0 {
        return None;
    }
    let mut main = Reader::new(record.main_data());
    main.skip(TIME_BYTES).ok()?;
    let flags = main.u32().ok()?;
    if flags & DBINFO != 0 {
        main.skip(DBINFO_BYTES).ok()?;
    }
    if flags & SUBXACTS != 0 {
        let count = main.u32().ok()? as usize;
        main.skip(count.checked_mul(4)?).ok()?;
    }
    if flags & RELATIONS == 0 {
        return None;
    }
    let count = main.u32().ok()? as usize;
    main.take(count.checked_mul(LOCATOR_BYTES)?).ok()
}

/// `xl_dbase_create_file_copy_rec` and `xl_dbase_create_wal_log_rec`.
fn created_database(record: &Record) -> Option<Event> {
    const CREATE_FILE_COPY: u8 = 0x00;
    const CREATE_WAL_LOG: u8 = 0x10;
    let mut main = Reader::new(record.main_data());
    let mut database = || Some(Database { database: main.u32().ok()?, tablespace: main.u32().ok()? });
    match record.info.info & 0xF0 {
        CREATE_FILE_COPY => Some(Event::CopyDatabase { to: database()?, from: database()? }),
        CREATE_WAL_LOG => Some(Event::CreateDatabase(database()?)),
        _ => None,
    }
}

/// `xl_dbase_drop_rec`: the database, and its tablespaces as bytes.
fn dropped_databases(record: &Record) -> Option<(u32, &[u8])> {
    const DROP: u8 = 0x20;
    if record.info.info & 0xF0 != DROP {
        return None;
    }
    let mut main = Reader::new(record.main_data());
    let (database, count) = (main.u32().ok()?, main.u32().ok()? as usize);
    Some((database, main.take(count.checked_mul(4)?).ok()?))
}
