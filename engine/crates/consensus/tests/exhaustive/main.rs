//! Every history of a small world, tried: the real machines, every order of messages, crashes, losses, duplicates.
//!
//! Checked in every world: committed WAL is never lost or changed, whichever majority votes next; acceptors agree up to
//! commit and serve whole records; one run wins a ballot; nothing is committed by a ballot behind the start of a
//! later one; nothing written after a fence is committed by a fenced writer; and from every world, if nothing fails any
//! more, the writer of the last term begins and X is served. With one of the planted bugs switched on
//! (`--features bug-...`) the same check must find it.

mod search;
mod world;

use search::{Outcome, explore};
use world::Bounds;

#[test]
fn probe() {
    let get = |name: &str, default: u8| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let outcome: Outcome = explore(
        "probe",
        Bounds {
            terms: get("TERMS", 2) as u64,
            records: (get("R1", 1), get("R2", 1)),
            chunks_per_record: get("CHUNKS", 1),
            acceptor_crashes: get("AC", 0),
            writer_crashes: get("WC", 0),
            slow_syncs: get("SLOW", 0),
            replaced_disks: get("RD", 0),
            commit_told: get("TOLD", 0) > 0,
        },
    );
    assert!(outcome.found.is_none());
}
