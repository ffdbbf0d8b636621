//! Lays records out on pages, as PostgreSQL's `CopyXLogRecordToWAL` does.
//!
//! For logs that are made up in tests and simulations, and for the few records that the engine itself has to write.

use alloc::vec::Vec;

use pgtypes::{Lsn, PgTimeline, SystemId};

use crate::{
    crc32c,
    facts::part_id,
    format::{
        LongPageHeader, PAGE_BYTES, PAGE_MAGIC, PageHeader, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader,
        page_flags, rmgr, segment_bytes_valid, xlog_info,
    },
};

/// A record to be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RecordSpec<'a> {
    /// Resource manager.
    pub rmgr: u8,
    /// `xl_info`.
    pub info: u8,
    /// Transaction, 0 for none.
    pub xid: u32,
    /// Everything behind the record header; [`main_data`] makes one without block references.
    pub payload: &'a [u8],
}

/// Writes WAL into memory from a given position on.
#[derive(Clone, Debug)]
pub struct WalWriter {
    segment_bytes: u64,
    system_id: SystemId,
    timeline: PgTimeline,
    start: Lsn,
    last_record: Lsn,
    bytes: Vec<u8>,
}

impl WalWriter {
    /// Starts at `lsn`, behind the record that starts at `last_record`.
    ///
    /// # Panics
    /// When `segment_bytes` is no valid segment size or `lsn` is not aligned to 8 bytes.
    pub fn new(lsn: Lsn, last_record: Lsn, segment_bytes: u64, system_id: SystemId, timeline: PgTimeline) -> WalWriter {
        assert!(segment_bytes_valid(segment_bytes), "{segment_bytes} is no segment size");
        assert!(lsn.offset_in(8) == 0, "{lsn} is no end of a record");
        WalWriter { segment_bytes, system_id, timeline, start: lsn, last_record, bytes: Vec::new() }
    }

    /// Where the next byte goes: a record end, before the header of the next page.
    pub fn position(&self) -> Lsn {
        self.start.advance(self.bytes.len() as u64)
    }

    /// Start of the last record.
    pub fn last_record(&self) -> Lsn {
        self.last_record
    }

    /// Everything written since [`WalWriter::new`].
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Gives up the bytes; the next ones continue behind them.
    pub fn take_bytes(&mut self) -> Vec<u8> {
        self.start = self.position();
        core::mem::take(&mut self.bytes)
    }

    /// Pages that are begun from here on are of this timeline.
    pub fn set_timeline(&mut self, timeline: PgTimeline) {
        self.timeline = timeline;
    }

    /// Appends a record; returns where it starts and ends.
    ///
    /// # Panics
    /// When it is longer than PostgreSQL allows.
    pub fn append(&mut self, record: RecordSpec<'_>) -> (Lsn, Lsn) {
        let header = RecordHeader {
            total_len: u32::try_from(record.payload.len() + RECORD_HEADER_BYTES).unwrap_or(u32::MAX),
            xid: record.xid,
            prev: self.last_record,
            info: record.info,
            rmgr: record.rmgr,
            crc: 0,
        };
        assert!(header.total_len <= RECORD_BYTES_MAX, "record of {} bytes is too long", header.total_len);
        let mut header_bytes = header.to_bytes();
        let crc = crc32c(crc32c(0, record.payload), &header_bytes[..RecordHeader::CRC_OFFSET]);
        header_bytes[RecordHeader::CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());

        self.begin_page_if_at_its_start(0, 0);
        let record_start = self.position();
        self.put(&header_bytes, header.total_len);
        self.put(record.payload, header.total_len - RECORD_HEADER_BYTES as u32);
        let padding = self.position().align8().bytes_since(self.position());
        self.zeros(padding);
        if header.is_switch() {
            let offset = self.position().offset_in(self.segment_bytes);
            self.zeros(if offset == 0 { 0 } else { self.segment_bytes - offset });
        }
        self.last_record = record_start;
        (record_start, self.position())
    }

    /// Appends `XLOG_SWITCH`, unless the position is a segment's start already.
    pub fn switch_segment(&mut self) {
        if self.position().offset_in(self.segment_bytes) != 0 {
            self.append(RecordSpec { rmgr: rmgr::XLOG, info: xlog_info::SWITCH, xid: 0, payload: &[] });
        }
    }

    /// Drops everything from the last page boundary on, as a crash does that finds the page unwritten, and begins the
    /// page anew with the record that PostgreSQL writes then (`CreateOverwriteContrecordRecord`).
    ///
    /// `before`: start of the last complete record in front of the one that is broken off.
    ///
    /// # Panics
    /// When the last page boundary is not inside the last record.
    pub fn break_off_last_record(&mut self, before: Lsn) {
        let broken_off = self.last_record;
        let page = self.position().floor(PAGE_BYTES);
        assert!(broken_off < page && page < self.position(), "no page boundary in the record at {broken_off}");
        self.bytes.truncate(page.bytes_since(self.start) as usize);
        self.last_record = before;
        self.begin_page_if_at_its_start(page_flags::FIRST_IS_OVERWRITE_CONTRECORD, 0);
        let mut data = Vec::from(broken_off.0.to_le_bytes());
        data.extend_from_slice(&[0; 8]);
        let payload = main_data(&data);
        self.append(RecordSpec { rmgr: rmgr::XLOG, info: xlog_info::OVERWRITE_CONTRECORD, xid: 0, payload: &payload });
    }

    fn begin_page_if_at_its_start(&mut self, flags: u16, remaining_bytes: u32) {
        let page = self.position();
        if page.offset_in(PAGE_BYTES) != 0 {
            return;
        }
        let starts_segment = page.offset_in(self.segment_bytes) == 0;
        let long = starts_segment.then_some(LongPageHeader {
            system_id: self.system_id,
            segment_bytes: self.segment_bytes as u32,
            page_bytes: PAGE_BYTES as u32,
        });
        let long_flag = if starts_segment { page_flags::LONG_HEADER } else { 0 };
        let timeline = self.timeline;
        PageHeader { magic: PAGE_MAGIC, flags: flags | long_flag, timeline, address: page, remaining_bytes, long }
            .write(&mut self.bytes);
    }

    /// Writes a part of a record of which `remaining` bytes, these included, are left.
    fn put(&mut self, mut bytes: &[u8], mut remaining: u32) {
        while !bytes.is_empty() {
            self.begin_page_if_at_its_start(page_flags::FIRST_IS_CONTRECORD, remaining);
            let room = PAGE_BYTES - self.position().offset_in(PAGE_BYTES);
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            self.bytes.extend_from_slice(now);
            remaining -= now.len() as u32;
            bytes = later;
        }
    }

    fn zeros(&mut self, count: u64) {
        self.bytes.resize(self.bytes.len() + count as usize, 0);
    }
}

/// A record's payload that consists of `data` alone, without block references.
pub fn main_data(data: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(data.len() + 5);
    match u8::try_from(data.len()) {
        Ok(0) => {}
        Ok(length) => payload.extend_from_slice(&[part_id::DATA_SHORT, length]),
        Err(_) => {
            payload.push(part_id::DATA_LONG);
            payload.extend_from_slice(&(data.len() as u32).to_le_bytes());
        }
    }
    payload.extend_from_slice(data);
    payload
}
