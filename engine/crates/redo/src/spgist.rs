//! Resource manager SPGist.
//!
//! Source: `access/spgxlog.h`, `access/spgist_private.h`, `spg_redo` (`access/spgist/spgxlog.c`).

use wal::Record;

use crate::{
    Outcome, RedoError, index_tuple,
    page::{INDEX_ITEMS_MAX, Page},
    reader::{Reader, U16s},
    touch::Site,
};

/// Kinds of records: `xl_info & 0xF0`.
mod kind {
    pub const ADD_LEAF: u8 = 0x10;
    pub const MOVE_LEAFS: u8 = 0x20;
    pub const ADD_NODE: u8 = 0x30;
    pub const SPLIT_TUPLE: u8 = 0x40;
    pub const PICK_SPLIT: u8 = 0x50;
    pub const VACUUM_LEAF: u8 = 0x60;
    pub const VACUUM_ROOT: u8 = 0x70;
    pub const VACUUM_REDIRECT: u8 = 0x80;
}

/// Flags of a page.
mod flags {
    pub const LEAF: u16 = 1 << 2;
    pub const NULLS: u16 = 1 << 3;
}

/// What an entry is (`tupstate`, the lowest two bits).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Redirect = 1,
    Dead = 2,
    Placeholder = 3,
}

const OPAQUE_BYTES: usize = 8;
const PAGE_ID: u16 = 0xFF82;
/// Bytes of an entry that is none (`SGDTSIZE`).
const DEAD_BYTES: usize = 16;
/// Bytes in front of the prefix of an inner entry (`SGITHDRSZ`).
const INNER_HEADER_BYTES: usize = 8;
/// An address that leads nowhere.
const NOWHERE: (u32, u16) = (u32::MAX, 0);
/// No line pointer.
const NO_NUMBER: u16 = 0;

const BROKEN: RedoError = RedoError::Page("an entry is broken");
const BROKEN_RECORD: RedoError = RedoError::Record("an entry is broken");
const NO_SUCH_BLOCK: RedoError = RedoError::Record("it has a block that its kind does not have");

/// The access method's part of a page (`SpGistPageOpaqueData`).
#[derive(Clone, Copy)]
struct Opaque(usize);

impl Opaque {
    fn of(page: &Page) -> Result<Opaque, RedoError> {
        page.special_of(OPAQUE_BYTES).map(Opaque)
    }

    /// Counts an entry that became one of this kind, or, below zero, is one no longer.
    fn count(self, page: &mut Page, state: State, change: i16) {
        let at = match state {
            State::Redirect => self.0 + 2,
            State::Placeholder => self.0 + 4,
            State::Dead => return,
        };
        let count = page.u16(at);
        page.set_u16(at, count.wrapping_add_signed(change));
    }
}

/// `spgxlogState`.
#[derive(Clone, Copy)]
struct Build {
    redirect_xid: u32,
    is_build: bool,
}

impl Build {
    fn read(main: &mut Reader<'_>) -> Result<Build, RedoError> {
        let build = Build { redirect_xid: main.u32()?, is_build: main.u8()? != 0 };
        main.skip(3)?;
        Ok(build)
    }

    /// What an entry becomes that went elsewhere: nothing follows it during a build.
    fn moved(self) -> State {
        if self.is_build { State::Placeholder } else { State::Redirect }
    }
}

/// `spg_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let main = Reader::new(record.main_data());
    match (record.info.info & 0xF0, site.id) {
        (kind::ADD_LEAF, _) => add_leaf(record, main, site.id, page)?,
        (kind::MOVE_LEAFS, _) => move_leafs(record, main, site.id, page)?,
        (kind::ADD_NODE, _) => add_node(record, main, site.id, page)?,
        (kind::SPLIT_TUPLE, _) => split_tuple(main, site.id, page)?,
        (kind::PICK_SPLIT, _) => pick_split(record, main, site.id, page)?,
        (kind::VACUUM_LEAF, 0) => vacuum_leaf(main, page)?,
        (kind::VACUUM_ROOT, 0) => vacuum_root(main, page)?,
        (kind::VACUUM_REDIRECT, 0) => vacuum_redirect(main, page)?,
        _ => return Err(NO_SUCH_BLOCK),
    }
    Ok(Outcome::Changed)
}

fn block_of(record: &Record, id: u8) -> Result<u32, RedoError> {
    let block = record.blocks.iter().find(|block| block.id == id);
    block.map(|block| block.block).ok_or(RedoError::Record("it lacks a block that its kind has"))
}

/// `SpGistInitPage`.
fn init(page: &mut Page, flags: u16) {
    page.init(OPAQUE_BYTES);
    let special = page.special();
    page.set_u16(special, flags);
    page.set_u16(special + 6, PAGE_ID);
}

