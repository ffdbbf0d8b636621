//! Frames: a header with length, type and checksum, then a body.

use alloc::vec::Vec;
use core::marker::PhantomData;

use super::WireError;

/// Bytes of a frame's header: u32 body length, u8 type, 3 zero bytes, u32 CRC-32C of the 8 bytes before.
pub const HEADER_BYTES: usize = 12;
/// Largest WAL payload of one append or one piece of WAL data: 1 MiB.
pub const MAX_APPEND_BYTES: u32 = 1 << 20;
/// Largest body without payload: 1 MiB.
pub const MAX_BODY_BYTES: u32 = 1 << 20;
/// Largest body of the frames that carry WAL: the payload, and 256 KiB for the fields before it (a timeline's history
/// file may be among them: 50 bytes for each promotion, so 5,000 of them).
const MAX_WAL_BODY_BYTES: u32 = MAX_APPEND_BYTES + (256 << 10);
/// Frames with few fixed fields: nothing near this is ever sent, so garbage cannot make the reader wait for a megabyte.
const MAX_SMALL_BODY_BYTES: u32 = 1 << 10;

/// Bytes that the reader asks for at least in one read, so that a busy connection needs few reads.
const READ_BYTES: usize = 64 << 10;
/// A buffer that is larger than this gives its memory back when the connection is idle ([`FrameReader::shrink`]).
const IDLE_BYTES: usize = 4 << 10;

/// What a frame holds. The number is the byte on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum MessageType {
    /// First frame on a connection, from the side that opened it.
    Hello = 0x01,
    /// Proposer asks for a vote.
    Vote = 0x10,
    /// Proposer announces its election.
    Elected = 0x11,
    /// Proposer appends WAL.
    Append = 0x12,
    /// Proposer names donors of missing WAL.
    CatchUp = 0x13,
    /// Peer asks for WAL.
    FetchWal = 0x20,
    /// Peer asks for the ballot, to learn a fence that it missed.
    AskBallot = 0x21,
    /// Page server says how far it is.
    FeedProgress = 0x30,
    /// Acceptor's first answer.
    Status = 0x90,
    /// Acceptor votes.
    Voted = 0x91,
    /// Acceptor accepts an election.
    ElectedAccepted = 0x92,
    /// Acceptor made WAL durable.
    Appended = 0x93,
    /// Acceptor refuses.
    Refused = 0x94,
    /// WAL, to a peer or a reader.
    WalData = 0xA0,
    /// The ballot, to a peer.
    BallotAnswer = 0xA1,
    /// A batch for a shard, or the beginning of one.
    FeedBatch = 0xA2,
    /// More of a batch.
    FeedItems = 0xA3,
    /// Why the connection ends.
    Error = 0xFF,
}

impl MessageType {
    /// Every type, for tests and fuzzing, the inputs of which count on the order: new ones come last.
    pub const ALL: [MessageType; 18] = [
        MessageType::Hello,
        MessageType::Vote,
        MessageType::Elected,
        MessageType::Append,
        MessageType::CatchUp,
        MessageType::FetchWal,
        MessageType::AskBallot,
        MessageType::Status,
        MessageType::Voted,
        MessageType::ElectedAccepted,
        MessageType::Appended,
        MessageType::Refused,
        MessageType::WalData,
        MessageType::BallotAnswer,
        MessageType::Error,
        MessageType::FeedProgress,
        MessageType::FeedBatch,
        MessageType::FeedItems,
    ];

    /// Largest body that a frame of this type may have.
    pub const fn max_body_bytes(self) -> u32 {
        match self {
            MessageType::Append | MessageType::WalData | MessageType::FeedBatch | MessageType::FeedItems => {
                MAX_WAL_BODY_BYTES
            }
            MessageType::Hello
            | MessageType::FetchWal
            | MessageType::AskBallot
            | MessageType::FeedProgress
            | MessageType::ElectedAccepted
            | MessageType::Appended
            | MessageType::BallotAnswer => MAX_SMALL_BODY_BYTES,
            MessageType::Vote
            | MessageType::Elected
            | MessageType::CatchUp
            | MessageType::Status
            | MessageType::Voted
            | MessageType::Refused
            | MessageType::Error => MAX_BODY_BYTES,
        }
    }
}

/// The types of frames of one protocol: frames and their reader are the same for all of ours.
pub trait FrameType: Copy + PartialEq + core::fmt::Debug {
    /// The type with this byte on the wire.
    fn from_byte(byte: u8) -> Option<Self>;
    /// Its byte on the wire.
    fn byte(self) -> u8;
    /// Largest body that a frame of this type may have.
    fn max_body_bytes(self) -> u32;
}

impl FrameType for MessageType {
    fn from_byte(byte: u8) -> Option<Self> {
        MessageType::ALL.into_iter().find(|known| *known as u8 == byte)
    }

    fn byte(self) -> u8 {
        self as u8
    }

