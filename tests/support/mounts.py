"""Mounts for tests: the kernel's overlayfs, ours, and fuse-overlayfs, each gone when its `with` block ends."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.syscalls import MNT_DETACH, mount, umount
from tests.support.uring import switch_kept, undisturbed

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CONNECTIONS: Final = Path("/sys/fs/fuse/connections")

LOST: Final = frozenset((errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ECANCELED, errno.EINTR))
"""What a process is told whose filesystem has died under it.

ECANCELED is what the kernel makes of a request that was in a ring. EINTR comes of one that it was copying into a ring:
the thread that does that is the daemon's, and with a SIGKILL pending it gets no more pages of its own memory.
"""

_START_LIMIT: Final = 30.0  # seconds until a mount must answer
_STOP_LIMIT: Final = 30.0  # seconds until a daemon must be gone once unmounted
_BAD_LOG: Final = re.compile(rb"Traceback \(most recent call last\)|unexpected|EIO answered", re.IGNORECASE)


class MountFailed(AssertionError):
    """A mount did not come up, did not go away, or its daemon misbehaved; the message holds the log."""


# The numbers of the FUSE connections that tests have made.
connections_made: Final[set[str]] = set()


@dataclass(slots=True)
class Mount:
    """A live mount: where it is, and for a FUSE one its daemon, connection number and log file."""

    path: bytes
    pid: int = 0
    connection: int = 0
    log: Path | None = None
    problems: list[str] = field(default_factory=list)


def escape(path: AnyPath) -> bytes:
    """A path as it has to be written inside `lowerdir=`: backslash, colon and comma escaped."""
    return re.sub(rb"([\\:,])", rb"\\\1", os.fsencode(path))


def layer_options(
    lowers: Sequence[AnyPath], upper: AnyPath | None = None, work: AnyPath | None = None, options: str | bytes = ""
) -> bytes:
    """The `-o` argument for a stack, topmost lower first."""
    parts = [b"lowerdir=" + b":".join(escape(lower) for lower in lowers)]
    if upper is not None:
        parts.append(b"upperdir=" + escape(upper))
    if work is not None:
        parts.append(b"workdir=" + escape(work))
    if options:
        parts.append(os.fsencode(options))
    return b",".join(parts)


def show_connections() -> None:
    """Mount the directory of FUSE connections (fusectl) in this mount namespace, unless it is mounted already."""
    if mounted_at(CONNECTIONS) is None:
        mount(b"fusectl", os.fsencode(CONNECTIONS), b"fusectl")


def mounted_at(mountpoint: AnyPath) -> str | None:
    """The `major:minor` of the topmost mount at a path in this mount namespace, or None; sends no request to it."""
    parent, name = os.path.split(os.path.abspath(os.fsencode(mountpoint)))
    wanted = os.path.join(os.path.realpath(parent), name)
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        if re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), fields[4]) == wanted:
            found = fields[2].decode()
    return found


def unmount(mountpoint: AnyPath, patience: float = 3.0) -> None:
    """Unmount, waiting up to `patience` seconds while busy; then detach it and raise MountFailed."""
    target = os.fsencode(mountpoint)
    deadline = time.monotonic() + patience
    while True:
        try:
            umount(target)
            return
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            with contextlib.suppress(OSError):
                umount(target, MNT_DETACH)
            raise MountFailed(f"cannot unmount {target!r}: {error.strerror}") from error


@contextlib.contextmanager
def kernel_mount(
    mountpoint: AnyPath,
    lowers: Sequence[AnyPath],
    upper: AnyPath | None = None,
    work: AnyPath | None = None,
    options: str | bytes = "",
    flags: int = 0,
) -> Iterator[Mount]:
    """The kernel's overlayfs on `mountpoint`, with MS_* `flags`; raises OSError when the kernel refuses."""
    target = os.fsencode(mountpoint)
    mount(b"overlay", target, b"overlay", flags, layer_options(lowers, upper, work, options))
    try:
        yield Mount(target)
    except BaseException:
        with contextlib.suppress(MountFailed):
            unmount(target)
        raise
    unmount(target)


