"""The native engine: speaks the FUSE kernel protocol itself.

- protocol   the protocol's structures and numbers
- session    one mount's requests, and the table of what serves them
- names, attributes, opening, files, copying, directories, connection    what serves them
- extensions    what follows the names of a request
- answers    core's values in the protocol's structures
- passthrough    open files that the kernel serves itself
- xattrs     extended attributes by directory and name
- plain      what needs no decision of core
- background    a thread that works without the interpreter
- ahead      directories read before a walk asks for them
- warm       files that a disk is asked for before they are read
- pace       what is done while requests come one right after the other
- pipes      data that goes from a file to the kernel without being copied here
- closing    descriptors that take long to close
- direct     changes that need no decision, either
- export     what tells file handles of one node id apart
- prune      keeping the number of nodes within a bound
- device     the transport over /dev/fuse
- uring      the transport over io_uring
- workers    threads for what may take long
- listing    directory positions that need no handle

Opening a file or directory costs no message, unless files are to be passed through: the kernel is told once that OPEN
and OPENDIR are not wanted, so every request names the node alone. That asks for a daemon that may open any file of its
layers again, which root is.
"""

from __future__ import annotations

import gc
import os
from _queue import SimpleQueue
from _thread import start_new_thread

from overlayfs_py.config import MountConfig
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.engines import machine
from overlayfs_py.engines.beginning import NAME, Beginning, is_in_fstab
from overlayfs_py.engines.native.closing import CLOSED_LATER
from overlayfs_py.engines.native.device import Channel, clone
from overlayfs_py.engines.native.pace import MOST_HELPERS
from overlayfs_py.engines.native.pipes import PIPE_DESCRIPTORS
from overlayfs_py.engines.native.session import DATA_DESCRIPTORS, UNSUPPORTED, Session
from overlayfs_py.engines.native.uring import Ring
from overlayfs_py.errors import MountError
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["UNSUPPORTED", "check", "obstacle_to_rings", "root_name", "serve"]

log = Journal(__name__)

_ALLOCATIONS_A_COLLECTION = 50_000

# They enter themselves in the session's table.
for _handlers in ("names", "attributes", "opening", "files", "copying", "directories", "connection"):
    __import__(f"{__name__}.{_handlers}")


def check(config: MountConfig) -> None:
    """See before mounting that there is what must be, and turn the kernel's switch for rings on; raises MountError."""
    if config.cpu_latency == "on":
        try:
            os.close(machine.open_latency("on"))
        except OSError as error:
            why = f"{machine.CPU_LATENCY}: {error.strerror}"
            raise MountError(f"cpu_latency=on: {why}; use cpu_latency=auto") from error
    if config.uring != "on":
        return
    obstacle = obstacle_to_rings()
    if obstacle is not None:
        raise _no_rings(obstacle)
    try:
        _turn_uring_on()
    except OSError as error:
        raise _no_rings(f"cannot turn its switch on ({error.filename}: {error.strerror})") from error


def obstacle_to_rings() -> str | None:
    """Why this process can't have the rings of a mount, or None; the kernel's switch aside."""
    if machine.release() < machine.OLDEST_WITH_URING:
        return f"it takes Linux {machine.OLDEST_WITH_URING[0]}.{machine.OLDEST_WITH_URING[1]}"
    try:
        for ring in _make_rings(-1):
            ring.close()
    except OSError as error:
        return machine.obstacle_to_rings(error)
    return None


def _no_rings(why: str) -> MountError:
    return MountError(f"no FUSE over io_uring: {why}; use uring=auto")


def _turn_uring_on() -> None:
    if machine.uring_switch() is None:
        # This has the kernel load its module.
        os.close(os.open(machine.DEVICE, os.O_RDWR | os.O_CLOEXEC))
    if not machine.uring_switch():
        with open(machine.URING_SWITCH, "r+b") as switch:
            switch.write(b"Y")


def _make_rings(fuse_fd: int) -> list[Ring]:
    """A ring for each queue of the kernel's, all of which it wants served; raises OSError, and then leaves none."""
    allowed = os.sched_getaffinity(0)
    rings: list[Ring] = []
    try:
        for number in range(_queues()):
            rings.append(Ring(fuse_fd, number, number if number in allowed else None))
    except OSError:
        for ring in rings:
            ring.close()
        raise
    return rings


