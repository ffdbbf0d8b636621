//! `xtask hooks`: three lists must agree: calls.txt, what hooks.rs defines, and what PostgreSQL imports.
//!
//! A call that PostgreSQL starts to use and that nobody looked at would go past the virtual disk: a commit that waits for
//! no safekeeper. So every import that looks like input or output must be listed, with a decision.

use crate::{Findings, output, root};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Beginnings of names that reach files, sockets or programs, without leading underscores.
const FAMILIES: &[&str] = &[
    "accept",
    "aio_",
    "close",
    "connect",
    "copy_file_range",
    "creat",
    "dup",
    "epoll",
    "eventfd",
    "exec",
    "fallocate",
    "fclose",
    "fcntl",
    "fdatasync",
    "fdopen",
    "fopen",
    "fork",
    "fputs",
    "freopen",
    "fsync",
    "ftruncate",
    "fwrite",
    "io_",
    "ioctl",
    "lio_",
    "link",
    "memfd",
    "mkdir",
    "mkostemp",
    "mkstemp",
    "mmap",
    "mremap",
    "msync",
    "munmap",
    "open",
    "pipe",
    "popen",
    "posix_f",
    "posix_spawn",
    "prctl",
    "pread",
    "pwrite",
    "read",
    "rename",
    "send",
    "shm_",
    "socket",
    "splice",
    "symlink",
    "sync",
    "syscall",
    "system",
    "tee",
    "tmpfile",
    "truncate",
    "unlink",
    "vfork",
    "vmsplice",
    "write",
];

/// Names of a family that reach nothing.
const HARMLESS: &[&str] = &["closelog", "read_long", "realloc", "realpath", "socketpair"];

/// The decision about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Hook,
    Alias,
    Pass,
    Absent,
}

/// Compares the lists.
pub fn check(binaries: Vec<PathBuf>, library: Option<&Path>) -> Result<Findings, String> {
    let crate_path = root().join("engine/crates/vfs");
    let read = |name: &str| {
        let path = crate_path.join(name);
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    };
    let mut findings = Findings::default();
    let decisions = parse_calls(&read("calls.txt")?)?;
    let defined = defined_hooks(&read("src/hooks.rs")?);
    compare_definitions(&decisions, &defined, "hooks.rs", &mut findings);
    if let Some(library) = library {
        let exported = symbols(library, "--defined-only")?;
        compare_definitions(&decisions, &exported, &library.display().to_string(), &mut findings);
    }

    let binaries = if binaries.is_empty() { installed_binaries()? } else { binaries };
    let mut all = BTreeSet::new();
    for binary in &binaries {
        let imports = symbols(binary, "--undefined-only")?;
        compare_imports(&decisions, &imports, &binary.display().to_string(), &mut findings);
        all.extend(imports);
    }
    for (name, decision) in &decisions {
        if *decision == Decision::Hook && !all.contains(name) {
            findings.problem(format!("calls.txt: no binary imports {name}: it is an alias, or it can go"));
        }
    }
    Ok(findings)
}

fn parse_calls(text: &str) -> Result<BTreeMap<String, Decision>, String> {
    let mut decisions = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_whitespace();
        let decision = match words.next() {
            Some("hook") => Decision::Hook,
            Some("alias") => Decision::Alias,
            Some("pass") => Decision::Pass,
            Some("absent") => Decision::Absent,
            _ => return Err(format!("calls.txt:{}: no such decision", number + 1)),
        };
        let name = words.next().ok_or_else(|| format!("calls.txt:{}: no name", number + 1))?;
        if words.next().is_none() {
            return Err(format!("calls.txt:{}: {name} has no reason", number + 1));
        }
        if decisions.insert(name.to_owned(), decision).is_some() {
            return Err(format!("calls.txt:{}: {name} is listed twice", number + 1));
        }
    }
    Ok(decisions)
}

/// Functions that hooks.rs exports.
fn defined_hooks(source: &str) -> BTreeSet<String> {
    let mut lines = source.lines();
    let mut names = BTreeSet::new();
    while let Some(line) = lines.next() {
        if line.trim() != "#[unsafe(no_mangle)]" {
            continue;
        }
        let signature = lines.next().unwrap_or_default();
        let name = signature.split_once("fn ").and_then(|(_, rest)| rest.split_once('(')).map(|(name, _)| name);
        names.extend(name.map(str::to_owned));
    }
    names
}

