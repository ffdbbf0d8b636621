//! A whole record: its block references, their images and data, and its main data.
//!
//! Source: `DecodeXLogRecord` (`access/transam/xlogreader.c`) and `access/xlogrecord.h`.

use alloc::vec::Vec;
use core::ops::Range;

use crate::{
    RecordFault, RecordInfo,
    facts::part_id,
    format::{u16_at, u32_at},
    image::{BlockImage, Compression},
};

const BLOCK_BYTES: u16 = 8192;

/// Flags of a block reference (`fork_flags`); the lower half is the fork.
pub(crate) mod block_flags {
    pub const FORK_MASK: u8 = 0x0F;
    pub const HAS_IMAGE: u8 = 0x10;
    pub const HAS_DATA: u8 = 0x20;
    pub const WILL_INIT: u8 = 0x40;
    pub const SAME_REL: u8 = 0x80;
}

/// Flags of an image (`bimg_info`).
pub(crate) mod image_flags {
    pub const HAS_HOLE: u8 = 0x01;
    pub const APPLY: u8 = 0x02;
    pub const PGLZ: u8 = 0x04;
    pub const LZ4: u8 = 0x08;
    pub const ZSTD: u8 = 0x10;
}

/// A relation's files (`RelFileLocator`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RelFileLocator {
    /// Tablespace.
    pub tablespace: u32,
    /// Database, 0 for shared relations.
    pub database: u32,
    /// File number.
    pub relation: u32,
}

/// Which of a relation's files (`ForkNumber`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fork {
    /// The data.
    Main = 0,
    /// Free space map.
    FreeSpaceMap = 1,
    /// Visibility map.
    VisibilityMap = 2,
    /// What an unlogged relation is reset to.
    Init = 3,
}

/// A block that a record changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockRef {
    /// Number of the reference in its record.
    pub id: u8,
    /// Whose block.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// Block number.
    pub block: u32,
    /// Redo makes the page anew and needs no earlier version of it.
    pub will_init: bool,
    pub(crate) image: Option<ImageRef>,
    pub(crate) data: Range<usize>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ImageRef {
    pub(crate) hole: Range<u16>,
    pub(crate) compression: Option<Compression>,
    pub(crate) apply: bool,
    pub(crate) bytes: Range<usize>,
}

/// A record with everything in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Where it is and what kind it is.
    pub info: RecordInfo,
    /// Number of the replication origin.
    pub origin: Option<u16>,
    /// Top-level transaction, on the first record of a subtransaction (`wal_level = logical`).
    pub toplevel_xid: Option<u32>,
    /// In ascending order of `id`, at most 33.
    pub blocks: Vec<BlockRef>,
    payload: Vec<u8>,
    main_data: Range<usize>,
}

impl Record {
    /// The data that belongs to no block.
    pub fn main_data(&self) -> &[u8] {
        &self.payload[self.main_data.clone()]
    }

    /// The data of one of this record's blocks; empty when there is none.
    pub fn block_data(&self, block: &BlockRef) -> &[u8] {
        &self.payload[block.data.clone()]
    }

    /// The image of one of this record's blocks.
    pub fn block_image(&self, block: &BlockRef) -> Option<BlockImage<'_>> {
        block.image.as_ref().map(|image| BlockImage {
            hole: image.hole.clone(),
            compression: image.compression,
            apply: image.apply,
            bytes: &self.payload[image.bytes.clone()],
        })
    }

    /// Everything behind the record header.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    pub(crate) fn assemble(info: RecordInfo, layout: Layout, payload: Vec<u8>) -> Record {
        let Layout { origin, toplevel_xid, blocks, main_data } = layout;
        Record { info, origin, toplevel_xid, blocks, payload, main_data }
    }
}

/// Where the parts of a payload are.
#[derive(Debug)]
pub(crate) struct Layout {
    origin: Option<u16>,
    toplevel_xid: Option<u32>,
    blocks: Vec<BlockRef>,
    main_data: Range<usize>,
}

/// The headers at the start of a payload.
struct Headers<'a>(&'a [u8]);

impl<'a> Headers<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], RecordFault> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(RecordFault::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, RecordFault> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, RecordFault> {
        Ok(u16_at(self.take(2)?, 0))
    }

    fn u32(&mut self) -> Result<u32, RecordFault> {
        Ok(u32_at(self.take(4)?, 0))
    }
}

