"""The mount helper: for every way in which a daemon can fail it, nothing is left."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

import mount_helper
from mount_helper import HelperError, Request, fusermount, handover, kernel
from tests.conftest import Layers
from tests.support.mounts import REPOSITORY, mounted_at
from tests.support.syscalls import mount, umount

_LIMIT: Final = 20  # seconds for a child process

Act = Callable[[int], None]


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_PATIENCE", 0.2)


def request(mountpoint: Path) -> Request:
    return Request(
        mountpoint=os.fsencode(mountpoint), source=b"test", flags=0, allow_other=False, default_permissions=True
    )


@contextlib.contextmanager
def daemon(act: Act) -> Iterator[tuple[socket.socket, int]]:
    """A child that takes the FUSE connection and does `act` with it; the helper's end of the socket, and its pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _, descriptors, _, _ = socket.recv_fds(theirs, 1000, 1)
            act(descriptors[0])
        finally:
            os._exit(0)
    theirs.close()
    try:
        with ours:
            yield ours, pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def end_at_once(connection: int) -> None:
    os.close(connection)


def never_answer(connection: int) -> None:
    time.sleep(_LIMIT)


def read_and_never_answer(connection: int) -> None:
    os.read(connection, 1 << 20)
    time.sleep(_LIMIT)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (end_at_once, "daemon ended|not answer"),
        (never_answer, "within 0.3 seconds"),
        (read_and_never_answer, "within 0.3 seconds"),
    ],
)
def test_a_daemon_that_does_not_serve_leaves_no_mount(layers: Layers, act: Act, says: str) -> None:
    with daemon(act) as (channel, pid):
        with pytest.raises(HelperError, match=says):
            mount_helper.hand_over(request(layers.mnt), channel, pid, seconds=0.3)
        assert mounted_at(layers.mnt) is None


def test_nobody_unmounts_before_the_helper_has_its_answer(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    result = layers.base / "result"
    probe = handover._probe

    def late_probe(root: int, device: bytes, channel: socket.socket, aside: Request | None) -> tuple[int, int]:
        time.sleep(0.2)
        return probe(root, device, channel, aside)

    monkeypatch.setattr(handover, "_probe", late_probe)

    def try_to_unmount(connection: int) -> None:
        try:
            umount(os.fsencode(layers.mnt))
        except OSError as error:
            result.write_text("busy" if error.errno == errno.EBUSY else str(error))
        else:
            result.write_text("unmounted")

    with daemon(try_to_unmount) as (channel, pid), pytest.raises(HelperError):
        mount_helper.hand_over(request(layers.mnt), channel, pid, seconds=_LIMIT)
    assert result.read_text() == "busy"


def test_a_daemon_that_is_gone_before_the_mount_leaves_no_mount(layers: Layers) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours, pytest.raises(HelperError, match="daemon ended"):
        mount_helper.hand_over(request(layers.mnt), ours, os.getpid(), seconds=0.3)
    assert mounted_at(layers.mnt) is None


def test_the_daemon_is_told_why_a_mount_was_refused(layers: Layers) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with pytest.raises(HelperError, match=r"cannot mount on .*gone"):
            mount_helper.hand_over(request(layers.base / "gone"), ours, os.getpid(), seconds=0.3)
        assert theirs.recv(1000).startswith(mount_helper.FAILED + b"cannot mount")


def test_a_signal_while_the_root_is_awaited_leaves_no_mount(layers: Layers) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with daemon(never_answer) as (channel, pid):
            # To this thread: another one, as a parallel run has, would take a signal that is sent to the process.
            asker = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM))
            asker.start()
            with pytest.raises(HelperError, match="interrupted"):
                mount_helper.hand_over(request(layers.mnt), channel, pid, seconds=_LIMIT)
            asker.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert mounted_at(layers.mnt) is None
    assert seen == [signal.SIGTERM]


def test_topmost_mount_is_found_by_any_name(layers: Layers) -> None:
    odd = layers.add("a b\tc\\d#\n")
    target = os.fsencode(odd)
    assert kernel.topmost(target) is None
    mount(b"one", target, b"tmpfs")
    mount(b"two", target, b"tmpfs")
    try:
        device = os.stat(target).st_dev
        assert kernel.topmost(target) == b"%d:%d" % (os.major(device), os.minor(device))
    finally:
        umount(target)
        umount(target)


def test_unmount_spares_a_mount_that_is_not_the_one_meant(layers: Layers) -> None:
    target = os.fsencode(layers.mnt)
    mount(b"one", target, b"tmpfs")
    one = kernel.topmost(target)
    mount(b"two", target, b"tmpfs")
    two = kernel.topmost(target)
    try:
        mount_helper.unmount(target, one)
        assert kernel.topmost(target) == two
    finally:
        mount_helper.unmount(target, two)
        mount_helper.unmount(target, one)
    assert kernel.topmost(target) is None
    mount_helper.unmount(target)


def test_only_a_mount_without_a_daemon_is_unmounted_as_dead(layers: Layers) -> None:
    target = os.fsencode(layers.mnt)
    mount(b"one", target, b"tmpfs")
    try:
        mount_helper.unmount_if_dead(target)
        assert kernel.topmost(target) is not None
    finally:
        umount(target)
    connection = kernel.open_device()
    kernel.mount(request(layers.mnt), connection)
    os.close(connection)
    assert kernel.topmost(target) is not None
    mount_helper.unmount_if_dead(target)
    assert kernel.topmost(target) is None
    mount_helper.unmount_if_dead(target)


def test_unmount_of_a_busy_mount_fails_unless_it_is_lazy(layers: Layers) -> None:
    target = os.fsencode(layers.mnt)
    mount(b"one", target, b"tmpfs")
    held = os.open(target, os.O_RDONLY)
    try:
        with pytest.raises(HelperError, match=r"cannot unmount .*busy"):
            mount_helper.unmount(target)
        mount_helper.unmount(target, lazy=True)
    finally:
        os.close(held)
    assert kernel.topmost(target) is None


@pytest.mark.parametrize(
    ("number", "path", "says"),
    [
        (errno.ENOENT, kernel.DEVICE, "modprobe fuse"),
        (errno.EACCES, kernel.DEVICE, "cannot open /dev/fuse: Permission denied"),
        (errno.ENODEV, b"/m", "modprobe fuse"),
        (errno.EINVAL, b"/m\n", r"cannot mount on '/m\\x0a': Invalid argument"),
    ],
)
def test_errors_say_what_to_do(number: int, path: bytes, says: str) -> None:
    error = OSError(number, os.strerror(number), path)
    with pytest.raises(HelperError, match=says):
        raise kernel.explain(error, path)


def test_lack_of_fusermount_is_named(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(HelperError, match="install the package fuse3"):
        patch.setenv("PATH", os.fspath(layers.base))
        fusermount.mount(request(layers.mnt))


def test_the_helper_imports_the_standard_library_alone() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mount_helper; "
        "print(*{m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - {'__main__'})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, REPOSITORY], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mount_helper"]