@contextlib.contextmanager
def our_mount(
    mountpoint: AnyPath,
    lowers: Sequence[AnyPath],
    upper: AnyPath | None = None,
    work: AnyPath | None = None,
    options: str | bytes = "",
    log: AnyPath | None = None,
    *,
    daemonise: bool = False,
    clean_log: bool = True,
    limit: float = 300.0,
) -> Iterator[Mount]:
    """Our filesystem on `mountpoint`.

    The log is the daemon's standard error, in a temporary file unless `log` names one. Raises MountFailed when the
    mount does not come up, cannot be unmounted, takes longer than `limit` seconds altogether (its connection is
    aborted then), when the daemon ends with another status than 0, or, with `clean_log`, when it logged a traceback
    or an unexpected error. OVERLAYFS_PY_TEST_OPTIONS in the environment holds further options, to try all tests with;
    what a test asks for itself goes before them.
    """
    options = b",".join((os.fsencode(options), *_further(os.fsencode(options))))
    command = [sys.executable.encode(), b"-m", b"overlayfs_py", *([] if daemonise else [b"-f"]), b"-o"]
    command += [layer_options(lowers, upper, work, options), os.fsencode(mountpoint)]
    with contextlib.ExitStack() as mounted:
        daemon = _daemon(mountpoint, command, log, daemonise=daemonise, clean_log=clean_log, limit=limit)
        # What a mount speaks over is settled when it is made.
        with switch_kept() if b"uring=on" in options else undisturbed():
            live = mounted.enter_context(daemon)
        if (sanitized := os.environ.get("OVERLAYFS_PY_TEST_SANITIZED")) and live.pid:
            maps = Path(f"/proc/{live.pid}/maps").read_text()
            assert "libasan" in maps and f"{Path(sanitized).parent}/overlayfs_py/" in maps
        yield live


def _further(options: bytes) -> list[bytes]:
    """The options of OVERLAYFS_PY_TEST_OPTIONS that go with those given."""
    given = options.split(b",")
    names = {option.partition(b"=")[0] for option in given}
    found = []
    for option in os.fsencode(os.environ.get("OVERLAYFS_PY_TEST_OPTIONS", "")).split(b","):
        name = option.partition(b"=")[0]
        excluded = b"engine=portable" in given or (name == b"io" and b"writeback" in names)
        if name not in names and not (name in (b"uring", b"io") and excluded):
            found.append(option)
    return found


@contextlib.contextmanager
def fuse_overlayfs_mount(
    mountpoint: AnyPath,
    lowers: Sequence[AnyPath],
    upper: AnyPath | None = None,
    work: AnyPath | None = None,
    options: str | bytes = "",
    limit: float = 300.0,
) -> Iterator[Mount]:
    """Another implementation, for comparison; see `our_mount`."""
    command = [b"fuse-overlayfs", b"-f", b"-o", layer_options(lowers, upper, work, options), os.fsencode(mountpoint)]
    with _daemon(mountpoint, command, None, daemonise=False, clean_log=False, limit=limit) as live:
        yield live


@contextlib.contextmanager
def _daemon(
    mountpoint: AnyPath, command: list[bytes], log: AnyPath | None, *, daemonise: bool, clean_log: bool, limit: float
) -> Iterator[Mount]:
    target = os.fsencode(mountpoint)
    if log is None:
        descriptor, name = tempfile.mkstemp(prefix="overlayfs-py-log-")
        os.close(descriptor)
        log_path = Path(name)
    else:
        log_path = Path(os.fsdecode(log))
    live = Mount(target, log=log_path)
    watchdog = threading.Timer(limit, _abort, (live, limit))
    watchdog.daemon = True
    before = mounted_at(target)
    process = _start(command, log_path)
    try:
        watchdog.start()
        _wait_until_answers(live, process, before, daemonise=daemonise)
        try:
            yield live
        except BaseException as error:
            error.add_note(f"daemon log:\n{_tail(log_path)}")
            raise
    except BaseException:
        with contextlib.suppress(MountFailed):
            _stop(live, process, daemonise=daemonise)
        raise
    else:
        _stop(live, process, daemonise=daemonise)
        if clean_log and _BAD_LOG.search(log_path.read_bytes()):
            live.problems.append("the daemon logged an unexpected error")
        if live.problems:
            raise MountFailed(f"{'; '.join(live.problems)}\ndaemon log:\n{_tail(log_path)}")
    finally:
        watchdog.cancel()
        if log is None:
            log_path.unlink(missing_ok=True)


