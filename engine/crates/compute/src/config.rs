//! `compute.toml`: what the agent is told. Parsed and checked at the edge; everything behind it trusts the values.
//!
//! Knows nothing about processes or sockets. `docs/compute.md` describes every key for users.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use pgtypes::{BranchId, ClusterId, LogId, MemberId, WriterId};
use serde::{Deserialize, Deserializer, de};

use crate::{
    page_service_config::{BackpressureConfig, PageServiceConfig},
    settings,
};

/// A safekeeper set has at most this many members during a change of membership (two joint sets of five, one differs).
const SAFEKEEPERS_MAX: usize = 10;

/// Longest path of a Unix socket (`sun_path`), without the closing zero byte.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The lakebase that this agent writes for.
    #[serde(deserialize_with = "text")]
    pub cluster: ClusterId,
    /// The branch.
    #[serde(deserialize_with = "text")]
    pub branch: BranchId,
    /// This writer's identity: survives restarts (on Kubernetes the pod's UID). Terms are granted to it.
    #[serde(deserialize_with = "text")]
    pub writer: WriterId,
    /// Directory of the agent: PGDATA, the grant, the mark of a clean stop, PostgreSQL's log.
    pub data_dir: PathBuf,
    /// Where PGDATA comes from; exactly one is given: a cleanly shut down PGDATA that a start begins with,
    #[serde(default)]
    pub base_backup: Option<PathBuf>,
    /// or the page service.
    #[serde(default)]
    pub page_service: Option<PageServiceConfig>,
    /// When the writer is slowed because shards lag; used with the page service only.
    #[serde(default)]
    pub backpressure: BackpressureConfig,
    /// How long a backend holds back an answer while the read lease is expired, before it exits.
    #[serde(default = "default_lease_wait_timeout", deserialize_with = "text_duration")]
    pub lease_wait_timeout: Duration,
    /// Run a minor release of PostgreSQL 17 that this engine was not tested with.
    #[serde(default)]
    pub allow_untested_minor: bool,
    /// Form of the log lines; the command line sets the log up from it.
    #[serde(default)]
    pub log_format: LogFormat,
    /// How PostgreSQL runs.
    pub postgres: PostgresConfig,
    /// Where the log is.
    pub safekeepers: Vec<SafekeeperConfig>,
    /// Ports of the agent itself.
    pub listen: ListenConfig,
    /// Certificates.
    pub tls: TlsConfig,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// `[postgres]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    /// Directory of the `postgres` program.
    pub bin_dir: PathBuf,
    /// System user that PostgreSQL runs as; required when the agent runs as root, because PostgreSQL refuses root.
    #[serde(default)]
    pub user: Option<String>,
    /// `listen_addresses` of PostgreSQL; empty means Unix socket only.
    #[serde(default)]
    pub listen_addresses: String,
    /// `port`.
    #[serde(default = "default_port")]
    pub port: u16,
    /// `unix_socket_directories`; `<data_dir>/run` when absent.
    #[serde(default)]
    pub socket_dir: Option<PathBuf>,
    /// `liblakebase_vfs.so`.
    pub vfs_library: PathBuf,
    /// How the agent makes sure that it can end every process of PostgreSQL.
    #[serde(default)]
    pub isolation: IsolationChoice,
    /// Where PostgreSQL's log goes: a file `<data_dir>/postgres.log`, or the agent's own standard error.
    #[serde(default)]
    pub log: PostgresLog,
    /// How long a graceful stop may take before it becomes an immediate one.
    #[serde(default = "default_stop_timeout", deserialize_with = "text_duration")]
    pub stop_timeout: Duration,
    /// Settings of the user's; those that the engine depends on are refused.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
}

/// How the agent holds PostgreSQL's processes together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IsolationChoice {
    /// A PID namespace where the kernel allows one, else the process tree.
    #[default]
    Auto,
    /// A PID namespace or nothing.
    PidNamespace,
    /// The process tree, held together by parent-death signals.
    ProcessTree,
}

/// Where PostgreSQL's log goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PostgresLog {
    /// `<data_dir>/postgres.log`, appended to.
    #[default]
    File,
    /// The agent's standard error, as containers want it.
    Stderr,
}

