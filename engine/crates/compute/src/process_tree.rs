//! The descendants of a process, read from `/proc`.

use std::{collections::BTreeMap, fs};

/// A process that existed a moment ago.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Start time in clock ticks since boot: tells it from a later process with the same id.
    pub start_ticks: u64,
    /// Its parent.
    pub parent: i32,
}

/// All processes below `root`, parents before children; `root` itself is not among them. Zombies are left out.
///
/// A process that forks while this reads may escape one look: callers look until nothing is left.
pub fn descendants(root: i32) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    // Without /proc nothing can be found; the callers' bound ends their rounds.
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if let Some(process) = read(pid) {
            children.entry(process.parent).or_default().push(process);
        }
    }
    let mut found = Vec::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        for process in children.remove(&parent).unwrap_or_default() {
            parents.push(process.pid);
            found.push(process);
        }
    }
    found
}

fn read(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse(pid, &stat)
}

/// proc(5): `pid (name) state ppid ...`, start time is field 22; the name may contain spaces and parentheses.
fn parse(pid: i32, stat: &str) -> Option<Process> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    Some(Process { pid, parent: fields.get(1)?.parse().ok()?, start_ticks: fields.get(19)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_and_zombies_are_understood() {
        let numbers = "1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 0";
        let stat = format!("42 (a) b) S 7 {numbers}");
        assert_eq!(Some(Process { pid: 42, parent: 7, start_ticks: 777 }), parse(42, &stat));
        assert_eq!(None, parse(42, &stat.replace(") S", ") Z")));
    }

    #[test]
    fn a_child_is_found_below_its_parent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("spawned");
        let pids: Vec<i32> = descendants(std::process::id() as i32).iter().map(|process| process.pid).collect();
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert!(pids.contains(&(child.id() as i32)), "{pids:?}");
    }
}
