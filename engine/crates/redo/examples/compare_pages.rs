//! Compares the relation files of two data directories block by block, after masking: `compare_pages OURS THEIRS KINDS`.
//!
//! For the tests of the page service: OURS is an export, THEIRS the directory of the server that wrote the log, in which a
//! block of zeros may never have been fetched and says nothing. KINDS has a line `PATH RMGR` for each file's first segment
//! below them, RMGR being the resource manager that knows its pages. Ends with a line `N blocks compared, N identical, N
//! different, N zero`.
//!
//! Three things change on a writer without WAL, and are not compared: where SP-GiST last found room (`spgUpdateMetaPage`), the
//! values of a sequence that are logged ahead (`nextval_internal`), and bits that a visibility map has more than ours: a database
//! that was copied page by page has them in its files, while the logged pages lack what lies between their header's places.

use std::{collections::BTreeMap, env, fs, path::Path, process::ExitCode};

use redo::{PAGE_BYTES, Page, mask::mask};
use wal::Fork;

/// Differences that are described; all are counted.
const SHOWN_MAX: u32 = 20;

#[derive(Default)]
struct Verdict {
    compared: u32,
    identical: u32,
    different: u32,
    zero: u32,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [ours, theirs, kinds] = &arguments[..] else {
        eprintln!("usage: compare_pages OURS THEIRS KINDS");
        return ExitCode::from(2);
    };
    match compare(Path::new(ours), Path::new(theirs), Path::new(kinds)) {
        Ok(Verdict { compared, identical, different, zero }) => {
            println!("{compared} blocks compared, {identical} identical, {different} different, {zero} zero");
            ExitCode::from(u8::from(different > 0))
        }
        Err(error) => {
            eprintln!("compare_pages: {error}");
            ExitCode::from(2)
        }
    }
}

fn compare(ours: &Path, theirs: &Path, kinds: &Path) -> Result<Verdict, String> {
    let text = fs::read_to_string(kinds).map_err(|error| format!("{}: {error}", kinds.display()))?;
    let mut rmgrs = BTreeMap::new();
    for line in text.lines() {
        let (path, rmgr) = line.split_once(' ').ok_or_else(|| format!("not PATH RMGR: {line}"))?;
        rmgrs.insert(path, rmgr.parse::<u8>().map_err(|error| format!("{line}: {error}"))?);
    }
    let mut verdict = Verdict::default();
    for (path, rmgr) in &rmgrs {
        for (suffix, fork) in [("", Fork::Main), ("_vm", Fork::VisibilityMap), ("_init", Fork::Init)] {
            for segment in 0.. {
                let number = if segment == 0 { String::new() } else { format!(".{segment}") };
                let name = format!("{path}{suffix}{number}");
                let Ok(their_bytes) = fs::read(theirs.join(&name)) else { break };
                // A file that only they have is zeros, or it differs.
                let our_bytes = fs::read(ours.join(&name)).unwrap_or_default();
                compare_file(&name, (*rmgr, fork, segment), &our_bytes, &their_bytes, &mut verdict);
            }
        }
    }
    Ok(verdict)
}

fn compare_file(name: &str, (rmgr, fork, segment): (u8, Fork, u32), ours: &[u8], theirs: &[u8], verdict: &mut Verdict) {
    /// Blocks of a file (`RELSEG_SIZE`).
    const SEGMENT_BLOCKS: u32 = 131_072;
    for (at, their_bytes) in theirs.chunks_exact(PAGE_BYTES).enumerate() {
        if their_bytes.iter().all(|byte| *byte == 0) {
            verdict.zero += 1;
            continue;
        }
        verdict.compared += 1;
        let block = segment * SEGMENT_BLOCKS + at as u32;
        let our_bytes = ours.get(at * PAGE_BYTES..(at + 1) * PAGE_BYTES);
        if our_bytes == Some(their_bytes) {
            verdict.identical += 1;
            continue;
        }
        let difference = match our_bytes {
            None => Some("ours is shorter".to_owned()),
            Some(our_bytes) => difference(rmgr, fork, block, our_bytes, their_bytes),
        };
        if let Some(difference) = difference {
            verdict.different += 1;
            if verdict.different <= SHOWN_MAX {
                println!("{name} block {block}: {difference}");
            }
        }
    }
}

/// Where the pages differ after masking.
fn difference(rmgr: u8, fork: Fork, block: u32, ours: &[u8], theirs: &[u8]) -> Option<String> {
    let masked = |bytes: &[u8]| {
        let mut page = Page::ZERO;
        page.0.copy_from_slice(bytes);
        forget_unlogged(rmgr, fork, block, &mut page);
        mask(rmgr, fork, block, &mut page).map(|()| page).map_err(|error| error.to_string())
    };
    let (ours, theirs) = match (masked(ours), masked(theirs)) {
        (Ok(ours), Ok(theirs)) => (ours, theirs),
        (Err(error), _) => return Some(format!("ours cannot be masked: {error}")),
        (_, Err(error)) => return Some(format!("theirs cannot be masked: {error}")),
    };
    let differ = |at: &usize| match fork {
        Fork::VisibilityMap => ours.0[*at] & !theirs.0[*at] != 0,
        _ => ours.0[*at] != theirs.0[*at],
    };
    let first = (0..PAGE_BYTES).find(differ)?;
    Some(format!("{} bytes differ, from {first} on", (0..PAGE_BYTES).filter(differ).count()))
}

/// Overwrites what changes without WAL.
fn forget_unlogged(rmgr: u8, fork: Fork, block: u32, page: &mut Page) {
    /// Resource managers (`access/rmgrlist.h`).
    const SEQUENCE: u8 = 15;
    const SPGIST: u8 = 16;
    /// `SpGistMetaPageData.lastUsedPages`, behind the page's header and the magic number.
    const LAST_USED_PAGES: std::ops::Range<usize> = 28..92;
    /// A sequence's only row begins behind a row header: `last_value`, `log_cnt`, `is_called`.
    const ROW_HEADER_BYTES: usize = 24;
    const ROW_BYTES: usize = 17;
    match (rmgr, fork, block) {
        (SPGIST, Fork::Main | Fork::Init, 0) => page.0[LAST_USED_PAGES].fill(0),
        (SEQUENCE, Fork::Main, 0) => {
            // The first line pointer: its lower 15 bits are the row's place.
            let row = usize::from(u16::from_le_bytes([page.0[24], page.0[25]]) & 0x7FFF) + ROW_HEADER_BYTES;
            if let Some(values) = page.0.get_mut(row..row + ROW_BYTES) {
                values.fill(0);
            }
        }
        _ => {}
    }
}
