//! The proposer's rules, one test each, with the exact commands that come out.

use consensus::{
    APPEND_BYTES_MAX, Configuration, Grant, HEARTBEAT_INTERVAL, IN_FLIGHT_BYTES_MAX, LEASE_LENGTH, Member, Proposer,
    ProposerCommand, RETRY_DELAY, TermEntry, TermHistory, TimelineHistory, Trouble,
    message::{
        AcceptorMessage, AcceptorStatus, Append, Appended, CatchUp, Donor, Elected, ElectedAccepted, ProposerMessage,
        Refusal, Refused, TimelineEntry, Vote, Voted,
    },
};
use pgtypes::{
    Attempt, Ballot, DiskId, FrameSummary, Generation, Incarnation, Instant, Lsn, MemberId, PgTimeline, Term, WriterId,
};
use std::time::Duration;

const WRITER: WriterId = WriterId([1; 16]);
const OTHER: WriterId = WriterId([2; 16]);
const RUN: Incarnation = Incarnation([11; 16]);
const START: Lsn = Lsn(16 << 20);
const GRANT: Grant = Grant { term: Term(7), writer: WRITER };

fn ballot(term: u64, attempt: u32) -> Ballot {
    Ballot { term: Term(term), attempt: Attempt(attempt) }
}

fn at(bytes: u64) -> Lsn {
    START.advance(bytes)
}

fn ms(milliseconds: u64) -> Instant {
    Instant::default().after(Duration::from_millis(milliseconds))
}

fn end(bytes: u64) -> FrameSummary {
    FrameSummary { record_end: at(bytes), timeline: PgTimeline(1), ..FrameSummary::default() }
}

fn members(numbers: &[u32]) -> Vec<Member> {
    let member = |n: &u32| Member { member: MemberId(*n), disk: DiskId([*n as u8; 16]), address: format!("m{n}:1") };
    numbers.iter().map(member).collect()
}

fn configuration() -> Configuration {
    Configuration { generation: Generation(1), members: members(&[1, 2, 3]), new_members: None }
}

fn joint() -> Configuration {
    Configuration { generation: Generation(2), members: members(&[1, 2, 3]), new_members: Some(members(&[1, 2, 4])) }
}

fn timelines() -> TimelineHistory {
    TimelineHistory([TimelineEntry { timeline: PgTimeline(1), start_lsn: START, history_file: Vec::new() }].into())
}

fn status(member: u32, ballot: Ballot, writer: WriterId) -> AcceptorStatus {
    AcceptorStatus {
        member: MemberId(member),
        disk: DiskId([member as u8; 16]),
        ballot,
        writer,
        configuration: configuration(),
        flush: end(0),
        commit_lsn: START,
        oldest_lsn: START,
    }
}

fn voted(member: u32, ballot: Ballot, last_ballot: Ballot, flush: u64, history: &[(Ballot, u64)]) -> Voted {
    let entries = history.iter().map(|&(ballot, bytes)| TermEntry { ballot, start_lsn: at(bytes) }).collect();
    Voted {
        ballot,
        incarnation: RUN,
        member: MemberId(member),
        disk: DiskId([member as u8; 16]),
        generation: Generation(1),
        last_ballot,
        flush: end(flush),
        history: TermHistory(entries),
        timelines: timelines(),
        commit_lsn: START,
        oldest_lsn: START,
        promise_remaining: Duration::ZERO,
    }
}

fn refused(reason: Refusal, ballot: Ballot, writer: WriterId) -> AcceptorMessage {
    AcceptorMessage::Refused(Refused { reason, sequence: 0, ballot, writer, configuration: configuration() })
}

fn accepted(ballot: Ballot, flush: u64) -> AcceptorMessage {
    AcceptorMessage::ElectedAccepted(ElectedAccepted { ballot, flush_lsn: at(flush) })
}

fn appended(sequence: u64, flush: u64) -> AcceptorMessage {
    AcceptorMessage::Appended(Appended {
        ballot: ballot(7, 1),
        sequence,
        flush_lsn: at(flush),
        durable_lsn: at(flush),
        disk_full: false,
    })
}

fn drain(proposer: &mut Proposer) -> Vec<ProposerCommand> {
    std::iter::from_fn(|| proposer.poll_command()).collect()
}

