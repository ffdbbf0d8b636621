//! Runs fuzz targets for a short time with the stable compiler: mutations of the corpus under a seed.
//!
//!   short_run [--seconds N] [--seed N] [--corpus DIR] [TARGET...]      N seconds per target, default 5
//!
//! First every input of the corpus as it is, then mutations. An input that breaks a rule is written to the current
//! directory as `crash-TARGET-SEED`, and the exit status is 1. The corpus is found beside this crate's `Cargo.toml`
//! unless it is named.

use std::{
    env, fs,
    panic::catch_unwind,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use lakebase_fuzz::{TARGETS, Target};

/// Longest input: what takes a page or two of WAL.
const INPUT_BYTES_MAX: usize = 20_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// Changes an input in one to eight places.
fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    const INTERESTING: [u8; 12] = [0, 1, 2, 7, 8, 0x10, 0x20, 0x7F, 0x80, 0xFD, 0xFE, 0xFF];
    let mut input = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(8) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.next() as u8,
            2 if at < input.len() => input[at] = INTERESTING[random.below(INTERESTING.len())],
            3 => input.truncate(at),
            4 => input.insert(at, random.next() as u8),
            5 => {
                let end = (at + random.below(64)).min(input.len());
                drop(input.drain(at..end));
            }
            _ => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len());
                let length = random.below(256).min(other.len() - from);
                input.splice(at..at, other[from..from + length].iter().copied());
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

fn read_corpus(directory: &Path) -> Result<Vec<Vec<u8>>, String> {
    let context = |error| format!("{}: {error}", directory.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(context)? {
        paths.push(entry.map_err(context)?.path());
    }
    // The order decides what a seed does.
    paths.sort();
    let inputs: Result<Vec<_>, _> = paths.iter().map(fs::read).collect();
    let inputs = inputs.map_err(context)?;
    if inputs.is_empty() { Err(format!("{}: no inputs", directory.display())) } else { Ok(inputs) }
}

/// Returns how many inputs were run, or where the one that broke a rule was written.
fn run(target: &Target, corpus: &Path, duration: Duration, seed: u64) -> Result<u64, String> {
    let mut inputs = read_corpus(&corpus.join(target.name))?;
    let try_input = |input: &[u8]| {
        catch_unwind(|| (target.run)(input)).map_err(|_| {
            let path = format!("crash-{}-{seed}", target.name);
            match fs::write(&path, input) {
                Ok(()) => format!("{}: a rule is broken by {path}", target.name),
                Err(error) => format!("{}: a rule is broken, but {path}: {error}", target.name),
            }
        })
    };
    for input in &inputs {
        try_input(input)?;
    }
    inputs.push(Vec::new());
    let mut random = Random(seed);
    let end = Instant::now() + duration;
    let mut count = inputs.len() as u64;
    while Instant::now() < end {
        try_input(&mutate(&mut random, &inputs))?;
        count += 1;
    }
    Ok(count)
}

fn main() -> ExitCode {
    let mut seconds = 5;
    let mut seed = 1;
    let mut corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut names = Vec::new();
    let mut arguments = env::args().skip(1);
    let usage = "usage: short_run [--seconds N] [--seed N] [--corpus DIR] [TARGET...]";
    while let Some(argument) = arguments.next() {
        let value = match argument.as_str() {
            "--seconds" | "--seed" | "--corpus" => arguments.next(),
            _ => None,
        };
        match (argument.as_str(), value.as_deref(), value.as_deref().map(str::parse)) {
            ("--seconds", _, Some(Ok(number))) => seconds = number,
            ("--seed", _, Some(Ok(number))) => seed = number,
            ("--corpus", Some(directory), _) => corpus = directory.into(),
            (name, None, _) if TARGETS.iter().any(|target| target.name == name) => names.push(argument),
            _ => {
                eprintln!("{argument}: unknown option, target or value\n{usage}");
                return ExitCode::from(2);
            }
        }
    }
    let mut code = ExitCode::SUCCESS;
    for target in TARGETS.iter().filter(|target| names.is_empty() || names.iter().any(|name| name == target.name)) {
        match run(target, &corpus, Duration::from_secs(seconds), seed) {
            Ok(count) => println!("{}: {count} inputs, seed {seed}", target.name),
            Err(error) => {
                eprintln!("{error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
