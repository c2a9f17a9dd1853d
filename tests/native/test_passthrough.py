"""io=passthrough: what the kernel serves without the daemon, and that nobody sees old data for it."""

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overlayfs_py.core.overlay import Overlay
from tests.native import wire
from tests.native.wire import served
from tests.support.mounts import Mount, kernel_mount, our_mount

THROUGH = "engine=native,io=passthrough"
OLD, NEW = b"old" * 5_000, b"new" * 5_000


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("lower", "upper", "work", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "f").write_bytes(OLD)
    return tmp_path


@pytest.fixture
def live(base: Path) -> Iterator[Mount]:
    with our_mount(base / "mnt", [base / "lower"], base / "upper", base / "work", THROUGH) as mounted:
        yield mounted


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The daemon asleep: whatever asks it something hangs until this ends."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def in_child(descriptor: int, code: str) -> bytes:
    """What a Python statement about the descriptor `fd` prints; raises TimeoutExpired after 20 s."""
    program = f"import os, sys; fd = {descriptor}; {code}"
    child = subprocess.Popen([sys.executable, "-c", program], pass_fds=[descriptor], stdout=subprocess.PIPE)
    # Not waited for where it hangs: it ends when the daemon is awake again.
    return child.communicate(timeout=20)[0]


def test_an_upper_file_is_read_and_written_while_the_daemon_sleeps(base: Path, live: Mount) -> None:
    fd = os.open(base / "mnt" / "new", os.O_RDWR | os.O_CREAT)
    try:
        # The first write has the kernel look for capabilities.
        os.write(fd, b"x")
        with stopped(live.pid):
            assert in_child(fd, "print(os.pwrite(fd, b'old' * 5000, 0))") == b"15000\n"
            assert in_child(fd, "sys.stdout.buffer.write(os.pread(fd, 20000, 0))") == OLD
        assert (base / "upper" / "new").read_bytes() == OLD
        assert os.fstat(fd).st_size == len(OLD)
    finally:
        os.close(fd)


def test_a_lower_file_of_a_mount_without_an_upper_is_read_while_the_daemon_sleeps(base: Path) -> None:
    with our_mount(base / "mnt", [base / "lower"], options=THROUGH) as live:
        fd = os.open(base / "mnt" / "f", os.O_RDONLY)
        try:
            with stopped(live.pid):
                assert in_child(fd, "sys.stdout.buffer.write(os.pread(fd, 20000, 0))") == OLD
        finally:
            os.close(fd)


