//! All messages of the protocol, and their way to bytes and back.

use alloc::{string::String, vec::Vec};

use consensus::message::{AcceptorMessage, ProposerMessage};
use pgtypes::{Ballot, Lsn, WriterId};

use super::{
    FeedBatch, FeedProgress, Frame, HEADER_BYTES, Hello, MAX_APPEND_BYTES, MessageType, WireError,
    consensus_codec::{
        put_acceptor_message, put_ballot, put_lsn, put_proposer_message, take_acceptor_message, take_ballot, take_lsn,
        take_proposer_message,
    },
    frame::header,
};
use crate::bytes::{Put, Taker};

/// Any message. WAL and items are borrowed: from the frame when decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message<'a> {
    /// The greeting.
    Hello(Hello),
    /// From a proposer. The second part is the WAL of an append, exactly `end_lsn - begin_lsn` bytes; empty for all
    /// other messages.
    Proposer(ProposerMessage, &'a [u8]),
    /// From an acceptor.
    Acceptor(AcceptorMessage),
    /// A peer wants WAL.
    FetchWal(FetchWal),
    /// A peer wants the ballot.
    AskBallot,
    /// WAL for a peer or a reader.
    WalData(WalData<'a>),
    /// The ballot for a peer.
    BallotAnswer(BallotAnswer),
    /// A page server's progress.
    FeedProgress(FeedProgress),
    /// A batch for a shard, or the beginning of one.
    FeedBatch(FeedBatch<'a>),
    /// More of the items of a batch.
    FeedItems(&'a [u8]),
    /// Why the sender closes the connection.
    Error(ErrorFrame),
}

/// A peer's request for `[begin_lsn, end_lsn)`. Answered by one [`WalData`] of 1 to 1 MiB bytes from `begin_lsn` on, or
/// by an error frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchWal {
    /// First byte wanted.
    pub begin_lsn: Lsn,
    /// Behind the last byte wanted.
    pub end_lsn: Lsn,
    /// The donor's own last elected ballot must be this one for bytes beyond its `commit_lsn`.
    pub ballot: Ballot,
}

/// WAL from `begin_lsn` on. Without bytes it is a heartbeat that tells `commit_lsn` to a reader.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalData<'a> {
    /// Position of the first byte.
    pub begin_lsn: Lsn,
    /// Committed, as far as the sender knows.
    pub commit_lsn: Lsn,
    /// At most 1 MiB.
    pub bytes: &'a [u8],
}

/// What a peer needs to adopt a fence that it missed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BallotAnswer {
    /// The highest ballot it was fenced to or voted for.
    pub ballot: Ballot,
    /// To whom that term was granted.
    pub writer: WriterId,
}

/// The last frame before the sender closes the connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ErrorFrame {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub text: String,
}

/// Causes of an [`ErrorFrame`]. The number is the one on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorCode {
    /// Bytes that are no message, or a message that may not come here.
    BadMessage,
    /// Other protocol version.
    WrongVersion,
    /// No such log on this safekeeper.
    UnknownLog,
    /// The log belongs to another PostgreSQL cluster (`system_identifier`).
    WrongSystem,
    /// The certificate does not allow this.
    NotAllowed,
    /// Too many connections; try again later.
    Busy,
    /// The WAL wanted is not here: removed, not yet written, or not to be served to this peer.
    WalNotAvailable,
    /// The WAL wanted is damaged here; ask another member.
    WalDamaged,
    /// The process is stopping.
    Stopping,
    /// A fault of this safekeeper; its log says more.
    Internal,
    /// The shard has a newer owner.
    StaleGeneration,
    /// A code of a later version.
    Other(u16),
}

impl ErrorCode {
    const KNOWN: [(u16, ErrorCode); 11] = [
        (1, ErrorCode::BadMessage),
        (2, ErrorCode::WrongVersion),
        (3, ErrorCode::UnknownLog),
        (4, ErrorCode::WrongSystem),
        (5, ErrorCode::NotAllowed),
        (6, ErrorCode::Busy),
        (7, ErrorCode::WalNotAvailable),
        (8, ErrorCode::WalDamaged),
        (9, ErrorCode::Stopping),
        (10, ErrorCode::Internal),
        (11, ErrorCode::StaleGeneration),
    ];

