//! What a log asks of its shell, and what the shell answers.

use alloc::vec::Vec;
use core::fmt;

use consensus::{CatchUpTask, ConfigurationError, FenceAccepted, message::AcceptorMessage, message::Refused};
use pgtypes::{Generation, Lsn};

use crate::buffer::Buffer;

/// Names one disk operation of one log; each is reported back exactly once by [`crate::Log::handle_done`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// What the shell has to do. Operations may be carried out side by side and may end in any order.
pub enum LogCommand {
    /// Send the message on the connection, if it still exists.
    Reply {
        /// As handed in with the request.
        connection: u64,
        /// To be sent.
        message: AcceptorMessage,
    },
    /// Answer a fence.
    ReplyFence {
        /// As handed in.
        request: u64,
        /// The outcome.
        result: Result<FenceAccepted, Refused>,
    },
    /// Answer a change of the membership.
    ReplyConfiguration {
        /// As handed in.
        request: u64,
        /// The outcome.
        result: Result<Generation, ConfigurationError>,
    },
    /// Ask the members of the configuration for their ballots and hand each to [`crate::Log::handle_peer_ballot`].
    AskPeers,
    /// Fetch WAL from a donor and hand it to [`crate::Log::handle_fetched`]. Replaces an earlier one.
    CatchUp(CatchUpTask),
    /// Give the log the segment file that starts at `start`, durably (directory synced).
    ///
    /// Every byte of the file is zero, or the file was a complete segment of *another* start: what it holds then
    /// cannot be taken for this log's WAL, because each page of it carries its own address. A file that held this
    /// start before, or was never complete, must be zeroed: its old records could continue the new ones.
    TakeSegment {
        /// Answered with [`OpResult::Done`] or [`OpResult::NoSpace`].
        op: OpId,
        /// A multiple of the segment size.
        start: Lsn,
    },
    /// Write whole blocks.
    Write {
        /// Answered with [`OpResult::Written`] or [`OpResult::NoSpace`].
        op: OpId,
        /// Which file.
        segment: Lsn,
        /// Where in it, a multiple of 4 KiB.
        offset: u64,
        /// To be given back.
        buffer: Buffer,
        /// Report it as written when it is durable (`O_DSYNC`); else it is durable after the next sync only.
        durable: bool,
    },
    /// Read whole blocks.
    Read {
        /// Answered with [`OpResult::Read`].
        op: OpId,
        /// Which file.
        segment: Lsn,
        /// Where in it, a multiple of 4 KiB.
        offset: u64,
        /// To be filled.
        buffer: Buffer,
    },
    /// Make all writes to the segment files `first..=last` durable that have been reported as written.
    Sync {
        /// Answered with [`OpResult::Done`].
        op: OpId,
        /// First file.
        first: Lsn,
        /// Last file, mostly the same one.
        last: Lsn,
    },
    /// Remove the segment file, durably (directory synced).
    RemoveSegment {
        /// Answered with [`OpResult::Done`].
        op: OpId,
        /// Which file.
        start: Lsn,
        /// All of it was written as this segment: the file may become a spare for another start without being zeroed.
        complete: bool,
    },
    /// Replace the contents of a copy of the control file and make it durable.
    WriteControl {
        /// Answered with [`OpResult::Written`] or [`OpResult::NoSpace`].
        op: OpId,
        /// 0 or 1.
        copy: u8,
        /// From the start of the file.
        buffer: Buffer,
    },
}

impl fmt::Debug for LogCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogCommand::Reply { connection, message } => write!(f, "Reply({connection}, {message:?})"),
            LogCommand::ReplyFence { request, result } => write!(f, "ReplyFence({request}, {result:?})"),
            LogCommand::ReplyConfiguration { request, result } => {
                write!(f, "ReplyConfiguration({request}, {result:?})")
            }
            LogCommand::AskPeers => f.write_str("AskPeers"),
            LogCommand::CatchUp(task) => write!(f, "{task:?}"),
            LogCommand::TakeSegment { op, start } => write!(f, "TakeSegment({}, {start})", op.0),
            LogCommand::Write { op, segment, offset, buffer, durable } => {
                write!(f, "Write({}, {segment} + {offset}, {}, durable {durable})", op.0, buffer.len())
            }
            LogCommand::Read { op, segment, offset, buffer } => {
                write!(f, "Read({}, {segment} + {offset}, {})", op.0, buffer.len())
            }
            LogCommand::Sync { op, first, last } => write!(f, "Sync({}, {first}..={last})", op.0),
            LogCommand::RemoveSegment { op, start, complete } => {
                write!(f, "RemoveSegment({}, {start}, complete {complete})", op.0)
            }
            LogCommand::WriteControl { op, copy, buffer } => {
                write!(f, "WriteControl({}, copy {copy}, {})", op.0, buffer.len())
            }
        }
    }
}

/// How a disk operation ended.
#[derive(Debug)]
pub enum OpResult {
    /// Taken, synced or removed.
    Done,
    /// All of the buffer was written (and, of a control file, made durable).
    Written(Buffer),
    /// All of the buffer was filled.
    Read(Buffer),
    /// The disk keeps its headroom, or is full: the log tries again later. A write hands its buffer back.
    NoSpace(Option<Buffer>),
    /// Anything else. The log takes part in nothing any more until the process starts again: what the disk holds is
    /// unknown, and a second sync would succeed without having written what the first one lost.
    Failed,
}

/// Reads segment files while a log recovers, before anything else happens.
pub trait SegmentReader {
    /// Starts of all segment files of the log, in any order.
    ///
    /// # Errors
    /// The directory cannot be read.
    fn starts(&mut self) -> Result<Vec<Lsn>, ReadFailed>;

    /// Fills `buffer` from `offset` of the segment file; both are whole blocks.
    ///
    /// # Errors
    /// The file cannot be read there.
    fn read(&mut self, start: Lsn, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailed>;
}

/// A file or directory could not be read; the shell has logged why.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a segment file or the directory of segments cannot be read")]
pub struct ReadFailed;
