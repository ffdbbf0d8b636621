//! Every message of the page protocol survives the way to bytes and back; no bytes make a decoder panic.

use layers::{HashRange, Key, Metadata, ShardGeneration, ShardId};
use pgtypes::{BranchId, ClusterId, LogId, Lsn, SystemId, Term};
use proptest::{collection::vec, prelude::*};
use wal::{Fork, RelFileLocator};
use wire::{
    append::{FrameReader, FrameType, HEADER_BYTES, WireError},
    page::{
        ADVISORY_BYTES_MAX, AdvisoryTaken, FindLsn, GetMetadata, GetPages, GetSizes, LeaseGranted, LsnFound,
        MetadataJoin, MetadataJoinError, MetadataPart, MetadataPiece, NEWEST, PAGE_BYTES, PAGES_MAX, PageErrorCode,
        PageFailed, PageFrame, PageFrameReader, PageHello, PageMessage, PageMessageType, PageProgress, PageWelcome,
        Pages, PutAdvisory, ReaderRole, SIZES_MAX, Sizes, StripeLength, TakeLease, decode, encode_to_vec,
        metadata_parts,
    },
};

fn lsn() -> impl Strategy<Value = Lsn> {
    (0..1u64 << 63).prop_map(Lsn)
}

fn lsn_or_newest() -> impl Strategy<Value = Lsn> {
    prop_oneof![3 => lsn(), 1 => Just(NEWEST)]
}

fn id() -> impl Strategy<Value = u64> {
    1..=u64::MAX
}

fn relation() -> impl Strategy<Value = RelFileLocator> {
    any::<(u32, u32, u32)>().prop_map(|(tablespace, database, relation)| RelFileLocator {
        tablespace,
        database,
        relation,
    })
}

fn fork() -> impl Strategy<Value = Fork> {
    proptest::sample::select(vec![Fork::Main, Fork::FreeSpaceMap, Fork::VisibilityMap, Fork::Init])
}

fn hello() -> impl Strategy<Value = PageHello> {
    let role = prop_oneof![
        any::<u64>().prop_map(|term| ReaderRole::Writer { term: Term(term) }),
        Just(ReaderRole::Replica),
        Just(ReaderRole::Tool),
    ];
    (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u64>(), any::<u32>(), any::<u64>(), role).prop_map(
        |(cluster, branch, system_id, shard, generation, role)| PageHello {
            log: LogId { cluster: ClusterId(cluster), branch: BranchId(branch) },
            system_id: SystemId(system_id),
            shard: ShardId(shard),
            generation: ShardGeneration(generation),
            role,
        },
    )
}

fn welcome() -> impl Strategy<Value = PageWelcome> {
    (any::<(u32, u64)>(), 0..1u64 << 32, 0..1u64 << 32, 1..=u32::MAX, (lsn(), lsn(), lsn())).prop_map(
        |((shard, generation), begin, length, stripe_blocks, (ingested_lsn, durable_lsn, horizon_lsn))| PageWelcome {
            shard: ShardId(shard),
            generation: ShardGeneration(generation),
            range: HashRange { begin, end: (begin + length + 1).min(1 << 32) },
            stripe_blocks,
            ingested_lsn,
            durable_lsn,
            horizon_lsn,
        },
    )
}

fn get_pages() -> impl Strategy<Value = GetPages> {
    (id(), relation(), fork(), any::<u32>(), 1..=PAGES_MAX, lsn_or_newest(), lsn()).prop_map(
        |(id, relation, fork, first_block, count, request_lsn, since)| GetPages {
            id,
            relation,
            fork,
            first_block: first_block.min(u32::MAX - u32::from(count)),
            count,
            request_lsn,
            not_modified_since: since.min(request_lsn),
        },
    )
}

fn sizes() -> impl Strategy<Value = Sizes> {
    let entry = (relation(), fork(), any::<u32>(), any::<u32>())
        .prop_map(|(relation, fork, stripe, length)| StripeLength { relation, fork, stripe, length });
    (id(), lsn(), vec(entry, 0..20), any::<bool>()).prop_map(|(id, lsn, entries, last)| Sizes {
        id,
        lsn,
        entries,
        last,
    })
}

