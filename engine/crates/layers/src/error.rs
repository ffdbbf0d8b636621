//! Why a layer is refused.

use thiserror::Error;

use crate::format::VERSION;

/// Bytes are not the layer that they should be. Whoever reads them fetches the object again, then gives it up by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum LayerError {
    /// The magic number is missing.
    #[error("not a layer file")]
    NotALayer,
    /// A later version wrote it.
    #[error(
        "layer format {found} is not known: this engine reads {VERSION}; use the version that wrote it, or a later one"
    )]
    UnknownVersion {
        /// What the file says.
        found: u16,
    },
    /// A checksum does not match, by damage or because the bytes belong elsewhere.
    #[error("{what}: checksum mismatch")]
    Checksum {
        /// Header, trailer, index or block.
        what: &'static str,
    },
    /// Checksums match, the contents make no sense: written by a faulty program.
    #[error("layer: {0}")]
    Malformed(&'static str),
    /// Fewer or more bytes than there should be.
    #[error("{what}: {found} bytes, expected {expected}")]
    Length {
        /// Header, trailer, index or block.
        what: &'static str,
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
}

/// The caller broke a rule of writing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PutError {
    /// LSNs of an open layer never fall; keys, and LSNs of a key, of a layer file rise.
    #[error("value is out of order")]
    OutOfOrder,
    /// Outside of the layer's keys or positions.
    #[error("value is outside of the layer")]
    OutOfRange,
    /// Above [`crate::VALUE_BYTES_MAX`].
    #[error("value of {0} bytes is too large")]
    TooLarge(usize),
    /// [`crate::VALUES_MAX`] is reached: end the layer and begin another.
    #[error("layer is full")]
    Full,
}
