//! The list of record types is PostgreSQL's, of all minor releases that tests run on.
//!
//! PostgreSQL is found as `../../wal/tests/postgres/mod.rs` says, its headers by `pg_config`.

#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;
#[path = "oracle/record_types.rs"]
mod record_types;

use std::{collections::BTreeSet, fs, path::Path};

use postgres::{Postgres, output};
use record_types::{RECORD_TYPES, type_of};

/// Where each resource manager's types are defined, and what their names begin with (`access/rmgrlist.h` has the order).
/// Generic records have no definition: there is one type.
const HEADERS: &[(u8, &str, &str)] = &[
    (0, "catalog/pg_control.h", "XLOG_"),
    (1, "access/xact.h", "XLOG_XACT_"),
    (2, "catalog/storage_xlog.h", "XLOG_SMGR_"),
    (3, "access/clog.h", "CLOG_"),
    (4, "commands/dbcommands_xlog.h", "XLOG_DBASE_"),
    (5, "commands/tablespace.h", "XLOG_TBLSPC_"),
    (6, "access/multixact.h", "XLOG_MULTIXACT_"),
    (7, "utils/relmapper.h", "XLOG_RELMAP_"),
    (8, "storage/standbydefs.h", "XLOG_"),
    (9, "access/heapam_xlog.h", "XLOG_HEAP2_"),
    (10, "access/heapam_xlog.h", "XLOG_HEAP_"),
    (11, "access/nbtxlog.h", "XLOG_BTREE_"),
    (12, "access/hash_xlog.h", "XLOG_HASH_"),
    (13, "access/ginxlog.h", "XLOG_GIN_"),
    (14, "access/gistxlog.h", "XLOG_GIST_"),
    (15, "commands/sequence.h", "XLOG_SEQ_"),
    (16, "access/spgxlog.h", "XLOG_SPGIST_"),
    (17, "access/brin_xlog.h", "XLOG_BRIN_"),
    (18, "access/commit_ts.h", "COMMIT_TS_"),
    (19, "replication/origin.h", "XLOG_REPLORIGIN_"),
    (21, "replication/message.h", "XLOG_LOGICAL_"),
];
const GENERIC: u8 = 20;
/// Resource managers of PostgreSQL 17 (`PG_RMGR`).
const RMGRS: usize = 22;
/// Definitions that are flags and masks.
const NO_TYPES: &[&str] = &["OPMASK", "INIT_PAGE", "HAS_INFO"];

/// Name and value of each `#define` of a hexadecimal number whose name begins so.
fn definitions(header: &Path, prefix: &str) -> Vec<(String, u8)> {
    let text = fs::read_to_string(header).unwrap_or_else(|error| panic!("{header:?}: {error}"));
    let definition = |line: &str| {
        let mut words = line.strip_prefix("#define")?.split_whitespace();
        let name = words.next()?.strip_prefix(prefix)?.to_owned();
        let value = words.next()?.strip_prefix("0x")?;
        Some((name, u8::from_str_radix(value, 16).ok()?))
    };
    text.lines().filter_map(definition).filter(|(name, _)| !NO_TYPES.contains(&name.as_str())).collect()
}

#[test]
fn record_types_are_those_of_the_headers() {
    let directory = output(Postgres::find().command("pg_config").arg("--includedir-server"));
    let directory = Path::new(directory.trim());
    let managers = fs::read_to_string(directory.join("access/rmgrlist.h")).expect("headers of the server");
    assert_eq!(RMGRS, managers.lines().filter(|line| line.starts_with("PG_RMGR(")).count());
    assert_eq!(RMGRS, HEADERS.len() + 1, "generic records have no header");

    let mut theirs = BTreeSet::from([(GENERIC, 0)]);
    for (rmgr, header, prefix) in HEADERS {
        let defined = definitions(&directory.join(header), prefix);
        assert!(!defined.is_empty(), "{header} defines no {prefix}");
        for (name, kind) in defined {
            let ours = type_of((*rmgr, kind)).map(|(_, _, name, _)| *name);
            assert_eq!(Some(name.as_str()), ours, "resource manager {rmgr}, {kind:#04x}");
            theirs.insert((*rmgr, kind));
        }
    }
    let ours = RECORD_TYPES.iter().filter(|(_, _, name, _)| !name.contains('+'));
    assert_eq!(theirs, ours.map(|(rmgr, kind, ..)| (*rmgr, *kind)).collect());
}
