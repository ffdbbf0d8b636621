//! Resource manager Sequence: each record is the whole page.
//!
//! Source: `seq_redo` (`commands/sequence.c`).

use wal::Record;

use crate::{Outcome, RedoError, page::Page, reader::Reader, touch::Site};

const SEQ_LOG: u8 = 0x00;
/// What the page's special part begins with (`SEQ_MAGIC`).
const MAGIC: u32 = 0x1717;
/// Bytes of the relation's name in front of the row (`xl_seq_rec`).
const LOCATOR_BYTES: usize = 12;

/// `seq_redo`.
pub(crate) fn apply(record: &Record, site: Site<'_>, page: &mut Page) -> Result<Outcome, RedoError> {
    if record.info.info & 0xF0 != SEQ_LOG || site.id != 0 {
        return Err(RedoError::Record("it has a block that its kind does not have"));
    }
    let mut main = Reader::new(record.main_data());
    main.skip(LOCATOR_BYTES)?;
    page.init(4);
    page.set_u32(page.special(), MAGIC);
    page.append_item(main.rest())?;
    Ok(Outcome::Changed)
}
