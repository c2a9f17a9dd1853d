"""Threads that end with the block that has them, also where that ends before them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, ParamSpec, TypeVar

from overlayfs_py.images.model import ImageError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Workers:
    """A pool of threads; when an exception ends the block, what they do ends at its next `check`, or read of `input`.

    So an interrupt, or the failure of one, doesn't wait for all the others have to do.
    """

    __slots__ = ("_pool", "_stop")

    def __init__(self, count: int | None) -> None:
        self._pool = ThreadPoolExecutor(max_workers=count)
        self._stop = threading.Event()

    def submit(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        return self._pool.submit(work, *args, **kwargs)

    def check(self) -> None:
        """Raises ImageError where the work is no longer wanted."""
        if self._stop.is_set():
            raise ImageError("given up")

    def input(self, file: IO[bytes]) -> Input:
        """The file, to be read by a worker."""
        return Input(file, self)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(cancel_futures=error is not None)


class Input:
    """A file that a worker reads while its work is wanted."""

    __slots__ = ("_file", "_workers")

    def __init__(self, file: IO[bytes], workers: Workers) -> None:
        self._file = file
        self._workers = workers

    def read(self, size: int, /) -> bytes:
        """Raises ImageError where it is not wanted any more."""
        self._workers.check()
        return self._file.read(size)
