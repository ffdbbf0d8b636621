//! Every message survives the way to bytes and back; no bytes make a decoder panic.

use std::time::Duration;

use consensus::{
    Configuration, Member, TermEntry, TermHistory, TimelineHistory,
    message::{
        AcceptorMessage, AcceptorStatus, Append, Appended, CatchUp, Donor, Elected, ElectedAccepted, ProposerMessage,
        Refusal, Refused, TimelineEntry, Vote, Voted,
    },
};
use filter::{Batch, Item};
use layers::{HashRange, ShardGeneration, ShardId};
use pgtypes::{
    Attempt, Ballot, BranchId, ClusterId, DiskId, FrameSummary, Generation, Incarnation, LogId, Lsn, MemberId,
    PgTimeline, SystemId, Term, WriterId,
};
use proptest::{collection::vec, option, prelude::*};
use wire::append::{
    BallotAnswer, BatchAssembler, BatchFrames, ErrorCode, ErrorFrame, FeedBatch, FeedProgress, FetchWal, Frame,
    FrameReader, Hello, Message, MessageType, Purpose, WalData, WireError, decode, encode_to_vec,
};

fn lsn() -> impl Strategy<Value = Lsn> {
    (0..1u64 << 63).prop_map(Lsn)
}

fn ballot() -> impl Strategy<Value = Ballot> {
    any::<(u64, u32)>().prop_map(|(term, attempt)| Ballot { term: Term(term), attempt: Attempt(attempt) })
}

fn generation() -> impl Strategy<Value = Generation> {
    any::<u32>().prop_map(Generation)
}

fn summary() -> impl Strategy<Value = FrameSummary> {
    (lsn(), lsn(), any::<u32>(), any::<u64>(), any::<i64>()).prop_map(
        |(record_end, record_start, timeline, max_full_xid, commit_timestamp)| FrameSummary {
            record_end,
            record_start,
            timeline: PgTimeline(timeline),
            max_full_xid,
            commit_timestamp,
        },
    )
}

fn term_history() -> impl Strategy<Value = TermHistory> {
    vec((ballot(), lsn()), 0..8).prop_map(|entries| {
        let (mut ballots, mut starts): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
        ballots.sort();
        starts.sort();
        ballots.dedup();
        TermHistory(
            ballots.into_iter().zip(starts).map(|(ballot, start_lsn)| TermEntry { ballot, start_lsn }).collect(),
        )
    })
}

fn timeline_entry() -> impl Strategy<Value = TimelineEntry> {
    (any::<u32>(), lsn(), vec(97..100u8, 0..60)).prop_map(|(timeline, start_lsn, history_file)| TimelineEntry {
        timeline: PgTimeline(timeline),
        start_lsn,
        history_file,
    })
}

fn timelines() -> impl Strategy<Value = TimelineHistory> {
    vec(timeline_entry(), 0..6).prop_map(TimelineHistory)
}

fn member() -> impl Strategy<Value = Member> {
    (any::<u32>(), any::<[u8; 16]>(), ".{0,40}").prop_map(|(member, disk, address)| Member {
        member: MemberId(member),
        disk: DiskId(disk),
        address,
    })
}

fn configuration() -> impl Strategy<Value = Configuration> {
    (generation(), vec(member(), 0..5), option::of(vec(member(), 0..5)))
        .prop_map(|(generation, members, new_members)| Configuration { generation, members, new_members })
}

