//! Directories of a PGDATA, and which files outside WAL may be put into it.

/// Directories that `initdb` makes (`subdirs`, `initdb.c`), those of databases apart; parents first. PostgreSQL refuses to
/// start, or fails later, without any of them, empty or not.
pub const DIRECTORIES: [&str; 23] = [
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
    "pg_wal/archive_status",
    "pg_wal/summaries",
    "pg_xact",
];

/// The file that says which PostgreSQL a directory belongs to.
pub const VERSION_FILE: &str = "PG_VERSION";
/// Its contents in PostgreSQL 17.
pub const VERSION: &[u8] = b"17\n";
/// Where `pg_control` is.
pub const CONTROL_FILE: &str = "global/pg_control";

/// Files at the top that would change how the server starts, or that belong to a run of it.
const REFUSED: [&str; 7] = [
    "backup_label",
    "backup_label.old",
    "postmaster.opts",
    "postmaster.pid",
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
];

/// Whether a file outside WAL may have this path: a file at the top (configuration), or one of statistics. The path comes
/// from a compute, which a superuser of the database may have taken over: nothing else is believed.
pub fn is_advisory(path: &str) -> bool {
    let is_name = |name: &str| {
        !name.is_empty()
            && !name.starts_with('.')
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
    };
    match path.split_once('/') {
        None => is_name(path) && !REFUSED.contains(&path) && !DIRECTORIES.contains(&path),
        Some((directory, name)) => directory == "pg_stat" && is_name(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_configuration_and_statistics_may_be_put_beside_what_wal_says() {
        for path in ["postgresql.conf", "pg_hba.conf", "postgresql.auto.conf", "PG_VERSION", "pg_stat/pgstat.stat"] {
            assert!(is_advisory(path), "{path}");
        }
        for path in [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "pg_stat/../x",
            "pg_stat/",
            "pg_stat/a/b",
            "base/1/1259",
            "global/pg_control",
            "pg_wal/000000010000000000000001",
            "pg_xact",
            "recovery.signal",
            "backup_label",
            "a\0b",
            "a b",
        ] {
            assert!(!is_advisory(path), "{path}");
        }
    }

    #[test]
    fn parents_come_first() {
        for (index, path) in DIRECTORIES.iter().enumerate() {
            if let Some((parent, _)) = path.rsplit_once('/') {
                assert!(DIRECTORIES[..index].contains(&parent), "{path}");
            }
        }
    }
}
