//! Every type of record that PostgreSQL 17 defines, and what proves that this engine does the right thing with it.
//!
//! `tests/record_types.rs` compares the list with PostgreSQL's headers; the tests with servers fail when a type was not
//! seen that its proof says must be.
#![allow(dead_code, reason = "each test crate uses its own part")]

use wal::rmgr_name;

/// Where a type of records is judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proof {
    /// Its pages are compared with the images that `wal_consistency_checking` adds.
    Compared,
    /// It always carries whole pages (`REGBUF_FORCE_IMAGE`), for which there are no images to check them; later records of
    /// these pages, and the files at the end, are compared.
    Image,
    /// It is about whole relations and databases: which pages there are in the files at the end.
    Whole,
    /// It changes metadata: `metadata/tests/files_of_a_server.rs`.
    State,
    /// Recovery writes nothing because of it that this engine keeps: no block, no event.
    Nothing,
    /// The proposer refuses it; suites of PostgreSQL may have it.
    Refused,
    /// The servers of the tests do not write it, for the reason beside it.
    Never,
}

use Proof::{Compared, Image, Never, Nothing, Refused, State, Whole};

/// A type: resource manager, `xl_info` of its kind, PostgreSQL's name without its prefix, proof.
pub type RecordType = (u8, u8, &'static str, Proof);

/// Names with a plus are types with the flag for pages that are made anew.
pub const RECORD_TYPES: &[RecordType] = &[
    (0, 0x00, "CHECKPOINT_SHUTDOWN", State),
    (0, 0x10, "CHECKPOINT_ONLINE", State),
    // Only pg_waldump and recovery know it.
    (0, 0x20, "NOOP", Never),
    (0, 0x30, "NEXTOID", State),
    (0, 0x40, "SWITCH", Nothing),
    (0, 0x50, "BACKUP_END", Nothing),
    (0, 0x60, "PARAMETER_CHANGE", State),
    (0, 0x70, "RESTORE_POINT", Nothing),
    (0, 0x80, "FPW_CHANGE", State),
    // On the next timeline, after a promotion: logs of this engine have one.
    (0, 0x90, "END_OF_RECOVERY", Never),
    (0, 0xA0, "FPI_FOR_HINT", Image),
    (0, 0xB0, "FPI", Image),
    // After a crash in the middle of a record: a writer of this engine begins behind a whole one.
    (0, 0xD0, "OVERWRITE_CONTRECORD", Never),
    (0, 0xE0, "CHECKPOINT_REDO", Nothing),
    (1, 0x00, "COMMIT", State),
    (1, 0x10, "PREPARE", State),
    (1, 0x20, "ABORT", State),
    (1, 0x30, "COMMIT_PREPARED", State),
    (1, 0x40, "ABORT_PREPARED", State),
    // For snapshots of standbys, and for logical decoding.
    (1, 0x50, "ASSIGNMENT", Nothing),
    (1, 0x60, "INVALIDATIONS", Nothing),
    (2, 0x10, "CREATE", Whole),
    (2, 0x20, "TRUNCATE", Whole),
    (3, 0x00, "ZEROPAGE", State),
    (3, 0x10, "TRUNCATE", State),
    (4, 0x00, "CREATE_FILE_COPY", Whole),
    (4, 0x10, "CREATE_WAL_LOG", Whole),
    (4, 0x20, "DROP", Whole),
    (5, 0x00, "CREATE", Refused),
    (5, 0x10, "DROP", Refused),
    (6, 0x00, "ZERO_OFF_PAGE", State),
    (6, 0x10, "ZERO_MEM_PAGE", State),
    (6, 0x20, "CREATE_ID", State),
    (6, 0x30, "TRUNCATE_ID", State),
    (7, 0x00, "UPDATE", State),
    (8, 0x00, "STANDBY_LOCK", Nothing),
    (8, 0x10, "RUNNING_XACTS", Nothing),
    (8, 0x20, "INVALIDATIONS", Nothing),
    // Files of logical decoding.
    (9, 0x00, "REWRITE", Nothing),
    (9, 0x10, "PRUNE_ON_ACCESS", Compared),
    (9, 0x20, "PRUNE_VACUUM_SCAN", Compared),
    (9, 0x30, "PRUNE_VACUUM_CLEANUP", Compared),
    (9, 0x40, "VISIBLE", Compared),
    (9, 0x50, "MULTI_INSERT", Compared),
    (9, 0xD0, "MULTI_INSERT+INIT", Compared),
    (9, 0x60, "LOCK_UPDATED", Compared),
    (9, 0x70, "NEW_CID", Nothing),
    (10, 0x00, "INSERT", Compared),
    (10, 0x80, "INSERT+INIT", Compared),
    (10, 0x10, "DELETE", Compared),
    (10, 0x20, "UPDATE", Compared),
    (10, 0xA0, "UPDATE+INIT", Compared),
    // For logical decoding: the files were replaced.
    (10, 0x30, "TRUNCATE", Nothing),
    (10, 0x40, "HOT_UPDATE", Compared),
    (10, 0x50, "CONFIRM", Compared),
    (10, 0x60, "LOCK", Compared),
    (10, 0x70, "INPLACE", Compared),
    (11, 0x00, "INSERT_LEAF", Compared),
    (11, 0x10, "INSERT_UPPER", Compared),
    (11, 0x20, "INSERT_META", Compared),
    (11, 0x30, "SPLIT_L", Compared),
    (11, 0x40, "SPLIT_R", Compared),
    (11, 0x50, "INSERT_POST", Compared),
    (11, 0x60, "DEDUP", Compared),
    (11, 0x70, "DELETE", Compared),
    (11, 0x80, "UNLINK_PAGE", Compared),
    (11, 0x90, "UNLINK_PAGE_META", Compared),
    (11, 0xA0, "NEWROOT", Compared),
    (11, 0xB0, "MARK_PAGE_HALFDEAD", Compared),
    (11, 0xC0, "VACUUM", Compared),
    // Conflicts with queries of standbys.
    (11, 0xD0, "REUSE_PAGE", Nothing),
    (11, 0xE0, "META_CLEANUP", Compared),
    (12, 0x00, "INIT_META_PAGE", Compared),
    (12, 0x10, "INIT_BITMAP_PAGE", Compared),
    (12, 0x20, "INSERT", Compared),
    (12, 0x30, "ADD_OVFL_PAGE", Compared),
    (12, 0x40, "SPLIT_ALLOCATE_PAGE", Compared),
    (12, 0x50, "SPLIT_PAGE", Image),
    (12, 0x60, "SPLIT_COMPLETE", Compared),
    (12, 0x70, "MOVE_PAGE_CONTENTS", Compared),
    (12, 0x80, "SQUEEZE_PAGE", Compared),
    (12, 0x90, "DELETE", Compared),
    (12, 0xA0, "SPLIT_CLEANUP", Compared),
    (12, 0xB0, "UPDATE_META_PAGE", Compared),
    (12, 0xC0, "VACUUM_ONE_PAGE", Compared),
    (13, 0x10, "CREATE_PTREE", Compared),
    (13, 0x20, "INSERT", Compared),
    (13, 0x30, "SPLIT", Image),
    (13, 0x40, "VACUUM_PAGE", Image),
    (13, 0x50, "DELETE_PAGE", Compared),
    (13, 0x60, "UPDATE_META_PAGE", Compared),
    (13, 0x70, "INSERT_LISTPAGE", Compared),
    (13, 0x80, "DELETE_LISTPAGE", Compared),
    (13, 0x90, "VACUUM_DATA_LEAF_PAGE", Compared),
    (14, 0x00, "PAGE_UPDATE", Compared),
    (14, 0x10, "DELETE", Compared),
    // Conflicts with queries of standbys.
    (14, 0x20, "PAGE_REUSE", Nothing),
    (14, 0x30, "PAGE_SPLIT", Compared),
    (14, 0x60, "PAGE_DELETE", Compared),
    // `gistGetFakeLSN` writes it with wal_level = minimal only.
    (14, 0x70, "ASSIGN_LSN", Never),
    (15, 0x00, "LOG", Compared),
    (16, 0x10, "ADD_LEAF", Compared),
    (16, 0x20, "MOVE_LEAFS", Compared),
    (16, 0x30, "ADD_NODE", Compared),
    (16, 0x40, "SPLIT_TUPLE", Compared),
    (16, 0x50, "PICKSPLIT", Compared),
    (16, 0x60, "VACUUM_LEAF", Compared),
    (16, 0x70, "VACUUM_ROOT", Compared),
    (16, 0x80, "VACUUM_REDIRECT", Compared),
    (17, 0x00, "CREATE_INDEX", Compared),
    (17, 0x10, "INSERT", Compared),
    (17, 0x90, "INSERT+INIT", Compared),
    (17, 0x20, "UPDATE", Compared),
    (17, 0xA0, "UPDATE+INIT", Compared),
    (17, 0x30, "SAMEPAGE_UPDATE", Compared),
    (17, 0x40, "REVMAP_EXTEND", Compared),
    (17, 0x50, "DESUMMARIZE", Compared),
    (18, 0x00, "ZEROPAGE", State),
    (18, 0x10, "TRUNCATE", State),
    (19, 0x00, "SET", State),
    (19, 0x10, "DROP", State),
    (20, 0x00, "GENERIC", Compared),
    // For logical decoding.
    (21, 0x00, "MESSAGE", Nothing),
];

const XACT: u8 = 1;

/// Resource manager and type of a record, by its `xl_info`.
pub fn kind_of(rmgr: u8, info: u8) -> (u8, u8) {
    // The highest bit of transactions says that there is more, which is no type of its own.
    (rmgr, info & if rmgr == XACT { 0x70 } else { 0xF0 })
}

/// The type, if PostgreSQL 17 defines it.
pub fn type_of((rmgr, kind): (u8, u8)) -> Option<&'static RecordType> {
    RECORD_TYPES.iter().find(|(of, info, ..)| (*of, *info) == (rmgr, kind))
}

/// For people.
pub fn name_of(kind: (u8, u8)) -> String {
    let rmgr = rmgr_name(kind.0).unwrap_or("custom");
    type_of(kind).map_or_else(|| format!("{rmgr} {:#04x}", kind.1), |(_, _, name, _)| format!("{rmgr} {name}"))
}

/// Types with one of these proofs that are not among those counted.
pub fn missing<'a>(proofs: &[Proof], is_counted: impl Fn(&(u8, u8)) -> bool + 'a) -> Vec<String> {
    let wanted =
        RECORD_TYPES.iter().filter(|(.., proof)| proofs.contains(proof)).map(|(rmgr, kind, ..)| (*rmgr, *kind));
    wanted.filter(|kind| !is_counted(kind)).map(name_of).collect()
}
