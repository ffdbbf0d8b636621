//! Writes the PGDATA of a cold start: what the plan of `backup` says, relation files empty but of their length, and the block
//! map that says so.
//!
//! Its cost is a file's creation for each relation, whatever is in them. Nothing is synced: after a crash it is made again.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use backup::{Plan, RelationFile, RelationPages};
use vfs_abi::blocks::{
    BLOCK_BYTES, EVICT_ALWAYS, EVICT_BY_AGENT, FILE_BLOCKS_MAX, FileKey, Layout, LayoutFault, MapFull,
};

use crate::{
    cache::{Futex, SharedBlocks},
    isolation::User,
    page_service_config::Evict,
    restore::{RestoreError, give, write_for},
    sparse::{SparseFile, make_directories, make_files, spread_directories},
};

/// Relation files that the map has room for, unless there are more than half as many to begin with. Room that is not used
/// takes no memory.
const FILES_MAX: u32 = 1 << 20;
/// The most that a map can have room for.
const FILES_LIMIT: u32 = 1 << 22;
/// Chunks of 16 MiB that the map has room for: 16 TiB of blocks that were touched. Also no memory until then.
const CHUNKS_MAX: u32 = 1 << 20;

/// Says what the directory is, to whoever looks into it and to tools that copy it (rsync, tar, file-system backups): it cannot
/// be read, so that they fail, rather than copy files that are mostly holes. PostgreSQL never touches it; `pg_basebackup`,
/// which reads through PostgreSQL and is right, skips names that begin like temporary files (`PG_TEMP_FILE_PREFIX`).
const SENTINEL: &str = "pgsql_tmp.THIS_IS_A_CACHE_NOT_A_DATABASE";

/// A PGDATA that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ColdStartError {
    /// A file.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The memory of the block map.
    #[error("the block map: {0}")]
    Map(#[from] io::Error),
    /// Its sizes.
    #[error(transparent)]
    Layout(#[from] LayoutFault),
    /// It has no room.
    #[error(transparent)]
    Full(#[from] MapFull),
    /// PostgreSQL was built with another `--with-segsize`.
    #[error("relation files of {0} blocks are not supported: expected {FILE_BLOCKS_MAX} (1 GiB)")]
    SegmentBlocks(u32),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::Io { path, source }
}

/// Makes `draft`, which must not exist, from the plan, and then `pgdata` of it. `init_pages` are the contents of the files
/// that begin as copies of init forks, in the order of the plan.
///
/// # Errors
/// A file cannot be made; `interrupted` was set.
pub fn write_pgdata(
    plan: &Plan,
    init_pages: &[Vec<u8>],
    draft: &Path,
    pgdata: &Path,
    user: Option<&User>,
    interrupted: &AtomicBool,
) -> Result<(), ColdStartError> {
    if plan.segment_blocks != FILE_BLOCKS_MAX {
        return Err(ColdStartError::SegmentBlocks(plan.segment_blocks));
    }
    if let Some(parent) = draft.parent() {
        spread_directories(parent);
    }
    make_directories(draft, plan.directories.iter().map(Path::new), user)?;
    let mut sparse = Vec::with_capacity(plan.relations.len());
    let mut copies = init_pages.iter();
    for file in &plan.relations {
        match file.pages {
            RelationPages::Service => {
                sparse.push(SparseFile { path: PathBuf::from(&file.path), bytes: u64::from(file.blocks) * BLOCK_BYTES })
            }
            RelationPages::CopyOfInit => {
                let pages = copies.next().expect("one for each file that begins as a copy");
                write_for(&draft.join(&file.path), pages, user)?;
            }
        }
    }
    make_files(draft, &sparse, user, interrupted)?;
    for file in plan.files.iter().chain([&plan.control_file()]) {
        write_for(&draft.join(&file.path), &file.contents, user)?;
    }
    for file in &plan.checkpoint.files {
        let path = draft.join(&file.path);
        let segment = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(at(&path))?;
        segment.set_len(file.length).map_err(at(&path))?;
        for piece in &file.pieces {
            segment.write_all_at(&piece.bytes, piece.offset).map_err(at(&path))?;
        }
        give(&path, user)?;
    }
    let sentinel = draft.join(SENTINEL);
    OpenOptions::new().write(true).create_new(true).mode(0o000).open(&sentinel).map_err(at(&sentinel))?;
    give(&sentinel, user)?;
    fs::rename(draft, pgdata).map_err(at(pgdata))?;
    Ok(())
}

/// The block map of such a PGDATA: all of it is with the page service, as of X and later.
///
/// # Errors
/// Memory, or too many files.
pub fn map_of(plan: &Plan, evict: Evict) -> Result<SharedBlocks, ColdStartError> {
    let files = u32::try_from(plan.relations.len()).map_err(|_| MapFull::Files(FILES_LIMIT))?;
    let files_max = if files > FILES_MAX / 2 { FILES_LIMIT } else { FILES_MAX };
    let blocks = SharedBlocks::create(Layout::new(files_max, CHUNKS_MAX)?)?;
    let map = blocks.map();
    // X is committed.
    map.initialise(plan.begin().0, plan.begin().0);
    map.set_evict_mode(match evict {
        Evict::AsNeeded => EVICT_BY_AGENT,
        Evict::Always => EVICT_ALWAYS,
    });
    for file in &plan.relations {
        let (absent_below, pinned) = match file.pages {
            RelationPages::Service => (file.blocks, false),
            RelationPages::CopyOfInit => (0, true),
        };
        map.add_file(key_of(file), absent_below, pinned, &Futex)?;
    }
    Ok(blocks)
}

/// What the map calls a file.
fn key_of(file: &RelationFile) -> FileKey {
    FileKey {
        tablespace: file.relation.tablespace,
        database: file.relation.database,
        relation: file.relation.relation,
        fork: file.fork as u32,
        segment: file.segment,
    }
}

/// A name beside `pgdata` for one that is being made.
pub fn draft_of(pgdata: &Path, random: [u8; 16]) -> PathBuf {
    let [a, b, c, d, ..] = random;
    // Another name each time: ext4 chooses the place of a directory by it.
    pgdata.with_extension(format!("new-{:08x}", u32::from_le_bytes([a, b, c, d])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_the_map_are_the_paths_of_the_plan() {
        use wal::{Fork, RelFileLocator};
        let file = |path: &str, tablespace, database, fork, segment| RelationFile {
            path: path.to_owned(),
            relation: RelFileLocator { tablespace, database, relation: 16384 },
            fork,
            segment,
            blocks: 1,
            pages: RelationPages::Service,
        };
        for file in [
            file("base/5/16384", 1663, 5, Fork::Main, 0),
            file("base/5/16384_vm", 1663, 5, Fork::VisibilityMap, 0),
            file("base/5/16384_init", 1663, 5, Fork::Init, 0),
            file("base/5/16384.3", 1663, 5, Fork::Main, 3),
            file("global/16384", 1664, 0, Fork::Main, 0),
        ] {
            assert_eq!(Path::new(&file.path), crate::cache::relation_path(&key_of(&file)));
        }
    }
}
