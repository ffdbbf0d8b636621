//! Resource manager Generic: bytes of pages of access methods that come as extensions.
//!
//! Source: `generic_redo` (`access/transam/generic_xlog.c`).

use crate::{
    Outcome, RedoError,
    page::{PAGE_BYTES, Page},
    reader::Reader,
    touch::Site,
};

/// `generic_redo`.
pub(crate) fn apply(site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    let mut delta = Reader::new(site.data);
    while !delta.rest().is_empty() {
        let (offset, length) = (usize::from(delta.u16()?), usize::from(delta.u16()?));
        let bytes = delta.take(length)?;
        let place = page.0.get_mut(offset..offset + length);
        place.ok_or(RedoError::Record("it changes bytes outside of the page"))?.copy_from_slice(bytes);
    }
    // What lies between line pointers and items is not logged; PostgreSQL keeps it zero.
    let (lower, upper) = (page.lower(), page.upper());
    if lower > upper || upper > PAGE_BYTES {
        return Err(RedoError::Page("its header's places contradict each other"));
    }
    page.0[lower..upper].fill(0);
    Ok(Outcome::Changed)
}
