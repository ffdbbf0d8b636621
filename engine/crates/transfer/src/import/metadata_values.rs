//! What a PGDATA has beside pages of relations, as values under the keys of metadata: small files first, then SLRU pages.

use std::{fs, io};

use layers::{Key, Metadata};
use metadata::{Counters, Origins, SLRU_PAGE_BYTES, Slru};
use pgtypes::Lsn;
use shard::{ADVISORY_BYTES_MAX, Advisory};
use wal::crc32c;

use crate::{
    pgdata::{ADVISORY_FILES, PgData, PgDataError, STATISTICS, names},
    relations::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE, databases},
};

/// `sizeof(RelMapFile)`.
const RELATION_MAP_BYTES: usize = 524;
/// Pages of a file of an SLRU (`SLRU_PAGES_PER_SEGMENT`).
const SLRU_FILE_PAGES: usize = 32;

/// All values of metadata but SLRU pages, in the order of their keys.
///
/// # Errors
/// A file cannot be read, or has the name, length or checksum of no such file.
pub(crate) fn small_values(pgdata: &PgData) -> Result<Vec<(Key, Vec<u8>)>, PgDataError> {
    let mut values = Vec::new();
    let mut put = |what, value| values.push((Key::metadata(what), value));
    put(Metadata::Checkpoint, Counters::from_control(&pgdata.control).to_bytes());

    put_database(pgdata, GLOBAL_TABLESPACE, 0, "global", &mut put)?;
    for database in databases(&pgdata.directory)? {
        put_database(pgdata, DEFAULT_TABLESPACE, database, &format!("base/{database}"), &mut put)?;
    }

    let directory = pgdata.directory.join("pg_twophase");
    for name in names(&directory)? {
        let path = directory.join(&name);
        let unexpected = |what: &str| PgDataError::Unexpected { path: path.clone(), what: what.to_owned() };
        let xid = u64::from_str_radix(&name, 16).ok().filter(|_| name.len() == 16);
        let xid = xid.ok_or_else(|| unexpected("no name of a prepared transaction's file"))?;
        let file = fs::read(&path).map_err(PgDataError::io(&path))?;
        let (state, crc) = file.split_last_chunk::<4>().ok_or_else(|| unexpected("it is too short"))?;
        if crc32c(0, state) != u32::from_le_bytes(*crc) {
            return Err(unexpected("its checksum is wrong; PostgreSQL would refuse to start, too"));
        }
        put(Metadata::TwoPhase(xid), file);
    }

    let path = pgdata.directory.join("pg_logical/replorigin_checkpoint");
    if let Some(file) = read_if_there(&path)? {
        let origins = Origins::parse(&file)
            .map_err(|error| PgDataError::Unexpected { path: path.clone(), what: error.to_string() })?;
        for (id, lsn) in origins.0.into_iter().filter(|(_, lsn)| *lsn != Lsn::INVALID) {
            put(Metadata::Origin(id), lsn.0.to_le_bytes().to_vec());
        }
    }

    for name in ADVISORY_FILES {
        let path = pgdata.directory.join(name);
        if let Some(contents) = read_if_there(&path)? {
            // The user was told.
            if name == STATISTICS && contents.len() > ADVISORY_BYTES_MAX {
                continue;
            }
            let file = Advisory { name: name.to_owned(), contents };
            let value = file.to_bytes().map_err(|e| PgDataError::Unexpected { path, what: e.to_string() })?;
            values.push((file.key(), value));
        }
    }
    values.sort_unstable();
    Ok(values)
}

/// That a database exists, and its relation map.
fn put_database(
    pgdata: &PgData,
    tablespace: u32,
    database: u32,
    directory: &str,
    put: &mut impl FnMut(Metadata, Vec<u8>),
) -> Result<(), PgDataError> {
    let path = pgdata.directory.join(directory).join("pg_filenode.map");
    let map = fs::read(&path).map_err(PgDataError::io(&path))?;
    if map.len() != RELATION_MAP_BYTES {
        let what = format!("{} bytes, expected {RELATION_MAP_BYTES}", map.len());
        return Err(PgDataError::Unexpected { path, what });
    }
    if database != 0 {
        put(Metadata::Database { tablespace, database }, Vec::new());
    }
    put(Metadata::RelationMap { tablespace, database }, map);
    Ok(())
}

fn read_if_there(path: &std::path::Path) -> Result<Option<Vec<u8>>, PgDataError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(PgDataError::io(path)(error)),
    }
}

/// Calls `put` with every SLRU page, in the order of keys; one file is in memory at a time.
///
/// # Errors
/// Those of `put`, and files that cannot be read or are of another length.
pub(crate) fn slru_pages<E: From<PgDataError>>(
    pgdata: &PgData,
    mut put: impl FnMut(Key, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    for slru in Slru::ALL {
        let directory = pgdata.directory.join(slru.directory());
        let mut files = Vec::new();
        for name in names(&directory)? {
            // A subdirectory, or what somebody left there: PostgreSQL does not look at such names, either.
            if let Some(first) = slru.first_page(&name) {
                files.push((first, directory.join(name)));
            }
        }
        files.sort_unstable();
        for (first, path) in files {
            let bytes = fs::read(&path).map_err(PgDataError::io(&path))?;
            let (pages, rest) = bytes.as_chunks::<SLRU_PAGE_BYTES>();
            if !rest.is_empty() || pages.len() > SLRU_FILE_PAGES {
                let what = format!("{} bytes: not 1 to {SLRU_FILE_PAGES} pages", bytes.len());
                return Err(PgDataError::Unexpected { path, what }.into());
            }
            for (page, number) in pages.iter().zip(first..) {
                put(Key::slru(key_slru(slru), number), page)?;
            }
        }
    }
    Ok(())
}

fn key_slru(slru: Slru) -> layers::Slru {
    match slru {
        Slru::TransactionStatus => layers::Slru::TransactionStatus,
        Slru::MultixactOffsets => layers::Slru::MultixactOffsets,
        Slru::MultixactMembers => layers::Slru::MultixactMembers,
        Slru::CommitTimestamps => layers::Slru::CommitTimestamps,
    }
}
