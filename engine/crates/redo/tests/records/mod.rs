//! Records that are made up.

use pgtypes::{Lsn, PgTimeline, SystemId};
use wal::{Decoder, RECORD_BYTES_MAX, Record, RecordSpec, Scanner, WalWriter};

const SEGMENT_BYTES: u64 = 1 << 20;

/// A block of the relation 1663/5/16384.
pub struct Block {
    pub id: u8,
    pub will_init: bool,
    pub block: u32,
    pub data: Vec<u8>,
}

/// A record as PostgreSQL lays it out, with these blocks; none when the decoder knows that its kind has no blocks.
pub fn record(rmgr: u8, info: u8, blocks: &[Block], main: &[u8]) -> Option<Record> {
    const HAS_DATA: u8 = 0x20;
    const WILL_INIT: u8 = 0x40;
    let (mut payload, mut data) = (Vec::<u8>::new(), Vec::<u8>::new());
    for Block { id, will_init, block, data: bytes } in blocks {
        let flags = if bytes.is_empty() { 0 } else { HAS_DATA } | if *will_init { WILL_INIT } else { 0 };
        payload.extend([*id, flags]);
        payload.extend((bytes.len() as u16).to_le_bytes());
        for word in [1663, 5, 16384, *block] {
            payload.extend(u32::to_le_bytes(word));
        }
        data.extend(bytes);
    }
    payload.push(254);
    payload.extend((main.len() as u32).to_le_bytes());
    payload.extend(data);
    payload.extend(main);

    let mut writer = WalWriter::new(Lsn(SEGMENT_BYTES), Lsn(0), SEGMENT_BYTES, SystemId(1), PgTimeline(1));
    writer.append(RecordSpec { rmgr, info, xid: 700, payload: &payload });
    let scanner = Scanner::at_segment_start(Lsn(SEGMENT_BYTES), SEGMENT_BYTES, 3, PgTimeline(1));
    let mut decoder = Decoder::new(scanner, RECORD_BYTES_MAX);
    decoder.feed(writer.bytes()).ok()?;
    decoder.poll_record()
}
