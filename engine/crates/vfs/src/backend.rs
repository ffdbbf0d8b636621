//! What the relation half asks PostgreSQL itself, through symbols that the server exports to extensions.
#![allow(unsafe_code)]

use core::{
    ffi::{CStr, c_int, c_void},
    mem::transmute,
    sync::atomic::{AtomicI32, AtomicU32, Ordering::Relaxed},
};

/// Bytes of a WAL page (`XLOG_BLCKSZ`).
const WAL_PAGE_BYTES: u64 = 8192;
/// Bytes of the longest header of a WAL page (`SizeOfXLogLongPHD`).
const WAL_HEADER_BYTES_MAX: u64 = 40;

/// `BackendType` (miscadmin.h) of those who may see an I/O error: ordinary backends, autovacuum, background workers,
/// WAL senders, single-user mode (1 to 7). To the startup process an error is the end of recovery, to the checkpointer a
/// failed checkpoint.
const ORDINARY: core::ops::RangeInclusive<i32> = 1..=7;

/// Variables and functions of the server.
pub struct Backend {
    backend_type: &'static AtomicI32,
    critical_sections: &'static AtomicU32,
    die_pending: &'static AtomicI32,
    recovery_in_progress: unsafe extern "C" fn() -> bool,
    insert_position: unsafe extern "C" fn() -> u64,
    replay_position: unsafe extern "C" fn(*mut c_void) -> u64,
}

impl Backend {
    /// Looks the symbols up.
    ///
    /// # Errors
    /// What `symbol` says of one that is missing.
    pub fn find<E>(symbol: impl Fn(&'static CStr) -> Result<*mut c_void, E>) -> Result<Backend, E> {
        let backend_type = symbol(c"MyBackendType")?;
        let critical_sections = symbol(c"CritSectionCount")?;
        let die_pending = symbol(c"ProcDiePending")?;
        let recovery_in_progress = symbol(c"RecoveryInProgress")?;
        let insert_position = symbol(c"GetXLogInsertRecPtr")?;
        let replay_position = symbol(c"GetCurrentReplayRecPtr")?;
        // SAFETY: symbols of the main program, which is never unloaded, with these types in every release of 17
        // (miscadmin.h: an enum, `volatile uint32`, `volatile sig_atomic_t`; xlog.h, xlogrecovery.h: the functions).
        unsafe {
            Ok(Backend {
                backend_type: AtomicI32::from_ptr(backend_type.cast()),
                critical_sections: AtomicU32::from_ptr(critical_sections.cast()),
                die_pending: AtomicI32::from_ptr(die_pending.cast()),
                recovery_in_progress: transmute::<*mut c_void, unsafe extern "C" fn() -> bool>(recovery_in_progress),
                insert_position: transmute::<*mut c_void, unsafe extern "C" fn() -> u64>(insert_position),
                replay_position: transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void) -> u64>(replay_position),
            })
        }
    }

    /// Whether this process may see an I/O error now: anywhere else it would end recovery or the whole server
    /// (finding B13).
    pub fn may_fail(&self) -> bool {
        ORDINARY.contains(&self.backend_type.load(Relaxed)) && self.critical_sections.load(Relaxed) == 0
    }

    /// Whether the process was told to end (`pg_terminate_backend`, shutdown).
    pub fn is_told_to_die(&self) -> bool {
        self.die_pending.load(Relaxed) as c_int != 0
    }

    /// A WAL position at or above every change in a page that PostgreSQL is writing now: each was inserted, under the
    /// buffer's lock, before the page could be written. In recovery the end of the record being replayed, which may be in
    /// the page while `GetXLogReplayRecPtr` does not cover it yet (finding A1.4).
    pub fn horizon(&self) -> u64 {
        // SAFETY: both read shared memory that every process which writes relations is attached to; the timeline is not
        // asked for.
        let position = unsafe {
            if (self.recovery_in_progress)() {
                (self.replay_position)(core::ptr::null_mut())
            } else {
                (self.insert_position)()
            }
        };
        before_page_header(position)
    }
}

/// The insert position stands behind the header of a page that has no record yet; the WAL before it ends at the page's
/// start. A record that crosses into the page and ends within 40 bytes needs no exception: what is committed ends with a
/// record, and none ends at the page's start then.
fn before_page_header(position: u64) -> u64 {
    let offset = position % WAL_PAGE_BYTES;
    if offset <= WAL_HEADER_BYTES_MAX { position - offset } else { position }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_in_a_page_header_are_those_of_the_page() {
        for (position, expected) in [
            (0x300_0000, 0x300_0000),
            (0x300_0028, 0x300_0000),
            (0x300_0030, 0x300_0030),
            (0x300_2018, 0x300_2000),
            (0x300_2040, 0x300_2040),
            (0x300_1FF8, 0x300_1FF8),
        ] {
            assert_eq!(expected, before_page_header(position), "{position:#x}");
        }
    }
}
