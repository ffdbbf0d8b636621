//! Real records and pages with bytes changed at random: redo may fail on them, but not panic.

use pgtypes::{Lsn, PgTimeline, SystemId};
use redo::{Context, Page, apply, blocks_of, mask};
use wal::{Decoder, RECORD_BYTES_MAX, Record, RecordSpec, Scanner, WalWriter};

/// Where what a page's header says of LSN and checksum ends.
const LSN_AND_CHECKSUM_BYTES: usize = 10;
const SEGMENT_BYTES: u64 = 1 << 20;
/// Damaged copies of each record that is chosen.
const COPIES: usize = 8;

/// A generator of numbers that are random enough (Knuth's MMIX).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }

    /// Place of one of the bytes in which two pages differ beside LSN and checksum.
    pub fn changed_byte(&mut self, before: &Page, after: &Page) -> Option<usize> {
        let pairs = before.0.iter().zip(&after.0).enumerate().skip(LSN_AND_CHECKSUM_BYTES);
        let changed: Vec<usize> = pairs.filter(|(_, (before, after))| before != after).map(|(at, _)| at).collect();
        changed.get(self.below(changed.len())).copied()
    }

    fn damage(&mut self, bytes: &mut [u8]) {
        for _ in 0..1 + self.below(4) {
            let at = self.below(bytes.len());
            let value = [0, 1, 0xFF, self.below(256) as u8][self.below(4)];
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
    }
}

/// The record with this payload; none when the decoder refuses it.
fn record_of(record: &Record, payload: &[u8]) -> Option<Record> {
    // The end of the record stays what it was, so that the page's LSN does not say that it is there already.
    let start = Lsn(record.info.start.floor(SEGMENT_BYTES).0 + SEGMENT_BYTES);
    let mut writer = WalWriter::new(start, Lsn(0), SEGMENT_BYTES, SystemId(1), PgTimeline(1));
    writer.append(RecordSpec { rmgr: record.info.rmgr, info: record.info.info, xid: record.info.xid, payload });
    let mut decoder = Decoder::new(Scanner::at_segment_start(start, SEGMENT_BYTES, 3, PgTimeline(1)), RECORD_BYTES_MAX);
    decoder.feed(writer.bytes()).ok()?;
    decoder.poll_record()
}

/// Applies damaged copies of the record to damaged copies of the pages that it is for; returns how many were refused.
pub fn try_damaged(random: &mut Random, record: &Record, pages: &[Page], context: &Context) -> usize {
    let mut refused = 0;
    for _ in 0..COPIES {
        let mut payload = record.payload().to_vec();
        let what = random.below(3);
        if what != 0 {
            // The images are the larger part of a record, and only there for checking.
            let images = record.blocks.iter().filter_map(|block| record.block_image(block));
            let images: usize = images.map(|image| image.bytes.len()).sum();
            let interesting = (payload.len() - images).min(payload.len());
            let at = if random.below(2) == 0 { 0 } else { payload.len() - interesting };
            random.damage(&mut payload[at..at + interesting]);
        }
        let Some(damaged) = record_of(record, &payload) else {
            refused += 1;
            continue;
        };
        for (touch, page) in blocks_of(&damaged).zip(pages.iter().cycle()) {
            let mut page = page.clone();
            if what != 1 {
                let end = if random.below(2) == 0 { 64 } else { page.0.len() };
                random.damage(&mut page.0[8..end]);
            }
            refused += usize::from(apply(&damaged, &touch, &mut page, context).is_err());
            let _ = mask::mask(record.info.rmgr, touch.tag.fork, touch.tag.block, &mut page);
        }
    }
    refused
}
