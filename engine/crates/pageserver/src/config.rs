//! `pageserver.toml`: what a page server is told. Parsed and checked at the edge; everything behind it trusts the values.
//!
//! Knows nothing about files on the data disk or sockets.

use std::{
    net::ToSocketAddrs,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use identity::TlsFiles;
use layers::{HashRange, ShardGeneration, ShardId};
use pgtypes::{BranchId, ClusterId, LogId};
use serde::{Deserialize, Deserializer, de};

/// Places of the hash space, and so the largest `end`.
const HASHES: u64 = 1 << 32;

/// More safekeepers than any membership has; a longer list is a mistake.
const SAFEKEEPERS_MAX: usize = 16;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The lakebase.
    #[serde(deserialize_with = "text")]
    pub cluster: ClusterId,
    /// Its branch.
    #[serde(deserialize_with = "text")]
    pub branch: BranchId,
    /// Number of the shard.
    pub shard: u32,
    /// Number of this ownership of the shard, from 1; each new owner has a higher one.
    pub generation: u64,
    /// First place of the hash space. The shard that begins with 0 has the metadata.
    pub begin: u64,
    /// Behind the last place; 4294967296 is the end of the space.
    pub end: u64,
    /// Directory of the local layer files; relative to the configuration file. What is in it can be had again.
    pub data_dir: PathBuf,
    /// `file:///directory`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.
    pub object_storage: String,
    /// Limit of the local layer files that are in object storage, too; 0 is none.
    #[serde(default = "default_cache", deserialize_with = "size")]
    pub cache_bytes: u64,
    /// Memory for unpacked blocks of layers; a block has up to 32 KiB, and one that takes an eighth of it is not kept.
    #[serde(default = "default_block_cache", deserialize_with = "size")]
    pub block_cache_bytes: u64,
    /// Memory for indexes of layers; more than that are in memory only while they are in use.
    #[serde(default = "default_index_cache", deserialize_with = "size")]
    pub index_cache_bytes: u64,
    /// Form of the log lines; the command line sets the log up from it.
    #[serde(default)]
    pub log_format: LogFormat,
    /// Where WAL comes from.
    pub safekeepers: Vec<SafekeeperConfig>,
    /// Ports.
    pub listen: ListenConfig,
    /// Certificates.
    pub tls: TlsConfig,
    /// Taking in WAL.
    #[serde(default)]
    pub ingest: IngestConfig,
    /// How much history is kept.
    #[serde(default)]
    pub retention: RetentionConfig,
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

/// `[[safekeepers]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SafekeeperConfig {
    /// `host:port` of its append port.
    pub append: String,
}

/// `[listen]`: `host:port` each; port 0 takes a free one, which is logged.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// Page protocol.
    pub pages: String,
    /// Admin HTTP.
    pub admin: String,
    /// Prometheus metrics.
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
    /// This page server's certificate, PEM.
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

/// `[ingest]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IngestConfig {
    /// The open layer is frozen at this size in memory,
    #[serde(deserialize_with = "size")]
    pub freeze_bytes: u64,
    /// or at this age.
    #[serde(deserialize_with = "duration")]
    pub freeze_interval: Duration,
    /// Layers that object storage does not have yet, at most; ingest waits at it.
    #[serde(deserialize_with = "size")]
    pub backlog_bytes_max: u64,
    /// What `CREATE DATABASE ... STRATEGY FILE_COPY` may copy on this shard, in memory until it is written; ingest stops before
    /// one that is larger.
    #[serde(deserialize_with = "size")]
    pub copy_bytes_max: u64,
    /// Compacted layers end at about this size.
    #[serde(deserialize_with = "size")]
    pub layer_bytes_target: u64,
    /// For tests of lag only: each batch of WAL waits for a random time up to this.
    pub test_ingest_delay_ms: u64,
}

impl Default for IngestConfig {
    fn default() -> Self {
        Self {
            freeze_bytes: 64 << 20,
            freeze_interval: Duration::from_secs(60),
            backlog_bytes_max: 4 << 30,
            copy_bytes_max: 4 << 30,
            layer_bytes_target: 128 << 20,
            test_ingest_delay_ms: 0,
        }
    }
}