fn failed() -> impl Strategy<Value = PageFailed> {
    let known: Vec<_> = PageErrorCode::KNOWN.iter().map(|(_, code)| *code).collect();
    let code = prop_oneof![proptest::sample::select(known), (1000..u16::MAX).prop_map(PageErrorCode::Other)];
    (any::<u64>(), code, ".{0,200}").prop_map(|(id, code, text)| PageFailed { id, code, text })
}

/// Messages that borrow nothing.
fn message() -> impl Strategy<Value = PageMessage<'static>> {
    let at = || (id(), lsn_or_newest());
    let lease = || (id(), lsn(), any::<u32>());
    prop_oneof![
        hello().prop_map(PageMessage::PageHello),
        welcome().prop_map(PageMessage::PageWelcome),
        get_pages().prop_map(PageMessage::GetPages),
        at().prop_map(|(id, at)| PageMessage::GetSizes(GetSizes { id, at })),
        at().prop_map(|(id, at)| PageMessage::GetMetadata(GetMetadata { id, at })),
        (id(), lsn_or_newest(), any::<u32>()).prop_map(|(id, lsn, seconds)| PageMessage::TakeLease(TakeLease {
            id,
            lsn,
            seconds
        })),
        lease().prop_map(|(id, lsn, seconds)| PageMessage::LeaseGranted(LeaseGranted { id, lsn, seconds })),
        (id(), any::<i64>()).prop_map(|(id, timestamp)| PageMessage::FindLsn(FindLsn { id, timestamp })),
        (id(), lsn(), any::<i64>()).prop_map(|(id, lsn, commit_timestamp)| PageMessage::LsnFound(LsnFound {
            id,
            lsn,
            commit_timestamp
        })),
        (id(), lsn()).prop_map(|(id, lsn)| PageMessage::AdvisoryTaken(AdvisoryTaken { id, lsn })),
        (lsn(), lsn(), lsn()).prop_map(|(ingested_lsn, durable_lsn, horizon_lsn)| {
            PageMessage::PageProgress(PageProgress { ingested_lsn, durable_lsn, horizon_lsn })
        }),
        sizes().prop_map(PageMessage::Sizes),
        failed().prop_map(PageMessage::PageFailed),
    ]
}

/// Values under rising keys.
fn values() -> impl Strategy<Value = Vec<(Key, Vec<u8>)>> {
    let length = prop_oneof![8 => 0..300usize, 1 => 1_000_000..3_500_000usize];
    vec((1..1000u64, length, any::<u8>()), 0..12).prop_map(|values| {
        let mut xid = 0;
        let value = |(step, length, byte)| {
            xid += step;
            (Key::metadata(Metadata::TwoPhase(xid)), vec![byte; length])
        };
        values.into_iter().map(value).collect()
    })
}

/// Encodes, cuts the stream at `cut`, reads and decodes again; the answer must be the same message.
fn assert_round_trip(message: &PageMessage<'_>, cut: usize) {
    let bytes = encode_to_vec(message).expect("a message within the limits");
    let (first, second) = bytes.split_at(cut % bytes.len());
    let mut reader = PageFrameReader::default();
    reader.feed(first);
    assert_eq!(None, reader.next().expect("a valid stream"));
    reader.feed(second);
    let frame = reader.next().expect("a valid stream").expect("a whole frame");
    assert_eq!(message.message_type(), frame.message);
    assert_eq!(Ok(message), decode(frame).as_ref());
    assert_eq!(None, reader.next().expect("a valid stream"));
}

fn body_of(message: &PageMessage<'_>) -> Vec<u8> {
    encode_to_vec(message).expect("within the limits")[HEADER_BYTES..].to_vec()
}

