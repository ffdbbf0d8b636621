//! Which file a path means to PostgreSQL. Pure; knows nothing about descriptors.

use vfs_abi::blocks::FileKey;

/// What a path that PostgreSQL opens stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// Not in PGDATA, or not certainly.
    Outside,
    /// In PGDATA, but neither a WAL segment nor a tracked relation file.
    Inside,
    /// A file of a relation that the block map tracks.
    Relation(FileKey),
    /// A WAL segment; `high` and `low` are the two parts of its number as in its name.
    WalSegment {
        /// PostgreSQL timeline.
        timeline: u32,
        /// Upper 32 bits of the log position.
        high: u32,
        /// Number of the segment within 4 GiB.
        low: u32,
    },
}

/// Classifies `path` for a server whose PGDATA is `pgdata` (absolute, without a trailing slash).
///
/// Relative paths are taken relative to PGDATA: the postmaster changes into it (`ChangeToDataDir`) before it opens
/// anything that matters here. A WAL segment is `pg_wal/` and exactly 24 upper-case hexadecimal digits
/// (`XLogFileName`, `IsXLogFileName`): `xlogtemp.<pid>`, `.partial` and history files are none, so that zero-filling
/// (`XLogFileInitInternal`) and copying at promotion (`XLogFileCopy`) publish nothing until the file has its name.
pub fn classify(path: &[u8], pgdata: &[u8]) -> PathKind {
    let mut rest = match path.first() {
        None => return PathKind::Outside,
        Some(b'/') => match path.strip_prefix(pgdata).and_then(|rest| rest.strip_prefix(b"/")) {
            Some(rest) => rest,
            None if path == pgdata => return PathKind::Inside,
            None => return PathKind::Outside,
        },
        Some(_) => path,
    };
    while let Some(after) = rest.strip_prefix(b"./").or_else(|| rest.strip_prefix(b"/")) {
        rest = after;
    }
    // A path that climbs may leave PGDATA; PostgreSQL itself never opens one.
    if rest.split(|byte| *byte == b'/').any(|part| part == b"..") {
        return PathKind::Outside;
    }
    if let Some((timeline, high, low)) = rest.strip_prefix(b"pg_wal/").and_then(segment_name) {
        return PathKind::WalSegment { timeline, high, low };
    }
    relation_file(rest).map_or(PathKind::Inside, PathKind::Relation)
}

/// `pg_default` and `pg_global` (`DEFAULTTABLESPACE_OID`, `GLOBALTABLESPACE_OID`, pg_tablespace.dat).
const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;

/// Parses `base/DATABASE/RELATION[_FORK][.SEGMENT]` and `global/RELATION[_FORK][.SEGMENT]` (`GetRelationPath`, relpath.c).
///
/// Left out, and so local files: the free-space map (rule V8), temporary relations (`tBACKEND_RELATION`), and everything
/// in a tablespace within PGDATA.
fn relation_file(path: &[u8]) -> Option<FileKey> {
    let (tablespace, database, name) = if let Some(name) = path.strip_prefix(b"global/") {
        (GLOBAL_TABLESPACE, 0, name)
    } else {
        let rest = path.strip_prefix(b"base/")?;
        let slash = rest.iter().position(|byte| *byte == b'/')?;
        (DEFAULT_TABLESPACE, decimal(&rest[..slash])?, &rest[slash + 1..])
    };
    let (name, segment) = match name.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&name[..dot], decimal(&name[dot + 1..])?),
        None => (name, 0),
    };
    let (relation, fork) = match name.iter().position(|byte| *byte == b'_') {
        Some(bar) => (&name[..bar], fork_number(&name[bar + 1..])?),
        None => (name, 0),
    };
    Some(FileKey { tablespace, database, relation: decimal(relation)?, fork, segment })
}

/// `ForkNumber` (relpath.h) of the forks that are tracked.
fn fork_number(name: &[u8]) -> Option<u32> {
    match name {
        b"vm" => Some(2),
        b"init" => Some(3),
        _ => None,
    }
}

/// A number as PostgreSQL prints an `Oid`: without leading zeros, which would be another file.
fn decimal(digits: &[u8]) -> Option<u32> {
    if digits.first() == Some(&b'0') && digits.len() > 1 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// Parses `TTTTTTTTHHHHHHHHLLLLLLLL`.
fn segment_name(name: &[u8]) -> Option<(u32, u32, u32)> {
    if name.len() != 24 {
        return None;
    }
    Some((hexadecimal(&name[..8])?, hexadecimal(&name[8..16])?, hexadecimal(&name[16..])?))
}

fn hexadecimal(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0u32, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'A'..=b'F' => digit - b'A' + 10,
            _ => return None,
        };
        Some(value << 4 | u32::from(digit))
    })
}