impl Layout {
    /// Takes a payload apart.
    ///
    /// # Errors
    /// When PostgreSQL's reader would refuse it.
    pub fn parse(payload: &[u8]) -> Result<Layout, RecordFault> {
        let mut layout = Layout { origin: None, toplevel_xid: None, blocks: Vec::new(), main_data: 0..0 };
        let mut headers = Headers(payload);
        // Bytes of the parts that the headers so far announce: they lie behind the headers, which therefore end where
        // no more than this is left.
        let mut announced = 0;
        let mut main_data_length = 0;
        while headers.0.len() > announced {
            match headers.u8()? {
                part_id::DATA_SHORT => main_data_length = usize::from(headers.u8()?),
                part_id::DATA_LONG => main_data_length = headers.u32()? as usize,
                part_id::ORIGIN => {
                    layout.origin = Some(headers.u16()?);
                    continue;
                }
                part_id::TOPLEVEL_XID => {
                    layout.toplevel_xid = Some(headers.u32()?);
                    continue;
                }
                id if id <= part_id::BLOCK_MAX && layout.blocks.last().is_none_or(|last| last.id < id) => {
                    let block = parse_block(id, &mut headers, layout.blocks.last())?;
                    announced += block.data.len() + block.image.as_ref().map_or(0, |image| image.bytes.len());
                    layout.blocks.push(block);
                    continue;
                }
                id => return Err(RecordFault::Id(id)),
            }
            // The length of the main data is the last header.
            break;
        }
        if headers.0.len() != announced.checked_add(main_data_length).ok_or(RecordFault::Length)? {
            return Err(RecordFault::Length);
        }

        let mut at = payload.len() - headers.0.len();
        let mut place = |range: &mut Range<usize>| {
            *range = at..at + range.len();
            at = range.end;
        };
        for block in &mut layout.blocks {
            if let Some(image) = &mut block.image {
                place(&mut image.bytes);
            }
            place(&mut block.data);
        }
        layout.main_data = 0..main_data_length;
        place(&mut layout.main_data);
        Ok(layout)
    }
}

/// Reads a block reference's header; its ranges have their lengths, but begin at 0.
fn parse_block(id: u8, headers: &mut Headers<'_>, before: Option<&BlockRef>) -> Result<BlockRef, RecordFault> {
    let fault = RecordFault::Block(id);
    let flags = headers.u8()?;
    let fork = match flags & block_flags::FORK_MASK {
        0 => Fork::Main,
        1 => Fork::FreeSpaceMap,
        2 => Fork::VisibilityMap,
        3 => Fork::Init,
        _ => return Err(fault),
    };
    let data_length = headers.u16()?;
    if (flags & block_flags::HAS_DATA != 0) != (data_length > 0) {
        return Err(fault);
    }
    let image = if flags & block_flags::HAS_IMAGE != 0 { Some(parse_image(id, headers)?) } else { None };
    let relation = if flags & block_flags::SAME_REL == 0 {
        RelFileLocator { tablespace: headers.u32()?, database: headers.u32()?, relation: headers.u32()? }
    } else {
        before.ok_or(fault)?.relation
    };
    Ok(BlockRef {
        id,
        relation,
        fork,
        block: headers.u32()?,
        will_init: flags & block_flags::WILL_INIT != 0,
        image,
        data: 0..usize::from(data_length),
    })
}

fn parse_image(id: u8, headers: &mut Headers<'_>) -> Result<ImageRef, RecordFault> {
    let (length, hole_offset, info) = (headers.u16()?, headers.u16()?, headers.u8()?);
    let has_hole = info & image_flags::HAS_HOLE != 0;
    let compression = match info & (image_flags::PGLZ | image_flags::LZ4 | image_flags::ZSTD) {
        0 => None,
        image_flags::PGLZ => Some(Compression::Pglz),
        image_flags::LZ4 => Some(Compression::Lz4),
        image_flags::ZSTD => Some(Compression::Zstd),
        _ => return Err(RecordFault::Block(id)),
    };
    let hole_length = match compression {
        None => BLOCK_BYTES.checked_sub(length).ok_or(RecordFault::Block(id))?,
        Some(_) if has_hole => headers.u16()?,
        Some(_) => 0,
    };
    let hole_end = hole_offset.checked_add(hole_length).filter(|end| *end <= BLOCK_BYTES);
    let hole = hole_offset..hole_end.ok_or(RecordFault::Block(id))?;
    let consistent = if has_hole { hole_offset > 0 && hole_length > 0 } else { hole == (0..0) };
    let shorter = compression.is_none() || length < BLOCK_BYTES;
    if !consistent || !shorter {
        return Err(RecordFault::Block(id));
    }
    let apply = info & image_flags::APPLY != 0;
    Ok(ImageRef { hole, compression, apply, bytes: 0..usize::from(length) })
}
