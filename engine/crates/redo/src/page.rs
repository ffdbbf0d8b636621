//! A page of a relation: its header, line pointers and items.
//!
//! Knows nothing about what the items are. Every access is checked, so that neither a broken page nor a broken record
//! can do more than fail. Sources: `storage/bufpage.h`, `storage/itemid.h`. Read next: `items.rs`.

use pgtypes::Lsn;

use crate::RedoError;

/// Bytes of a page (`BLCKSZ`).
pub const PAGE_BYTES: usize = 8192;
/// Bytes of a page header (`SizeOfPageHeaderData`), a multiple of 8.
pub(crate) const HEADER_BYTES: usize = 24;
/// Bytes of a line pointer (`ItemIdData`).
pub(crate) const ITEM_ID_BYTES: usize = 4;
/// Most line pointers of a heap page (`MaxHeapTuplesPerPage`).
pub(crate) const HEAP_ITEMS_MAX: u16 = 291;
/// Most line pointers of an index page (`MaxIndexTuplesPerPage`).
pub(crate) const INDEX_ITEMS_MAX: usize = 408;

/// Flags of a page (`pd_flags`).
pub(crate) mod page_flags {
    pub const HAS_FREE_LINES: u16 = 0x0001;
    pub const PAGE_FULL: u16 = 0x0002;
    pub const ALL_VISIBLE: u16 = 0x0004;
}

const FLAGS: usize = 10;
const LOWER: usize = 12;
const UPPER: usize = 14;
const SPECIAL: usize = 16;
const SIZE_AND_VERSION: usize = 18;
const PRUNE_XID: usize = 20;
/// Page size and layout version 4 (`PD_SIZE_VERSION`).
const SIZE_AND_VERSION_VALUE: u16 = 8192 | 4;

/// `length` rounded up to a multiple of 8 (`MAXALIGN`).
pub(crate) const fn align8(length: usize) -> usize {
    (length + 7) & !7
}

/// What a line pointer says about its item (`lp_flags`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ItemState {
    Unused,
    Normal,
    Redirect,
    Dead,
}

/// A line pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ItemId(pub u32);

impl ItemId {
    pub const UNUSED: ItemId = ItemId(0);
    pub const DEAD: ItemId = ItemId(3 << 15);

    pub const fn normal(offset: usize, length: usize) -> ItemId {
        ItemId((offset as u32 & 0x7FFF) | 1 << 15 | (length as u32 & 0x7FFF) << 17)
    }

    pub const fn redirect(to: u16) -> ItemId {
        ItemId((to as u32 & 0x7FFF) | 2 << 15)
    }

    pub const fn offset(self) -> usize {
        (self.0 & 0x7FFF) as usize
    }

    pub const fn length(self) -> usize {
        (self.0 >> 17) as usize
    }

    pub const fn state(self) -> ItemState {
        match self.0 >> 15 & 3 {
            0 => ItemState::Unused,
            1 => ItemState::Normal,
            2 => ItemState::Redirect,
            _ => ItemState::Dead,
        }
    }

    pub const fn is_used(self) -> bool {
        self.0 >> 15 & 3 != 0
    }

    pub const fn has_storage(self) -> bool {
        self.length() != 0
    }

    pub const fn without_flags(self) -> ItemId {
        ItemId(self.0 & !(3 << 15))
    }

    pub const fn with_offset(self, offset: usize) -> ItemId {
        ItemId(self.0 & !0x7FFF | (offset as u32 & 0x7FFF))
    }

    pub const fn with_length(self, length: usize) -> ItemId {
        ItemId(self.0 & 0x1_FFFF | (length as u32 & 0x7FFF) << 17)
    }
}

/// The bytes of a page, on which records are replayed.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Page(pub [u8; PAGE_BYTES]);

impl core::fmt::Debug for Page {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "Page(lsn {}, lower {}, upper {}, special {})",
            self.lsn(),
            self.lower(),
            self.upper(),
            self.special()
        )
    }
}

impl Default for Page {
    fn default() -> Page {
        Page::ZERO
    }
}

impl Page {
    /// A page that was never written (`PageIsNew`).
    pub const ZERO: Page = Page([0; PAGE_BYTES]);

    /// End of the last record in the page (`pd_lsn`); 0 on a new page.
    pub fn lsn(&self) -> Lsn {
        Lsn(u64::from(self.u32(0)) << 32 | u64::from(self.u32(4)))
    }

    /// Sets `pd_lsn`.
    pub fn set_lsn(&mut self, lsn: Lsn) {
        self.set_u32(0, (lsn.0 >> 32) as u32);
        self.set_u32(4, lsn.0 as u32);
    }