/// `[retention]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Bytes of WAL of which every position can be read.
    #[serde(deserialize_with = "size")]
    pub history_bytes: u64,
    /// How long a lease of a reader lasts, and how long nothing is given up after a start.
    #[serde(deserialize_with = "duration")]
    pub lease_period: Duration,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self { history_bytes: 1 << 30, lease_period: Duration::from_secs(600) }
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
        Self::parse(&source, directory.parent().unwrap_or(Path::new("/"))).map_err(error)
    }

    /// Parses and checks the text of a configuration file that lies in `directory`.
    ///
    /// # Errors
    /// What is wrong, for the person who wrote it.
    pub fn parse(source: &str, directory: &Path) -> Result<Self, String> {
        let mut config: Config = toml::from_str(source).map_err(|e| e.to_string().trim_end().to_owned())?;
        config.data_dir = directory.join(&config.data_dir);
        for path in [&mut config.tls.ca, &mut config.tls.certificate, &mut config.tls.key].into_iter().flatten() {
            *path = directory.join(&*path);
        }
        config.check()?;
        Ok(config)
    }

    /// Which log.
    pub fn log(&self) -> LogId {
        LogId { cluster: self.cluster, branch: self.branch }
    }

    /// Which shard.
    pub fn shard(&self) -> ShardId {
        ShardId(self.shard)
    }

    /// Which ownership of it.
    pub fn generation(&self) -> ShardGeneration {
        ShardGeneration(self.generation)
    }

    /// Its part of the hash space.
    pub fn range(&self) -> HashRange {
        HashRange { begin: self.begin, end: self.end }
    }

    fn check(&self) -> Result<(), String> {
        if self.generation == 0 {
            return Err("generation = 0: is the import's; owners begin with 1".to_owned());
        }
        if self.begin >= self.end || self.end > HASHES {
            return Err(format!(
                "begin = {}, end = {}: begin must be below end, and end at most {HASHES}",
                self.begin, self.end
            ));
        }
        if !(1..=SAFEKEEPERS_MAX).contains(&self.safekeepers.len()) {
            return Err(format!("safekeepers: between 1 and {SAFEKEEPERS_MAX} are needed"));
        }
        for safekeeper in &self.safekeepers {
            let (host, port) = safekeeper.append.rsplit_once(':').unwrap_or_default();
            if host.is_empty() || port.parse::<u16>().is_err() {
                return Err(format!("safekeepers.append = {:?}: not host:port", safekeeper.append));
            }
        }
        let ingest = &self.ingest;
        if ingest.freeze_bytes < 1 << 16 {
            return Err("ingest.freeze_bytes: at least \"64KiB\"".to_owned());
        }
        if ingest.backlog_bytes_max < ingest.freeze_bytes {
            return Err("ingest.backlog_bytes_max: at least ingest.freeze_bytes".to_owned());
        }
        if self.block_cache_bytes < 1 << 20 {
            return Err("block_cache_bytes: at least \"1MiB\"".to_owned());
        }
        if ingest.layer_bytes_target < 1 << 16 {
            return Err("ingest.layer_bytes_target: at least \"64KiB\"".to_owned());
        }
        if ingest.freeze_interval.is_zero() {
            return Err("ingest.freeze_interval: at least \"1s\"".to_owned());
        }
        let ports = [("pages", &self.listen.pages), ("admin", &self.listen.admin), ("metrics", &self.listen.metrics)];
        for (name, address) in ports {
            // Numbers and `localhost` resolve without asking anyone; a wrong name is better found here than by a thread.
            address
                .to_socket_addrs()
                .map_err(|e| format!("listen.{name} = {address:?}: not a local host:port: {e}"))?;
        }
        for (index, (name, address)) in ports.iter().enumerate() {
            let clash = ports[..index].iter().find(|(_, other)| other == address && !address.ends_with(":0"));
            if let Some((other, _)) = clash {
                return Err(format!("listen.{name} and listen.{other} are both {address:?}"));
            }
        }
        self.tls.files().map(|_| ())
    }
}

impl TlsConfig {
    /// The files, `None` when TLS is switched off on purpose.
    ///
    /// # Errors
    /// The section does not say clearly which of both is wanted.
    pub fn files(&self) -> Result<Option<TlsFiles>, String> {
        match (self.mode, self.i_know_this_is_insecure, &self.ca, &self.certificate, &self.key) {
            (TlsMode::Required, false, Some(ca), Some(certificate), Some(key)) => {
                Ok(Some(TlsFiles { ca: ca.clone(), certificate: certificate.clone(), key: key.clone() }))
            }
            (TlsMode::Required, true, ..) => {
                Err("tls.i_know_this_is_insecure = true makes no sense beside mode = \"required\"".to_owned())
            }
            (TlsMode::Required, ..) => Err("tls: mode = \"required\" needs ca, certificate and key".to_owned()),
            (TlsMode::Off, true, None, None, None) => Ok(None),
            (TlsMode::Off, true, ..) => {
                Err("tls: mode = \"off\" beside certificate files: remove one of both".to_owned())
            }
            (TlsMode::Off, false, ..) => Err(
                "tls: mode = \"off\" lets anyone who reaches the ports read all pages; where that is intended, add i_know_this_is_insecure = true"
                    .to_owned(),
            ),
        }
    }
}

