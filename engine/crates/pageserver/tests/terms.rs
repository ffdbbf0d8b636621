//! A writer whose term is over reads no page of its successor's, however early it asks and however long it waits.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../safekeeper/tests/harness/mod.rs"]
mod harness;
mod world;

use harness::{Writer, eventually};
use pgtypes::{Term, WriterId};
use wire::page::{NEWEST, PageErrorCode, ReaderRole};
use world::World;

/// Its request was let in while the term was its own; what it waited for came as WAL of the next term, and the newest position
/// with it: pages that its log does not lead to.
#[test]
fn a_request_that_waited_for_the_next_writers_wal_is_refused() {
    let mut world = World::new("waited");
    world.server.start();
    let end = world.write(0..10);
    let mut old = world.server.reader(ReaderRole::Writer { term: Term(1) });
    assert!(old.newest(1, end).is_ok());
    let id = old.request(1, 1, NEWEST, end.advance(8));
    let since = world.end();
    eventually("the request to wait", || world.server.position("ingested_lsn") >= since);

    world.writer = Writer::elect(&world.cluster, 2);
    let end = world.write([1]);

    let (answered, answer) = old.answer();
    assert_eq!((id, PageErrorCode::StaleTerm), (answered, answer.unwrap_err().code));
    let mut new = world.server.reader(ReaderRole::Writer { term: Term(2) });
    assert!(new.newest(1, end).is_ok());
}

/// A page server that has just started has heard of no term: a writer that was fenced before must not get in until it has. It
/// could read pages, and put back an old configuration file.
#[test]
fn a_page_server_knows_the_term_before_its_first_reader() {
    let mut world = World::new("first reader");
    world.server.start();
    world.write(0..10);
    world.freeze();
    for term in 2..6 {
        world.server.kill();
        world.cluster.fence(term, WriterId([2; 16]));
        world.server.start();
        let mut old = world.server.reader(ReaderRole::Writer { term: Term(term - 1) });
        assert_eq!(PageErrorCode::StaleTerm, old.answer().1.unwrap_err().code);
    }
}