    fn number(self) -> u16 {
        match self {
            ErrorCode::Other(number) => number,
            known => Self::KNOWN.iter().find(|(_, code)| *code == known).map_or(0, |(number, _)| *number),
        }
    }

    fn from_number(number: u16) -> Self {
        Self::KNOWN.iter().find(|(known, _)| *known == number).map_or(ErrorCode::Other(number), |(_, code)| *code)
    }
}

impl Message<'_> {
    /// The type of frame that carries this message.
    pub fn message_type(&self) -> MessageType {
        match self {
            Message::Hello(_) => MessageType::Hello,
            Message::Proposer(message, _) => match message {
                ProposerMessage::Vote(_) => MessageType::Vote,
                ProposerMessage::Elected(_) => MessageType::Elected,
                ProposerMessage::Append(_) => MessageType::Append,
                ProposerMessage::CatchUp(_) => MessageType::CatchUp,
            },
            Message::Acceptor(message) => match message {
                AcceptorMessage::Status(_) => MessageType::Status,
                AcceptorMessage::Voted(_) => MessageType::Voted,
                AcceptorMessage::ElectedAccepted(_) => MessageType::ElectedAccepted,
                AcceptorMessage::Appended(_) => MessageType::Appended,
                AcceptorMessage::Refused(_) => MessageType::Refused,
            },
            Message::FetchWal(_) => MessageType::FetchWal,
            Message::AskBallot => MessageType::AskBallot,
            Message::WalData(_) => MessageType::WalData,
            Message::BallotAnswer(_) => MessageType::BallotAnswer,
            Message::FeedProgress(_) => MessageType::FeedProgress,
            Message::FeedBatch(_) => MessageType::FeedBatch,
            Message::FeedItems(_) => MessageType::FeedItems,
            Message::Error(_) => MessageType::Error,
        }
    }
}

