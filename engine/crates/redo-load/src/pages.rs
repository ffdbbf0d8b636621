//! Pages in memory, read from the files of PGDATA when they are first touched.

use std::{
    collections::HashMap,
    fmt::Write,
    fs::File,
    hash::{BuildHasherDefault, Hasher},
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

/// A hash for tags, whose few numbers nobody chooses against us; PostgreSQL's table of buffers has a cheap one, too.
#[derive(Default)]
struct TagHasher(u64);

impl Hasher for TagHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(number as u64);
    }

    fn finish(&self) -> u64 {
        // The table takes its place from the lower bits, and the upper ones are the good ones.
        self.0.rotate_left(26)
    }
}

type Map<T> = HashMap<BlockTag, T, BuildHasherDefault<TagHasher>>;

/// All pages that were touched.
pub struct Pages {
    pgdata: PathBuf,
    /// `None`: there is no such file.
    files: Map<Option<File>>,
    pages: Map<Box<Page>>,
}

impl Pages {
    /// None yet.
    pub fn new(pgdata: PathBuf) -> Pages {
        Pages { pgdata, files: Map::default(), pages: Map::default() }
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
