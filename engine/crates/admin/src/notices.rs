//! Problems that repeat are logged once.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use pgtypes::Instant;

/// How long a problem stays known. A peer that tries every second writes six lines an hour.
const SILENCE: Duration = Duration::from_secs(600);

/// Problems known at a time; above it the oldest is forgotten, so that strangers cannot take memory.
const KNOWN_MAX: usize = 256;

/// Remembers which problems were logged a short while ago.
#[derive(Default)]
pub struct Notices {
    known: Mutex<BTreeMap<String, Instant>>,
}

impl Notices {
    /// Whether `problem` (who and what, without positions or times) is to be logged at `now`.
    pub fn is_new(&self, problem: &str, now: Instant) -> bool {
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if known.get(problem).is_some_and(|logged| now.since(*logged) < SILENCE) {
            return false;
        }
        if known.len() >= KNOWN_MAX {
            let oldest = known.iter().min_by_key(|(_, logged)| **logged).map(|(problem, _)| problem.clone());
            if let Some(oldest) = oldest {
                known.remove(&oldest);
            }
        }
        known.insert(problem.to_owned(), now);
        true
    }

    /// Forgets `problem`: it is solved, and is logged when it comes back.
    pub fn solved(&self, problem: &str) -> bool {
        self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(problem).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_new_once_until_it_was_silent_or_solved() {
        let notices = Notices::default();
        let start = Instant(0);
        assert!(notices.is_new("a", start));
        assert!(!notices.is_new("a", start.after(Duration::from_secs(599))));
        assert!(notices.is_new("a", start.after(Duration::from_secs(600))));
        assert!(notices.solved("a"));
        assert!(!notices.solved("a"));
        assert!(notices.is_new("a", start.after(Duration::from_secs(601))));
    }

    #[test]
    fn memory_is_bounded() {
        let notices = Notices::default();
        for i in 0..1000 {
            assert!(notices.is_new(&i.to_string(), Instant(i)));
        }
        assert_eq!(KNOWN_MAX, notices.known.lock().unwrap().len());
    }
}
