//! What a log asks of its disk, command by command. The names are the rules.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use consensus::message::{AcceptorMessage, Refusal};
use layers::{ShardGeneration, ShardId};
use logstore::{
    Geometry, ReadError, Reader, RecoverError, SEGMENT_BYTES, SegmentError, Shard, ShardError, UNDURABLE_BYTES_MAX,
    verify_segment,
};
use pgtypes::{Instant, Lsn};
use support::*;

fn elected_node(geometry: Geometry) -> (Node, Writer) {
    let mut node = Node::ready(geometry);
    node.elect(ballot(1, 1));
    let writer = Writer::new(node.log.acceptor().flush());
    (node, writer)
}

fn refusals(node: &Node) -> Vec<Refusal> {
    let reason = |message: &AcceptorMessage| match message {
        AcceptorMessage::Refused(refused) => Some(refused.reason.clone()),
        _ => None,
    };
    node.replies.iter().filter_map(reason).collect()
}

#[test]
fn created_log_is_ready_when_both_copies_of_its_control_file_are_durable() {
    let mut node = Node::create(Geometry::STANDARD);
    node.poll();
    assert_eq!(["control 0"], *node.trace);
    node.end(0);
    assert_eq!(["control 0", "control 1"], *node.trace);
    assert!(!node.log.is_ready());
    node.end(0);
    assert!(node.log.is_ready());
    assert!(node.disk.segments.is_empty(), "an idle log has no segment");
}

#[test]
fn vote_is_answered_when_both_copies_of_the_control_file_hold_it() {
    let mut node = Node::ready(Geometry::STANDARD);
    node.fence(1);
    node.settle();
    node.trace.clear();

    node.vote(ballot(1, 1));
    node.poll();
    assert_eq!(["control 0"], *node.trace);
    node.end(0);
    assert_eq!(["control 0", "control 1"], *node.trace);
    node.end(0);
    assert_eq!(["control 0", "control 1", "reply voted 1.1 at 0/3000000"], *node.trace);
}

/// Appends all that the writer has, in pieces that a message may carry.
fn append_all(node: &mut Node, writer: &Writer) {
    let mut begin = START;
    for piece in writer.bytes.chunks(256 << 10) {
        node.append(ballot(1, 1), begin, piece, START);
        begin = begin.advance(piece.len() as u64);
    }
}

/// Ends operations, oldest first, until a sync of segments is the next to end: everything is written, nothing synced.
fn end_until_sync(node: &mut Node) {
    node.poll();
    while !node.trace.last().is_some_and(|line| line.starts_with("sync")) {
        node.end(0);
    }
}

/// A log takes its first segment at its first append; the answer follows a durable write.
#[test]
fn small_append_is_answered_after_one_durable_write() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let end = writer.record(1, 100).record_end;

    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.poll();
    assert_eq!(["take 0/3000000"], *node.trace);
    node.end(0);
    assert_eq!("write 0/3000000+0 4096 durably", node.trace[1]);
    assert!(node.replies.is_empty());
    node.end(0);
    assert_eq!(format!("reply appended {end} of {end}"), node.trace[2]);
    assert_eq!(writer.bytes, node.disk.wal(Geometry::STANDARD, START, end));
}

/// One that takes several writes is answered after the sync behind them.
#[test]
fn large_append_is_answered_after_writes_and_sync() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let end = writer.record(1, 3 << 20).record_end;

    append_all(&mut node, &writer);
    end_until_sync(&mut node);
    assert!(node.trace.iter().all(|line| !line.ends_with("durably")), "{:?}", node.trace);
    assert!(node.replies.is_empty());
    node.settle();
    assert_eq!(Some(&format!("reply appended {end} of {end}")), node.trace.last());
    assert_eq!(writer.bytes, node.disk.wal(Geometry::STANDARD, START, end));
}

