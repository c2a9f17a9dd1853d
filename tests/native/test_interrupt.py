"""Signals for who waits for a copy-up: one who is killed need not wait for its end, and leaves nothing half done."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.native import trickle
from tests.native.other import served_by
from tests.support.mounts import CONNECTIONS, our_mount
from tests.support.waiting import wait_until

PATIENCE = 30.0  # seconds; copying the large file would take many minutes

WRITE = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_WRONLY), b'W', 0)"
# A first signal that is no reason to end comes before the one that is.
HANDLED = "import signal; signal.signal(signal.SIGUSR1, lambda *_: None); " + WRITE
# The errno that it gets is its status.
ANSWERED = f"""
try:
    {WRITE}
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.fixture
def io() -> str:
    return "cached"


@pytest.fixture
def mnt(layers: Layers, uring: str, io: str) -> Iterator[Path]:
    options = f"engine=native,uring={uring},io={io}"
    with (
        served_by("tests.native.trickle", layers.lower),
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options),
    ):
        yield layers.mnt


@contextlib.contextmanager
def client(mnt: Path, script: str = WRITE) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", script, mnt / os.fsdecode(trickle.NAME)])
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)


def waits(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process waits for an answer of a filesystem's daemon."""
    assert process.poll() is None, "it need not wait"
    wait = Path("/proc", str(process.pid), "wchan").read_text()
    return "fuse" in wait or wait == "request_wait_answer"


def sound(layers: Layers) -> None:
    """Nothing is left of what was given up, and the file is what it was."""
    wait_until(lambda: not os.listdir(layers.work / "work"))
    assert not (layers.upper / "large").exists()
    with open(layers.mnt / "large", "rb") as file:
        assert file.read(3) == b"xxx"
        assert os.fstat(file.fileno()).st_size == trickle.SIZE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_is_killed_does_not_wait_for_the_end_of_it(layers: Layers, mnt: Path, number: signal.Signals) -> None:
    with client(mnt) as process:
        wait_until(lambda: waits(process))
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number
    sound(layers)


def test_a_signal_that_is_handled_ends_no_copy_up_and_hides_none_that_kills(layers: Layers, mnt: Path) -> None:
    with client(mnt, HANDLED) as process:
        wait_until(lambda: waits(process))
        process.send_signal(signal.SIGUSR1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    sound(layers)


# Where the kernel asks for opening, it has several wait for one copy; writers it has wait for each other first.
@pytest.mark.parametrize("io", ["passthrough"])
@pytest.mark.parametrize("killed", [0, 1])
def test_who_waits_for_the_same_copy_goes_on_when_another_is_killed(layers: Layers, mnt: Path, killed: int) -> None:
    with client(mnt) as first:
        wait_until(lambda: waits(first))
        with client(mnt) as second:
            wait_until(lambda: waits(second))
            processes = [first, second]
            processes[killed].kill()
            assert processes[killed].wait(PATIENCE) == -signal.SIGKILL
            other = processes[1 - killed]
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(0.5)
            assert waits(other)
            other.kill()
            assert other.wait(PATIENCE) == -signal.SIGKILL
    sound(layers)


@pytest.mark.parametrize("engine", ["native,uring=off", "native,uring=on", "portable"])
def test_a_copy_up_ends_with_its_connection(layers: Layers, engine: str) -> None:
    with (
        served_by("tests.native.trickle", layers.lower),
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine={engine}") as live,
        client(layers.mnt, ANSWERED) as process,
    ):
        wait_until(lambda: waits(process))
        time.sleep(0.1)
        (CONNECTIONS / str(live.connection) / "abort").write_text("1")
        assert process.wait(PATIENCE) in {errno.ECONNABORTED, errno.ECANCELED}
    assert os.listdir(layers.upper) == os.listdir(layers.work / "work") == []


def test_a_daemon_that_takes_too_long_is_given_up(layers: Layers, uring: str) -> None:
    options = f"engine=native,uring={uring},request_timeout=1"
    with (
        served_by("tests.native.trickle", layers.lower),
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options),
        client(layers.mnt, ANSWERED) as process,
    ):
        wait_until(lambda: waits(process))
        # The kernel looks for such requests every 15 seconds (FUSE_TIMEOUT_TIMER_FREQ).
        assert process.wait(15 + PATIENCE) in {errno.ECONNABORTED, errno.ECANCELED}
    assert os.listdir(layers.upper) == os.listdir(layers.work / "work") == []
