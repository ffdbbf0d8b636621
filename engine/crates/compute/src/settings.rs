//! The settings that PostgreSQL is started with: the user's, and those that the engine depends on.
//!
//! Pure. Settings on the command line outrank every file, `ALTER SYSTEM` included (`PGC_S_ARGV`, guc.h), so a
//! superuser cannot undo them.

use std::collections::BTreeMap;

use pgtypes::LogId;

/// Settings with one value only, each with the reason that a user reads when he sets it.
const FIXED: &[(&str, &str, &str)] = &[
    ("fsync", "on", "it is what asks the engine to make WAL durable"),
    ("full_page_writes", "off", "torn pages cannot matter: PGDATA is never started again after an unclean end"),
    ("wal_sync_method", "fdatasync", "it is the call that waits for the quorum"),
    ("restart_after_crash", "off", "after a crash the agent elects again and recovers from the safekeepers"),
    ("wal_init_zero", "off", "segments need no zeros: the local disk is not the store"),
    ("archive_mode", "off", "safekeepers keep the WAL"),
    ("recovery_prefetch", "try", "the replay announces blocks through it"),
    ("hot_standby", "on", "it is set by the agent for each start"),
    ("recovery_target_action", "promote", "recovery belongs to the agent"),
];

/// Settings that the agent fills in itself.
const OWNED: &[&str] = &[
    "archive_cleanup_command",
    "archive_command",
    "archive_library",
    "config_file",
    "data_directory",
    "external_pid_file",
    "hba_file",
    "listen_addresses",
    "port",
    "primary_conninfo",
    "primary_slot_name",
    "recovery_end_command",
    "recovery_target",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restore_command",
    "unix_socket_directories",
    "wal_segment_size",
];

/// Settings that the user may choose, with our default.
const DEFAULTS: &[(&str, &str)] = &[
    ("wal_level", "replica"),
    // One round trip stalls all inserters when the buffers are full: 64 MB last for 60 ms at 1 GB/s.
    ("wal_buffers", "64MB"),
    ("checkpoint_timeout", "5min"),
    ("max_wal_size", "4GB"),
    ("maintenance_io_concurrency", "256"),
    ("max_wal_senders", "10"),
    ("synchronous_standby_names", ""),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("data_sync_retry", "off"),
    // Here, because a file of PGDATA or `ALTER SYSTEM` could switch it on otherwise; see `check_parameter`.
    ("debug_io_direct", ""),
];

/// Refuses a setting of the user's that the engine depends on.
///
/// # Errors
/// Name and reason.
pub fn check_parameter(name: &str, value: &str) -> Result<(), String> {
    let valid = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'$'));
    if !valid {
        return Err(format!("{name:?} is not the name of a setting"));
    }
    if value.contains('\0') {
        return Err(format!("{name}: the value contains a zero byte"));
    }
    let lower = name.to_ascii_lowercase();
    if let Some((name, fixed, reason)) = FIXED.iter().find(|(name, ..)| *name == lower) {
        return Err(format!("{name} is fixed to {fixed}: {reason}"));
    }
    if OWNED.contains(&lower.as_str()) {
        return Err(format!("{lower} is set by the agent"));
    }
    match lower.as_str() {
        "wal_level" if value.eq_ignore_ascii_case("minimal") => {
            Err("wal_level: must be at least replica, else the log cannot be replayed".into())
        }
        // Waits forever: the agent's PostgreSQL has no synchronous standbys, the quorum is below it.
        "synchronous_standby_names" if !value.is_empty() => {
            Err("synchronous_standby_names: must be empty, the safekeepers are the synchronous copies".into())
        }
        "debug_io_direct" if !value.is_empty() => {
            Err("debug_io_direct: must be empty, the agent reads WAL from the page cache".into())
        }
        _ => Ok(()),
    }
}

/// Targets of a recovery beside the one that the agent uses.
const OTHER_TARGETS: [&str; 4] =
    ["recovery_target", "recovery_target_name", "recovery_target_time", "recovery_target_xid"];

