//! Pages in memory, read from the files of PGDATA when they are first touched.

use std::{
    collections::HashMap,
    fmt::Write,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use redo::{BlockTag, PAGE_BYTES, Page};
use wal::Fork;

/// Blocks of a file of a relation (`RELSEG_SIZE`).
const SEGMENT_BLOCKS: u32 = 131_072;
/// `GLOBALTABLESPACE_OID`.
const GLOBAL_TABLESPACE: u32 = 1664;

/// Which file: the tag of its first block.
type FileTag = BlockTag;

/// All pages that were touched.
pub struct Pages {
    pgdata: PathBuf,
    /// `None`: there is no such file.
    files: HashMap<FileTag, Option<File>>,
    pages: HashMap<BlockTag, Box<Page>>,
}

impl Pages {
    /// None yet.
    pub fn new(pgdata: PathBuf) -> Pages {
        Pages { pgdata, files: HashMap::new(), pages: HashMap::new() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.pages.len()
    }

    /// A page; zeros where the files have none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn page(&mut self, tag: BlockTag) -> io::Result<&mut Page> {
        use std::collections::hash_map::Entry;
        match self.pages.entry(tag) {
            Entry::Occupied(held) => Ok(held.into_mut()),
            Entry::Vacant(place) => {
                let first = FileTag { block: tag.block / SEGMENT_BLOCKS * SEGMENT_BLOCKS, ..tag };
                let file = match self.files.entry(first) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(unknown) => unknown.insert(open(&self.pgdata, first)?),
                };
                let mut page = Box::new(Page::ZERO);
                if let Some(file) = file {
                    let offset = u64::from(tag.block % SEGMENT_BLOCKS) * PAGE_BYTES as u64;
                    match file.read_exact_at(&mut page.0, offset) {
                        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => page.0.fill(0),
                        result => result?,
                    }
                }
                Ok(place.insert(page))
            }
        }
    }
}

fn open(pgdata: &Path, first: FileTag) -> io::Result<Option<File>> {
    let BlockTag { relation, fork, block } = first;
    let directory = match relation.tablespace {
        GLOBAL_TABLESPACE => pgdata.join("global"),
        _ => pgdata.join("base").join(relation.database.to_string()),
    };
    let mut name = relation.relation.to_string();
    name += match fork {
        Fork::Main => "",
        Fork::FreeSpaceMap => "_fsm",
        Fork::VisibilityMap => "_vm",
        Fork::Init => "_init",
    };
    if block > 0 {
        write!(name, ".{}", block / SEGMENT_BLOCKS).expect("a string grows");
    }
    match File::open(directory.join(name)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