#[test]
fn end_reported_is_that_of_the_last_complete_record() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let first = writer.record(1, 100).record_end;
    let second = writer.record(2, 100).record_end;
    let middle = Lsn(first.0 + 20);

    node.append(ballot(1, 1), START, writer.slice(START, middle), START);
    node.settle();
    assert_eq!(Some(&format!("reply appended {first} of {middle}")), node.trace.last());
    node.append(ballot(1, 1), middle, writer.slice(middle, second), START);
    node.settle();
    assert_eq!(Some(&format!("reply appended {second} of {second}")), node.trace.last());
}

#[test]
fn bytes_that_are_no_wal_are_refused_and_not_written() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    writer.record(1, 100);
    let start = writer.end();
    writer.record(2, 100);
    let mut bytes = writer.bytes.clone();
    bytes[start.bytes_since(START) as usize + 60] ^= 1;

    node.append(ballot(1, 1), START, &bytes, START);
    node.settle();

    assert!(matches!(&refusals(&node)[..], [Refusal::BadWal { lsn, .. }] if *lsn == start), "{:?}", node.replies);
    assert_eq!(1, node.trace.len(), "{:?}", node.trace);
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    assert_eq!(writer.end(), node.acknowledged());
}

#[test]
fn append_whose_length_is_not_the_announced_one_is_refused() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    writer.record(1, 100);
    let append = consensus::message::Append {
        ballot: ballot(1, 1),
        generation: pgtypes::Generation(1),
        sequence: 1,
        begin_lsn: START,
        end_lsn: START.advance(64),
        commit_lsn: START,
        timeline: None,
    };
    node.log.handle_append(1, &append, &writer.bytes, node.now);
    node.settle();
    assert!(matches!(&refusals(&node)[..], [Refusal::Malformed { .. }]));
}

#[test]
fn one_sync_acknowledges_all_appends_that_it_covers() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let mut begin = START;
    for mark in 0..10 {
        let end = writer.record(mark, 10_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), START);
        begin = end;
    }
    node.settle();
    // The first one begins as soon as something is written, the second one covers what was written meanwhile.
    let syncs = node.trace.iter().filter(|line| line.starts_with("sync")).count();
    assert_eq!(2, syncs, "{:?}", node.trace);
    assert_eq!(2, node.replies.len());
    assert_eq!(writer.end(), node.acknowledged());
}

#[test]
fn room_ends_at_the_bound_and_comes_back_with_durability() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let mut begin = START;
    while node.log.has_room() {
        let end = writer.record(1, 500_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), START);
        begin = end;
    }
    assert!(begin.bytes_since(START) < UNDURABLE_BYTES_MAX + (1 << 20));
    node.settle();
    assert!(node.log.has_room());
    assert_eq!(writer.bytes, node.disk.wal(Geometry::STANDARD, START, begin));
}

#[test]
fn full_disk_refuses_appends_and_resumes_by_itself() {
    let (mut node, mut writer) = elected_node(SMALL);
    node.faults.full = true;
    let first = writer.record(1, 100).record_end;
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    assert_eq!(["take 0/3000000", "reply appended 0/3000000 of 0/3000000 full"], *node.trace);

    let second = writer.record(2, 100).record_end;
    node.append(ballot(1, 1), first, writer.slice(first, second), START);
    node.settle();
    assert_eq!([Refusal::DiskFull], *refusals(&node));

    node.faults.full = false;
    node.trace.clear();
    node.now = node.log.poll_timeout().unwrap();
    node.log.handle_timeout(node.now);
    node.settle();
    assert_eq!(first, node.acknowledged());
    assert!(!node.log.status().disk_full);
    node.append(ballot(1, 1), first, writer.slice(first, second), START);
    node.settle();
    assert_eq!(second, node.acknowledged());
}

/// A second sync after a failed one succeeds without having written what the first one lost.
#[test]
fn after_a_failed_sync_nothing_is_acknowledged_any_more() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let first = writer.record(1, 3 << 20).record_end;
    append_all(&mut node, &writer);
    end_until_sync(&mut node);
    fail_and_go_on(node, writer, first);
}

#[test]
fn after_a_failed_durable_write_nothing_is_acknowledged_any_more() {
    let (mut node, mut writer) = elected_node(SMALL);
    let first = writer.record(1, 100).record_end;
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.poll();
    node.end(0);
    fail_and_go_on(node, writer, first);
}

