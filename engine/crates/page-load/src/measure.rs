//! The figures of a run.

use std::{
    io,
    time::{Duration, Instant},
};

use crate::{Unexpected, cpu};

/// Not measured at the beginning.
const WARM_UP: Duration = Duration::from_millis(250);

/// Latencies and CPU time of the part of a run that counts.
pub struct Measure {
    /// When each request was made, by id.
    asked: Vec<Instant>,
    length: Duration,
    pid: Option<u32>,
    begun: Instant,
    /// Once the warm-up is over: since when, and the CPU seconds of server and client then.
    counted: Option<(Instant, f64, f64)>,
    latencies: Vec<u64>,
    /// Measured seconds, CPU seconds of server and client.
    result: Option<(f64, f64, f64)>,
}

impl Measure {
    /// A run with ids 1 to `depth`, of `length` behind the warm-up.
    ///
    /// # Errors
    /// There is no process `pid`.
    pub fn new(depth: usize, length: Duration, pid: Option<u32>) -> io::Result<Measure> {
        let begun = Instant::now();
        let measure = Measure {
            asked: vec![begun; depth + 1],
            length,
            pid,
            begun,
            counted: None,
            latencies: Vec::new(),
            result: None,
        };
        measure.cpu()?;
        Ok(measure)
    }

    fn cpu(&self) -> io::Result<(f64, f64)> {
        let server = self.pid.map_or(Ok(0.0), cpu::seconds)?;
        Ok((server, cpu::seconds(std::process::id())?))
    }

    /// A request was made.
    pub fn asked(&mut self, id: u64) {
        if let Some(asked) = usize::try_from(id).ok().and_then(|id| self.asked.get_mut(id)) {
            *asked = Instant::now();
        }
    }

    /// Answers arrived just now.
    ///
    /// # Errors
    /// To requests that nobody made.
    pub fn answered(&mut self, ids: &[u64]) -> Result<(), Unexpected> {
        let now = Instant::now();
        for id in ids {
            let asked = usize::try_from(*id).ok().filter(|id| *id > 0).and_then(|id| self.asked.get(id));
            let asked = asked.ok_or_else(|| Unexpected(format!("answer to request {id}, which nobody made")))?;
            if self.counted.is_some() {
                self.latencies.push(u64::try_from((now - *asked).as_nanos()).unwrap_or(u64::MAX));
            }
        }
        Ok(())
    }

    /// Whether more is to be asked. Starts and stops the clock.
    ///
    /// # Errors
    /// The server is gone.
    pub fn goes_on(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        match self.counted {
            None if now - self.begun >= WARM_UP => {
                let (server, client) = self.cpu()?;
                self.counted = Some((now, server, client));
                Ok(true)
            }
            Some((since, server_then, client_then)) if now - since >= self.length => {
                let (server, client) = self.cpu()?;
                self.result = Some(((now - since).as_secs_f64(), server - server_then, client - client_then));
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// The figures; requests had `count` blocks each.
    ///
    /// # Errors
    /// Nothing was answered.
    pub fn into_json(mut self, count: u16) -> Result<serde_json::Value, Unexpected> {
        let Some((seconds, server, client)) = self.result.filter(|_| !self.latencies.is_empty()) else {
            return Err(Unexpected("nothing was answered".to_owned()));
        };
        self.latencies.sort_unstable();
        let quantile = |part: f64| {
            let index = ((self.latencies.len() as f64 * part) as usize).min(self.latencies.len() - 1);
            self.latencies[index] as f64 / 1e3
        };
        let pages = self.latencies.len() as f64 * f64::from(count);
        Ok(serde_json::json!({
            "pages": pages,
            "seconds": seconds,
            "pages_per_second": pages / seconds,
            "p50_us": quantile(0.5),
            "p99_us": quantile(0.99),
            "server_cpu_us": server / pages * 1e6,
            "client_cpu_us": client / pages * 1e6,
            "depth": self.asked.len() - 1,
            "count": count,
        }))
    }
}
