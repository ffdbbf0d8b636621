//! The control file: everything of a log that is not WAL. Layout: `docs/formats/control-file.md`.
//!
//! Knows nothing about when it is written. Two copies exist, always written one after the other, so that a crash in
//! the middle of one leaves the other.

use alloc::{string::String, vec::Vec};

use consensus::{
    AcceptorIdentity, AcceptorState, Configuration, Member, TermEntry, TermHistory, TimelineHistory,
    message::TimelineEntry,
};
use layers::{ShardGeneration, ShardId};
use pgtypes::{
    Attempt, Ballot, BranchId, ClusterId, DiskId, FrameSummary, Generation, Incarnation, LogId, Lsn, MemberId,
    PgTimeline, SystemId, Term, WriterId,
};
use thiserror::Error;

use crate::{
    segment::BLOCK_BYTES,
    shards::{SHARDS_MAX, Shard},
};

/// Largest control file: a history of about 100,000 elections and promotions.
pub const CONTROL_BYTES_MAX: usize = 16 << 20;

/// Most consumers of one log.
pub const CONSUMERS_MAX: usize = 256;

/// Longest name of a consumer: PostgreSQL's `NAMEDATALEN` for slots.
pub const CONSUMER_NAME_BYTES_MAX: usize = 64;

const MAGIC: [u8; 8] = *b"LBLOGCTL";
/// Without shards. Still written where there are none, so that an earlier program can go on with the log.
const VERSION_WITHOUT_SHARDS: u32 = 1;
const VERSION: u32 = 2;
/// Bytes of a shard: number, generation, position.
const SHARD_BYTES: usize = 20;
/// Magic, version, length, sequence.
const HEADER_BYTES: usize = 24;
const CRC_BYTES: usize = 4;

/// Someone who follows the log and for whom WAL is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Consumer {
    /// Name of its slot.
    pub name: String,
    /// It needs nothing below.
    pub confirmed_lsn: Lsn,
}

/// Contents of a control file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControlFile {
    /// Raised at each write; of two valid copies the higher one counts.
    pub sequence: u64,
    /// What never changes.
    pub identity: AcceptorIdentity,
    /// Bytes of WAL in one of the safekeeper's own segments.
    pub store_segment_bytes: u64,
    /// What the acceptor must not forget.
    pub acceptor: AcceptorState,
    /// A durable, committed record end: the scan for the end of the log starts here.
    pub scan_start: FrameSummary,
    /// First position still held.
    pub oldest_lsn: Lsn,
    /// Segments that end at or below have a trailer.
    pub sealed_lsn: Lsn,
    /// Sorted by name.
    pub consumers: Vec<Consumer>,
    /// Sorted by number. Empty in version 1.
    pub shards: Vec<Shard>,
}

/// Why a copy of a control file is not usable.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ControlError {
    /// Not a control file, or a torn or damaged one.
    #[error("not a control file, or a damaged one")]
    Damaged,
    /// The format of another version of this program.
    #[error("control file has format version {0}, this program knows 1 and 2")]
    Version(u32),
    /// The checksum matches but the contents contradict themselves.
    #[error("control file contradicts itself: {0}")]
    Invalid(&'static str),
}

impl ControlFile {
    /// The bytes of the file, without padding.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        out.extend_from_slice(&MAGIC);
        put_u32(&mut out, if self.shards.is_empty() { VERSION_WITHOUT_SHARDS } else { VERSION });
        put_u32(&mut out, 0);
        put_u64(&mut out, self.sequence);

        let identity = &self.identity;
        out.extend_from_slice(&identity.log.cluster.0);
        out.extend_from_slice(&identity.log.branch.0);
        put_u64(&mut out, identity.system.0);
        put_u32(&mut out, identity.member.0);
        out.extend_from_slice(&identity.disk.0);
        put_u64(&mut out, identity.segment_bytes);
        put_u64(&mut out, self.store_segment_bytes);
        put_summary(&mut out, &identity.start);

