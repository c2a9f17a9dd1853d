"""The kernel's switch for FUSE over io_uring, which is the whole machine's."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SWITCH: Final = Path("/sys/module/fuse/parameters/enable_uring")

_kept = False


@contextlib.contextmanager
def switch_kept() -> Iterator[None]:
    """For whatever may turn it on: set it back afterwards.

    Of several processes at once, each sees the switch as it was before any of them. A use within another changes
    nothing.
    """
    global _kept
    if _kept:
        yield
        return
    with SWITCH.open("r+", encoding="ascii") as switch:
        queue = os.open(SWITCH.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Who has just let go of the switch waits here behind who waits for it, or might have it for ever.
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(switch, fcntl.LOCK_EX)
        finally:
            os.close(queue)
        before = switch.read()
        _kept = True
        try:
            yield
        finally:
            _kept = False
            with _mounting(fcntl.LOCK_EX):
                SWITCH.write_text(before, encoding="ascii")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """For a mount that may speak over io_uring, while it is made: the switch that it has seen on is not set back."""
    with _mounting(fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _mounting(how: int) -> Iterator[None]:
    lock = os.open(SWITCH.parent.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, how)
        yield
    finally:
        os.close(lock)
