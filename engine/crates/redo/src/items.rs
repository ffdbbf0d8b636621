//! Adds, overwrites and removes items of a page, byte for byte as PostgreSQL lays them out: later records count on it
//! (a generic record names byte offsets).
//!
//! Source: `storage/page/bufpage.c`; each function names the one that it follows.

use crate::{
    RedoError,
    page::{
        HEADER_BYTES, HEAP_ITEMS_MAX, INDEX_ITEMS_MAX, ITEM_ID_BYTES, ItemId, PAGE_BYTES, Page, align8, page_flags,
    },
    reader::U16s,
};

const NO_ROOM: RedoError = RedoError::Page("it has no room for the item");
const CORRUPT_ITEM: RedoError = RedoError::Page("a line pointer is corrupt");

impl Page {
    /// Makes room for an item of a heap page at a line pointer that is unused or the next one; returns its place, the
    /// bytes of which are undefined (`PageAddItemExtended` with `PAI_OVERWRITE | PAI_IS_HEAP`).
    pub(crate) fn place_heap_item(&mut self, number: u16, length: usize) -> Result<usize, RedoError> {
        if number > HEAP_ITEMS_MAX {
            return Err(RedoError::Page("it cannot have a line pointer of that number"));
        }
        self.place_unused_item(number, length)
    }

    /// The same for other pages (`PageAddItemExtended` with `PAI_OVERWRITE`).
    pub(crate) fn place_unused_item(&mut self, number: u16, length: usize) -> Result<usize, RedoError> {
        self.check_header()?;
        let next = self.item_count() + 1;
        if number == 0 || number > next {
            return Err(RedoError::Page("it cannot have a line pointer of that number"));
        }
        if number < next {
            let item = self.item_id(number)?;
            if item.is_used() || item.has_storage() {
                return Err(RedoError::Page("the line pointer is in use"));
            }
        }
        self.place_item(number, length, false)
    }

    /// Puts an item into an index page at `number`, in front of the one that is there (`PageAddItemExtended` without
    /// flags and with an offset number).
    pub(crate) fn insert_item(&mut self, number: u16, item: &[u8]) -> Result<(), RedoError> {
        self.check_header()?;
        let next = self.item_count() + 1;
        if number == 0 || number > next {
            return Err(RedoError::Page("it cannot have a line pointer of that number"));
        }
        let place = self.place_item(number, item.len(), number < next)?;
        self.0[place..place + item.len()].copy_from_slice(item);
        Ok(())
    }

    /// Puts an item behind all others.
    pub(crate) fn append_item(&mut self, item: &[u8]) -> Result<(), RedoError> {
        self.insert_item(self.item_count() + 1, item)
    }

    /// Makes room for an item behind all others; returns its place, the bytes of which are undefined.
    pub(crate) fn append_place(&mut self, length: usize) -> Result<usize, RedoError> {
        self.check_header()?;
        self.place_item(self.item_count() + 1, length, false)
    }

    /// The common part; the header is sound and `number` at most one behind the last.
    fn place_item(&mut self, number: u16, length: usize, shift: bool) -> Result<usize, RedoError> {
        let (lower, count) = (self.lower(), self.item_count());
        let lower_after = if shift || number > count { lower + ITEM_ID_BYTES } else { lower };
        let upper = self.upper().checked_sub(align8(length)).ok_or(NO_ROOM)?;
        if lower_after > upper {
            return Err(NO_ROOM);
        }
        if shift {
            let at = HEADER_BYTES + (usize::from(number) - 1) * ITEM_ID_BYTES;
            self.0.copy_within(at..HEADER_BYTES + usize::from(count) * ITEM_ID_BYTES, at + ITEM_ID_BYTES);
        }
        self.set_lower(lower_after);
        self.set_upper(upper);
        self.set_item_id(number, ItemId::normal(upper, length));
        Ok(upper)
    }

    /// Closes the gaps between items, drops unused line pointers at the end, and notes whether there are others
    /// (`PageRepairFragmentation`).
    pub(crate) fn repair_fragmentation(&mut self) -> Result<(), RedoError> {
        self.check_header()?;
        let count = self.item_count();
        let (mut unused, mut last_used) = (0, 0);
        for number in 1..=count {
            let item = self.item_id(number)?;
            if item.is_used() {
                last_used = number;
            } else {
                unused += 1;
                self.set_item_id(number, ItemId::UNUSED);
            }
        }
        self.compact(count)?;
        unused -= count - last_used;
        self.set_lower(self.lower() - usize::from(count - last_used) * ITEM_ID_BYTES);
        self.set_flag(page_flags::HAS_FREE_LINES, unused > 0);
        Ok(())
    }

    /// Moves the items of the first `count` line pointers together at the end, in the order of the line pointers
    /// (`compactify_tuples`).
    fn compact(&mut self, count: u16) -> Result<(), RedoError> {
        let (upper_before, special) = (self.upper(), self.special());
        let from = self.0;
        let mut upper = special;
        for number in 1..=count {
            let item = ItemId(self.u32(HEADER_BYTES + (usize::from(number) - 1) * ITEM_ID_BYTES));
            if !item.has_storage() {
                continue;
            }
            let length = align8(item.length());
            if item.offset() < upper_before || item.offset() + length > PAGE_BYTES {
                return Err(CORRUPT_ITEM);
            }
            upper = upper.checked_sub(length).filter(|upper| *upper >= self.lower()).ok_or(CORRUPT_ITEM)?;
            self.0[upper..upper + length].copy_from_slice(&from[item.offset()..item.offset() + length]);
            self.set_item_id(number, item.with_offset(upper));
        }
        self.set_upper(upper);
        Ok(())
    }