        put_summary(&mut out, &self.scan_start);
        put_u64(&mut out, self.oldest_lsn.0);
        put_u64(&mut out, self.sealed_lsn.0);

        let acceptor = &self.acceptor;
        put_ballot(&mut out, acceptor.ballot);
        out.extend_from_slice(&acceptor.writer.0);
        out.extend_from_slice(&acceptor.incarnation.0);
        put_ballot(&mut out, acceptor.elected);
        put_u64(&mut out, acceptor.commit_lsn.0);
        put_u32(&mut out, acceptor.commit_generation.0);
        put_configuration(&mut out, &acceptor.configuration);
        put_count(&mut out, acceptor.history.0.len());
        for entry in &acceptor.history.0 {
            put_ballot(&mut out, entry.ballot);
            put_u64(&mut out, entry.start_lsn.0);
        }
        put_count(&mut out, acceptor.timelines.0.len());
        let mut before: &[u8] = &[];
        for entry in &acceptor.timelines.0 {
            // PostgreSQL copies the parent's history file and adds a line: stored as is, they would grow with the square.
            let shared = before.iter().zip(&entry.history_file).take_while(|(a, b)| a == b).count();
            put_u32(&mut out, entry.timeline.0);
            put_u64(&mut out, entry.start_lsn.0);
            put_count(&mut out, shared);
            put_count(&mut out, entry.history_file.len() - shared);
            out.extend_from_slice(&entry.history_file[shared..]);
            before = &entry.history_file;
        }
        put_count(&mut out, self.consumers.len());
        for consumer in &self.consumers {
            put_text(&mut out, &consumer.name);
            put_u64(&mut out, consumer.confirmed_lsn.0);
        }
        if !self.shards.is_empty() {
            put_count(&mut out, self.shards.len());
            for shard in &self.shards {
                put_u32(&mut out, shard.shard.0);
                put_u64(&mut out, shard.generation.0);
                put_u64(&mut out, shard.durable_lsn.0);
            }
        }

