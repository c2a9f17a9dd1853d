"""Threads that execute the jobs of operations, made as they are needed.

Not those of the standard library: loading them takes longer than a mount may, and by the time they are needed the
library may lie on the mount that is served, which would wait for itself.
"""

from __future__ import annotations

import errno
import os
from _queue import SimpleQueue
from _thread import allocate_lock, start_new_thread

from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = Journal(__name__)


class Workers:
    """At most `most` threads, of which no more than `kept`, by default all, stay when they are without work."""

    __slots__ = ("_closed", "_ended", "_idle", "_kept", "_lock", "_most", "_threads", "_waiting")

    def __init__(self, most: int, kept: int | None = None) -> None:
        self._most = most
        self._kept = most if kept is None else kept
        self._waiting: SimpleQueue[tuple[Callable[..., None], tuple[object, ...]] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._lock = allocate_lock()
        self._threads = 0
        # Threads without work, less what waits for one.
        self._idle = 0
        self._closed = False

    def submit(self, run: Callable[..., None], *arguments: object, or_not: bool = False) -> bool:
        """Have `run` called with the arguments in one of the threads, as soon as one has time.

        False, and nothing is done, where none has and `or_not` is set. Raises EAGAIN where there is none, and none can
        be had, as after close().
        """
        with self._lock:
            if self._closed:
                # Behind what tells the threads to end it would never be done, and whoever waits for it would wait on.
                if or_not:
                    return False
                raise no_thread()
            if self._idle > 0 or not self._start():
                if or_not and self._idle <= 0:
                    return False
                self._idle -= 1
            self._waiting.put((run, arguments))
            return True

    def waiting(self) -> int:
        """How much of what was handed in waits for a thread."""
        return max(0, -self._idle)

    def _start(self) -> bool:
        """Whether there is a further thread, for what is handed in now."""
        if self._threads == self._most:
            return False
        try:
            start_new_thread(self._work, ())
        except RuntimeError as error:
            if not self._threads:
                raise no_thread() from error
            # a limit on processes: those there are have more to do
            return False
        self._threads += 1
        return True

    def close(self) -> None:
        """Wait for all that was handed in; what comes from now on is refused."""
        with self._lock:
            self._closed = True
            # There is no further one from here on.
            threads = self._threads
            for _ in range(threads):
                self._waiting.put(None)
        for _ in range(threads):
            self._ended.get()

    def _work(self) -> None:
        stays = True
        try:
            unpin()
            while stays and (work := self._waiting.get()) is not None:
                self._execute(*work)
                # Its files are not to stay open until there is more to do.
                del work
                stays = self._stays()
        finally:
            if stays:
                self._ended.put(None)

    def _stays(self) -> bool:
        """Whether the thread that asks, which has nothing to do now, waits for more."""
        with self._lock:
            # One that was told to end is waited for.
            if self._idle >= self._kept and not self._closed:
                self._threads -= 1
                return False
            self._idle += 1
            return True

    def _execute(self, run: Callable[..., None], arguments: tuple[object, ...]) -> None:
        try:
            run(*arguments)
        except Exception:
            log.exception("unexpected error in a worker, which goes on")


def no_thread() -> OSError:
    return OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def unpin() -> None:
    """Have this thread run where the main one may: who started it may be pinned to a processor, that of its ring."""
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # all of them have been switched off: it stays where the kernel has put it
