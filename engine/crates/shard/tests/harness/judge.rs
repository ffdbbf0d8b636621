//! Compares what shards have at the end with the server's files.

use std::collections::{BTreeMap, BTreeSet};

use layers::{HashRange, Key, KeyKind, Slru, ValueKind};
use metadata::{Counters, SLRU_PAGE_BYTES};
use pgformat::CheckPoint;
use pgtypes::Lsn;
use redo::{PAGE_BYTES, Page, mask};
use shard::{MetadataListing, Rebuilt, StripeSize};
use wal::{Fork, Record, RelFileLocator};

use super::{
    capture::{Moment, STRIPING},
    files::SLRUS,
    store::Shard,
};

const XLOG: u8 = 0;
const SEQUENCE: u8 = 15;
const SPGIST: u8 = 16;
const BRIN: u8 = 17;
/// Faults that are described; the rest is counted.
const DESCRIBED: usize = 40;

#[derive(Default, Debug)]
pub struct Verdict {
    pub blocks: u64,
    /// Of the main and init forks, equal without masking.
    pub identical: u64,
    pub visibility_blocks: u64,
    /// Pages of visibility maps, and of BRIN's range maps, that came as images without contents.
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

/// Lengths of all forks at a position, as an agent puts them together.
pub fn lengths(shards: &[Shard], lsn: Lsn) -> BTreeMap<(RelFileLocator, Fork), u32> {
    let mut lengths: BTreeMap<_, u32> = BTreeMap::new();
    for store in shards.iter().map(|shard| &shard.store) {
        for key in store.values.keys() {
            let Ok(KeyKind::StripeSize { relation, fork, stripe }) = key.kind() else { continue };
            let Some(size) = store.stripe_size(*key, lsn) else { continue };
            let length = lengths.entry((relation, fork)).or_default();
            *length = (*length).max(stripe * STRIPING.stripe_blocks + size.length);
        }
    }
    lengths
}

/// What an ingest holds is what its values say.
pub fn compare_state(shard: &Shard, verdict: &mut Verdict) {
    for fault in &shard.faults {
        verdict.fault(fault.to_string());
    }
    let ours: BTreeMap<Key, StripeSize> =
        shard.ingest.sizes().map(|(of, size)| (STRIPING.stripe_size(of.relation, of.fork, of.stripe), size)).collect();
    let put = shard.store.values.keys().filter_map(|key| match key.kind() {
        Ok(KeyKind::StripeSize { .. }) => Some((*key, shard.store.stripe_size(*key, Lsn::MAX)?)),
        _ => None,
    });
    differences("length in memory", &ours, &put.collect(), verdict);
}

/// Compares with a server's files at a position.
pub fn compare(moment: &Moment, shards: &[Shard]) -> Verdict {
    let mut verdict = Verdict::default();
    let ours = lengths(shards, moment.lsn);
    let theirs = &moment.files.forks;
    let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).copied().collect();
    for (relation, fork) in names {
        let Some(file) = theirs.get(&(relation, fork)) else {
            if !moment.files.unlogged.contains(&relation) {
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
                if moment.is_recovery {
                    verdict.fault(format!("{relation:?} {fork:?}: {length} blocks, {} bytes in the file", file.len()));
                }
                if theirs.iter().any(|byte| *byte != 0) {
                    verdict.fault(format!("{relation:?} {fork:?}: {length} blocks, but {block} is not zero"));
                }
                continue;
            }
            let theirs = Page(*theirs.first_chunk().expect("a page"));
            compare_block(moment, shards, relation, fork, block, theirs, &mut verdict);
        }
    }
    compare_metadata(moment, shards, &mut verdict);
    verdict
}

