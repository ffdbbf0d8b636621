//! One log of a safekeeper as one pure machine: the acceptor, the WAL on its way to the disk, segments, control file.
//!
//! No clocks, files, sockets or threads: requests come in through `handle_*`, everything to do comes out of
//! [`Log::poll_command`], disk operations with a number by which [`Log::handle_done`] reports them. Formats:
//! `docs/formats/control-file.md`, `docs/formats/wal-segments.md`. Read `log.rs` first.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod buffer;
mod command;
mod control;
mod control_writer;
mod log;
mod planner;
mod recovery;
mod segment;
mod segment_list;
mod shards;
mod truncation;

pub use buffer::{Buffer, WRITE_BYTES_MAX};
pub use command::{LogCommand, OpId, OpResult, ReadFailed, SegmentReader};
pub use control::{
    CONSUMER_NAME_BYTES_MAX, CONSUMERS_MAX, CONTROL_BYTES_MAX, ChosenCopy, Consumer, ControlError, ControlFile,
    choose_copy,
};
pub use log::{APPEND_BYTES_MAX, ConsumerError, Log, LogStatus, ReadError, Reader, UNDURABLE_BYTES_MAX};
pub use planner::WRITES_IN_FLIGHT_MAX;
pub use recovery::{RecoverError, Recovered};
pub use segment::{
    BLOCK_BYTES, Geometry, SEGMENT_BYTES, SEGMENT_FILE_BYTES, SegmentError, SegmentVerifier, TRAILER_BYTES, Trailer,
    parse_segment_file_name, segment_file_name, verify_segment,
};
pub use segment_list::SegmentView;
pub use shards::{SHARDS_MAX, Shard, ShardError};
