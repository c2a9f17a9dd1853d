"""What a request carries beside the objects it names: who asks, what to change, and work that may block."""

from __future__ import annotations

import errno
import os

from overlayfs_py.records import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, TypeVar

    Result = TypeVar("Result")
    InGroup = Callable[[int], bool]
    Steps = Generator["Job", None, Result]
    """An operation in steps: each job it yields must be executed before it is resumed."""
else:
    # Of use to type checkers alone.
    InGroup = Steps = None


class Caller(NamedTuple):
    """The process a request comes from, as the kernel names it (`struct fuse_in_header`).

    `labels` are the security xattrs, (key, value), that what it makes is to have.
    """

    uid: int
    gid: int
    pid: int
    umask: int
    labels: tuple[tuple[bytes, bytes], ...] = ()


class Changes(NamedTuple):
    """What setattr is to change; None leaves a field as it is. Times are nanoseconds since the epoch, or sys.files.NOW.

    `clear_set_ids` takes set-user-id and set-group-id, where an engine has told the kernel to leave that to it;
    `in_group` tells whether who asks is in a group, of an id on disk, or may do as if. Without it, it is so.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    clear_set_ids: bool = False
    in_group: InGroup | None = None


class Attr(NamedTuple):
    """The attributes of a node as the mount shows them: `struct stat`, times in nanoseconds, blocks of 512 bytes."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    blksize: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Job:
    """Work that may block, handed out by an operation.

    The engine calls `run` with no lock held and sends the operation on when it has returned, or throws into it what
    it raised. Several operations may hand out one job: it is run once, the one that handed it out first goes on first,
    as the outcome is its to commit, and the others after that.

    The engine may put into `unwanted` what tells whether nobody waits for it any more: work that takes long looks there
    between its pieces, and ends with EINTR.
    """

    __slots__ = ("error", "finished", "run", "unwanted")

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.finished = False
        self.error: OSError | None = None
        self.unwanted: Callable[[], bool] = _never

    def execute(self) -> None:
        """Run once and keep the outcome; raises nothing but what is no OSError."""
        try:
            self.run()
        except OSError as error:
            # Where it was raised would keep what was worked with, and the job itself, until the next collection.
            self.error = error.with_traceback(None)
        except MemoryError:
            self.error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.finished = True


def awaited(job: Job, *, in_place: bool = False) -> Steps[None]:
    """Hand out a job that no other operation knows of, or execute it here; raises what it raised."""
    if in_place:
        job.execute()
    else:
        yield job
    # What is raised keeps the frames that it passes, which know the job, or are this one.
    error, job.error = job.error, None
    if error is not None:
        try:
            raise error
        finally:
            del error


def _never() -> bool:
    return False


def drive(steps: Generator[Job, None, Result]) -> Result:
    """Run an operation to its end, executing its jobs in place: the engine of tests and of the library."""
    try:
        while True:
            job = next(steps)
            if not job.finished:
                job.execute()
    except StopIteration as stop:
        value: Any = stop.value
        return value  # type: ignore[no-any-return]
    finally:
        steps.close()