/// `[[safekeepers]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SafekeeperConfig {
    /// Its number in the membership configuration.
    #[serde(deserialize_with = "member")]
    pub member: MemberId,
    /// `host:port` of its append protocol.
    #[serde(deserialize_with = "text")]
    pub append: HostPort,
    /// `host:port` of its PostgreSQL replication protocol.
    #[serde(deserialize_with = "text")]
    pub replication: HostPort,
}

/// `[listen]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// `host:port` of the admin HTTP server.
    pub admin: String,
    /// `host:port` of the metrics server.
    pub metrics: String,
}

/// `[tls]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// `required`, or `off` for development on one machine.
    pub mode: TlsMode,
    /// Must be true beside `mode = "off"`.
    #[serde(default)]
    pub i_know_this_is_insecure: bool,
    /// Certificate authority of the cluster, PEM.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// The agent's certificate, PEM.
    #[serde(default)]
    pub certificate: Option<PathBuf>,
    /// Its private key, PEM.
    #[serde(default)]
    pub key: Option<PathBuf>,
}

/// Whether connections are encrypted and peers identified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// Mutual TLS on every connection.
    Required,
    /// None.
    Off,
}

/// A host (name, IPv4, or IPv6 in brackets) and a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// Without brackets.
    pub host: String,
    /// Above 0.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not HOST:PORT");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(bracketed) => bracketed,
            None if host.contains(':') => {
                return Err(format!("{text:?}: an IPv6 address needs brackets, as in [::1]:5432"));
            }
            None => host,
        };
        let port: u16 = port.parse().map_err(|_| wrong())?;
        if host.is_empty() || port == 0 || host.contains([',', ' ', '\'', '\\', '/']) {
            return Err(wrong());
        }
        Ok(HostPort { host: host.to_owned(), port })
    }
}

/// The file cannot be used. The message says where and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct ConfigError {
    /// The file.
    pub path: String,
    /// What is wrong.
    pub message: String,
}

impl Config {
    /// Reads and checks `path`. Relative paths in it count from the directory of the file.
    ///
    /// # Errors
    /// The file cannot be read, has unknown keys or bad values.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let error = |message: String| ConfigError { path: path.display().to_string(), message };
        let source = std::fs::read_to_string(path).map_err(|e| error(format!("read: {e}")))?;
        let directory = std::path::absolute(path).map_err(|e| error(format!("resolve: {e}")))?;
        let directory = directory.parent().unwrap_or(Path::new("/")).to_owned();
        Self::parse(&source, &directory).map_err(error)
    }

    /// Parses and checks the text of a configuration file that lies in `directory`.
    ///
    /// # Errors
    /// What is wrong, for the person who wrote it.
    pub fn parse(source: &str, directory: &Path) -> Result<Self, String> {
        let mut config: Config = toml::from_str(source).map_err(|e| e.to_string().trim_end().to_owned())?;
        let resolve = |path: &mut PathBuf| *path = directory.join(&*path);
        resolve(&mut config.data_dir);
        resolve(&mut config.postgres.bin_dir);
        resolve(&mut config.postgres.vfs_library);
        let tls = &mut config.tls;
        let optional =
            [&mut config.base_backup, &mut config.postgres.socket_dir, &mut tls.ca, &mut tls.certificate, &mut tls.key];
        optional.into_iter().flatten().for_each(resolve);
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.safekeepers.is_empty() || self.safekeepers.len() > SAFEKEEPERS_MAX {
            return Err(format!("safekeepers: {} entries; expected 1 to {SAFEKEEPERS_MAX}", self.safekeepers.len()));
        }
        let mut members = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for safekeeper in &self.safekeepers {
            if !members.insert(safekeeper.member) {
                return Err(format!("safekeepers: member {} appears twice", safekeeper.member.0));
            }
            if !addresses.insert(&safekeeper.append) {
                return Err(format!("safekeepers: append address {} appears twice", safekeeper.append));
            }
        }
        for (name, value) in &self.postgres.parameters {
            settings::check_parameter(name, value).map_err(|e| format!("postgres.parameters: {e}"))?;
        }
        match (&self.base_backup, &self.page_service) {
            (Some(base_backup), None) => self.check_base_backup(base_backup)?,
            (None, Some(page_service)) => page_service.check()?,
            _ => {
                return Err(
                    "exactly one of base_backup and [page_service] must be given: where PGDATA comes from".into()
                );
            }
        }
        self.backpressure.check()?;
        if self.postgres.port == 0 {
            return Err("postgres.port: must be above 0".into());
        }
        let socket = self.socket_dir().join(format!(".s.PGSQL.{}", self.postgres.port));
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(format!(
                "postgres.socket_dir: {} is longer than the {SOCKET_PATH_BYTES_MAX} bytes that a Unix socket may have",
                socket.display()
            ));
        }
        // LD_PRELOAD separates its entries by these and has no way to quote them.
        if self.postgres.vfs_library.to_string_lossy().contains([' ', ':']) {
            return Err("postgres.vfs_library: the path may contain neither space nor colon".into());
        }
        match self.tls.mode {
            TlsMode::Off if !self.tls.i_know_this_is_insecure => {
                return Err("tls.mode = \"off\" needs i_know_this_is_insecure = true beside it".into());
            }
            TlsMode::Required if self.tls.files().is_none() => {
                return Err("tls: ca, certificate and key are required".into());
            }
            _ => {}
        }
        Ok(())
    }

    /// A restore removes PGDATA and copies the whole base backup there.
    fn check_base_backup(&self, base_backup: &Path) -> Result<(), String> {
        let (base, data_dir) = (resolved(base_backup), resolved(&self.data_dir));
        if data_dir.starts_with(&base) || base.starts_with(data_dir.join("pgdata")) {
            return Err(format!(
                "base_backup {} and data_dir {} overlap: a restore would destroy the base backup; keep them apart",
                base.display(),
                data_dir.display()
            ));
        }
        Ok(())
    }

    /// The log that this agent writes.
    pub fn log_id(&self) -> LogId {
        LogId { cluster: self.cluster, branch: self.branch }
    }

    /// Directory of PostgreSQL's Unix socket.
    pub fn socket_dir(&self) -> PathBuf {
        self.postgres.socket_dir.clone().unwrap_or_else(|| self.data_dir.join("run"))
    }
}

