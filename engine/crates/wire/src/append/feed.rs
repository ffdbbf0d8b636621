//! What a page server is sent and answers: batches of a shard's records, cut into frames.
//!
//! A batch is a head and a string of items, of which each frame carries a piece: an item may be longer than a frame, and a
//! piece may end anywhere.

use alloc::vec::Vec;

use filter::{Batch, Item};
use pgtypes::{FrameSummary, Lsn, Term};
use wal::{RECORD_BYTES_MAX, STORED_HEADER_BYTES};

use super::{
    MAX_APPEND_BYTES, Message, WireError,
    consensus_codec::{put_lsn, put_summary, take_lsn, take_summary},
    encode_to_vec,
    message::check_wal_length,
};
use crate::bytes::{Put, Taker};

/// Bytes of an item in front of its record: `lsn start, lsn end, u32 length`.
const ITEM_HEADER_BYTES: usize = 20;

/// Longest record of an item: as long as PostgreSQL's longest.
pub const ITEM_BYTES_MAX: u32 = RECORD_BYTES_MAX;

/// Most bytes of all items of a batch: a full one, and a last item of any length.
const BATCH_BYTES_MAX: u64 = filter::BATCH_BYTES as u64 + ITEM_BYTES_MAX as u64 + (ITEM_HEADER_BYTES as u64);

/// The head of a batch and the first piece of its items.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FeedBatch<'a> {
    /// `through` of the batch before.
    pub after: Lsn,
    /// Highest term that the safekeeper was fenced to or voted for.
    pub term: Term,
    /// Committed, as far as the safekeeper knows.
    pub commit_lsn: Lsn,
    /// At the end of the batch.
    pub summary: FrameSummary,
    /// Bytes of all items together: those of `items` and of the [`super::MessageType::FeedItems`] that follow.
    pub items_bytes: u64,
    /// At most 1 MiB.
    pub items: &'a [u8],
}

impl<'a> FeedBatch<'a> {
    pub(super) fn put(&self, body: &mut Vec<u8>) -> Result<&'a [u8], WireError> {
        self.check()?;
        put_lsn(body, self.after);
        body.put_u64(self.term.0);
        put_lsn(body, self.commit_lsn);
        put_summary(body, &self.summary);
        body.put_u64(self.items_bytes);
        Ok(self.items)
    }

    pub(super) fn take(fields: &mut Taker<'a>) -> Result<Self, WireError> {
        let batch = FeedBatch {
            after: take_lsn(fields, "batch.after")?,
            term: Term(fields.u64("batch.term")?),
            commit_lsn: take_lsn(fields, "batch.commit_lsn")?,
            summary: take_summary(fields)?,
            items_bytes: fields.u64("batch.items_bytes")?,
            items: fields.rest(),
        };
        batch.check()?;
        Ok(batch)
    }

    fn check(&self) -> Result<(), WireError> {
        check_wal_length(self.items)?;
        let through = self.summary.record_end;
        for (holds, field) in [
            (self.after <= through && through.offset_in(8) == 0, "batch.after"),
            (self.commit_lsn >= through, "batch.commit_lsn"),
            (self.items.len() as u64 <= self.items_bytes && self.items_bytes <= BATCH_BYTES_MAX, "batch.items_bytes"),
        ] {
            if !holds {
                return Err(WireError::BadValue { field });
            }
        }
        Ok(())
    }
}

/// How far a page server is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FeedProgress {
    /// Taken in up to here.
    pub received: Lsn,
    /// On object storage up to here: it needs no WAL below again. At or below `received`.
    pub durable: Lsn,
}

impl FeedProgress {
    pub(super) fn put(&self, body: &mut Vec<u8>) {
        put_lsn(body, self.received);
        put_lsn(body, self.durable);
    }

    pub(super) fn take(fields: &mut Taker<'_>) -> Result<Self, WireError> {
        let progress = FeedProgress {
            received: take_lsn(fields, "progress.received")?,
            durable: take_lsn(fields, "progress.durable")?,
        };
        match progress.durable <= progress.received {
            true => Ok(progress),
            false => Err(WireError::BadValue { field: "progress.durable" }),
        }
    }
}

/// The frames of a batch, one after the other.
///
/// Memory: the batch; each item is dropped when it has been given out.
#[derive(Debug)]
pub struct BatchFrames {
    head: Option<Batch>,
    items: alloc::vec::IntoIter<Item>,
    /// Bytes of items that no frame has carried yet.
    left: u64,
    /// The item that the frame before ended in, and how much of it is gone.
    cut: Option<(Item, usize)>,
}

impl BatchFrames {
    /// All frames of `batch` are to come; there is at least one.
    pub fn new(mut batch: Batch) -> BatchFrames {
        let items = core::mem::take(&mut batch.items);
        let left = items.iter().map(|item| (ITEM_HEADER_BYTES + item.stored.len()) as u64).sum();
        BatchFrames { head: Some(batch), items: items.into_iter(), left, cut: None }
    }

    /// Bytes of items that no frame has carried yet.
    pub fn left_bytes(&self) -> u64 {
        self.left
    }

