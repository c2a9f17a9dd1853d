"""The descriptors that a process has."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


def close_all_but(kept: Collection[int]) -> None:
    """Close every descriptor but the standard ones and those to keep."""
    first = 3
    for fd in sorted(fd for fd in kept if fd >= first):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, max(map(int, os.listdir("/proc/self/fd"))) + 1)
