//! The decoder over handcrafted records: every form of a block reference, what is refused, and its bounds.

use pgtypes::{Lsn, PgTimeline, SystemId};
use proptest::prelude::*;
use wal::{
    BlockImage, Compression, Decoder, Fork, RECORD_BYTES_MAX, Record, RecordFault, RecordSpec, RelFileLocator, Scanner,
    WalError, WalErrorKind, WalWriter, main_data, restore_image,
};

const SEGMENT: u64 = 1 << 20;
const ORIGIN: Lsn = Lsn(16 * SEGMENT);

fn writer() -> WalWriter {
    WalWriter::new(ORIGIN, Lsn(ORIGIN.0 - 0x50), SEGMENT, SystemId(1), PgTimeline(1))
}

fn scanner() -> Scanner {
    Scanner::at_segment_start(ORIGIN, SEGMENT, 0, PgTimeline(1))
}

fn decode(bytes: &[u8], slice: usize) -> (Vec<Record>, Result<(), WalError>) {
    let mut decoder = Decoder::new(scanner(), RECORD_BYTES_MAX);
    let mut records = Vec::new();
    for mut slice in bytes.chunks(slice) {
        while !slice.is_empty() {
            match decoder.feed(slice) {
                Ok(taken) => slice = &slice[taken..],
                Err(error) => return (records, Err(error)),
            }
            records.extend(decoder.poll_record());
        }
    }
    (records, Ok(()))
}

fn heap(payload: &[u8]) -> RecordSpec<'_> {
    RecordSpec { rmgr: 10, info: 0, xid: 700, payload }
}

fn decode_one(payload: &[u8]) -> Result<Record, WalErrorKind> {
    let mut wal = writer();
    wal.append(heap(payload));
    let (mut records, result) = decode(wal.bytes(), usize::MAX);
    result.map_err(|error| error.kind)?;
    assert_eq!(1, records.len());
    Ok(records.remove(0))
}

fn fault(payload: &[u8]) -> RecordFault {
    match decode_one(payload) {
        Err(WalErrorKind::Record(fault)) => fault,
        other => panic!("expected a fault of the layout: {other:?}"),
    }
}

/// Pieces of a payload, put together.
fn bytes(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

const RELATION: [u8; 12] = [0x7F, 6, 0, 0, 5, 0, 0, 0, 0, 0x40, 0, 0];
const LOCATOR: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 16384 };
const BLOCK_9: [u8; 4] = [9, 0, 0, 0];

#[test]
fn block_references_have_all_their_parts() {
    let payload = bytes(&[
        // 0: data of 3 bytes, main fork.
        &[0, 0x20, 3, 0],
        &RELATION,
        &BLOCK_9,
        // 1: same relation, visibility map, redo makes it anew.
        &[1, 0x80 | 0x40 | 2, 0, 0, 1, 2, 0, 0],
        // 5: image without hole, init fork, of another relation.
        &[5, 0x10 | 3, 0, 0],
        &[0, 0x20, 0, 0, 0x02],
        &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0],
        &BLOCK_9,
        // 32: image with hole, for checking only, and data.
        &[32, 0x80 | 0x10 | 0x20 | 1, 2, 0],
        &[0, 1, 100, 0, 0x01],
        &BLOCK_9,
        // Origin, top-level transaction, main data.
        &[253, 7, 1],
        &[252, 0xBC, 2, 0, 0],
        &[255, 4],
        b"abc",
        &[7; 8192],
        &[8; 256],
        b"de",
        b"main",
    ]);

    let record = decode_one(&payload).expect("a valid record");

    assert_eq!((Some(0x107), Some(700)), (record.origin, record.toplevel_xid));
    assert_eq!(b"main", record.main_data());
    assert_eq!(payload, record.payload());
    let other = RelFileLocator { tablespace: 1, database: 2, relation: 3 };
    let blocks: Vec<_> = record.blocks.iter().map(|b| (b.id, b.relation, b.fork, b.block, b.will_init)).collect();
    let expected = [
        (0, LOCATOR, Fork::Main, 9, false),
        (1, LOCATOR, Fork::VisibilityMap, 513, true),
        (5, other, Fork::Init, 9, false),
        (32, other, Fork::FreeSpaceMap, 9, false),
    ];
    assert_eq!(expected, blocks[..]);
    let data: Vec<_> = record.blocks.iter().map(|block| record.block_data(block)).collect();
    assert_eq!([&b"abc"[..], b"", b"", b"de"], data[..]);
    let images: Vec<_> = record.blocks.iter().map(|block| record.block_image(block)).collect();
    let whole = BlockImage { hole: 0..0, compression: None, apply: true, bytes: &[7; 8192] };
    let part = BlockImage { hole: 100..8036, compression: None, apply: false, bytes: &[8; 256] };
    assert_eq!([None, None, Some(whole), Some(part.clone())], images[..]);
    let page = restore_image(&part).expect("a page");
    assert_eq!(256, page.iter().filter(|byte| **byte == 8).count());
}

