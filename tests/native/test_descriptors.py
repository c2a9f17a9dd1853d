"""A mount has at most 1,024 descriptors open on machines of many processors, with rings and without."""

import gc
import os
import resource
import socket
import struct
import threading
from pathlib import Path

import pytest

from overlayfs_py.config import MountConfig
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.engines import machine, native
from tests.native import wire
from tests.native.wire import Wire

MOST = 1024
OBJECTS = 600
PROCESSORS = 256


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_ring_takes_one_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_queues", lambda: 10)
    before = descriptors()
    rings = native._make_rings(-1)
    try:
        assert descriptors() - before == 10
    finally:
        for ring in rings:
            ring.close()
    assert descriptors() == before


def fill(client: Wire) -> None:
    """Have the daemon keep as many descriptors of directories, of files and of what is removed as it will."""
    for number in range(OBJECTS):
        name = b"%d\0" % number
        made = client.ask(wire.MKNOD, 1, struct.pack("=IIII", 0o100644, 0, 0, 0) + b"gone-" + name)
        (node,) = struct.unpack_from("=Q", made.body)
        assert client.ask(wire.UNLINK, 1, b"gone-" + name).error == 0
        made = client.ask(wire.MKDIR, 1, struct.pack("=II", 0o755, 0) + b"dir-" + name)
        (node,) = struct.unpack_from("=Q", made.body)
        made = client.ask(wire.MKNOD, node, struct.pack("=IIII", 0o100644, 0, 0, 0) + b"file\0")
        (node,) = struct.unpack_from("=Q", made.body)
        written = client.ask(wire.WRITE, node, struct.pack("=QQIIQII", 0, 0, 4, 0, 0, 0, 0) + b"data")
        assert written.unpack("II") == (4, 0)


@pytest.mark.parametrize("rings", [True, False])
def test_a_mount_on_a_machine_of_256_processors_keeps_few_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rings: bool
) -> None:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    # Rings that the kernel is offered are kept, also where it then doesn't want them, as this one.
    monkeypatch.setattr(machine, "uring_switch", lambda: rings)
    monkeypatch.setattr(native, "_queues", lambda: PROCESSORS)
    monkeypatch.setattr(native, "clone", os.dup)
    allowed = range(1 if rings else PROCESSORS)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(allowed))
    monkeypatch.setattr(gc, "set_threshold", lambda _allocations: None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    umask = os.umask(0)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = descriptors()
    config = MountConfig(
        lowerdirs=(bytes(tmp_path / "lower"),),
        upperdir=bytes(tmp_path / "upper"),
        workdir=bytes(tmp_path / "work"),
        mountpoint=b"/nowhere",
    )
    serving = threading.Thread(target=native.serve, args=(Overlay(config), far.detach()), daemon=True)
    serving.start()
    try:
        client = Wire(near)
        assert client.ask(wire.INIT, 0, wire.init_body()).error == 0
        fill(client)
        taken = descriptors() - before
    finally:
        near.close()
        serving.join(wire.PATIENCE)
        os.umask(umask)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not serving.is_alive()
    # The caches are as full as they may be.
    assert MOST // 2 < taken < MOST