/// First log position of a segment of `segment_bytes` (a power of two); `None` if no such segment can exist.
pub fn segment_start(high: u32, low: u32, segment_bytes: u64) -> Option<u64> {
    (u64::from(low) < (1 << 32) / segment_bytes).then(|| (u64::from(high) << 32) + u64::from(low) * segment_bytes)
}

/// Whether `path` is a tablespace link, which is refused: its files would lie outside PGDATA.
pub fn is_tablespace_link(path: &[u8], pgdata: &[u8]) -> bool {
    let relative = match path.strip_prefix(pgdata) {
        Some(rest) => rest.strip_prefix(b"/").unwrap_or(path),
        None => path,
    };
    relative.strip_prefix(b"./").unwrap_or(relative).starts_with(b"pg_tblspc/")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PGDATA: &[u8] = b"/data/main";

    #[test]
    fn paths_are_classified() {
        let key = |database, relation, fork, segment| FileKey { tablespace: 1663, database, relation, fork, segment };
        let relation = |database, number, fork, segment| PathKind::Relation(key(database, number, fork, segment));
        let segment = |timeline, high, low| PathKind::WalSegment { timeline, high, low };
        let table: &[(&str, PathKind)] = &[
            ("pg_wal/000000010000000A000000FF", segment(1, 10, 255)),
            ("./pg_wal/000000010000000A000000FF", segment(1, 10, 255)),
            ("/data/main/pg_wal/0000000200000000000000AB", segment(2, 0, 0xAB)),
            ("/data/main//pg_wal/0000000200000000000000AB", segment(2, 0, 0xAB)),
            ("/data/main2/pg_wal/0000000200000000000000AB", PathKind::Outside),
            ("/data/main", PathKind::Inside),
            ("/data/main/base/1/2", relation(1, 2, 0, 0)),
            ("base/5/1259", relation(5, 1259, 0, 0)),
            ("./base/5/1259.3", relation(5, 1259, 0, 3)),
            ("base/5/1259_vm", relation(5, 1259, 2, 0)),
            ("base/5/1259_vm.1", relation(5, 1259, 2, 1)),
            ("base/5/1259_init", relation(5, 1259, 3, 0)),
            ("global/1262", PathKind::Relation(FileKey { tablespace: 1664, ..key(0, 1262, 0, 0) })),
            ("base/5/1259_fsm", PathKind::Inside),
            ("base/5/t3_16390", PathKind::Inside),
            ("base/5/t3_16390_vm", PathKind::Inside),
            ("base/5/01259", PathKind::Inside),
            ("base/5/1259.", PathKind::Inside),
            ("base/5/4294967296", PathKind::Inside),
            ("base/5/PG_VERSION", PathKind::Inside),
            ("base/5/pg_internal.init", PathKind::Inside),
            ("base/pgsql_tmp/pgsql_tmp1.0", PathKind::Inside),
            ("base/5/1259/1", PathKind::Inside),
            ("base/5", PathKind::Inside),
            ("global/pg_control", PathKind::Inside),
            ("pg_tblspc/16390/PG_17_202406281/5/16391", PathKind::Inside),
            ("pg_wal/xlogtemp.4711", PathKind::Inside),
            ("pg_wal/00000002.history", PathKind::Inside),
            ("pg_wal/000000010000000A000000FF.partial", PathKind::Inside),
            ("pg_wal/archive_status/000000010000000A000000FF", PathKind::Inside),
            ("pg_wal/000000010000000a000000ff", PathKind::Inside),
            ("pg_wal", PathKind::Inside),
            (".", PathKind::Inside),
            ("../other/file", PathKind::Outside),
            ("/data/main/../other", PathKind::Outside),
            ("/etc/passwd", PathKind::Outside),
            ("", PathKind::Outside),
        ];
        for (path, expected) in table {
            assert_eq!(*expected, classify(path.as_bytes(), PGDATA), "{path}");
        }
    }

    #[test]
    fn segment_numbers_become_positions() {
        let mib = 1 << 20;
        assert_eq!(Some(0x1_0000_0000 + 16 * mib), segment_start(1, 1, 16 * mib));
        assert_eq!(Some(0xFF00_0000), segment_start(0, 255, 16 * mib));
        assert_eq!(None, segment_start(0, 256, 16 * mib));
        assert_eq!(Some(3 << 30), segment_start(0, 3, 1 << 30));
        assert_eq!(None, segment_start(0, 4, 1 << 30));
    }

    /// In-place tablespaces are directories and need no link; a link is what `CREATE TABLESPACE ... LOCATION` makes.
    #[test]
    fn tablespace_links_are_found() {
        for (path, expected) in [
            ("pg_tblspc/16384", true),
            ("./pg_tblspc/16384", true),
            ("/data/main/pg_tblspc/16384", true),
            ("/elsewhere/pg_tblspc/16384", false),
            ("pg_wal", false),
        ] {
            assert_eq!(expected, is_tablespace_link(path.as_bytes(), PGDATA), "{path}");
        }
    }
}
