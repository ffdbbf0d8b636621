//! The append protocol: what proposers, peers and readers say to a safekeeper, and its answers.
//!
//! `docs/formats/append-protocol.md` describes every byte. [`FrameReader`] cuts a stream into frames, [`decode`] turns a
//! frame into a [`Message`], [`encode`] does the reverse. A [`filter::Batch`] takes several frames: [`BatchFrames`] makes
//! them, a [`BatchAssembler`] puts them together.

mod consensus_codec;
mod feed;
pub(crate) mod frame;
mod hello;
mod message;

pub use feed::{BatchAssembler, BatchFrames, FeedBatch, FeedProgress, ITEM_BYTES_MAX};
pub use frame::{Frame, FrameReader, FrameType, HEADER_BYTES, MAX_APPEND_BYTES, MAX_BODY_BYTES, MessageType};
pub use hello::{Hello, PROTOCOL_MAGIC, PROTOCOL_VERSION, Purpose};
pub use message::{BallotAnswer, ErrorCode, ErrorFrame, FetchWal, Message, WalData, decode, encode, encode_to_vec};

/// Why bytes are not a message of this protocol (or of the page protocol, which has the same frames), or a message cannot be sent. The connection is of no further use.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// The checksum of a frame's header does not match: not this protocol, or a stream out of step.
    #[error("frame header: checksum mismatch: not a lakebase protocol, or the stream is out of step")]
    HeaderChecksum,
    /// A frame of a type that this version does not know.
    #[error("frame header: unknown message type {0:#04x}")]
    UnknownType(u8),
    /// A frame longer than its type may be.
    #[error("frame of type {message:#04x} with {length} bytes: at most {max} are allowed")]
    TooLong {
        /// Of what type: its byte on the wire.
        message: u8,
        /// Bytes behind the header.
        length: u64,
        /// The limit.
        max: u32,
    },
    /// A field reaches beyond the end of the body.
    #[error("message is cut short in field {field}")]
    Truncated {
        /// The first field that does not fit.
        field: &'static str,
    },
    /// Bytes behind the last field.
    #[error("{count} bytes behind the last field of the message")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// A field holds a value that it must not hold.
    #[error("field {field} holds a value that is not allowed")]
    BadValue {
        /// Which.
        field: &'static str,
    },
    /// The first message does not begin with the magic number.
    #[error("the first message is no greeting of this protocol")]
    BadMagic,
    /// The peer speaks another version.
    #[error("peer speaks protocol version {theirs}, this is version {ours}")]
    WrongVersion {
        /// The peer's version.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
}
