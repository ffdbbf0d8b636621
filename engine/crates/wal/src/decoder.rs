//! Whole records out of a stream of WAL.

use alloc::vec::Vec;
use core::ops::ControlFlow;

use pgtypes::{FrameSummary, Lsn};

use crate::{
    RecordFault, RecordHeader, RecordInfo, Scanner, WalError,
    format::{RECORD_HEADER_BYTES, u32_at},
    record::{Layout, Record},
    scanner::Sink,
};

/// Collects and decodes records, one at a time.
///
/// Memory: the payload of one record, never more than was fed of it, and what its block references take.
#[derive(Debug)]
pub struct Decoder {
    scanner: Scanner,
    collector: Collector,
}

#[derive(Debug, Default)]
struct Collector {
    /// Which records are collected; all without it.
    wanted: Option<fn(&RecordHeader) -> bool>,
    /// The record in progress is.
    collects: bool,
    payload: Vec<u8>,
    payload_len: usize,
    layout: Option<Layout>,
    ready: Option<Record>,
}

impl Decoder {
    /// Continues where `scanner` stands.
    ///
    /// Records longer than `record_bytes_max` are refused like damaged ones; [`crate::RECORD_BYTES_MAX`] takes all that
    /// PostgreSQL writes.
    ///
    /// # Panics
    /// When the scanner stands inside a record, the first part of which is lost.
    pub fn new(scanner: Scanner, record_bytes_max: u32) -> Decoder {
        assert!(scanner.is_between_records(), "{} is inside a record", scanner.position());
        Decoder { scanner: scanner.with_record_bytes_max(record_bytes_max), collector: Collector::default() }
    }

    /// Also passes over records that `wanted` does not name by their headers: their checksums are verified and they count
    /// for [`Decoder::summary`], but they are neither kept nor returned, however long they are.
    #[must_use]
    pub fn wanting(mut self, wanted: fn(&RecordHeader) -> bool) -> Decoder {
        self.collector.wanted = Some(wanted);
        self
    }

    /// The next byte wanted.
    pub fn position(&self) -> Lsn {
        self.scanner.position()
    }

    /// What the complete records so far add up to, the one that [`Decoder::poll_record`] is going to return included.
    pub fn summary(&self) -> FrameSummary {
        self.scanner.summary()
    }

    /// Takes bytes at [`Decoder::position`] up to the end of a record that is wanted, and returns how many.
    ///
    /// Takes nothing while a record waits to be polled: `while n < bytes.len() { n += feed(..)?; poll_record() }`.
    ///
    /// # Errors
    /// As [`Scanner::feed`], and for records with a valid checksum that are not laid out as PostgreSQL 17 does.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, WalError> {
        if self.collector.ready.is_some() {
            return Ok(0);
        }
        self.scanner.feed_sink(bytes, &mut self.collector)
    }

    /// Bytes set aside for the record in progress.
    pub fn buffered_bytes(&self) -> usize {
        self.collector.payload.capacity()
    }

    /// The record that the last [`Decoder::feed`] completed.
    pub fn poll_record(&mut self) -> Option<Record> {
        self.collector.ready.take()
    }
}

impl Sink for Collector {
    fn begin(&mut self, header: &[u8; RECORD_HEADER_BYTES]) {
        self.collects = self.wanted.is_none_or(|wanted| wanted(&RecordHeader::parse(header)));
        self.payload.clear();
        self.payload_len = u32_at(header, 0) as usize - RECORD_HEADER_BYTES;
    }

    fn payload(&mut self, bytes: &[u8]) {
        if !self.collects {
            return;
        }
        let needed = self.payload.len() + bytes.len();
        if needed > self.payload.capacity() {
            // Doubling, because the announced length is not to be trusted before the checksum; but never beyond it.
            let capacity = needed.max(2 * self.payload.capacity()).min(self.payload_len.max(needed));
            self.payload.reserve_exact(capacity - self.payload.len());
        }
        self.payload.extend_from_slice(bytes);
    }

    fn broken_off(&mut self) {
        self.payload = Vec::new();
    }

    fn check(&mut self) -> Result<(), RecordFault> {
        if self.collects {
            self.layout = Some(Layout::parse(&self.payload)?);
        }
        Ok(())
    }

    fn end(&mut self, record: &RecordInfo) -> ControlFlow<()> {
        if !self.collects {
            return ControlFlow::Continue(());
        }
        let layout = self.layout.take().expect("a record is checked before it ends");
        let payload = core::mem::take(&mut self.payload);
        self.ready = Some(Record::assemble(*record, layout, payload));
        ControlFlow::Break(())
    }
}
