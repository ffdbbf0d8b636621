"""Reads /proc: whose child a process is, which processes still use a directory."""

import os
import signal
from collections.abc import Collection
from pathlib import Path


def _parents() -> dict[int, int]:
    """Returns the parent of every process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The name in parentheses may hold spaces and parentheses; the state and the parent follow the last one.
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    return parents


def descendants(pid: int) -> list[int]:
    """Returns all processes below `pid`, parents before children, without `pid`."""
    parents = _parents()
    found = [pid]
    for known in found:
        found.extend(child for child, parent in parents.items() if parent == known)
    return found[1:]


def state(pid: int) -> str | None:
    """Returns the state letter of a process (`R`, `S`, `T`, `Z`...), or None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def command_line(pid: int) -> str:
    """Returns the command line of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def program(pid: int) -> str:
    """Returns the file name of the program that a process runs, empty when it is gone or not ours to see."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def users_of(directory: Path, programs: Collection[str]) -> list[int]:
    """Returns the processes of these programs that work below `directory` or name it in their command line."""
    needle = str(directory)
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or program(int(entry.name)) not in programs:
            continue
        try:
            where = str((entry / "cwd").readlink())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            where = ""
        if where == needle or where.startswith(needle + "/") or needle in command_line(int(entry.name)):
            found.append(int(entry.name))
    return found


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; returns False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
