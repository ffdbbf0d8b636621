//! A disk that keeps what was synced and may lose, tear or spoil the rest.

use std::collections::BTreeMap;

use logstore::{Geometry, ReadFailed, SegmentReader};
use pgtypes::Lsn;

use crate::random::Random;

struct SegmentFile {
    /// What a reader sees.
    view: Vec<u8>,
    /// What a loss of power leaves for certain.
    durable: Vec<u8>,
}

struct Unsynced {
    number: u64,
    segment: Lsn,
    offset: usize,
    bytes: Vec<u8>,
}

/// The disk of one safekeeper, with the files of its one log.
pub struct Disk {
    geometry: Geometry,
    segments: BTreeMap<Lsn, SegmentFile>,
    unsynced: Vec<Unsynced>,
    next_number: u64,
    /// The copies of the control file. Written and synced at once, but torn by a crash in the middle.
    pub controls: [Option<Vec<u8>>; 2],
    /// Complete former segments that wait to be used again, with what they hold.
    spares: Vec<(Lsn, Vec<u8>)>,
    rotted: Vec<Lsn>,
}

impl Disk {
    /// An empty disk.
    pub fn new(geometry: Geometry) -> Disk {
        Disk {
            geometry,
            segments: BTreeMap::new(),
            unsynced: Vec::new(),
            next_number: 0,
            controls: [None, None],
            spares: Vec::new(),
            rotted: Vec::new(),
        }
    }

    fn file_bytes(&self) -> usize {
        self.geometry.segment_bytes as usize + logstore::TRAILER_BYTES as usize
    }

    /// A segment file of zeros, or a complete one of another start.
    pub fn take_segment(&mut self, start: Lsn) {
        let spare = self.spares.iter().position(|(former, _)| *former != start);
        let view = match spare {
            Some(at) => self.spares.swap_remove(at).1,
            None => vec![0; self.file_bytes()],
        };
        self.segments.insert(start, SegmentFile { durable: view.clone(), view });
    }

    /// Removes a file, durably.
    pub fn remove_segment(&mut self, start: Lsn, complete: bool) {
        self.unsynced.retain(|write| write.segment != start);
        if let Some(file) = self.segments.remove(&start)
            && complete
            && self.spares.len() < 2
        {
            self.spares.push((start, file.view));
        }
    }

    /// Writes without syncing. Returns whether the file exists.
    pub fn write(&mut self, segment: Lsn, offset: u64, bytes: &[u8]) -> bool {
        let Some(file) = self.segments.get_mut(&segment) else { return false };
        let offset = offset as usize;
        file.view[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.next_number += 1;
        self.unsynced.push(Unsynced { number: self.next_number, segment, offset, bytes: bytes.to_vec() });
        true
    }

    /// Writes durably, as with `O_DSYNC`: this write alone, not those before it, of which it replaces the bytes that it
    /// meets. Returns whether the file exists.
    pub fn write_durably(&mut self, segment: Lsn, offset: u64, bytes: &[u8]) -> bool {
        let Some(file) = self.segments.get_mut(&segment) else { return false };
        let place = offset as usize..offset as usize + bytes.len();
        file.view[place.clone()].copy_from_slice(bytes);
        file.durable[place.clone()].copy_from_slice(bytes);
        for write in std::mem::take(&mut self.unsynced) {
            if write.segment != segment {
                self.unsynced.push(write);
                continue;
            }
            let Unsynced { number, offset, bytes, .. } = write;
            let end = offset + bytes.len();
            for (from, to) in [(offset, end.min(place.start)), (offset.max(place.end), end)] {
                if from < to {
                    let bytes = bytes[from - offset..to - offset].to_vec();
                    self.unsynced.push(Unsynced { number, segment, offset: from, bytes });
                }
            }
        }
        true
    }

    /// Number of the last write: what a sync that begins now covers.
    pub fn last_write(&self) -> u64 {
        self.next_number
    }

    /// Makes writes to `first..=last` durable that are not later than the write `up_to`.
    pub fn sync(&mut self, first: Lsn, last: Lsn, up_to: u64) {
        let segments = &mut self.segments;
        self.unsynced.retain(|write| {
            let covered = write.number <= up_to && first <= write.segment && write.segment <= last;
            if covered && let Some(file) = segments.get_mut(&write.segment) {
                file.durable[write.offset..write.offset + write.bytes.len()].copy_from_slice(&write.bytes);
            }
            !covered
        });
    }

    /// Power is lost: each sector (512 or 4,096 bytes) of what was not synced is there or not.
    pub fn lose_power(&mut self, random: &mut Random) {
        let sector = if random.chance(50) { 512 } else { 4096 };
        // All, nothing, or some of what was under way.
        let kept_per_cent = *random.pick(&[0, 0, 50, 50, 100]);
        for write in std::mem::take(&mut self.unsynced) {
            let Some(file) = self.segments.get_mut(&write.segment) else { continue };
            for (i, bytes) in write.bytes.chunks(sector).enumerate() {
                if random.chance(kept_per_cent) {
                    let at = write.offset + i * sector;
                    file.durable[at..at + bytes.len()].copy_from_slice(bytes);
                }
            }
        }
        for file in self.segments.values_mut() {
            file.view.copy_from_slice(&file.durable);
        }
    }

    /// Flips a bit of a stored segment's data. Returns whether it exists.
    pub fn rot(&mut self, segment: Lsn, random: &mut Random) -> bool {
        let at = random.below(self.geometry.segment_bytes) as usize;
        let bit = 1 << random.below(8);
        let Some(file) = self.segments.get_mut(&segment) else { return false };
        file.view[at] ^= bit;
        file.durable[at] ^= bit;
        self.rotted.push(segment);
        true
    }

    /// Whether a bit of the segment flipped at some time.
    pub fn has_rotted(&self, segment: Lsn) -> bool {
        self.rotted.contains(&segment)
    }

    /// The bytes of one file from `offset` on.
    pub fn bytes(&self, segment: Lsn, offset: u64, length: usize) -> Option<&[u8]> {
        self.segments.get(&segment)?.view.get(offset as usize..offset as usize + length)
    }
}

impl SegmentReader for Disk {
    fn starts(&mut self) -> Result<Vec<Lsn>, ReadFailed> {
        Ok(self.segments.keys().copied().collect())
    }

    fn read(&mut self, start: Lsn, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailed> {
        buffer.copy_from_slice(self.bytes(start, offset, buffer.len()).ok_or(ReadFailed)?);
        Ok(())
    }
}