fn compare_block(
    moment: &Moment,
    shards: &[Shard],
    relation: RelFileLocator,
    fork: Fork,
    block: u32,
    mut theirs: Page,
    verdict: &mut Verdict,
) {
    let key = STRIPING.block(relation, fork, block);
    let store = &shard_of(shards, key).store;
    let mut ours = match store.read(key, moment.lsn) {
        Ok(Rebuilt::Page(page)) => *page,
        Ok(_) => Page::ZERO,
        Err(error) => return verdict.fault(error.to_string()),
    };
    verdict.blocks += 1;
    let is_map = fork == Fork::VisibilityMap;
    if moment.is_recovery && is_map {
        verdict.visibility_blocks += 1;
        // The checksum is computed when a page is written.
        let [ours, theirs] = [&ours, &theirs].map(|page| [&page.0[..8], &page.0[10..]]);
        if ours != theirs {
            verdict.fault(format!("{relation:?} {fork:?} {block} differs"));
        }
        return;
    }
    let rmgr = match moment.access_methods.get(&(relation.database, relation.relation)) {
        _ if is_map => 10,
        Some(rmgr) => *rmgr,
        None => return verdict.fault(format!("{relation:?} {fork:?} is not in the catalogs")),
    };
    if rmgr == SEQUENCE && !moment.is_recovery {
        // Values are logged 32 at a time.
        verdict.sequences += 1;
        return;
    }
    let may_be_hollow = is_map || is_revmap(rmgr, &theirs);
    if !moment.is_recovery && may_be_hollow && is_hollow(shard_of(shards, key), relation, fork, block, moment.lsn) {
        verdict.hollow += 1;
        for (ours, theirs) in ours.0.iter().zip(&mut theirs.0).skip(24) {
            *theirs &= *ours;
        }
    }
    if is_map {
        verdict.visibility_blocks += 1;
    } else {
        let body = |page: &Page| page.0[10..].to_vec();
        verdict.identical += u64::from(body(&ours) == body(&theirs));
    }
    let lsns = [ours.lsn(), theirs.lsn()];
    for (whose, page) in [("ours", &mut ours), ("theirs", &mut theirs)] {
        if rmgr == SPGIST && block == 0 {
            // Where there was room last is remembered without a record (`SpGistUpdateMetaPage`).
            page.0[28..92].fill(0);
        }
        if rmgr == XLOG {
            // Nothing but images and files that were copied: the same to the byte, but for the checksum.
            page.0[8..10].fill(0);
        } else if let Err(error) = mask::mask(rmgr, fork, block, page) {
            verdict.fault(format!("{relation:?} {fork:?} {block}: mask {whose}: {error}"));
        }
    }
    let differ = ours.0.iter().zip(&theirs.0).filter(|(ours, theirs)| ours != theirs).count();
    if differ > 0 {
        let at = ours.0.iter().zip(&theirs.0).position(|(ours, theirs)| ours != theirs);
        let kinds: Vec<_> = store.chain(key, Lsn::INVALID, moment.lsn).map(|(lsn, kind, _)| (lsn, kind)).collect();
        let kinds = &kinds[kinds.len().saturating_sub(6)..];
        verdict.fault(format!(
            "{relation:?} {fork:?} {block}, resource manager {rmgr}: {differ} bytes differ from {at:?} on, {kinds:?}; \
             LSNs {lsns:?}, ours {ours:?}, theirs {theirs:?}"
        ));
    }
}

/// Whether it is a page of a BRIN index that says where the summary of a range of blocks is.
fn is_revmap(rmgr: u8, page: &Page) -> bool {
    const REVMAP: [u8; 2] = 0xF092u16.to_le_bytes();
    rmgr == BRIN && page.0[8190..] == REVMAP
}

/// Whether a page lost its contents on the way: `CREATE DATABASE ... STRATEGY WAL_LOG` logs pages without what lies between
/// `pd_lower` and `pd_upper` (`RelationCopyStorageUsingBuffer`), where visibility maps and BRIN's range maps have theirs. A
/// standby has fewer bits and summaries, too, which is safe; and such a page may be copied on.
fn is_hollow(shard: &Shard, relation: RelFileLocator, fork: Fork, block: u32, lsn: Lsn) -> bool {
    let key = STRIPING.block(relation, fork, block);
    shard.store.chain(key, Lsn::INVALID, lsn).any(|(lsn, kind, value)| match kind {
        ValueKind::Absent => false,
        ValueKind::Image => {
            let copy = shard.copies.iter().find(|(at, _, to)| *at == lsn && to.database == relation.database);
            copy.is_some_and(|(_, from, _)| {
                is_hollow(shard, RelFileLocator { database: from.database, ..relation }, fork, block, lsn)
            })
        }
        ValueKind::Record | ValueKind::InitRecord => {
            Record::from_stored(Lsn::INVALID, lsn, value).expect("a record").info.rmgr == XLOG
        }
    })
}

