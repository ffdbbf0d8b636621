//! The page protocol: what readers of pages (compute agents, replicas, tools) say to a page server, and its answers.
//!
//! `docs/formats/page-protocol.md` describes every byte. Frames are those of the append protocol under numbers of their
//! own: [`PageFrameReader`] cuts a stream into them, [`decode`] turns one into a [`PageMessage`], [`encode`] does the
//! reverse. Read next: `message.rs`.

mod codec;
mod failure;
mod frame;
mod hello;
mod message;
mod metadata_parts;

pub use codec::{decode, encode, encode_to_vec};
pub use failure::{PageErrorCode, PageFailed};
pub use frame::{PageFrame, PageFrameReader, PageMessageType};
pub use hello::{PAGE_PROTOCOL_MAGIC, PAGE_PROTOCOL_VERSION, PageHello, PageWelcome, ReaderRole};
pub use message::{
    ADVISORY_BYTES_MAX, ADVISORY_NAME_BYTES_MAX, AdvisoryTaken, FindLsn, GetMetadata, GetPages, GetSizes, LeaseGranted,
    LsnFound, MetadataPart, MetadataPiece, NEWEST, PAGE_BYTES, PAGES_MAX, PageMessage, PageProgress, Pages,
    PutAdvisory, SIZES_MAX, Sizes, StripeLength, TakeLease,
};
pub use metadata_parts::{MetadataJoin, MetadataJoinError, metadata_parts};
