//! Bodies of the messages between proposer and acceptor.

use alloc::vec::Vec;
use core::time::Duration;

use consensus::{
    Configuration, Member, TermEntry, TermHistory, TimelineHistory,
    message::{
        AcceptorMessage, AcceptorStatus, Append, Appended, CatchUp, Donor, Elected, ElectedAccepted, ProposerMessage,
        Refusal, Refused, TimelineEntry, Vote, Voted,
    },
};
use pgtypes::{
    Attempt, Ballot, DiskId, FrameSummary, Generation, Incarnation, Lsn, MemberId, PgTimeline, Term, WriterId,
};

use super::{MessageType, WireError};
use crate::bytes::{Put, Taker};

/// Positions from here on are refused: arithmetic on accepted ones cannot overflow, and a real log never gets there
/// (at 1 GB/s after 290 years).
const LSN_END: u64 = 1 << 63;
/// Memory that one decoded timeline history may take: 16 MiB. History files repeat their parent's text, which the
/// encoding shares, so that a body of 1 MiB could otherwise unfold to gigabytes.
const TIMELINE_BYTES_MAX: usize = 16 << 20;

const BALLOT_BYTES: usize = 12;
const TERM_ENTRY_BYTES: usize = BALLOT_BYTES + 8;
/// Least bytes of a member: number, disk, empty address.
const MEMBER_BYTES_MIN: usize = 4 + 16 + 2;
/// Least bytes of a donor: number, empty address.
const DONOR_BYTES_MIN: usize = 4 + 2;
/// Least bytes of a timeline entry: timeline, start, shared length, empty rest.
const TIMELINE_ENTRY_BYTES_MIN: usize = 4 + 8 + 4 + 4;

pub(super) fn put_lsn(body: &mut Vec<u8>, lsn: Lsn) {
    body.put_u64(lsn.0);
}

pub(super) fn take_lsn(fields: &mut Taker<'_>, field: &'static str) -> Result<Lsn, WireError> {
    match fields.u64(field)? {
        lsn if lsn < LSN_END => Ok(Lsn(lsn)),
        _ => Err(WireError::BadValue { field }),
    }
}

pub(super) fn put_ballot(body: &mut Vec<u8>, ballot: Ballot) {
    body.put_u64(ballot.term.0);
    body.put_u32(ballot.attempt.0);
}

pub(super) fn take_ballot(fields: &mut Taker<'_>, field: &'static str) -> Result<Ballot, WireError> {
    Ok(Ballot { term: Term(fields.u64(field)?), attempt: Attempt(fields.u32(field)?) })
}

pub(super) fn put_summary(body: &mut Vec<u8>, summary: &FrameSummary) {
    put_lsn(body, summary.record_end);
    put_lsn(body, summary.record_start);
    body.put_u32(summary.timeline.0);
    body.put_u64(summary.max_full_xid);
    body.put_i64(summary.commit_timestamp);
}

pub(super) fn take_summary(fields: &mut Taker<'_>) -> Result<FrameSummary, WireError> {
    Ok(FrameSummary {
        record_end: take_lsn(fields, "summary.record_end")?,
        record_start: take_lsn(fields, "summary.record_start")?,
        timeline: PgTimeline(fields.u32("summary.timeline")?),
        max_full_xid: fields.u64("summary.max_full_xid")?,
        commit_timestamp: fields.i64("summary.commit_timestamp")?,
    })
}

fn put_term_history(body: &mut Vec<u8>, history: &TermHistory) {
    body.put_count(history.0.len());
    for entry in &history.0 {
        put_ballot(body, entry.ballot);
        put_lsn(body, entry.start_lsn);
    }
}

fn take_term_history(fields: &mut Taker<'_>) -> Result<TermHistory, WireError> {
    let count = fields.count(TERM_ENTRY_BYTES, "history")?;
    let mut entries: Vec<TermEntry> = Vec::with_capacity(count);
    for _ in 0..count {
        let entry = TermEntry {
            ballot: take_ballot(fields, "history.ballot")?,
            start_lsn: take_lsn(fields, "history.start_lsn")?,
        };
        // The acceptor finds the common point of two histories by their order.
        if entries.last().is_some_and(|last| entry.ballot <= last.ballot || entry.start_lsn < last.start_lsn) {
            return Err(WireError::BadValue { field: "history" });
        }
        entries.push(entry);
    }
    Ok(TermHistory(entries))
}

/// A timeline entry whose history file shares its first bytes with `previous`.
fn put_timeline_entry(body: &mut Vec<u8>, entry: &TimelineEntry, previous: &[u8]) {
    let shared = entry.history_file.iter().zip(previous).take_while(|(a, b)| a == b).count();
    body.put_u32(entry.timeline.0);
    put_lsn(body, entry.start_lsn);
    body.put_count(shared);
    body.put_count(entry.history_file.len() - shared);
    body.put(&entry.history_file[shared..]);
}