fn proposer_message() -> impl Strategy<Value = (ProposerMessage, Vec<u8>)> {
    let vote = (ballot(), any::<[u8; 16]>(), any::<[u8; 16]>(), configuration()).prop_map(
        |(ballot, writer, incarnation, configuration)| {
            let (writer, incarnation) = (WriterId(writer), Incarnation(incarnation));
            (ProposerMessage::Vote(Vote { ballot, writer, incarnation, configuration }), vec![])
        },
    );
    let elected = (ballot(), any::<[u8; 16]>(), generation(), summary(), term_history(), timelines(), lsn()).prop_map(
        |(ballot, incarnation, generation, start, history, timelines, commit_lsn)| {
            let incarnation = Incarnation(incarnation);
            let elected = Elected { ballot, incarnation, generation, start, history, timelines, commit_lsn };
            (ProposerMessage::Elected(elected), vec![])
        },
    );
    let append = (
        ballot(),
        generation(),
        any::<u64>(),
        0..1u64 << 62,
        lsn(),
        option::of(timeline_entry()),
        vec(any::<u8>(), 0..3000),
    )
        .prop_map(|(ballot, generation, sequence, begin, commit_lsn, timeline, payload)| {
            let begin_lsn = Lsn(begin);
            let end_lsn = begin_lsn.advance(payload.len() as u64);
            let append = Append { ballot, generation, sequence, begin_lsn, end_lsn, commit_lsn, timeline };
            (ProposerMessage::Append(append), payload)
        });
    let donor = (any::<u32>(), ".{0,40}").prop_map(|(member, address)| Donor { member: MemberId(member), address });
    let catch_up = (ballot(), generation(), lsn(), vec(donor, 0..6)).prop_map(|(ballot, generation, until, donors)| {
        (ProposerMessage::CatchUp(CatchUp { ballot, generation, until, donors }), vec![])
    });
    prop_oneof![vote, elected, append, catch_up]
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        Just(Refusal::Fenced),
        Just(Refusal::OtherWriter),
        any::<u64>().prop_map(|known| Refusal::TermNotGranted { known: Term(known) }),
        Just(Refusal::StaleAttempt),
        Just(Refusal::StaleGeneration),
        Just(Refusal::NotAMember),
        Just(Refusal::NotElected),
        lsn().prop_map(|expected| Refusal::Gap { expected }),
        (lsn(), ".{0,80}").prop_map(|(lsn, detail)| Refusal::BadWal { lsn, detail }),
        Just(Refusal::DiskFull),
        Just(Refusal::DiskFailed),
        ".{0,80}".prop_map(|detail| Refusal::Malformed { detail }),
    ]
}

fn acceptor_message() -> impl Strategy<Value = AcceptorMessage> {
    let identity = || (any::<u32>(), any::<[u8; 16]>()).prop_map(|(member, disk)| (MemberId(member), DiskId(disk)));
    let status = (identity(), ballot(), any::<[u8; 16]>(), configuration(), summary(), lsn(), lsn()).prop_map(
        |((member, disk), ballot, writer, configuration, flush, commit_lsn, oldest_lsn)| {
            let writer = WriterId(writer);
            AcceptorMessage::Status(AcceptorStatus {
                member,
                disk,
                ballot,
                writer,
                configuration,
                flush,
                commit_lsn,
                oldest_lsn,
            })
        },
    );
    let voted = (
        (ballot(), any::<[u8; 16]>(), identity(), generation(), ballot()),
        (summary(), term_history(), timelines(), lsn(), lsn(), any::<u64>()),
    )
        .prop_map(|(who, state)| {
            let (ballot, incarnation, (member, disk), generation, last_ballot) = who;
            let (flush, history, timelines, commit_lsn, oldest_lsn, promise) = state;
            AcceptorMessage::Voted(Voted {
                ballot,
                incarnation: Incarnation(incarnation),
                member,
                disk,
                generation,
                last_ballot,
                flush,
                history,
                timelines,
                commit_lsn,
                oldest_lsn,
                promise_remaining: Duration::from_nanos(promise),
            })
        });
    let accepted = (ballot(), lsn())
        .prop_map(|(ballot, flush_lsn)| AcceptorMessage::ElectedAccepted(ElectedAccepted { ballot, flush_lsn }));
    let appended = (ballot(), any::<u64>(), lsn(), lsn(), any::<bool>()).prop_map(
        |(ballot, sequence, flush_lsn, durable_lsn, disk_full)| {
            AcceptorMessage::Appended(Appended { ballot, sequence, flush_lsn, durable_lsn, disk_full })
        },
    );
    let refused = (refusal(), any::<u64>(), ballot(), any::<[u8; 16]>(), configuration()).prop_map(
        |(reason, sequence, ballot, writer, configuration)| {
            AcceptorMessage::Refused(Refused { reason, sequence, ballot, writer: WriterId(writer), configuration })
        },
    );
    prop_oneof![status, voted, accepted, appended, refused]
}

fn feed() -> impl Strategy<Value = Purpose> {
    let from = (lsn(), 1..1u64 << 40, any::<u32>(), any::<u64>(), any::<i64>()).prop_map(
        |(record_start, length, timeline, max_full_xid, commit_timestamp)| FrameSummary {
            record_end: Lsn((record_start.0 >> 1).saturating_add(length) | 7).advance(1),
            record_start: Lsn(record_start.0 >> 1),
            timeline: PgTimeline(timeline),
            max_full_xid,
            commit_timestamp,
        },
    );
    let from = prop_oneof![from, Just(FrameSummary::default())];
    (any::<u32>(), any::<u64>(), 0..1u64 << 32, 1..1u64 << 32, 1..u32::MAX, from).prop_map(
        |(shard, generation, begin, length, stripe_blocks, from)| Purpose::Feed {
            shard: ShardId(shard),
            generation: ShardGeneration(generation),
            range: HashRange { begin, end: (begin + length).min(1 << 32) },
            stripe_blocks,
            from,
        },
    )
}

