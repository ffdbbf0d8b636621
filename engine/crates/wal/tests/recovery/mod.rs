//! Stock recoveries to positions that are drawn at random, for oracles of what a replay of WAL comes to.
//!
//! `LAKEBASE_SEED` repeats the draw of a run that printed it, from WAL that is never the same to the byte; `LAKEBASE_RECOVERIES`
//! says how many positions there are (`make soak` has many).

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use pgtypes::Lsn;
use wal::RecordInfo;

use crate::postgres::{Directory, Postgres, output};

/// A recovery takes some seconds; the machine may be busy.
const RECOVERY_MAX: Duration = Duration::from_secs(120);

/// Positions between records.
pub struct Positions {
    seed: u64,
    state: u64,
    left: usize,
    /// By resource manager and type of the record that ends there: most records are of few types.
    by_kind: Vec<Vec<Lsn>>,
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LAKEBASE_SEED={}", self.seed)
    }
}

fn number_of(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

impl Positions {
    /// Of these records, each with its end, aligned to 8 bytes; `count` unless the environment says otherwise.
    pub fn new(records: impl Iterator<Item = (RecordInfo, Lsn)>, count: usize) -> Positions {
        let mut by_kind: BTreeMap<(u8, u8), Vec<Lsn>> = BTreeMap::new();
        for (info, end) in records {
            by_kind.entry((info.rmgr, info.info & 0xF0)).or_default().push(end);
        }
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_micros() as u64;
        let seed = number_of("LAKEBASE_SEED").unwrap_or_else(now);
        let left = number_of("LAKEBASE_RECOVERIES").map_or(count, |count| count as usize);
        assert!(left > 0 && !by_kind.is_empty(), "nothing to compare");
        let positions = Positions { seed, state: seed, left, by_kind: by_kind.into_values().collect() };
        println!("{positions} LAKEBASE_RECOVERIES={left}, records of {} types", positions.by_kind.len());
        positions
    }

    /// A generator of numbers that are random enough (Knuth's MMIX).
    fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as usize % bound
    }

    /// The next one; none after the last. Every type of record is as likely as another, every second time; in between,
    /// every record is.
    pub fn draw(&mut self) -> Option<Lsn> {
        self.left = self.left.checked_sub(1)?;
        if self.left.is_multiple_of(2) {
            let kind = self.below(self.by_kind.len());
            let record = self.below(self.by_kind[kind].len());
            return Some(self.by_kind[kind][record]);
        }
        let mut record = self.below(self.by_kind.iter().map(Vec::len).sum());
        for ends in &self.by_kind {
            match ends.get(record) {
                Some(end) => return Some(*end),
                None => record -= ends.len(),
            }
        }
        unreachable!("the record is below the number of records");
    }
}

/// Recovers a copy of the base backup `base` with the segments in `wal`, stops before the first record that starts at `end` or
/// behind it, and lets it become a server, which is shut down: only then all is in files. Returns its directory.
pub fn recover(
    postgres: &Postgres,
    directory: &Directory,
    base: &Path,
    wal: &Path,
    end: Lsn,
    configuration: &str,
) -> PathBuf {
    let data = directory.0.join("recovered");
    output(Command::new("cp").arg("-a").arg(base).arg(&data));
    fs::write(data.join("recovery.signal"), "").expect("a written file");
    postgres.own(&data.join("recovery.signal"));
    let mut server = postgres.server(directory, &data);
    server.append_configuration(&format!(
        "hot_standby = off\nrestore_command = 'cp {}/%f %p'\nrecovery_target_lsn = '{end}'\n\
         recovery_target_inclusive = off\nrecovery_target_action = promote\n{configuration}",
        wal.display()
    ));
    server.start();
    // `pg_ctl` is content with a standby. Nobody may connect, not even `pg_isready`: a backend prunes the catalogs that it reads.
    let is_ready = || server.control_data().get("Database cluster state") == "in production";
    let deadline = Instant::now() + RECOVERY_MAX;
    while !is_ready() {
        assert!(Instant::now() < deadline, "waited {RECOVERY_MAX:?} for the end of a recovery to {end}");
        sleep(Duration::from_millis(20));
    }
    server.stop("fast");
    data
}
