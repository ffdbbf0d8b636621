//! The C library's own functions, behind our hooks.
#![allow(unsafe_code)]

use core::{
    ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void},
    sync::atomic::{AtomicPtr, Ordering::Relaxed},
};
use libc::{iovec, mode_t, off_t, size_t, sockaddr, socklen_t, ssize_t};

/// One function of the C library, looked up once.
struct Real {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Real {
    const fn new(name: &'static CStr) -> Self {
        Real { name, address: AtomicPtr::new(core::ptr::null_mut()) }
    }

    /// The address, resolved by the constructor; resolved here for the constructors of other libraries that run
    /// before ours. A missing function ends the process: every libc that PostgreSQL runs on has all of these.
    fn get(&self) -> *mut c_void {
        let address = self.address.load(Relaxed);
        if !address.is_null() {
            return address;
        }
        // SAFETY: the name is a C string; RTLD_NEXT searches the objects loaded after this one.
        let address = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        if address.is_null() {
            // SAFETY: ends the process at once; reporting would itself need `write`.
            unsafe { libc::_exit(vfs_abi::EXIT_REFUSED) }
        }
        self.address.store(address, Relaxed);
        address
    }
}

macro_rules! real_functions {
    ($($table:ident $function:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(
            static $table: Real = {
                match CStr::from_bytes_with_nul(concat!(stringify!($function), "\0").as_bytes()) {
                    Ok(name) => Real::new(name),
                    Err(_) => panic!("a function's name holds no zero byte"),
                }
            };

            /// The C library's function of this name.
            ///
            /// # Safety
            /// As the C function's: the arguments are those of the intercepted caller.
            pub unsafe fn $function($($argument: $kind),*) -> $result {
                type Signature = unsafe extern "C" fn($($kind),*) -> $result;
                // SAFETY: the address is that of the C function of this name, which has this signature on x86-64
                // (`open` and `prctl` are variadic there; integer arguments travel in the same registers).
                let function = unsafe { core::mem::transmute::<*mut c_void, Signature>($table.get()) };
                // SAFETY: promised by the caller.
                unsafe { function($($argument),*) }
            }
        )*

        /// Looks up every function, so that no hook has to.
        pub fn resolve_all() {
            $($table.get();)*
        }
    };
}

real_functions! {
    OPEN open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    OPEN64 open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    CLOSE close(fd: c_int) -> c_int;
    DUP dup(fd: c_int) -> c_int;
    DUP2 dup2(fd: c_int, target: c_int) -> c_int;
    READ read(fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t;
    READ_CHK __read_chk(fd: c_int, buffer: *mut c_void, count: size_t, room: size_t) -> ssize_t;
    PREAD pread(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t) -> ssize_t;
    PREADV preadv(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t;
    FTRUNCATE ftruncate(fd: c_int, length: off_t) -> c_int;
    TRUNCATE truncate(path: *const c_char, length: off_t) -> c_int;
    UNLINK unlink(path: *const c_char) -> c_int;
    RENAME rename(from: *const c_char, to: *const c_char) -> c_int;
    POSIX_FADVISE posix_fadvise(fd: c_int, offset: off_t, count: off_t, advice: c_int) -> c_int;
    WRITE write(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t;
    PWRITE pwrite(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t;
    PWRITEV pwritev(fd: c_int, vectors: *const iovec, count: c_int, offset: off_t) -> ssize_t;
    FSYNC fsync(fd: c_int) -> c_int;
    FDATASYNC fdatasync(fd: c_int) -> c_int;
    SYNC_FILE_RANGE sync_file_range(fd: c_int, offset: off_t, count: off_t, flags: c_uint) -> c_int;
    SEND send(fd: c_int, buffer: *const c_void, count: size_t, flags: c_int) -> ssize_t;
    CONNECT connect(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int;
    PRCTL prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int;
    SYMLINK symlink(target: *const c_char, path: *const c_char) -> c_int;
}