/// A batch whose items follow each other.
fn batch() -> impl Strategy<Value = Batch> {
    let item = (1..1u64 << 20, 1..1u64 << 20, vec(any::<u8>(), 8..400));
    let behind = (0..1u64 << 20, 0..1u64 << 20, any::<u64>());
    (0..1u64 << 40, vec(item, 0..20), behind, summary()).prop_map(|(after, items, (rest, ahead, term), summary)| {
        let mut position = Lsn(after);
        let place = |(gap, length, stored): (u64, u64, Vec<u8>)| {
            let start = position.advance(gap);
            position = start.advance(length);
            Item { start, end: position, stored }
        };
        let items: Vec<Item> = items.into_iter().map(place).collect();
        let through = position.advance(rest).align8();
        let (term, commit_lsn) = (Term(term), through.advance(ahead));
        Batch {
            after: Lsn(after),
            through,
            term,
            commit_lsn,
            summary: FrameSummary { record_end: through, ..summary },
            items,
        }
    })
}

fn frames_of(batch: Batch) -> Vec<Vec<u8>> {
    let mut frames = BatchFrames::new(batch);
    std::iter::from_fn(|| frames.next_frame().expect("a batch within the limits")).collect()
}

/// Puts together what arrives in reads of `read_bytes`.
fn assemble(stream: &[u8], read_bytes: usize) -> Vec<Batch> {
    let (mut reader, mut assembler, mut batches) = (FrameReader::new(), BatchAssembler::new(), vec![]);
    for bytes in stream.chunks(read_bytes) {
        reader.feed(bytes);
        while let Some(frame) = reader.next().expect("a valid stream") {
            let message = decode(frame).expect("a valid message");
            batches.extend(assembler.take(&message).expect("pieces that fit"));
        }
    }
    batches
}

fn hello() -> impl Strategy<Value = Hello> {
    let purpose = prop_oneof![
        Just(Purpose::Propose),
        Just(Purpose::Peer),
        lsn().prop_map(|begin_lsn| Purpose::Read { begin_lsn }),
        feed(),
    ];
    (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u64>(), purpose).prop_map(|(cluster, branch, system_id, purpose)| {
        let log = LogId { cluster: ClusterId(cluster), branch: BranchId(branch) };
        Hello { log, system_id: SystemId(system_id), purpose }
    })
}

fn error_code() -> impl Strategy<Value = ErrorCode> {
    prop_oneof![
        Just(ErrorCode::BadMessage),
        Just(ErrorCode::WrongVersion),
        Just(ErrorCode::UnknownLog),
        Just(ErrorCode::WrongSystem),
        Just(ErrorCode::NotAllowed),
        Just(ErrorCode::Busy),
        Just(ErrorCode::WalNotAvailable),
        Just(ErrorCode::WalDamaged),
        Just(ErrorCode::Stopping),
        Just(ErrorCode::Internal),
        Just(ErrorCode::StaleGeneration),
        (1000..u16::MAX).prop_map(ErrorCode::Other),
    ]
}

/// Encodes, cuts the stream at `cut`, reads and decodes again; the answer must be the same message.
fn assert_round_trip(message: &Message<'_>, cut: usize) {
    let bytes = encode_to_vec(message).expect("a message within the limits");
    let (first, second) = bytes.split_at(cut % bytes.len());
    let mut reader = FrameReader::new();
    reader.feed(first);
    assert_eq!(None, reader.next().expect("a valid stream"));
    reader.feed(second);
    let frame = reader.next().expect("a valid stream").expect("a whole frame");
    assert_eq!(message.message_type(), frame.message);
    assert_eq!(Ok(message), decode(frame).as_ref());
    assert_eq!(None, reader.next().expect("a valid stream"));
}

