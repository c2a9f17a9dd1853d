"""The descriptors that a process has, and what becomes of one."""

from __future__ import annotations

import os
import select

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


def is_cut_off(fd: int) -> bool:
    """Whether what a descriptor leads to is gone (POLLERR): of /dev/fuse, unmounted or aborted."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