    fn max_body_bytes(self) -> u32 {
        MessageType::max_body_bytes(self)
    }
}

/// One frame, its body borrowed from the reader's buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame<'a, T = MessageType> {
    /// What the body holds.
    pub message: T,
    /// The bytes behind the header.
    pub body: &'a [u8],
}

/// The header of a frame with a body of `length` bytes.
///
/// # Errors
/// [`WireError::TooLong`] when no reader would accept it.
pub(crate) fn header<T: FrameType>(message: T, length: u64) -> Result<[u8; HEADER_BYTES], WireError> {
    let max = message.max_body_bytes();
    let Some(body_length) = u32::try_from(length).ok().filter(|length| *length <= max) else {
        return Err(WireError::TooLong { message: message.byte(), length, max });
    };
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&body_length.to_le_bytes());
    header[4] = message.byte();
    let checksum = crc32c(&header[..8]);
    header[8..].copy_from_slice(&checksum.to_le_bytes());
    Ok(header)
}

fn parse_header<T: FrameType>(header: [u8; HEADER_BYTES]) -> Result<(T, usize), WireError> {
    let [l0, l1, l2, l3, kind, zero0, zero1, zero2, c0, c1, c2, c3] = header;
    if crc32c(&header[..8]) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(WireError::HeaderChecksum);
    }
    if [zero0, zero1, zero2] != [0; 3] {
        return Err(WireError::BadValue { field: "header.reserved" });
    }
    let message = T::from_byte(kind).ok_or(WireError::UnknownType(kind))?;
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    let max = message.max_body_bytes();
    if length > max {
        return Err(WireError::TooLong { message: kind, length: length.into(), max });
    }
    Ok((message, length as usize))
}

/// Cuts a byte stream into frames.
///
/// Holds one buffer. It never grows beyond one frame of the largest kind and one read, about 1.2 MiB: the header is
/// checked before its length is believed. Fill it either with [`FrameReader::feed`] (one copy) or, without a copy, by
/// reading behind the bytes of [`FrameReader::take_buffer`] and handing it back.
#[derive(Debug)]
pub struct FrameReader<T = MessageType> {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were given out as frames.
    consumed: usize,
    /// First error: the stream is out of step for good.
    failed: Option<WireError>,
    types: PhantomData<T>,
}

impl<T> Default for FrameReader<T> {
    fn default() -> Self {
        FrameReader { buffer: Vec::new(), consumed: 0, failed: None, types: PhantomData }
    }
}

impl FrameReader {
    /// A reader of the append protocol, without memory of its own until bytes arrive.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<T: FrameType> FrameReader<T> {
    /// Adds bytes that were read from the stream. Take all frames out before the next call, so that the buffer stays
    /// within its bound.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.compact();
        self.buffer.extend_from_slice(bytes);
    }

    /// Hands the buffer out for a read: the new bytes belong *behind* the ones in it (into its spare capacity, of which
    /// there is at least enough for the rest of the current frame and 4 KiB). Give it back with
    /// [`FrameReader::return_buffer`].
    ///
    /// `idle` says that little is expected (nothing arrived for a while): the spare capacity is then small, so that a
    /// thousand idle connections cost little memory.
    pub fn take_buffer(&mut self, idle: bool) -> Vec<u8> {
        self.compact();
        let wanted = if idle && self.buffer.is_empty() { IDLE_BYTES } else { READ_BYTES };
        let missing = match self.peek_header() {
            Ok(Some((_, length))) => (HEADER_BYTES + length).saturating_sub(self.buffer.len()),
            // Too short to tell, or an error that `next` reports.
            Ok(None) | Err(_) => 0,
        };
        self.buffer.reserve(missing.max(wanted));
        core::mem::take(&mut self.buffer)
    }

    /// Takes back the buffer that [`FrameReader::take_buffer`] gave, with the bytes read behind the old ones.
    pub fn return_buffer(&mut self, buffer: Vec<u8>) {
        debug_assert!(self.buffer.is_empty(), "the buffer was not taken");
        self.buffer = buffer;
    }

    /// Gives back memory when no partial frame is held; for idle connections.
    pub fn shrink(&mut self) {
        self.compact();
        if self.buffer.is_empty() && self.buffer.capacity() > IDLE_BYTES {
            self.buffer = Vec::new();
        }
    }

    /// Whether bytes of an unfinished frame are held: the stream ended inside a frame if it ends here.
    pub fn has_partial_frame(&self) -> bool {
        self.buffer.len() > self.consumed
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// The peer's fault: see [`WireError`]. Every later call returns the same error.
    #[expect(clippy::should_implement_trait, reason = "the frame borrows from the reader, which Iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<Frame<'_, T>>, WireError> {
        let (message, length) = match self.peek_header() {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.failed = Some(error.clone());
                return Err(error);
            }
        };
        let start = self.consumed + HEADER_BYTES;
        let end = start + length;
        if end > self.buffer.len() {
            return Ok(None);
        }
        self.consumed = end;
        Ok(Some(Frame { message, body: &self.buffer[start..end] }))
    }

    fn peek_header(&self) -> Result<Option<(T, usize)>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.buffer[self.consumed..].first_chunk::<HEADER_BYTES>() {
            Some(header) => parse_header(*header).map(Some),
            None => Ok(None),
        }
    }

    /// Moves the unfinished frame to the front. Costs at most one copy of a partial frame per read.
    fn compact(&mut self) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
    }
}

