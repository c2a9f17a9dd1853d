"""What the kernel asked a FUSE daemon, by opcode, counted by the kernel's own tracepoints.

The events fuse:fuse_request_send and fuse:fuse_request_end (fs/fuse/fuse_trace.h, since Linux 6.11) see every
peer's requests alike, whatever carries them, and cost the daemon nothing. FORGET has no answer and passes them by.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.syscalls import mount, umount

_TRACING: Final = Path("/sys/kernel/tracing")
_INSTANCE: Final = _TRACING / f"instances/overlayfs-py-bench-{os.getpid()}"
_BUFFER: Final = 128 * 1024  # KiB a processor: two million events
_SEND: Final = re.compile(r" ([0-9.]+): fuse_request_send: connection (\d+) req (\d+) opcode \d+ \((\w+)\)")
_END: Final = re.compile(r" ([0-9.]+): fuse_request_end: connection (\d+) req (\d+) len \d+ error (-?\d+)")

# Those that the events of Linux 6.18 show as a number alone.
_UNNAMED: Final = {"0x34": "STATX", "0x35": "COPY_FILE_RANGE_64"}


class NoTrace(Exception):
    """The kernel can't count the requests; the message says why."""


@dataclass(slots=True)
class Count:
    """The requests of one opcode."""

    opcode: str
    requests: int = 0
    errors: int = 0
    seconds: float = 0.0
    """From the moment the kernel queued each until it had the answer, added up."""


@contextmanager
def tracing() -> Iterator[None]:
    """Have the events at hand, off until `switch`. Raises NoTrace."""
    with _tracefs():
        if not (_TRACING / "events/fuse/fuse_request_send").exists():
            raise NoTrace("requests can't be counted: the events of FUSE need Linux 6.11 or newer")
        _INSTANCE.mkdir()
        try:
            switch(on=False)
            (_INSTANCE / "trace_clock").write_text("mono")
            (_INSTANCE / "buffer_size_kb").write_text(str(_BUFFER))
            for event in ("fuse_request_send", "fuse_request_end"):
                (_INSTANCE / f"events/fuse/{event}/enable").write_text("1")
            yield
        finally:
            _INSTANCE.rmdir()


@contextmanager
def _tracefs() -> Iterator[None]:
    if (_TRACING / "events").exists():
        yield
        return
    mount(b"tracefs", bytes(_TRACING), b"tracefs")
    try:
        yield
    finally:
        umount(bytes(_TRACING))


def switch(*, on: bool) -> None:
    (_INSTANCE / "tracing_on").write_text(str(int(on)))


def collect(connections: Iterable[int]) -> list[Count]:
    """What was traced on some connections, most frequent first; empties the buffer.

    Raises NoTrace if the buffer was too small.
    """
    for stats in _INSTANCE.glob("per_cpu/cpu*/stats"):
        if "overrun: 0\n" not in stats.read_text():
            raise NoTrace("there were more requests than the trace holds: use a smaller workload")
    wanted = set(connections)
    counts: dict[str, Count] = {}
    pending: dict[tuple[int, int], tuple[float, Count]] = {}
    with (_INSTANCE / "trace").open() as lines:
        for line in lines:
            if found := _SEND.search(line):
                if int(found[2]) in wanted:
                    count = counts.setdefault(found[4], Count(_UNNAMED.get(found[4], found[4].removeprefix("FUSE_"))))
                    count.requests += 1
                    pending[int(found[2]), int(found[3])] = float(found[1]), count
            elif (found := _END.search(line)) and (key := (int(found[2]), int(found[3]))) in pending:
                sent, count = pending.pop(key)
                count.seconds += float(found[1]) - sent
                count.errors += found[4] != "0"
    (_INSTANCE / "trace").write_text("")
    return sorted(counts.values(), key=lambda count: count.requests, reverse=True)
