"""The descriptors that a process has, and what becomes of one."""

from __future__ import annotations

import errno
import fcntl
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


MOST = 1024
"""So many descriptors a mount has at most."""


def close_all_but(kept: Collection[int]) -> None:
    """Close every descriptor but the standard ones and those to keep."""
    first = 3
    for fd in sorted(fd for fd in kept if fd >= first):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, max(map(int, os.listdir("/proc/self/fd"))) + 1)


def make_room(fd: int, limit: int) -> None:
    """Have the table of this process's descriptors hold all there may be.

    `fd` is any that is open, `limit` the most that are allowed (RLIMIT_NOFILE).

    A table that grows when threads share it waits until no processor can be looking at the old one (expand_fdtable in
    fs/file.c), some 20 ms each time: this is for before there are any threads.
    """
    try:
        os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, min(MOST, limit) - 1))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENOMEM):
            raise
        # the last one is in use, or memory is short: it grows when it has to


def is_cut_off(fd: int) -> bool:
    """Whether what a descriptor leads to is gone (POLLERR): of /dev/fuse, unmounted or aborted."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