fn compare_metadata(moment: &Moment, shards: &[Shard], verdict: &mut Verdict) {
    let listing = listing(shards, moment.lsn);
    let end = &moment.files;
    let counters = listing.counters.expect("a checkpoint");
    let wanted = if moment.is_recovery { recovered(&counters, end.counters()) } else { end.counters() };
    if counters != wanted {
        verdict.fault(format!("counters: ours {counters:?}, theirs {wanted:?}"));
    }
    let mut slru_pages = listing.slru_pages;
    fill_holes(&mut slru_pages);
    verdict.slru_pages = slru_pages.len() as u64;
    let mut their_pages = end.slru_pages.clone();
    if moment.is_recovery {
        let oldest = counters.checkpoint.oldest_commit_ts_xid;
        for pages in [&mut slru_pages, &mut their_pages] {
            forget_timestamps(pages, oldest);
        }
    }
    differences("SLRU page", &slru_pages, &their_pages, verdict);
    differences("relation map", &listing.relation_maps, &end.maps, verdict);
    differences("two-phase file", &listing.two_phase, &end.two_phase, verdict);
    differences("origin", &listing.origins.0, &end.origins.0, verdict);
    if listing.databases != end.maps.keys().copied().collect() {
        verdict.fault(format!("databases: {:?}", listing.databases));
    }
}

/// Commit timestamps before `oldest`, which nobody reads: when they were switched off, a recovery has removed their files
/// (`DeactivateCommitTs`), but what was in its buffers then is written later.
fn forget_timestamps(pages: &mut BTreeMap<(Slru, u32), Vec<u8>>, oldest: u32) {
    const ENTRY_BYTES: usize = 10;
    const ENTRIES: u32 = (SLRU_PAGE_BYTES / ENTRY_BYTES) as u32;
    let is_read = |slru: Slru, page: u32| slru != Slru::CommitTimestamps || (page + 1) * ENTRIES > oldest;
    pages.retain(|(slru, page), _| is_read(*slru, *page));
    let (page, entry) = (oldest / ENTRIES, (oldest % ENTRIES) as usize);
    if let Some(bytes) = pages.get_mut(&(Slru::CommitTimestamps, page)) {
        bytes[..entry * ENTRY_BYTES].fill(0);
    }
}

/// A recovery's counters, but for those that its end made: its checkpoint is on a timeline of its own. The next transaction
/// id is put now and then only; of the exact one, `metadata/tests/files_of_a_server.rs` is the judge.
fn recovered(ours: &Counters, theirs: Counters) -> Counters {
    /// A transaction has at least 16 bytes of WAL, and a commit with its subtransactions 4 for each of these.
    const XIDS_MAX: u64 = 100_000;
    let (our_xid, their_xid) = (ours.checkpoint.next_full_xid, theirs.checkpoint.next_full_xid);
    let is_near = our_xid <= their_xid && their_xid - our_xid < XIDS_MAX;
    Counters {
        checkpoint: CheckPoint {
            redo: ours.checkpoint.redo,
            timeline: ours.checkpoint.timeline,
            previous_timeline: ours.checkpoint.previous_timeline,
            full_page_writes: ours.checkpoint.full_page_writes,
            wal_level: ours.checkpoint.wal_level,
            time: ours.checkpoint.time,
            oldest_active_xid: ours.checkpoint.oldest_active_xid,
            next_full_xid: if is_near { our_xid } else { their_xid },
            ..theirs.checkpoint
        },
        checkpoint_lsn: ours.checkpoint_lsn,
        settings: theirs.settings,
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
