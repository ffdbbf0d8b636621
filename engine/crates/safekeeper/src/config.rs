//! `safekeeper.toml`: what a safekeeper is told. Parsed and checked at the edge; everything behind it trusts the values.
//!
//! Knows nothing about files on the data disk or sockets.

use std::{
    net::ToSocketAddrs,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use identity::TlsFiles;
use pgtypes::MemberId;
use serde::{Deserialize, Deserializer, de};

/// More cores than any machine has; a larger number is a typing error.
const CORES_MAX: u16 = 1024;

/// 1,024 spare segments are 16 GiB: more than any process needs, small enough to notice a typing error.
const SPARE_SEGMENTS_MAX: u16 = 1024;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Number of this safekeeper in the membership configuration.
    #[serde(deserialize_with = "member")]
    pub member: MemberId,
    /// Directory of the data disk; relative to the configuration file.
    pub data_dir: PathBuf,
    /// Threads that serve logs.
    #[serde(default = "default_cores")]
    pub cores: u16,
    /// Form of the log lines; the command line sets the log up from it.
    #[serde(default)]
    pub log_format: LogFormat,
    /// Ports.
    pub listen: ListenConfig,
    /// Certificates.
    pub tls: TlsConfig,
    /// Use of the data disk.
    #[serde(default)]
    pub disk: DiskConfig,
    /// Fetching of missing WAL.
    #[serde(default)]
    pub catch_up: CatchUpConfig,
    /// Stock followers.
    #[serde(default)]
    pub replication: ReplicationConfig,
    /// Committed WAL in an object store; without the section it is kept nowhere else.
    #[serde(default)]
    pub archive: Option<ArchiveConfig>,
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

/// `[listen]`: `host:port` each; port 0 takes a free one, which is logged.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// Append protocol: proposers, peers, readers.
    pub append: String,
    /// PostgreSQL's replication protocol.
    pub replication: String,
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
    /// This safekeeper's certificate, PEM.
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

/// `[disk]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskConfig {
    /// Free space that segments never take: below it appends that need a new segment are refused.
    #[serde(deserialize_with = "size")]
    pub headroom: u64,
    /// Pre-zeroed segments held ready, for all logs together.
    pub spare_segments: u16,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self { headroom: 256 << 20, spare_segments: 2 }
    }
}

/// `[catch_up]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CatchUpConfig {
    /// Bytes per second that this safekeeper fetches from its peers, for all logs together.
    #[serde(deserialize_with = "size")]
    pub rate: u64,
}

impl Default for CatchUpConfig {
    fn default() -> Self {
        Self { rate: 64 << 20 }
    }
}

/// `[replication]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicationConfig {
    /// File of lines `user:SCRAM-SHA-256$...` for followers without a certificate.
    pub users_file: Option<PathBuf>,
    /// A slot expires when it is so far behind.
    #[serde(deserialize_with = "size")]
    pub slot_lag_max: u64,
    /// A slot expires when nobody has used it for so long.
    #[serde(deserialize_with = "duration")]
    pub slot_silence_max: Duration,
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self { users_file: None, slot_lag_max: 64 << 30, slot_silence_max: Duration::from_secs(24 * 3600) }
    }
}

/// `[archive]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArchiveConfig {
    /// Where: `s3://bucket/prefix` and the like (`docs/formats/object-store.md`). Credentials come from the environment.
    pub object_storage: String,
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
        let paths =
            [&mut config.tls.ca, &mut config.tls.certificate, &mut config.tls.key, &mut config.replication.users_file];
        for path in paths.into_iter().flatten() {
            *path = directory.join(&*path);
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=CORES_MAX).contains(&self.cores) {
            return Err(format!("cores = {}: must be 1 to {CORES_MAX}", self.cores));
        }
        if self.disk.spare_segments > SPARE_SEGMENTS_MAX {
            return Err(format!("disk.spare_segments = {}: at most {SPARE_SEGMENTS_MAX}", self.disk.spare_segments));
        }
        if self.catch_up.rate < 1 << 20 {
            return Err("catch_up.rate: at least \"1MiB\" (one message)".to_owned());
        }
        let ports = [
            ("append", &self.listen.append),
            ("replication", &self.listen.replication),
            ("admin", &self.listen.admin),
            ("metrics", &self.listen.metrics),
        ];
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
            (TlsMode::Off, true, ..) => Err("tls: mode = \"off\" beside certificate files: remove one of both".to_owned()),
            (TlsMode::Off, false, ..) => Err(
                "tls: mode = \"off\" lets anyone who reaches the ports rewrite history; where that is intended, add i_know_this_is_insecure = true"
                    .to_owned(),
            ),
        }
    }
}

