//! Every history of a small world, tried: the real machines, every order of messages, crashes, losses, duplicates.
//!
//! Checked in every world: committed WAL is never lost or changed, whichever majority votes next; acceptors agree up to
//! commit and serve whole records; one run wins a ballot; nothing is committed by a ballot behind the start of a
//! later one; nothing written after a fence is committed by a fenced writer; and from every world, if nothing fails any
//! more, the writer of the last term begins and X is served. What makes it finish is said in `world.rs`.
//!
//! With one of the planted bugs switched on (`--features bug-...`), the check in whose reach it lies must find it, and
//! prints the history; the others do not run then. `planted-bugs.sh` beside the crate tries them all.

mod lease;
mod search;
mod world;

use search::{Model, explore};
use world::{Bounds, World};

/// The planted bug that is switched on.
fn planted() -> Option<&'static str> {
    let bugs = [
        (cfg!(feature = "bug-ack-before-flush"), "bug-ack-before-flush"),
        (cfg!(feature = "bug-accept-stale-term"), "bug-accept-stale-term"),
        (cfg!(feature = "bug-forget-term-on-restart"), "bug-forget-term-on-restart"),
        (cfg!(feature = "bug-commit-older-term"), "bug-commit-older-term"),
        (cfg!(feature = "bug-forget-promises"), "bug-forget-promises"),
        (cfg!(feature = "bug-serve-incomplete-record"), "bug-serve-incomplete-record"),
        (cfg!(feature = "bug-replaced-disk-votes"), "bug-replaced-disk-votes"),
    ];
    bugs.into_iter().find(|(on, _)| *on).map(|(_, name)| name)
}

/// Tries all histories of `first`: at least `states_min` worlds, none broken. With a planted bug out of `finds`: one
/// broken.
fn check(name: &str, first: impl Model, states_min: usize, finds: &[&str]) {
    match planted() {
        None => {
            let outcome = explore(name, first);
            assert_eq!(None, outcome.found);
            assert!(outcome.states >= states_min, "the check shrank to {} worlds", outcome.states);
        }
        Some(bug) if finds.contains(&bug) => {
            let outcome = explore(name, first);
            assert!(outcome.found.is_some(), "{bug} was not found in {} worlds", outcome.states);
        }
        Some(_) => {}
    }
}

const NONE: Bounds = Bounds {
    terms: 2,
    records: (1, 1),
    chunks_per_record: 1,
    acceptor_crashes: 0,
    writer_crashes: 0,
    replaced_disks: 0,
    slow_syncs: 0,
    commit_told: false,
};

/// Three terms of two writers, three records, and a crash. With `LAKEBASE_EXHAUSTIVE=full` (`make soak`; millions of
/// worlds, minutes) an acceptor crashes, a writer does, and a disk is slow; without it one of them at a time.
#[test]
fn three_terms_two_writers_and_a_crash_of_each() {
    let three = Bounds { terms: 3, ..NONE };
    let finds =
        ["bug-ack-before-flush", "bug-accept-stale-term", "bug-forget-term-on-restart", "bug-commit-older-term"];
    if std::env::var("LAKEBASE_EXHAUSTIVE").is_ok_and(|wish| wish == "full") {
        let bounds = Bounds { acceptor_crashes: 1, writer_crashes: 1, slow_syncs: 1, ..three };
        return check("three terms", World::new(bounds), 5_000_000, &finds);
    }
    check("three terms", World::new(three), 15_000, &[]);
    let two = Bounds { acceptor_crashes: 1, writer_crashes: 1, slow_syncs: 1, ..NONE };
    check("two terms, a crash of each", World::new(two), 330_000, &finds);
}

/// Acceptors learn what is committed, and forget it when they crash.
#[test]
fn acceptors_serve_what_is_committed() {
    let bounds = Bounds { records: (2, 1), acceptor_crashes: 1, slow_syncs: 1, commit_told: true, ..NONE };
    check("commits told", World::new(bounds), 250_000, &[]);
}

/// A writer dies with half a record sent, an acceptor holds half a record.
#[test]
fn records_in_two_pieces() {
    let bounds = Bounds { chunks_per_record: 2, acceptor_crashes: 1, slow_syncs: 1, commit_told: true, ..NONE };
    check("two pieces", World::new(bounds), 240_000, &["bug-serve-incomplete-record"]);
}

#[test]
fn acceptor_with_a_replaced_disk_takes_part_in_nothing() {
    let bounds = Bounds { replaced_disks: 1, ..NONE };
    check("replaced disk", World::new(bounds), 60_000, &["bug-replaced-disk-votes"]);
}

#[test]
fn no_writer_commits_while_another_has_a_lease() {
    let bounds = lease::Bounds { ticks: 3, restarts: 1 };
    check("lease", lease::LeaseWorld::new(bounds), 750_000, &["bug-forget-promises"]);
}
