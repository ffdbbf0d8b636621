//! A store that fails as stores do, under a seed. For tests: behind the feature `faults`.
//!
//! Asked for by the URL, `s3://bucket/prefix?faults=seed:7,fail:10`, by the environment variable
//! `LAKEBASE_STORAGE_FAULTS` with the part behind `faults=`, or by [`crate::RemoteStorage::open_faulty`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use thiserror::Error;

use crate::error::AttemptError;

/// Text that describes no faults.
#[derive(Debug, Error)]
#[error(
    "faults: {0}: expected seed:N, fail:PERCENT, throttle:PERCENT, after:PERCENT, delay:MS, outage:AFTER_MS+MS, \
     separated by commas"
)]
pub struct FaultsError(String);

#[derive(Default)]
struct State {
    random: AtomicU64,
    fail: AtomicU32,
    throttle: AtomicU32,
    after: AtomicU32,
    delay_ms_max: AtomicU32,
    down: AtomicBool,
    injected: AtomicU64,
}

/// What a store does wrong. Clones are the same: a test changes it while the store works.
#[derive(Clone, Default)]
pub struct Faults {
    state: Arc<State>,
    outage: Option<(Instant, Duration, Duration)>,
}

/// The variable of the environment.
const VARIABLE: &str = "LAKEBASE_STORAGE_FAULTS";

impl Faults {
    /// No faults yet; the same seed and the same order of attempts have the same faults.
    pub fn seeded(seed: u64) -> Faults {
        let faults = Faults::default();
        faults.state.random.store(seed, Relaxed);
        faults
    }

    /// Percent of attempts that fail and are not done.
    #[must_use]
    pub fn fail(self, percent: u32) -> Faults {
        self.state.fail.store(percent, Relaxed);
        self
    }

    /// Percent of attempts that are answered with 503 and are not done.
    #[must_use]
    pub fn throttle(self, percent: u32) -> Faults {
        self.state.throttle.store(percent, Relaxed);
        self
    }

    /// Percent of attempts that are done and answer an error.
    #[must_use]
    pub fn fail_after(self, percent: u32) -> Faults {
        self.state.after.store(percent, Relaxed);
        self
    }

    /// The longest that an attempt is held back before it is made, milliseconds; uniform.
    #[must_use]
    pub fn delay(self, milliseconds_max: u32) -> Faults {
        self.state.delay_ms_max.store(milliseconds_max, Relaxed);
        self
    }

    /// Begins or ends an outage: every attempt fails.
    pub fn set_outage(&self, down: bool) {
        self.state.down.store(down, Relaxed);
    }

    /// How many attempts were made to fail. A test that sees 0 tested nothing.
    pub fn injected(&self) -> u64 {
        self.state.injected.load(Relaxed)
    }

    /// The faults that a URL or the environment asks for, and the URL without them.
    pub(crate) fn of_url(url: &str) -> Result<(&str, Faults), FaultsError> {
        let (url, asked) = match url.split_once("?faults=") {
            Some((url, asked)) => (url, Some(asked.to_owned())),
            None => (url, std::env::var(VARIABLE).ok()),
        };
        Ok((url, asked.map(|asked| Faults::parse(&asked)).transpose()?.unwrap_or_default()))
    }

    fn parse(text: &str) -> Result<Faults, FaultsError> {
        let wrong = || FaultsError(text.to_owned());
        let mut faults = Faults::default();
        for part in text.split(',') {
            let (name, value) = part.split_once(':').ok_or_else(wrong)?;
            if name == "outage" {
                let (after, lasts) = value.split_once('+').ok_or_else(wrong)?;
                let milliseconds = |text: &str| text.parse().map(Duration::from_millis).map_err(|_| wrong());
                faults.outage = Some((Instant::now(), milliseconds(after)?, milliseconds(lasts)?));
                continue;
            }
            let number: u32 = value.parse().map_err(|_| wrong())?;
            let state = &faults.state;
            match name {
                "seed" => state.random.store(u64::from(number), Relaxed),
                "fail" => state.fail.store(number, Relaxed),
                "throttle" => state.throttle.store(number, Relaxed),
                "after" => state.after.store(number, Relaxed),
                "delay" => state.delay_ms_max.store(number, Relaxed),
                _ => return Err(wrong()),
            }
        }
        Ok(faults)
    }

    /// SplitMix64 over a counter.
    fn random(&self) -> u64 {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut x = self.state.random.fetch_add(STEP, Relaxed).wrapping_add(STEP);
        x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    fn happens(&self, percent: &AtomicU32) -> bool {
        self.random() % 100 < u64::from(percent.load(Relaxed))
    }

    fn is_down(&self) -> bool {
        let planned = self.outage.is_some_and(|(opened, after, lasts)| {
            let since = opened.elapsed();
            after <= since && since < after + lasts
        });
        planned || self.state.down.load(Relaxed)
    }

    fn fails<T>(&self, cause: &str) -> Result<T, AttemptError> {
        self.state.injected.fetch_add(1, Relaxed);
        Err(AttemptError::Temporary(format!("injected: {cause}")))
    }

    /// Makes an attempt, or what goes wrong instead.
    pub(crate) async fn around<T>(
        &self,
        attempt: impl Future<Output = Result<T, AttemptError>>,
    ) -> Result<T, AttemptError> {
        let state = &self.state;
        let delay = self.random() % (u64::from(state.delay_ms_max.load(Relaxed)) + 1);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if self.is_down() {
            return self.fails("outage");
        }
        if self.happens(&state.throttle) {
            return self.fails("503 SlowDown");
        }
        if self.happens(&state.fail) {
            return self.fails("connection reset");
        }
        let result = attempt.await;
        if result.is_ok() && self.happens(&state.after) {
            return self.fails("connection reset behind the request");
        }
        result
    }
}