/// Appends the frame of `message` to `out`, *without* the WAL or items that it carries: send that right behind (one vectored
/// write), so that it is not copied. `out` is unchanged on error.
///
/// # Errors
/// The caller's fault: [`WireError::TooLong`] for a message above the limit of its type, [`WireError::BadValue`] for an
/// append whose bytes are not as many as its positions say.
pub fn encode(message: &Message<'_>, out: &mut Vec<u8>) -> Result<(), WireError> {
    let start = out.len();
    out.put(&[0; HEADER_BYTES]);
    let payload = put_body(message, out);
    let framed = payload.and_then(|payload| {
        let length = (out.len() - start - HEADER_BYTES) as u64 + payload.len() as u64;
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

/// The whole frame of `message`, WAL included.
///
/// # Errors
/// As [`encode`].
pub fn encode_to_vec(message: &Message<'_>) -> Result<Vec<u8>, WireError> {
    let mut out = Vec::new();
    encode(message, &mut out)?;
    match message {
        Message::Proposer(_, payload) => out.put(payload),
        Message::WalData(data) => out.put(data.bytes),
        Message::FeedBatch(batch) => out.put(batch.items),
        Message::FeedItems(items) => out.put(items),
        _ => {}
    }
    Ok(out)
}

fn put_body<'a>(message: &Message<'a>, body: &mut Vec<u8>) -> Result<&'a [u8], WireError> {
    match message {
        Message::Hello(hello) => hello.put(body),
        Message::Proposer(message, payload) => {
            check_payload(message, payload)?;
            put_proposer_message(body, message);
            return Ok(payload);
        }
        Message::Acceptor(message) => put_acceptor_message(body, message),
        Message::FetchWal(fetch) => {
            put_lsn(body, fetch.begin_lsn);
            put_lsn(body, fetch.end_lsn);
            put_ballot(body, fetch.ballot);
        }
        Message::AskBallot => {}
        Message::WalData(data) => {
            check_wal_length(data.bytes)?;
            put_lsn(body, data.begin_lsn);
            put_lsn(body, data.commit_lsn);
            return Ok(data.bytes);
        }
        Message::BallotAnswer(answer) => {
            put_ballot(body, answer.ballot);
            body.put(&answer.writer.0);
        }
        Message::FeedProgress(progress) => progress.put(body),
        Message::FeedBatch(batch) => return batch.put(body),
        Message::FeedItems(items) => {
            check_wal_length(items)?;
            return Ok(items);
        }
        Message::Error(error) => {
            body.put_u16(error.code.number());
            body.put_text(&error.text);
        }
    }
    Ok(&[])
}

/// What a frame says.
///
/// # Errors
/// The peer's fault: see [`WireError`].
pub fn decode(frame: Frame<'_>) -> Result<Message<'_>, WireError> {
    let mut fields = Taker::new(frame.body);
    let message = match frame.message {
        MessageType::Hello => Message::Hello(Hello::take(&mut fields)?),
        MessageType::Vote | MessageType::Elected | MessageType::Append | MessageType::CatchUp => {
            let message = take_proposer_message(&mut fields, frame.message)?;
            let payload = if let ProposerMessage::Append(_) = message { fields.rest() } else { &[] };
            check_payload(&message, payload)?;
            Message::Proposer(message, payload)
        }
        MessageType::Status
        | MessageType::Voted
        | MessageType::ElectedAccepted
        | MessageType::Appended
        | MessageType::Refused => Message::Acceptor(take_acceptor_message(&mut fields, frame.message)?),
        MessageType::FetchWal => {
            let begin_lsn = take_lsn(&mut fields, "begin_lsn")?;
            let end_lsn = take_lsn(&mut fields, "end_lsn")?;
            if end_lsn <= begin_lsn {
                return Err(WireError::BadValue { field: "end_lsn" });
            }
            Message::FetchWal(FetchWal { begin_lsn, end_lsn, ballot: take_ballot(&mut fields, "ballot")? })
        }
        MessageType::AskBallot => Message::AskBallot,
        MessageType::WalData => {
            let begin_lsn = take_lsn(&mut fields, "begin_lsn")?;
            let commit_lsn = take_lsn(&mut fields, "commit_lsn")?;
            let bytes = fields.rest();
            check_wal_length(bytes)?;
            Message::WalData(WalData { begin_lsn, commit_lsn, bytes })
        }
        MessageType::BallotAnswer => Message::BallotAnswer(BallotAnswer {
            ballot: take_ballot(&mut fields, "ballot")?,
            writer: WriterId(fields.array("writer")?),
        }),
        MessageType::FeedProgress => Message::FeedProgress(FeedProgress::take(&mut fields)?),
        MessageType::FeedBatch => Message::FeedBatch(FeedBatch::take(&mut fields)?),
        MessageType::FeedItems => {
            let items = fields.rest();
            check_wal_length(items)?;
            Message::FeedItems(items)
        }
        MessageType::Error => {
            let code = ErrorCode::from_number(fields.u16("code")?);
            Message::Error(ErrorFrame { code, text: fields.text("text")? })
        }
    };
    fields.end()?;
    Ok(message)
}

/// An append carries as many bytes as its positions say, other messages none.
fn check_payload(message: &ProposerMessage, payload: &[u8]) -> Result<(), WireError> {
    check_wal_length(payload)?;
    let expected = match message {
        ProposerMessage::Append(append) => {
            append.end_lsn.0.checked_sub(append.begin_lsn.0).ok_or(WireError::BadValue { field: "append.end_lsn" })?
        }
        ProposerMessage::Vote(_) | ProposerMessage::Elected(_) | ProposerMessage::CatchUp(_) => 0,
    };
    if expected == payload.len() as u64 { Ok(()) } else { Err(WireError::BadValue { field: "append.end_lsn" }) }
}

pub(super) fn check_wal_length(bytes: &[u8]) -> Result<(), WireError> {
    if bytes.len() > MAX_APPEND_BYTES as usize { Err(WireError::BadValue { field: "wal" }) } else { Ok(()) }
}