proptest! {
    #[test]
    fn proposer_messages((message, payload) in proposer_message(), cut: usize) {
        assert_round_trip(&Message::Proposer(message, &payload), cut);
    }

    #[test]
    fn acceptor_messages(message in acceptor_message(), cut: usize) {
        assert_round_trip(&Message::Acceptor(message), cut);
    }

    #[test]
    fn greetings(hello in hello(), cut: usize) {
        assert_round_trip(&Message::Hello(hello), cut);
    }

    #[test]
    fn messages_between_peers(
        begin in 0..1u64 << 62, length in 1..1u64 << 40, ballot in ballot(), writer: [u8; 16], commit_lsn in lsn(),
        bytes in vec(any::<u8>(), 0..3000), cut: usize,
    ) {
        let begin_lsn = Lsn(begin);
        let fetch = FetchWal { begin_lsn, end_lsn: begin_lsn.advance(length), ballot };
        assert_round_trip(&Message::FetchWal(fetch), cut);
        assert_round_trip(&Message::AskBallot, cut);
        assert_round_trip(&Message::BallotAnswer(BallotAnswer { ballot, writer: WriterId(writer) }), cut);
        assert_round_trip(&Message::WalData(WalData { begin_lsn, commit_lsn, bytes: &bytes }), cut);
    }

    #[test]
    fn messages_of_a_feed(
        received in lsn(), behind: u64, batch in batch(), items in vec(any::<u8>(), 0..3000), more: u16, cut: usize,
    ) {
        let durable = Lsn(received.0 - behind % (received.0 + 1));
        assert_round_trip(&Message::FeedProgress(FeedProgress { received, durable }), cut);
        assert_round_trip(&Message::FeedItems(&items), cut);
        let Batch { after, term, commit_lsn, summary, .. } = batch;
        let items_bytes = items.len() as u64 + u64::from(more);
        assert_round_trip(
            &Message::FeedBatch(FeedBatch { after, term, commit_lsn, summary, items_bytes, items: &items }), cut,
        );
    }

    #[test]
    fn batches_arrive_as_they_were_sent(batches in vec(batch(), 0..4), read_bytes in 1..5000usize) {
        let stream: Vec<u8> = batches.iter().flat_map(|batch| frames_of(batch.clone()).concat()).collect();
        prop_assert_eq!(batches, assemble(&stream, read_bytes));
    }

    #[test]
    fn errors(code in error_code(), text in ".{0,200}", cut: usize) {
        assert_round_trip(&Message::Error(ErrorFrame { code, text }), cut);
    }

    /// Whatever a decoder accepts it would also send: nothing is read in two ways.
    #[test]
    fn any_body_is_refused_or_means_one_message(
        kind in proptest::sample::select(MessageType::ALL.to_vec()), body in vec(any::<u8>(), 0..400),
    ) {
        if let Ok(message) = decode(Frame { message: kind, body: &body }) {
            let again = encode_to_vec(&message).expect("what was accepted can be sent");
            let mut reader = FrameReader::new();
            reader.feed(&again);
            prop_assert_eq!(Ok(message), decode(reader.next().expect("valid").expect("whole")));
        }
    }

    #[test]
    fn changed_bytes_never_panic((message, payload) in proposer_message(), position: usize, value: u8) {
        let mut bytes = encode_to_vec(&Message::Proposer(message, &payload)).expect("within the limits");
        let position = position % bytes.len();
        bytes[position] = value;
        let mut reader = FrameReader::new();
        reader.feed(&bytes);
        if let Ok(Some(frame)) = reader.next() {
            let _refused_or_another_message = decode(frame);
        }
    }

    #[test]
    fn cut_messages_are_refused(message in acceptor_message(), cut: usize) {
        let kind = Message::Acceptor(message.clone()).message_type();
        let bytes = encode_to_vec(&Message::Acceptor(message)).expect("within the limits");
        let body = &bytes[wire::append::HEADER_BYTES..];
        let body = &body[..cut % body.len()];
        let decoded = decode(Frame { message: kind, body });
        prop_assert!(decoded.is_err(), "{:?}", decoded);
    }
}

fn body_of(message: &Message<'_>) -> Vec<u8> {
    encode_to_vec(message).expect("within the limits")[wire::append::HEADER_BYTES..].to_vec()
}

fn heartbeat() -> Append {
    Append {
        ballot: Ballot::default(),
        generation: Generation(1),
        sequence: 1,
        begin_lsn: Lsn(8),
        end_lsn: Lsn(8),
        commit_lsn: Lsn(8),
        timeline: None,
    }
}

