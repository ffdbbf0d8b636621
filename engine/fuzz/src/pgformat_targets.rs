//! `pg_control` and history files.

use pgformat::{CONTROL_DATA_BYTES, ControlFile, HistoryFile};
use pgtypes::{Lsn, PgTimeline};

/// First byte: whether the checksum is made to match, which chance never does. The rest is the file.
///
/// Rule: what can be read is written in a form that is read alike.
pub fn fuzz_pg_control(data: &[u8]) {
    let Some((mode, file)) = data.split_first() else { return };
    let mut file = file.to_vec();
    if mode & 1 != 0 && file.len() >= CONTROL_DATA_BYTES {
        let crc = wal::crc32c(0, &file[..288]);
        file[288..292].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(control) = ControlFile::parse(&file) {
        let written = control.to_bytes();
        assert_eq!(Ok(control), ControlFile::parse(&written));
    }
}

/// First four bytes: the file's own timeline. The rest is the file.
///
/// Rule: what can be read rises, and is written in a form that is read alike.
pub fn fuzz_history_file(data: &[u8]) {
    let Some((timeline, file)) = data.split_first_chunk() else { return };
    let timeline = PgTimeline(u32::from_le_bytes(*timeline));
    let Ok(history) = HistoryFile::parse(timeline, file) else { return };
    assert!(history.entries.is_sorted_by(|before, after| before.timeline < after.timeline));
    assert!(history.entries.last().is_none_or(|last| last.timeline < timeline));
    assert_eq!(Ok(&history), HistoryFile::parse(timeline, &history.to_bytes()).as_ref());
    for lsn in [Lsn(0), Lsn(u64::MAX)] {
        let ancestor = history.ancestor_at(lsn);
        assert!(ancestor.is_none_or(|ancestor| ancestor < timeline));
    }
}
