"""The native engine: speaks the FUSE kernel protocol itself.

- protocol   the protocol's structures and numbers
- session    one mount's requests, and the table of what serves them
- names, attributes, files, directories, connection    what serves them
- answers    core's values in the protocol's structures
- passthrough    open files that the kernel serves itself
- plain      what needs no decision of core
- device     the transport over /dev/fuse
- uring      the transport over io_uring
- listing    directory positions that need no handle

Opening a file or directory costs no message, unless files are to be passed through: the kernel is told once that OPEN
and OPENDIR are not wanted, so every request names the node alone. That asks for a daemon that may open any file of its layers again, which root is.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from importlib import import_module

from overlayfs_py.config import MountConfig
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.engines.native.device import Channel, clone
from overlayfs_py.engines.native.session import UNSUPPORTED, Session
from overlayfs_py.engines.native.uring import Ring
from overlayfs_py.errors import MountError

__all__ = ["UNSUPPORTED", "check", "serve"]

log = logging.getLogger(__name__)

# They enter themselves in the session's table.
for _handlers in ("names", "attributes", "files", "directories", "connection"):
    import_module(f"{__name__}.{_handlers}")

_URING_SWITCH = "/sys/module/fuse/parameters/enable_uring"


def check(config: MountConfig) -> None:
    """See that this engine can serve a mount, and turn io_uring on where that is asked for; raises MountError."""
    if os.geteuid() != 0:
        raise MountError("the native engine needs root, at least of a user namespace; use engine=portable")
    if config.uring == "on":
        _turn_uring_on()


def _turn_uring_on() -> None:
    try:
        with open(_URING_SWITCH, "r+", encoding="ascii") as switch:
            if switch.read().strip() != "Y":
                switch.write("Y")
    except OSError as error:
        raise MountError(f"cannot turn FUSE over io_uring on ({_URING_SWITCH}): {error.strerror}") from error


def serve(overlay: Overlay, fuse_fd: int) -> None:
    """Serve the mounted connection `fuse_fd` until it is unmounted; then close the overlay.

    Takes over the descriptor. Signals, and unmounting, are the caller's business.
    """
    os.umask(0)
    session = Session(overlay, fuse_fd, want_uring=overlay.config.uring != "off")
    descriptors = [fuse_fd]
    rings: list[Ring] = []
    try:
        first = Channel(session, fuse_fd)
        first.greet()
        if overlay.config.io == "passthrough":
            session.through.check()
        loops: list[Callable[[], None]] = []
        if session.uring:
            rings.extend(Ring(session, fuse_fd, cpu) for cpu in range(possible_cpus()))
            loops.extend(ring.serve for ring in rings)
        else:
            for _ in range(len(os.sched_getaffinity(0)) - 1):
                descriptors.append(clone(fuse_fd))
                loops.append(Channel(session, descriptors[-1]).serve)
        threads = [threading.Thread(target=loop, name=f"fuse-{n}", daemon=True) for n, loop in enumerate(loops)]
        for thread in threads:
            thread.start()
        first.serve()
        for thread in threads:
            thread.join()
    finally:
        session.close()
        for ring in rings:
            ring.close()
        for fd in descriptors:
            os.close(fd)
        overlay.close()


def possible_cpus() -> int:
    """How many processors the kernel has queues for, present or not."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as listed:
        return int(listed.read().strip().rpartition(",")[2].rpartition("-")[2]) + 1