/// Makes a page of leaves anew.
fn init_leaves(page: &mut Page, stores_nulls: bool) {
    init(page, flags::LEAF | if stores_nulls { flags::NULLS } else { 0 });
}

/// Takes a leaf entry off the front.
fn take_leaf<'a>(data: &mut Reader<'a>) -> Result<&'a [u8], RedoError> {
    let mut header = *data;
    data.take((header.u32()? >> 2) as usize)
}

/// Takes an inner entry off the front.
fn take_inner<'a>(data: &mut Reader<'a>) -> Result<&'a [u8], RedoError> {
    let mut header = *data;
    header.skip(4)?;
    let size = usize::from(header.u16()?);
    data.take(size)
}

/// The state of an entry.
fn state(entry: &[u8]) -> Option<u8> {
    Some(entry.first()? & 3)
}

/// Puts an entry in place of a placeholder or behind the others (`addOrReplaceTuple`).
fn add_or_replace(page: &mut Page, number: u16, entry: &[u8]) -> Result<(), RedoError> {
    let opaque = Opaque::of(page)?;
    if number <= page.item_count() {
        if state(page.item(number)?) != Some(State::Placeholder as u8) {
            return Err(RedoError::Page("the entry to be replaced is not a placeholder"));
        }
        opaque.count(page, State::Placeholder, -1);
        page.delete_item(number)?;
    }
    page.insert_item(number, entry)
}

/// Replaces an entry, whatever it was.
fn replace(page: &mut Page, number: u16, entry: &[u8]) -> Result<(), RedoError> {
    Opaque::of(page)?;
    page.delete_item(number)?;
    page.insert_item(number, entry)
}

/// An entry that is none (`spgFormDeadTuple`).
fn dead_entry(state: State, to: (u32, u16), redirect_xid: u32) -> [u8; DEAD_BYTES] {
    let mut entry = [0; DEAD_BYTES];
    entry[..4].copy_from_slice(&(state as u32 | (DEAD_BYTES as u32) << 2).to_le_bytes());
    let ((block, number), xid) = if state == State::Redirect { (to, redirect_xid) } else { (NOWHERE, 0) };
    index_tuple::set_block(&mut entry[6..12], block);
    index_tuple::set_offset(&mut entry[6..12], number);
    entry[12..].copy_from_slice(&xid.to_le_bytes());
    entry
}

/// Turns entries into ones that are none, the first of the record into one of another kind than the rest
/// (`spgPageIndexMultiDelete`).
fn kill(
    page: &mut Page,
    numbers: U16s<'_>,
    first: State,
    rest: State,
    to: (u32, u16),
    redirect_xid: u32,
) -> Result<(), RedoError> {
    let Some(first_number) = numbers.get(0) else { return Ok(()) };
    let opaque = Opaque::of(page)?;
    let mut sorted = [0; INDEX_ITEMS_MAX];
    let sorted = sorted.get_mut(..numbers.len()).ok_or(RedoError::Record("it has more entries than a page"))?;
    sorted.iter_mut().zip(numbers.iter()).for_each(|(place, number)| *place = number);
    sorted.sort_unstable();
    let mut bytes = [0; 2 * INDEX_ITEMS_MAX];
    for (place, number) in bytes.chunks_exact_mut(2).zip(sorted.iter()) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    page.delete_items(U16s::new(&bytes[..2 * sorted.len()]))?;
    for number in sorted.iter().copied() {
        let state = if number == first_number { first } else { rest };
        page.insert_item(number, &dead_entry(state, to, redirect_xid))?;
        opaque.count(page, state, 1);
    }
    Ok(())
}

/// Makes a node of an inner entry lead elsewhere (`spgUpdateNodeLink`).
fn update_link(page: &mut Page, number: u16, node: u16, to: (u32, u16)) -> Result<(), RedoError> {
    Opaque::of(page)?;
    let range = page.item_range(number)?;
    let entry = &mut page.0[range];
    let header = entry.get(..4).ok_or(BROKEN)?;
    let bits = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let (nodes, prefix) = ((bits >> 3 & 0x1FFF) as u16, (bits >> 16) as usize);
    if node >= nodes {
        return Err(RedoError::Page("an entry has no node of that number"));
    }
    let mut at = INNER_HEADER_BYTES + prefix;
    for _ in 0..node {
        at += entry.get(at..).and_then(index_tuple::size).ok_or(BROKEN)?;
    }
    let link = entry.get_mut(at..at + index_tuple::INDEX_TUPLE_BYTES).ok_or(BROKEN)?;
    index_tuple::set_block(link, to.0);
    index_tuple::set_offset(link, to.1);
    Ok(())
}

