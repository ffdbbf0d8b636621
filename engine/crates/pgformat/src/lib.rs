//! Files of PostgreSQL 17 that are not WAL: `pg_control`, timeline history files, the names of WAL segments, and checksums of pages.
//!
//! Knows nothing about paths or disks: bytes in, bytes out. The layout is that of a little-endian PostgreSQL
//! (x86-64, aarch64). Read next: `control.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod bytes;
mod checkpoint;
mod control;
mod history;
mod page_checksum;
mod segment_name;

pub use checkpoint::{CHECKPOINT_BYTES, CheckPoint, WalLevel};
pub use control::{
    CONTROL_DATA_BYTES, CONTROL_FILE_BYTES, CONTROL_VERSION, ControlError, ControlFile, DatabaseState, ServerSettings,
};
pub use history::{
    HISTORY_FILE_BYTES_MAX, HistoryEntry, HistoryError, HistoryFault, HistoryFile, child_history_file,
    history_file_name, parse_history_file_name,
};
pub use page_checksum::{PAGE_BYTES, is_new_page, is_page_sound, page_checksum, set_page_checksum};
pub use segment_name::{parse_segment_file_name, segment_file_name};