#[test]
fn compressed_images_tell_method_and_hole() {
    for (flag, method) in [(0x04, Compression::Pglz), (0x08, Compression::Lz4), (0x10, Compression::Zstd)] {
        for (hole_header, hole, flag) in [(&[][..], 0..0, flag), (&[0x90, 1][..], 24..424, flag | 1)] {
            let offset = [hole.start as u8, 0];
            let image = bytes(&[&[5, 0], &offset, &[flag | 2], hole_header]);
            let payload = bytes(&[&[0, 0x10, 0, 0], &image, &RELATION, &BLOCK_9, b"12345"]);
            let record = decode_one(&payload).expect("a valid record");
            let expected = BlockImage { hole, compression: Some(method), apply: true, bytes: b"12345" };
            assert_eq!(Some(expected), record.block_image(&record.blocks[0]));
        }
    }
}

#[test]
fn main_data_may_be_absent_short_or_long() {
    for length in [0, 1, 255, 256, 70_000, 3 << 20] {
        let data = vec![5; length];
        let record = decode_one(&main_data(&data)).expect("a valid record");
        assert_eq!(data, record.main_data());
    }
}

/// Each row breaks one of the rules of `DecodeXLogRecord`.
#[test]
fn layouts_that_postgresql_refuses_are_refused() {
    let block = |id: u8, flags: u8, length: u8| bytes(&[&[id, flags, length, 0], &RELATION, &BLOCK_9]);
    let image = |length: u16, hole_offset: u16, info: u8, more: &[u8]| {
        let header = bytes(&[&length.to_le_bytes(), &hole_offset.to_le_bytes(), &[info], more]);
        bytes(&[&[0, 0x10, 0, 0], &header, &RELATION, &BLOCK_9, &vec![0; usize::from(length)]])
    };
    let rows: Vec<(&str, Vec<u8>, RecordFault)> = vec![
        ("unknown id", vec![33, 0, 0], RecordFault::Id(33)),
        ("unknown id", vec![251, 0, 0], RecordFault::Id(251)),
        ("same block twice", bytes(&[&block(1, 0, 0), &block(1, 0, 0)]), RecordFault::Id(1)),
        ("blocks out of order", bytes(&[&block(1, 0, 0), &block(0, 0, 0)]), RecordFault::Id(0)),
        ("fork 4", block(0, 4, 0), RecordFault::Block(0)),
        ("data without length", block(0, 0x20, 0), RecordFault::Block(0)),
        ("length without data", bytes(&[&block(0, 0, 1), &[0]]), RecordFault::Block(0)),
        ("same relation as none", bytes(&[&[0, 0x80, 0, 0], &BLOCK_9]), RecordFault::Block(0)),
        ("block cut off", vec![0, 0, 0], RecordFault::Length),
        ("data cut off", bytes(&[&block(0, 0x20, 2), &[0]]), RecordFault::Length),
        ("main data cut off", vec![255, 2, 0], RecordFault::Length),
        ("main data too long", vec![255, 1, 0, 0], RecordFault::Length),
        ("long main data cut off", vec![254, 0xFF, 0xFF, 0xFF, 0xFF, 0], RecordFault::Length),
        ("origin cut off", vec![253, 0], RecordFault::Length),
        ("hole at 0", image(8000, 0, 1, &[]), RecordFault::Block(0)),
        ("hole of length 0", image(8192, 5, 1, &[]), RecordFault::Block(0)),
        ("hole without flag", image(8000, 0, 0, &[]), RecordFault::Block(0)),
        ("hole offset without flag", image(8192, 4, 0, &[]), RecordFault::Block(0)),
        ("hole beyond the page", image(8000, 8001, 1, &[]), RecordFault::Block(0)),
        ("image longer than a page", image(8193, 0, 0, &[]), RecordFault::Block(0)),
        ("compressed to a whole page", image(8192, 0, 4, &[]), RecordFault::Block(0)),
        ("compressed with two methods", image(100, 0, 4 | 8, &[]), RecordFault::Block(0)),
        ("compressed hole of length 0", image(100, 5, 4 | 1, &[0, 0]), RecordFault::Block(0)),
        ("compressed hole beyond the page", image(100, 8000, 4 | 1, &[0, 1]), RecordFault::Block(0)),
    ];
    for (what, payload, expected) in rows {
        assert_eq!(expected, fault(&payload), "{what}");
    }
}