fn take_timeline_entry(
    fields: &mut Taker<'_>,
    previous: &[u8],
    budget_bytes: &mut usize,
) -> Result<TimelineEntry, WireError> {
    let timeline = PgTimeline(fields.u32("timeline.timeline")?);
    let start_lsn = take_lsn(fields, "timeline.start_lsn")?;
    let shared = fields.u32("timeline.shared")? as usize;
    let shared = previous.get(..shared).ok_or(WireError::BadValue { field: "timeline.shared" })?;
    let length = fields.count(1, "timeline.history_file")?;
    let own = fields.bytes(length, "timeline.history_file")?;
    *budget_bytes = budget_bytes
        .checked_sub(shared.len() + own.len())
        .ok_or(WireError::BadValue { field: "timeline.history_file" })?;
    let mut history_file = Vec::with_capacity(shared.len() + own.len());
    history_file.put(shared);
    history_file.put(own);
    Ok(TimelineEntry { timeline, start_lsn, history_file })
}

fn put_timelines(body: &mut Vec<u8>, timelines: &TimelineHistory) {
    body.put_count(timelines.0.len());
    let mut previous: &[u8] = &[];
    for entry in &timelines.0 {
        put_timeline_entry(body, entry, previous);
        previous = &entry.history_file;
    }
}

fn take_timelines(fields: &mut Taker<'_>) -> Result<TimelineHistory, WireError> {
    let count = fields.count(TIMELINE_ENTRY_BYTES_MIN, "timelines")?;
    let mut budget_bytes = TIMELINE_BYTES_MAX;
    let mut entries: Vec<TimelineEntry> = Vec::with_capacity(count);
    for _ in 0..count {
        let previous = entries.last().map_or(&[][..], |entry| &entry.history_file);
        let entry = take_timeline_entry(fields, previous, &mut budget_bytes)?;
        entries.push(entry);
    }
    Ok(TimelineHistory(entries))
}

fn put_members(body: &mut Vec<u8>, members: &[Member]) {
    body.put_count(members.len());
    for member in members {
        body.put_u32(member.member.0);
        body.put(&member.disk.0);
        body.put_text(&member.address);
    }
}

fn take_members(fields: &mut Taker<'_>) -> Result<Vec<Member>, WireError> {
    let count = fields.count(MEMBER_BYTES_MIN, "members")?;
    (0..count)
        .map(|_| {
            Ok(Member {
                member: MemberId(fields.u32("member.member")?),
                disk: DiskId(fields.array("member.disk")?),
                address: fields.text("member.address")?,
            })
        })
        .collect()
}

fn put_configuration(body: &mut Vec<u8>, configuration: &Configuration) {
    body.put_u32(configuration.generation.0);
    put_members(body, &configuration.members);
    body.put_u8(configuration.new_members.is_some().into());
    if let Some(members) = &configuration.new_members {
        put_members(body, members);
    }
}

fn take_configuration(fields: &mut Taker<'_>) -> Result<Configuration, WireError> {
    let generation = Generation(fields.u32("configuration.generation")?);
    let members = take_members(fields)?;
    let new_members = if fields.flag("configuration.joint")? { Some(take_members(fields)?) } else { None };
    Ok(Configuration { generation, members, new_members })
}

/// The fields of a proposer's message; those of an append come before its WAL.
pub(super) fn put_proposer_message(body: &mut Vec<u8>, message: &ProposerMessage) {
    match message {
        ProposerMessage::Vote(vote) => {
            put_ballot(body, vote.ballot);
            body.put(&vote.writer.0);
            body.put(&vote.incarnation.0);
            put_configuration(body, &vote.configuration);
        }
        ProposerMessage::Elected(elected) => {
            put_ballot(body, elected.ballot);
            body.put(&elected.incarnation.0);
            body.put_u32(elected.generation.0);
            put_summary(body, &elected.start);
            put_term_history(body, &elected.history);
            put_timelines(body, &elected.timelines);
            put_lsn(body, elected.commit_lsn);
        }
        ProposerMessage::Append(append) => {
            put_ballot(body, append.ballot);
            body.put_u32(append.generation.0);
            body.put_u64(append.sequence);
            put_lsn(body, append.begin_lsn);
            put_lsn(body, append.end_lsn);
            put_lsn(body, append.commit_lsn);
            body.put_u8(append.timeline.is_some().into());
            if let Some(entry) = &append.timeline {
                put_timeline_entry(body, entry, &[]);
            }
        }
        ProposerMessage::CatchUp(catch_up) => {
            put_ballot(body, catch_up.ballot);
            body.put_u32(catch_up.generation.0);
            put_lsn(body, catch_up.until);
            body.put_count(catch_up.donors.len());
            for donor in &catch_up.donors {
                body.put_u32(donor.member.0);
                body.put_text(&donor.address);
            }
        }
    }
}

