//! When another attempt is made: exponential pauses with jitter, within a budget.

use std::time::{Duration, Instant};

/// How long a call goes on trying.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryPolicy {
    /// No attempt begins later than this after the call.
    pub budget: Duration,
    /// An attempt that takes longer counts as failed. It may still be done by the store.
    pub attempt_timeout: Duration,
    /// The most attempts, whatever the budget.
    pub attempts_max: u32,
    /// Pause behind the first attempt; doubles with each.
    pub pause_min: Duration,
    /// The longest pause.
    pub pause_max: Duration,
}

/// Policies by class of call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryPolicies {
    /// Gets and lists: somebody waits for a page.
    pub read: RetryPolicy,
    /// Small writes and deletions.
    pub write: RetryPolicy,
    /// One part of the transfer of a file; parts have their budgets one by one.
    pub transfer: RetryPolicy,
}

impl Default for RetryPolicies {
    fn default() -> Self {
        let pauses = RetryPolicy {
            budget: Duration::from_secs(30),
            attempt_timeout: Duration::from_secs(10),
            attempts_max: 30,
            pause_min: Duration::from_millis(50),
            pause_max: Duration::from_secs(5),
        };
        RetryPolicies {
            read: pauses,
            write: RetryPolicy { budget: Duration::from_secs(60), attempt_timeout: Duration::from_secs(20), ..pauses },
            // A part of 16 MiB takes this long at 0.3 MB/s.
            transfer: RetryPolicy {
                budget: Duration::from_secs(300),
                attempt_timeout: Duration::from_secs(60),
                attempts_max: 60,
                ..pauses
            },
        }
    }
}

/// The attempts of one call.
pub(crate) struct Attempts {
    policy: RetryPolicy,
    began: Instant,
    pub(crate) made: u32,
}

impl Attempts {
    pub(crate) fn begin(policy: RetryPolicy, now: Instant) -> Self {
        Attempts { policy, began: now, made: 0 }
    }

    /// The pause before the next attempt; `None` when there is none. `random` is uniform.
    pub(crate) fn next_pause(&self, now: Instant, random: u32) -> Option<Duration> {
        let RetryPolicy { budget, attempts_max, pause_min, pause_max, .. } = self.policy;
        let doubled = pause_min.saturating_mul(1u32.checked_shl(self.made.saturating_sub(1)).unwrap_or(u32::MAX));
        // Between half of it and all of it: clients that failed together do not come back together.
        let pause = doubled.min(pause_max).mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX) / 2.0);
        (self.made < attempts_max && now.duration_since(self.began) + pause < budget).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_end_with_the_budget() {
        let began = Instant::now();
        let mut attempts = Attempts::begin(RetryPolicies::default().read, began);
        let mut pauses = Vec::new();
        let mut now = began;
        loop {
            attempts.made += 1;
            let Some(pause) = attempts.next_pause(now, u32::MAX) else { break };
            pauses.push(pause.as_millis());
            now += pause;
        }
        assert_eq!([50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000], pauses[..]);
        assert_eq!(Some(Duration::from_millis(25)), Attempts { made: 1, ..attempts }.next_pause(began, 0));
    }

    #[test]
    fn attempts_end_with_their_number() {
        let began = Instant::now();
        let mut attempts = Attempts::begin(RetryPolicy { attempts_max: 3, ..RetryPolicies::default().read }, began);
        attempts.made = 2;
        assert!(attempts.next_pause(began, 0).is_some());
        attempts.made = 3;
        assert!(attempts.next_pause(began, 0).is_none());
        attempts.made = u32::MAX;
        assert!(attempts.next_pause(began, 0).is_none());
    }
}
