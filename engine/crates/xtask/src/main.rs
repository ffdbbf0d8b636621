//! Checks of this repository that no other tool makes: `cargo run -p xtask -- hooks`, `... -- tidy`.

mod hooks;
mod tidy;

use clap::{Parser, Subcommand};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

/// What to check.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    check: Check,
}

#[derive(Subcommand)]
enum Check {
    /// Compares the calls that the virtual disk intercepts with those that PostgreSQL's binaries import
    Hooks {
        /// Programs and libraries of PostgreSQL; default: `postgres` and `libpqwalreceiver.so` of the pg_config on PATH
        binaries: Vec<PathBuf>,
        /// The built liblakebase_vfs.so, whose exports must be exactly the intercepted calls
        #[arg(long)]
        library: Option<PathBuf>,
    },
    /// Purity of the pure crates, leftovers, dead files, references to documents that do not exist
    Tidy,
}

/// What a check found.
#[derive(Default)]
struct Findings {
    /// Each fails the check.
    problems: Vec<String>,
    /// Worth a look.
    notes: Vec<String>,
}

impl Findings {
    fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }
}

/// Root of the repository.
fn root() -> &'static Path {
    // engine/crates/xtask
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(3).unwrap_or(manifest)
}

/// Standard output of a program, or why there is none.
fn output(program: &mut std::process::Command) -> Result<String, String> {
    let output = program.output().map_err(|error| format!("{program:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program:?}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn main() -> ExitCode {
    let result = match Arguments::parse().check {
        Check::Hooks { binaries, library } => hooks::check(binaries, library.as_deref()),
        Check::Tidy => tidy::check(),
    };
    let findings = match result {
        Ok(findings) => findings,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    for note in &findings.notes {
        println!("note: {note}");
    }
    for problem in &findings.problems {
        eprintln!("error: {problem}");
    }
    if findings.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
