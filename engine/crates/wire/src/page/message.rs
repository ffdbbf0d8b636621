//! All messages of the page protocol.
//!
//! A request has an id, above 0, that the reader gives and the server repeats in its answers; answers come in any order.
//! Positions that are asked for are record ends.

use alloc::vec::Vec;

use layers::{KEY_BYTES, Key};
use pgtypes::Lsn;
use wal::{Fork, RelFileLocator, crc32c};

use super::{PageFailed, PageHello, PageMessageType, PageWelcome};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 8192;
/// Most pages of one request: 512 KiB in one answer.
pub const PAGES_MAX: u16 = 64;
/// As `request_lsn` or `at`: the newest that the server has.
pub const NEWEST: Lsn = Lsn::MAX;
/// Most entries of one [`Sizes`]; a server sends more in several.
pub const SIZES_MAX: usize = 32_768;
/// Longest file of a [`PutAdvisory`], 8 MiB: statistics of 25,000 relations. A longer one is not handed in.
pub const ADVISORY_BYTES_MAX: usize = 8 << 20;
/// Longest name of a file of a [`PutAdvisory`].
pub const ADVISORY_NAME_BYTES_MAX: usize = 255;

/// Any message. Pages, files and values are borrowed: from the frame when decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PageMessage<'a> {
    /// The greeting.
    PageHello(PageHello),
    /// Blocks are wanted.
    GetPages(GetPages),
    /// Lengths are wanted.
    GetSizes(GetSizes),
    /// Metadata is wanted.
    GetMetadata(GetMetadata),
    /// A position is to be kept.
    TakeLease(TakeLease),
    /// A file outside WAL.
    PutAdvisory(PutAdvisory<'a>),
    /// The position of a time is wanted.
    FindLsn(FindLsn),
    /// The server's first answer.
    PageWelcome(PageWelcome),
    /// Blocks.
    Pages(Pages<'a>),
    /// Lengths.
    Sizes(Sizes),
    /// Metadata.
    MetadataPart(MetadataPart<'a>),
    /// The position is kept.
    LeaseGranted(LeaseGranted),
    /// The file was taken.
    AdvisoryTaken(AdvisoryTaken),
    /// The position of a time.
    LsnFound(LsnFound),
    /// How far the server is.
    PageProgress(PageProgress),
    /// A request failed, or the connection ends.
    PageFailed(PageFailed),
}

/// Wants blocks `first_block` up to `first_block + count` of one stripe, as of `request_lsn`.
///
/// The server answers as soon as it has ingested `not_modified_since`: the reader knows that the blocks did not change
/// between that position and `request_lsn`. Both are the same for a read of the past.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GetPages {
    /// Above 0.
    pub id: u64,
    /// Of which relation.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// The first.
    pub first_block: u32,
    /// How many: 1 to [`PAGES_MAX`].
    pub count: u16,
    /// As of when, or [`NEWEST`].
    pub request_lsn: Lsn,
    /// At most `request_lsn`.
    pub not_modified_since: Lsn,
}

/// Blocks: the answer to a [`GetPages`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pages<'a> {
    /// Of which request.
    pub id: u64,
    /// They are as of this position.
    pub lsn: Lsn,
    /// CRC-32C of `bytes`, made where the pages were: the reader compares it ([`Pages::is_intact`]).
    pub checksum: u32,
    /// 1 to [`PAGES_MAX`] pages, with their own checksums set.
    pub bytes: &'a [u8],
}

impl<'a> Pages<'a> {
    /// The answer with its checksum.
    pub fn new(id: u64, lsn: Lsn, bytes: &'a [u8]) -> Self {
        Pages { id, lsn, checksum: crc32c(0, bytes), bytes }
    }

    /// Whether the bytes are those that were sent.
    pub fn is_intact(&self) -> bool {
        crc32c(0, self.bytes) == self.checksum
    }
}

/// Wants the lengths of everything that the shard has, as of `at`, which must be ingested.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GetSizes {
    /// Above 0.
    pub id: u64,
    /// As of when, or [`NEWEST`].
    pub at: Lsn,
}

/// Part of the answer to a [`GetSizes`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Of which request.
    pub id: u64,
    /// The lengths are as of this position, the same in all parts.
    pub lsn: Lsn,
    /// At most [`SIZES_MAX`].
    pub entries: Vec<StripeLength>,
    /// Nothing follows.
    pub last: bool,
}

/// Length of what lies in one stripe. A stripe that is not named holds nothing; a fork of which no stripe is named does
/// not exist.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StripeLength {
    /// Whose.
    pub relation: RelFileLocator,
    /// Of which fork.
    pub fork: Fork,
    /// Number of the stripe.
    pub stripe: u32,
    /// Blocks of the fork in it.
    pub length: u32,
}

