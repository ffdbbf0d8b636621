//! A seed is the whole run.

use sim::{Counts, Rules, run};

#[test]
fn seed_run_twice_gives_the_same_trace() {
    for seed in 1..=40 {
        let first = run(seed, Rules::All, false);
        assert_eq!(first, run(seed, Rules::All, false), "seed {seed}");
        assert!(first.counts.events > 100, "seed {seed}: {:?}", first.counts);
    }
}

#[test]
fn seeds_differ() {
    let mut hashes: Vec<u64> = (1..=40).map(|seed| run(seed, Rules::All, false).trace_hash).collect();
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(40, hashes.len());
}

/// A simulation in which nothing goes wrong proves nothing.
#[test]
fn few_hundred_seeds_are_clean_and_meet_every_kind_of_trouble() {
    let mut totals = Counts::default();
    for seed in 1..=400 {
        let outcome = run(seed, Rules::All, false);
        assert_eq!(None, outcome.broken, "seed {seed}");
        totals.add(&outcome.counts);
    }
    assert!(totals.elections > 800, "{totals:?}");
    assert!(totals.acknowledged > 20_000, "{totals:?}");
    assert!(totals.reads > 10_000, "{totals:?}");
    assert!(totals.followed_bytes > 10_000_000, "{totals:?}");
    assert!(totals.fetched_bytes > 100_000, "{totals:?}");
    assert!(totals.fenced > 50, "{totals:?}");
    assert!(totals.memberships > 5, "{totals:?}");
    assert!(totals.failed_disks > 20, "{totals:?}");
    assert!(totals.full_disks > 20, "{totals:?}");
    assert!(totals.damaged > 3, "{totals:?}");
}