/// CRC-32C (Castagnoli) of a few bytes, by table: a header has 8, where a hardware crate gains nothing.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| CRC_TABLE[((crc ^ u32::from(*byte)) & 0xFF) as usize] ^ (crc >> 8))
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            // 0x82F63B78 is the Castagnoli polynomial with its bits reversed.
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn crc_is_castagnoli() {
        // Check value of CRC-32C/iSCSI (RFC 3720, B.4 uses the same polynomial).
        assert_eq!(0xE306_9283, crc32c(b"123456789"));
    }

    #[test]
    fn frames_come_out_whole_however_the_stream_is_cut() {
        let mut stream = Vec::new();
        for length in [0usize, 1, 100, 1000] {
            stream.extend_from_slice(&header(MessageType::Vote, length as u64).expect("in bounds"));
            stream.extend(core::iter::repeat_n(length as u8, length));
        }
        for chunk in [1usize, 3, 11, 12, 13, 500, 5000] {
            let mut reader = FrameReader::new();
            let mut lengths = vec![];
            for bytes in stream.chunks(chunk) {
                reader.feed(bytes);
                while let Some(frame) = reader.next().expect("valid stream") {
                    assert!(frame.body.iter().all(|byte| *byte == frame.body.len() as u8));
                    lengths.push(frame.body.len());
                }
            }
            assert_eq!(vec![0, 1, 100, 1000], lengths, "chunks of {chunk}");
            assert!(!reader.has_partial_frame());
        }
    }

    #[test]
    fn buffer_handed_out_keeps_the_partial_frame_and_has_room_for_the_rest() {
        let mut stream = header(MessageType::Append, 1 << 20).expect("in bounds").to_vec();
        stream.resize(HEADER_BYTES + (1 << 20), 7);
        let mut reader = FrameReader::new();
        reader.feed(&stream[..100]);
        assert_eq!(Ok(None), reader.next());

        let mut buffer = reader.take_buffer(false);
        assert_eq!(&stream[..100], &buffer[..]);
        assert!(buffer.capacity() >= stream.len());
        buffer.extend_from_slice(&stream[100..]);
        reader.return_buffer(buffer);

        assert_eq!(1 << 20, reader.next().expect("valid").expect("whole").body.len());
    }

    #[test]
    fn idle_connection_holds_little_memory() {
        let mut reader = FrameReader::new();
        reader.feed(&[0; 100]);
        reader.buffer.clear();
        reader.buffer.reserve(1 << 20);
        reader.shrink();
        assert!(reader.take_buffer(true).capacity() <= 2 * IDLE_BYTES);
    }

    #[test]
    fn garbage_is_refused_at_its_first_header_and_for_ever() {
        let mut reader = FrameReader::new();
        reader.feed(b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(Err(WireError::HeaderChecksum), reader.next());
        reader.feed(&header(MessageType::Vote, 0).expect("in bounds"));
        assert_eq!(Err(WireError::HeaderChecksum), reader.next());
    }

    #[test]
    fn length_above_the_limit_of_its_type_is_refused_before_the_body_is_awaited() {
        for message in MessageType::ALL {
            let max = message.max_body_bytes();
            assert!(header(message, max.into()).is_ok());
            let too_long = WireError::TooLong { message: message as u8, length: u64::from(max) + 1, max };
            assert_eq!(Err(too_long.clone()), header(message, u64::from(max) + 1));

            let mut forged = [0; HEADER_BYTES];
            forged[..4].copy_from_slice(&(max + 1).to_le_bytes());
            forged[4] = message as u8;
            let checksum = crc32c(&forged[..8]);
            forged[8..].copy_from_slice(&checksum.to_le_bytes());
            let mut reader = FrameReader::new();
            reader.feed(&forged);
            assert_eq!(Err(too_long), reader.next());
        }
    }

    #[test]
    fn unknown_type_and_used_reserved_bytes_are_refused() {
        for (position, expected) in
            [(4, WireError::UnknownType(0x77)), (5, WireError::BadValue { field: "header.reserved" })]
        {
            let mut forged = header(MessageType::Vote, 0).expect("in bounds");
            forged[position] = 0x77;
            let checksum = crc32c(&forged[..8]);
            forged[8..].copy_from_slice(&checksum.to_le_bytes());
            let mut reader = FrameReader::new();
            reader.feed(&forged);
            assert_eq!(Err(expected), reader.next());
        }
    }
}