/// What differs between starts.
#[derive(Clone, Debug)]
pub struct Start<'a> {
    /// `listen_addresses`.
    pub listen_addresses: &'a str,
    /// `port`.
    pub port: u16,
    /// `unix_socket_directories`.
    pub socket_dir: &'a str,
    /// `dynamic_shared_memory_type`, unless the user chose one.
    pub dynamic_shared_memory_type: &'a str,
    /// Changes of hint bits must be in WAL, and no checksums see to it.
    pub hints_need_wal: bool,
    /// Set when the start replays WAL from the safekeepers.
    pub replay: Option<Replay<'a>>,
}

/// Settings of a replay.
#[derive(Clone, Debug)]
pub struct Replay<'a> {
    /// libpq connection string to the safekeepers.
    pub primary_conninfo: &'a str,
    /// Start of the last record to replay, `HIGH/LOW`.
    pub last_record: &'a str,
}

/// Arguments `-c name=value` for `postgres`, in an order where the last of a name is the one that counts.
pub fn arguments(user: &BTreeMap<String, String>, start: &Start<'_>) -> Vec<String> {
    let mut settings: BTreeMap<String, String> =
        DEFAULTS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let dynamic = start.dynamic_shared_memory_type;
    settings.insert("dynamic_shared_memory_type".to_owned(), dynamic.to_owned());
    settings.extend(user.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone())));
    settings.extend(
        FIXED
            .iter()
            .filter(|(name, ..)| *name != "recovery_target_action")
            .map(|(name, value, _)| ((*name).to_owned(), (*value).to_owned())),
    );
    let mut set = |name: &str, value: &str| settings.insert(name.to_owned(), value.to_owned());
    set("listen_addresses", start.listen_addresses);
    set("port", &start.port.to_string());
    set("unix_socket_directories", start.socket_dir);
    if start.hints_need_wal {
        // VACUUM's PD_ALL_VISIBLE would not move the page's LSN (`visibilitymap_set`), and redo could not know of it.
        set("wal_log_hints", "on");
    }
    set("primary_slot_name", "");
    set("restore_command", "");
    // Left over in the base backup's files they would stop a replay that nobody asked for.
    for name in OTHER_TARGETS {
        set(name, "");
    }
    set("primary_conninfo", start.replay.as_ref().map_or("", |replay| replay.primary_conninfo));
    if start.replay.is_some() {
        set("recovery_target_inclusive", "on");
        set("recovery_target_action", "promote");
        set("recovery_target_timeline", "latest");
        // The default of 5 s is the time that a replay would wait after one refused connection.
        set("wal_retrieve_retry_interval", "100ms");
        // A frozen safekeeper is left for the next one after this, not after the default of 60 s.
        set("wal_receiver_timeout", "3s");
        set("wal_receiver_status_interval", "1s");
        set("recovery_min_apply_delay", "0");
        // Nobody reads from a writer that is still replaying; off, a setting lowered since the WAL was written
        // (max_connections and the like, CheckRequiredParameterValues) does not stop the replay.
        set("hot_standby", "off");
    }
    // Last: to empty another target behind it would unset it, or fail (`assign_recovery_target_lsn`, xlogrecovery.c).
    let target = format!("recovery_target_lsn={}", start.replay.as_ref().map_or("", |replay| replay.last_record));
    let settings = settings.into_iter().map(|(name, value)| format!("{name}={value}")).chain([target]);
    settings.flat_map(|setting| ["-c".to_owned(), setting]).collect()
}

