"""Running part of a test without privilege, as uid 0 of a user namespace."""

import contextlib
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.support.syscalls import CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE, MS_REC, become_subreaper, mount, unshare

T = TypeVar("T")


def in_user_namespace(work: Callable[[], T], limit: float) -> T:
    """Run `work` in a child process in new user and mount namespaces, and return what it returns, which gets pickled.

    The ids of the namespace are those outside, so that root's files can be read, but no capability reaches outside.
    Raises AssertionError with the child's traceback when `work` raises, and when it takes longer than `limit` seconds;
    then all it has started is killed.
    """
    ready_read, ready_write = os.pipe()
    mapped_read, mapped_write = os.pipe()
    result_read, result_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(result_read)
        status = 1
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNS)
            os.write(ready_write, b".")
            os.read(mapped_read, 1)
            status = _child(work, result_write)
        finally:
            os._exit(status)
    os.close(result_write)
    killer = threading.Timer(limit, _kill_all, (pid,))
    try:
        os.read(ready_read, 1)
        for table in ("uid_map", "gid_map"):
            Path("/proc", str(pid), table).write_text("0 0 65536\n")
        os.write(mapped_write, b".")
        killer.start()
        with os.fdopen(result_read, "rb") as stream:
            data = stream.read()
    finally:
        killer.cancel()
        for descriptor in (ready_read, ready_write, mapped_read, mapped_write):
            os.close(descriptor)
        _, status = os.waitpid(pid, 0)
    assert data, f"the child in the user namespace ended with wait status {status} and no result"
    failed, value = pickle.loads(data)
    if failed:
        raise AssertionError(f"in the user namespace: {value}")
    result: T = value
    return result


def _child(work: Callable[[], T], result: int) -> int:
    try:
        mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
        become_subreaper()
        answer: tuple[bool, object] = (False, work())
    except BaseException:  # noqa: BLE001 - whatever it was, the parent reports it
        answer = (True, traceback.format_exc())
    sys.stdout.flush()
    with os.fdopen(result, "wb") as stream:
        pickle.dump(answer, stream)
    return 0


def _kill_all(pid: int) -> None:
    for child in _descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """A process and all below it, those first."""
    found = []
    for table in Path("/proc", str(pid), "task").glob("*/children"):
        for child in table.read_text().split():
            found += _descendants(int(child))
    return [*found, pid]