#[test]
fn other_version_is_named_before_anything_else_is_read() {
    let log = LogId::default();
    let mut body = body_of(&Message::Hello(Hello { log, system_id: SystemId(1), purpose: Purpose::Propose }));
    body[8] = 9;
    body.truncate(10);
    let frame = Frame { message: MessageType::Hello, body: &body };
    assert_eq!(Err(WireError::WrongVersion { theirs: 9, ours: 1 }), decode(frame));

    body[0] ^= 1;
    assert_eq!(Err(WireError::BadMagic), decode(Frame { message: MessageType::Hello, body: &body }));
}

#[test]
fn append_whose_bytes_do_not_match_its_positions_is_neither_sent_nor_accepted() {
    let append = Append { end_lsn: Lsn(16), ..heartbeat() };
    let refused = WireError::BadValue { field: "append.end_lsn" };
    assert_eq!(
        Err(refused.clone()),
        encode_to_vec(&Message::Proposer(ProposerMessage::Append(append.clone()), b"1234567"))
    );

    let mut body = body_of(&Message::Proposer(ProposerMessage::Append(append), b"12345678"));
    body.pop();
    assert_eq!(Err(refused), decode(Frame { message: MessageType::Append, body: &body }));
}

#[test]
fn append_above_one_mebibyte_is_not_sent() {
    let payload = vec![0; (1 << 20) + 1];
    let append = Append { end_lsn: Lsn(8).advance(payload.len() as u64), ..heartbeat() };
    let message = Message::Proposer(ProposerMessage::Append(append), &payload);
    assert_eq!(Err(WireError::BadValue { field: "wal" }), encode_to_vec(&message));
}

/// A count of 2^32 entries in a body of a few bytes is refused before memory is asked for.
#[test]
fn invented_counts_allocate_nothing() {
    let catch_up = CatchUp { ballot: Ballot::default(), generation: Generation(1), until: Lsn(8), donors: vec![] };
    let mut body = body_of(&Message::Proposer(ProposerMessage::CatchUp(catch_up), &[]));
    let count_at = body.len() - 4;
    body[count_at..].copy_from_slice(&u32::MAX.to_le_bytes());
    let refused = WireError::Truncated { field: "catch_up.donors" };
    assert_eq!(Err(refused), decode(Frame { message: MessageType::CatchUp, body: &body }));
}

/// A thousand failovers repeat their parents' history: shared on the wire, so that the message stays small.
#[test]
fn long_timeline_histories_fit() {
    let mut history_file = Vec::new();
    let mut entries = vec![];
    for timeline in 1..=500 {
        entries.push(TimelineEntry {
            timeline: PgTimeline(timeline),
            start_lsn: Lsn(u64::from(timeline) << 24),
            history_file: history_file.clone(),
        });
        history_file
            .extend_from_slice(format!("{timeline}\t0/{timeline:06X}00\tno recovery target specified\n").as_bytes());
    }
    let elected = Elected {
        ballot: Ballot::default(),
        incarnation: Incarnation::default(),
        generation: Generation(1),
        start: FrameSummary::default(),
        history: TermHistory::default(),
        timelines: TimelineHistory(entries),
        commit_lsn: Lsn(8),
    };
    let message = Message::Proposer(ProposerMessage::Elected(elected), &[]);
    assert!(encode_to_vec(&message).expect("within the limits").len() < 64 << 10);
    assert_round_trip(&message, 1000);
}

/// Sharing must not become a bomb: a body of 1 MiB that names 16 MiB and more is refused.
#[test]
fn unfolding_of_history_files_is_bounded() {
    let history_file = vec![b'x'; 900 << 10];
    let entry = |timeline| TimelineEntry {
        timeline: PgTimeline(timeline),
        start_lsn: Lsn(8),
        history_file: history_file.clone(),
    };
    let elected = Elected {
        ballot: Ballot::default(),
        incarnation: Incarnation::default(),
        generation: Generation(1),
        start: FrameSummary::default(),
        history: TermHistory::default(),
        timelines: TimelineHistory((1..40).map(entry).collect()),
        commit_lsn: Lsn(8),
    };
    let body = body_of(&Message::Proposer(ProposerMessage::Elected(elected), &[]));
    let refused = WireError::BadValue { field: "timeline.history_file" };
    assert_eq!(Err(refused), decode(Frame { message: MessageType::Elected, body: &body }));
}

