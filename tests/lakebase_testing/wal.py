"""Compares WAL byte by byte: safekeepers' segments, what pg_receivewal stored, what a writer's pg_wal still holds."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lakebase_testing.cluster import LocalCluster, Safekeeper
from lakebase_testing.postgres import format_lsn

# A safekeeper's own segment size, whatever PostgreSQL's is (docs/formats/wal-segments.md); the file has a trailer behind it.
SAFEKEEPER_SEGMENT_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20


class SafekeeperWal:
    """The log of one safekeeper as it lies on its disk."""

    def __init__(self, safekeeper: Safekeeper) -> None:
        self.name = safekeeper.name
        self._directory = safekeeper.wal_directory()

    def read(self, lsn: int, size: int) -> bytes:
        """Returns `size` bytes from `lsn` on; they must not cross the end of a segment of the safekeeper's."""
        start = lsn - lsn % SAFEKEEPER_SEGMENT_BYTES
        with (self._directory / f"{start:016X}").open("rb") as file:
            file.seek(lsn - start)
            data = file.read(size)
        assert len(data) == size, f"{self.name}: segment {start:016X} is too short"
        return data


@dataclass(frozen=True)
class SegmentFile:
    """A WAL file in PostgreSQL's naming."""

    path: Path
    timeline: int
    start: int


_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})(\.partial)?")


def segment_files(directory: Path, segment_bytes: int) -> list[SegmentFile]:
    """Returns the newest file (highest timeline) of each segment in a pg_wal or pg_receivewal directory, in order."""
    newest: dict[int, SegmentFile] = {}
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        timeline, high, low = (int(match[group], 16) for group in (1, 2, 3))
        start = (high << 32) + low * segment_bytes
        known = newest.get(start)
        if known is None or (known.timeline, not known.path.suffix) < (timeline, not path.suffix):
            newest[start] = SegmentFile(path, timeline, start)
    return [newest[start] for start in sorted(newest)]


def _chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cuts `[start, end)` into aligned pieces: position and size."""
    while start < end:
        size = min(_CHUNK_BYTES - start % _CHUNK_BYTES, end - start)
        yield start, size
        start += size


def _first_difference(one: bytes, other: bytes) -> int:
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def assert_safekeepers_equal(cluster: LocalCluster, start: int, end: int) -> int:
    """Asserts that all safekeepers hold the same bytes in `[start, end)`; returns how many were compared.

    Safekeepers must have been flushed to `end` (see `LocalCluster.wait_caught_up`).
    """
    first, *others = [SafekeeperWal(safekeeper) for safekeeper in cluster.safekeepers]
    for lsn, size in _chunks(start, end):
        expected = first.read(lsn, size)
        for other in others:
            actual = other.read(lsn, size)
            if actual != expected:
                at = lsn + _first_difference(expected, actual)
                raise AssertionError(f"{other.name} differs from {first.name} at {format_lsn(at)}")
    return end - start


def assert_files_equal(cluster: LocalCluster, directory: Path, start: int, end: int, *, whole: bool) -> int:
    """Asserts that PostgreSQL's WAL files in `directory` hold what the first safekeeper holds in `[start, end)`.

    With `whole` the files must cover all of it, else what there is of it. Returns how many bytes were compared.
    """
    reference = SafekeeperWal(cluster.safekeepers[0])
    compared = 0
    reached = start
    for file in segment_files(directory, cluster.segment_bytes):
        begin, stop = max(file.start, start), min(file.start + cluster.segment_bytes, end)
        if begin >= stop:
            continue
        assert not whole or begin == reached, f"{directory} lacks WAL from {format_lsn(reached)} to {format_lsn(begin)}"
        reached = stop
        with file.path.open("rb") as stored:
            for lsn, size in _chunks(begin, stop):
                stored.seek(lsn - file.start)
                actual, expected = stored.read(size), reference.read(lsn, size)
                assert len(actual) == size, f"{file.path} is too short"
                if actual != expected:
                    at = lsn + _first_difference(expected, actual)
                    raise AssertionError(f"{file.path} differs from {reference.name} at {format_lsn(at)}")
                compared += size
    assert not whole or reached == end, f"{directory} ends at {format_lsn(reached)}, the log at {format_lsn(end)}"
    return compared


def assert_archive_equal(cluster: LocalCluster, directory: Path, start: int, end: int) -> int:
    """Asserts that the WAL archive holds in `[start, end)` what PostgreSQL's WAL files in `directory` hold.

    `end` is the end of an archived segment. Returns how many bytes were compared.
    """
    files = {file.start: file.path for file in segment_files(directory, cluster.segment_bytes)}
    for lsn, size in _chunks(start, end):
        begin = lsn - lsn % cluster.segment_bytes
        with files[begin].open("rb") as stored:
            stored.seek(lsn - begin)
            expected = stored.read(size)
        archived = lsn - lsn % SAFEKEEPER_SEGMENT_BYTES
        with (cluster.objects / "wal" / f"{archived:016x}").open("rb") as segment:
            segment.seek(lsn - archived)
            actual = segment.read(size)
        if actual != expected:
            at = lsn + _first_difference(expected, actual) if len(actual) == size else lsn + len(actual)
            raise AssertionError(f"archived segment {archived:016x} differs from {files[begin]} at {format_lsn(at)}")
    return end - start
