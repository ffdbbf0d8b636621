//! The header of a row in a heap page.
//!
//! Source: `access/htup_details.h`.

use crate::{RedoError, page::Page};

/// Bytes in front of the null bitmap (`SizeofHeapTupleHeader`).
pub(crate) const TUPLE_HEADER_BYTES: usize = 23;
/// Longest row (`MaxHeapTupleSize`).
pub(crate) const TUPLE_BYTES_MAX: usize = 8160;

/// `t_infomask`.
pub(crate) mod infomask {
    pub const XMAX_KEYSHR_LOCK: u16 = 0x0010;
    pub const COMBO_CID: u16 = 0x0020;
    pub const XMAX_EXCL_LOCK: u16 = 0x0040;
    pub const XMAX_LOCK_ONLY: u16 = 0x0080;
    pub const LOCK_MASK: u16 = XMAX_KEYSHR_LOCK | XMAX_EXCL_LOCK;
    pub const XMIN_FROZEN: u16 = 0x0300;
    pub const XMAX_COMMITTED: u16 = 0x0400;
    pub const XMAX_INVALID: u16 = 0x0800;
    pub const XMAX_IS_MULTI: u16 = 0x1000;
    pub const MOVED: u16 = 0xC000;
    pub const XACT_MASK: u16 = 0xFFF0;
    /// All that tells what xmax means (`HEAP_XMAX_BITS`).
    pub const XMAX_BITS: u16 = XMAX_COMMITTED | XMAX_INVALID | XMAX_IS_MULTI | LOCK_MASK | XMAX_LOCK_ONLY;
}

/// `t_infomask2`.
pub(crate) mod infomask2 {
    pub const KEYS_UPDATED: u16 = 0x2000;
    pub const HOT_UPDATED: u16 = 0x4000;
}

/// `infobits_set` of records (`XLHL_*`).
mod infobits {
    pub const XMAX_IS_MULTI: u8 = 0x01;
    pub const XMAX_LOCK_ONLY: u8 = 0x02;
    pub const XMAX_EXCL_LOCK: u8 = 0x04;
    pub const XMAX_KEYSHR_LOCK: u8 = 0x08;
    pub const KEYS_UPDATED: u8 = 0x10;
}

/// Offset number in `t_ctid` of a row whose insertion is not yet confirmed (`SpecTokenOffsetNumber`).
pub(crate) const SPECULATIVE: u16 = 0xFFFE;
/// `t_ctid` of a row that went to another partition (`ItemPointerSetMovedPartitions`).
pub(crate) const MOVED_PARTITIONS: (u32, u16) = (u32::MAX, 0xFFFD);

const XMIN: usize = 0;
const XMAX: usize = 4;
const CID: usize = 8;
const CTID: usize = 12;
const INFOMASK2: usize = 18;
const INFOMASK: usize = 20;
const HOFF: usize = 22;

/// The parts of a row's header that records carry (`xl_heap_header`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct TupleFlags {
    pub infomask2: u16,
    pub infomask: u16,
    pub hoff: u8,
}

/// A row's place in its page; at least a header long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TuplePlace(usize);

impl Page {
    /// The row that a line pointer leads to.
    ///
    /// # Errors
    /// When the line pointer is not in use as one of a row.
    pub(crate) fn tuple(&self, number: u16) -> Result<TuplePlace, RedoError> {
        if self.item_id(number)?.state() != crate::page::ItemState::Normal {
            return Err(RedoError::Page("the line pointer is not that of a row"));
        }
        let range = self.item_range(number)?;
        if range.len() < TUPLE_HEADER_BYTES {
            return Err(RedoError::Page("a row is shorter than its header"));
        }
        Ok(TuplePlace(range.start))
    }
}

impl TuplePlace {
    /// A header that was just made room for.
    pub fn new(place: usize) -> TuplePlace {
        TuplePlace(place)
    }

    pub fn start(self) -> usize {
        self.0
    }

