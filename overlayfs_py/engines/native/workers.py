"""Threads for what may block: started when there is work for them, and kept.

concurrent.futures does more, for those who wait for an outcome, and takes 5 ms to load.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_Task = tuple[Callable[..., object], tuple[Any, ...]]


class _Worker:
    """A thread, the task it is given while it is idle, and the lock that it waits for then."""

    __slots__ = ("ready", "task", "thread")

    def __init__(self, task: _Task) -> None:
        self.task: _Task | None = task
        self.ready = threading.Lock()
        self.ready.acquire()
        self.thread: threading.Thread


class Workers:
    """At most `most` threads, each of which calls `begin` first."""

    __slots__ = ("_all", "_backlog", "_begin", "_idle", "_lock", "_most")

    def __init__(self, most: int, begin: Callable[[], None]) -> None:
        self._most = most
        self._begin = begin
        # Guards all that follows.
        self._lock = threading.Lock()
        self._all: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._backlog: deque[_Task] = deque()

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have a thread call `function`; what that raises is logged."""
        task = function, arguments
        with self._lock:
            if self._idle:
                # The one that was busy last, whose memory is warm.
                worker = self._idle.pop()
                worker.task = task
                worker.ready.release()
            elif len(self._all) < self._most:
                worker = _Worker(task)
                worker.thread = threading.Thread(target=self._work, args=(worker,), name=f"job_{len(self._all)}")
                self._all.append(worker)
                worker.thread.start()
            else:
                self._backlog.append(task)

    def shutdown(self) -> None:
        """Wait until all that was submitted is done; nothing may be submitted after that."""
        with self._lock:
            self._most = 0
            for worker in self._idle:
                worker.ready.release()
        for worker in self._all:
            worker.thread.join()

    def _work(self, worker: _Worker) -> None:
        self._begin()
        while worker.task is not None:
            function, arguments = worker.task
            try:
                function(*arguments)
            except Exception:
                log.exception("unexpected error in a job")
            # What it holds is not to live until the next task comes.
            worker.task = None
            del function, arguments
            with self._lock:
                if self._backlog:
                    worker.task = self._backlog.popleft()
                    continue
                if not self._most:
                    return
                self._idle.append(worker)
            worker.ready.acquire()