fn long_batch(lengths: &[usize]) -> Batch {
    let item = |(number, length): (usize, &usize)| Item {
        start: Lsn(8 * number as u64 + 8),
        end: Lsn(8 * number as u64 + 16),
        stored: (0..*length).map(|at| (at * 7 + number) as u8).collect(),
    };
    let items: Vec<Item> = lengths.iter().enumerate().map(item).collect();
    let through = Lsn(8 * lengths.len() as u64 + 8);
    let summary = FrameSummary { record_end: through, ..FrameSummary::default() };
    Batch { after: Lsn(8), through, term: Term(1), commit_lsn: through, summary, items }
}

/// Records of PostgreSQL may be longer than any frame, and an item's header may lie across two.
#[test]
fn items_longer_than_a_frame_are_cut_and_put_together() {
    const MIB: usize = 1 << 20;
    for lengths in [&[3 * MIB + 5, 8, 20][..], &[MIB - 20, 8], &[MIB - 30, 100], &[MIB - 19, 2 * MIB], &[MIB, MIB]] {
        let batch = long_batch(lengths);
        let frames = frames_of(batch.clone());
        assert!(frames.len() > 1 && frames.iter().all(|frame| frame.len() < MIB + 1024), "{lengths:?}");
        assert_eq!(vec![batch], assemble(&frames.concat(), 100_000));
    }
}

/// What an assembler gets from a peer that does not keep to the protocol.
#[test]
fn pieces_that_do_not_fit_together_are_refused() {
    let batch = long_batch(&[100, 100]);
    let frame = frames_of(batch.clone()).concat();
    let body = &frame[wire::append::HEADER_BYTES..];
    let Ok(Message::FeedBatch(head)) = decode(Frame { message: MessageType::FeedBatch, body }) else { panic!() };
    let refused = |messages: &[Message<'_>], field: &'static str| {
        let mut assembler = BatchAssembler::new();
        let (last, before) = messages.split_last().expect("a message");
        for message in before {
            assert_eq!(Ok(None), assembler.take(message));
        }
        let error = assembler.take(last).expect_err("pieces that do not fit");
        assert!(
            matches!(error, WireError::BadValue { field: found } | WireError::Truncated { field: found } if found == field),
            "{error}"
        );
    };

    refused(&[Message::FeedItems(head.items)], "feed.message");
    refused(&[Message::AskBallot], "feed.message");
    let half = FeedBatch { items: &head.items[..50], ..head };
    refused(&[Message::FeedBatch(half), Message::FeedBatch(head)], "feed.message");
    refused(&[Message::FeedBatch(half), Message::FeedItems(&[])], "feed.message");
    refused(&[Message::FeedBatch(half), Message::FeedItems(head.items)], "batch.items_bytes");
    let cut = FeedBatch { items: &head.items[..50], items_bytes: 50, ..head };
    refused(&[Message::FeedBatch(cut)], "item");
    let early = FeedBatch { summary: FrameSummary { record_end: Lsn(16), ..head.summary }, ..head };
    refused(&[Message::FeedBatch(early)], "item.end");
    let late = FeedBatch { after: Lsn(16), ..head };
    refused(&[Message::FeedBatch(late)], "item.end");
    let mut forged = head.items.to_vec();
    forged[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    refused(&[Message::FeedBatch(FeedBatch { items: &forged, ..head })], "item.length");
}

/// A greeting decides what a safekeeper computes with.
#[test]
fn feeds_of_no_shard_or_from_no_record_end_are_refused() {
    let from = FrameSummary { record_end: Lsn(64), record_start: Lsn(24), ..FrameSummary::default() };
    let greeting = |range, stripe_blocks, from| {
        let purpose = Purpose::Feed { shard: ShardId(1), generation: ShardGeneration(1), range, stripe_blocks, from };
        let body = body_of(&Message::Hello(Hello { log: LogId::default(), system_id: SystemId(1), purpose }));
        decode(Frame { message: MessageType::Hello, body: &body }).map(|_| ())
    };
    assert_eq!(Ok(()), greeting(HashRange::ALL, 2048, from));
    let bad = |field| Err(WireError::BadValue { field });
    assert_eq!(bad("feed.end"), greeting(HashRange { begin: 5, end: 5 }, 2048, from));
    assert_eq!(bad("feed.end"), greeting(HashRange { begin: 5, end: (1 << 32) + 1 }, 2048, from));
    assert_eq!(bad("feed.stripe_blocks"), greeting(HashRange::ALL, 0, from));
    assert_eq!(bad("feed.from"), greeting(HashRange::ALL, 2048, FrameSummary { record_end: Lsn(65), ..from }));
    assert_eq!(bad("feed.from"), greeting(HashRange::ALL, 2048, FrameSummary { record_start: Lsn(64), ..from }));
}
