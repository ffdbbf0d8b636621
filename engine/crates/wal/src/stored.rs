//! A record as it is sent to a shard and kept in a layer: without the data of blocks that the reader does not have.
//!
//! Layout: `docs/formats/layers.md`, "Stored records". The payload stays in PostgreSQL's own layout, so that one parser
//! reads both.

use alloc::vec::Vec;

use pgtypes::{Lsn, PgTimeline};

use crate::{
    RecordFault, RecordInfo,
    facts::part_id,
    format::{RECORD_HEADER_BYTES, u32_at},
    image::Compression,
    record::{BlockRef, ImageRef, Layout, Record, block_flags, image_flags},
};

/// Bytes in front of a stored record's payload: `xid u32, info u8, rmgr u8`, 2 zero bytes.
pub const STORED_HEADER_BYTES: usize = 8;

impl Record {
    /// The record with the data and images of those blocks only that `keep` names.
    ///
    /// References of other blocks stay, since what a record does to one block may depend on the numbers of the others
    /// (never on their data: `redo`'s tests compare). Replay of a block that is kept gives the same page.
    pub fn to_stored(&self, keep: impl Fn(&BlockRef) -> bool) -> Vec<u8> {
        let payload = self.payload();
        // At most 33 blocks: one bit each.
        let kept = self.blocks.iter().enumerate().fold(0u64, |kept, (at, block)| kept | u64::from(keep(block)) << at);
        let dropped = |(at, block): (usize, &BlockRef)| {
            if kept >> at & 1 == 1 { 0 } else { block.data.len() + block.image.as_ref().map_or(0, |i| i.bytes.len()) }
        };
        let dropped_bytes: usize = self.blocks.iter().enumerate().map(dropped).sum();
        let mut out = Vec::with_capacity(STORED_HEADER_BYTES + payload.len() - dropped_bytes);
        out.extend_from_slice(&self.info.xid.to_le_bytes());
        out.extend_from_slice(&[self.info.info, self.info.rmgr, 0, 0]);
        if dropped_bytes == 0 {
            out.extend_from_slice(payload);
            return out;
        }

        let mut before = None;
        for (at, block) in self.blocks.iter().enumerate() {
            put_block(&mut out, block, kept >> at & 1 == 1, before);
            before = Some(block);
        }
        // The order of `XLogRecordAssemble`.
        if let Some(origin) = self.origin {
            out.push(part_id::ORIGIN);
            out.extend_from_slice(&origin.to_le_bytes());
        }
        if let Some(xid) = self.toplevel_xid {
            out.push(part_id::TOPLEVEL_XID);
            out.extend_from_slice(&xid.to_le_bytes());
        }
        let main_data = self.main_data();
        match u8::try_from(main_data.len()) {
            Ok(0) => {}
            Ok(length) => out.extend_from_slice(&[part_id::DATA_SHORT, length]),
            Err(_) => {
                out.push(part_id::DATA_LONG);
                // A record's length has 32 bits.
                out.extend_from_slice(&(main_data.len() as u32).to_le_bytes());
            }
        }
        for (at, block) in self.blocks.iter().enumerate() {
            if kept >> at & 1 == 1 {
                if let Some(image) = &block.image {
                    out.extend_from_slice(&payload[image.bytes.clone()]);
                }
                out.extend_from_slice(&payload[block.data.clone()]);
            }
        }
        out.extend_from_slice(main_data);
        out
    }

    /// The record of what [`Record::to_stored`] gave; `start` and `end` are its place in the log, where `start` may be
    /// unknown ([`Lsn::INVALID`]).
    ///
    /// Back-link and timeline are not stored: `info.prev` and `info.timeline` are invalid.
    ///
    /// # Errors
    /// The bytes are no stored record.
    pub fn from_stored(start: Lsn, end: Lsn, bytes: &[u8]) -> Result<Record, RecordFault> {
        let (header, payload) = bytes.split_first_chunk::<STORED_HEADER_BYTES>().ok_or(RecordFault::Length)?;
        let layout = Layout::parse(payload)?;
        let total_len = u32::try_from(payload.len() + RECORD_HEADER_BYTES).map_err(|_| RecordFault::Length)?;
        let info = RecordInfo {
            start,
            end,
            total_len,
            prev: Lsn::INVALID,
            rmgr: header[5],
            info: header[4],
            xid: u32_at(header, 0),
            timeline: PgTimeline(0),
            tablespace_location: false,
        };
        Ok(Record::assemble(info, layout, Vec::from(payload)))
    }
}

/// Writes the reference of a block (`XLogRecordBlockHeader` and what follows it).
fn put_block(out: &mut Vec<u8>, block: &BlockRef, keep: bool, before: Option<&BlockRef>) {
    let same_relation = before.is_some_and(|before| before.relation == block.relation);
    let image = block.image.as_ref().filter(|_| keep);
    let data_bytes = if keep { block.data.len() } else { 0 };
    let mut flags = block.fork as u8;
    for (set, flag) in [
        (image.is_some(), block_flags::HAS_IMAGE),
        (data_bytes > 0, block_flags::HAS_DATA),
        (block.will_init, block_flags::WILL_INIT),
        (same_relation, block_flags::SAME_REL),
    ] {
        flags |= if set { flag } else { 0 };
    }
    out.extend_from_slice(&[block.id, flags]);
    // It was read from 16 bits.
    out.extend_from_slice(&(data_bytes as u16).to_le_bytes());
    if let Some(image) = image {
        put_image(out, image);
    }
    if !same_relation {
        for number in [block.relation.tablespace, block.relation.database, block.relation.relation] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
    out.extend_from_slice(&block.block.to_le_bytes());
}

/// Writes what stands before a page image (`XLogRecordBlockImageHeader`).
fn put_image(out: &mut Vec<u8>, image: &ImageRef) {
    let has_hole = !image.hole.is_empty();
    let mut info = match image.compression {
        None => 0,
        Some(Compression::Pglz) => image_flags::PGLZ,
        Some(Compression::Lz4) => image_flags::LZ4,
        Some(Compression::Zstd) => image_flags::ZSTD,
    };
    info |= if has_hole { image_flags::HAS_HOLE } else { 0 };
    info |= if image.apply { image_flags::APPLY } else { 0 };
    // It was read from 16 bits.
    out.extend_from_slice(&(image.bytes.len() as u16).to_le_bytes());
    out.extend_from_slice(&image.hole.start.to_le_bytes());
    out.push(info);
    if has_hole && image.compression.is_some() {
        out.extend_from_slice(&(image.hole.len() as u16).to_le_bytes());
    }
}