fn compare_definitions(
    decisions: &BTreeMap<String, Decision>,
    defined: &BTreeSet<String>,
    place: &str,
    findings: &mut Findings,
) {
    for (name, decision) in decisions {
        let wanted = matches!(decision, Decision::Hook | Decision::Alias);
        if wanted && !defined.contains(name) {
            findings.problem(format!("{place}: does not define {name}, which calls.txt says is intercepted"));
        }
        if !wanted && defined.contains(name) {
            findings.problem(format!("{place}: defines {name}, which calls.txt leaves alone"));
        }
    }
    for name in defined.iter().filter(|name| !decisions.contains_key(*name)) {
        findings.problem(format!("{place}: defines {name}, which calls.txt does not list"));
    }
}

fn compare_imports(
    decisions: &BTreeMap<String, Decision>,
    imports: &BTreeSet<String>,
    place: &str,
    findings: &mut Findings,
) {
    for name in imports {
        match decisions.get(name) {
            Some(Decision::Absent) => {
                findings.problem(format!("{place}: imports {name}, which calls.txt has as absent: decide"));
            }
            None if looks_like_io(name) => {
                findings.problem(format!("{place}: imports {name}, which calls.txt does not list: decide"));
            }
            _ => {}
        }
    }
}

fn looks_like_io(name: &str) -> bool {
    let bare = name.trim_start_matches('_');
    !HARMLESS.contains(&bare) && FAMILIES.iter().any(|family| bare.starts_with(family))
}

/// Dynamic symbols of a binary, without their versions.
fn symbols(binary: &Path, which: &str) -> Result<BTreeSet<String>, String> {
    if !binary.exists() {
        return Err(format!("{} does not exist", binary.display()));
    }
    let text = output(Command::new("nm").args(["--dynamic", "--format=just-symbols", which]).arg(binary))?;
    Ok(text.lines().filter_map(|line| line.split('@').next()).map(str::to_owned).collect())
}

fn installed_binaries() -> Result<Vec<PathBuf>, String> {
    let ask = |what: &str| output(Command::new("pg_config").arg(what)).map(|text| PathBuf::from(text.trim()));
    Ok(vec![ask("--bindir")?.join("postgres"), ask("--pkglibdir")?.join("libpqwalreceiver.so")])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(calls: &str, source: &str, imports: &[&str]) -> Vec<String> {
        let mut findings = Findings::default();
        let decisions = parse_calls(calls).unwrap();
        compare_definitions(&decisions, &defined_hooks(source), "hooks.rs", &mut findings);
        let imports = imports.iter().map(|name| (*name).to_owned()).collect();
        compare_imports(&decisions, &imports, "postgres", &mut findings);
        findings.problems
    }

    const SOURCE: &str = "#[unsafe(no_mangle)]\nunsafe extern \"C\" fn open(path: *const c_char) -> c_int {\n";

    #[test]
    fn agreeing_lists_are_clean() {
        assert_eq!(
            Vec::<String>::new(),
            problems("hook open a\npass read b\nabsent openat c\n", SOURCE, &["open", "read", "sin"])
        );
    }

    /// The case that the check exists for: PostgreSQL begins to use a call that nobody looked at.
    #[test]
    fn new_calls_need_a_decision() {
        let found = problems("hook open a\nabsent openat b\n", SOURCE, &["open", "openat", "pwritev2", "__open_2"]);
        assert_eq!(3, found.len(), "{found:?}");
    }

    #[test]
    fn definitions_must_be_listed_and_listed_ones_defined() {
        assert_eq!(1, problems("hook open a\nhook fsync b\n", SOURCE, &[]).len());
        assert_eq!(1, problems("pass open a\n", SOURCE, &[]).len());
        assert_eq!(1, problems("", SOURCE, &[]).len());
    }

    #[test]
    fn list_is_strict() {
        for text in ["hook open\n", "grab open a\n", "hook open a\npass open b\n", "hook\n"] {
            assert!(parse_calls(text).is_err(), "{text}");
        }
    }
}
