"""Runs a command with `io_uring_setup` answered EPERM: `python forbid_io_uring.py COMMAND...`.

A program of its own, without imports from this package, because it replaces itself by the command.
"""

import ctypes
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_IO_URING_SETUP = 425  # The same number on every architecture (asm-generic/unistd.h).
_EPERM = 1

# struct sock_filter {u16 code; u8 jt, jf; u32 k}: load the call's number; is it ours: fail, else allow.
_FILTER = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x20, 0, 0, 0),
        (0x15, 0, 1, _IO_URING_SETUP),
        (0x06, 0, 0, 0x00050000 | _EPERM),
        (0x06, 0, 0, 0x7FFF0000),
    )
)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> None:
    """Installs the filter and becomes the command."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(_FILTER) // 8, _FILTER)
    # Without the first, a seccomp filter needs CAP_SYS_ADMIN.
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
