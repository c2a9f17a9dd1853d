"""Descriptors that another thread closes: all of them, at the latest when the mount goes."""

import os
import socket
import struct
import time
from pathlib import Path

import pytest

from overlayfs_py.engines.native.closing import Closing
from tests.conftest import Layers
from tests.support.mounts import our_mount

MANY = 300
_PATIENCE = 30  # seconds


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_all_that_is_handed_in_is_closed_in_the_end(tmp_path: Path) -> None:
    opened = [os.open(tmp_path, os.O_PATH) for _ in range(MANY)]
    closing = Closing()
    for fd in opened:
        closing.later(fd)
    closing.close()
    assert not any(map(is_open, opened))


def test_nobody_waits_for_a_close_that_takes_long() -> None:
    # close(2) of this one waits until its bytes are taken, or as long as it is told to linger.
    listener = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()
    with listener, receiver:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 2 * _PATIENCE))
        sender.setblocking(False)
        sent = 0
        while True:
            try:
                sent += sender.send(bytes(1 << 16))
            except BlockingIOError:
                break
        closing = Closing()
        began = time.monotonic()
        closing.later(sender.detach())
        assert time.monotonic() - began < _PATIENCE
        received = 0
        while piece := receiver.recv(1 << 20):
            received += len(piece)
        closing.close()
    assert received == sent


def test_where_no_thread_is_to_be_had_it_is_closed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("overlayfs_py.engines.native.background.start_new_thread", refuse)
    fd = os.open(tmp_path, os.O_PATH)
    closing = Closing()
    closing.later(fd)
    assert not is_open(fd)
    closing.close()


def removed_but_held(pid: int) -> list[str]:
    """What a process has descriptors of that has no name any more."""
    held = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            held.append(os.readlink(entry))
        except FileNotFoundError:
            # closed since they were listed
            continue
    return [target for target in held if target.endswith(" (deleted)")]


def test_what_is_removed_is_given_back(layers: Layers, uring: str) -> None:
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine=native,uring={uring}") as live:
        for number in range(MANY):
            (layers.mnt / f"file-{number}").write_bytes(b"data")
        with (layers.mnt / "open").open("w+b") as still_open:
            still_open.write(b"data")
            for name in os.listdir(layers.mnt):
                (layers.mnt / name).unlink()
            assert removed_but_held(live.pid)
            still_open.seek(0)
            assert still_open.read() == b"data"
        deadline = time.monotonic() + _PATIENCE
        while held := removed_but_held(live.pid):
            assert time.monotonic() < deadline, held
            time.sleep(0.01)