/// 64 GiB.
fn default_cache() -> u64 {
    64 << 30
}

/// 64 MiB: read-ahead of some thousand stripes; PostgreSQL and the block map keep what is hot.
fn default_block_cache() -> u64 {
    64 << 20
}

/// 1 GiB: 100 GB of pages in image layers, with some millions of records.
fn default_index_cache() -> u64 {
    1 << 30
}

fn text<'de, T: FromStr<Err: std::fmt::Display>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|error| de::Error::custom(format!("{text:?}: {error}")))
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    parse_size(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

/// Duration of a text as `60s`; units s, min, h, d.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration: expected a number with a unit, as in \"60s\"");
    let (number, unit) = split_number(text);
    let seconds = match unit {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number = u64::from_str(number).map_err(|_| wrong())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

/// Bytes of a text as `256MiB`; units KiB, MiB, GiB, TiB, or B.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: expected a number with a unit, as in \"256MiB\"");
    let (number, unit) = split_number(text);
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(wrong()),
    };
    let number = u64::from_str(number).map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn split_number(text: &str) -> (&str, &str) {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    (number, unit.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        cluster = "00010203-0405-0607-0809-0a0b0c0dfeff"
        branch = "10010203-0405-0607-0809-0a0b0c0dfeff"
        shard = 3
        generation = 1
        begin = 0
        end = 4294967296
        data_dir = "data"
        object_storage = "file:///srv/objects"
        [[safekeepers]]
        append = "127.0.0.1:7001"
        [listen]
        pages = "127.0.0.1:7101"
        admin = "127.0.0.1:7103"
        metrics = "127.0.0.1:7104"
        [tls]
        mode = "required"
        ca = "certs/ca.pem"
        certificate = "certs/ps-1.pem"
        key = "certs/ps-1.key"
    "#;

    fn parse(source: &str) -> Result<Config, String> {
        Config::parse(source, Path::new("/etc/lakebase"))
    }

    #[test]
    fn defaults_and_paths_relative_to_the_file() {
        let config = parse(GOOD).unwrap();
        assert_eq!(Path::new("/etc/lakebase/data"), config.data_dir);
        assert_eq!(Path::new("/etc/lakebase/certs/ca.pem"), config.tls.files().unwrap().unwrap().ca);
        assert_eq!(HashRange::ALL, config.range());
        assert_eq!((64 << 20, 60), (config.ingest.freeze_bytes, config.ingest.freeze_interval.as_secs()));
        assert_eq!((1 << 30, 64 << 30), (config.retention.history_bytes, config.cache_bytes));
    }

    /// Each wrong file is refused with a message that names the key.
    #[test]
    fn wrong_files_are_refused_with_the_key_in_the_message() {
        let table = [
            ("generation = 1", "generation = 0", "generation"),
            ("begin = 0", "begin = 4294967296", "begin"),
            ("end = 4294967296", "end = 4294967297", "end"),
            ("shard = 3", "shard = 3\nsurprise = 2", "surprise"),
            ("append = \"127.0.0.1:7001\"", "append = \"127.0.0.1\"", "safekeepers.append"),
            ("[[safekeepers]]\n        append = \"127.0.0.1:7001\"", "safekeepers = []", "safekeepers"),
            ("pages = \"127.0.0.1:7101\"", "pages = \"127.0.0.1:7103\"", "listen.pages"),
            ("mode = \"required\"", "mode = \"off\"", "i_know_this_is_insecure"),
            ("ca = \"certs/ca.pem\"", "", "needs ca"),
            ("cluster =", "block_cache_bytes = \"1KiB\"\ncluster =", "block_cache_bytes"),
            ("[tls]", "[ingest]\nfreeze_bytes = \"1KiB\"\n[tls]", "freeze_bytes"),
            ("[tls]", "[ingest]\nbacklog_bytes_max = \"1MiB\"\n[tls]", "backlog_bytes_max"),
            ("[tls]", "[retention]\nhistory_bytes = \"soon\"\n[tls]", "history_bytes"),
        ];
        for (good, bad, expected) in table {
            let message = parse(&GOOD.replacen(good, bad, 1)).unwrap_err();
            assert!(message.contains(expected), "{bad}: {message}");
        }
    }
}
