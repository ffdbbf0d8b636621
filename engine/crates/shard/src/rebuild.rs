//! A page, or another value, of the values of its key.

use alloc::{boxed::Box, string::String, vec::Vec};

use layers::{Key, KeyKind, ValueKind};
use metadata::{SLRU_PAGE_BYTES, apply_slru};
use pgtypes::Lsn;
use redo::{BlockTag, Context, PAGE_BYTES, Page, apply, blocks_of};
use wal::{Record, STORED_HEADER_BYTES};

use crate::{
    error::{PoisonCause, RebuildError},
    metadata_state::metadata_slru,
};

/// Every cluster has data checksums, or runs with `wal_log_hints = on`: import refuses others.
const CONTEXT: Context = Context { hint_bits_logged: true };

/// What stands in the two bytes of a stored record that are otherwise zero.
const POISON_MARK: [u8; 2] = [0xFF; 2];

/// What the values of a key come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rebuilt {
    /// Of a block of a relation or an SLRU. Its checksum is not set.
    Page(Box<Page>),
    /// Of another key.
    Bytes(Vec<u8>),
    /// There is nothing: a block within the fork's length is all zeros.
    Absent,
}

/// Whether there is a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    /// It was written into the buffer.
    Present,
    /// Nothing was ever written, or the last value says that it is gone. The buffer is all zeros.
    Absent,
}

/// What the values of `key` come to: `chain` has them from the oldest to the newest, above the floor and up to the position
/// that is read. It may begin before the last value that starts the page.
///
/// # Errors
/// The page is poisoned: [`RebuildError`] says by what.
pub fn rebuild<'a>(
    key: Key,
    chain: impl IntoIterator<Item = (Lsn, ValueKind, &'a [u8])>,
) -> Result<Rebuilt, RebuildError> {
    if let Ok(KeyKind::Block { .. } | KeyKind::Slru(..)) = key.kind() {
        let mut page = Box::new(Page::ZERO);
        return Ok(match rebuild_page(key, chain, &mut page)? {
            Presence::Present => Rebuilt::Page(page),
            Presence::Absent => Rebuilt::Absent,
        });
    }
    let Some((lsn, kind, value)) = chain.into_iter().last() else { return Ok(Rebuilt::Absent) };
    match kind {
        ValueKind::Image => Ok(Rebuilt::Bytes(Vec::from(value))),
        ValueKind::Absent => Ok(Rebuilt::Absent),
        ValueKind::Record | ValueKind::InitRecord => {
            Err(RebuildError { key, lsn, cause: PoisonCause::UnexpectedRecord })
        }
    }
}

/// [`rebuild`] of a block or an SLRU page into a buffer, whatever was in it.
///
/// # Errors
/// As [`rebuild`]; or `key` is of another kind. What is in `page` is then of no use.
pub fn rebuild_page<'a>(
    key: Key,
    chain: impl IntoIterator<Item = (Lsn, ValueKind, &'a [u8])>,
    page: &mut Page,
) -> Result<Presence, RebuildError> {
    page.0.fill(0);
    let mut presence = Ok(Presence::Absent);
    for (lsn, kind, value) in chain {
        let error = |cause| RebuildError { key, lsn, cause };
        presence = match kind {
            ValueKind::Absent => {
                page.0.fill(0);
                Ok(Presence::Absent)
            }
            ValueKind::Image => match <&[u8; PAGE_BYTES]>::try_from(value) {
                Ok(image) => {
                    page.0 = *image;
                    Ok(Presence::Present)
                }
                Err(_) => Err(error(PoisonCause::ImageLength(value.len()))),
            },
            // Only a value that starts the page heals it.
            ValueKind::Record if presence.is_err() => presence,
            ValueKind::Record => replay(key, lsn, value, page).map_err(error),
            ValueKind::InitRecord => {
                page.0.fill(0);
                replay(key, lsn, value, page).map_err(error)
            }
        };
    }
    presence
}

fn replay(key: Key, lsn: Lsn, value: &[u8], page: &mut Page) -> Result<Presence, PoisonCause> {
    if value.get(STORED_HEADER_BYTES - 2..STORED_HEADER_BYTES) == Some(&POISON_MARK) {
        let cause = String::from_utf8_lossy(&value[STORED_HEADER_BYTES..]);
        return Err(PoisonCause::Poisoned(cause.into_owned()));
    }
    // Where a record starts matters for checkpoints only, which are no pages.
    let record = Record::from_stored(Lsn::INVALID, lsn, value)?;
    match key.kind() {
        Ok(KeyKind::Block { relation, fork, block }) => {
            let tag = BlockTag { relation, fork, block };
            let mut touches = 0;
            for touch in blocks_of(&record).filter(|touch| touch.tag == tag) {
                apply(&record, &touch, page, &CONTEXT)?;
                touches += 1;
            }
            if touches == 0 { Err(PoisonCause::NotTouched) } else { Ok(Presence::Present) }
        }
        Ok(KeyKind::Slru(slru, number)) => {
            const { assert!(PAGE_BYTES == SLRU_PAGE_BYTES) };
            apply_slru(&record, metadata_slru(slru), number, &mut page.0)?;
            Ok(Presence::Present)
        }
        _ => Err(PoisonCause::Key),
    }
}

/// A value of kind `Record` that no page can be made of: what is put for a block whose contents are not known.
/// [`RebuildError`] repeats `cause`. A record that makes the page anew heals it.
pub fn poison(cause: &str) -> Vec<u8> {
    let mut value = Vec::with_capacity(STORED_HEADER_BYTES + cause.len());
    value.extend_from_slice(&[0; STORED_HEADER_BYTES - 2]);
    value.extend_from_slice(&POISON_MARK);
    value.extend_from_slice(cause.as_bytes());
    value
}