        let length = (out.len() + CRC_BYTES) as u32;
        out[12..16].copy_from_slice(&length.to_le_bytes());
        let crc = wal::crc32c(0, &out);
        put_u32(&mut out, crc);
        out
    }

    /// Reads one copy; bytes behind it are padding.
    ///
    /// # Errors
    /// [`ControlError`]; nothing of the copy may be used then.
    pub fn decode(bytes: &[u8]) -> Result<ControlFile, ControlError> {
        let header = bytes.get(..HEADER_BYTES).ok_or(ControlError::Damaged)?;
        if header[..8] != MAGIC {
            return Err(ControlError::Damaged);
        }
        let mut input = Input { rest: &header[8..] };
        let version = input.u32()?;
        let length = input.u32()? as usize;
        let sequence = input.u64()?;
        if !(HEADER_BYTES + CRC_BYTES..=CONTROL_BYTES_MAX).contains(&length) || length > bytes.len() {
            return Err(ControlError::Damaged);
        }
        let (checked, crc) = bytes[..length].split_at(length - CRC_BYTES);
        if wal::crc32c(0, checked).to_le_bytes() != crc {
            return Err(ControlError::Damaged);
        }
        if !(VERSION_WITHOUT_SHARDS..=VERSION).contains(&version) {
            return Err(ControlError::Version(version));
        }
        let mut input = Input { rest: &checked[HEADER_BYTES..] };

        let log = LogId { cluster: ClusterId(input.id()?), branch: BranchId(input.id()?) };
        let system = SystemId(input.u64()?);
        let member = MemberId(input.u32()?);
        let disk = DiskId(input.id()?);
        let segment_bytes = input.u64()?;
        let store_segment_bytes = input.u64()?;
        let start = input.summary()?;
        let identity = AcceptorIdentity { log, system, member, disk, segment_bytes, start };
        let scan_start = input.summary()?;
        let (oldest_lsn, sealed_lsn) = (Lsn(input.u64()?), Lsn(input.u64()?));
        let acceptor = AcceptorState {
            ballot: input.ballot()?,
            writer: WriterId(input.id()?),
            incarnation: Incarnation(input.id()?),
            elected: input.ballot()?,
            commit_lsn: Lsn(input.u64()?),
            commit_generation: Generation(input.u32()?),
            configuration: input.configuration()?,
            history: input.history()?,
            timelines: input.timelines()?,
        };
        let consumers = input.consumers()?;
        let shards = if version == VERSION_WITHOUT_SHARDS { Vec::new() } else { input.shards()? };
        if !input.rest.is_empty() {
            return Err(ControlError::Invalid("bytes behind the last field"));
        }
        let file = ControlFile {
            sequence,
            identity,
            store_segment_bytes,
            acceptor,
            scan_start,
            oldest_lsn,
            sealed_lsn,
            consumers,
            shards,
        };
        file.check()?;
        Ok(file)
    }

    /// What the rest of the program relies on, so that it may trust a decoded file.
    fn check(&self) -> Result<(), ControlError> {
        let identity = &self.identity;
        let holds = |condition: bool, what: &'static str| match condition {
            true => Ok(()),
            false => Err(ControlError::Invalid(what)),
        };
        let start = identity.start.record_end;
        holds(wal::segment_bytes_valid(identity.segment_bytes), "segment size")?;
        holds(start.is_valid() && start.offset_in(8) == 0, "start")?;
        holds(self.scan_start.record_end.offset_in(8) == 0 && self.scan_start.record_end >= start, "scan start")?;
        holds(self.oldest_lsn >= start && self.oldest_lsn <= self.scan_start.record_end, "oldest position")?;
        let store = self.store_segment_bytes;
        holds(store.is_power_of_two() && store >= 2 * BLOCK_BYTES, "segment size of the store")?;
        holds(self.sealed_lsn.offset_in(store) == 0, "sealed position")?;
        holds(self.shards.is_sorted_by(|a, b| a.shard < b.shard), "shards")?;
        holds(self.acceptor.history.is_ordered(), "term history")?;
        holds(self.acceptor.timelines.is_ordered(), "timelines")
    }
}

/// The copy that counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChosenCopy {
    /// Its contents.
    pub file: ControlFile,
    /// Which one it is: the other one is to be written first.
    pub copy: u8,
    /// The other one is not the same: both are to be written before anything else happens, so that no second fault
    /// can bring back what was before.
    pub differ: bool,
}