def _queues() -> int:
    """How many queues the kernel has: as many as there may ever be processors."""
    with open("/sys/devices/system/cpu/possible", "rb") as listed:
        spans = [span.partition(b"-") for span in listed.read().strip().split(b",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


def _rings_to_offer(config: MountConfig, fuse_fd: int) -> list[Ring]:
    """The rings of a mount, before the kernel is told of them, which then waits until they serve."""
    if config.uring == "off":
        return []
    why = "FUSE over io_uring is not switched on"
    if config.uring == "on" or machine.uring_switch():
        try:
            return _make_rings(fuse_fd)
        except OSError as error:
            why = machine.obstacle_to_rings(error)
            if config.uring == "on":
                raise _no_rings(why) from error
    log.info("requests come over /dev/fuse: %s", why)
    return []


def root_name(config: MountConfig) -> bytes:
    """The name in the root at which the mount is to begin, empty where that is the root.

    mount(8) takes an entry of fstab(5) for mounted only where the root is, and would mount it again with `-a`.
    """
    return b"" if config.noacl or config.noxattrs or is_in_fstab(config.mountpoint) else NAME


def serve(overlay: Overlay, fuse_fd: int, beginning: Beginning | None = None) -> None:
    """Serve the mounted connection `fuse_fd` until it is unmounted; then close the overlay.

    Takes over the descriptor. Signals, and unmounting, are the caller's business, also where this raises MountError.
    """
    os.umask(0)
    # Most of what is made here stays, by the thousand: looking through it for garbage took a twentieth of a walk.
    gc.set_threshold(_ALLOCATIONS_A_COLLECTION)
    descriptors = [fuse_fd]
    rings = _rings_to_offer(overlay.config, fuse_fd)
    session = Session(overlay, fuse_fd, want_uring=bool(rings), beginning=beginning)
    loops = Loops()

    def further(*, helper: bool) -> Callable[[], None]:
        descriptors.append(clone(fuse_fd))
        return Channel(session, descriptors[-1], helper=helper).serve

    def begin_helper() -> None:
        helper = further(helper=True)
        try:
            loops.start(helper)
        except RuntimeError:
            os.close(descriptors.pop())
            raise

    try:
        first = Channel(session, fuse_fd)
        first.greet()
        _check_agreement(overlay.config, session)
        serving = [first.serve]
        if session.uring:
            serving.extend(_serving(ring, session) for ring in rings)
        else:
            # At least two, as one may be held up.
            for _ in range(max(len(os.sched_getaffinity(0)), 2) - 1):
                serving.append(further(helper=False))
            session.pipes.allow()
            session.pace.help_by(begin_helper)
        # There may be hundreds: one a processor.
        serving_descriptors = len(descriptors) + len(rings) + MOST_HELPERS
        overlay.share_descriptors(serving_descriptors + CLOSED_LATER + PIPE_DESCRIPTORS + DATA_DESCRIPTORS)
        for loop in serving:
            loops.start(loop)
        loops.wait()
        session.pace.close()
        # It may have begun a helper just then.
        loops.wait()
    finally:
        session.close()
        for ring in rings:
            ring.close()
        for fd in descriptors:
            os.close(fd)
        overlay.close()


def _check_agreement(config: MountConfig, session: Session) -> None:
    if session.minor is None:
        raise MountError("the kernel's FUSE protocol is older than 7.31; use engine=portable")
    session.pruning.check(session.minor)
    if config.uring == "on" and not session.uring:
        raise _no_rings("the kernel does not offer it")
    if config.io == "passthrough":
        session.through.check()
    if config.uring == "auto" and session.uring:
        log.info("requests come over io_uring")


def _serving(ring: Ring, session: Session) -> Callable[[], None]:
    return lambda: ring.serve(session)


class Loops:
    """Threads that serve until the connection ends."""

    def __init__(self) -> None:
        self._begun: list[None] = []  # one for each
        self._errors: list[BaseException] = []
        self._ended: SimpleQueue[None] = SimpleQueue()

    def start(self, loop: Callable[[], None]) -> None:
        """Run it in a thread; from any thread. Raises RuntimeError where there may be no more of them."""
        self._begun.append(None)
        try:
            start_new_thread(self._run, (loop,))
        except RuntimeError:
            self._begun.pop()
            raise

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:  # noqa: BLE001 - raised by who waits for the threads
            self._errors.append(error)
        finally:
            self._ended.put(None)

    def wait(self) -> None:
        """Return when all have ended. Raises what one of them raises, at once, and then the others go on."""
        while self._begun:
            self._ended.get()
            self._begun.pop()
            if self._errors:
                raise self._errors[0]
