//! What becomes of single records: lengths, floors, events, and what cannot be followed.

#[allow(dead_code, reason = "each test crate uses its own part")]
mod harness {
    pub mod files;
    pub mod store;
}

use filter::{Batch, Item};
use harness::store::{Shard, Store, Value};
use layers::{HashRange, Key, KeyKind, Metadata, Slru, Striping, ValueKind};
use metadata::Counters;
use pgtypes::{FrameSummary, Lsn, Term};
use proptest::{collection::vec, prelude::*};
use redo::Page;
use shard::{IngestCause, PoisonCause, Presence, Rebuilt, StripeSize, poison, rebuild_page};
use wal::{Fork, RelFileLocator};

const STRIPING: Striping = Striping { stripe_blocks: 4 };
const RELATION: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
/// Heap blocks that a page of the visibility map is for.
const MAP_HEAP_BLOCKS: u32 = 32_672;

const XLOG: u8 = 0;
const XACT: u8 = 1;
const SMGR: u8 = 2;
const DBASE: u8 = 4;
const RELMAP: u8 = 7;
const HEAP: u8 = 10;

/// A reference to a block: relation, fork, block, made anew.
type Block = (RelFileLocator, Fork, u32, bool);

/// A stored record, each of its blocks with the data of a row.
fn stored(rmgr: u8, info: u8, blocks: &[Block], main: &[u8]) -> Vec<u8> {
    const HAS_DATA: u8 = 0x20;
    const WILL_INIT: u8 = 0x40;
    // infomask2, infomask, hoff; a byte of padding, and the row.
    let row = [1, 0, 0, 8, 24, 0, b'r', b'o', b'w', b'!'];
    let mut bytes = vec![0xBC, 2, 0, 0, info, rmgr, 0, 0];
    for (id, (relation, fork, block, init)) in (0..).zip(blocks) {
        bytes.extend([id, *fork as u8 | HAS_DATA | if *init { WILL_INIT } else { 0 }]);
        bytes.extend((row.len() as u16).to_le_bytes());
        for word in [relation.tablespace, relation.database, relation.relation, *block] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes.push(254);
    bytes.extend((main.len() as u32).to_le_bytes());
    blocks.iter().for_each(|_| bytes.extend(row));
    bytes.extend(main);
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The first row of a page that is made anew.
fn insert_first(block: u32) -> Vec<u8> {
    stored(HEAP, 0x80, &[(RELATION, Fork::Main, block, true)], &[1, 0, 0])
}

/// A row of a page that is there.
fn insert(block: u32, item: u8) -> Vec<u8> {
    stored(HEAP, 0x00, &[(RELATION, Fork::Main, block, false)], &[item, 0, 0])
}

fn create(fork: Fork) -> Vec<u8> {
    stored(SMGR, 0x10, &[], &words(&[1663, 5, 16384, fork as u32]))
}

fn drop_at_commit() -> Vec<u8> {
    let mut main = vec![0; 8];
    main.extend(words(&[4, 1, 1663, 5, 16384]));
    stored(XACT, 0x80, &[], &main)
}

/// Cuts all forks.
fn truncate(heap_blocks: u32) -> Vec<u8> {
    stored(SMGR, 0x20, &[], &words(&[heap_blocks, 1663, 5, 16384, 7]))
}

fn counters() -> Counters {
    let mut checkpoint = [0; 88];
    checkpoint[24..28].copy_from_slice(&600u32.to_le_bytes());
    let settings = pgformat::ServerSettings {
        wal_level: pgformat::WalLevel::Replica,
        wal_log_hints: true,
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: -10,
        max_prepared_transactions: 0,
        max_locks_per_transaction: 64,
        track_commit_timestamp: false,
    };
    let checkpoint = pgformat::CheckPoint::parse(&checkpoint).expect("wal_level minimal");
    Counters { checkpoint, checkpoint_lsn: Lsn(77), settings }
}

/// A shard at position 100 with a checkpoint, if it has the metadata; each record ends 100 further on.
struct Log {
    shard: Shard,
    at: Lsn,
}

impl Log {
    fn new(range: HashRange) -> Log {
        let mut store = Store::new(STRIPING, range);
        if range.begin == 0 {
            let checkpoint = Key::metadata(Metadata::Checkpoint);
            store.put(checkpoint, Lsn(100), ValueKind::Image, counters().to_bytes());
        }
        Log { shard: Shard::attach(store, Lsn(100)), at: Lsn(100) }
    }

    fn whole() -> Log {
        Log::new(HashRange::ALL)
    }

    /// Ingests a record; returns where it ends.
    fn push(&mut self, stored: Vec<u8>) -> Lsn {
        let (after, end) = (self.at, self.at.advance(100));
        self.at = end;
        let summary = FrameSummary { record_end: end, max_full_xid: 800, ..FrameSummary::default() };
        let items = vec![Item { start: after, end, stored }];
        self.shard.items(Batch { after, through: end, term: Term(1), commit_lsn: end, summary, items });
        end
    }

    fn pushed(mut self, records: impl IntoIterator<Item = Vec<u8>>) -> Log {
        records.into_iter().for_each(|record| {
            self.push(record);
        });
        self
    }

    /// Values of a record.
    fn values_at(&self, lsn: Lsn) -> Vec<(KeyKind, ValueKind, &Value)> {
        let values = self.shard.store.values.iter().flat_map(|(key, values)| values.iter().map(move |v| (key, v)));
        let values = values.filter(|(_, value)| value.lsn == lsn);
        values.map(|(key, value)| (key.kind().expect("a key"), value.kind, value)).collect()
    }

    fn size(&self, fork: Fork, stripe: u32) -> Option<StripeSize> {
        self.shard.store.stripe_size(STRIPING.stripe_size(RELATION, fork, stripe), Lsn::MAX)
    }

    fn read(&self, block: u32, lsn: Lsn) -> Option<Page> {
        match self.shard.store.read(STRIPING.block(RELATION, Fork::Main, block), lsn).expect("a sound page") {
            Rebuilt::Page(page) => Some(*page),
            _ => None,
        }
    }
}

/// Rows of a heap page.
fn rows(page: &Page) -> usize {
    (usize::from(u16::from_le_bytes([page.0[12], page.0[13]])) - 24) / 4
}

#[test]
fn a_stripe_begins_with_its_first_record_and_grows_with_the_highest_block() {
    let mut log = Log::whole();
    let first = log.push(insert_first(5));
    let second = log.push(insert(5, 2));
    let third = log.push(insert_first(7));

    assert_eq!(Some(StripeSize { length: 4, floor: Lsn(first.0 - 1) }), log.size(Fork::Main, 1));
    assert_eq!(None, log.size(Fork::Main, 0));
    assert_eq!([2, 1, 2], [first, second, third].map(|lsn| log.values_at(lsn).len()), "a length only when it changes");
    assert_eq!(Some(1), log.read(5, first).as_ref().map(rows));
    assert_eq!(Some(2), log.read(5, third).as_ref().map(rows));
    assert_eq!(None, log.read(6, Lsn::MAX), "a hole is zeros");
}

/// One value for each key, with its own data only, although the record has three blocks here and one elsewhere.
#[test]
fn a_record_is_cut_for_each_of_its_blocks() {
    let mut log = Log::whole();
    let blocks = [4, 6, 9].map(|block| (RELATION, Fork::Main, block, true));
    let end = log.push(stored(HEAP, 0x80, &blocks, &[1, 0, 0]));

    let values = log.values_at(end);
    let kinds: Vec<_> = values.iter().map(|(key, ..)| *key).collect();
    assert_eq!(5, kinds.len(), "{kinds:?}");
    for (key, kind, value) in values {
        let KeyKind::Block { block, .. } = key else { continue };
        assert_eq!(ValueKind::InitRecord, kind);
        let record = wal::Record::from_stored(Lsn::INVALID, end, &value.bytes).expect("a record");
        for reference in &record.blocks {
            assert_eq!(reference.block == block, !record.block_data(reference).is_empty());
        }
    }
    assert_eq!(Some(3), log.size(Fork::Main, 1).map(|size| size.length));
}

#[test]
fn a_fork_begins_with_length_0_where_its_first_stripe_lies() {
    let key = STRIPING.stripe_size(RELATION, Fork::Init, 0);
    for part in 0..2 {
        let mut log = Log::new(HashRange::even_part(part, 2));
        let end = log.push(create(Fork::Init));
        let is_there = log.shard.store.range.contains(key);
        let expected = is_there.then_some(StripeSize { length: 0, floor: Lsn(end.0 - 1) });
        assert_eq!(expected, log.size(Fork::Init, 0));
    }
}

/// A relation number may come back after 2^32 others, or a database's with another content.
#[test]
fn a_relation_of_a_number_that_was_there_before_begins_empty() {
    let mut log = Log::whole().pushed((0..10).map(insert_first));
    let filled = log.at;
    let dropped = log.push(drop_at_commit());
    assert!((0..3).all(|stripe| log.size(Fork::Main, stripe).is_none()));
    let absent = |(_, kind, value): &(KeyKind, ValueKind, &Value)| *kind == ValueKind::Absent && value.bytes.is_empty();
    assert_eq!(3, log.values_at(dropped).iter().filter(|value| absent(value)).count(), "one for each stripe");

    log.push(create(Fork::Main));
    log.push(insert_first(6));
    assert_eq!(None, log.read(5, Lsn::MAX), "the block of the relation before");
    assert_eq!(Some(1), log.read(6, Lsn::MAX).as_ref().map(rows));
    assert_eq!(Some(1), log.read(5, filled).as_ref().map(rows), "it is still there where it was");
    assert_eq!(None, log.read(5, dropped));
}

/// Without a record of the drop: a crash may leave files behind, which a new relation then replaces.
#[test]
fn creation_ends_what_was_there() {
    let mut log = Log::whole().pushed((0..10).map(insert_first));
    let end = log.push(create(Fork::Main));
    assert_eq!(Some(StripeSize { length: 0, floor: Lsn(end.0 - 1) }), log.size(Fork::Main, 0));
    assert_eq!((None, None), (log.size(Fork::Main, 1), log.size(Fork::Main, 2)));
    log.push(insert_first(3));
    assert_eq!(None, log.read(2, Lsn::MAX));
}

#[test]
fn truncation_cuts_a_stripe_in_its_middle_and_ends_those_behind() {
    let mut log = Log::whole().pushed((0..14).map(insert_first));
    let full = log.at;
    let cut = log.push(truncate(6));

    assert_eq!(
        [Some(4), Some(2), None, None],
        [0, 1, 2, 3].map(|stripe| log.size(Fork::Main, stripe).map(|s| s.length))
    );
    let absent: Vec<_> = log.values_at(cut).iter().filter(|value| value.1 == ValueKind::Absent).map(|v| v.0).collect();
    assert_eq!(4, absent.len(), "blocks 6 and 7, stripes 2 and 3: {absent:?}");

    // It grows again, by more than what was cut.
    let end = log.push(insert_first(13));
    log.push(insert_first(7));
    let read = |lsn| (0..14).map(|block| log.read(block, lsn).is_some()).collect::<Vec<_>>();
    assert_eq!(vec![true; 14], read(full));
    assert_eq!([vec![true; 6], vec![false; 8]].concat(), read(cut));
    assert_eq!([vec![true; 6], vec![false, true], vec![false; 5], vec![true]].concat(), read(Lsn::MAX));
    assert_eq!(Some(StripeSize { length: 2, floor: Lsn(end.0 - 1) }), log.size(Fork::Main, 3));
    assert_eq!(Some(Lsn(199)), log.size(Fork::Main, 0).map(|size| size.floor), "the first stripe's is the old one");
}

/// `VACUUM` of an empty table: it still exists.
#[test]
fn truncation_to_nothing_leaves_a_fork_of_length_0() {
    let mut log = Log::whole().pushed((0..6).map(insert_first));
    let cut = log.push(truncate(0));
    assert_eq!(Some(StripeSize { length: 0, floor: Lsn(cut.0 - 1) }), log.size(Fork::Main, 0));
    log.push(insert_first(1));
    assert_eq!((None, Some(1)), (log.read(0, Lsn::MAX), log.read(1, Lsn::MAX).as_ref().map(rows)));
    let again = log.push(truncate(9));
    assert!(log.values_at(again).is_empty(), "a cut behind the end changes nothing");
}

/// The map's page with the first block that is gone loses bits; pages that the map does not have stay away.
#[test]
fn truncation_touches_the_maps_last_page_only_if_there_is_one() {
    let set_visible = |map_block| {
        let blocks = [(RELATION, Fork::VisibilityMap, map_block, false)];
        stored(9, 0x40, &blocks, &[0, 0, 0, 0, 3])
    };
    let mut log = Log::whole().pushed((0..6).map(set_visible));
    let cut = log.push(truncate(2 * MAP_HEAP_BLOCKS + 5));
    let key = |block| STRIPING.block(RELATION, Fork::VisibilityMap, block).kind().expect("a key");
    let kinds: Vec<_> = log.values_at(cut).into_iter().map(|(key, kind, _)| (key, kind)).collect();
    assert!(kinds.contains(&(key(2), ValueKind::Record)) && kinds.contains(&(key(3), ValueKind::Absent)), "{kinds:?}");
    assert_eq!((Some(3), None), (log.size(Fork::VisibilityMap, 0).map(|s| s.length), log.size(Fork::VisibilityMap, 1)));

    let mut log = Log::whole().pushed([insert_first(0), insert_first(1)]);
    log.push(truncate(1));
    assert_eq!(None, log.size(Fork::VisibilityMap, 0), "a map that was never there");
}

#[test]
fn a_copied_database_has_pages_lengths_and_map_of_its_source() {
    let map = [words(&[5, 1663, 524]), vec![7; 524]].concat();
    let copy = stored(DBASE, 0x00, &[], &words(&[6, 1663, 5, 1663]));
    let unwritten = stored(HEAP, 0x80, &[(RELATION, Fork::VisibilityMap, 2, true)], &[1, 0, 0]);
    let mut log = Log::whole().pushed([stored(RELMAP, 0x00, &[], &map), insert_first(0), insert_first(5), unwritten]);
    let end = log.push(copy);
    log.push(insert(0, 2));

    let copied = RelFileLocator { database: 6, ..RELATION };
    let read = |relation, block| log.shard.store.read(STRIPING.block(relation, Fork::Main, block), Lsn::MAX);
    let Ok(Rebuilt::Page(page)) = read(copied, 0) else { panic!("{:?}", read(copied, 0)) };
    assert_eq!(1, rows(&page), "as it was at the record");
    assert_eq!(Ok(Rebuilt::Absent), read(copied, 4), "a hole");
    let size = log.shard.store.stripe_size(STRIPING.stripe_size(copied, Fork::Main, 1), Lsn::MAX);
    assert_eq!(Some(StripeSize { length: 2, floor: Lsn(end.0 - 1) }), size);
    let map_key = Metadata::RelationMap { tablespace: 1663, database: 6 };
    assert_eq!(Ok(Rebuilt::Bytes(vec![7; 524])), log.shard.store.read(Key::metadata(map_key), Lsn::MAX));
    assert_eq!(6, log.shard.copied_blocks, "holes, too");
    assert!(log.shard.faults.is_empty());

    let gone = log.push(stored(DBASE, 0x20, &[], &words(&[6, 1, 1663])));
    assert_eq!(
        5,
        log.values_at(gone).iter().filter(|value| value.1 == ValueKind::Absent).count(),
        "3 stripes, map, database"
    );
    assert!(log.read(0, Lsn::MAX).is_some(), "the source stays");
}

#[test]
fn free_space_maps_and_hints_without_images_are_no_values() {
    let mut log = Log::whole();
    for record in [
        stored(HEAP, 0x80, &[(RELATION, Fork::FreeSpaceMap, 0, true)], &[1, 0, 0]),
        create(Fork::FreeSpaceMap),
        stored(XLOG, 0xA0, &[(RELATION, Fork::Main, 0, false)], &[]),
        stored(HEAP, 0x80, &[(RELATION, Fork::Main, u32::MAX, true)], &[1, 0, 0]),
    ] {
        let end = log.push(record);
        assert!(log.values_at(end).is_empty());
    }
    assert_eq!(0, log.shard.ingest.sizes().count());
}

/// Whoever reads the page learns what is wrong with it; the pages beside it, and the next owner's ingest, do not care.
#[test]
fn a_record_that_does_not_go_into_its_page_poisons_it_until_it_is_made_anew() {
    let mut log = Log::whole().pushed([insert_first(0), insert_first(1)]);
    let bad = log.push(insert(0, 99));
    let poisoned = log.push(insert(0, 2));
    let key = STRIPING.block(RELATION, Fork::Main, 0);
    let error = log.shard.store.read(key, Lsn::MAX).expect_err("a row behind a hole");
    assert_eq!((key, bad), (error.key, error.lsn));
    assert!(matches!(error.cause, PoisonCause::Redo(_)), "{error}");
    assert!(error.to_string().starts_with("relation 1663/5/16384, fork Main, block 0: value of 0/190: "), "{error}");
    assert_eq!(Some(1), log.read(1, Lsn::MAX).as_ref().map(rows));

    log.push(insert_first(0));
    assert_eq!(Some(1), log.read(0, Lsn::MAX).as_ref().map(rows));
    assert!(log.shard.store.read(key, poisoned).is_err());
    assert!(log.shard.faults.is_empty());
}

#[test]
fn a_poisoned_value_says_why() {
    let (key, mut page) = (STRIPING.block(RELATION, Fork::Main, 0), Page::ZERO);
    let value = poison("its source is gone");
    let error = rebuild_page(key, [(Lsn(7), ValueKind::Record, &value[..])], &mut page).expect_err("poison");
    assert_eq!(PoisonCause::Poisoned("its source is gone".to_owned()), error.cause);
    let first = insert_first(0);
    let healed = [(Lsn(7), ValueKind::Record, &value[..]), (Lsn(8), ValueKind::Image, &[0; 8192][..])];
    assert_eq!(Ok(Presence::Present), rebuild_page(key, healed, &mut page));
    let healed = [(Lsn(9), ValueKind::InitRecord, &first[..])];
    assert_eq!(Ok(Presence::Present), rebuild_page(key, healed, &mut page));
}

#[test]
fn what_cannot_be_followed_is_a_fault_and_the_rest_goes_on() {
    let mut log = Log::whole();
    log.push(vec![1, 2, 3]);
    assert!(matches!(log.shard.faults[..], [ref fault] if matches!(fault.cause, IngestCause::Undecodable(_))));

    // A relation map of another length, and a database whose map is not known.
    log.push(stored(RELMAP, 0x00, &[], &words(&[5, 1663, 3])));
    log.push(insert_first(0));
    log.push(stored(DBASE, 0x00, &[], &words(&[6, 1663, 5, 1663])));
    let causes: Vec<_> = log.shard.faults[1..].iter().map(|fault| fault.cause.clone()).collect();
    assert!(matches!(causes[..], [IngestCause::Metadata(_), IngestCause::NoRelationMap(5)]), "{causes:?}");
    assert_eq!(1, log.shard.copied_blocks, "the pages are copied all the same");
    assert!(log.read(0, Lsn::MAX).is_some());

    let mut ingest = shard::Ingest::new(STRIPING, HashRange::ALL);
    let done = ingest.item(Lsn(1), Lsn(9), drop_at_commit(), &mut |_, _, _, _| {});
    assert_eq!(Some(IngestCause::NoCheckpoint), done.fault.map(|fault| fault.cause));
}

/// Commits come to every shard when relations are dropped.
#[test]
fn metadata_is_the_business_of_the_shard_of_hash_0() {
    let mut log = Log::new(HashRange { begin: 1, end: 1 << 32 }).pushed([insert_first(0)]);
    let end = log.push(drop_at_commit());
    assert!(log.shard.faults.is_empty());
    assert!(log.values_at(end).iter().all(|(key, ..)| matches!(key, KeyKind::StripeSize { .. })));

    let mut log = Log::whole();
    let end = log.push(drop_at_commit());
    let kinds: Vec<_> = log.values_at(end).into_iter().map(|(key, kind, _)| (key, kind)).collect();
    assert_eq!(vec![(KeyKind::Slru(Slru::TransactionStatus, 0), ValueKind::Record)], kinds);
}

/// A transaction with a million subtransactions would otherwise be kept whole for each of thirty pages.
#[test]
fn a_page_of_an_slru_keeps_its_own_subtransactions_only() {
    const PAGE_XIDS: u32 = 32_768;
    let subtransactions: Vec<u32> = (701..3 * PAGE_XIDS).collect();
    let mut main = vec![0; 8];
    main.extend(words(&[2, subtransactions.len() as u32]));
    main.extend(words(&subtransactions));
    let mut log = Log::whole();
    let end = log.push(stored(XACT, 0x80, &[], &main));

    let values = log.values_at(end);
    let bytes: Vec<_> = values.iter().map(|(_, _, value)| value.bytes.len()).collect();
    assert_eq!(3, bytes.len());
    assert!(bytes.iter().all(|bytes| *bytes < 4 * PAGE_XIDS as usize + 64), "{bytes:?}");
    for (page, first) in [(0, 700), (1, 0), (2, 0)] {
        let key = Key::slru(Slru::TransactionStatus, page);
        let Ok(Rebuilt::Page(page)) = log.shard.store.read(key, Lsn::MAX) else { panic!("no page {page}") };
        let committed = page.0.iter().map(|byte| (0..4).filter(|at| byte >> (2 * at) & 3 == 1).count() as u32);
        assert_eq!(PAGE_XIDS - first, committed.sum::<u32>());
    }
}

#[test]
fn values_of_stripes_counters_and_files_round_trip() {
    let size = StripeSize { length: 0x0102_0304, floor: Lsn(0x1112_1314_1516_1718) };
    let bytes = size.to_bytes();
    assert_eq!([4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11], bytes[..]);
    assert_eq!(Ok(size), StripeSize::from_bytes(&bytes));
    assert!(StripeSize::from_bytes(&bytes[1..]).is_err() && StripeSize::from_bytes(&[0; 13]).is_err());

    let bytes = counters().to_bytes();
    assert_eq!(Ok(counters()), Counters::from_bytes(&bytes));
    // `docs/formats/values.md`: what is on disk stays readable.
    let head = [
        [1, 0, 1, 0, 1, 0, 0, 0, 100, 0, 0, 0, 8, 0, 0, 0, 0xF6, 0xFF, 0xFF, 0xFF],
        [0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 77, 0, 0, 0, 0, 0, 0, 0],
    ];
    assert_eq!((head.concat(), 128), (bytes[..40].to_vec(), bytes.len()));
    assert!((0..bytes.len()).all(|length| Counters::from_bytes(&bytes[..length]).is_err()));
    assert!(Counters::from_bytes(&[&[2], &bytes[1..]].concat()).is_err(), "a later version");

    let file = shard::Advisory { name: "postgresql.conf".to_owned(), contents: vec![0, 1, 2] };
    let bytes = file.to_bytes().expect("a short file");
    assert_eq!(Ok(file), shard::Advisory::from_bytes(&bytes));
    assert!(shard::Advisory::from_bytes(&bytes[..10]).is_err());
    assert!(shard::Advisory { name: "x".repeat(65_536), contents: vec![] }.to_bytes().is_err());
}

/// A record as bytes that may be anything, of a kind that the shard looks into.
fn anything() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => 0u8..8, 1 => any::<u8>()];
    let header = (prop_oneof![3 => 0u8..11, 1 => any::<u8>()], (0u8..16).prop_map(|info| info << 4));
    let block = (0u32..3, 0u32..3, prop_oneof![4 => 0u32..40, 1 => any::<u32>()], any::<bool>());
    let whole = (header, vec(block, 0..4), vec(byte.clone(), 0..80)).prop_map(|((rmgr, info), blocks, main)| {
        let forks = [Fork::Main, Fork::FreeSpaceMap, Fork::VisibilityMap];
        let relation = |number| RelFileLocator { relation: number, ..RELATION };
        let blocks: Vec<Block> = blocks
            .into_iter()
            .map(|(number, fork, block, init)| (relation(number), forks[fork as usize], block, init))
            .collect();
        stored(rmgr, info, &blocks, &main)
    });
    prop_oneof![4 => whole, 1 => vec(byte, 0..60)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Nothing panics, the rules of an open layer are kept, what is in memory is what was put, and every page is rebuilt or
    /// poisoned.
    #[test]
    fn broken_records_break_nothing_but_pages(records in vec(anything(), 1..40)) {
        let mut log = Log::whole();
        let events = [create(Fork::Main), truncate(7), insert_first(9), drop_at_commit()];
        for (number, record) in records.into_iter().enumerate() {
            log.push(record);
            log.push(events[number % events.len()].clone());
        }
        let store = &log.shard.store;
        for key in store.values.keys() {
            let _ = store.read(*key, Lsn::MAX);
        }
        let mut ingest = shard::Ingest::new(STRIPING, HashRange::ALL);
        harness::store::load(store, Lsn::MAX, &mut ingest);
        prop_assert!(ingest.sizes().eq(log.shard.ingest.sizes()));
        prop_assert_eq!(ingest.counters().is_some(), true);
    }
}