/// A process that was killed between the two copies of a control file comes back with a fence that is durable in neither.
#[test]
fn a_fence_found_at_the_start_is_not_confirmed_when_the_control_file_cannot_be_written() {
    let mut node = Node::ready(SMALL);
    node.elect(ballot(1, 1));
    node.fence(2);
    node.poll();
    assert_eq!(["control 0"], *node.trace);
    node.end(0);
    node.restart();
    assert_eq!(["control 1"], *node.trace);
    // The operator asks again, and finds it fenced already.
    node.fence(2);
    node.poll();
    assert_eq!(["control 1"], *node.trace);

    node.faults.failing = true;
    node.settle();

    assert_eq!("fenced Err(", &node.trace.last().unwrap()[..11], "{:?}", node.trace);
}

/// A vote that was given before says where the log ends, which after a start is what the page cache holds.
#[test]
fn a_vote_is_not_repeated_when_what_was_found_at_the_start_cannot_be_synced() {
    let (mut node, mut writer) = elected_node(SMALL);
    writer.record(1, 100);
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    node.restart();
    node.vote(ballot(1, 1));
    node.poll();
    assert!(node.replies.is_empty());

    node.faults.failing = true;
    node.settle();

    assert_eq!([Refusal::DiskFailed], *refusals(&node));
    assert_eq!(Lsn::INVALID, node.acknowledged());
}

/// What follows the failure of the operation under way.
fn fail_and_go_on(mut node: Node, mut writer: Writer, first: Lsn) {
    node.faults.failing = true;
    node.settle();
    node.faults.failing = false;
    assert_eq!([Refusal::DiskFailed], *refusals(&node));

    let second = writer.record(2, 100).record_end;
    node.append(ballot(1, 1), first, writer.slice(first, second), START);
    node.vote(ballot(1, 2));
    node.fence(9);
    node.settle();
    assert_eq!([Refusal::DiskFailed, Refusal::DiskFailed, Refusal::DiskFailed], *refusals(&node));
    assert_eq!(Lsn::INVALID, node.acknowledged());
    assert!(node.log.is_failed());
    assert_eq!(None, node.log.poll_timeout());
}

/// Otherwise a crash could bring records of the old writer back behind those of the new one.
#[test]
fn truncated_log_is_zeroed_and_synced_before_its_election_is_persisted() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let cut = writer.record(1, 100);
    for mark in 2..8 {
        writer.record(mark, 3000);
    }
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    node.fence(2);
    node.vote(ballot(2, 1));
    node.settle();
    node.trace.clear();

    let common = history(&[(ballot(1, 1), START), (ballot(2, 1), cut.record_end)]);
    node.elected(ballot(2, 1), cut, &common);
    node.settle();

    let expected = [
        "read 0/3000000+0 4096".to_string(),
        "write 0/3000000+0 4096".to_string(),
        "write 0/3000000+4096 16384".to_string(),
        "remove 0/4000000 false".to_string(),
        "sync 0/3000000..=0/3000000".to_string(),
        "control 0".to_string(),
        "control 1".to_string(),
        format!("reply elected 2.1 at {}", cut.record_end),
    ];
    let without_ahead: Vec<_> = expected.iter().filter(|line| !line.starts_with("remove")).cloned().collect();
    assert!(node.trace == expected || node.trace == without_ahead, "{:?}", node.trace);
    let rest = node.disk.wal(Geometry::STANDARD, cut.record_end, START.advance(24_576));
    assert!(rest.iter().all(|&byte| byte == 0));
    assert_eq!(cut, node.log.acceptor().flush());
}