    /// Drops unused line pointers at the end, but not the first one (`PageTruncateLinePointerArray`).
    pub(crate) fn truncate_line_pointers(&mut self) -> Result<(), RedoError> {
        self.check_header()?;
        let mut count = self.item_count();
        while count > 1 && !self.item_id(count)?.is_used() {
            count -= 1;
        }
        let mut has_unused = false;
        for number in 1..=count {
            has_unused |= !self.item_id(number)?.is_used();
        }
        self.set_lower(HEADER_BYTES + usize::from(count) * ITEM_ID_BYTES);
        self.set_flag(page_flags::HAS_FREE_LINES, has_unused);
        Ok(())
    }

    /// Where the item of an index page is; its storage lies among the items.
    fn index_item(&self, number: u16) -> Result<ItemId, RedoError> {
        self.check_header()?;
        let item = self.item_id(number)?;
        let (start, end) = (item.offset(), item.offset() + item.length());
        // The rounded length must fit, too: it is what moves.
        let end_aligned = start + align8(item.length());
        if start < self.upper() || end > self.special() || end_aligned > self.special() || start % 8 != 0 {
            return Err(CORRUPT_ITEM);
        }
        Ok(item)
    }

    /// Moves the items in front of `at` by `distance` towards the end, or, when it is negative, towards the start.
    fn move_items_before(&mut self, at: usize, distance: isize) -> Result<(), RedoError> {
        let upper = self.upper();
        let upper_after = upper.checked_add_signed(distance).ok_or(CORRUPT_ITEM)?;
        if upper > at || upper_after < self.lower() || upper_after + (at - upper) > PAGE_BYTES {
            return Err(CORRUPT_ITEM);
        }
        self.0.copy_within(upper..at, upper_after);
        self.set_upper(upper_after);
        for number in 1..=self.item_count() {
            let item = self.item_id(number)?;
            if item.has_storage() && item.offset() <= at {
                self.set_item_id(number, item.with_offset(item.offset().wrapping_add_signed(distance)));
            }
        }
        Ok(())
    }

    /// Removes an item and its line pointer; the later ones move up (`PageIndexTupleDelete`).
    pub(crate) fn delete_item(&mut self, number: u16) -> Result<(), RedoError> {
        let item = self.index_item(number)?;
        let at = HEADER_BYTES + (usize::from(number) - 1) * ITEM_ID_BYTES;
        let end = HEADER_BYTES + usize::from(self.item_count()) * ITEM_ID_BYTES;
        self.0.copy_within(at + ITEM_ID_BYTES..end, at);
        self.set_lower(self.lower() - ITEM_ID_BYTES);
        self.move_items_before(item.offset(), align8(item.length()) as isize)
    }

    /// Removes an item, but keeps the numbers of the others (`PageIndexTupleDeleteNoCompact`).
    pub(crate) fn delete_item_keeping_numbers(&mut self, number: u16) -> Result<(), RedoError> {
        let item = self.index_item(number)?;
        if number < self.item_count() {
            self.set_item_id(number, ItemId::UNUSED);
        } else {
            self.set_lower(self.lower() - ITEM_ID_BYTES);
        }
        self.move_items_before(item.offset(), align8(item.length()) as isize)
    }

    /// Removes items by their numbers, which ascend (`PageIndexMultiDelete`).
    pub(crate) fn delete_items(&mut self, numbers: U16s<'_>) -> Result<(), RedoError> {
        // With few items PostgreSQL takes them out one by one, which lays the others out in another way.
        if numbers.len() <= 2 {
            return numbers.iter().rev().try_for_each(|number| self.delete_item(number));
        }
        self.check_header()?;
        let count = self.item_count();
        if usize::from(count) > INDEX_ITEMS_MAX {
            return Err(RedoError::Page("it has too many line pointers"));
        }
        let (mut kept, mut next) = (0, 0);
        for number in 1..=count {
            let item = self.index_item(number)?;
            if numbers.get(next) == Some(number) {
                next += 1;
            } else {
                kept += 1;
                self.set_item_id(kept, item);
            }
        }
        if next != numbers.len() {
            return Err(RedoError::Record("it removes items that the page does not have"));
        }
        self.set_lower(HEADER_BYTES + usize::from(kept) * ITEM_ID_BYTES);
        self.compact(kept)
    }

    /// Replaces an item by one of another length in the same place among the others (`PageIndexTupleOverwrite`).
    pub(crate) fn overwrite_item(&mut self, number: u16, item: &[u8]) -> Result<(), RedoError> {
        let old = self.index_item(number)?;
        let (old_length, length) = (align8(old.length()), align8(item.len()));
        if length > old_length + (self.upper() - self.lower()) {
            return Err(NO_ROOM);
        }
        let distance = old_length as isize - length as isize;
        if distance != 0 {
            self.move_items_before(old.offset(), distance)?;
        }
        let offset = old.offset().wrapping_add_signed(distance);
        self.set_item_id(number, old.with_offset(offset).with_length(item.len()));
        self.0.get_mut(offset..offset + item.len()).ok_or(CORRUPT_ITEM)?.copy_from_slice(item);
        Ok(())
    }
}
