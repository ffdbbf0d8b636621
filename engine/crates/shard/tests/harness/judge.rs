//! Compares what shards have at the end with the server's files.

use std::collections::{BTreeMap, BTreeSet};

use layers::{HashRange, Key, Slru};
use metadata::SLRU_PAGE_BYTES;
use pgtypes::Lsn;
use redo::{PAGE_BYTES, Page, mask};
use shard::{MetadataListing, Rebuilt};
use wal::{Fork, Record, RelFileLocator};

use super::{
    capture::{Capture, STRIPING},
    files::SLRUS,
    store::Shard,
};

const SEQUENCE: u8 = 15;
const SPGIST: u8 = 16;
/// Faults that are described; the rest is counted.
const DESCRIBED: usize = 40;

#[derive(Default, Debug)]
pub struct Verdict {
    pub blocks: u64,
    /// Of the main and init forks, equal without masking.
    pub identical: u64,
    pub visibility_blocks: u64,
    /// Pages of visibility maps that came as images without bits.
    pub hollow: u64,
    pub sequences: u64,
    /// Blocks of the server that were never written: it extends files by more than WAL says.
    pub zero_beyond: u64,
    pub forks: u64,
    pub slru_pages: u64,
    pub fault_count: usize,
    pub faults: Vec<String>,
}

impl Verdict {
    fn fault(&mut self, what: String) {
        self.fault_count += 1;
        if self.faults.len() < DESCRIBED {
            self.faults.push(what);
        }
    }
}

fn shard_of(shards: &[Shard], key: Key) -> &Shard {
    shards.iter().find(|shard| shard.store.range.contains(key)).expect("shards have all keys")
}

/// Lengths of all forks, as an agent puts them together.
pub fn lengths(shards: &[Shard]) -> BTreeMap<(RelFileLocator, Fork), u32> {
    let mut lengths: BTreeMap<_, u32> = BTreeMap::new();
    for (of, size) in shards.iter().flat_map(|shard| shard.ingest.sizes()) {
        let length = lengths.entry((of.relation, of.fork)).or_default();
        *length = (*length).max(of.stripe * STRIPING.stripe_blocks + size.length);
    }
    lengths
}

pub fn compare(capture: &Capture, shards: &[Shard]) -> Verdict {
    let mut verdict = Verdict::default();
    for fault in shards.iter().flat_map(|shard| &shard.faults) {
        verdict.fault(fault.to_string());
    }
    let ours = lengths(shards);
    let theirs = &capture.end.forks;
    let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).copied().collect();
    for (relation, fork) in names {
        let Some(file) = theirs.get(&(relation, fork)) else {
            if !capture.end.unlogged.contains(&relation) {
                verdict.fault(format!("{relation:?} {fork:?} is not the server's"));
            }
            continue;
        };
        let is_zero = file.iter().all(|byte| *byte == 0);
        let Some(length) = ours.get(&(relation, fork)).or((fork == Fork::VisibilityMap && is_zero).then_some(&0))
        else {
            verdict.fault(format!("{relation:?} {fork:?} is missing, {} blocks", file.len() / PAGE_BYTES));
            continue;
        };
        verdict.forks += 1;
        if *length as usize > file.len() / PAGE_BYTES {
            verdict.fault(format!("{relation:?} {fork:?}: {length} blocks, {} bytes in the file", file.len()));
        }
        for (theirs, block) in file.chunks_exact(PAGE_BYTES).zip(0..) {
            if block >= *length {
                verdict.zero_beyond += 1;
                if theirs.iter().any(|byte| *byte != 0) {
                    verdict.fault(format!("{relation:?} {fork:?}: {length} blocks, but {block} is not zero"));
                }
                continue;
            }
            let theirs = Page(*theirs.first_chunk().expect("a page"));
            compare_block(capture, shards, relation, fork, block, theirs, &mut verdict);
        }
    }
    compare_metadata(capture, shards, &mut verdict);
    verdict
}

