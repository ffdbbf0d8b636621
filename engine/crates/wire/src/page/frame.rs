//! Types of frames of the page protocol.

use crate::append::frame::{Frame, FrameReader, FrameType};

/// What a frame of the page protocol holds. The number is the byte on the wire; none is one of the append protocol's,
/// so that a connection to the wrong port ends at its first frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PageMessageType {
    /// First frame on a connection, from the reader.
    PageHello = 0x40,
    /// Reader wants blocks.
    GetPages = 0x41,
    /// Reader wants the lengths of all relations.
    GetSizes = 0x42,
    /// Reader wants everything that is not blocks.
    GetMetadata = 0x43,
    /// Reader wants a position kept.
    TakeLease = 0x44,
    /// Reader hands in a file outside WAL.
    PutAdvisory = 0x45,
    /// Reader wants the position of a time.
    FindLsn = 0x46,
    /// Server's first answer.
    PageWelcome = 0xC0,
    /// Blocks.
    Pages = 0xC1,
    /// Lengths.
    Sizes = 0xC2,
    /// Metadata.
    MetadataPart = 0xC3,
    /// The position is kept.
    LeaseGranted = 0xC4,
    /// The file was taken.
    AdvisoryTaken = 0xC5,
    /// The position of a time.
    LsnFound = 0xC6,
    /// How far the server is.
    PageProgress = 0xC7,
    /// A request failed, or the connection ends.
    PageFailed = 0xCF,
}

/// A frame of the page protocol.
pub type PageFrame<'a> = Frame<'a, PageMessageType>;
/// Cuts a byte stream into frames of the page protocol; make one with `default()`. Its buffer holds at most one frame
/// and one read: 8.1 MiB on a connection that hands in advisory files, otherwise 1.3 MiB.
pub type PageFrameReader = FrameReader<PageMessageType>;

/// Frames with few fixed fields, and the welcome.
const SMALL_BODY_BYTES_MAX: u32 = 1 << 10;
/// Pages (half a MiB), lists, texts of errors.
const BODY_BYTES_MAX: u32 = 1 << 20;
/// A file outside WAL, its name and its fields.
const ADVISORY_BODY_BYTES_MAX: u32 = super::ADVISORY_BYTES_MAX as u32 + SMALL_BODY_BYTES_MAX;

impl PageMessageType {
    /// Every type, for tests and fuzzing.
    pub const ALL: [PageMessageType; 16] = [
        PageMessageType::PageHello,
        PageMessageType::GetPages,
        PageMessageType::GetSizes,
        PageMessageType::GetMetadata,
        PageMessageType::TakeLease,
        PageMessageType::PutAdvisory,
        PageMessageType::FindLsn,
        PageMessageType::PageWelcome,
        PageMessageType::Pages,
        PageMessageType::Sizes,
        PageMessageType::MetadataPart,
        PageMessageType::LeaseGranted,
        PageMessageType::AdvisoryTaken,
        PageMessageType::LsnFound,
        PageMessageType::PageProgress,
        PageMessageType::PageFailed,
    ];
}

impl FrameType for PageMessageType {
    fn from_byte(byte: u8) -> Option<Self> {
        PageMessageType::ALL.into_iter().find(|known| *known as u8 == byte)
    }

    fn byte(self) -> u8 {
        self as u8
    }

    fn max_body_bytes(self) -> u32 {
        match self {
            PageMessageType::PageHello
            | PageMessageType::GetPages
            | PageMessageType::GetSizes
            | PageMessageType::GetMetadata
            | PageMessageType::TakeLease
            | PageMessageType::FindLsn
            | PageMessageType::PageWelcome
            | PageMessageType::LeaseGranted
            | PageMessageType::AdvisoryTaken
            | PageMessageType::LsnFound
            | PageMessageType::PageProgress => SMALL_BODY_BYTES_MAX,
            PageMessageType::Pages
            | PageMessageType::Sizes
            | PageMessageType::MetadataPart
            | PageMessageType::PageFailed => BODY_BYTES_MAX,
            PageMessageType::PutAdvisory => ADVISORY_BODY_BYTES_MAX,
        }
    }
}