pub(super) fn take_proposer_message(
    fields: &mut Taker<'_>,
    message: MessageType,
) -> Result<ProposerMessage, WireError> {
    Ok(match message {
        MessageType::Vote => ProposerMessage::Vote(Vote {
            ballot: take_ballot(fields, "vote.ballot")?,
            writer: WriterId(fields.array("vote.writer")?),
            incarnation: Incarnation(fields.array("vote.incarnation")?),
            configuration: take_configuration(fields)?,
        }),
        MessageType::Elected => ProposerMessage::Elected(Elected {
            ballot: take_ballot(fields, "elected.ballot")?,
            incarnation: Incarnation(fields.array("elected.incarnation")?),
            generation: Generation(fields.u32("elected.generation")?),
            start: take_summary(fields)?,
            history: take_term_history(fields)?,
            timelines: take_timelines(fields)?,
            commit_lsn: take_lsn(fields, "elected.commit_lsn")?,
        }),
        MessageType::Append => ProposerMessage::Append(Append {
            ballot: take_ballot(fields, "append.ballot")?,
            generation: Generation(fields.u32("append.generation")?),
            sequence: fields.u64("append.sequence")?,
            begin_lsn: take_lsn(fields, "append.begin_lsn")?,
            end_lsn: take_lsn(fields, "append.end_lsn")?,
            commit_lsn: take_lsn(fields, "append.commit_lsn")?,
            timeline: if fields.flag("append.timeline")? {
                Some(take_timeline_entry(fields, &[], &mut { TIMELINE_BYTES_MAX })?)
            } else {
                None
            },
        }),
        MessageType::CatchUp => ProposerMessage::CatchUp(CatchUp {
            ballot: take_ballot(fields, "catch_up.ballot")?,
            generation: Generation(fields.u32("catch_up.generation")?),
            until: take_lsn(fields, "catch_up.until")?,
            donors: {
                let count = fields.count(DONOR_BYTES_MIN, "catch_up.donors")?;
                (0..count)
                    .map(|_| {
                        Ok(Donor {
                            member: MemberId(fields.u32("donor.member")?),
                            address: fields.text("donor.address")?,
                        })
                    })
                    .collect::<Result<_, WireError>>()?
            },
        }),
        other => return Err(WireError::UnknownType(other as u8)),
    })
}

pub(super) fn put_acceptor_message(body: &mut Vec<u8>, message: &AcceptorMessage) {
    match message {
        AcceptorMessage::Status(status) => {
            body.put_u32(status.member.0);
            body.put(&status.disk.0);
            put_ballot(body, status.ballot);
            body.put(&status.writer.0);
            put_configuration(body, &status.configuration);
            put_summary(body, &status.flush);
            put_lsn(body, status.commit_lsn);
            put_lsn(body, status.oldest_lsn);
        }
        AcceptorMessage::Voted(voted) => {
            put_ballot(body, voted.ballot);
            body.put(&voted.incarnation.0);
            body.put_u32(voted.member.0);
            body.put(&voted.disk.0);
            body.put_u32(voted.generation.0);
            put_ballot(body, voted.last_ballot);
            put_summary(body, &voted.flush);
            put_term_history(body, &voted.history);
            put_timelines(body, &voted.timelines);
            put_lsn(body, voted.commit_lsn);
            put_lsn(body, voted.oldest_lsn);
            // 584 years of nanoseconds fit; a promise is 1.5 s.
            body.put_u64(u64::try_from(voted.promise_remaining.as_nanos()).unwrap_or(u64::MAX));
        }
        AcceptorMessage::ElectedAccepted(accepted) => {
            put_ballot(body, accepted.ballot);
            put_lsn(body, accepted.flush_lsn);
        }
        AcceptorMessage::Appended(appended) => {
            put_ballot(body, appended.ballot);
            body.put_u64(appended.sequence);
            put_lsn(body, appended.flush_lsn);
            put_lsn(body, appended.durable_lsn);
            body.put_u8(appended.disk_full.into());
        }
        AcceptorMessage::Refused(refused) => {
            put_refusal(body, &refused.reason);
            body.put_u64(refused.sequence);
            put_ballot(body, refused.ballot);
            body.put(&refused.writer.0);
            put_configuration(body, &refused.configuration);
        }
    }
}