/// Sets the next entry of a chain of leaves (`SGLT_SET_NEXTOFFSET`).
fn set_next(page: &mut Page, number: u16, next: u16) -> Result<(), RedoError> {
    let range = page.item_range(number)?;
    let info = page.0[range].get_mut(4..6).ok_or(BROKEN)?;
    let value = u16::from_le_bytes([info[0], info[1]]) & 0xC000 | next & 0x3FFF;
    info.copy_from_slice(&value.to_le_bytes());
    Ok(())
}

/// `spgRedoAddLeaf`: blocks are the leaf's page and its parent's.
fn add_leaf(record: &Record, mut main: Reader<'_>, id: u8, page: &mut Page) -> Result<(), RedoError> {
    let (new_page, stores_nulls) = (main.u8()? != 0, main.u8()? != 0);
    let (number, head, parent, node) = (main.u16()?, main.u16()?, main.u16()?, main.u16()?);
    let entry = take_leaf(&mut main)?;
    match id {
        0 => {
            if new_page {
                init_leaves(page, stores_nulls);
            }
            if number == head {
                replace(page, number, entry)?;
            } else {
                add_or_replace(page, number, entry)?;
                if head != NO_NUMBER {
                    set_next(page, head, number)?;
                }
            }
            Ok(())
        }
        1 => update_link(page, parent, node, (block_of(record, 0)?, number)),
        _ => Err(NO_SUCH_BLOCK),
    }
}

/// `spgRedoMoveLeafs`: blocks are where leaves come from, where they go, and their parent's.
fn move_leafs(record: &Record, mut main: Reader<'_>, id: u8, page: &mut Page) -> Result<(), RedoError> {
    let moves = usize::from(main.u16()?);
    let (new_page, replace_dead, stores_nulls, _padding) =
        (main.u8()? != 0, main.u8()? != 0, main.u8()? != 0, main.u8()?);
    let (parent, node, _padding) = (main.u16()?, main.u16()?, main.u16()?);
    let build = Build::read(&mut main)?;
    let deleted = main.u16s(moves)?;
    let inserted = main.u16s(if replace_dead { 1 } else { moves + 1 })?;
    let to = (block_of(record, 1)?, inserted.get(inserted.len() - 1).ok_or(BROKEN_RECORD)?);
    match id {
        0 => kill(page, deleted, build.moved(), State::Placeholder, to, build.redirect_xid),
        1 => {
            if new_page {
                init_leaves(page, stores_nulls);
            }
            inserted.iter().try_for_each(|number| add_or_replace(page, number, take_leaf(&mut main)?))
        }
        2 => update_link(page, parent, node, to),
        _ => Err(NO_SUCH_BLOCK),
    }
}

/// `spgRedoAddNode`: blocks are the inner entry's, the one that it moves to if it does not fit, and the parent's, if that is
/// neither.
fn add_node(record: &Record, mut main: Reader<'_>, id: u8, page: &mut Page) -> Result<(), RedoError> {
    let (number, new_number) = (main.u16()?, main.u16()?);
    let (new_page, parent_block) = (main.u8()? != 0, main.u8()?);
    let (parent, node, _padding) = (main.u16()?, main.u16()?, main.u16()?);
    let build = Build::read(&mut main)?;
    let entry = take_inner(&mut main)?;
    let Ok(new_block) = block_of(record, 1) else {
        return if id == 0 { replace(page, number, entry) } else { Err(NO_SUCH_BLOCK) };
    };
    let to = (new_block, new_number);
    match id {
        0 => {
            let state = build.moved();
            replace(page, number, &dead_entry(state, to, build.redirect_xid))?;
            Opaque::of(page)?.count(page, state, 1);
        }
        1 => {
            if new_page {
                init(page, 0);
            }
            add_or_replace(page, new_number, entry)?;
        }
        2 => {}
        _ => return Err(NO_SUCH_BLOCK),
    }
    if parent_block == id { update_link(page, parent, node, to) } else { Ok(()) }
}

/// `spgRedoSplitTuple`: blocks are the prefix's and, if it is another, the rest's.
fn split_tuple(mut main: Reader<'_>, id: u8, page: &mut Page) -> Result<(), RedoError> {
    let (prefix_number, postfix_number) = (main.u16()?, main.u16()?);
    let (new_page, same_block) = (main.u8()? != 0, main.u8()? != 0);
    let (prefix, postfix) = (take_inner(&mut main)?, take_inner(&mut main)?);
    match id {
        0 => {
            replace(page, prefix_number, prefix)?;
            if same_block { add_or_replace(page, postfix_number, postfix) } else { Ok(()) }
        }
        1 => {
            if new_page {
                init(page, 0);
            }
            add_or_replace(page, postfix_number, postfix)
        }
        _ => Err(NO_SUCH_BLOCK),
    }
}