fn compare_block(
    capture: &Capture,
    shards: &[Shard],
    relation: RelFileLocator,
    fork: Fork,
    block: u32,
    mut theirs: Page,
    verdict: &mut Verdict,
) {
    let key = STRIPING.block(relation, fork, block);
    let store = &shard_of(shards, key).store;
    let mut ours = match store.read(key, Lsn::MAX) {
        Ok(Rebuilt::Page(page)) => *page,
        Ok(_) => Page::ZERO,
        Err(error) => return verdict.fault(error.to_string()),
    };
    verdict.blocks += 1;
    let is_map = fork == Fork::VisibilityMap;
    let rmgr = match capture.access_methods.get(&(relation.database, relation.relation)) {
        _ if is_map => 10,
        Some(rmgr) => *rmgr,
        None => return verdict.fault(format!("{relation:?} {fork:?} is not in the catalogs")),
    };
    if rmgr == SEQUENCE {
        // Values are logged 32 at a time.
        verdict.sequences += 1;
        return;
    }
    if is_map {
        verdict.visibility_blocks += 1;
        // `CREATE DATABASE` logs maps as if their bits were unused space: then a standby has fewer bits, too.
        let is_hollow = store.chain(key, Lsn::INVALID, Lsn::MAX).any(|(lsn, kind, value)| {
            kind != layers::ValueKind::Image
                && kind != layers::ValueKind::Absent
                && Record::from_stored(Lsn::INVALID, lsn, value).expect("a record").info.rmgr == 0
        });
        if is_hollow {
            verdict.hollow += 1;
            for (ours, theirs) in ours.0.iter().zip(&mut theirs.0).skip(24) {
                *theirs &= *ours;
            }
        }
    } else {
        let body = |page: &Page| page.0[10..].to_vec();
        verdict.identical += u64::from(body(&ours) == body(&theirs));
    }
    for (whose, page) in [("ours", &mut ours), ("theirs", &mut theirs)] {
        if rmgr == SPGIST && block == 0 {
            // Where there was room last is remembered without a record (`SpGistUpdateMetaPage`).
            page.0[28..92].fill(0);
        }
        if let Err(error) = mask::mask(rmgr, fork, block, page) {
            verdict.fault(format!("{relation:?} {fork:?} {block}: mask {whose}: {error}"));
        }
    }
    let differ = ours.0.iter().zip(&theirs.0).filter(|(ours, theirs)| ours != theirs).count();
    if differ > 0 {
        let at = ours.0.iter().zip(&theirs.0).position(|(ours, theirs)| ours != theirs);
        let kinds: Vec<_> = store.chain(key, Lsn::INVALID, Lsn::MAX).map(|(lsn, kind, _)| (lsn, kind)).collect();
        let kinds = &kinds[kinds.len().saturating_sub(6)..];
        verdict.fault(format!(
            "{relation:?} {fork:?} {block}, resource manager {rmgr}: {differ} bytes differ from {at:?} on, {kinds:?}"
        ));
    }
}

fn compare_metadata(capture: &Capture, shards: &[Shard], verdict: &mut Verdict) {
    let listing = listing(shards, Lsn::MAX);
    let end = &capture.end;
    let counters = listing.counters.expect("a checkpoint");
    if counters != end.counters() {
        verdict.fault(format!("counters: ours {counters:?}, theirs {:?}", end.counters()));
    }
    if shard_of(shards, Key::MIN).ingest.counters() != Some(&counters) {
        verdict.fault("the checkpoint was not put after the last change".to_owned());
    }
    let mut slru_pages = listing.slru_pages;
    fill_holes(&mut slru_pages);
    verdict.slru_pages = slru_pages.len() as u64;
    differences("SLRU page", &slru_pages, &end.slru_pages, verdict);
    differences("relation map", &listing.relation_maps, &end.maps, verdict);
    differences("two-phase file", &listing.two_phase, &end.two_phase, verdict);
    differences("origin", &listing.origins.0, &end.origins.0, verdict);
    if listing.databases != end.maps.keys().copied().collect() {
        verdict.fault(format!("databases: {:?}", listing.databases));
    }
}

/// All metadata at a position.
pub fn listing(shards: &[Shard], lsn: Lsn) -> MetadataListing {
    let store = &shard_of(shards, Key::MIN).store;
    let mut listing = MetadataListing::default();
    for key in store.values.range(..Key::first_of_hash(1)).map(|(key, _)| *key) {
        let value = match store.read(key, lsn).expect("sound metadata") {
            Rebuilt::Page(page) => page.0.to_vec(),
            Rebuilt::Bytes(bytes) => bytes,
            Rebuilt::Absent => continue,
        };
        listing.add(key, value).expect("sound metadata");
    }
    listing
}

/// A file begins with its first page, whatever the first one that was written: what lies before it is zero.
fn fill_holes(pages: &mut BTreeMap<(Slru, u32), Vec<u8>>) {
    for (slru, page) in pages.keys().copied().collect::<Vec<_>>() {
        let of = SLRUS.iter().find(|(key, _)| *key == slru).expect("all SLRUs").1;
        for before in page - of.file(page).1..page {
            pages.entry((slru, before)).or_insert_with(|| vec![0; SLRU_PAGE_BYTES]);
        }
    }
}

fn differences<K: Ord + Copy + std::fmt::Debug, V: PartialEq>(
    what: &str,
    ours: &BTreeMap<K, V>,
    theirs: &BTreeMap<K, V>,
    verdict: &mut Verdict,
) {
    let keys: BTreeSet<K> = ours.keys().chain(theirs.keys()).copied().collect();
    for key in keys.into_iter().filter(|key| ours.get(key) != theirs.get(key)) {
        let how = match (ours.get(&key), theirs.get(&key)) {
            (Some(_), Some(_)) => "differs",
            (Some(_), None) => "is not the server's",
            _ => "is missing",
        };
        verdict.fault(format!("{what} {key:?} {how}"));
    }
}

/// The whole space, cut into `count`.
pub fn ranges(count: u32) -> Vec<HashRange> {
    (0..count).map(|index| HashRange::even_part(index, count)).collect()
}
