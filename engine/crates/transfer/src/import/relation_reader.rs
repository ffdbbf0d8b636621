//! Runs of blocks out of the files of relations.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    pgdata::PgDataError,
    relations::{BLOCK_BYTES, ForkFiles, RELATION_SEGMENT_BLOCKS},
};

/// Reads runs of blocks of a PGDATA's relations.
#[derive(Debug)]
pub(crate) struct RelationReader {
    pgdata: PathBuf,
    /// The file of the last read.
    open: Option<(PathBuf, File)>,
}

impl RelationReader {
    pub(crate) fn new(pgdata: &Path) -> RelationReader {
        RelationReader { pgdata: pgdata.to_owned(), open: None }
    }

    /// Fills `bytes`, a whole number of blocks, from `first` on.
    ///
    /// # Errors
    /// A file is not there or ends early: a server that runs meanwhile truncates.
    pub(crate) fn read(&mut self, files: &ForkFiles, first: u32, mut bytes: &mut [u8]) -> Result<(), PgDataError> {
        let mut block = first;
        while !bytes.is_empty() {
            let in_segment = block % RELATION_SEGMENT_BLOCKS;
            let left = (RELATION_SEGMENT_BLOCKS - in_segment) as usize * BLOCK_BYTES;
            let (part, rest) = bytes.split_at_mut(left.min(bytes.len()));
            let path = self.pgdata.join(files.path(block));
            let file = match self.open.take() {
                Some((open, file)) if open == path => file,
                _ => File::open(&path).map_err(PgDataError::io(&path))?,
            };
            file.read_exact_at(part, u64::from(in_segment) * BLOCK_BYTES as u64).map_err(PgDataError::io(&path))?;
            self.open = Some((path, file));
            block += (part.len() / BLOCK_BYTES) as u32;
            bytes = rest;
        }
        Ok(())
    }
}
