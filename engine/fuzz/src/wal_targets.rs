//! Scanner and decoder over WAL that is made up, damaged, or no WAL at all.

use pgtypes::{FrameSummary, Lsn, PgTimeline, SystemId};
use wal::{Decoder, RECORD_BYTES_MAX, Record, RecordInfo, RecordSpec, Scanner, WalError, WalWriter, restore_image};

const SEGMENT_BYTES: u64 = 1 << 20;
const ORIGIN: Lsn = Lsn(16 * SEGMENT_BYTES);

/// Takes the input apart; missing bytes are zeros.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }
}

/// Bytes of WAL, and how they are to be sliced.
///
/// Mode 0: the input as it is. Mode 1: valid records with payloads out of the input. Mode 2: the same, with some bytes
/// damaged.
fn wal_bytes(input: &mut Input<'_>) -> (Vec<u8>, usize) {
    let mode = input.u8() % 3;
    let slice = usize::from(input.u16()).max(1);
    if mode == 0 {
        return (input.0.to_vec(), slice);
    }
    let damage = if mode == 2 { input.u8() % 8 } else { 0 };
    let damage: Vec<(u16, u8)> = (0..damage).map(|_| (input.u16(), input.u8())).collect();
    let mut wal = WalWriter::new(ORIGIN, Lsn(ORIGIN.0 - 64), SEGMENT_BYTES, SystemId(1), PgTimeline(1));
    let mut before = wal.last_record();
    while !input.0.is_empty() && wal.bytes().len() < 3 << 20 {
        let (rmgr, info, xid) = (input.u8(), input.u8(), u32::from(input.u16()));
        let length = usize::from(input.u16());
        // A long payload takes few bytes of input: its last byte is repeated.
        let (own, repeat) = (length % 512, length / 512 * 100);
        let mut payload = input.take(own).to_vec();
        payload.resize(payload.len() + repeat, payload.last().copied().unwrap_or_default());
        if rmgr == 0xFF {
            let last = wal.last_record();
            let page = wal.position().floor(wal::PAGE_BYTES);
            if last.is_valid() && last >= ORIGIN && last < page && page < wal.position() {
                wal.break_off_last_record(before);
            }
            continue;
        }
        before = wal.last_record();
        wal.append(RecordSpec { rmgr, info, xid, payload: &payload });
    }
    let mut bytes = wal.take_bytes();
    for (at, change) in damage {
        let length = bytes.len();
        if length > 0 {
            bytes[usize::from(at) * 31 % length] ^= change;
        }
    }
    (bytes, slice)
}

fn scanner() -> Scanner {
    Scanner::at_segment_start(ORIGIN, SEGMENT_BYTES, 0xFFFF_FF00, PgTimeline(1))
}

fn scan(mut scanner: Scanner, bytes: &[u8], slice: usize) -> (Vec<RecordInfo>, FrameSummary, Result<(), WalError>) {
    let mut records = Vec::new();
    let result = bytes.chunks(slice).try_for_each(|slice| scanner.feed(slice, |record| records.push(*record)));
    assert!(scanner.summary().record_end <= scanner.position());
    (records, scanner.summary(), result)
}

/// Rules: slices make no difference; records follow each other and link back; a scanner resumed at a record's end goes
/// on as the first one.
pub fn fuzz_wal_scanner(data: &[u8]) {
    let mut input = Input(data);
    let (bytes, slice) = wal_bytes(&mut input);
    let (records, summary, result) = scan(scanner(), &bytes, usize::MAX);
    assert_eq!((&records, summary, result), {
        let (sliced, sliced_summary, sliced_result) = scan(scanner(), &bytes, slice);
        assert_eq!(records, sliced);
        (&records, sliced_summary, sliced_result)
    });
    for pair in records.windows(2) {
        assert!(pair[0].end <= pair[1].start && pair[1].prev == pair[0].start, "{pair:?}");
    }
    if let Some(middle) = records.get(slice % records.len().max(1)) {
        let (first, behind) = bytes.split_at(middle.end.bytes_since(ORIGIN) as usize);
        let (_, at_middle, first_result) = scan(scanner(), first, usize::MAX);
        assert_eq!((Ok(()), middle.end), (first_result, at_middle.record_end));
        let (_, resumed, resumed_result) = scan(Scanner::resume(at_middle, SEGMENT_BYTES), behind, slice);
        assert_eq!((summary, result), (resumed, resumed_result));
    }
}

/// Rules: slices make no difference; the decoder takes no record that the scanner refuses; the parts of a record lie in
/// its payload; images are restored or refused; memory is bounded by the bytes that were fed.
pub fn fuzz_wal_decoder(data: &[u8]) {
    let mut input = Input(data);
    let (bytes, slice) = wal_bytes(&mut input);
    let (scanned, _, _) = scan(scanner(), &bytes, usize::MAX);
    let (records, result) = decode(&bytes, usize::MAX);
    assert_eq!((&records, result), {
        let (sliced, sliced_result) = decode(&bytes, slice);
        assert_eq!(records, sliced);
        (&records, sliced_result)
    });
    assert!(records.len() <= scanned.len());
    for (record, scanned) in records.iter().zip(&scanned) {
        assert_eq!(&record.info, scanned);
        let mut parts = record.main_data().len();
        for block in &record.blocks {
            parts += record.block_data(block).len();
            if let Some(image) = record.block_image(block) {
                parts += image.bytes.len();
                if let Ok(page) = restore_image(&image) {
                    assert!(page[usize::from(image.hole.start)..usize::from(image.hole.end)].iter().all(|b| *b == 0));
                }
            }
        }
        assert!(parts <= record.payload().len() && record.payload().ends_with(record.main_data()));
    }
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
            assert!(decoder.buffered_bytes() <= 2 * bytes.len());
            records.extend(decoder.poll_record());
        }
    }
    (records, Ok(()))
}

/// First byte: which blocks are kept. The rest is a stored record.
///
/// Rules: a record that is read can be trimmed and read again; what is kept is the same.
pub fn fuzz_stored_record(data: &[u8]) {
    let Some((keep, stored)) = data.split_first() else { return };
    let Ok(record) = Record::from_stored(Lsn(8), Lsn(64), stored) else { return };
    let is_kept = |id: u8| keep >> (id % 8) & 1 == 1;
    let trimmed = record.to_stored(|block| is_kept(block.id));
    assert!(trimmed.len() <= stored.len());
    let trimmed = Record::from_stored(Lsn(8), Lsn(64), &trimmed).expect("our own record");
    assert_eq!((record.main_data(), record.blocks.len()), (trimmed.main_data(), trimmed.blocks.len()));
    for (whole, block) in record.blocks.iter().zip(&trimmed.blocks) {
        if is_kept(whole.id) {
            assert_eq!(record.block_data(whole), trimmed.block_data(block));
            assert_eq!(record.block_image(whole), trimmed.block_image(block));
        }
    }
}