pub(super) fn take_acceptor_message(
    fields: &mut Taker<'_>,
    message: MessageType,
) -> Result<AcceptorMessage, WireError> {
    Ok(match message {
        MessageType::Status => AcceptorMessage::Status(AcceptorStatus {
            member: MemberId(fields.u32("status.member")?),
            disk: DiskId(fields.array("status.disk")?),
            ballot: take_ballot(fields, "status.ballot")?,
            writer: WriterId(fields.array("status.writer")?),
            configuration: take_configuration(fields)?,
            flush: take_summary(fields)?,
            commit_lsn: take_lsn(fields, "status.commit_lsn")?,
            oldest_lsn: take_lsn(fields, "status.oldest_lsn")?,
        }),
        MessageType::Voted => AcceptorMessage::Voted(Voted {
            ballot: take_ballot(fields, "voted.ballot")?,
            incarnation: Incarnation(fields.array("voted.incarnation")?),
            member: MemberId(fields.u32("voted.member")?),
            disk: DiskId(fields.array("voted.disk")?),
            generation: Generation(fields.u32("voted.generation")?),
            last_ballot: take_ballot(fields, "voted.last_ballot")?,
            flush: take_summary(fields)?,
            history: take_term_history(fields)?,
            timelines: take_timelines(fields)?,
            commit_lsn: take_lsn(fields, "voted.commit_lsn")?,
            oldest_lsn: take_lsn(fields, "voted.oldest_lsn")?,
            promise_remaining: Duration::from_nanos(fields.u64("voted.promise_remaining")?),
        }),
        MessageType::ElectedAccepted => AcceptorMessage::ElectedAccepted(ElectedAccepted {
            ballot: take_ballot(fields, "elected_accepted.ballot")?,
            flush_lsn: take_lsn(fields, "elected_accepted.flush_lsn")?,
        }),
        MessageType::Appended => AcceptorMessage::Appended(Appended {
            ballot: take_ballot(fields, "appended.ballot")?,
            sequence: fields.u64("appended.sequence")?,
            flush_lsn: take_lsn(fields, "appended.flush_lsn")?,
            durable_lsn: take_lsn(fields, "appended.durable_lsn")?,
            disk_full: fields.flag("appended.disk_full")?,
        }),
        MessageType::Refused => AcceptorMessage::Refused(Refused {
            reason: take_refusal(fields)?,
            sequence: fields.u64("refused.sequence")?,
            ballot: take_ballot(fields, "refused.ballot")?,
            writer: WriterId(fields.array("refused.writer")?),
            configuration: take_configuration(fields)?,
        }),
        other => return Err(WireError::UnknownType(other as u8)),
    })
}

fn put_refusal(body: &mut Vec<u8>, refusal: &Refusal) {
    match refusal {
        Refusal::Fenced => body.put_u8(1),
        Refusal::OtherWriter => body.put_u8(2),
        Refusal::TermNotGranted { known } => {
            body.put_u8(3);
            body.put_u64(known.0);
        }
        Refusal::StaleAttempt => body.put_u8(4),
        Refusal::StaleGeneration => body.put_u8(5),
        Refusal::NotAMember => body.put_u8(6),
        Refusal::NotElected => body.put_u8(7),
        Refusal::Gap { expected } => {
            body.put_u8(8);
            put_lsn(body, *expected);
        }
        Refusal::BadWal { lsn, detail } => {
            body.put_u8(9);
            put_lsn(body, *lsn);
            body.put_text(detail);
        }
        Refusal::DiskFull => body.put_u8(10),
        Refusal::DiskFailed => body.put_u8(11),
        Refusal::Malformed { detail } => {
            body.put_u8(12);
            body.put_text(detail);
        }
    }
}

fn take_refusal(fields: &mut Taker<'_>) -> Result<Refusal, WireError> {
    Ok(match fields.u8("refused.reason")? {
        1 => Refusal::Fenced,
        2 => Refusal::OtherWriter,
        3 => Refusal::TermNotGranted { known: Term(fields.u64("refused.known")?) },
        4 => Refusal::StaleAttempt,
        5 => Refusal::StaleGeneration,
        6 => Refusal::NotAMember,
        7 => Refusal::NotElected,
        8 => Refusal::Gap { expected: take_lsn(fields, "refused.expected")? },
        9 => Refusal::BadWal { lsn: take_lsn(fields, "refused.lsn")?, detail: fields.text("refused.detail")? },
        10 => Refusal::DiskFull,
        11 => Refusal::DiskFailed,
        12 => Refusal::Malformed { detail: fields.text("refused.detail")? },
        _ => return Err(WireError::BadValue { field: "refused.reason" }),
    })
}
