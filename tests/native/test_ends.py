"""A connection that ends under load: every waiter gets an error, the daemon is gone, and the next mount is sound."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.mounts import CONNECTIONS, LOST, REPOSITORY, connections_made, mounted_at, our_mount, unmount

ROUNDS = int(os.environ.get("OVERLAYFS_PY_TEST_ROUNDS", "5"))
PATIENCE = 30.0  # seconds
WHOLE = b"x" * 5000


class Client:
    """A thread that does one thing to a mount, again and again, until that fails."""

    def __init__(self, mnt: Path, number: int, act: Callable[[Path, int, int], object]) -> None:
        self.error: int | None = None
        self.count = 0
        self.thread = threading.Thread(target=self._run, args=(mnt, number, act), daemon=True)
        self.thread.start()

    def _run(self, mnt: Path, number: int, act: Callable[[Path, int, int], object]) -> None:
        try:
            while True:
                act(mnt, number, self.count)
                self.count += 1
        except OSError as error:
            self.error = error.errno


def make(mnt: Path, number: int, count: int) -> None:
    (mnt / f"{number}-{count}").write_bytes(WHOLE)


def copy_up(mnt: Path, number: int, count: int) -> None:
    with open(mnt / f"large-{number % 2}", "r+b") as file:
        file.write(b"l")
        os.fsync(file.fileno())
    os.rename(mnt / f"large-{number % 2}", mnt / f"large-{number % 2}")


def look(mnt: Path, number: int, count: int) -> None:
    for name in os.listdir(mnt):
        (mnt / name).exists()
    assert not (mnt / f"none-{number}-{count}").exists()


def read(mnt: Path, number: int, count: int) -> None:
    with open(mnt / "large-2", "rb") as file:
        assert len(file.read(1 << 20)) == 1 << 20
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(layers: Layers, uring: str, log: Path) -> subprocess.Popen[bytes]:
    """A daemon whose mount answers."""
    stack = f"lowerdir={layers.lower},upperdir={layers.upper},workdir={layers.work},engine=native,uring={uring}"
    command = [sys.executable, "-m", "overlayfs_py", "-f", "-o", stack, str(layers.mnt)]
    with log.open("ab") as sink:
        daemon = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    deadline = time.monotonic() + PATIENCE
    while not (layers.mnt / "large-0").exists():
        assert daemon.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    return daemon


@pytest.mark.parametrize("way", ["kill", "abort"])
def test_a_connection_that_ends_under_load_leaves_nobody_waiting_and_nothing_behind(
    layers: Layers, uring: str, way: str
) -> None:
    for number in range(3):
        (layers.lower / f"large-{number}").write_bytes(os.urandom(4 << 20))
    log = layers.base / "log"
    done = 0
    for number in range(ROUNDS):
        daemon = start(layers, uring, log)
        try:
            done += end_under_load(layers, daemon, way, 0.05 + 0.05 * (number % 5))
        finally:
            daemon.kill()
            daemon.wait(PATIENCE)
            if mounted_at(layers.mnt):
                unmount(layers.mnt)
    assert done > 0
    assert b"Traceback" not in log.read_bytes() and b"unexpected" not in log.read_bytes(), log.read_text()
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine=native,uring={uring}"):
        assert os.listdir(layers.work / "work") == []
        for path in layers.mnt.iterdir():
            if path.name.startswith("large"):
                # Copied up or not: all of it is there.
                assert path.read_bytes()[1:] == (layers.lower / path.name).read_bytes()[1:]
            else:
                # Whatever was made is there: whole, not at all, or as far as the write came. The kill ends a
                # write of the daemon's between two pages, as it would end the client's own.
                assert path.read_bytes() in (b"", WHOLE[:4096], WHOLE)


def end_under_load(layers: Layers, daemon: subprocess.Popen[bytes], way: str, delay: float) -> int:
    """Kill the daemon, or abort its connection, while clients are busy, and see how each ends; what they had done."""
    device = mounted_at(layers.mnt)
    assert device is not None
    connection = device.partition(":")[2]
    connections_made.add(connection)
    clients = [Client(layers.mnt, number, act) for number, act in enumerate((make, make, copy_up, look, read, read))]
    time.sleep(delay)
    if way == "kill":
        daemon.send_signal(signal.SIGKILL)
    else:
        (CONNECTIONS / connection / "abort").write_text("1")
    for client in clients:
        client.thread.join(PATIENCE)
    assert not any(client.thread.is_alive() for client in clients), "a client still waits"
    assert all(client.error in LOST for client in clients), [client.error for client in clients]
    # One that is killed takes its threads and rings with it; one that is cut off has to end by itself.
    assert daemon.wait(PATIENCE) == (-signal.SIGKILL if way == "kill" else 0)
    assert not Path("/proc", str(daemon.pid)).exists()
    # Nothing that could still be cached.
    with pytest.raises(OSError) as caught:
        os.statvfs(layers.mnt)
    assert caught.value.errno in LOST
    unmount(layers.mnt)
    return sum(client.count for client in clients)
