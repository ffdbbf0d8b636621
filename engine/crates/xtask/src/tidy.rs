//! `xtask tidy`: what rustc and clippy do not see.

use crate::{Findings, output, root};
use std::{collections::BTreeSet, fs, path::Path, process::Command};

/// Crates that decide and never act: `#![no_std]`, no unsafe code, nothing below that reaches the system.
const PURE: &[&str] = &[
    "pgtypes",
    "wal",
    "pgformat",
    "redo",
    "metadata",
    "layers",
    "filter",
    "shard",
    "backup",
    "consensus",
    "logstore",
    "wire",
    "vfs-abi",
];

/// Crates that a pure crate may not depend on, directly or not.
const IMPURE: &[&str] = &["tokio", "compio", "libc", "mio", "rustls", "getrandom", "rand", "driver", "futures-util"];

/// Longer files are named: a hint to split them, not an error.
const LINES_MAX: usize = 800;

/// What may not stay in code. Split, so that this file does not find itself.
const LEFTOVERS: &[&str] = &[
    concat!("dbg", "!("),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("#[ign", "ore"),
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
];

/// Runs all checks.
pub fn check() -> Result<Findings, String> {
    let mut findings = Findings::default();
    let listing = output(Command::new("git").arg("-C").arg(root()).args(["ls-files", "-co", "--exclude-standard"]))?;
    let mut files = vec![];
    for path in listing.lines().filter(|path| root().join(path).is_file()) {
        // Corpora and images are no text.
        if let Ok(text) = fs::read_to_string(root().join(path)) {
            files.push((path.to_owned(), text));
        }
    }
    for name in PURE {
        check_pure(name, &files, &mut findings)?;
    }
    let known: BTreeSet<&str> = listing.lines().collect();
    for (path, text) in &files {
        if path.ends_with(".rs") {
            check_leftovers(path, text, &mut findings);
            let lines = text.lines().count();
            if lines > LINES_MAX {
                findings.notes.push(format!("{path}: {lines} lines; split it where a part has a name of its own"));
            }
        }
        check_documents(path, text, &known, &mut findings);
    }
    check_dead_files(&files, &mut findings);
    Ok(findings)
}

fn check_pure(name: &str, files: &[(String, String)], findings: &mut Findings) -> Result<(), String> {
    let path = format!("engine/crates/{name}/src/lib.rs");
    let Some((_, text)) = files.iter().find(|(known, _)| *known == path) else {
        findings.problem(format!("{path}: the pure crate {name} is missing"));
        return Ok(());
    };
    for attribute in ["#![no_std]", "#![forbid(unsafe_code)]"] {
        if !text.lines().any(|line| line.trim() == attribute) {
            findings.problem(format!("{path}: a pure crate says {attribute}"));
        }
    }
    // Tests may use std and anything else; `normal` edges are what ships.
    let tree = output(Command::new(env!("CARGO")).current_dir(root().join("engine")).args([
        "tree",
        "--offline",
        "--package",
        name,
        "--edges",
        "normal",
        "--prefix",
        "none",
        "--format",
        "{p}",
    ]))?;
    let names: BTreeSet<&str> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    for impure in IMPURE.iter().filter(|impure| names.contains(*impure)) {
        findings.problem(format!("{name} is pure, but depends on {impure}"));
    }
    Ok(())
}

fn check_leftovers(path: &str, text: &str, findings: &mut Findings) {
    for (number, line) in text.lines().enumerate() {
        for leftover in LEFTOVERS.iter().filter(|leftover| line.contains(*leftover)) {
            findings.problem(format!("{path}:{}: {leftover} is left over", number + 1));
        }
    }
}

/// Every document below `docs/` that a file names exists.
fn check_documents(path: &str, text: &str, known: &BTreeSet<&str>, findings: &mut Findings) {
    for (number, line) in text.lines().enumerate() {
        for document in documents(line) {
            if !known.contains(document) {
                findings.problem(format!("{path}:{}: {document} does not exist", number + 1));
            }
        }
    }
}

/// The documents, as paths from the root, that a line names; a pattern of names (YYYY) is none.
fn documents(line: &str) -> impl Iterator<Item = &str> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_');
    line.split(move |c| !is_path(c))
        .filter(|word| word.starts_with("docs/") && word.ends_with(".md") && !word.contains("YYYY"))
}

/// Every source file of a crate is a root or named by a `mod` in that crate.
fn check_dead_files(files: &[(String, String)], findings: &mut Findings) {
    for (path, _) in files.iter().filter(|(path, _)| path.starts_with("engine/crates/") && path.ends_with(".rs")) {
        let parts: Vec<&str> = path.split('/').collect();
        let [_, _, name, "src", inner @ ..] = parts.as_slice() else { continue };
        if matches!(inner, ["lib.rs" | "main.rs"] | ["bin", ..]) {
            continue;
        }
        let stem = match inner {
            [.., folder, "mod.rs"] => folder,
            [.., file] => file.trim_end_matches(".rs"),
            [] => continue,
        };
        let prefix = format!("engine/crates/{name}/src/");
        let named = files.iter().any(|(other, text)| other.starts_with(&prefix) && declares(text, stem));
        if !named && Path::new(path).extension().is_some() {
            findings.problem(format!("{path}: no module declares it"));
        }
    }
}

fn declares(text: &str, module: &str) -> bool {
    text.lines().any(|line| {
        line.trim_start()
            .trim_start_matches("pub(crate) ")
            .trim_start_matches("pub ")
            .strip_prefix("mod ")
            .is_some_and(|rest| rest.trim_end_matches(" {").trim_end_matches(';') == module)
            || line.contains(&format!("/{module}.rs\""))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_found_in_prose_and_code() {
        // Put together, so that this file does not name documents that do not exist.
        let line = |text: &str| text.replace("DOCS", "docs");
        let found = |text: &str| documents(&line(text)).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            vec![line("DOCS/formats/a-b.md"), line("DOCS/c.md")],
            found("see `DOCS/formats/a-b.md`, (DOCS/c.md).")
        );
        assert_eq!(Vec::<String>::new(), found("../DOCS/x.md https://host/DOCS/x.md DOCS/formats"));
    }

    #[test]
    fn modules_are_recognised() {
        assert!(declares("mod wal;", "wal"));
        assert!(declares("pub mod wal;", "wal"));
        assert!(declares("    pub(crate) mod wal;", "wal"));
        assert!(!declares("mod wall;", "wal"));
    }

    #[test]
    fn leftovers_are_named_with_their_line() {
        let mut findings = Findings::default();
        check_leftovers("a.rs", &format!("fine\n{}x)\n", LEFTOVERS[0]), &mut findings);
        assert_eq!(1, findings.problems.len());
        assert!(findings.problems[0].starts_with("a.rs:2:"));
    }

    #[test]
    fn undeclared_files_are_dead() {
        let file = |path: &str, text: &str| (format!("engine/crates/x/src/{path}"), text.to_owned());
        let mut findings = Findings::default();
        check_dead_files(&[file("lib.rs", "mod a;\n"), file("a.rs", ""), file("b.rs", "")], &mut findings);
        assert_eq!(vec!["engine/crates/x/src/b.rs: no module declares it".to_owned()], findings.problems);
    }
}