#[test]
fn segments_behind_a_truncation_are_removed() {
    let (mut node, mut writer) = elected_node(SMALL);
    let cut = writer.record(1, 100);
    while writer.end() < START.advance(100_000) {
        writer.record(2, 9_000);
    }
    let mut begin = START;
    for end in writer.ends.iter().skip(1).map(|summary| summary.record_end) {
        node.append(ballot(1, 1), begin, writer.slice(begin, end), START);
        node.settle();
        begin = end;
    }
    assert!(node.disk.segments.len() >= 4);

    let common = history(&[(ballot(1, 1), START), (ballot(2, 1), cut.record_end)]);
    node.elect_at(ballot(2, 1), cut, &common);

    assert_eq!([START], *node.disk.segments.keys().copied().collect::<Vec<_>>());
    let rest = node.disk.wal(SMALL, cut.record_end, START.advance(SMALL.segment_bytes));
    assert!(rest.iter().all(|&byte| byte == 0));
}

#[test]
fn committed_segment_is_sealed_and_verifies() {
    let (mut node, mut writer) = elected_node(SMALL);
    let mut begin = START;
    while begin < START.advance(2 * SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.settle();
        begin = end;
    }
    node.append(ballot(1, 1), begin, &[], begin);
    node.settle();

    let id = identity();
    for index in 0..2 {
        let start = START.advance(index * SMALL.segment_bytes);
        assert!(node.log.segment(start).unwrap().sealed, "{start}");
        let data = node.disk.wal(SMALL, start, start.advance(SMALL.segment_bytes));
        let mut trailer = [0; 4096];
        node.disk.read_at(start, SMALL.segment_bytes, &mut trailer).unwrap();
        verify_segment(&data, &trailer, id.log, start).unwrap();
        let mut rotten = data.clone();
        rotten[77] ^= 4;
        assert!(matches!(verify_segment(&rotten, &trailer, id.log, start), Err(SegmentError::Data { .. })));
    }
    assert!(!node.log.segment(START.advance(2 * SMALL.segment_bytes)).unwrap().sealed);
}

/// The running checksum is lost with the process: the data is read again.
#[test]
fn segment_that_was_filled_by_two_processes_is_sealed_too() {
    let (mut node, mut writer) = elected_node(SMALL);
    let middle = writer.record(3, 20_000).record_end;
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    node.restart();
    node.elect(ballot(1, 2));
    let end = writer.record(4, 20_000).record_end;
    node.append(ballot(1, 2), middle, writer.slice(middle, end), START);
    node.settle();
    node.append(ballot(1, 2), end, &[], end);
    node.settle();

    let data = node.disk.wal(SMALL, START, START.advance(SMALL.segment_bytes));
    let mut trailer = [0; 4096];
    node.disk.read_at(START, SMALL.segment_bytes, &mut trailer).unwrap();
    verify_segment(&data, &trailer, identity().log, START).unwrap();
    node.restart();
    assert!(node.log.segment(START).unwrap().sealed);
}

/// A recovery that finds the control file older than the removal must not miss the segments.
#[test]
fn segments_below_the_horizon_are_removed_after_the_control_file_says_so() {
    let (mut node, mut writer) = elected_node(SMALL);
    let mut begin = START;
    while begin < START.advance(4 * SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.settle();
        begin = end;
    }
    node.append(ballot(1, 1), begin, &[], begin);
    node.settle();
    node.trace.clear();
    let horizon = START.advance(2 * SMALL.segment_bytes + 100);

    node.log.handle_horizon(horizon, node.now);
    node.settle();

    let second = START.advance(SMALL.segment_bytes);
    let third = START.advance(2 * SMALL.segment_bytes);
    assert_eq!(
        ["control 0".to_string(), "control 1".into(), format!("remove {START} true"), format!("remove {second} true")],
        *node.trace
    );
    assert_eq!(third, node.log.oldest_lsn());
    assert_eq!(Err(ReadError::Removed { oldest_lsn: third }), node.log.readable(START, Reader::Anyone));
    node.restart();
    assert_eq!(third, node.log.oldest_lsn());
}

#[test]
fn nothing_that_is_not_committed_is_removed() {
    let (mut node, mut writer) = elected_node(SMALL);
    let mut begin = START;
    while begin < START.advance(3 * SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), START);
        node.settle();
        begin = end;
    }
    node.log.handle_horizon(Lsn::MAX, node.now);
    node.settle();
    assert_eq!(START, node.log.oldest_lsn());
    assert!(node.disk.segments.contains_key(&START));
}