    /// Writes a row's whole header; `t_cid` is 0, as always in recovery.
    pub fn write(self, page: &mut Page, flags: TupleFlags, xmin: u32, xmax: u32, ctid: (u32, u16)) {
        page.set_u32(self.0 + XMIN, xmin);
        self.set_xmax(page, xmax);
        page.set_u32(self.0 + CID, 0);
        self.set_ctid(page, ctid);
        page.set_u16(self.0 + INFOMASK2, flags.infomask2);
        page.set_u16(self.0 + INFOMASK, flags.infomask & !infomask::COMBO_CID);
        page.0[self.0 + HOFF] = flags.hoff;
    }

    pub fn infomask(self, page: &Page) -> u16 {
        page.u16(self.0 + INFOMASK)
    }

    pub fn set_infomask(self, page: &mut Page, value: u16) {
        page.set_u16(self.0 + INFOMASK, value);
    }

    pub fn infomask2(self, page: &Page) -> u16 {
        page.u16(self.0 + INFOMASK2)
    }

    pub fn set_infomask2(self, page: &mut Page, value: u16) {
        page.set_u16(self.0 + INFOMASK2, value);
    }

    /// Offset of the row's data (`t_hoff`).
    pub fn hoff(self, page: &Page) -> usize {
        usize::from(page.0[self.0 + HOFF])
    }

    pub fn ctid(self, page: &Page) -> (u32, u16) {
        let at = self.0 + CTID;
        (u32::from(page.u16(at)) << 16 | u32::from(page.u16(at + 2)), page.u16(at + 4))
    }

    pub fn set_ctid(self, page: &mut Page, (block, number): (u32, u16)) {
        let at = self.0 + CTID;
        page.set_u16(at, (block >> 16) as u16);
        page.set_u16(at + 2, block as u16);
        page.set_u16(at + 4, number);
    }

    pub fn set_xmin(self, page: &mut Page, xid: u32) {
        page.set_u32(self.0 + XMIN, xid);
    }

    pub fn set_xmax(self, page: &mut Page, xid: u32) {
        page.set_u32(self.0 + XMAX, xid);
    }

    pub fn set_cid(self, page: &mut Page, value: u32) {
        page.set_u32(self.0 + CID, value);
    }

    /// Sets `t_cid` to the first command, without a combo (`HeapTupleHeaderSetCmax`).
    pub fn clear_cmax(self, page: &mut Page) {
        self.set_cid(page, 0);
        let mask = self.infomask(page);
        self.set_infomask(page, mask & !infomask::COMBO_CID);
    }

    /// Says anew what xmax means (`fix_infomask_from_infobits`, after the callers' clearing of `HEAP_XMAX_BITS`).
    pub fn set_infobits(self, page: &mut Page, bits: u8) {
        let mut mask = self.infomask(page) & !(infomask::XMAX_BITS | infomask::MOVED);
        let mut mask2 = self.infomask2(page) & !infomask2::KEYS_UPDATED;
        for (bit, flag) in [
            (infobits::XMAX_IS_MULTI, infomask::XMAX_IS_MULTI),
            (infobits::XMAX_LOCK_ONLY, infomask::XMAX_LOCK_ONLY),
            (infobits::XMAX_EXCL_LOCK, infomask::XMAX_EXCL_LOCK),
            (infobits::XMAX_KEYSHR_LOCK, infomask::XMAX_KEYSHR_LOCK),
        ] {
            if bits & bit != 0 {
                mask |= flag;
            }
        }
        if bits & infobits::KEYS_UPDATED != 0 {
            mask2 |= infomask2::KEYS_UPDATED;
        }
        self.set_infomask(page, mask);
        self.set_infomask2(page, mask2);
    }

    pub fn set_hot_updated(self, page: &mut Page, on: bool) {
        let mask2 = self.infomask2(page) & !infomask2::HOT_UPDATED;
        self.set_infomask2(page, if on { mask2 | infomask2::HOT_UPDATED } else { mask2 });
    }

    /// Whether xmax only locks the row (`HEAP_XMAX_IS_LOCKED_ONLY`).
    pub fn is_locked_only(self, page: &Page) -> bool {
        let mask = self.infomask(page);
        mask & infomask::XMAX_LOCK_ONLY != 0
            || mask & (infomask::XMAX_IS_MULTI | infomask::LOCK_MASK) == infomask::XMAX_EXCL_LOCK
    }
}
