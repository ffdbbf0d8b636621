//! `sim`: plays seeds, and says which broke a rule.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use clap::Parser;
use sim::{Counts, Outcome, Rules};

/// Plays the writers and safekeepers of one log over simulated disks, networks and clocks with faults.
#[derive(Parser)]
struct Arguments {
    /// Play this seed only and print its trace hash.
    #[arg(long, conflicts_with_all = ["seeds", "first", "jobs"])]
    seed: Option<u64>,
    /// Tell every event of --seed.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// How many seeds to play.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Only what must never happen breaks a rule, not a lack of progress.
    #[arg(long)]
    safety: bool,
    /// Threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=256))]
    jobs: u64,
}

impl Arguments {
    fn rules(&self) -> Rules {
        if self.safety { Rules::Safety } else { Rules::All }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.seed {
        Some(seed) => play_one(seed, arguments.rules(), arguments.trace),
        None => play_many(&arguments),
    }
}

fn play_one(seed: u64, rules: Rules, trace: bool) -> ExitCode {
    let outcome = sim::run(seed, rules, trace);
    println!("seed {seed}: trace {:016x}, {:?}", outcome.trace_hash, outcome.counts);
    match outcome.broken {
        None => ExitCode::SUCCESS,
        Some(rule) => {
            println!("seed {seed}: {rule}");
            ExitCode::FAILURE
        }
    }
}

fn play_many(arguments: &Arguments) -> ExitCode {
    let began = Instant::now();
    let next = AtomicU64::new(arguments.first);
    let end = arguments.first.saturating_add(arguments.seeds);
    // The lowest broken seed is reported whatever the threads do, so that the answer does not depend on their speed.
    let lowest = AtomicU64::new(u64::MAX);
    let play = || {
        let mut totals = Counts::default();
        let mut broken: Option<Outcome> = None;
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end || seed > lowest.load(Ordering::Relaxed) {
                return (totals, broken);
            }
            let outcome = sim::run(seed, arguments.rules(), false);
            totals.add(&outcome.counts);
            if outcome.broken.is_some() {
                lowest.fetch_min(seed, Ordering::Relaxed);
                broken = Some(outcome);
            }
        }
    };
    let results: Vec<(Counts, Option<Outcome>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..arguments.jobs).map(|_| scope.spawn(play)).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let mut totals = Counts::default();
    results.iter().for_each(|(counts, _)| totals.add(counts));
    let broken = results.into_iter().filter_map(|(_, broken)| broken).min_by_key(|outcome| outcome.seed);
    let seconds = began.elapsed().as_secs_f64();
    if let Some(outcome) = broken {
        println!("seed {}: {}", outcome.seed, outcome.broken.unwrap_or_default());
        println!("replay: make sim SEED={}", outcome.seed);
        return ExitCode::FAILURE;
    }
    println!("{} seeds clean ({} to {}) in {seconds:.1} s: {totals:?}", arguments.seeds, arguments.first, end - 1);
    println!("{} passed, 0 failed", arguments.seeds);
    ExitCode::SUCCESS
}