#[test]
fn readers_see_what_is_committed_and_peers_of_the_same_election_all() {
    let (mut node, mut writer) = elected_node(SMALL);
    let first = writer.record(1, 100).record_end;
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    let second = writer.record(2, 100).record_end;
    node.append(ballot(1, 1), first, writer.slice(first, second), first);
    node.settle();

    assert_eq!(Ok(first), node.log.readable(START, Reader::Anyone));
    assert_eq!(Ok(first), node.log.readable(START, Reader::Peer(ballot(2, 1))));
    assert_eq!(Ok(second), node.log.readable(START, Reader::Peer(ballot(1, 1))));
    assert_eq!(Err(ReadError::Removed { oldest_lsn: START }), node.log.readable(Lsn(8), Reader::Anyone));
}

#[test]
fn damaged_segment_is_not_served_and_what_is_before_it_is() {
    let (mut node, mut writer) = elected_node(SMALL);
    let mut begin = START;
    while begin < START.advance(3 * SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.settle();
        begin = end;
    }
    let second = START.advance(SMALL.segment_bytes);
    node.log.handle_damaged(second);
    assert_eq!(Ok(second), node.log.readable(START, Reader::Anyone));
    assert_eq!(Err(ReadError::Damaged { start: second }), node.log.readable(second.advance(5), Reader::Anyone));
    assert_eq!(vec![second], node.log.status().damaged);
    assert!(node.log.readable(START.advance(2 * SMALL.segment_bytes), Reader::Anyone).is_ok());
}

/// What a scan finds was written, but perhaps never synced: another crash could take it away again.
#[test]
fn recovered_log_syncs_what_it_found_before_it_votes() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    for mark in 0..200 {
        writer.record(mark, 10_000);
    }
    append_all(&mut node, &writer);
    end_until_sync(&mut node);
    assert_eq!(Some("sync 0/3000000..=0/3000000"), node.trace.last().map(String::as_str));

    node.restart();
    node.vote(ballot(1, 2));
    node.poll();
    assert_eq!(["sync 0/3000000..=0/3000000"], *node.trace);
    node.settle();
    let found = node.log.acceptor().flush().record_end;
    assert!(found > START);
    assert_eq!(Some(&format!("reply voted 1.2 at {found}")), node.trace.last());
}

/// Found by the simulator: a trailer that was written but not synced was found by the next process, which counted the
/// segment as sealed; a loss of power, or a sync that fails, then took the trailer away for good.
#[test]
fn recovered_log_syncs_the_trailers_that_it_found() {
    let (mut node, mut writer) = elected_node(SMALL);
    let mut begin = START;
    while begin < START.advance(SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.settle();
        begin = end;
    }
    node.append(ballot(1, 1), begin, &[], begin);
    node.poll();
    let trailer = format!("write {START}+{} 4096", SMALL.segment_bytes);
    while node.trace.last() != Some(&format!("sync {START}..={START}")) || !node.trace.contains(&trailer) {
        node.end(0);
    }
    // The trailer is written, its sync is under way; the control file knows the end, but not the trailer.
    node.restart();
    assert!(node.trace[0].starts_with(&format!("sync {START}..=")), "{:?}", node.trace);
    assert!(node.log.segment(START).unwrap().sealed);
    assert_eq!(Ok(START), node.log.readable(START, Reader::Anyone));
    node.settle();
    assert!(node.log.readable(START, Reader::Anyone).unwrap() > START);
}

#[test]
fn damaged_copy_of_the_control_file_is_written_again_and_first() {
    for damaged in 0..2 {
        let mut node = Node::ready(SMALL);
        node.fence(5);
        node.settle();
        node.disk.controls[damaged].as_mut().unwrap()[100] ^= 1;
        node.restart();
        assert_eq!([format!("control {damaged}")], *node.trace);
        node.settle();
        assert!(node.log.is_ready());
        assert_eq!(5, node.log.acceptor().state().ballot.term.0);
        assert!(!node.recover().unwrap().control_repaired);
    }
}

