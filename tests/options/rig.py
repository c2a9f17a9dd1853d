"""Mounts with options, processes of other users, and what of the daemon's system calls can be seen from outside."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.conftest import Layers
from tests.support.mounts import AnyPath, Mount, our_mount
from tests.support.waiting import wait_until

NOBODY: Final = 65534
_LIMIT: Final = 20  # seconds for anything a helper process does


def mounted(layers: Layers, *options: str, log: Path | None = None) -> contextlib.AbstractContextManager[Mount]:
    """The usual stack with these options."""
    return our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, ",".join(options), log=log)


def run_as(uid: int, *words: AnyPath, gid: int | None = None) -> subprocess.CompletedProcess[str]:
    """A program run by another user, without groups but `gid`, which is `uid` where it is not given."""
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid if gid is None else gid}", "--clear-groups"]
    return subprocess.run(
        [*user, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT, check=False
    )


def python_as(uid: int, script: str, *words: AnyPath, gid: int | None = None) -> str:
    """What a line of Python prints that another user runs, or the name of the error that ended it."""
    wrapped = f"import errno, os, sys\ntry:\n    {script}\nexcept OSError as e:\n    print(errno.errorcode[e.errno])"
    done = run_as(uid, "/usr/bin/python3", "-c", wrapped, *words, gid=gid)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def traced(pid: int, calls: Sequence[str], into: Path, inject: str = "") -> Iterator[Callable[[], list[str]]]:
    """Trace a process and its threads; the function given is the lines seen so far, complete once the block ends.

    `inject` is what to do with some of these calls instead (strace(1), Tampering).
    """
    words = ["strace", "-f", "-qq", "-e", f"trace={','.join(calls)}", "-o", os.fspath(into), "-p", str(pid)]
    if inject:
        words += ["-e", f"inject={','.join(calls)}:{inject}"]
    tracer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: tracer.poll() is not None or all(_tracer(task) for task in _tasks(pid)))
        assert tracer.poll() is None, tracer.communicate()[1]
        yield lambda: into.read_text(errors="backslashreplace").splitlines()
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=_LIMIT)


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _tracer(task: Path) -> bool:
    try:
        return re.search(r"^TracerPid:\s*0$", (task / "status").read_text(), re.MULTILINE) is None
    except (FileNotFoundError, ProcessLookupError):
        # a thread that has ended
        return True


def program() -> list[str]:
    """The words that call the mount program."""
    return [sys.executable, "-m", "overlayfs_py"]


def mount_flags(mountpoint: Path) -> list[str]:
    """The options that /proc/mounts shows, those of the mount and of its filesystem."""
    return mount_fields(mountpoint)[3].split(",")


def mount_fields(mountpoint: Path) -> list[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split(" ")
        if fields[1] == os.fspath(mountpoint):
            return fields
    raise AssertionError("not mounted")


def overlay_marks(path: Path) -> dict[str, bytes]:
    """The marks of an object in a layer, in whichever namespace they are."""
    marks = {}
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(("trusted.overlay.", "user.overlay.")):
            marks[name] = os.getxattr(path, name, follow_symlinks=False)
    return marks


def error_of(call: Callable[[], object]) -> int:
    """The errno that a call fails with, 0 if it doesn't."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def holds_data(path: Path) -> bool:
    """Whether any part of a file is more than a hole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return error_of(lambda: os.lseek(descriptor, 0, os.SEEK_DATA)) != errno.ENXIO
    finally:
        os.close(descriptor)
