//! The quick way of the most frequent request: one page, of which everything is in memory, is answered where the request is
//! read, without a task of its own and with a single copy.
//!
//! Whatever needs more than that is left to the long way, which also words every failure. Read next: `answer.rs`.

use layers::KeyKind;
use redo::{PAGE_BYTES, Page};
use shard::{Presence, rebuild_page};
use wire::page::{GetPages, PageMessage, Pages, encode};

use crate::{
    owner::Owner,
    server::{Session, check_term},
};

/// Bytes in front of a page in its answer: a frame's header and the fixed fields, rounded up.
const HEAD_BYTES: usize = 64;

/// Where pages are made, one after the other.
pub struct FromMemory {
    page: Box<Page>,
}

impl FromMemory {
    /// With a buffer for a page.
    pub fn new() -> FromMemory {
        FromMemory { page: Box::new(Page::ZERO) }
    }

    /// Answers the request; `None`: nothing was done, and it is for the long way.
    pub fn answer(&mut self, owner: &Owner, session: &Session, get: &GetPages) -> Option<()> {
        let begun = driver::now();
        if get.count != 1 || get.not_modified_since > owner.ingested() || check_term(owner, session.role).is_err() {
            return None;
        }
        let lsn = get.request_lsn.min(owner.ingested());
        let key = owner.striping.block(get.relation, get.fork, get.first_block);
        let KeyKind::Block { block, .. } = key.kind().ok()? else { return None };
        let stripe = owner.stripe_in_memory(key, lsn).filter(|stripe| stripe.has_block(owner.striping, block))?;
        let found = owner.find_in_memory(key, lsn, stripe.floor)?;
        let presence = rebuild_page(key, found.values(), &mut self.page).ok()?;
        if presence == Presence::Present && owner.checksums {
            pgformat::set_page_checksum(&mut self.page.0, block);
        }
        let mut frame = Vec::with_capacity(HEAD_BYTES + PAGE_BYTES);
        encode(&PageMessage::Pages(Pages::new(get.id, lsn, &self.page.0)), &mut frame).ok()?;
        frame.extend_from_slice(&self.page.0);
        session.outbox.push_encoded(frame, Vec::new());
        owner.count_page(&found);
        owner.process.metrics.pages.inc();
        owner.process.metrics.read_seconds.observe(driver::now().since(begun).as_secs_f64());
        Some(())
    }
}
