"""What the machine has cached of names, and with them of files: having it forgotten, or keeping others from that."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_DROP: Final = Path("/proc/sys/vm/drop_caches")


def drop_names() -> None:
    """Have the kernel forget names that nobody uses, those it knows to be missing, too, and their inodes and pages.

    It waits for tests that rely on them.
    """
    with _DROP.open("w", encoding="ascii") as drop:
        fcntl.flock(drop, fcntl.LOCK_EX)
        drop.write("2")


@contextlib.contextmanager
def names_kept() -> Iterator[None]:
    """For a test that relies on what the kernel has cached: no other has it forgotten meanwhile."""
    with _DROP.open("w", encoding="ascii") as drop:
        fcntl.flock(drop, fcntl.LOCK_SH)
        yield