impl TlsConfig {
    /// CA, certificate and key, when all are given.
    pub fn files(&self) -> Option<(&Path, &Path, &Path)> {
        Some((self.ca.as_deref()?, self.certificate.as_deref()?, self.key.as_deref()?))
    }
}

/// The path without links and `..`, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let existing =
        path.ancestors().find_map(|start| Some((start.canonicalize().ok()?, path.strip_prefix(start).ok()?)));
    existing.map_or_else(|| path.to_owned(), |(start, rest)| start.components().chain(rest.components()).collect())
}

fn default_port() -> u16 {
    5432
}

fn default_lease_wait_timeout() -> Duration {
    Duration::from_secs(60)
}

fn default_stop_timeout() -> Duration {
    Duration::from_secs(60)
}

/// A value in a form of its own, as a string.
pub(crate) fn text<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(deserializer: D) -> Result<T, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
}

fn member<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MemberId, D::Error> {
    match u32::deserialize(deserializer)? {
        0 => Err(de::Error::custom("member numbers start at 1")),
        number => Ok(MemberId(number)),
    }
}

/// A duration as a string.
pub(crate) fn text_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

/// `250ms`, `60s`, `5min`, `1h`: a whole number and a unit, as PostgreSQL writes them; above 0, at most a day.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale_ms = match unit.trim() {
        "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{text:?} is not a duration; expected a number and ms, s, min or h, as in 60s")),
    };
    let milliseconds = number.parse::<u64>().ok().and_then(|n| n.checked_mul(scale_ms));
    match milliseconds {
        Some(1..=86_400_000) => Ok(Duration::from_millis(milliseconds.unwrap_or_default())),
        _ => Err(format!("{text:?}: expected a duration above 0 and at most 24h")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
cluster = "00000000-0000-0000-0000-000000000001"
branch = "00000000-0000-0000-0000-000000000002"
writer = "00000000-0000-0000-0000-000000000003"
data_dir = "agent"
base_backup = "/base"
lease_wait_timeout = "90s"

[postgres]
bin_dir = "/usr/lib/postgresql/17/bin"
user = "postgres"
vfs_library = "/usr/lib/liblakebase_vfs.so"
[postgres.parameters]
shared_buffers = "1GB"

[[safekeepers]]
member = 1
append = "127.0.0.1:7001"
replication = "127.0.0.1:7101"

[listen]
admin = "127.0.0.1:7301"
metrics = "127.0.0.1:7302"

[tls]
mode = "off"
i_know_this_is_insecure = true
"#;

    fn parse(source: &str) -> Result<Config, String> {
        Config::parse(source, Path::new("/etc/lakebase"))
    }

    #[test]
    fn relative_paths_count_from_the_file() {
        let config = parse(GOOD).expect("valid");
        assert_eq!(Path::new("/etc/lakebase/agent"), config.data_dir);
        assert_eq!(Some(Path::new("/base")), config.base_backup.as_deref());
        assert_eq!(Path::new("/etc/lakebase/agent/run"), config.socket_dir());
        assert_eq!(Duration::from_secs(90), config.lease_wait_timeout);
    }

    #[test]
    fn pages_come_from_shards_where_there_is_no_base_backup() {
        let shard =
            "[page_service]\nshards = [{ shard = 0, begin = 0, end = 4294967296, pages = \"[::1]:7\" }]\n[listen]";
        let source = GOOD.replace("base_backup = \"/base\"", "").replace("[listen]", shard);
        let config = parse(&source).expect("valid");
        assert_eq!(1, config.page_service.map_or(0, |service| service.shards.len()));
        assert_eq!(256 << 20, config.backpressure.ingest_lag_bytes);
    }

    #[test]
    fn bad_values_are_refused_with_the_key_in_the_message() {
        let cases = [
            ("writer = \"00000000-0000-0000-0000-000000000003\"", "writer = \"me\"", "UUID"),
            ("member = 1", "member = 0", "start at 1"),
            ("append = \"127.0.0.1:7001\"", "append = \"127.0.0.1\"", "HOST:PORT"),
            ("append = \"127.0.0.1:7001\"", "append = \"::1:7001\"", "brackets"),
            ("lease_wait_timeout = \"90s\"", "lease_wait_timeout = \"90\"", "duration"),
            ("lease_wait_timeout = \"90s\"", "lease_wait_timeout = \"0s\"", "above 0"),
            ("i_know_this_is_insecure = true", "", "i_know_this_is_insecure"),
            ("mode = \"off\"", "mode = \"required\"", "ca, certificate and key"),
            ("shared_buffers = \"1GB\"", "fsync = \"off\"", "fsync"),
            ("shared_buffers = \"1GB\"", "Full_Page_Writes = \"on\"", "full_page_writes"),
            ("user = \"postgres\"", "usr = \"postgres\"", "usr"),
            ("[listen]", "[listen]\nweb = \"x\"", "web"),
            ("data_dir = \"agent\"", "", "data_dir"),
            ("data_dir = \"agent\"", "data_dir = \"/base\"", "overlap"),
            ("data_dir = \"agent\"", "data_dir = \"/base/agent\"", "overlap"),
            ("base_backup = \"/base\"", "base_backup = \"agent/pgdata\"", "overlap"),
            ("base_backup = \"/base\"", "", "exactly one of base_backup and [page_service]"),
            ("[listen]", "[page_service]\nshards = []\n[listen]", "exactly one of base_backup and [page_service]"),
            ("[listen]", "[backpressure]\ningest_lag_bytes = 1\n[listen]", "backpressure.ingest_lag_bytes"),
        ];
        for (from, to, expected) in cases {
            assert!(GOOD.contains(from), "{from}");
            let message = parse(&GOOD.replacen(from, to, 1)).expect_err(to);
            assert!(message.contains(expected), "{to}: {message}");
        }
    }

    #[test]
    fn member_numbers_and_addresses_are_unique() {
        let entry = |member: u32, port: u16| {
            format!(
                "[[safekeepers]]\nmember = {member}\nappend = \"127.0.0.1:{port}\"\nreplication = \"127.0.0.1:1\"\n[listen]"
            )
        };
        assert!(
            parse(&GOOD.replace("[listen]", &entry(1, 7002))).expect_err("member").contains("member 1 appears twice")
        );
        assert!(parse(&GOOD.replace("[listen]", &entry(2, 7001))).expect_err("address").contains("7001 appears twice"));
        assert_eq!(2, parse(&GOOD.replace("[listen]", &entry(2, 7002))).expect("valid").safekeepers.len());
    }

    #[test]
    fn host_port_text_round_trips() {
        for text in ["127.0.0.1:1", "sk-0.demo.svc:7001", "[::1]:65535"] {
            assert_eq!(text, text.parse::<HostPort>().expect(text).to_string());
        }
    }
}
