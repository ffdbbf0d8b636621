//! How a run of PostgreSQL ends: a stop that takes too long, and what came of it.

use std::time::Instant;

use super::{IMMEDIATE_LIMIT, Outcome};
use crate::postgres::{Ended, Postgres};

/// A stop that takes too long: first without a checkpoint, then by force.
#[derive(Default)]
pub(super) struct Hurry {
    /// When the next step is due.
    pub(super) at: Option<Instant>,
    steps: u32,
}

impl Hurry {
    /// Takes the next step when its time has come, or when the agent was told to stop once more.
    pub(super) fn up(&mut self, postgres: &Postgres, stop_wishes: u32) {
        let due = self.at.is_some_and(|at| at <= Instant::now());
        if !due && stop_wishes <= self.steps + 1 {
            return;
        }
        self.steps += 1;
        match self.steps {
            1 => {
                tracing::warn!("PostgreSQL is ended without a shutdown checkpoint");
                postgres.stop_immediately();
                self.at = Some(Instant::now() + IMMEDIATE_LIMIT);
            }
            2 => {
                tracing::warn!("PostgreSQL is killed");
                postgres.killer().kill();
                self.at = None;
            }
            _ => {}
        }
    }
}

/// How a run of PostgreSQL ended.
#[derive(Default)]
pub(super) struct RunEnd {
    pub(super) how: Option<Ended>,
    pub(super) failed: Option<String>,
    pub(super) broken: Option<String>,
    pub(super) fenced: bool,
}

impl RunEnd {
    pub(super) fn outcome(self, stopping: bool) -> Outcome {
        if self.fenced {
            Outcome::Fenced
        } else if stopping {
            Outcome::Stop
        } else if let Some(reason) = self.broken.or(self.failed) {
            Outcome::Again(reason)
        } else {
            Outcome::Again(match self.how {
                Some(Ended::Exited(status)) => format!("PostgreSQL ended with status {status} (its log says why)"),
                Some(Ended::Signaled(signal)) => format!("PostgreSQL was ended by signal {signal}"),
                None => "PostgreSQL is gone".to_owned(),
            })
        }
    }
}
