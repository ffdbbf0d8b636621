//! Records as shards get them: what is kept is the same, what is not is gone, references stay.

mod payload;

use payload::payload;
use pgtypes::{Lsn, PgTimeline, SystemId};
use proptest::{collection::vec, prelude::*};
use wal::{
    Decoder, RECORD_BYTES_MAX, Record, RecordFault, RecordHeader, RecordSpec, STORED_HEADER_BYTES, Scanner, WalWriter,
    main_data,
};

const SEGMENT: u64 = 1 << 20;
const ORIGIN: Lsn = Lsn(16 * SEGMENT);

fn decoder() -> Decoder {
    Decoder::new(Scanner::at_segment_start(ORIGIN, SEGMENT, 0, PgTimeline(1)), RECORD_BYTES_MAX)
}

fn writer() -> WalWriter {
    WalWriter::new(ORIGIN, Lsn(ORIGIN.0 - 0x50), SEGMENT, SystemId(1), PgTimeline(1))
}

fn record(payload: &[u8]) -> Record {
    let mut writer = writer();
    writer.append(RecordSpec { rmgr: 13, info: 0x31, xid: 700, payload });
    let mut decoder = decoder();
    let mut rest = writer.bytes();
    while !rest.is_empty() {
        rest = &rest[decoder.feed(rest).expect("valid WAL")..];
    }
    decoder.poll_record().expect("a record")
}

proptest! {
    #[test]
    fn a_trimmed_record_has_what_was_kept(payload in payload(), keep: u64) {
        let record = record(&payload);
        let is_kept = |id: u8| keep >> (id % 64) & 1 == 1;
        let stored = record.to_stored(|block| is_kept(block.id));
        let trimmed = Record::from_stored(record.info.start, record.info.end, &stored).expect("a stored record");

        let (theirs, ours) = (record.info, trimmed.info);
        prop_assert_eq!((theirs.start, theirs.end, theirs.rmgr, theirs.info, theirs.xid), (ours.start, ours.end, ours.rmgr, ours.info, ours.xid));
        prop_assert_eq!((record.origin, record.toplevel_xid), (trimmed.origin, trimmed.toplevel_xid));
        prop_assert_eq!(record.main_data(), trimmed.main_data());
        prop_assert_eq!(record.blocks.len(), trimmed.blocks.len());
        for (whole, block) in record.blocks.iter().zip(&trimmed.blocks) {
            prop_assert_eq!((whole.id, whole.relation, whole.fork), (block.id, block.relation, block.fork));
            prop_assert_eq!((whole.block, whole.will_init), (block.block, block.will_init));
            let (data, image) = match is_kept(whole.id) {
                true => (record.block_data(whole), record.block_image(whole)),
                false => (&[][..], None),
            };
            prop_assert_eq!((data, image), (trimmed.block_data(block), trimmed.block_image(block)));
        }
        prop_assert!(stored.len() <= STORED_HEADER_BYTES + payload.len());
        // Whoever keeps a record trims it again with the same result.
        prop_assert_eq!(stored, trimmed.to_stored(|_| true));
    }

    #[test]
    fn a_record_of_which_all_is_kept_has_its_payload(payload in payload()) {
        let stored = record(&payload).to_stored(|_| true);
        prop_assert_eq!([&[0xBC, 2, 0, 0, 0x31, 13, 0, 0][..], &payload].concat(), stored);
    }

    /// Layers are checksummed, but whoever reads one trusts nothing.
    #[test]
    fn any_bytes_are_a_record_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(record) = Record::from_stored(Lsn(8), Lsn(64), &bytes) {
            prop_assert_eq!(&bytes[STORED_HEADER_BYTES..], record.payload());
        }
    }
}

#[test]
fn bytes_shorter_than_a_header_are_refused() {
    assert_eq!(Err(RecordFault::Length), Record::from_stored(Lsn(8), Lsn(64), &[0; STORED_HEADER_BYTES - 1]));
}

/// A logical message may have 1 GiB and concerns no shard: it passes by, counted but not kept.
#[test]
fn records_that_are_not_wanted_are_neither_kept_nor_returned() {
    const LOGICAL_MESSAGE: u8 = 21;
    let mut writer = writer();
    let long = main_data(&vec![7; 3 << 20]);
    writer.append(RecordSpec { rmgr: 10, info: 0, xid: 700, payload: &main_data(b"first") });
    writer.append(RecordSpec { rmgr: LOGICAL_MESSAGE, info: 0, xid: 701, payload: &long });
    let (_, end) = writer.append(RecordSpec { rmgr: 10, info: 0, xid: 0, payload: &main_data(b"second") });
    writer.append(RecordSpec { rmgr: LOGICAL_MESSAGE, info: 0, xid: 702, payload: &main_data(b"short") });
    let wanted = |header: &RecordHeader| header.rmgr != LOGICAL_MESSAGE;
    let mut decoder = decoder().wanting(wanted);

    let (mut texts, mut buffered_max) = (vec![], 0);
    for slice in writer.bytes().chunks(5000) {
        let mut rest = slice;
        while !rest.is_empty() {
            rest = &rest[decoder.feed(rest).expect("valid WAL")..];
            buffered_max = buffered_max.max(decoder.buffered_bytes());
            texts.extend(decoder.poll_record().map(|record| (record.main_data().to_vec(), record.info.end)));
        }
    }

    assert_eq!(vec![&b"first"[..], b"second"], texts.iter().map(|(text, _)| &text[..]).collect::<Vec<_>>());
    assert_eq!(end, texts[1].1);
    assert!(buffered_max < 100, "{buffered_max}");
    assert_eq!((702, writer.position()), (decoder.summary().max_full_xid, decoder.summary().record_end));
}

/// Bytes of what is not wanted are checked all the same: a shard may not follow a log that is damaged.
#[test]
fn records_that_are_not_wanted_are_checked() {
    let mut writer = writer();
    writer.append(RecordSpec { rmgr: 21, info: 0, xid: 701, payload: &main_data(&[7; 1000]) });
    let mut bytes = writer.take_bytes();
    bytes[500] ^= 1;
    assert!(decoder().wanting(|header| header.rmgr != 21).feed(&bytes).is_err());
}