/// `spgRedoPickSplit`: blocks are the page of leaves that is split, the one that some of them go to, that of the new inner
/// entry, and its parent's.
fn pick_split(record: &Record, mut main: Reader<'_>, id: u8, page: &mut Page) -> Result<(), RedoError> {
    main.skip(2)?;
    let (deleted, inserted) = (usize::from(main.u16()?), usize::from(main.u16()?));
    let (init_source, init_destination) = (main.u8()? != 0, main.u8()? != 0);
    let inner = main.u16()?;
    let (init_inner, stores_nulls, inner_is_parent) = (main.u8()? != 0, main.u8()? != 0, main.u8()? != 0);
    main.skip(1)?;
    let (parent, node, _padding) = (main.u16()?, main.u16()?, main.u16()?);
    let build = Build::read(&mut main)?;
    let deleted = main.u16s(deleted)?;
    let inserted = main.u16s(inserted)?;
    let pages = main.take(inserted.len())?;
    let inner_entry = take_inner(&mut main)?;
    let to = (block_of(record, 2)?, inner);
    match id {
        0 | 1 => {
            match (id, init_source, init_destination) {
                (0, true, _) | (1, _, true) => init_leaves(page, stores_nulls),
                (0, ..) => kill(page, deleted, build.moved(), State::Placeholder, to, build.redirect_xid)?,
                _ => {}
            }
            for (number, on_destination) in inserted.iter().zip(pages) {
                let entry = take_leaf(&mut main)?;
                if (*on_destination != 0) == (id == 1) {
                    add_or_replace(page, number, entry)?;
                }
            }
            Ok(())
        }
        2 => {
            if init_inner {
                init(page, if stores_nulls { flags::NULLS } else { 0 });
            }
            add_or_replace(page, inner, inner_entry)?;
            if inner_is_parent { update_link(page, parent, node, to) } else { Ok(()) }
        }
        3 => update_link(page, parent, node, to),
        _ => Err(NO_SUCH_BLOCK),
    }
}

/// `spgRedoVacuumLeaf`.
fn vacuum_leaf(mut main: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    let (dead, placeholders) = (usize::from(main.u16()?), usize::from(main.u16()?));
    let (moves, chains) = (usize::from(main.u16()?), usize::from(main.u16()?));
    Build::read(&mut main)?;
    let (dead, placeholders) = (main.u16s(dead)?, main.u16s(placeholders)?);
    let (move_from, move_to) = (main.u16s(moves)?, main.u16s(moves)?);
    let (chain_from, chain_to) = (main.u16s(chains)?, main.u16s(chains)?);
    Opaque::of(page)?;
    kill(page, dead, State::Dead, State::Dead, NOWHERE, 0)?;
    kill(page, placeholders, State::Placeholder, State::Placeholder, NOWHERE, 0)?;
    for (from, to) in move_from.iter().zip(move_to.iter()) {
        let (from_item, to_item) = (page.item_id(from)?, page.item_id(to)?);
        page.set_item_id(from, to_item);
        page.set_item_id(to, from_item);
    }
    kill(page, move_from, State::Placeholder, State::Placeholder, NOWHERE, 0)?;
    for (from, to) in chain_from.iter().zip(chain_to.iter()) {
        set_next(page, from, to)?;
    }
    Ok(())
}

/// `spgRedoVacuumRoot`.
fn vacuum_root(mut main: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    let count = usize::from(main.u16()?);
    main.skip(2)?;
    Build::read(&mut main)?;
    Opaque::of(page)?;
    page.delete_items(main.u16s(count)?)
}

/// `spgRedoVacuumRedirect`: entries that nobody follows any more become placeholders, and those at the end go.
fn vacuum_redirect(mut main: Reader<'_>, page: &mut Page) -> Result<(), RedoError> {
    let (count, first) = (main.u16()?, main.u16()?);
    // The xid that conflicts, whether it is a catalog, and padding.
    main.skip(6)?;
    let opaque = Opaque::of(page)?;
    for number in main.u16s(usize::from(count))?.iter() {
        let range = page.item_range(number)?;
        let entry = page.0[range].get_mut(..DEAD_BYTES).ok_or(BROKEN)?;
        entry[0] |= State::Placeholder as u8;
        index_tuple::set_block(&mut entry[6..12], NOWHERE.0);
        index_tuple::set_offset(&mut entry[6..12], NOWHERE.1);
        opaque.count(page, State::Redirect, -1);
        opaque.count(page, State::Placeholder, 1);
    }
    if first == NO_NUMBER {
        return Ok(());
    }
    let mut bytes = [0; 2 * INDEX_ITEMS_MAX];
    let mut removed = 0;
    for (place, number) in bytes.chunks_exact_mut(2).zip(first..=page.item_count()) {
        place.copy_from_slice(&number.to_le_bytes());
        opaque.count(page, State::Placeholder, -1);
        removed += 1;
    }
    page.delete_items(U16s::new(&bytes[..2 * removed]))
}
