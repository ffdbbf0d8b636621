//! Bodies of the page protocol: the way to bytes and back.

use alloc::vec::Vec;

use layers::Key;
use pgtypes::Lsn;
use wal::{Fork, RelFileLocator};

use super::{
    ADVISORY_BYTES_MAX, ADVISORY_NAME_BYTES_MAX, AdvisoryTaken, FindLsn, GetMetadata, GetPages, GetSizes, LeaseGranted,
    LsnFound, MetadataPart, MetadataPiece, NEWEST, PAGE_BYTES, PAGES_MAX, PageErrorCode, PageFailed, PageFrame,
    PageHello, PageMessage, PageMessageType, PageProgress, PageWelcome, Pages, PutAdvisory, SIZES_MAX, Sizes,
    StripeLength, TakeLease,
};
use crate::{
    append::{HEADER_BYTES, WireError, frame::header},
    bytes::{Put, Taker},
};

/// Positions from here on are refused, [`NEWEST`] apart: arithmetic on accepted ones cannot overflow.
const LSN_END: u64 = 1 << 63;
/// Bytes of a length in [`Sizes`].
const STRIPE_LENGTH_BYTES: usize = 12 + 1 + 4 + 4;

/// Appends the frame of `message` to `out`, *without* the pages of [`PageMessage::Pages`]: send those right behind (one
/// vectored write), so that they are not copied. `out` is unchanged on error.
///
/// # Errors
/// The caller's fault: [`WireError::TooLong`] for a message above the limit of its type, [`WireError::BadValue`] for
/// a field out of its range.
pub fn encode(message: &PageMessage<'_>, out: &mut Vec<u8>) -> Result<(), WireError> {
    let start = out.len();
    out.put(&[0; HEADER_BYTES]);
    let framed = put_body(message, out).and_then(|payload_bytes| {
        let length = (out.len() - start - HEADER_BYTES) as u64 + payload_bytes as u64;
        header(message.message_type(), length)
    });
    match framed {
        Ok(header) => {
            out[start..start + HEADER_BYTES].copy_from_slice(&header);
            Ok(())
        }
        Err(error) => {
            out.truncate(start);
            Err(error)
        }
    }
}

/// The whole frame of `message`, pages included.
///
/// # Errors
/// As [`encode`].
pub fn encode_to_vec(message: &PageMessage<'_>) -> Result<Vec<u8>, WireError> {
    let mut out = Vec::new();
    encode(message, &mut out)?;
    if let PageMessage::Pages(pages) = message {
        out.put(pages.bytes);
    }
    Ok(out)
}

/// Puts the body; returns how many bytes of pages belong behind it.
fn put_body(message: &PageMessage<'_>, body: &mut Vec<u8>) -> Result<usize, WireError> {
    match message {
        PageMessage::PageHello(hello) => hello.put(body),
        PageMessage::GetPages(get) => {
            check_get_pages(get)?;
            put_id(body, get.id)?;
            put_relation(body, get.relation);
            put_fork(body, get.fork);
            body.put_u32(get.first_block);
            body.put_u16(get.count);
            put_lsn(body, get.request_lsn);
            put_lsn(body, get.not_modified_since);
        }
        PageMessage::GetSizes(GetSizes { id, at }) | PageMessage::GetMetadata(GetMetadata { id, at }) => {
            put_id(body, *id)?;
            put_lsn(body, *at);
        }
        PageMessage::TakeLease(TakeLease { id, lsn, seconds })
        | PageMessage::LeaseGranted(LeaseGranted { id, lsn, seconds }) => {
            put_id(body, *id)?;
            put_lsn(body, *lsn);
            body.put_u32(*seconds);
        }
        PageMessage::PutAdvisory(file) => {
            check_advisory(file)?;
            put_id(body, file.id)?;
            body.put_text(file.name);
            body.put(file.contents);
        }
        PageMessage::FindLsn(find) => {
            put_id(body, find.id)?;
            body.put_i64(find.timestamp);
        }
        PageMessage::PageWelcome(welcome) => welcome.put(body),
        PageMessage::Pages(pages) => {
            check_pages(pages.bytes)?;
            put_id(body, pages.id)?;
            put_lsn(body, pages.lsn);
            body.put_u32(pages.checksum);
            return Ok(pages.bytes.len());
        }
        PageMessage::Sizes(sizes) => {
            if sizes.entries.len() > SIZES_MAX {
                return Err(WireError::BadValue { field: "sizes" });
            }
            put_id(body, sizes.id)?;
            put_lsn(body, sizes.lsn);
            body.put_u8(sizes.last.into());
            body.put_count(sizes.entries.len());
            for entry in &sizes.entries {
                put_relation(body, entry.relation);
                put_fork(body, entry.fork);
                body.put_u32(entry.stripe);
                body.put_u32(entry.length);
            }
        }
        PageMessage::MetadataPart(part) => {
            put_id(body, part.id)?;
            put_lsn(body, part.lsn);
            body.put_u8(part.last.into());
            body.put_count(part.pieces.len());
            for piece in &part.pieces {
                body.put(&piece.key.to_bytes());
                body.put_u8(piece.continues.into());
                body.put_count(piece.bytes.len());
                body.put(piece.bytes);
            }
        }
        PageMessage::AdvisoryTaken(taken) => {
            put_id(body, taken.id)?;
            put_lsn(body, taken.lsn);
        }
        PageMessage::LsnFound(found) => {
            put_id(body, found.id)?;
            put_lsn(body, found.lsn);
            body.put_i64(found.commit_timestamp);
        }
        PageMessage::PageProgress(progress) => {
            put_lsn(body, progress.ingested_lsn);
            put_lsn(body, progress.durable_lsn);
            put_lsn(body, progress.horizon_lsn);
        }
        PageMessage::PageFailed(failed) => {
            body.put_u64(failed.id);
            body.put_u16(failed.code.number());
            body.put_text(&failed.text);
        }
    }
    Ok(0)
}

