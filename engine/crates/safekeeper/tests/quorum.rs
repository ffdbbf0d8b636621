//! Real safekeeper processes, driven over real sockets by the real proposer with made-up WAL.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use std::{io::Write, path::PathBuf};

use consensus::message::AcceptorMessage;
use harness::{Cluster, SEGMENT_BYTES, START, Variant, Writer, eventually, hello, log};
use pgtypes::{ClusterId, LogId, Lsn, SystemId};
use wire::append::{ErrorCode, Hello, Message, Purpose, encode_to_vec};

/// A safekeeper dies while WAL flows, the writer is replaced by one that has none of the old WAL, the dead one comes back:
/// nothing committed is missing anywhere, and the old writer gets no acknowledgement any more.
fn a_killed_safekeeper_catches_up_from_its_peers(name: &str, variant: Variant) {
    let mut cluster = Cluster::new(name, variant);
    let mut first = Writer::elect(&cluster, 1);
    first.commit(1000);
    first.write(3 << 20);
    cluster.safekeepers[2].kill();
    first.commit(20 << 20);

    let mut second = Writer::elect(&cluster, 2);
    let handed_over = second.wal_start;
    assert!(handed_over >= first.committed);
    let end = second.commit(2 << 20);
    first.write(1000);
    let before = first.committed;
    first.run(|this| this.fenced);
    assert_eq!(before, first.committed);

    cluster.safekeepers[2].start();
    second.run(|this| this.proposer.members().all(|(_, follows, flush_lsn)| follows && flush_lsn >= end));
    for key in ["flush_lsn", "commit_lsn"] {
        eventually(key, || {
            second.proposer.handle_timeout(driver::now());
            second.carry_out();
            cluster.safekeepers.iter().all(|safekeeper| safekeeper.position(key) == end)
        });
    }
    assert!(cluster.safekeepers[2].log_text().contains("caught up"), "it got its WAL from somewhere else");
    let mut expected = first.wal[..handed_over.bytes_since(START) as usize].to_vec();
    expected.extend_from_slice(&second.wal);
    for safekeeper in &cluster.safekeepers {
        assert!(expected == safekeeper.read(end), "member {}", safekeeper.member);
    }

    // All of them die at once: what was committed is on their disks.
    drop(second);
    for safekeeper in &mut cluster.safekeepers {
        safekeeper.kill();
    }
    for safekeeper in &mut cluster.safekeepers {
        safekeeper.start();
        assert_eq!(end, safekeeper.position("flush_lsn"));
    }
    let mut third = Writer::elect(&cluster, 3);
    assert_eq!(end, third.wal_start);
    third.commit(1000);
}

#[test]
fn a_killed_safekeeper_catches_up() {
    a_killed_safekeeper_catches_up_from_its_peers("catch-up", Variant::default());
}

#[test]
fn a_killed_safekeeper_catches_up_without_io_uring_and_with_several_cores() {
    a_killed_safekeeper_catches_up_from_its_peers("polling", Variant { polling: true, cores: 3 });
}

/// Each visitor that does not belong here is told so, once in the log, and the others do not notice.
#[test]
fn strangers_are_told_why_they_are_refused() {
    let cluster = Cluster::new("strangers", Variant::default());
    let safekeeper = &cluster.safekeepers[0];
    let good = hello(Purpose::Propose);
    let other_cluster = Hello { log: LogId { cluster: ClusterId([9; 16]), ..log() }, ..good };
    let other_system = Hello { system_id: SystemId(1), ..good };
    let mut other_version = encode_to_vec(&Message::Hello(good)).unwrap();
    other_version[wire::append::HEADER_BYTES + 8] = 99;
    let refusals: [(Vec<u8>, ErrorCode); 6] = [
        (encode_to_vec(&Message::Hello(other_cluster)).unwrap(), ErrorCode::UnknownLog),
        (encode_to_vec(&Message::Hello(other_system)).unwrap(), ErrorCode::WrongSystem),
        (other_version, ErrorCode::WrongVersion),
        (encode_to_vec(&Message::AskBallot).unwrap(), ErrorCode::BadMessage),
        (vec![0xAB; 100_000], ErrorCode::BadMessage),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), ErrorCode::BadMessage),
    ];
    for _ in 0..3 {
        for (first, code) in &refusals {
            let (found, text) = safekeeper.connect(first).error();
            assert_eq!((*code, false), (found, text.is_empty()));
        }
    }
    let mut proposer = safekeeper.greet(good);
    proposer.next(|message| assert!(matches!(message, Message::Acceptor(AcceptorMessage::Status(_))), "{message:?}"));
    proposer.stream.write_all(&encode_to_vec(&Message::AskBallot).unwrap()).unwrap();
    assert_eq!(ErrorCode::BadMessage, proposer.error().0);
    let mut reader = safekeeper.greet(hello(Purpose::Read { begin_lsn: Lsn(8) }));
    assert_eq!(ErrorCode::WalNotAvailable, reader.error().0);

    let warnings =
        safekeeper.log_text().lines().filter(|line| line.contains("refused") && line.contains("WARN")).count();
    assert!((4..=refusals.len() + 2).contains(&warnings), "{warnings} lines:\n{}", safekeeper.log_text());
    assert_eq!(START, safekeeper.position("flush_lsn"));
}

/// One flipped bit in a sealed segment: it is reported and never served, the rest of the log is.
#[test]
fn a_damaged_segment_is_reported_and_not_served() {
    let mut cluster = Cluster::new("damage", Variant::default());
    let mut writer = Writer::elect(&cluster, 1);
    let end = writer.commit(18 << 20);
    let victim = &mut cluster.safekeepers[0];
    let sealed = |path: PathBuf| std::fs::read(path).is_ok_and(|file| file[SEGMENT_BYTES as usize..][..8] != [0; 8]);
    writer.run(|_| sealed(victim.segment(START)));
    victim.kill();
    let path = victim.segment(START);
    let mut file = std::fs::read(&path).unwrap();
    file[9_000_000] ^= 0x10;
    std::fs::write(&path, file).unwrap();
    victim.start();

    let mut reader = victim.greet(hello(Purpose::Read { begin_lsn: START }));
    assert_eq!(ErrorCode::WalDamaged, reader.error().0);
    assert!(victim.log_text().contains("is damaged"));
    let behind = START.advance(SEGMENT_BYTES);
    let mut reader = victim.greet(hello(Purpose::Read { begin_lsn: behind }));
    reader.next(|message| match message {
        Message::WalData(data) => assert_eq!(writer.wal[SEGMENT_BYTES as usize..][..data.bytes.len()], *data.bytes),
        other => panic!("{other:?}"),
    });
    assert_eq!(writer.wal.len() as u64, end.bytes_since(START));
}
