"""The kernel's switch for FUSE over io_uring, which is the whole machine's."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SWITCH: Final = Path("/sys/module/fuse/parameters/enable_uring")


@contextlib.contextmanager
def switch_kept() -> Iterator[None]:
    """For whatever may turn it on: set it back afterwards.

    Of several processes at once, each sees the switch as it was before any of them.
    """
    with SWITCH.open("r+", encoding="ascii") as switch:
        fcntl.flock(switch, fcntl.LOCK_EX)
        before = switch.read()
        try:
            yield
        finally:
            SWITCH.write_text(before, encoding="ascii")