def _start(command: list[bytes], log: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH", "")]))
    if sanitized := environment.get("OVERLAYFS_PY_TEST_SANITIZED"):
        # tools/sanitized --daemons
        for line in Path(sanitized).read_text().splitlines():
            name, _, value = line.partition("=")
            environment[name] = value
    with log.open("ab") as sink:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment, start_new_session=True
        )


def _wait_until_answers(live: Mount, process: subprocess.Popen[bytes], before: str | None, *, daemonise: bool) -> None:
    def failed(why: str) -> MountFailed:
        assert live.log is not None
        return MountFailed(f"{live.path!r} {why}\ndaemon log:\n{_tail(live.log)}")

    def come_up() -> bool:
        if daemonise:
            return process.poll() is not None
        if process.poll() is not None:
            raise failed(f"was not mounted: status {process.returncode}")
        return mounted_at(live.path) != before

    if not _within(_START_LIMIT, come_up):
        raise failed(f"was not mounted within {_START_LIMIT} s")
    if daemonise and process.returncode != 0:
        raise failed(f"was not mounted: status {process.returncode}")
    device = mounted_at(live.path)
    if device is None or device == before:
        raise failed("is not a mountpoint although the program said so")
    live.connection = int(device.partition(":")[2])
    connections_made.add(str(live.connection))
    live.pid = _daemon_of(live.path) if daemonise else process.pid
    patience = threading.Timer(_START_LIMIT, _abort, (live, _START_LIMIT))
    patience.daemon = True
    patience.start()
    try:
        os.stat(live.path)
    except OSError as error:
        raise failed(f"is mounted but its root does not answer: {error.strerror}") from error
    finally:
        patience.cancel()


def _stop(live: Mount, process: subprocess.Popen[bytes], *, daemonise: bool) -> None:
    try:
        if live.connection and mounted_at(live.path) is not None:
            unmount(live.path)
    finally:
        if not daemonise:
            try:
                status = process.wait(_STOP_LIMIT if live.connection else 0.1)
            except subprocess.TimeoutExpired:
                _abort(live, None)
                process.kill()
                process.wait()
                live.problems.append(f"the daemon was still there {_STOP_LIMIT} s after the unmount")
            else:
                if status != 0:
                    live.problems.append(f"the daemon ended with status {status}")
        elif live.pid and not _within(_STOP_LIMIT, lambda: _reaped(live.pid)):
            _abort(live, None)
            os.kill(live.pid, signal.SIGKILL)
            _within(5.0, lambda: _reaped(live.pid))
            live.problems.append(f"the daemon was still there {_STOP_LIMIT} s after the unmount")


def _abort(live: Mount, limit: float | None) -> None:
    if limit is not None:
        live.problems.append(f"took longer than {limit} s; its connection was aborted")
    # Once unmounted, the number may be that of somebody else's connection.
    if live.connection and mounted_at(live.path) is not None:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            (CONNECTIONS / str(live.connection) / "abort").write_text("1")


def _daemon_of(mountpoint: bytes) -> int:
    """The process that serves a daemonised mount, which tests adopt as subreaper."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
                if mountpoint in words and any(b"overlayfs" in word for word in words):
                    return int(entry)
    return 0


def _reaped(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return not Path("/proc", str(pid)).exists()


def _within(limit: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-6000:].decode(errors="backslashreplace")
    except FileNotFoundError:
        return "(no log)"