proptest! {
    #[test]
    fn messages(message in message(), cut: usize) {
        assert_round_trip(&message, cut);
    }

    #[test]
    fn pages_files_and_values(
        id in id(), lsn in lsn(), count in 1..4usize, byte: u8, name in "[a-z/_.]{1,60}", contents in vec(any::<u8>(), 0..3000),
        pieces in vec((any::<[u8; 22]>(), any::<bool>(), vec(any::<u8>(), 0..200)), 0..9), last: bool, cut: usize,
    ) {
        let bytes = vec![byte; count * PAGE_BYTES];
        assert_round_trip(&PageMessage::Pages(Pages::new(id, lsn, &bytes)), cut);
        assert_round_trip(&PageMessage::PutAdvisory(PutAdvisory { id, name: &name, contents: &contents }), cut);
        let pieces = pieces.iter().map(|(key, continues, bytes)| MetadataPiece { key: Key::from_bytes(*key), continues: *continues, bytes });
        assert_round_trip(&PageMessage::MetadataPart(MetadataPart { id, lsn, pieces: pieces.collect(), last }), cut);
    }

    /// Whatever a decoder accepts it would also send: nothing is read in two ways.
    #[test]
    fn any_body_is_refused_or_means_one_message(
        kind in proptest::sample::select(PageMessageType::ALL.to_vec()), body in vec(any::<u8>(), 0..400),
    ) {
        if let Ok(message) = decode(PageFrame { message: kind, body: &body }) {
            let again = encode_to_vec(&message).expect("what was accepted can be sent");
            let mut reader = PageFrameReader::default();
            reader.feed(&again);
            prop_assert_eq!(Ok(message), decode(reader.next().expect("valid").expect("whole")));
        }
    }

    #[test]
    fn changed_bytes_never_panic(message in message(), position: usize, value: u8) {
        let mut bytes = encode_to_vec(&message).expect("within the limits");
        let position = position % bytes.len();
        bytes[position] = value;
        let mut reader = PageFrameReader::default();
        reader.feed(&bytes);
        if let Ok(Some(frame)) = reader.next() {
            let _refused_or_another_message = decode(frame);
        }
    }

    #[test]
    fn cut_messages_are_refused(message in message(), cut: usize) {
        let body = body_of(&message);
        let body = &body[..cut % body.len()];
        let decoded = decode(PageFrame { message: message.message_type(), body });
        prop_assert!(decoded.is_err(), "{:?}", decoded);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// The state of a prepared transaction may be longer than any frame.
    #[test]
    fn metadata_of_any_length_goes_through_frames(values in values(), id in id(), lsn in lsn()) {
        let borrowed: Vec<_> = values.iter().map(|(key, value)| (*key, &value[..])).collect();
        let mut join = MetadataJoin::default();
        let parts = metadata_parts(id, lsn, &borrowed);
        for (index, part) in parts.iter().enumerate() {
            let bytes = encode_to_vec(&PageMessage::MetadataPart(part.clone())).expect("a part fits into a frame");
            let mut reader = PageFrameReader::default();
            reader.feed(&bytes);
            let PageMessage::MetadataPart(part) = decode(reader.next().expect("valid").expect("whole")).expect("valid") else {
                panic!("another message");
            };
            let joined = join.add(&part).expect("parts that fit");
            prop_assert_eq!(index + 1 == parts.len(), joined.is_some());
            if let Some(joined) = joined {
                prop_assert_eq!((lsn, values.clone()), joined);
            }
        }
    }
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    let key = |xid| Key::metadata(Metadata::TwoPhase(xid));
    let piece = |xid, continues| MetadataPiece { key: key(xid), continues, bytes: b"value" };
    let part = |lsn, pieces: &[MetadataPiece<'static>], last| MetadataPart {
        id: 1,
        lsn: Lsn(lsn),
        pieces: pieces.to_vec(),
        last,
    };
    for (parts, expected) in [
        (vec![part(8, &[piece(1, true)], true)], MetadataJoinError::BrokenOff),
        (vec![part(8, &[piece(1, true), piece(2, false)], true)], MetadataJoinError::BrokenOff),
        (vec![part(8, &[piece(1, true)], false), part(8, &[piece(2, false)], true)], MetadataJoinError::BrokenOff),
        (vec![part(8, &[piece(2, false), piece(1, false)], true)], MetadataJoinError::Unordered),
        (vec![part(8, &[piece(2, false), piece(2, false)], true)], MetadataJoinError::Unordered),
        (vec![part(8, &[], false), part(16, &[], true)], MetadataJoinError::Position),
    ] {
        let mut join = MetadataJoin::default();
        let result = parts.iter().map(|part| join.add(part)).find(Result::is_err);
        assert_eq!(Some(Err(expected)), result, "{parts:?}");
    }
}

#[test]
fn fields_out_of_their_range_are_neither_sent_nor_accepted() {
    let get = GetPages {
        id: 1,
        relation: RelFileLocator::default(),
        fork: Fork::Main,
        first_block: 0,
        count: 1,
        request_lsn: Lsn(16),
        not_modified_since: Lsn(8),
    };
    let pages = [0; PAGE_BYTES];
    for (message, field) in [
        (PageMessage::GetPages(GetPages { id: 0, ..get }), "id"),
        (PageMessage::GetPages(GetPages { count: 0, ..get }), "count"),
        (PageMessage::GetPages(GetPages { count: PAGES_MAX + 1, ..get }), "count"),
        (PageMessage::GetPages(GetPages { first_block: u32::MAX, ..get }), "count"),
        (PageMessage::GetPages(GetPages { not_modified_since: Lsn(24), ..get }), "not_modified_since"),
        (PageMessage::Pages(Pages::new(1, Lsn(8), &[])), "pages"),
        (PageMessage::Pages(Pages::new(1, Lsn(8), &pages[1..])), "pages"),
        (PageMessage::Pages(Pages::new(0, Lsn(8), &pages)), "id"),
        (PageMessage::PutAdvisory(PutAdvisory { id: 1, name: "", contents: b"" }), "name"),
        (PageMessage::PutAdvisory(PutAdvisory { id: 1, name: &"x".repeat(256), contents: b"" }), "name"),
        (
            PageMessage::PutAdvisory(PutAdvisory { id: 1, name: "x", contents: &vec![0; ADVISORY_BYTES_MAX + 1] }),
            "contents",
        ),
    ] {
        assert_eq!(Err(WireError::BadValue { field }), encode_to_vec(&message), "{:?}", message.message_type());
    }
    // Longest that are allowed.
    let most = vec![7; PAGE_BYTES * usize::from(PAGES_MAX)];
    assert_round_trip(&PageMessage::Pages(Pages::new(1, Lsn(8), &most)), 100);
    let file = vec![7; ADVISORY_BYTES_MAX];
    assert_round_trip(&PageMessage::PutAdvisory(PutAdvisory { id: 1, name: &"x".repeat(255), contents: &file }), 100);
    let entry = StripeLength { relation: RelFileLocator::default(), fork: Fork::Main, stripe: 0, length: 1 };
    let sizes = |count| PageMessage::Sizes(Sizes { id: 1, lsn: Lsn(8), entries: vec![entry; count], last: true });
    assert_round_trip(&sizes(SIZES_MAX), 100);
    assert_eq!(Err(WireError::BadValue { field: "sizes" }), encode_to_vec(&sizes(SIZES_MAX + 1)));

    let accepts = |message: &PageMessage<'_>, at: usize, bytes: &[u8]| {
        let mut body = body_of(message);
        body[at..at + bytes.len()].copy_from_slice(bytes);
        decode(PageFrame { message: message.message_type(), body: &body }).map(|_| ())
    };
    let message = PageMessage::GetPages(get);
    for (at, bytes, field) in [
        (0, &[0; 8][..], "id"),
        (20, &[4], "fork"),
        (25, &[0, 0], "count"),
        (25, &[65, 0], "count"),
        (27, &(1u64 << 63).to_le_bytes(), "request_lsn"),
        (35, &u64::MAX.to_le_bytes(), "not_modified_since"),
        (35, &24u64.to_le_bytes(), "not_modified_since"),
    ] {
        assert_eq!(Err(WireError::BadValue { field }), accepts(&message, at, bytes), "{at} {bytes:?}");
    }
    let welcome = PageMessage::PageWelcome(PageWelcome {
        shard: ShardId(1),
        generation: ShardGeneration(1),
        range: HashRange::ALL,
        stripe_blocks: 2048,
        ingested_lsn: Lsn(8),
        durable_lsn: Lsn(8),
        horizon_lsn: Lsn(8),
    });
    assert_eq!(Err(WireError::BadValue { field: "range" }), accepts(&welcome, 12, &(1u64 << 32).to_le_bytes()));
    assert_eq!(Err(WireError::BadValue { field: "range" }), accepts(&welcome, 20, &(1u64 << 33).to_le_bytes()));
    assert_eq!(Err(WireError::BadValue { field: "stripe_blocks" }), accepts(&welcome, 28, &[0; 4]));
}

