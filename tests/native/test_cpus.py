"""The native engine, over both transports, whichever processors its daemon and its clients are on."""

import contextlib
import errno
import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Layers
from tests.support.mounts import Mount, our_mount
from tests.support.uring import switch_kept

_SYSTEM: Final = Path("/sys/devices/system/cpu")
_CPUS: Final = sorted(os.sched_getaffinity(0))
_FIRST, _LAST = _CPUS[0], _CPUS[-1]
_LIMIT: Final = 60.0  # seconds of a mount, so that a request that no ring serves doesn't wait for ever
# Seconds. Where one processor is left, and threads wake one another there all the time, Linux 6.18 was seen to let
# others that could run wait for a minute, its own among them.
_PAUSE: Final = 0.02


@pytest.fixture(params=["off", "on"])
def uring(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both transports; the machine's switch is as it was afterwards."""
    with switch_kept() if request.param == "on" else contextlib.nullcontext():
        yield str(request.param)


@pytest.fixture(autouse=True)
def processors() -> Iterator[int]:
    """A lock of those who name processors, shared until one of them switches a processor off."""
    with open(_SYSTEM / "online", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield lock.fileno()


@contextlib.contextmanager
def on(cpus: set[int]) -> Iterator[None]:
    """This thread, and the processes that it starts, on these processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def mounted(layers: Layers, uring: str) -> contextlib.AbstractContextManager[Mount]:
    (layers.lower / "lower").write_bytes(b"lower" * 50_000)
    options = f"engine=native,uring={uring}"
    return our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options, limit=_LIMIT)


def use(mnt: Path, name: str) -> None:
    """Requests of many kinds from where this thread runs; nothing of them comes from a cache."""
    path = mnt / name
    data = name.encode() * 20_000
    path.write_bytes(data)
    assert path.read_bytes() == data
    path.rename(mnt / f"{name}.renamed")
    assert not path.exists()
    assert f"{name}.renamed" in os.listdir(mnt)
    (mnt / f"{name}.renamed").unlink()
    with open(mnt / "lower", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == b"lower" * 50_000


def use_from_everywhere(mnt: Path, tag: str) -> None:
    for cpu in sorted(os.sched_getaffinity(0)):
        with on({cpu}):
            use(mnt, f"{tag}-{cpu}")


def affinities(pid: int) -> list[set[int]]:
    """The processors of each thread of a process."""
    return [os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{pid}/task")]


def pinned(pid: int) -> list[int]:
    """The processors of the threads of a process that have only one."""
    return sorted(min(cpus) for cpus in affinities(pid) if len(cpus) == 1)


@contextlib.contextmanager
def without_last(lock: int, live: Mount | None = None) -> Iterator[None]:
    """Switch the last processor off; where the machine forbids that, keep a daemon's threads, and this, from it."""
    assert _FIRST != _LAST, "this takes two processors"
    control = _SYSTEM / f"cpu{_LAST}" / "online"
    # Nobody else may count on that processor meanwhile.
    fcntl.flock(lock, fcntl.LOCK_EX)
    before = os.sched_getaffinity(0)
    try:
        try:
            control.write_text("0")
        except OSError as error:
            assert error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EBUSY, errno.EOPNOTSUPP)
            if live is not None:
                move(live.pid, _FIRST)
            with on(before - {_LAST}):
                yield
        else:
            assert str(_LAST) not in (_SYSTEM / "online").read_text()
            yield
    finally:
        if control.exists() and control.read_text() == "0\n":
            control.write_text("1")
        os.sched_setaffinity(0, before)
        fcntl.flock(lock, fcntl.LOCK_SH)


def move(pid: int, cpu: int) -> None:
    """Every thread of a process to one processor."""
    done = subprocess.run(["taskset", "-apc", str(cpu), str(pid)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done


def test_a_client_on_each_processor_is_served(layers: Layers, uring: str) -> None:
    with mounted(layers, uring) as live:
        use_from_everywhere(layers.mnt, "a")
        if uring == "on":
            deadline = time.monotonic() + _LIMIT
            # A thread that another one has just begun is where that one is at first.
            # Of one processor all threads have only that.
            while len(_CPUS) > 1 and pinned(live.pid) != _CPUS:
                assert time.monotonic() < deadline, affinities(live.pid)
                time.sleep(0.01)


@pytest.mark.parametrize("cpu", [_FIRST, _LAST])
def test_a_daemon_confined_to_one_processor_stays_there_and_serves_all(layers: Layers, uring: str, cpu: int) -> None:
    with contextlib.ExitStack() as stack:
        with on({cpu}):
            live = stack.enter_context(mounted(layers, uring))
        use_from_everywhere(layers.mnt, "a")
        assert all(cpus == {cpu} for cpus in affinities(live.pid))


def test_a_daemon_moved_while_it_serves_goes_on(layers: Layers, uring: str) -> None:
    with mounted(layers, uring) as live:
        for cpu in (_LAST, _FIRST):
            move(live.pid, cpu)
            use_from_everywhere(layers.mnt, f"on-{cpu}")
            assert all(cpus == {cpu} for cpus in affinities(live.pid))


def test_a_processor_that_goes_and_comes_back_loses_no_request(layers: Layers, uring: str, processors: int) -> None:
    with mounted(layers, uring) as live:
        stop = threading.Event()
        failures: list[BaseException] = []
        rounds = [0, 0]

        def busy(number: int) -> None:
            try:
                while not stop.is_set():
                    use(layers.mnt, f"busy-{number}")
                    rounds[number] += 1
                    time.sleep(_PAUSE)
            except (OSError, AssertionError) as error:
                failures.append(error)

        threads = [threading.Thread(target=busy, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(2):
                with without_last(processors, live):
                    use(layers.mnt, f"off-{turn}")
                use_from_everywhere(layers.mnt, f"back-{turn}")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert min(rounds) > 0


def test_a_processor_switched_on_after_the_mount_is_served(layers: Layers, uring: str, processors: int) -> None:
    with contextlib.ExitStack() as stack:
        with without_last(processors):
            stack.enter_context(mounted(layers, uring))
            use(layers.mnt, "before")
        use_from_everywhere(layers.mnt, "after")
