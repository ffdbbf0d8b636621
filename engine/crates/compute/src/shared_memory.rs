//! Shared memory that the end of a process does not free, and PostgreSQL killed whole cannot remove.
//!
//! PostgreSQL marks PGDATA as used by a small System V segment, and puts the memory of parallel queries where
//! `dynamic_shared_memory_type` says. A postmaster that finds a dead one's `postmaster.pid` removes both, but the PGDATA of a
//! killed one is replaced. In an IPC namespace of its own the kernel removes all System V segments with the last process. Without one the
//! memory of queries lies in files below PGDATA, and the segment is removed here. Knows nothing about processes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::isolation::Isolation;

/// `dynamic_shared_memory_type`: a kind that ends with the processes or with PGDATA. PostgreSQL's own choice, `posix`, leaves a
/// megabyte in `/dev/shm` with each kill, which nobody may delete, because nothing says whose it is.
pub fn dynamic_type(isolation: Isolation) -> &'static str {
    match isolation {
        Isolation::PidNamespace | Isolation::UserNamespace => "sysv",
        Isolation::ProcessTree => "mmap",
    }
}

/// The segment that `postmaster.pid` names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Named {
    /// Who made it.
    postmaster: i32,
    key: i32,
    id: i32,
}

/// Removes the segment that the `postmaster.pid` of `pgdata` names, if it is still there and nobody uses it; returns whether it was.
///
/// All processes of that postmaster must have ended. The number of a segment is used again after a restart of the machine, so
/// key and maker must be those that the file says, too: else it is somebody else's.
///
/// # Errors
/// The file cannot be read, or the kernel refuses.
pub fn remove_left_behind(pgdata: &Path) -> io::Result<bool> {
    let path: PathBuf = pgdata.join("postmaster.pid");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    // A postmaster that ended early had no segment yet.
    let Some(named) = parse(&text) else { return Ok(false) };
    // SAFETY: all-zero is valid for this struct of numbers.
    let mut found: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is writable.
    if unsafe { libc::shmctl(named.id, libc::IPC_STAT, &raw mut found) } == -1 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            // Gone, or another user's.
            Some(libc::EINVAL | libc::EIDRM | libc::EACCES) => Ok(false),
            _ => Err(error),
        };
    }
    if (found.shm_perm.__key, found.shm_cpid, found.shm_nattch) != (named.key, named.postmaster, 0) {
        return Ok(false);
    }
    // SAFETY: the command takes no pointer.
    match unsafe { libc::shmctl(named.id, libc::IPC_RMID, std::ptr::null_mut()) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(true),
    }
}

/// Line 1 is the postmaster, line 7 key and id of the segment (`miscadmin.h`, `LOCK_FILE_LINE_SHMEM_KEY`).
fn parse(text: &str) -> Option<Named> {
    let mut lines = text.lines();
    let postmaster = lines.next()?.trim().parse().ok()?;
    let mut segment = lines.nth(5)?.split_ascii_whitespace();
    // Written as unsigned long: a negative key has its sign in the upper half.
    let mut number = || Some(segment.next()?.parse::<u64>().ok()? as i32);
    Some(Named { postmaster, key: number()?, id: number()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_read_from_the_seventh_line() {
        let text = "4711\n/pgdata\n1795383288\n5432\n/run\nlocalhost\n 10862594   1146880\nready   \n";
        assert_eq!(Some(Named { postmaster: 4711, key: 10_862_594, id: 1_146_880 }), parse(text));
        let negative = text.replace("10862594", "18446744071562067969");
        assert_eq!(Some(-2_147_483_647), parse(&negative).map(|named| named.key));
        for early in ["", "4711\n", "4711\n/pgdata\n1795383288\n5432\n/run\nlocalhost\n", "x\n\n\n\n\n\n1 2\n"] {
            assert_eq!(None, parse(early), "{early:?}");
        }
    }

    /// A segment of another program, which got the number of a segment that is long gone, stays.
    #[test]
    fn only_the_unused_segment_of_that_postmaster_is_removed() {
        let pgdata = std::env::temp_dir().join(format!("lakebase-shared-memory-{}", std::process::id()));
        fs::create_dir_all(&pgdata).expect("created");
        let own = std::process::id() as i32;
        // PostgreSQL's key is an inode's number; this one is as good.
        let key = 0x1a_0000 + own;
        // SAFETY: no pointers.
        let id = unsafe { libc::shmget(key, 56, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) };
        assert_ne!(-1, id, "{}", io::Error::last_os_error());
        let remove = |postmaster: i32, key: i32| {
            let text = format!("{postmaster}\n{}\n0\n5432\n\n\n{key:9} {id:9}\nready\n", pgdata.display());
            fs::write(pgdata.join("postmaster.pid"), text).expect("written");
            remove_left_behind(&pgdata).expect("no failure")
        };

        assert!(!remove(own, key + 1), "another key");
        assert!(!remove(own + 1, key), "another maker");
        // SAFETY: the kernel chooses the address.
        let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        assert!(!remove(own, key), "in use");
        // SAFETY: the address is what was attached, and nothing refers to it.
        unsafe { libc::shmdt(address) };
        assert!(remove(own, key));
        assert!(!remove(own, key), "gone");
        fs::remove_file(pgdata.join("postmaster.pid")).expect("removed");
        assert!(!remove_left_behind(&pgdata).expect("no failure"), "nothing is named");
        fs::remove_dir_all(pgdata).expect("removed");
    }
}