/// What is sent, as member and message.
fn sent(commands: &[ProposerCommand]) -> Vec<(u32, &ProposerMessage)> {
    let mut sent = Vec::new();
    for command in commands {
        if let ProposerCommand::Send { member, message } = command {
            sent.push((member.0, message));
        }
    }
    sent
}

/// The WAL that is sent, as member and header.
fn wal(commands: &[ProposerCommand]) -> Vec<(u32, &Append)> {
    let mut sent = Vec::new();
    for command in commands {
        if let ProposerCommand::SendWal { member, append } = command {
            sent.push((member.0, append));
        }
    }
    sent
}

/// A proposer of an empty log that three acceptors follow, whose first heartbeats (sequence 1) are under way.
fn leading() -> Proposer {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    for member in 1..=3 {
        proposer.handle_connected(MemberId(member), &status(member, ballot(7, 0), WRITER), ms(0));
    }
    for member in 1..=3 {
        let vote = AcceptorMessage::Voted(voted(member, ballot(7, 1), Ballot::default(), 0, &[]));
        proposer.handle_message(MemberId(member), vote, ms(0));
    }
    for member in 1..=3 {
        proposer.handle_message(MemberId(member), accepted(ballot(7, 1), 0), ms(0));
    }
    drain(&mut proposer);
    proposer
}

#[test]
fn attempt_is_one_above_the_highest_that_a_majority_knows() {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    let connect = |n: u32| ProposerCommand::Connect { member: MemberId(n), address: format!("m{n}:1") };
    assert_eq!(vec![connect(1), connect(2), connect(3)], drain(&mut proposer));

    proposer.handle_connected(MemberId(1), &status(1, ballot(7, 4), WRITER), ms(0));
    assert_eq!(Vec::<ProposerCommand>::new(), drain(&mut proposer));
    proposer.handle_connected(MemberId(3), &status(3, ballot(6, 9), OTHER), ms(0));

    let vote = Vote { ballot: ballot(7, 5), writer: WRITER, incarnation: RUN, configuration: configuration() };
    let send = |n| ProposerCommand::Send { member: MemberId(n), message: ProposerMessage::Vote(vote.clone()) };
    assert_eq!(vec![send(1), send(3)], drain(&mut proposer));
}

#[test]
fn best_log_of_a_majority_is_elected_and_its_end_committed_by_a_majority_that_holds_it() {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    for member in [1, 2] {
        proposer.handle_connected(MemberId(member), &status(member, ballot(7, 0), WRITER), ms(0));
    }
    drain(&mut proposer);
    // A longer log of an earlier ballot loses against a shorter one of a later.
    let (b1, b2, b7) = (ballot(1, 1), ballot(2, 1), ballot(7, 1));
    proposer.handle_message(MemberId(1), AcceptorMessage::Voted(voted(1, b7, b1, 96, &[(b1, 0)])), ms(0));
    assert_eq!(Vec::<ProposerCommand>::new(), drain(&mut proposer));
    proposer.handle_message(MemberId(2), AcceptorMessage::Voted(voted(2, b7, b2, 64, &[(b1, 0), (b2, 32)])), ms(0));

    let history = TermHistory(
        [(b1, 0), (b2, 32), (b7, 64)].map(|(ballot, bytes)| TermEntry { ballot, start_lsn: at(bytes) }).into(),
    );
    let elected = ProposerMessage::Elected(Elected {
        ballot: b7,
        incarnation: RUN,
        generation: Generation(1),
        start: end(64),
        history: history.clone(),
        timelines: timelines(),
        commit_lsn: START,
    });
    let commands = drain(&mut proposer);
    assert_eq!(vec![(1, &elected), (2, &elected)], sent(&commands));

    // Member 1 was cut down to where the logs part and must fetch the rest from member 2.
    proposer.handle_message(MemberId(1), accepted(b7, 32), ms(0));
    proposer.handle_message(MemberId(2), accepted(b7, 64), ms(0));
    let commands = drain(&mut proposer);
    let donors = vec![Donor { member: MemberId(2), address: "m2:1".into() }];
    let catch_up = CatchUp { ballot: b7, generation: Generation(1), until: at(64), donors };
    assert!(sent(&commands).contains(&(1, &ProposerMessage::CatchUp(catch_up))), "{commands:?}");
    assert!(!commands.iter().any(|command| matches!(command, ProposerCommand::Elected { .. })));

    proposer.handle_message(MemberId(1), appended(1, 64), ms(0));
    let commands = drain(&mut proposer);
    let decided = ProposerCommand::Elected { ballot: b7, start: end(64), history, timelines: timelines() };
    assert_eq!(Some(&decided), commands.first());
    assert_eq!(Some(&ProposerCommand::Committed { commit_lsn: at(64) }), commands.get(1));
}

