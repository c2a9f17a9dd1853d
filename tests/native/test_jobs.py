"""Operations whose jobs other threads execute: each is answered, whatever becomes of its job."""

import errno
import gc
import os
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs_py.core.nodes import Node
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.requests import Job
from overlayfs_py.engines.native import session
from tests.conftest import Layers
from tests.native import trickle, wire
from tests.native.messages import lay_out
from tests.native.other import served_by
from tests.native.wire import Answer, Wire, parse, served
from tests.support.mounts import CONNECTIONS, our_mount
from tests.support.waiting import wait_until

FSYNC = struct.pack("=QII", 0, 0, 0)


@pytest.fixture(params=["device", "ring"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Wire]:
    lay_out(tmp_path)
    with served(tmp_path, ring=request.param == "ring") as connected:
        yield connected


def answer(client: Wire, unique: int) -> Answer:
    return parse(client.receive(), unique)


@pytest.mark.parametrize("killed", [True, False])
def test_a_job_whose_caller_was_killed_before_there_was_a_thread_for_it_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    begun, free = threading.Event(), threading.Event()
    executed: list[int] = []
    dying: list[int] = []

    def fsync(_fs: object, node: Node, **_named: object) -> Iterator[Job]:
        def run() -> None:
            executed.append(node.id)
            begun.set()
            free.wait(wire.PATIENCE)

        job = Job(run)
        yield job
        if job.error is not None:
            raise job.error

    lay_out(tmp_path)
    monkeypatch.setattr(session, "_MOST_WORKERS", 1)
    monkeypatch.setattr(session, "dying", dying.__contains__)
    with served(tmp_path) as client, monkeypatch.context() as patched:
        first, second = client.look_up(b"u"), client.look_up(b"f")
        patched.setitem(OPERATIONS, "fsync", fsync)
        client.send(client.pack(wire.FSYNC, first, FSYNC))
        assert begun.wait(wire.PATIENCE)
        client.send(client.pack(wire.FSYNC, second, FSYNC))
        client.serves()
        # Long enough for it to be worth a look.
        time.sleep(0.1)
        if killed:
            dying.append(1)
        free.set()
        assert answer(client, client.unique - 4).error == 0
        assert answer(client, client.unique - 2).error == (errno.EINTR if killed else 0)
        assert executed == ([first] if killed else [first, second])


def test_operations_that_find_no_thread_free_wait_before_they_open_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    free = threading.Event()

    def fsync(_fs: object, node: Node, **_named: object) -> Iterator[Job]:
        def run() -> None:
            assert free.wait(wire.PATIENCE)

        begun.append(node.id)
        yield Job(run)

    lay_out(tmp_path)
    monkeypatch.setattr(session, "_MOST_WORKERS", 2)
    with served(tmp_path) as client, monkeypatch.context() as patched:
        nodes = [client.look_up(name) for name in (b"u", b"f", b"l", b"p")]
        patched.setitem(OPERATIONS, "fsync", fsync)
        for node in nodes:
            client.send(client.pack(wire.FSYNC, node, FSYNC))
        client.serves()
        assert begun == nodes[:2]
        free.set()
        for _ in nodes:
            assert int.from_bytes(client.receive()[4:8], "little", signed=True) == 0
        assert sorted(begun) == sorted(nodes)


def test_a_job_that_fails_keeps_nothing_of_what_it_had(client: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        pass

    kept: list[weakref.ref[Held]] = []

    def run() -> None:
        held = Held()
        kept.append(weakref.ref(held))
        raise OSError(errno.EDOM, os.strerror(errno.EDOM))

    def fsync(*_arguments: object, **_named: object) -> Iterator[Job]:
        job = Job(run)
        yield job
        assert job.error is not None
        raise job.error

    u = client.look_up(b"u")
    gc.disable()
    try:
        with monkeypatch.context() as patched:
            patched.setitem(OPERATIONS, "fsync", fsync)
            assert client.ask(wire.FSYNC, u, FSYNC).error == errno.EDOM
        assert kept[0]() is None
    finally:
        gc.enable()


MANY = 12  # less than one ring holds
WRITE_ALL = """
import os, sys, threading
def write(path):
    os.pwrite(os.open(path, os.O_WRONLY), b"W", 0)
for path in sys.argv[1:]:
    threading.Thread(target=write, args=(path,)).start()
"""
CHANGE = """
import os, sys
os.chmod(sys.argv[1], 0o600)
with open(sys.argv[2], "r+b") as file:
    file.write(b"W")
    file.flush()
    os.fsync(file.fileno())
"""


def test_who_needs_a_job_does_not_wait_for_many_others_that_take_minutes(layers: Layers, uring: str) -> None:
    other = layers.add("other")
    (other / "small").write_bytes(b"small")
    (layers.upper / "own").write_bytes(b"own")
    large = [layers.mnt / os.fsdecode(name) for name in trickle.NAMES[:MANY]]
    with (
        served_by("tests.native.trickle", layers.lower),
        our_mount(layers.mnt, [layers.lower, other], layers.upper, layers.work, f"engine=native,uring={uring}") as live,
    ):
        waiting = CONNECTIONS / str(live.connection) / "waiting"
        processes = [subprocess.Popen([sys.executable, "-c", WRITE_ALL, *large])]
        try:
            wait_until(lambda: int(waiting.read_text()) >= MANY)
            processes.append(subprocess.Popen([sys.executable, "-c", CHANGE, layers.mnt / "small", layers.mnt / "own"]))
            assert processes[1].wait(10) == 0
            assert processes[0].poll() is None
        finally:
            # What waits for a thread goes when there is one.
            for process in processes:
                process.kill()
                process.wait(wire.PATIENCE)
        assert (layers.upper / "own").read_bytes() == b"Wwn"
        assert (layers.upper / "small").read_bytes() == b"small"
        assert sorted(os.listdir(layers.upper)) == ["own", "small"]


@pytest.mark.parametrize("cleanup", [ValueError("a mistake"), OSError(errno.EIO, "a disk")])
def test_an_operation_that_fails_in_its_clean_up_is_answered(
    client: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cleanup: Exception
) -> None:
    def fail() -> None:
        raise ValueError("a job that fails in an unknown way")

    def fsync(*_arguments: object, **_named: object) -> Iterator[Job]:
        try:
            yield Job(fail)
        finally:
            raise cleanup

    u = client.look_up(b"u")
    with monkeypatch.context() as patched:
        patched.setitem(OPERATIONS, "fsync", fsync)
        assert client.ask(wire.FSYNC, u, FSYNC).error == errno.EIO
    assert str(cleanup) in caplog.text
    assert client.ask(wire.FSYNC, u, FSYNC).error == 0