/// One parameter of a libpq connection string, quoted (libpq: single quotes, backslash escapes).
fn conninfo_parameter(name: &str, value: &str) -> String {
    let mut text = format!("{name}='");
    for c in value.chars() {
        if matches!(c, '\'' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    text.push('\'');
    text
}

/// Certificates for the WAL receiver, readable by PostgreSQL's user.
#[derive(Clone, Debug)]
pub struct ConninfoTls<'a> {
    /// `sslrootcert`.
    pub ca: &'a str,
    /// `sslcert`.
    pub certificate: &'a str,
    /// `sslkey`.
    pub key: &'a str,
}

/// Connection string of the WAL receiver to `hosts` (host, port), tried in this order.
pub fn primary_conninfo(
    hosts: &[(&str, u16)],
    log: LogId,
    application_name: &str,
    tls: Option<ConninfoTls<'_>>,
) -> String {
    let join = |items: Vec<String>| items.join(",");
    let mut parameters = vec![
        conninfo_parameter("host", &join(hosts.iter().map(|(host, _)| (*host).to_owned()).collect())),
        conninfo_parameter("port", &join(hosts.iter().map(|(_, port)| port.to_string()).collect())),
        conninfo_parameter("user", "lakebase"),
        // A safekeeper holds many logs.
        conninfo_parameter("options", &format!("-c lakebase.log={log}")),
        conninfo_parameter("application_name", application_name),
        // libpq's smallest: below 2 s it waits 2 s (PQconnectPoll).
        conninfo_parameter("connect_timeout", "2"),
        conninfo_parameter("gssencmode", "disable"),
    ];
    match tls {
        None => parameters.push(conninfo_parameter("sslmode", "disable")),
        Some(tls) => parameters.extend([
            conninfo_parameter("sslmode", "verify-full"),
            conninfo_parameter("sslrootcert", tls.ca),
            conninfo_parameter("sslcert", tls.certificate),
            conninfo_parameter("sslkey", tls.key),
        ]),
    }
    parameters.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Start<'static> {
        Start {
            listen_addresses: "",
            port: 5432,
            socket_dir: "/run/x",
            dynamic_shared_memory_type: "mmap",
            hints_need_wal: false,
            replay: None,
        }
    }

    /// A user's wish never outranks what durability depends on, however it is spelled.
    #[test]
    fn fixed_settings_win_over_the_users() {
        for (name, ..) in FIXED {
            assert!(check_parameter(&name.to_uppercase(), "x").is_err(), "{name}");
        }
        let user = BTreeMap::from([("FSYNC".to_owned(), "off".to_owned()), ("work_mem".to_owned(), "64MB".to_owned())]);
        let arguments = arguments(&user, &start());
        assert!(arguments.contains(&"fsync=on".to_owned()));
        assert!(!arguments.contains(&"fsync=off".to_owned()));
        assert!(arguments.contains(&"work_mem=64MB".to_owned()));
    }

    /// What `check_parameter` refuses must not come from a file of PGDATA either: the command line outranks files.
    #[test]
    fn settings_that_must_be_empty_are_named_on_the_command_line() {
        let arguments = arguments(&BTreeMap::new(), &start());
        for name in ["synchronous_standby_names", "debug_io_direct"] {
            assert!(check_parameter(name, "x").is_err());
            assert!(arguments.contains(&format!("{name}=")), "{name}");
        }
    }

    #[test]
    fn replay_settings_appear_only_in_a_replay() {
        let plain = arguments(&BTreeMap::new(), &start());
        assert!(plain.contains(&"recovery_target_lsn=".to_owned()));
        assert!(plain.contains(&"hot_standby=on".to_owned()));
        let replay = Some(Replay { primary_conninfo: "host='a'", last_record: "0/1000" });
        let replay = arguments(&BTreeMap::new(), &Start { replay, ..start() });
        assert_eq!(Some(&"recovery_target_lsn=0/1000".to_owned()), replay.last());
        assert!(replay.contains(&"recovery_target_action=promote".to_owned()));
        assert!(replay.contains(&"hot_standby=off".to_owned()));
    }

    /// Without it index-only scans would return deleted rows after an eviction.
    #[test]
    fn hints_are_logged_where_the_page_service_needs_it() {
        let user = BTreeMap::from([("wal_log_hints".to_owned(), "off".to_owned())]);
        let arguments = arguments(&user, &Start { hints_need_wal: true, ..start() });
        assert!(arguments.contains(&"wal_log_hints=on".to_owned()));
        assert!(!arguments.contains(&"wal_log_hints=off".to_owned()));
    }

    #[test]
    fn conninfo_names_all_hosts_and_quotes_values() {
        let tls = ConninfoTls { ca: "/it's", certificate: "/c", key: "/k" };
        let text = primary_conninfo(&[("a", 1), ("::1", 2)], LogId::default(), "w", Some(tls));
        assert!(text.contains("host='a,::1' port='1,2'"), "{text}");
        assert!(text.contains(r"sslrootcert='/it\'s'"), "{text}");
        assert!(primary_conninfo(&[("a", 1)], LogId::default(), "w", None).contains("sslmode='disable'"));
    }
}