#[test]
fn refused_layout_is_no_part_of_the_log() {
    let mut wal = writer();
    let (_, end) = wal.append(heap(&main_data(b"good")));
    wal.append(heap(&[33]));
    let mut decoder = Decoder::new(scanner(), RECORD_BYTES_MAX);
    let taken = decoder.feed(wal.bytes()).expect("a good record");
    assert_eq!(Ok(0), decoder.feed(&wal.bytes()[taken..]), "a record waits");
    assert!(decoder.poll_record().is_some_and(|record| record.main_data() == b"good"));
    let error = WalError { lsn: end, kind: WalErrorKind::Record(RecordFault::Id(33)) };
    assert_eq!(Err(error), decoder.feed(&wal.bytes()[taken..]));
    assert_eq!(None, decoder.poll_record());
    assert_eq!(end, decoder.summary().record_end);
}

#[test]
fn records_above_the_limit_are_refused() {
    let mut wal = writer();
    wal.append(heap(&main_data(&[1; 5000])));
    let total_len = 24 + 5 + 5000;
    let mut decoder = Decoder::new(scanner(), total_len);
    assert_eq!(Ok(wal.bytes().len()), decoder.feed(wal.bytes()));
    let mut decoder = Decoder::new(scanner(), total_len - 1);
    let kind = WalErrorKind::RecordLength(total_len);
    assert_eq!(Err(WalError { lsn: ORIGIN.advance(40), kind }), decoder.feed(wal.bytes()));
}

/// The announced length is not to be trusted: memory follows the bytes that came.
#[test]
fn memory_follows_what_was_fed() {
    let mut wal = writer();
    wal.append(heap(&main_data(&[1; 5000])));
    let mut bytes = wal.bytes()[..4000].to_vec();
    bytes[40..44].copy_from_slice(&RECORD_BYTES_MAX.to_le_bytes());
    let mut decoder = Decoder::new(scanner(), RECORD_BYTES_MAX);
    let mut fed = 0;
    for slice in bytes.chunks(100) {
        decoder.feed(slice).expect("the checksum comes last");
        fed += slice.len();
        assert!(decoder.buffered_bytes() <= 2 * fed);
    }

    let mut wal = writer();
    wal.append(heap(&main_data(&[1; 100_000])));
    let mut decoder = Decoder::new(scanner(), RECORD_BYTES_MAX);
    for slice in wal.bytes().chunks(100) {
        decoder.feed(slice).expect("good WAL");
        assert!(decoder.buffered_bytes() <= 100_005, "never beyond the record");
    }
    assert_eq!(100_000, decoder.poll_record().expect("a record").main_data().len());
    assert_eq!(0, decoder.buffered_bytes());
}