#[test]
fn wal_goes_to_all_and_commits_when_a_majority_has_it() {
    let mut proposer = leading();

    proposer.handle_wal(START, at(100), ms(10));
    let commands = drain(&mut proposer);
    let append = Append {
        ballot: ballot(7, 1),
        generation: Generation(1),
        sequence: 2,
        begin_lsn: START,
        end_lsn: at(100),
        commit_lsn: START,
        timeline: None,
    };
    assert_eq!(vec![(1, &append), (2, &append), (3, &append)], wal(&commands));

    proposer.handle_message(MemberId(1), appended(2, 96), ms(11));
    assert!(!drain(&mut proposer).iter().any(|command| matches!(command, ProposerCommand::Committed { .. })));
    proposer.handle_message(MemberId(3), appended(2, 64), ms(11));
    assert!(drain(&mut proposer).contains(&ProposerCommand::Committed { commit_lsn: at(64) }));
}

#[test]
fn commit_is_announced_soon_when_no_append_carries_it() {
    let mut proposer = leading();
    proposer.handle_timeout(ms(3));
    proposer.handle_wal(START, at(64), ms(10));
    proposer.handle_message(MemberId(1), appended(2, 64), ms(20));
    proposer.handle_message(MemberId(2), appended(2, 64), ms(20));
    drain(&mut proposer);

    assert_eq!(Some(ms(22)), proposer.poll_timeout());
    proposer.handle_timeout(ms(22));
    let commands = drain(&mut proposer);
    let announced: Vec<_> = sent(&commands)
        .into_iter()
        .map(|(member, message)| match message {
            ProposerMessage::Append(append) => (member, append.begin_lsn, append.end_lsn, append.commit_lsn),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(vec![(1, at(64), at(64), at(64)), (2, at(64), at(64), at(64)), (3, at(64), at(64), at(64))], announced);
}

#[test]
fn lease_counts_from_the_sending_that_a_majority_heard() {
    let mut proposer = leading();

    proposer.handle_message(MemberId(1), appended(1, 0), ms(50));
    assert!(!drain(&mut proposer).iter().any(|command| matches!(command, ProposerCommand::Lease { .. })));
    proposer.handle_message(MemberId(2), appended(1, 0), ms(90));
    assert!(drain(&mut proposer).contains(&ProposerCommand::Lease { until: ms(0).after(LEASE_LENGTH) }));

    proposer.handle_timeout(ms(200));
    let commands = drain(&mut proposer);
    assert_eq!(3, sent(&commands).len());
    proposer.handle_message(MemberId(3), appended(2, 0), ms(210));
    proposer.handle_message(MemberId(1), appended(2, 0), ms(220));
    assert!(drain(&mut proposer).contains(&ProposerCommand::Lease { until: ms(200).after(LEASE_LENGTH) }));
    assert_eq!(Duration::from_millis(200), HEARTBEAT_INTERVAL);
}

#[test]
fn promises_to_earlier_writers_hold_back_commits_above_x_and_the_lease() {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    for member in [1, 2] {
        proposer.handle_connected(MemberId(member), &status(member, ballot(7, 0), WRITER), ms(0));
    }
    for (member, remaining) in [(1, 300), (2, 1100)] {
        let vote = Voted {
            promise_remaining: Duration::from_millis(remaining),
            ..voted(member, ballot(7, 1), Ballot::default(), 0, &[])
        };
        proposer.handle_message(MemberId(member), AcceptorMessage::Voted(vote), ms(10));
    }
    for member in [1, 2] {
        proposer.handle_message(MemberId(member), accepted(ballot(7, 1), 0), ms(20));
    }
    let commands = drain(&mut proposer);
    assert!(commands.contains(&ProposerCommand::Committed { commit_lsn: START }), "X was decided before");

    proposer.handle_wal(START, at(64), ms(30));
    for member in [1, 2] {
        proposer.handle_message(MemberId(member), appended(2, 64), ms(40));
    }
    let held = |command: &ProposerCommand| {
        matches!(command, ProposerCommand::Committed { .. } | ProposerCommand::Lease { .. })
    };
    assert!(!drain(&mut proposer).iter().any(held));
    proposer.handle_timeout(ms(1109));
    assert!(!drain(&mut proposer).iter().any(held));

    proposer.handle_timeout(ms(1110));
    let commands = drain(&mut proposer);
    assert!(commands.contains(&ProposerCommand::Committed { commit_lsn: at(64) }));
    assert!(commands.contains(&ProposerCommand::Lease { until: ms(30).after(LEASE_LENGTH) }));
}

#[test]
fn stale_attempt_is_raised_after_a_delay() {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    for member in [1, 2] {
        proposer.handle_connected(MemberId(member), &status(member, ballot(7, 0), WRITER), ms(0));
    }
    drain(&mut proposer);

    proposer.handle_message(MemberId(1), refused(Refusal::StaleAttempt, ballot(7, 3), WRITER), ms(1));
    assert_eq!(Vec::<ProposerCommand>::new(), drain(&mut proposer));
    let next = proposer.poll_timeout().unwrap();
    assert!(next >= ms(1).after(RETRY_DELAY) && next <= ms(1).after(2 * RETRY_DELAY), "{next:?}");
    proposer.handle_timeout(next);

    assert_eq!(Some(ballot(7, 4)), proposer.ballot());
    assert_eq!(vec![1, 2], sent(&drain(&mut proposer)).iter().map(|(member, _)| *member).collect::<Vec<_>>());
}

#[test]
fn vote_for_a_term_that_an_acceptor_does_not_know_is_repeated() {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    for member in [1, 2] {
        proposer.handle_connected(MemberId(member), &status(member, ballot(6, 1), OTHER), ms(0));
    }
    drain(&mut proposer);

    let unknown = Refusal::TermNotGranted { known: Term(6) };
    proposer.handle_message(MemberId(1), refused(unknown, ballot(6, 1), OTHER), ms(1));
    proposer.handle_timeout(ms(101));

    let commands = drain(&mut proposer);
    assert!(matches!(sent(&commands)[..], [(1, ProposerMessage::Vote(_))]), "{commands:?}");
}

#[test]
fn proposer_is_fenced_when_a_majority_cannot_be_had() {
    let mut proposer = leading();

    proposer.handle_message(MemberId(1), refused(Refusal::Fenced, ballot(8, 0), OTHER), ms(1));
    assert!(!proposer.is_fenced());
    proposer.handle_message(MemberId(3), refused(Refusal::Fenced, ballot(9, 0), OTHER), ms(1));

    let commands = drain(&mut proposer);
    assert_eq!(Some(&ProposerCommand::Fenced { ballot: ballot(9, 0), writer: OTHER }), commands.last());
    proposer.handle_message(MemberId(2), appended(1, 0), ms(2));
    proposer.handle_wal(START, at(8), ms(2));
    assert_eq!((Vec::<ProposerCommand>::new(), None), (drain(&mut proposer), proposer.poll_timeout()));
}

#[test]
fn bytes_in_flight_are_bounded_even_inside_a_huge_record() {
    let mut proposer = leading();

    proposer.handle_wal(START, at(3 * IN_FLIGHT_BYTES_MAX), ms(1));
    let commands = drain(&mut proposer);
    let to_first: Vec<_> = wal(&commands).into_iter().filter(|(member, _)| *member == 1).collect();
    assert_eq!((IN_FLIGHT_BYTES_MAX / APPEND_BYTES_MAX) as usize, to_first.len());
    assert_eq!(at(IN_FLIGHT_BYTES_MAX), to_first.last().unwrap().1.end_lsn);

    // No record has ended, but the bytes are durable: the next may come.
    let durable = Appended {
        ballot: ballot(7, 1),
        sequence: 5,
        flush_lsn: START,
        durable_lsn: at(APPEND_BYTES_MAX),
        disk_full: false,
    };
    proposer.handle_message(MemberId(1), AcceptorMessage::Appended(durable), ms(2));
    let commands = drain(&mut proposer);
    let [(1, append)] = wal(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((at(IN_FLIGHT_BYTES_MAX), Lsn(0)), (append.begin_lsn, Lsn::INVALID));
}

#[test]
fn gap_is_filled_once() {
    let mut proposer = leading();
    proposer.handle_wal(START, at(64), ms(1));
    proposer.handle_wal(START, at(128), ms(1));
    drain(&mut proposer);

    let gap = |sequence| {
        AcceptorMessage::Refused(Refused {
            reason: Refusal::Gap { expected: at(32) },
            sequence,
            ballot: ballot(7, 1),
            writer: WRITER,
            configuration: configuration(),
        })
    };
    proposer.handle_message(MemberId(2), gap(2), ms(2));
    let commands = drain(&mut proposer);
    let [(2, append)] = wal(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((4, at(32), at(128)), (append.sequence, append.begin_lsn, append.end_lsn));
    proposer.handle_message(MemberId(2), gap(3), ms(2));
    assert_eq!(Vec::<ProposerCommand>::new(), drain(&mut proposer), "sent before the repair");
}

#[test]
fn full_disk_pauses_one_acceptor_and_it_goes_on_by_itself() {
    let mut proposer = leading();
    proposer.handle_wal(START, at(64), ms(1));
    drain(&mut proposer);
    let full = Refused {
        reason: Refusal::DiskFull,
        sequence: 2,
        ballot: ballot(7, 1),
        writer: WRITER,
        configuration: configuration(),
    };
    proposer.handle_message(MemberId(2), AcceptorMessage::Refused(full), ms(2));
    proposer.handle_wal(START, at(128), ms(3));
    let commands = drain(&mut proposer);
    assert_eq!(vec![1, 3], wal(&commands).iter().map(|(member, _)| *member).collect::<Vec<_>>());

    proposer.handle_message(MemberId(2), appended(3, 0), ms(4));
    let commands = drain(&mut proposer);
    let [(2, append)] = wal(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((START, at(128)), (append.begin_lsn, append.end_lsn));
}

#[test]
fn timeline_travels_with_the_append_that_it_begins_in() {
    let mut proposer = leading();
    proposer.handle_wal(START, at(64), ms(1));
    drain(&mut proposer);
    let entry = TimelineEntry { timeline: PgTimeline(2), start_lsn: at(64), history_file: b"1\t0/1\n".to_vec() };

    proposer.handle_timeline(entry.clone());
    proposer.handle_wal(START, at(128), ms(2));
    proposer.handle_wal(START, at(192), ms(2));

    let commands = drain(&mut proposer);
    let timelines: Vec<_> =
        wal(&commands).into_iter().filter(|(member, _)| *member == 1).map(|(_, a)| &a.timeline).collect();
    assert_eq!(vec![&Some(entry), &None], timelines);
}

#[test]
fn member_with_another_disk_is_not_listened_to() {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    drain(&mut proposer);
    let replaced = AcceptorStatus { disk: DiskId([99; 16]), ..status(1, ballot(7, 0), WRITER) };

    proposer.handle_connected(MemberId(1), &replaced, ms(0));

    let trouble = Trouble::OtherDisk(replaced);
    let expected = vec![
        ProposerCommand::Trouble { member: MemberId(1), trouble },
        ProposerCommand::Disconnect { member: MemberId(1) },
    ];
    assert_eq!(expected, drain(&mut proposer));
}

#[test]
fn log_that_ends_below_a_known_commit_is_not_elected() {
    let mut proposer = Proposer::new(GRANT, RUN, configuration());
    for member in 1..=3 {
        proposer.handle_connected(MemberId(member), &status(member, ballot(7, 0), WRITER), ms(0));
    }
    drain(&mut proposer);
    let (b1, b7) = (ballot(1, 1), ballot(7, 1));
    let knows = Voted { commit_lsn: at(96), ..voted(1, b7, Ballot::default(), 0, &[]) };

    proposer.handle_message(MemberId(1), AcceptorMessage::Voted(knows), ms(0));
    proposer.handle_message(MemberId(2), AcceptorMessage::Voted(voted(2, b7, b1, 64, &[(b1, 0)])), ms(0));
    let trouble = Trouble::EndOfLogBelowCommit { end: at(64), commit_lsn: at(96) };
    assert_eq!(vec![ProposerCommand::Trouble { member: MemberId(2), trouble }], drain(&mut proposer));

    proposer.handle_message(MemberId(3), AcceptorMessage::Voted(voted(3, b7, b1, 96, &[(b1, 0)])), ms(0));
    assert_eq!(3, sent(&drain(&mut proposer)).len(), "elected with the vote that has it");
}

#[test]
fn newer_configuration_is_learnt_from_a_refusal_and_counts_from_the_votes_that_persist_it() {
    let mut proposer = leading();
    proposer.handle_wal(START, at(64), ms(1));
    drain(&mut proposer);

    let stale = Refused {
        reason: Refusal::StaleGeneration,
        sequence: 2,
        ballot: ballot(7, 1),
        writer: WRITER,
        configuration: joint(),
    };
    proposer.handle_message(MemberId(1), AcceptorMessage::Refused(stale), ms(2));
    let commands = drain(&mut proposer);
    let vote =
        ProposerMessage::Vote(Vote { ballot: ballot(7, 1), writer: WRITER, incarnation: RUN, configuration: joint() });
    assert_eq!(vec![(1, &vote), (2, &vote), (3, &vote)], sent(&commands));
    assert!(commands.contains(&ProposerCommand::Connect { member: MemberId(4), address: "m4:1".into() }));
    let [(1, again)] = wal(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((Generation(2), START, Lsn::INVALID), (again.generation, again.begin_lsn, again.commit_lsn));

    // Durable on two, but they may still be counted in the old configuration by somebody else.
    for member in [1, 2] {
        proposer.handle_message(MemberId(member), appended(3, 64), ms(3));
    }
    let committed = ProposerCommand::Committed { commit_lsn: at(64) };
    assert!(!drain(&mut proposer).contains(&committed));
    for member in [1, 2] {
        let vote = Voted { generation: Generation(2), ..voted(member, ballot(7, 1), ballot(7, 1), 64, &[]) };
        proposer.handle_message(MemberId(member), AcceptorMessage::Voted(vote), ms(4));
    }
    assert!(drain(&mut proposer).contains(&committed), "a majority of both sets");
}

#[test]
fn recycled_wal_is_fetched_from_a_peer_that_has_it() {
    let mut proposer = leading();
    proposer.handle_wal(START, at(64), ms(1));
    for member in [1, 2] {
        proposer.handle_message(MemberId(member), appended(2, 64), ms(2));
    }
    proposer.handle_disconnected(MemberId(3), ms(2));
    proposer.handle_wal(at(64), at(96), ms(3));
    drain(&mut proposer);

    proposer.handle_connected(MemberId(3), &status(3, ballot(7, 1), WRITER), ms(4));
    let vote = AcceptorMessage::Voted(voted(3, ballot(7, 1), ballot(7, 1), 0, &[(ballot(7, 1), 0)]));
    proposer.handle_message(MemberId(3), vote, ms(4));
    proposer.handle_message(MemberId(3), accepted(ballot(7, 1), 0), ms(4));

    let commands = drain(&mut proposer);
    let donor = |n: u32| Donor { member: MemberId(n), address: format!("m{n}:1") };
    let catch_up =
        CatchUp { ballot: ballot(7, 1), generation: Generation(1), until: at(64), donors: vec![donor(1), donor(2)] };
    assert!(sent(&commands).contains(&(3, &ProposerMessage::CatchUp(catch_up))), "{commands:?}");

    proposer.handle_message(MemberId(3), appended(3, 64), ms(5));
    let commands = drain(&mut proposer);
    let [(3, append)] = wal(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((at(64), at(96)), (append.begin_lsn, append.end_lsn));
}

#[test]
fn silent_acceptor_is_disconnected_and_tried_again() {
    let mut proposer = leading();
    for at_ms in (200..=5000).step_by(200) {
        proposer.handle_timeout(ms(at_ms));
        for member in [1, 2] {
            proposer.handle_message(MemberId(member), appended(1 + at_ms / 200, 0), ms(at_ms));
        }
    }
    let commands = drain(&mut proposer);
    assert!(commands.contains(&ProposerCommand::Disconnect { member: MemberId(3) }));

    proposer.handle_timeout(ms(5100));
    let commands = drain(&mut proposer);
    assert!(commands.contains(&ProposerCommand::Connect { member: MemberId(3), address: "m3:1".into() }));
}