/// What a frame says. The checksum of [`Pages`] is left to the reader: a page that does not match harms its request only.
///
/// # Errors
/// The peer's fault: see [`WireError`].
pub fn decode(frame: PageFrame<'_>) -> Result<PageMessage<'_>, WireError> {
    let mut fields = Taker::new(frame.body);
    let message = match frame.message {
        PageMessageType::PageHello => PageMessage::PageHello(PageHello::take(&mut fields)?),
        PageMessageType::GetPages => {
            let get = GetPages {
                id: take_id(&mut fields)?,
                relation: take_relation(&mut fields)?,
                fork: take_fork(&mut fields)?,
                first_block: fields.u32("first_block")?,
                count: fields.u16("count")?,
                request_lsn: take_lsn_or_newest(&mut fields, "request_lsn")?,
                not_modified_since: take_lsn(&mut fields, "not_modified_since")?,
            };
            check_get_pages(&get)?;
            PageMessage::GetPages(get)
        }
        PageMessageType::GetSizes => {
            PageMessage::GetSizes(GetSizes { id: take_id(&mut fields)?, at: take_lsn_or_newest(&mut fields, "at")? })
        }
        PageMessageType::GetMetadata => PageMessage::GetMetadata(GetMetadata {
            id: take_id(&mut fields)?,
            at: take_lsn_or_newest(&mut fields, "at")?,
        }),
        PageMessageType::TakeLease => PageMessage::TakeLease(TakeLease {
            id: take_id(&mut fields)?,
            lsn: take_lsn_or_newest(&mut fields, "lsn")?,
            seconds: fields.u32("seconds")?,
        }),
        PageMessageType::PutAdvisory => {
            let id = take_id(&mut fields)?;
            let length = fields.u16("name")? as usize;
            let name = core::str::from_utf8(fields.bytes(length, "name")?)
                .map_err(|_| WireError::BadValue { field: "name" })?;
            let file = PutAdvisory { id, name, contents: fields.rest() };
            check_advisory(&file)?;
            PageMessage::PutAdvisory(file)
        }
        PageMessageType::FindLsn => {
            PageMessage::FindLsn(FindLsn { id: take_id(&mut fields)?, timestamp: fields.i64("timestamp")? })
        }
        PageMessageType::PageWelcome => PageMessage::PageWelcome(PageWelcome::take(&mut fields)?),
        PageMessageType::Pages => {
            let id = take_id(&mut fields)?;
            let lsn = take_lsn(&mut fields, "lsn")?;
            let checksum = fields.u32("checksum")?;
            let bytes = fields.rest();
            check_pages(bytes)?;
            PageMessage::Pages(Pages { id, lsn, checksum, bytes })
        }
        PageMessageType::Sizes => PageMessage::Sizes(take_sizes(&mut fields)?),
        PageMessageType::MetadataPart => PageMessage::MetadataPart(take_metadata_part(&mut fields)?),
        PageMessageType::LeaseGranted => PageMessage::LeaseGranted(LeaseGranted {
            id: take_id(&mut fields)?,
            lsn: take_lsn(&mut fields, "lsn")?,
            seconds: fields.u32("seconds")?,
        }),
        PageMessageType::AdvisoryTaken => {
            PageMessage::AdvisoryTaken(AdvisoryTaken { id: take_id(&mut fields)?, lsn: take_lsn(&mut fields, "lsn")? })
        }
        PageMessageType::LsnFound => PageMessage::LsnFound(LsnFound {
            id: take_id(&mut fields)?,
            lsn: take_lsn(&mut fields, "lsn")?,
            commit_timestamp: fields.i64("commit_timestamp")?,
        }),
        PageMessageType::PageProgress => PageMessage::PageProgress(PageProgress {
            ingested_lsn: take_lsn(&mut fields, "ingested_lsn")?,
            durable_lsn: take_lsn(&mut fields, "durable_lsn")?,
            horizon_lsn: take_lsn(&mut fields, "horizon_lsn")?,
        }),
        PageMessageType::PageFailed => PageMessage::PageFailed(PageFailed {
            id: fields.u64("id")?,
            code: PageErrorCode::from_number(fields.u16("code")?),
            text: fields.text("text")?,
        }),
    };
    fields.end()?;
    Ok(message)
}

fn take_sizes(fields: &mut Taker<'_>) -> Result<Sizes, WireError> {
    let id = take_id(fields)?;
    let lsn = take_lsn(fields, "lsn")?;
    let last = fields.flag("last")?;
    let count = fields.count(STRIPE_LENGTH_BYTES, "sizes")?;
    if count > SIZES_MAX {
        return Err(WireError::BadValue { field: "sizes" });
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(StripeLength {
            relation: take_relation(fields)?,
            fork: take_fork(fields)?,
            stripe: fields.u32("stripe")?,
            length: fields.u32("length")?,
        });
    }
    Ok(Sizes { id, lsn, entries, last })
}

fn take_metadata_part<'a>(fields: &mut Taker<'a>) -> Result<MetadataPart<'a>, WireError> {
    let id = take_id(fields)?;
    let lsn = take_lsn(fields, "lsn")?;
    let last = fields.flag("last")?;
    let count = fields.count(MetadataPiece::HEADER_BYTES, "pieces")?;
    let mut pieces = Vec::with_capacity(count);
    for _ in 0..count {
        let key = Key::from_bytes(fields.array("piece.key")?);
        let continues = fields.flag("piece.continues")?;
        let length = fields.count(1, "piece.bytes")?;
        pieces.push(MetadataPiece { key, continues, bytes: fields.bytes(length, "piece.bytes")? });
    }
    Ok(MetadataPart { id, lsn, pieces, last })
}

