//! Pages of relations from page servers into files, many requests in flight.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use pageclient::{BlockRead, PageClient};
use pgtypes::Lsn;
use wal::{Fork, RelFileLocator};
use wire::page::PAGES_MAX;

use super::ExportError;
use crate::{
    page::{PageError, PageRules},
    progress::Progress,
    relations::BLOCK_BYTES,
};

/// A page server that restarts, and fetches its layers from object storage, is back within this.
const DEADLINE: Duration = Duration::from_secs(120);

/// A file of a relation that exists already, at its full length and sparse.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RelationFile {
    /// Relative to PGDATA.
    pub(crate) path: PathBuf,
    pub(crate) relation: RelFileLocator,
    pub(crate) fork: Fork,
    /// Number of its first block in the fork.
    pub(crate) first_block: u32,
    /// How many it has.
    pub(crate) blocks: u32,
}

/// Reads all blocks as of `at` and writes those that are not zeros; returns how many. Requests go in the order of files, so
/// that few are open at once.
///
/// # Errors
/// A page cannot be had or is damaged, a file cannot be written, the user interrupts.
pub(crate) async fn fetch(
    client: &PageClient,
    directory: &Path,
    files: &[RelationFile],
    at: Lsn,
    rules: PageRules,
    requests_max: usize,
    progress: &dyn Progress,
) -> Result<u64, ExportError> {
    let mut open: Option<(usize, Rc<File>)> = None;
    let runs = files.iter().enumerate().flat_map(|(number, file)| {
        (0..file.blocks).step_by(usize::from(PAGES_MAX)).map(move |first| (number, file, first))
    });
    let reads = runs.map(|(number, file, first)| {
        let target = match &open {
            Some((of, target)) if *of == number => Ok(Rc::clone(target)),
            _ => open_file(&directory.join(&file.path)).map(|target| {
                let target = Rc::new(target);
                open = Some((number, Rc::clone(&target)));
                target
            }),
        };
        read_run(client, directory, file, first, target, at, rules, progress)
    });
    stream::iter(reads).buffer_unordered(requests_max).try_fold(0, async |sum, pages| Ok(sum + pages)).await
}

fn open_file(path: &Path) -> Result<File, ExportError> {
    File::options().write(true).open(path).map_err(ExportError::io(path))
}

#[expect(clippy::too_many_arguments, reason = "all of them are of one request, and nobody else needs their sum")]
async fn read_run(
    client: &PageClient,
    directory: &Path,
    file: &RelationFile,
    first: u32,
    target: Result<Rc<File>, ExportError>,
    at: Lsn,
    rules: PageRules,
    progress: &dyn Progress,
) -> Result<u64, ExportError> {
    if progress.is_interrupted() {
        return Err(ExportError::Interrupted);
    }
    let target = target?;
    let count = (file.blocks - first).min(u32::from(PAGES_MAX));
    let read = BlockRead {
        relation: file.relation,
        fork: file.fork,
        first_block: file.first_block + first,
        count,
        request_lsn: at,
        not_modified_since: at,
    };
    let answer = client.get_pages(&read, driver::now().after(DEADLINE)).await?;
    let (pages, rest) = answer.bytes.as_chunks::<BLOCK_BYTES>();
    assert!(rest.is_empty() && pages.len() == count as usize, "the client gives as many pages as it was asked for");
    let mut written = 0;
    for (page, number) in pages.iter().zip(first..) {
        let block = file.first_block + number;
        let fault = |fault| PageError { path: directory.join(&file.path), block, fault };
        // What is not written is a hole, which reads as zeros.
        if rules.check(page, block).map_err(fault)? {
            write(&target, page, number).map_err(ExportError::io(&directory.join(&file.path)))?;
            written += 1;
        }
    }
    progress.advance(answer.bytes.len() as u64);
    Ok(written)
}

/// Into the page cache, on this core: its only other work is the network.
fn write(file: &File, page: &[u8; BLOCK_BYTES], number: u32) -> io::Result<()> {
    file.write_all_at(page, u64::from(number) * BLOCK_BYTES as u64)
}