#[test]
fn log_without_a_valid_control_file_is_refused() {
    let mut node = Node::ready(SMALL);
    for control in node.disk.controls.iter_mut().flatten() {
        control[100] ^= 1;
    }
    assert!(matches!(node.recover(), Err(RecoverError::Control(_))));
    node.disk.controls = [None, None];
    assert!(matches!(node.recover(), Err(RecoverError::Control(_))));
}

#[test]
fn log_of_another_disk_is_refused() {
    let mut node = Node::ready(SMALL);
    let controls = node.disk.controls.clone();
    let id = identity();
    let other = pgtypes::DiskId([9; 16]);
    let result = logstore::Log::recover_with(
        SMALL,
        id.log,
        other,
        [controls[0].as_deref(), controls[1].as_deref()],
        &mut node.disk,
        node.now,
    );
    assert!(matches!(result, Err(RecoverError::OtherDisk(_))));
}

#[test]
fn missing_segment_is_refused() {
    let (mut node, mut writer) = elected_node(SMALL);
    let mut begin = START;
    while begin < START.advance(3 * SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.settle();
        begin = end;
    }
    node.disk.segments.remove(&START);
    assert!(matches!(node.recover(), Err(RecoverError::MissingSegment(START))));
}

/// Else damage would look like the end of the log, and what was acknowledged behind it would be forgotten.
#[test]
fn log_that_ends_in_a_sealed_segment_is_refused() {
    let (mut node, mut writer) = elected_node(SMALL);
    let mut begin = START;
    while begin < START.advance(2 * SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.settle();
        begin = end;
    }
    // A scan that starts in a sealed segment: the control file was last written before that was sealed.
    let controls = node.disk.controls.clone();
    while begin < START.advance(3 * SMALL.segment_bytes) {
        let end = writer.record(3, 5_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.settle();
        begin = end;
    }
    node.append(ballot(1, 1), begin, &[], begin);
    node.settle();
    node.disk.controls = controls;
    let third = START.advance(2 * SMALL.segment_bytes);
    assert!(node.log.segment(third).unwrap().sealed);
    node.disk.segments.get_mut(&third).unwrap().get_mut(&5).unwrap()[77] ^= 1;

    assert_eq!(Some(RecoverError::DamagedSegment(third)), node.recover().err());
}

#[test]
fn disk_that_lost_its_segments_is_refused() {
    let (mut node, mut writer) = elected_node(SMALL);
    let end = writer.record(1, 100).record_end;
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    node.append(ballot(1, 1), end, &[], end);
    node.settle();
    node.fence(2);
    node.settle();
    node.disk.segments.clear();
    assert!(matches!(node.recover(), Err(RecoverError::MissingSegment(START))));
}

#[test]
fn wal_fetched_from_a_peer_is_scanned_written_and_counted() {
    let (mut node, mut writer) = elected_node(SMALL);
    let end = writer.record(1, 3_000).record_end;
    let mut bad = writer.bytes.clone();
    bad[2_000] ^= 1;

    let refused = node.log.handle_fetched(ballot(1, 1), START, &bad, node.now);
    assert!(matches!(refused, Err(Refusal::BadWal { .. })));
    assert_eq!(Err(Refusal::StaleAttempt), node.log.handle_fetched(ballot(1, 0), START, &writer.bytes, node.now));
    let gap = node.log.handle_fetched(ballot(1, 1), START.advance(8), &writer.bytes, node.now);
    assert_eq!(Err(Refusal::Gap { expected: START }), gap);
    assert_eq!(Ok(()), node.log.handle_fetched(ballot(1, 1), START, &writer.bytes, node.now));
    node.settle();
    assert_eq!(end, node.log.acceptor().flush().record_end);
    assert_eq!(end, node.acknowledged());
}

/// A consumer that a crash took back would hold no WAL; a position that it took back holds more.
#[test]
fn consumers_survive_a_restart() {
    let mut node = Node::ready(SMALL);
    node.log.set_consumer("standby", START, node.now).unwrap();
    let version = node.log.consumers_version();
    assert!(!node.log.consumers_durable(version));
    assert!(node.log.set_consumer("", START, node.now).is_err());
    node.settle();
    assert_eq!(["control 0", "control 1"], *node.trace);
    assert!(node.log.consumers_durable(version));
    node.restart();
    assert_eq!("standby", node.log.consumers()[0].name);

    let next = START.advance(8);
    node.trace.clear();
    node.log.set_consumer("standby", next, node.now).unwrap();
    node.settle();
    assert!(node.trace.is_empty(), "nobody waits for it: {:?}", node.trace);
    node.now = node.log.poll_timeout().unwrap();
    node.log.handle_timeout(node.now);
    node.settle();
    assert_eq!(["control 1", "control 0"], *node.trace);
    node.restart();
    assert_eq!(next, node.log.consumers()[0].confirmed_lsn);
    assert!(node.log.remove_consumer("standby", node.now));
    assert!(node.log.consumers().is_empty());
}

/// The owner of a shard starts to work when its generation is durable on a majority: a safekeeper that forgot it would let
/// an older one go on.
#[test]
fn the_newest_owner_of_a_shard_survives_a_restart() {
    let mut node = Node::ready(SMALL);
    let (shard, older, newer) = (ShardId(3), ShardGeneration(1), ShardGeneration(2));
    node.log.register_shard(shard, newer, node.now).unwrap();
    let version = node.log.consumers_version();
    assert!(!node.log.consumers_durable(version));
    node.settle();
    assert_eq!(["control 0", "control 1"], *node.trace);
    assert!(node.log.consumers_durable(version));
    node.restart();
    let known = Shard { shard, generation: newer, durable_lsn: START };
    assert_eq!([known], node.log.shards());
    assert_eq!(Err(ShardError::StaleGeneration { known }), node.log.register_shard(shard, older, node.now));
    assert_eq!(Ok(()), node.log.register_shard(shard, newer, node.now));

    let next = START.advance(8);
    node.trace.clear();
    node.log.confirm_shard(shard, newer, next, node.now).unwrap();
    node.settle();
    assert!(node.trace.is_empty(), "nobody waits for it: {:?}", node.trace);
    node.now = node.log.poll_timeout().unwrap();
    node.log.handle_timeout(node.now);
    node.settle();
    node.restart();
    assert_eq!([Shard { durable_lsn: next, ..known }], node.log.shards());
    assert!(node.log.remove_shard(shard, node.now));
    assert!(!node.log.remove_shard(shard, node.now));
}

#[test]
fn idle_log_gives_its_memory_back_and_asks_for_nothing() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    writer.record(1, 900_000);
    node.append(ballot(1, 1), START, &writer.bytes, START);
    node.settle();
    node.append(ballot(1, 1), writer.end(), &[], writer.end());
    node.settle();
    for _ in 0..3 {
        if let Some(at) = node.log.poll_timeout() {
            node.now = at;
            node.log.handle_timeout(at);
            node.settle();
        }
    }
    assert_eq!(None, node.log.poll_timeout());
    assert!(node.now < Instant(60_000_000_000));
    assert!(std::mem::size_of_val(&node.log) < 4096, "{}", std::mem::size_of_val(&node.log));
}