/// Wants all metadata and SLRU pages as of `at`, which must be ingested; from the shard that begins with hash 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GetMetadata {
    /// Above 0.
    pub id: u64,
    /// As of when, or [`NEWEST`].
    pub at: Lsn,
}

/// Part of the answer to a [`GetMetadata`]: pieces of values in the order of keys. [`super::metadata_parts`] makes them,
/// [`super::MetadataJoin`] puts them together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetadataPart<'a> {
    /// Of which request.
    pub id: u64,
    /// The values are as of this position, the same in all parts.
    pub lsn: Lsn,
    /// The pieces.
    pub pieces: Vec<MetadataPiece<'a>>,
    /// Nothing follows.
    pub last: bool,
}

/// A value, or a part of one that is too long for a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetadataPiece<'a> {
    /// Of what.
    pub key: Key,
    /// The next piece goes on with this value.
    pub continues: bool,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl MetadataPiece<'_> {
    /// Bytes of a piece in a frame, without its value.
    pub(super) const HEADER_BYTES: usize = KEY_BYTES + 1 + 4;
}

/// Wants everything at and after `lsn` to stay readable for `seconds`. A reader that still needs it asks again, with
/// the same or a later position; the one before over this connection is given up then. The connection's end ends none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TakeLease {
    /// Above 0.
    pub id: u64,
    /// The position, or [`NEWEST`]: the answer says which that is.
    pub lsn: Lsn,
    /// From now on.
    pub seconds: u32,
}

/// The position is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseGranted {
    /// Of which request.
    pub id: u64,
    /// The position.
    pub lsn: Lsn,
    /// For so long: at most what was asked for.
    pub seconds: u32,
}

/// A file of PGDATA outside WAL, kept in place of the one of that name before. The writer's only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PutAdvisory<'a> {
    /// Above 0.
    pub id: u64,
    /// Path in PGDATA, of at most [`ADVISORY_NAME_BYTES_MAX`] bytes.
    pub name: &'a str,
    /// At most [`ADVISORY_BYTES_MAX`].
    pub contents: &'a [u8],
}

/// The file will be in every base backup at or after `lsn`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdvisoryTaken {
    /// Of which request.
    pub id: u64,
    /// The position.
    pub lsn: Lsn,
}

/// Wants the last position at which nothing was committed after `timestamp`; from the shard that begins with hash 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FindLsn {
    /// Above 0.
    pub id: u64,
    /// Microseconds since 2000-01-01 UTC (`TimestampTz`).
    pub timestamp: i64,
}

/// The position of a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LsnFound {
    /// Of which request.
    pub id: u64,
    /// A record end.
    pub lsn: Lsn,
    /// Time of the last commit before it, as in [`FindLsn`]; 0 when there is none.
    pub commit_timestamp: i64,
}

/// How far the server is; sent every 100 ms while something moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageProgress {
    /// Everything up to here can be read.
    pub ingested_lsn: Lsn,
    /// Everything up to here is on object storage.
    pub durable_lsn: Lsn,
    /// Nothing before this can be read.
    pub horizon_lsn: Lsn,
}

impl PageMessage<'_> {
    /// The type of frame that carries this message.
    pub fn message_type(&self) -> PageMessageType {
        match self {
            PageMessage::PageHello(_) => PageMessageType::PageHello,
            PageMessage::GetPages(_) => PageMessageType::GetPages,
            PageMessage::GetSizes(_) => PageMessageType::GetSizes,
            PageMessage::GetMetadata(_) => PageMessageType::GetMetadata,
            PageMessage::TakeLease(_) => PageMessageType::TakeLease,
            PageMessage::PutAdvisory(_) => PageMessageType::PutAdvisory,
            PageMessage::FindLsn(_) => PageMessageType::FindLsn,
            PageMessage::PageWelcome(_) => PageMessageType::PageWelcome,
            PageMessage::Pages(_) => PageMessageType::Pages,
            PageMessage::Sizes(_) => PageMessageType::Sizes,
            PageMessage::MetadataPart(_) => PageMessageType::MetadataPart,
            PageMessage::LeaseGranted(_) => PageMessageType::LeaseGranted,
            PageMessage::AdvisoryTaken(_) => PageMessageType::AdvisoryTaken,
            PageMessage::LsnFound(_) => PageMessageType::LsnFound,
            PageMessage::PageProgress(_) => PageMessageType::PageProgress,
            PageMessage::PageFailed(_) => PageMessageType::PageFailed,
        }
    }
}