#[test]
fn invented_counts_allocate_nothing() {
    let sizes = PageMessage::Sizes(Sizes { id: 1, lsn: Lsn(8), entries: vec![], last: true });
    let part = PageMessage::MetadataPart(MetadataPart { id: 1, lsn: Lsn(8), pieces: vec![], last: true });
    for (message, field) in [(sizes, "sizes"), (part, "pieces")] {
        let mut body = body_of(&message);
        body[17..21].copy_from_slice(&u32::MAX.to_le_bytes());
        let decoded = decode(PageFrame { message: message.message_type(), body: &body });
        assert_eq!(Err(WireError::Truncated { field }), decoded);
    }
}

#[test]
fn changed_pages_are_not_intact() {
    let mut bytes = vec![3; 2 * PAGE_BYTES];
    let pages = Pages::new(1, Lsn(8), &bytes);
    assert!(pages.is_intact());
    let checksum = pages.checksum;
    bytes[9000] ^= 4;
    assert!(!Pages { id: 1, lsn: Lsn(8), checksum, bytes: &bytes }.is_intact());
}

#[test]
fn other_version_is_named_before_anything_else_is_read() {
    let hello = PageHello {
        log: LogId::default(),
        system_id: SystemId(1),
        shard: ShardId(1),
        generation: ShardGeneration(0),
        role: ReaderRole::Tool,
    };
    let mut body = body_of(&PageMessage::PageHello(hello));
    let greeting = |body: &[u8]| decode(PageFrame { message: PageMessageType::PageHello, body }).map(|_| ());
    body[8] = 9;
    assert_eq!(Err(WireError::WrongVersion { theirs: 9, ours: 1 }), greeting(&body[..10]));
    body[0] = b'L';
    assert_eq!(Err(WireError::BadMagic), greeting(&body));
    assert_eq!(Err(WireError::BadMagic), greeting(&body[..3]));
}