    /// The next frame, at most about 1 MiB long; `None` when all are given out.
    ///
    /// # Errors
    /// The caller's fault: the batch contradicts itself, or an item is longer than [`ITEM_BYTES_MAX`].
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        if self.head.is_none() && self.left == 0 {
            return Ok(None);
        }
        let total = self.left;
        let piece = self.next_piece()?;
        let message = match self.head.take() {
            Some(batch) if batch.through == batch.summary.record_end => Message::FeedBatch(FeedBatch {
                after: batch.after,
                term: batch.term,
                commit_lsn: batch.commit_lsn,
                summary: batch.summary,
                items_bytes: total,
                items: &piece,
            }),
            Some(_) => return Err(WireError::BadValue { field: "batch.through" }),
            None => Message::FeedItems(&piece),
        };
        encode_to_vec(&message).map(Some)
    }

    fn next_piece(&mut self) -> Result<Vec<u8>, WireError> {
        let room = MAX_APPEND_BYTES as usize;
        let mut piece = Vec::with_capacity(room.min(usize::try_from(self.left).unwrap_or(room)));
        while piece.len() < room {
            let Some((item, gone)) = self.cut.take().or_else(|| self.items.next().map(|item| (item, 0))) else { break };
            let length = u32::try_from(item.stored.len()).ok().filter(|length| *length <= ITEM_BYTES_MAX);
            let length = length.ok_or(WireError::BadValue { field: "item.length" })?;
            let mut header = Vec::with_capacity(ITEM_HEADER_BYTES);
            put_lsn(&mut header, item.start);
            put_lsn(&mut header, item.end);
            header.put_u32(length);
            let before = piece.len();
            for (part, from) in [(&header, gone), (&item.stored, gone.saturating_sub(ITEM_HEADER_BYTES))] {
                let part = part.get(from..).unwrap_or_default();
                piece.extend_from_slice(&part[..part.len().min(room - piece.len())]);
            }
            let gone = gone + (piece.len() - before);
            if gone < ITEM_HEADER_BYTES + item.stored.len() {
                self.cut = Some((item, gone));
            }
        }
        self.left -= piece.len() as u64;
        Ok(piece)
    }
}

/// Puts batches together from their frames.
///
/// Memory: the items of one batch, never more than arrived of them.
#[derive(Debug, Default)]
pub struct BatchAssembler {
    batch: Option<Batch>,
    /// Bytes of items that are still to come.
    left: u64,
    /// Header of the item in progress, as far as it arrived.
    header: Vec<u8>,
    /// The item in progress, once its header is complete.
    item: Option<(Item, usize)>,
}

impl BatchAssembler {
    /// Without a batch in progress.
    pub fn new() -> BatchAssembler {
        BatchAssembler::default()
    }

    /// Takes the next message of the stream; returns the batch that it completes.
    ///
    /// # Errors
    /// The sender's fault: pieces do not fit together, or the message is none of a feed.
    pub fn take(&mut self, message: &Message<'_>) -> Result<Option<Batch>, WireError> {
        let piece = match message {
            Message::FeedBatch(head) if self.batch.is_none() => {
                self.left = head.items_bytes;
                self.batch = Some(Batch {
                    after: head.after,
                    through: head.summary.record_end,
                    term: head.term,
                    commit_lsn: head.commit_lsn,
                    summary: head.summary,
                    items: Vec::new(),
                });
                head.items
            }
            // A piece that brings nothing could come for ever.
            Message::FeedItems(piece) if self.batch.is_some() && !piece.is_empty() => piece,
            _ => return Err(WireError::BadValue { field: "feed.message" }),
        };
        self.left =
            self.left.checked_sub(piece.len() as u64).ok_or(WireError::BadValue { field: "batch.items_bytes" })?;
        self.take_piece(piece)?;
        if self.left > 0 {
            return Ok(None);
        }
        if self.item.is_some() || !self.header.is_empty() {
            return Err(WireError::Truncated { field: "item" });
        }
        Ok(self.batch.take())
    }

    fn take_piece(&mut self, mut piece: &[u8]) -> Result<(), WireError> {
        let Some(batch) = &mut self.batch else { return Ok(()) };
        while !piece.is_empty() {
            let Some((mut item, wanted)) = self.item.take() else {
                let missing = (ITEM_HEADER_BYTES - self.header.len()).min(piece.len());
                let (now, later) = piece.split_at(missing);
                self.header.extend_from_slice(now);
                piece = later;
                if self.header.len() == ITEM_HEADER_BYTES {
                    let after = batch.items.last().map_or(batch.after, |item| item.end);
                    self.item = Some(take_item(&self.header, after, batch.through)?);
                    self.header.clear();
                }
                continue;
            };
            let missing = (wanted - item.stored.len()).min(piece.len());
            let (now, later) = piece.split_at(missing);
            // Small items at once; long ones grow with what arrives, since their length is only announced.
            if item.stored.capacity() == 0 {
                item.stored.reserve_exact(wanted.min(piece.len()));
            }
            item.stored.extend_from_slice(now);
            piece = later;
            if item.stored.len() == wanted {
                batch.items.push(item);
            } else {
                self.item = Some((item, wanted));
            }
        }
        Ok(())
    }
}

/// An item without its record, and how long that is.
fn take_item(header: &[u8], after: Lsn, through: Lsn) -> Result<(Item, usize), WireError> {
    let mut fields = Taker::new(header);
    let start = take_lsn(&mut fields, "item.start")?;
    let end = take_lsn(&mut fields, "item.end")?;
    let length = fields.u32("item.length")?;
    if end <= after || end > through || start >= end {
        return Err(WireError::BadValue { field: "item.end" });
    }
    if length < STORED_HEADER_BYTES as u32 || length > ITEM_BYTES_MAX {
        return Err(WireError::BadValue { field: "item.length" });
    }
    Ok((Item { start, end, stored: Vec::new() }, length as usize))
}