fn check_get_pages(get: &GetPages) -> Result<(), WireError> {
    if !(1..=PAGES_MAX).contains(&get.count) || get.first_block.checked_add(get.count.into()).is_none() {
        return Err(WireError::BadValue { field: "count" });
    }
    if get.not_modified_since > get.request_lsn {
        return Err(WireError::BadValue { field: "not_modified_since" });
    }
    Ok(())
}

fn check_pages(bytes: &[u8]) -> Result<(), WireError> {
    let whole = bytes.len().is_multiple_of(PAGE_BYTES) && !bytes.is_empty();
    if whole && bytes.len() <= PAGE_BYTES * usize::from(PAGES_MAX) {
        Ok(())
    } else {
        Err(WireError::BadValue { field: "pages" })
    }
}

fn check_advisory(file: &PutAdvisory<'_>) -> Result<(), WireError> {
    if file.name.is_empty() || file.name.len() > ADVISORY_NAME_BYTES_MAX {
        return Err(WireError::BadValue { field: "name" });
    }
    if file.contents.len() > ADVISORY_BYTES_MAX {
        return Err(WireError::BadValue { field: "contents" });
    }
    Ok(())
}

fn put_id(body: &mut Vec<u8>, id: u64) -> Result<(), WireError> {
    body.put_u64(id);
    // 0 is the connection, in a failure.
    if id == 0 { Err(WireError::BadValue { field: "id" }) } else { Ok(()) }
}

fn take_id(fields: &mut Taker<'_>) -> Result<u64, WireError> {
    match fields.u64("id")? {
        0 => Err(WireError::BadValue { field: "id" }),
        id => Ok(id),
    }
}

pub(super) fn put_lsn(body: &mut Vec<u8>, lsn: Lsn) {
    body.put_u64(lsn.0);
}

pub(super) fn take_lsn(fields: &mut Taker<'_>, field: &'static str) -> Result<Lsn, WireError> {
    match fields.u64(field)? {
        lsn if lsn < LSN_END => Ok(Lsn(lsn)),
        _ => Err(WireError::BadValue { field }),
    }
}

fn take_lsn_or_newest(fields: &mut Taker<'_>, field: &'static str) -> Result<Lsn, WireError> {
    match fields.u64(field)? {
        lsn if lsn < LSN_END || lsn == NEWEST.0 => Ok(Lsn(lsn)),
        _ => Err(WireError::BadValue { field }),
    }
}

fn put_relation(body: &mut Vec<u8>, relation: RelFileLocator) {
    body.put_u32(relation.tablespace);
    body.put_u32(relation.database);
    body.put_u32(relation.relation);
}

fn take_relation(fields: &mut Taker<'_>) -> Result<RelFileLocator, WireError> {
    Ok(RelFileLocator {
        tablespace: fields.u32("tablespace")?,
        database: fields.u32("database")?,
        relation: fields.u32("relation")?,
    })
}

/// PostgreSQL's `ForkNumber`.
fn put_fork(body: &mut Vec<u8>, fork: Fork) {
    body.put_u8(match fork {
        Fork::Main => 0,
        Fork::FreeSpaceMap => 1,
        Fork::VisibilityMap => 2,
        Fork::Init => 3,
    });
}

fn take_fork(fields: &mut Taker<'_>) -> Result<Fork, WireError> {
    Ok(match fields.u8("fork")? {
        0 => Fork::Main,
        1 => Fork::FreeSpaceMap,
        2 => Fork::VisibilityMap,
        3 => Fork::Init,
        _ => return Err(WireError::BadValue { field: "fork" }),
    })
}
