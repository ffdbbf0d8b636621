//! The acceptor's rules, one test each, with the exact commands that come out.

use consensus::{
    Acceptor, AcceptorCommand, AcceptorIdentity, AcceptorState, CatchUpTask, Configuration, ConfigurationError,
    FenceAccepted, LEASE_LENGTH, Member, RecoveryError, TermEntry, TermHistory,
    message::{
        AcceptorMessage, Append, Appended, CatchUp, Donor, Elected, ElectedAccepted, ProposerMessage, Refusal,
        TimelineEntry, Vote, Voted,
    },
};
use pgtypes::{
    Attempt, Ballot, DiskId, FrameSummary, Generation, Incarnation, Instant, LogId, Lsn, MemberId, PgTimeline,
    SystemId, Term, WriterId,
};
use std::time::Duration;

const W1: WriterId = WriterId([1; 16]);
const W2: WriterId = WriterId([2; 16]);
const RUN1: Incarnation = Incarnation([11; 16]);
const RUN2: Incarnation = Incarnation([12; 16]);
const START: Lsn = Lsn(16 << 20);
const NEVER: Instant = Instant(0);

fn ballot(term: u64, attempt: u32) -> Ballot {
    Ballot { term: Term(term), attempt: Attempt(attempt) }
}

fn at(bytes: u64) -> Lsn {
    START.advance(bytes)
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

fn identity() -> AcceptorIdentity {
    AcceptorIdentity {
        log: LogId::default(),
        system: SystemId(7),
        member: MemberId(1),
        disk: DiskId([1; 16]),
        segment_bytes: 16 << 20,
        start: end(0),
    }
}

fn created() -> AcceptorState {
    AcceptorState::created(configuration(), START, PgTimeline(1))
}

fn fresh() -> Acceptor {
    Acceptor::new(identity(), created(), end(0), NEVER).expect("starts")
}

fn drain(acceptor: &mut Acceptor) -> Vec<AcceptorCommand> {
    std::iter::from_fn(|| acceptor.poll_command()).collect()
}

/// Drains the commands, performing persists and truncations at once, and returns the messages sent.
fn settle(acceptor: &mut Acceptor) -> Vec<AcceptorMessage> {
    let mut messages = Vec::new();
    while let Some(command) = acceptor.poll_command() {
        match command {
            AcceptorCommand::Persist { sequence, .. } => acceptor.handle_persisted(sequence),
            AcceptorCommand::Truncate { to } => {
                acceptor.handle_truncated(FrameSummary { record_end: to, ..end(0) });
            }
            AcceptorCommand::Reply { message, .. } => messages.push(message.into_message()),
            _ => {}
        }
    }
    messages
}

fn vote(ballot: Ballot, writer: WriterId, incarnation: Incarnation) -> ProposerMessage {
    ProposerMessage::Vote(Vote { ballot, writer, incarnation, configuration: configuration() })
}

fn elected(ballot: Ballot, incarnation: Incarnation, history: &[(Ballot, u64)]) -> ProposerMessage {
    let entries = history.iter().map(|&(ballot, bytes)| TermEntry { ballot, start_lsn: at(bytes) }).collect();
    ProposerMessage::Elected(Elected {
        ballot,
        incarnation,
        generation: Generation(1),
        start: end(history.last().expect("an entry").1),
        history: TermHistory(entries),
        timelines: created().timelines,
        commit_lsn: Lsn::INVALID,
    })
}

fn append(ballot: Ballot, sequence: u64, begin: u64, end: u64, commit: Lsn) -> Append {
    Append {
        ballot,
        generation: Generation(1),
        sequence,
        begin_lsn: at(begin),
        end_lsn: at(end),
        commit_lsn: commit,
        timeline: None,
    }
}

fn refusal_of(message: &AcceptorMessage) -> Refusal {
    match message {
        AcceptorMessage::Refused(refused) => refused.reason.clone(),
        other => panic!("not a refusal: {other:?}"),
    }
}

/// An acceptor that accepted the election of (1, 1) at the start of the log, on connection 5.
fn following() -> Acceptor {
    let mut acceptor = fresh();
    acceptor.handle_fence(1, Term(1), W1, NEVER);
    acceptor.handle_message(5, vote(ballot(1, 1), W1, RUN1), NEVER);
    acceptor.handle_message(5, elected(ballot(1, 1), RUN1, &[(ballot(1, 1), 0)]), NEVER);
    settle(&mut acceptor);
    acceptor
}

/// The same with WAL `[0, bytes)` in whole records, durable.
fn holding(bytes: u64) -> Acceptor {
    let mut acceptor = following();
    let append = append(ballot(1, 1), 1, 0, bytes, Lsn::INVALID);
    acceptor.check_append(5, &append).expect("follows");
    acceptor.appended(5, &append, end(bytes), NEVER);
    acceptor.handle_flushed(end(bytes), at(bytes));
    settle(&mut acceptor);
    acceptor
}

#[test]
fn fence_is_answered_when_it_is_durable() {
    let mut acceptor = fresh();

    acceptor.handle_fence(9, Term(3), W1, NEVER);
    let state = AcceptorState { ballot: ballot(3, 0), writer: W1, ..created() };
    assert_eq!(vec![AcceptorCommand::Persist { sequence: 1, state, before_writes: false }], drain(&mut acceptor));

    acceptor.handle_persisted(1);
    let accepted = FenceAccepted {
        term: Term(3),
        writer: W1,
        last_ballot: Ballot::default(),
        flush_lsn: START,
        generation: Generation(1),
        promise_remaining: Duration::ZERO,
    };
    let reply = AcceptorCommand::ReplyFence { request: 9, result: Ok(accepted) };
    assert_eq!(vec![reply.clone()], drain(&mut acceptor));

    acceptor.handle_fence(9, Term(3), W1, NEVER);
    assert_eq!(vec![reply], drain(&mut acceptor), "idempotent, nothing to write");
}

#[test]
fn fence_of_a_lower_term_or_for_another_writer_is_refused() {
    let mut acceptor = fresh();
    acceptor.handle_fence(1, Term(3), W1, NEVER);
    settle(&mut acceptor);

    for (term, writer, expected) in [(2, W1, Refusal::Fenced), (3, W2, Refusal::OtherWriter), (0, W1, Refusal::Fenced)]
    {
        acceptor.handle_fence(2, Term(term), writer, NEVER);
        let result = Err(acceptor.refusal(expected, 0));
        assert_eq!(vec![AcceptorCommand::ReplyFence { request: 2, result }], drain(&mut acceptor));
    }
}

#[test]
fn vote_is_answered_when_it_is_durable() {
    let mut acceptor = fresh();
    acceptor.handle_fence(1, Term(1), W1, NEVER);
    settle(&mut acceptor);

    acceptor.handle_message(5, vote(ballot(1, 1), W1, RUN1), NEVER);
    let state = AcceptorState { ballot: ballot(1, 1), writer: W1, incarnation: RUN1, ..created() };
    assert_eq!(vec![AcceptorCommand::Persist { sequence: 2, state, before_writes: false }], drain(&mut acceptor));
    acceptor.handle_persisted(1);
    assert_eq!(Vec::<AcceptorCommand>::new(), drain(&mut acceptor), "an older state proves nothing");
    acceptor.handle_persisted(2);

    let voted = Voted {
        ballot: ballot(1, 1),
        incarnation: RUN1,
        member: MemberId(1),
        disk: DiskId([1; 16]),
        generation: Generation(1),
        last_ballot: Ballot::default(),
        flush: end(0),
        history: TermHistory::default(),
        timelines: created().timelines,
        commit_lsn: START,
        oldest_lsn: START,
        promise_remaining: Duration::ZERO,
    };
    assert_eq!(vec![AcceptorMessage::Voted(voted)], settle(&mut acceptor));
}

#[test]
fn vote_needs_the_granted_term_its_writer_and_a_new_attempt() {
    let mut acceptor = fresh();
    acceptor.handle_fence(1, Term(2), W1, NEVER);
    acceptor.handle_message(5, vote(ballot(2, 2), W1, RUN1), NEVER);
    settle(&mut acceptor);

    for (message, expected) in [
        (vote(ballot(1, 9), W2, RUN2), Refusal::Fenced),
        (vote(ballot(3, 1), W2, RUN2), Refusal::TermNotGranted { known: Term(2) }),
        (vote(ballot(2, 3), W2, RUN2), Refusal::OtherWriter),
        (vote(ballot(2, 1), W1, RUN1), Refusal::StaleAttempt),
        (vote(ballot(2, 2), W1, RUN2), Refusal::StaleAttempt),
    ] {
        acceptor.handle_message(6, message, NEVER);
        assert_eq!(vec![expected], settle(&mut acceptor).iter().map(refusal_of).collect::<Vec<_>>());
    }
    acceptor.handle_message(6, vote(ballot(2, 2), W1, RUN1), NEVER);
    assert!(matches!(&settle(&mut acceptor)[..], [AcceptorMessage::Voted(_)]), "the same run is answered again");
}

#[test]
fn vote_for_an_unknown_term_asks_the_peers_and_their_fence_is_adopted() {
    let mut acceptor = fresh();

    acceptor.handle_message(5, vote(ballot(3, 1), W1, RUN1), NEVER);
    assert_eq!(Some(AcceptorCommand::AskPeers), acceptor.poll_command());
    settle(&mut acceptor);
    acceptor.handle_peer_ballot(Term(3), W1);
    acceptor.handle_peer_ballot(Term(2), W2);
    settle(&mut acceptor);

    assert_eq!((ballot(3, 0), W1), (acceptor.state().ballot, acceptor.state().writer));
}

#[test]
fn election_is_durable_before_it_is_accepted_and_before_any_append() {
    let mut acceptor = fresh();
    acceptor.handle_fence(1, Term(1), W1, NEVER);
    acceptor.handle_message(5, vote(ballot(1, 1), W1, RUN1), NEVER);
    settle(&mut acceptor);

    acceptor.handle_message(5, elected(ballot(1, 1), RUN1, &[(ballot(1, 1), 0)]), NEVER);
    // The disk may hold anything behind the end that was found at the start.
    assert_eq!(vec![AcceptorCommand::Truncate { to: START }], drain(&mut acceptor));
    acceptor.handle_truncated(end(0));
    let [AcceptorCommand::Persist { sequence, state, .. }] = &drain(&mut acceptor)[..] else { panic!("no persist") };
    assert_eq!(ballot(1, 1), state.elected);
    let early = append(ballot(1, 1), 1, 0, 8, Lsn::INVALID);
    assert_eq!(Err(Refusal::NotElected), acceptor.check_append(5, &early).map_err(|refused| refused.reason));

    acceptor.handle_persisted(*sequence);
    let accepted = ElectedAccepted { ballot: ballot(1, 1), flush_lsn: START };
    assert_eq!(vec![AcceptorMessage::ElectedAccepted(accepted)], settle(&mut acceptor));
    assert_eq!(Ok(()), acceptor.check_append(5, &early));
}

#[test]
fn append_is_acknowledged_when_it_is_flushed_and_once_for_all() {
    let mut acceptor = following();

    for (sequence, begin, to, records) in [(1, 0, 80, 64), (2, 80, 160, 152)] {
        let append = append(ballot(1, 1), sequence, begin, to, Lsn::INVALID);
        assert_eq!(Ok(()), acceptor.check_append(5, &append));
        acceptor.appended(5, &append, end(records), NEVER);
    }
    assert_eq!(Vec::<AcceptorCommand>::new(), drain(&mut acceptor));
    assert_eq!((at(160), end(152)), (acceptor.receive_lsn(), acceptor.received()));

    acceptor.handle_flushed(end(152), at(160));
    let appended =
        Appended { ballot: ballot(1, 1), sequence: 2, flush_lsn: at(152), durable_lsn: at(160), disk_full: false };
    assert_eq!(vec![AcceptorMessage::Appended(appended)], settle(&mut acceptor));
}

#[test]
fn heartbeat_is_answered_at_once_with_what_is_durable() {
    let mut acceptor = following();
    let bytes = append(ballot(1, 1), 1, 0, 80, Lsn::INVALID);
    acceptor.appended(5, &bytes, end(80), NEVER);

    let heartbeat = append(ballot(1, 1), 2, 80, 80, Lsn::INVALID);
    acceptor.handle_message(5, ProposerMessage::Append(heartbeat), NEVER);

    let appended =
        Appended { ballot: ballot(1, 1), sequence: 2, flush_lsn: START, durable_lsn: START, disk_full: false };
    assert_eq!(vec![AcceptorMessage::Appended(appended)], settle(&mut acceptor));
}

#[test]
fn commit_follows_what_is_announced_as_far_as_the_log_reaches() {
    let mut acceptor = holding(64);

    let announce = append(ballot(1, 1), 2, 64, 128, at(128));
    acceptor.appended(5, &announce, end(128), NEVER);
    assert_eq!(at(64), acceptor.commit_lsn());
    acceptor.handle_flushed(end(128), at(128));
    assert_eq!((at(128), at(128)), (acceptor.commit_lsn(), acceptor.readable_until()));

    let lower = append(ballot(1, 1), 3, 128, 128, at(64));
    acceptor.handle_message(5, ProposerMessage::Append(lower), NEVER);
    assert_eq!(at(128), acceptor.commit_lsn(), "raised only");
}

#[test]
fn append_must_begin_where_the_log_ends() {
    let acceptor = holding(64);

    let gap = append(ballot(1, 1), 2, 72, 80, Lsn::INVALID);
    let refused = acceptor.check_append(5, &gap).unwrap_err();

    assert_eq!((Refusal::Gap { expected: at(64) }, 2), (refused.reason, refused.sequence));
}

#[test]
fn fence_silences_the_earlier_writer_at_once() {
    let mut acceptor = holding(64);
    let sent = append(ballot(1, 1), 2, 64, 128, Lsn::INVALID);
    acceptor.appended(5, &sent, end(128), NEVER);

    acceptor.handle_fence(1, Term(2), W2, NEVER);
    acceptor.handle_flushed(end(128), at(128));

    let later = append(ballot(1, 1), 3, 128, 136, Lsn::INVALID);
    assert_eq!(Refusal::Fenced, acceptor.check_append(5, &later).unwrap_err().reason);
    assert_eq!(Vec::<AcceptorMessage>::new(), settle(&mut acceptor), "flushed after the fence: not acknowledged");
    assert_eq!(at(128), acceptor.flush().record_end, "but voted with");
}

#[test]
fn divergent_wal_is_cut_off_before_the_election_is_durable() {
    let mut acceptor = holding(128);
    acceptor.handle_fence(1, Term(2), W2, NEVER);
    acceptor.handle_message(6, vote(ballot(2, 1), W2, RUN2), NEVER);
    settle(&mut acceptor);

    acceptor.handle_message(6, elected(ballot(2, 1), RUN2, &[(ballot(1, 1), 0), (ballot(2, 1), 64)]), NEVER);
    assert_eq!(vec![AcceptorCommand::Truncate { to: at(64) }], drain(&mut acceptor));
    acceptor.handle_flushed(end(128), at(128));
    acceptor.handle_truncated(end(64));

    assert_eq!(at(64), acceptor.receive_lsn());
    let accepted = ElectedAccepted { ballot: ballot(2, 1), flush_lsn: at(64) };
    assert_eq!(vec![AcceptorMessage::ElectedAccepted(accepted)], settle(&mut acceptor));
}

#[test]
fn committed_wal_is_never_cut_off() {
    let mut acceptor = holding(128);
    let announce = append(ballot(1, 1), 2, 128, 128, at(128));
    acceptor.handle_message(5, ProposerMessage::Append(announce), NEVER);
    acceptor.handle_fence(1, Term(2), W2, NEVER);
    acceptor.handle_message(6, vote(ballot(2, 1), W2, RUN2), NEVER);
    settle(&mut acceptor);

    acceptor.handle_message(6, elected(ballot(2, 1), RUN2, &[(ballot(1, 1), 0), (ballot(2, 1), 64)]), NEVER);

    assert!(matches!(&settle(&mut acceptor)[..], [m] if matches!(refusal_of(m), Refusal::Malformed { .. })));
    assert_eq!(at(128), acceptor.flush().record_end);
}

#[test]
fn vote_during_a_truncation_waits_for_the_end_of_the_log() {
    let mut acceptor = holding(128);
    acceptor.handle_fence(1, Term(2), W2, NEVER);
    acceptor.handle_message(6, vote(ballot(2, 1), W2, RUN2), NEVER);
    settle(&mut acceptor);
    acceptor.handle_message(6, elected(ballot(2, 1), RUN2, &[(ballot(1, 1), 0), (ballot(2, 1), 64)]), NEVER);

    acceptor.handle_message(7, vote(ballot(2, 2), W2, RUN2), NEVER);
    let mut commands = drain(&mut acceptor);
    let Some(AcceptorCommand::Persist { sequence, state, .. }) = commands.pop() else { panic!("no persist") };
    assert_eq!(TermHistory([TermEntry { ballot: ballot(1, 1), start_lsn: START }].into()), state.history);
    let [AcceptorCommand::Truncate { .. }, AcceptorCommand::Reply { connection: 6, message }] = &commands[..] else {
        panic!("{commands:?}")
    };
    assert_eq!(Refusal::StaleAttempt, refusal_of(message.message()), "that election is over");
    acceptor.handle_persisted(sequence);
    assert_eq!(Vec::<AcceptorCommand>::new(), drain(&mut acceptor));

    acceptor.handle_truncated(end(64));
    let [AcceptorMessage::Voted(voted)] = &settle(&mut acceptor)[..] else { panic!("no vote") };
    assert_eq!((ballot(1, 1), at(64)), (voted.last_ballot, voted.flush.record_end));
}

#[test]
fn reconnected_writer_goes_on_behind_the_last_durable_record() {
    let mut acceptor = holding(64);
    let unfinished = append(ballot(1, 1), 2, 64, 100, Lsn::INVALID);
    acceptor.appended(5, &unfinished, end(64), NEVER);
    acceptor.handle_disconnected(5);

    acceptor.handle_message(6, vote(ballot(1, 1), W1, RUN1), NEVER);
    acceptor.handle_message(6, elected(ballot(1, 1), RUN1, &[(ballot(1, 1), 0)]), NEVER);
    let commands = drain(&mut acceptor);
    assert!(commands.contains(&AcceptorCommand::Truncate { to: at(64) }), "{commands:?}");
    acceptor.handle_truncated(end(64));
    settle(&mut acceptor);

    let next = append(ballot(1, 1), 3, 64, 128, Lsn::INVALID);
    assert_eq!(Refusal::NotElected, acceptor.check_append(5, &next).unwrap_err().reason, "the old connection");
    assert_eq!(Ok(()), acceptor.check_append(6, &next));
}

#[test]
fn promise_of_a_lease_is_told_to_the_next_ballot_and_assumed_after_a_restart() {
    let mut acceptor = following();
    let t0 = Instant(1_000_000_000);
    let heartbeat = append(ballot(1, 1), 1, 0, 0, Lsn::INVALID);
    acceptor.handle_message(5, ProposerMessage::Append(heartbeat), t0);
    acceptor.handle_fence(1, Term(2), W2, t0.after(Duration::from_millis(500)));
    acceptor.handle_message(6, vote(ballot(2, 1), W2, RUN2), t0.after(Duration::from_millis(600)));

    let mut remaining = Vec::new();
    while let Some(command) = acceptor.poll_command() {
        match command {
            AcceptorCommand::Persist { sequence, .. } => acceptor.handle_persisted(sequence),
            AcceptorCommand::ReplyFence { result, .. } => remaining.push(result.unwrap().promise_remaining),
            AcceptorCommand::Reply { message, .. } => {
                if let AcceptorMessage::Voted(voted) = message.into_message() {
                    remaining.push(voted.promise_remaining);
                }
            }
            _ => {}
        }
    }
    assert_eq!(vec![Duration::from_millis(1000), Duration::from_millis(900)], remaining);

    let started = t0.after(Duration::from_secs(9));
    let mut again = Acceptor::new(identity(), acceptor.state().clone(), end(0), started).unwrap();
    again.handle_message(7, vote(ballot(2, 1), W2, RUN2), started.after(Duration::from_millis(1)));
    let [AcceptorMessage::Voted(voted)] = &settle(&mut again)[..] else { panic!("no vote") };
    assert_eq!(LEASE_LENGTH - Duration::from_millis(1), voted.promise_remaining);
}

#[test]
fn timeline_is_durable_before_its_bytes_count() {
    let mut acceptor = holding(64);
    let entry = TimelineEntry { timeline: PgTimeline(2), start_lsn: at(64), history_file: b"1\t0/1\n".to_vec() };
    let append = Append { timeline: Some(entry.clone()), ..append(ballot(1, 1), 2, 64, 128, Lsn::INVALID) };

    acceptor.check_append(5, &append).unwrap();
    acceptor.appended(5, &append, end(128), NEVER);
    let commands = drain(&mut acceptor);
    let [AcceptorCommand::Persist { sequence, state, before_writes: true }] = &commands[..] else {
        panic!("{commands:?}")
    };
    assert_eq!(Some(&entry), state.timelines.0.last());
    acceptor.handle_flushed(end(128), at(128));
    let [AcceptorMessage::Appended(early)] = &settle(&mut acceptor)[..] else { panic!() };
    assert_eq!(at(64), early.flush_lsn);

    acceptor.handle_persisted(*sequence);
    let [AcceptorMessage::Appended(late)] = &settle(&mut acceptor)[..] else { panic!() };
    assert_eq!(at(128), late.flush_lsn);
}

#[test]
fn timeline_outside_its_append_is_refused() {
    let acceptor = holding(64);
    for (timeline, start) in [(2, 56), (2, 128), (1, 64)] {
        let entry = TimelineEntry { timeline: PgTimeline(timeline), start_lsn: at(start), history_file: Vec::new() };
        let append = Append { timeline: Some(entry), ..append(ballot(1, 1), 2, 64, 128, Lsn::INVALID) };
        let refused = acceptor.check_append(5, &append).unwrap_err();
        assert!(matches!(refused.reason, Refusal::Malformed { .. }), "{timeline} {start}");
    }
}

#[test]
fn catch_up_fetches_under_the_same_rules_as_appends() {
    let mut acceptor = holding(64);
    let donor = |n: u32| Donor { member: MemberId(n), address: format!("m{n}:1") };
    let catch_up =
        CatchUp { ballot: ballot(1, 1), generation: Generation(1), until: at(256), donors: vec![donor(1), donor(3)] };
    acceptor.handle_message(5, ProposerMessage::CatchUp(catch_up.clone()), NEVER);
    let task = CatchUpTask { ballot: ballot(1, 1), from: at(64), until: at(256), donors: vec![donor(3)] };
    assert_eq!(vec![AcceptorCommand::CatchUp(task)], drain(&mut acceptor));

    assert_eq!(Err(Refusal::Gap { expected: at(64) }), acceptor.check_fetched(ballot(1, 1), at(72)));
    assert_eq!(Ok(()), acceptor.check_fetched(ballot(1, 1), at(64)));
    acceptor.fetched(at(256), end(256));
    acceptor.handle_flushed(end(256), at(256));
    let [AcceptorMessage::Appended(appended)] = &settle(&mut acceptor)[..] else { panic!() };
    assert_eq!(at(256), appended.flush_lsn);

    acceptor.handle_fence(1, Term(2), W2, NEVER);
    assert_eq!(Err(Refusal::Fenced), acceptor.check_fetched(ballot(1, 1), at(256)));
}

#[test]
fn donor_serves_beyond_commit_only_to_its_own_ballot() {
    let acceptor = holding(64);

    assert_eq!(START, acceptor.readable_until());
    assert!(acceptor.may_serve(ballot(1, 1), at(64)));
    assert!(!acceptor.may_serve(ballot(2, 1), at(64)));
    assert!(!acceptor.may_serve(Ballot::default(), at(8)));
}

#[test]
fn disk_that_is_not_in_the_configuration_takes_part_in_nothing() {
    let replaced = AcceptorIdentity { disk: DiskId([99; 16]), ..identity() };
    let mut acceptor = Acceptor::new(replaced, created(), end(0), NEVER).unwrap();

    acceptor.handle_fence(1, Term(1), W1, NEVER);
    let result = Err(acceptor.refusal(Refusal::NotAMember, 0));
    assert_eq!(vec![AcceptorCommand::ReplyFence { request: 1, result }], drain(&mut acceptor));
    acceptor.handle_peer_ballot(Term(1), W1);
    acceptor.handle_message(5, vote(ballot(1, 1), W1, RUN1), NEVER);
    acceptor.handle_message(5, elected(ballot(1, 1), RUN1, &[(ballot(1, 1), 0)]), NEVER);
    let heartbeat = append(ballot(1, 1), 1, 0, 0, Lsn::INVALID);
    acceptor.handle_message(5, ProposerMessage::Append(heartbeat), NEVER);
    let refusals: Vec<_> = settle(&mut acceptor).iter().map(refusal_of).collect();
    assert_eq!(vec![Refusal::NotAMember; 3], refusals);
    assert_eq!(Err(Refusal::NotAMember), acceptor.check_fetched(ballot(1, 1), START));
}

#[test]
fn older_generation_is_refused_and_a_newer_one_is_learnt_with_the_vote() {
    let mut acceptor = fresh();
    acceptor.handle_fence(1, Term(1), W1, NEVER);
    settle(&mut acceptor);
    let joint = Configuration {
        generation: Generation(2),
        members: members(&[1, 2, 3]),
        new_members: Some(members(&[1, 2, 4])),
    };
    let newer = Vote { ballot: ballot(1, 1), writer: W1, incarnation: RUN1, configuration: joint.clone() };

    acceptor.handle_message(5, ProposerMessage::Vote(newer), NEVER);
    let [AcceptorMessage::Voted(voted)] = &settle(&mut acceptor)[..] else { panic!("no vote") };
    assert_eq!(Generation(2), voted.generation);
    assert_eq!(joint, acceptor.state().configuration);

    acceptor.handle_message(5, vote(ballot(1, 2), W1, RUN1), NEVER);
    let [AcceptorMessage::Refused(refused)] = &settle(&mut acceptor)[..] else { panic!("no refusal") };
    assert_eq!((Refusal::StaleGeneration, joint), (refused.reason.clone(), refused.configuration.clone()));
}

#[test]
fn final_configuration_waits_for_a_commit_counted_with_the_joint_one() {
    let mut acceptor = holding(64);
    let joint = Configuration {
        generation: Generation(2),
        members: members(&[1, 2, 3]),
        new_members: Some(members(&[1, 2, 4])),
    };
    let last = Configuration { generation: Generation(3), members: members(&[1, 2, 4]), new_members: None };
    let answers = |acceptor: &mut Acceptor| -> Vec<Result<Generation, ConfigurationError>> {
        let mut answers = Vec::new();
        while let Some(command) = acceptor.poll_command() {
            match command {
                AcceptorCommand::Persist { sequence, .. } => acceptor.handle_persisted(sequence),
                AcceptorCommand::ReplyConfiguration { result, .. } => answers.push(result),
                _ => {}
            }
        }
        answers
    };

    acceptor.handle_configuration(1, joint.clone(), NEVER);
    acceptor.handle_configuration(2, joint.clone(), NEVER);
    acceptor.handle_configuration(3, last.clone(), NEVER);
    let expected = vec![Err(ConfigurationError::NotCommitted), Ok(Generation(2)), Ok(Generation(2))];
    assert_eq!(expected, answers(&mut acceptor));

    let silent = Append { generation: Generation(2), ..append(ballot(1, 1), 2, 64, 64, Lsn::INVALID) };
    acceptor.handle_message(5, ProposerMessage::Append(silent), NEVER);
    acceptor.handle_configuration(4, last.clone(), NEVER);
    assert_eq!(vec![Err(ConfigurationError::NotCommitted)], answers(&mut acceptor));

    let counted = Append { generation: Generation(2), ..append(ballot(1, 1), 3, 64, 64, at(64)) };
    acceptor.handle_message(5, ProposerMessage::Append(counted), NEVER);
    acceptor.handle_configuration(5, last.clone(), NEVER.after(LEASE_LENGTH - Duration::from_millis(1)));
    assert_eq!(vec![Err(ConfigurationError::NotCommitted)], answers(&mut acceptor), "earlier leases may still run");
    acceptor.handle_configuration(6, last, NEVER.after(LEASE_LENGTH));
    assert_eq!(vec![Ok(Generation(3))], answers(&mut acceptor));
}

#[test]
fn full_disk_refuses_bytes_and_says_when_there_is_space_again() {
    let mut acceptor = holding(64);
    acceptor.handle_disk_full(true);
    let [AcceptorMessage::Appended(full)] = &settle(&mut acceptor)[..] else { panic!() };
    assert!(full.disk_full);

    let bytes = append(ballot(1, 1), 2, 64, 128, Lsn::INVALID);
    assert_eq!(Refusal::DiskFull, acceptor.check_append(5, &bytes).unwrap_err().reason);
    let heartbeat = append(ballot(1, 1), 3, 64, 64, Lsn::INVALID);
    assert_eq!(Ok(()), acceptor.check_append(5, &heartbeat), "the lease does not depend on disk space");

    acceptor.handle_disk_full(false);
    let [AcceptorMessage::Appended(space)] = &settle(&mut acceptor)[..] else { panic!() };
    assert!(!space.disk_full);
    assert_eq!(Ok(()), acceptor.check_append(5, &bytes));
}

#[test]
fn failed_disk_answers_what_waits_for_it_with_a_refusal() {
    let mut acceptor = fresh();
    acceptor.handle_fence(8, Term(1), W1, NEVER);
    drain(&mut acceptor);

    acceptor.handle_disk_failed();

    let result = Err(acceptor.refusal(Refusal::DiskFailed, 0));
    assert_eq!(vec![AcceptorCommand::ReplyFence { request: 8, result }], drain(&mut acceptor));
    acceptor.handle_persisted(1);
    assert_eq!(Vec::<AcceptorCommand>::new(), drain(&mut acceptor));
}

#[test]
fn log_that_ends_below_its_commit_does_not_start() {
    let state = AcceptorState { commit_lsn: at(64), ..created() };
    let error = Acceptor::new(identity(), state, end(32), NEVER).err();
    assert_eq!(Some(RecoveryError::EndsBelowCommit { end: at(32), commit_lsn: at(64) }), error);
}
