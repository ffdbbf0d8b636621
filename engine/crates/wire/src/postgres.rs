//! The server's side of PostgreSQL's frontend/backend protocol 3.0, as far as physical replication needs it.
//!
//! [`MessageReader`] cuts what a client sends into messages, [`Reply`] builds what it is sent, [`parse_command`] reads
//! the replication commands, [`scram`] checks passwords. `docs/formats/replication-protocol.md` says what of PostgreSQL
//! is served. Numbers are big endian here, unlike in our own protocols.

mod command;
mod copy;
mod frontend;
mod reply;
pub mod scram;

pub use command::{Command, CommandError, MAX_NAME_BYTES, SlotKind, parse_command};
pub use copy::{CopyMessage, HotStandbyFeedback, StandbyStatus, decode_copy, keepalive, wal_data_header};
pub use frontend::{FrontendMessage, MAX_MESSAGE_BYTES, MessageReader, Startup, StartupMessage, options_setting};
pub use reply::{Column, ColumnType, ErrorReply, Reply, Severity, sqlstate};

/// Bytes that are no message of the protocol, or none that may come here. The client's fault; the connection is of no
/// further use.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    /// A length that its message cannot have.
    #[error("invalid length {length} of message {message:?}")]
    BadLength {
        /// The message's type byte; 0 for the startup packet, which has none.
        message: u8,
        /// The length that it claims.
        length: u32,
    },
    /// A type byte that no message has.
    #[error("invalid frontend message type {0}")]
    UnknownMessage(u8),
    /// Protocol version 2 or older, or 4.
    #[error("unsupported frontend protocol {major}.{minor}: server supports 3.0")]
    Version {
        /// Asked for.
        major: u16,
        /// Asked for.
        minor: u16,
    },
    /// A message whose contents are malformed.
    #[error("malformed {0} message")]
    Malformed(&'static str),
}