    /// Whether nothing was ever put here (`PageIsNew`).
    pub fn is_new(&self) -> bool {
        self.u16(UPPER) == 0
    }

    /// An empty page whose last `special_bytes` (rounded up to 8) are the access method's (`PageInit`).
    pub(crate) fn init(&mut self, special_bytes: usize) {
        let special = (PAGE_BYTES - align8(special_bytes)) as u16;
        self.0.fill(0);
        self.set_u16(LOWER, HEADER_BYTES as u16);
        self.set_u16(UPPER, special);
        self.set_u16(SPECIAL, special);
        self.set_u16(SIZE_AND_VERSION, SIZE_AND_VERSION_VALUE);
    }

    /// The number at a place that is known to lie in the page.
    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    pub(crate) fn set_u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn set_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn set_u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn lower(&self) -> usize {
        usize::from(self.u16(LOWER))
    }

    pub(crate) fn upper(&self) -> usize {
        usize::from(self.u16(UPPER))
    }

    pub(crate) fn special(&self) -> usize {
        usize::from(self.u16(SPECIAL))
    }

    pub(crate) fn set_lower(&mut self, lower: usize) {
        self.set_u16(LOWER, lower as u16);
    }

    pub(crate) fn set_upper(&mut self, upper: usize) {
        self.set_u16(UPPER, upper as u16);
    }

    pub(crate) fn flags(&self) -> u16 {
        self.u16(FLAGS)
    }

    pub(crate) fn set_flag(&mut self, flag: u16, on: bool) {
        let flags = self.flags();
        self.set_u16(FLAGS, if on { flags | flag } else { flags & !flag });
    }

    pub(crate) fn prune_xid(&self) -> u32 {
        self.u32(PRUNE_XID)
    }

    pub(crate) fn set_prune_xid(&mut self, xid: u32) {
        self.set_u32(PRUNE_XID, xid);
    }

    /// # Errors
    /// When the header's places contradict each other; then no line pointer may be believed.
    pub(crate) fn check_header(&self) -> Result<(), RedoError> {
        let sound = HEADER_BYTES <= self.lower()
            && self.lower() <= self.upper()
            && self.upper() <= self.special()
            && self.special() <= PAGE_BYTES
            && self.special().is_multiple_of(8);
        if sound { Ok(()) } else { Err(RedoError::Page("its header's places contradict each other")) }
    }

    /// Start of the access method's part.
    ///
    /// # Errors
    /// When it has not exactly `bytes` (a multiple of 8).
    pub(crate) fn special_of(&self, bytes: usize) -> Result<usize, RedoError> {
        self.check_header()?;
        if self.special() + bytes == PAGE_BYTES {
            Ok(self.special())
        } else {
            Err(RedoError::Page("it is not of this access method"))
        }
    }

    /// Number of line pointers (`PageGetMaxOffsetNumber`); they are numbered from 1.
    pub(crate) fn item_count(&self) -> u16 {
        (self.lower().clamp(HEADER_BYTES, PAGE_BYTES) - HEADER_BYTES) as u16 / ITEM_ID_BYTES as u16
    }

    /// The line pointer `number`.
    ///
    /// # Errors
    /// When there is none of that number.
    pub(crate) fn item_id(&self, number: u16) -> Result<ItemId, RedoError> {
        if (1..=self.item_count()).contains(&number) {
            Ok(ItemId(self.u32(item_id_place(number))))
        } else {
            Err(RedoError::Page("it has no line pointer of that number"))
        }
    }

    /// Sets the line pointer `number`, which exists.
    pub(crate) fn set_item_id(&mut self, number: u16, item: ItemId) {
        self.set_u32(item_id_place(number), item.0);
    }

    /// Where the item `number` is.
    ///
    /// # Errors
    /// When the line pointer does not lead to one, or to a place outside of the page's items.
    pub(crate) fn item_range(&self, number: u16) -> Result<core::ops::Range<usize>, RedoError> {
        let item = self.item_id(number)?;
        let range = item.offset()..item.offset() + item.length();
        if !item.has_storage() || range.start < HEADER_BYTES || range.end > PAGE_BYTES {
            return Err(RedoError::Page("a line pointer leads nowhere"));
        }
        Ok(range)
    }

    /// # Errors
    /// As [`Page::item_range`].
    pub(crate) fn item(&self, number: u16) -> Result<&[u8], RedoError> {
        Ok(&self.0[self.item_range(number)?])
    }
}

fn item_id_place(number: u16) -> usize {
    HEADER_BYTES + (usize::from(number) - 1) * ITEM_ID_BYTES
}
