"""A container's log: one JSON object a line, with `time` (RFC 3339, UTC), `stream` and `log`.

What the container prints is written as it comes, cut after each newline, so a record may be a part of a line. Bytes
that are no UTF-8 become lone surrogates, and bytes again when read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

_PAUSE = 0.05  # seconds between looks at a log that is followed


class Record(NamedTuple):
    time: str
    stream: str
    data: bytes


class Writer:
    """Appends to a log; a disk that fills up costs records, never the container."""

    __slots__ = ("_fd", "lost")

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self.lost = ""
        """Why records were lost, if any were."""
        # A monitor that was killed may have left a part of a record.
        end = os.fstat(self._fd).st_size
        if end and os.pread(self._fd, 1, end - 1) != b"\n":
            self._append(b"\n")

    def write(self, stream: str, data: bytes) -> None:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        records = [
            json.dumps({"time": now, "stream": stream, "log": line.decode("utf-8", "surrogateescape")})
            for line in data.splitlines(keepends=True)
        ]
        self._append("".join(f"{record}\n" for record in records).encode())

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, data) == len(data):
                return
            self.lost = "the disk is full"
        except OSError as error:
            # ENOSPC, EDQUOT or EIO: the container goes on, and its end tells what was lost.
            self.lost = error.strerror or "cannot write"
        os.ftruncate(self._fd, before)

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path, ended: Callable[[], bool] | None = None) -> Iterator[Record]:
    """The records of a log from its start; with `ended`, wait for more until that says that no more can come."""
    try:
        log = path.open("rb")
    except FileNotFoundError:
        return
    pending = b""
    with log:
        while True:
            last = ended is None or ended()
            for line in iter(log.readline, b""):
                pending += line
                if line.endswith(b"\n"):
                    if pending != b"\n" and (record := _parse(pending)) is not None:
                        yield record
                    pending = b""
            if last:
                return
            time.sleep(_PAUSE)


def _parse(line: bytes) -> Record | None:
    """None for what a monitor that was killed has written in part."""
    try:
        data = json.loads(line)
        return Record(data["time"], data["stream"], data["log"].encode("utf-8", "surrogateescape"))
    except (ValueError, KeyError, TypeError):
        return None