#[test]
fn standard_segment_is_crossed_without_a_gap() {
    let (mut node, mut writer) = elected_node(Geometry::STANDARD);
    let mut begin = START;
    while begin < START.advance(SEGMENT_BYTES + 100) {
        let end = writer.record(3, 700_000).record_end;
        node.append(ballot(1, 1), begin, writer.slice(begin, end), begin);
        node.poll();
        if node.running() > 3 {
            node.end(node.running() - 1);
        }
        begin = end;
    }
    node.settle();
    assert_eq!(writer.bytes, node.disk.wal(Geometry::STANDARD, START, begin));
    assert_eq!(begin, node.acknowledged());
}

/// Acknowledged bytes survive any crash, and bytes that were cut off never come back.
#[test]
fn crashes_lose_nothing_acknowledged_and_bring_nothing_back() {
    let seeds: u64 = std::env::var("LOGSTORE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    let first: u64 = std::env::var("LOGSTORE_FIRST").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    for seed in first..first + seeds {
        let result = std::panic::catch_unwind(|| one_life(seed));
        assert!(result.is_ok(), "seed {seed} (LOGSTORE_FIRST={seed} LOGSTORE_SEEDS=1)");
    }
}

fn one_life(seed: u64) {
    let mut random = Random::new(seed);
    let mut node = Node::ready(SMALL);
    let mut term = 0;
    // The log of the ballot elected last, from START on, as its writer sees it.
    let mut writer = Writer::new(node.log.acceptor().flush());
    let mut committed = START;

    for _ in 0..6 {
        // A new ballot at a record end that this acceptor may keep: at or above commit, anywhere in its log.
        term += 1;
        node.settle();
        let flush = node.log.acceptor().flush();
        let choices: Vec<_> = writer
            .ends
            .iter()
            .filter(|end| end.record_end >= committed && end.record_end <= flush.record_end)
            .copied()
            .collect();
        let start = choices[random.below(choices.len() as u64) as usize];
        let entries = node.log.acceptor().state().history.continued(ballot(term, 1), start.record_end);
        // Records of the new writer have the lengths of the old ones half of the time, so that old and new meet.
        let same_lengths = random.one_in(2);
        let kept = writer.slice(START, start.record_end).to_vec();
        let mut wal = Writer::new(start);
        wal.ends = writer.ends.iter().filter(|end| end.record_end <= start.record_end).copied().collect();
        node.elect_at(ballot(term, 1), start, &entries);
        assert_eq!(start, node.log.acceptor().flush(), "the log was cut to the start of the election");
        let mut whole = kept;
        let mut acknowledged = start.record_end;

        let mut sent = start.record_end;
        for _ in 0..random.below(40) {
            // A record that ends with a block is where what was there before could be taken for its continuation.
            let room = 4096 - wal.end().offset_in(4096) - if wal.end().offset_in(8192) == 0 { 24 } else { 0 };
            let length = match random.below(3) {
                _ if !same_lengths => random.below(9_000),
                0 => [8, 40][random.below(2) as usize],
                _ => room.checked_sub(24 + 5).filter(|length| *length > 255).unwrap_or(8),
            };
            wal.record(term as u8, length as usize);
            // Appends may end inside records.
            let end = if random.one_in(3) { wal.end() } else { Lsn(sent.0 + random.below(wal.end().0 - sent.0 + 1)) };
            if end > sent && node.log.has_room() {
                node.append(ballot(term, 1), sent, wal.slice(sent, end), committed);
                sent = end;
            }
            let steps = random.below(6);
            node.shuffle(&mut random, steps);
            acknowledged = acknowledged.max(node.acknowledged());
            if random.one_in(4) {
                committed = committed.max(acknowledged);
            }
            if random.one_in(50) {
                node.log.handle_horizon(committed, node.now);
            }
        }
        node.append(ballot(term, 1), sent, &[], committed);
        node.poll();
        whole.extend_from_slice(&wal.bytes);

        if random.one_in(2) {
            node.crash(&mut random);
            node.settle();
        } else {
            node.settle();
        }
        let flush = node.log.acceptor().flush();
        assert!(flush.record_end >= acknowledged, "lost: acknowledged {acknowledged}, found {}", flush.record_end);
        assert!(wal.ends.contains(&flush), "not a record end of this writer: {flush:?}");
        let oldest = node.log.oldest_lsn();
        assert!(
            whole[oldest.bytes_since(START) as usize..flush.record_end.bytes_since(START) as usize]
                == node.disk.wal(SMALL, oldest, flush.record_end)[..],
            "the bytes are not this writer's"
        );
        let mut all = Writer::new(wal.ends[0]);
        all.bytes = whole;
        all.ends = wal.ends;
        writer = all;
    }
}