/// A port of the other protocol ends the connection at the first frame.
#[test]
fn the_two_protocols_share_no_type() {
    for page in PageMessageType::ALL {
        assert_eq!(None, wire::append::MessageType::from_byte(page.byte()), "{page:?}");
        let mut reader = FrameReader::new();
        let hello = encode_to_vec(&PageMessage::PageHello(PageHello {
            log: LogId::default(),
            system_id: SystemId(1),
            shard: ShardId(1),
            generation: ShardGeneration(0),
            role: ReaderRole::Replica,
        }));
        reader.feed(&hello.expect("within the limits"));
        assert_eq!(Err(WireError::UnknownType(0x40)), reader.next());
    }
}

/// The corpus of the fuzz target was written by hand from `docs/formats/page-protocol.md`, not by the encoder.
#[test]
fn bytes_as_documented_are_read() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/page_message");
    let mut types = vec![];
    for entry in std::fs::read_dir(corpus).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let input = std::fs::read(&path).expect("an input");
        let kind = PageMessageType::ALL[usize::from(input[0])];
        let message = decode(PageFrame { message: kind, body: &input[1..] });
        let message = message.unwrap_or_else(|error| panic!("{path:?}: {error}"));
        assert_eq!(input[1..], body_of(&message), "{path:?}");
        types.push(kind);
    }
    assert!(PageMessageType::ALL.iter().all(|kind| types.contains(kind)), "{types:?}");
}