/// Which of two copies counts.
///
/// # Errors
/// Those of both copies when neither is usable.
pub fn choose_copy(copies: [Option<&[u8]>; 2]) -> Result<ChosenCopy, [ControlError; 2]> {
    let [first, second] = copies.map(|copy| ControlFile::decode(copy.unwrap_or(&[])));
    match (first, second) {
        // An older program must not overwrite what a newer one wrote, even if an old copy of its own survives.
        (Err(ControlError::Version(version)), other) | (other, Err(ControlError::Version(version))) => {
            let other = other.err().unwrap_or(ControlError::Version(version));
            Err([ControlError::Version(version), other])
        }
        (Ok(first), Ok(second)) => {
            let differ = first != second;
            Ok(match first.sequence >= second.sequence {
                true => ChosenCopy { file: first, copy: 0, differ },
                false => ChosenCopy { file: second, copy: 1, differ },
            })
        }
        (Ok(file), Err(_)) => Ok(ChosenCopy { file, copy: 0, differ: true }),
        (Err(_), Ok(file)) => Ok(ChosenCopy { file, copy: 1, differ: true }),
        (Err(first), Err(second)) => Err([first, second]),
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Counts are bounded by [`CONTROL_BYTES_MAX`] long before they leave 32 bits.
fn put_count(out: &mut Vec<u8>, count: usize) {
    put_u32(out, count as u32);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_count(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn put_ballot(out: &mut Vec<u8>, ballot: Ballot) {
    put_u64(out, ballot.term.0);
    put_u32(out, ballot.attempt.0);
}

fn put_summary(out: &mut Vec<u8>, summary: &FrameSummary) {
    put_u64(out, summary.record_end.0);
    put_u64(out, summary.record_start.0);
    put_u32(out, summary.timeline.0);
    put_u64(out, summary.max_full_xid);
    put_u64(out, summary.commit_timestamp as u64);
}

fn put_members(out: &mut Vec<u8>, members: &[Member]) {
    put_count(out, members.len());
    for member in members {
        put_u32(out, member.member.0);
        out.extend_from_slice(&member.disk.0);
        put_text(out, &member.address);
    }
}

fn put_configuration(out: &mut Vec<u8>, configuration: &Configuration) {
    put_u32(out, configuration.generation.0);
    put_members(out, &configuration.members);
    out.push(u8::from(configuration.new_members.is_some()));
    if let Some(members) = &configuration.new_members {
        put_members(out, members);
    }
}

/// What is left to decode. Lengths are checked against it before anything is allocated.
struct Input<'a> {
    rest: &'a [u8],
}

const SHORT: ControlError = ControlError::Invalid("it ends inside a field");

impl<'a> Input<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], ControlError> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(SHORT)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ControlError> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(SHORT)?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn id(&mut self) -> Result<[u8; 16], ControlError> {
        self.array()
    }

    fn u32(&mut self) -> Result<u32, ControlError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ControlError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of items of at least `item_bytes` each.
    fn count(&mut self, item_bytes: usize) -> Result<usize, ControlError> {
        let count = self.u32()? as usize;
        match count <= self.rest.len() / item_bytes {
            true => Ok(count),
            false => Err(SHORT),
        }
    }

    fn text(&mut self, bytes_max: usize) -> Result<String, ControlError> {
        let length = self.count(1)?;
        if length > bytes_max {
            return Err(ControlError::Invalid("text too long"));
        }
        let text = core::str::from_utf8(self.bytes(length)?).map_err(|_| ControlError::Invalid("text is not UTF-8"))?;
        Ok(String::from(text))
    }

    fn ballot(&mut self) -> Result<Ballot, ControlError> {
        Ok(Ballot { term: Term(self.u64()?), attempt: Attempt(self.u32()?) })
    }

    fn summary(&mut self) -> Result<FrameSummary, ControlError> {
        Ok(FrameSummary {
            record_end: Lsn(self.u64()?),
            record_start: Lsn(self.u64()?),
            timeline: PgTimeline(self.u32()?),
            max_full_xid: self.u64()?,
            commit_timestamp: self.u64()? as i64,
        })
    }

    fn members(&mut self) -> Result<Vec<Member>, ControlError> {
        let count = self.count(24)?;
        let mut members = Vec::with_capacity(count);
        for _ in 0..count {
            members.push(Member {
                member: MemberId(self.u32()?),
                disk: DiskId(self.id()?),
                address: self.text(1 << 10)?,
            });
        }
        Ok(members)
    }

    fn configuration(&mut self) -> Result<Configuration, ControlError> {
        let generation = Generation(self.u32()?);
        let members = self.members()?;
        let new_members = match self.array::<1>()? {
            [0] => None,
            [1] => Some(self.members()?),
            _ => return Err(ControlError::Invalid("joint configuration flag")),
        };
        Ok(Configuration { generation, members, new_members })
    }

    fn history(&mut self) -> Result<TermHistory, ControlError> {
        let count = self.count(20)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            entries.push(TermEntry { ballot: self.ballot()?, start_lsn: Lsn(self.u64()?) });
        }
        Ok(TermHistory(entries))
    }

    fn timelines(&mut self) -> Result<TimelineHistory, ControlError> {
        let count = self.count(20)?;
        let mut entries: Vec<TimelineEntry> = Vec::with_capacity(count);
        // Shared prefixes let a small file unfold: the sum is bounded as the file is, times the depth of real histories.
        let mut unfolded = 0;
        for _ in 0..count {
            let timeline = PgTimeline(self.u32()?);
            let start_lsn = Lsn(self.u64()?);
            let shared = self.u32()? as usize;
            let own = self.count(1)?;
            let before = entries.last().map_or(&[][..], |entry| &entry.history_file);
            let prefix = before.get(..shared).ok_or(ControlError::Invalid("shared part of a history file"))?;
            let mut history_file = Vec::with_capacity(shared + own);
            history_file.extend_from_slice(prefix);
            history_file.extend_from_slice(self.bytes(own)?);
            unfolded += history_file.len();
            if unfolded > 16 * CONTROL_BYTES_MAX {
                return Err(ControlError::Invalid("history files too long"));
            }
            entries.push(TimelineEntry { timeline, start_lsn, history_file });
        }
        Ok(TimelineHistory(entries))
    }

    fn consumers(&mut self) -> Result<Vec<Consumer>, ControlError> {
        let count = self.count(12)?;
        if count > CONSUMERS_MAX {
            return Err(ControlError::Invalid("too many consumers"));
        }
        let mut consumers = Vec::with_capacity(count);
        for _ in 0..count {
            consumers.push(Consumer { name: self.text(CONSUMER_NAME_BYTES_MAX)?, confirmed_lsn: Lsn(self.u64()?) });
        }
        Ok(consumers)
    }

    fn shards(&mut self) -> Result<Vec<Shard>, ControlError> {
        let count = self.count(SHARD_BYTES)?;
        // Version 1 says it with fewer bytes: nothing is written in two ways.
        if count == 0 || count > SHARDS_MAX {
            return Err(ControlError::Invalid("number of shards"));
        }
        let mut shards = Vec::with_capacity(count);
        for _ in 0..count {
            shards.push(Shard {
                shard: ShardId(self.u32()?),
                generation: ShardGeneration(self.u64()?),
                durable_lsn: Lsn(self.u64()?),
            });
        }
        Ok(shards)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use alloc::{format, vec};
    use proptest::prelude::*;

    pub(crate) fn example() -> ControlFile {
        let start = Lsn(0x200_0000);
        let summary = |lsn: u64| FrameSummary {
            record_end: Lsn(lsn),
            record_start: Lsn(lsn - 64),
            timeline: PgTimeline(2),
            max_full_xid: 1 << 33,
            commit_timestamp: -5,
        };
        let member = |n: u32| Member {
            member: MemberId(n),
            disk: DiskId([n as u8; 16]),
            address: format!("sk-{n}.example:6500"),
        };
        let ballot = |term, attempt| Ballot { term: Term(term), attempt: Attempt(attempt) };
        let text = "1\t0/3000000\tno recovery target specified\n";
        ControlFile {
            sequence: 7,
            identity: AcceptorIdentity {
                log: LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) },
                system: SystemId(0x1234_5678_9ABC_DEF0),
                member: MemberId(1),
                disk: DiskId([3; 16]),
                segment_bytes: 16 << 20,
                start: FrameSummary { record_end: start, timeline: PgTimeline(1), ..FrameSummary::default() },
            },
            store_segment_bytes: 16 << 20,
            acceptor: AcceptorState {
                ballot: ballot(3, 1),
                writer: WriterId([4; 16]),
                incarnation: Incarnation([5; 16]),
                elected: ballot(2, 9),
                configuration: Configuration {
                    generation: Generation(2),
                    members: vec![member(1), member(2), member(3)],
                    new_members: Some(vec![member(1), member(2), member(4)]),
                },
                history: TermHistory(vec![
                    TermEntry { ballot: ballot(1, 1), start_lsn: start },
                    TermEntry { ballot: ballot(2, 9), start_lsn: Lsn(0x300_0000) },
                ]),
                timelines: TimelineHistory(vec![
                    TimelineEntry { timeline: PgTimeline(1), start_lsn: start, history_file: vec![] },
                    TimelineEntry {
                        timeline: PgTimeline(2),
                        start_lsn: Lsn(0x300_0000),
                        history_file: text.as_bytes().to_vec(),
                    },
                    TimelineEntry {
                        timeline: PgTimeline(3),
                        start_lsn: Lsn(0x300_1000),
                        history_file: format!("{text}2\t0/3001000\tno recovery target specified\n").into_bytes(),
                    },
                ]),
                commit_lsn: Lsn(0x310_0000),
                commit_generation: Generation(1),
            },
            scan_start: summary(0x310_0000),
            oldest_lsn: Lsn(0x300_0000),
            sealed_lsn: Lsn(0x300_0000),
            consumers: vec![Consumer { name: "standby".into(), confirmed_lsn: Lsn(0x300_0008) }],
            shards: vec![],
        }
    }

    fn example_with_shards() -> ControlFile {
        let shard = |number, generation| Shard {
            shard: ShardId(number),
            generation: ShardGeneration(generation),
            durable_lsn: Lsn(0x300_0010),
        };
        ControlFile { shards: vec![shard(0, 1), shard(3, 1 << 40)], ..example() }
    }

    #[test]
    fn control_file_round_trips_with_padding_behind() {
        for file in [example(), example_with_shards()] {
            let mut bytes = file.encode();
            assert_eq!(Ok(file.clone()), ControlFile::decode(&bytes));
            bytes.resize(bytes.len().next_multiple_of(4096), 0);
            assert_eq!(Ok(file), ControlFile::decode(&bytes));
        }
    }

    /// Version 2 is version 1 with shards behind the consumers; files without shards stay what they were, so that logs of an
    /// earlier program are read, and it can go on with logs that no page server reads.
    #[test]
    fn version_2_is_version_1_and_shards() {
        let (first, second) = (example().encode(), example_with_shards().encode());
        assert_eq!([2, 0, 0, 0], second[8..12]);
        assert_eq!(first[16..first.len() - 4], second[16..first.len() - 4]);
        let shards = &second[first.len() - 4..second.len() - 4];
        let mut expected = vec![2, 0, 0, 0];
        for (number, generation) in [(0u32, 1u64), (3, 1 << 40)] {
            expected.extend_from_slice(&number.to_le_bytes());
            expected.extend_from_slice(&generation.to_le_bytes());
            expected.extend_from_slice(&0x300_0010u64.to_le_bytes());
        }
        assert_eq!(expected, shards);
    }

    /// Fixes the bytes of version 1: a change here is a change of the format.
    #[test]
    fn layout_is_the_documented_one() {
        let bytes = example().encode();
        assert_eq!(*b"LBLOGCTL", bytes[..8]);
        assert_eq!([1, 0, 0, 0], bytes[8..12]);
        assert_eq!((bytes.len() as u32).to_le_bytes(), bytes[12..16]);
        assert_eq!(7u64.to_le_bytes(), bytes[16..24]);
        assert_eq!([1; 16], bytes[24..40]);
        assert_eq!([2; 16], bytes[40..56]);
        assert_eq!(0x1234_5678_9ABC_DEF0u64.to_le_bytes(), bytes[56..64]);
        assert_eq!(1u32.to_le_bytes(), bytes[64..68]);
        assert_eq!([3; 16], bytes[68..84]);
        assert_eq!((16u64 << 20).to_le_bytes(), bytes[84..92]);
        assert_eq!((16u64 << 20).to_le_bytes(), bytes[92..100]);
        assert_eq!(0x200_0000u64.to_le_bytes(), bytes[100..108]);
        assert_eq!(0x310_0000u64.to_le_bytes(), bytes[136..144]);
        assert_eq!(0x300_0000u64.to_le_bytes(), bytes[172..180]);
        assert_eq!(0x300_0000u64.to_le_bytes(), bytes[180..188]);
        assert_eq!(3u64.to_le_bytes(), bytes[188..196]);
        assert_eq!(wal::crc32c(0, &bytes[..bytes.len() - 4]).to_le_bytes(), bytes[bytes.len() - 4..]);
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let bytes = example_with_shards().encode();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(ControlFile::decode(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn truncated_and_empty_copies_are_damaged() {
        let bytes = example().encode();
        for length in 0..bytes.len() {
            assert!(ControlFile::decode(&bytes[..length]).is_err(), "{length}");
        }
        assert_eq!(Err(ControlError::Damaged), ControlFile::decode(&[0; 4096]));
    }

    #[test]
    fn higher_sequence_wins_and_a_bad_or_old_copy_is_to_be_rewritten() {
        let old = example();
        let new = ControlFile { sequence: 8, ..example() };
        let (old_bytes, new_bytes) = (old.encode(), new.encode());
        let chosen = |file: &ControlFile, copy, differ| Ok(ChosenCopy { file: file.clone(), copy, differ });
        assert_eq!(chosen(&new, 1, true), choose_copy([Some(&old_bytes), Some(&new_bytes)]));
        assert_eq!(chosen(&new, 0, true), choose_copy([Some(&new_bytes), Some(&old_bytes)]));
        assert_eq!(chosen(&new, 0, false), choose_copy([Some(&new_bytes), Some(&new_bytes)]));
        assert_eq!(chosen(&old, 0, true), choose_copy([Some(&old_bytes), Some(&new_bytes[..100])]));
        assert_eq!(chosen(&old, 1, true), choose_copy([None, Some(&old_bytes)]));
        assert_eq!(Err([ControlError::Damaged, ControlError::Damaged]), choose_copy([None, Some(&new_bytes[..100])]));
    }

    /// A downgrade in the middle of an upgrade's first write must not vote with the state from before.
    #[test]
    fn copy_of_a_newer_version_is_never_overruled_by_an_old_one() {
        let old = example().encode();
        let mut newer = old.clone();
        newer[8] = 3;
        let crc_at = newer.len() - 4;
        let crc = wal::crc32c(0, &newer[..crc_at]);
        newer[crc_at..].copy_from_slice(&crc.to_le_bytes());
        assert!(choose_copy([Some(&old), Some(&newer)]).is_err());
        assert!(choose_copy([Some(&newer), Some(&old)]).is_err());
    }

    #[test]
    fn history_files_are_stored_once() {
        let mut file = example();
        let mut text = Vec::new();
        file.acceptor.timelines.0.truncate(1);
        for n in 2..500u32 {
            text.extend_from_slice(format!("{}\t0/3000000\tno recovery target specified\n", n - 1).as_bytes());
            let entry =
                TimelineEntry { timeline: PgTimeline(n), start_lsn: Lsn(0x300_0000), history_file: text.clone() };
            file.acceptor.timelines.0.push(entry);
        }
        let bytes = file.encode();
        assert!(bytes.len() < 50_000, "{}", bytes.len());
        assert_eq!(Ok(file), ControlFile::decode(&bytes));
    }

    proptest! {
        /// Whatever the disk returns, decoding neither panics nor allocates more than the file explains; the checksum is
        /// made right so that the fields themselves are reached.
        #[test]
        fn garbage_behind_a_valid_checksum_is_an_error_or_a_file(
            changes in proptest::collection::vec((24usize..600, any::<u8>()), 1..8),
        ) {
            let mut bytes = example_with_shards().encode();
            let crc_at = bytes.len() - 4;
            for (at, value) in changes {
                bytes[at % crc_at.max(25)] = value;
            }
            let crc = wal::crc32c(0, &bytes[..crc_at]);
            bytes[crc_at..].copy_from_slice(&crc.to_le_bytes());
            if let Ok(file) = ControlFile::decode(&bytes) {
                prop_assert_eq!(Ok(file.clone()), ControlFile::decode(&file.encode()));
            }
        }
    }
}