fn default_cores() -> u16 {
    1
}

fn member<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MemberId, D::Error> {
    match u32::deserialize(deserializer)? {
        0 => Err(de::Error::custom("member numbers start at 1")),
        number => Ok(MemberId(number)),
    }
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    parse_size(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

/// Duration of a text as `24h`; units s, min, h, d.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration: expected a number with a unit, as in \"24h\"");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let seconds = match unit.trim_start() {
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
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start() {
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

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        member = 1
        data_dir = "data"
        [listen]
        append = "127.0.0.1:7001"
        replication = "127.0.0.1:7002"
        admin = "127.0.0.1:7003"
        metrics = "127.0.0.1:7004"
        [tls]
        mode = "required"
        ca = "certs/ca.pem"
        certificate = "certs/sk-1.pem"
        key = "certs/sk-1.key"
    "#;

    fn parse(source: &str) -> Result<Config, String> {
        Config::parse(source, Path::new("/etc/lakebase"))
    }

    #[test]
    fn defaults_and_paths_relative_to_the_file() {
        let config = parse(GOOD).unwrap();
        assert_eq!(Path::new("/etc/lakebase/data"), config.data_dir);
        assert_eq!(Path::new("/etc/lakebase/certs/ca.pem"), config.tls.files().unwrap().unwrap().ca);
        assert_eq!((1, 256 << 20, 2), (config.cores, config.disk.headroom, config.disk.spare_segments));
        assert_eq!(64 << 20, config.catch_up.rate);
    }

    /// Each wrong file is refused with a message that names the key.
    #[test]
    fn wrong_files_are_refused_with_the_key_in_the_message() {
        let table = [
            ("member = 1", "member = 0", "member numbers start at 1"),
            ("member = 1", "member = 1\nsurprise = 2", "surprise"),
            ("member = 1", "", "member"),
            ("member = 1", "member = 1\ncores = 0", "cores"),
            ("append = \"127.0.0.1:7001\"", "append = \"127.0.0.1\"", "listen.append"),
            ("append = \"127.0.0.1:7001\"", "append = \"127.0.0.1:7002\"", "listen.append"),
            ("mode = \"required\"", "mode = \"optional\"", "mode"),
            ("mode = \"required\"", "mode = \"off\"", "i_know_this_is_insecure"),
            ("mode = \"required\"", "mode = \"required\"\ni_know_this_is_insecure = true", "i_know_this_is_insecure"),
            ("ca = \"certs/ca.pem\"", "", "needs ca"),
            ("[tls]", "[disk]\nheadroom = \"256 apples\"\n[tls]", "headroom"),
            ("[tls]", "[disk]\nspare_segments = 1025\n[tls]", "spare_segments"),
            ("[tls]", "[catch_up]\nrate = \"1KiB\"\n[tls]", "catch_up.rate"),
            ("[tls]", "[replication]\nslot_silence_max = \"soon\"\n[tls]", "slot_silence_max"),
            ("[tls]", "[archive]\n[tls]", "object_storage"),
        ];
        for (good, bad, expected) in table {
            let message = parse(&GOOD.replacen(good, bad, 1)).unwrap_err();
            assert!(message.contains(expected), "{bad}: {message}");
        }
    }

    #[test]
    fn tls_off_needs_both_words() {
        let (start, _) = GOOD.split_once("mode =").unwrap();
        let config = parse(&format!("{start}mode = \"off\"\ni_know_this_is_insecure = true")).unwrap();
        assert_eq!(None, config.tls.files().unwrap());
    }

    #[test]
    fn durations() {
        for (text, expected) in [("0s", 0), ("90s", 90), ("2 min", 120), ("24h", 86_400), ("7d", 604_800)] {
            assert_eq!(Ok(Duration::from_secs(expected)), parse_duration(text));
        }
        for text in ["", "h", "1", "-1s", "1.5h", "1w", "99999999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, expected) in [("0B", 0), ("4KiB", 4096), ("256 MiB", 256 << 20), ("2TiB", 2 << 40)] {
            assert_eq!(Ok(expected), parse_size(text));
        }
        for text in ["", "MiB", "1", "1MB", "-1MiB", "1.5GiB", "99999999999TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