#[test]
fn broken_off_record_is_not_decoded() {
    let mut wal = writer();
    let (before, _) = wal.append(heap(&main_data(b"before")));
    wal.append(heap(&main_data(&[1; 9000])));
    wal.break_off_last_record(before);
    wal.append(heap(&main_data(b"behind")));
    let (records, result) = decode(wal.bytes(), 1000);
    assert_eq!(Ok(()), result);
    let data: Vec<_> = records.iter().map(Record::main_data).collect();
    assert_eq!([&b"before"[..], data[1], b"behind"], data[..]);
    assert_eq!(16, data[1].len());
}

#[test]
fn decoder_starts_behind_a_continuation() {
    let before = Lsn(ORIGIN.0 - 64);
    let mut wal = WalWriter::new(before, Lsn(before.0 - 0x50), SEGMENT, SystemId(1), PgTimeline(1));
    wal.append(heap(&main_data(&[1; 9000])));
    wal.append(heap(&main_data(b"whole")));
    let (records, result) = decode(&wal.bytes()[64..], 777);
    assert_eq!(Ok(()), result);
    assert_eq!([&b"whole"[..]], records.iter().map(Record::main_data).collect::<Vec<_>>()[..]);
}

/// Payloads that are nearly valid: a header or two, then anything.
fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    let ids = prop::sample::select(vec![0_u8, 1, 2, 32, 252, 253, 254, 255, 33]);
    let part = (ids, any::<u8>(), 0_u8..20, prop::collection::vec(any::<u8>(), 0..40));
    prop::collection::vec(part, 0..5).prop_map(|parts| {
        let mut payload = Vec::new();
        for (id, flags, length, more) in parts {
            payload.extend([id, flags & 0xF3, length, 0]);
            payload.extend(more);
        }
        payload
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a payload with a matching checksum holds, its parts lie in it side by side, or it is refused.
    #[test]
    fn parts_of_a_payload_add_up(payload in any_payload()) {
        match decode_one(&payload) {
            Ok(record) => {
                let parts = record.blocks.iter().map(|block| {
                    record.block_data(block).len() + record.block_image(block).map_or(0, |image| image.bytes.len())
                });
                prop_assert!(parts.sum::<usize>() + record.main_data().len() <= payload.len());
                prop_assert!(payload.ends_with(record.main_data()));
                for block in &record.blocks {
                    if let Some(image) = record.block_image(block) {
                        let _either = restore_image(&image);
                    }
                }
            }
            Err(kind) => prop_assert!(matches!(kind, WalErrorKind::Record(_)), "{kind:?}"),
        }
    }

    /// A compressed image that is not what it claims is refused, never a panic.
    #[test]
    fn random_images_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        hole in (0_u16..9000, 0_u16..9000),
        method in prop::sample::select(vec![Compression::Pglz, Compression::Lz4, Compression::Zstd]),
        magic in any::<bool>(),
    ) {
        let frame = [&[0x28, 0xB5, 0x2F, 0xFD][..], &bytes].concat();
        let bytes = if magic { &frame } else { &bytes };
        let image = BlockImage { hole: hole.0..hole.1, compression: Some(method), apply: true, bytes };
        if let Ok(page) = restore_image(&image) {
            prop_assert!(page[usize::from(hole.0)..usize::from(hole.1)].iter().all(|byte| *byte == 0));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slicing_makes_no_difference(
        lengths in prop::collection::vec(0_usize..20_000, 1..20),
        slice in 1_usize..10_000,
        damage in prop::option::of((any::<prop::sample::Index>(), 1_u8..)),
    ) {
        let mut wal = writer();
        for (i, length) in lengths.iter().enumerate() {
            wal.append(heap(&main_data(&vec![i as u8; *length])));
            if length % 7 == 0 {
                wal.switch_segment();
            }
        }
        let mut bytes = wal.bytes().to_vec();
        if let Some((at, change)) = damage {
            let at = at.index(bytes.len());
            bytes[at] ^= change;
        }
        let (whole, result) = decode(&bytes, usize::MAX);
        prop_assert_eq!((&whole, result), (&decode(&bytes, slice).0, decode(&bytes, slice).1));

        let mut infos = Vec::new();
        let scanned = scanner().feed(&bytes, |record| infos.push(*record));
        prop_assert_eq!(result, scanned);
        prop_assert_eq!(infos, whole.iter().map(|record| record.info).collect::<Vec<_>>());
    }
}