def test_with_a_timeout_a_lower_file_that_is_replaced_shows_while_the_old_one_is_open(base: Path) -> None:
    with our_mount(base / "mnt", [base / "lower"], options=f"{THROUGH},timeout=0"):
        with (base / "mnt" / "f").open("rb", buffering=0) as before:
            assert before.read(3) == b"old"
            (base / "lower" / "new").write_bytes(NEW)
            (base / "lower" / "new").rename(base / "lower" / "f")
            assert (base / "mnt" / "f").read_bytes() == NEW


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC], ids=["rdwr", "wronly", "trunc"])
def test_handles_from_before_and_after_a_copy_up_see_one_file(base: Path, flags: int) -> None:
    name = base / "mnt" / "f"
    with contextlib.ExitStack() as handles:

        def opened(how: int) -> int:
            fd = os.open(name, how)
            handles.callback(os.close, fd)
            return fd

        before = opened(os.O_RDONLY)
        with mmap.mmap(before, 3, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == b"old"
            writer = opened(flags)
            after = opened(os.O_RDONLY)
            assert os.pwrite(writer, NEW, 0) == len(NEW)
            assert mapped[:] == b"new"
        assert os.pread(before, 20_000, 0) == os.pread(after, 20_000, 0) == NEW
        fcntl.flock(before, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert name.read_bytes() == NEW
    assert (base / "lower" / "f").read_bytes() == OLD


@pytest.mark.usefixtures("live")
def test_what_a_mapping_writes_shows_in_the_attributes(base: Path) -> None:
    name = base / "mnt" / "new"
    name.write_bytes(OLD)
    os.utime(name, ns=(0, 0))
    assert name.stat().st_mtime_ns == 0
    with name.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:3] = b"new"
        mapped.flush()
        assert os.fstat(file.fileno()).st_mtime_ns > 0
    assert name.stat().st_mtime_ns == (base / "upper" / "new").stat().st_mtime_ns > 0


@pytest.mark.usefixtures("live")
def test_a_file_keeps_its_data_through_unlink_rename_and_link_while_open(base: Path) -> None:
    one, two = base / "mnt" / "one", base / "mnt" / "two"
    one.write_bytes(OLD)
    with one.open("r+b", buffering=0) as first:
        one.rename(two)
        with two.open("r+b", buffering=0) as second:
            os.link(two, one)
            two.unlink()
            first.write(NEW)
            assert second.read() == NEW
            one.unlink()
            # No name leads to it any more; the daemon's descriptor does.
            with open(f"/proc/self/fd/{first.fileno()}", "rb") as third:
                assert third.read() == NEW
            assert os.fstat(first.fileno()).st_nlink == 0


def test_three_thousand_open_files_take_no_descriptors_of_the_daemon(base: Path, live: Mount) -> None:
    with contextlib.ExitStack() as files:
        for number in range(3_000):
            file = files.enter_context((base / "mnt" / str(number)).open("w+b", buffering=0))
            file.write(b"%d" % number)
            files.enter_context((base / "mnt" / str(number)).open("rb"))
        assert len(os.listdir(f"/proc/{live.pid}/fd")) < 1024
    assert (base / "mnt" / "2999").read_bytes() == b"2999"


def test_the_mount_serves_as_a_lower_layer_of_the_kernels_overlayfs(base: Path, live: Mount) -> None:
    for name in ("over", "over-upper", "over-work"):
        (base / name).mkdir()
    (base / "mnt" / "mine").write_bytes(OLD)
    with kernel_mount(base / "over", [base / "mnt"], base / "over-upper", base / "over-work"):
        assert (base / "over" / "mine").read_bytes() == (base / "over" / "f").read_bytes() == OLD
        (base / "over" / "mine").write_bytes(NEW)
        assert (base / "mnt" / "mine").read_bytes() == OLD
    assert live.pid


def test_layers_on_a_stacked_filesystem_are_served_by_the_daemon(base: Path) -> None:
    for name in ("stacked", "stacked-upper", "stacked-work"):
        (base / name).mkdir()
    with kernel_mount(base / "stacked", [base / "lower"], base / "stacked-upper", base / "stacked-work"):
        log = base / "log"
        with our_mount(base / "mnt", [base / "stacked"], options=THROUGH, log=log):
            assert (base / "mnt" / "f").read_bytes() == OLD
            (base / "mnt" / "f").open("rb").close()
        assert log.read_text().count("can't be passed through") == 1


def test_a_user_namespace_cannot_have_it_and_is_told(base: Path) -> None:
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work,{THROUGH}"
    command = ["unshare", "-Urm", sys.executable, "-m", "overlayfs_py", "-o", options, str(base / "mnt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == [
        "overlayfs-py: io=passthrough needs CAP_SYS_ADMIN outside of any user namespace; use io=cached"
    ]


# What of CREATE fails once the file is made: opening it, or telling its attributes, as core does with squashed owners.
_OPENING = "overlayfs_py.core.files.FileCache.held"
_TELLING = "overlayfs_py.engines.native.answers.shown_attr"
_SQUASHED = {"squash_uid": 0, "squash_gid": 0}


@pytest.mark.parametrize(("failing", "options"), [(_OPENING, {}), (_OPENING, _SQUASHED), (_TELLING, _SQUASHED)])
def test_nothing_is_kept_of_a_file_that_could_not_be_opened_when_it_was_made(
    base: Path, overlays: list[Overlay], monkeypatch: pytest.MonkeyPatch, failing: str, options: dict[str, Any]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with served(base, io="passthrough", flags2=0xFFFFFFFF, **options) as client:
        with monkeypatch.context() as patch:
            patch.setattr(failing, fail)
            create = struct.pack("=IIII", os.O_RDWR | os.O_CREAT, 0o100644, 0, 0) + b"new\0"
            assert client.ask(wire.CREATE, 1, create).error == errno.EMFILE
        (fs,) = overlays
        assert set(fs.nodes.by_id) == {1}
        assert not fs.files.entries
        node = client.look_up(b"new")
        (handle, _, _) = client.ask(wire.OPEN, node, struct.pack("=II", os.O_RDWR, 0)).unpack("QIi")
        assert fs.nodes.by_id[node].opens == 1
        # A second one is of no handle that there is.
        for _ in range(2):
            assert client.ask(wire.RELEASE, node, struct.pack("=QIIQ", handle, 0, 0, 0)).error == 0
        assert fs.nodes.by_id[node].opens == 0
        client.tell(wire.FORGET, node, struct.pack("=Q", 1))
        assert set(fs.nodes.by_id) == {1}
