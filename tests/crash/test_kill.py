"""`kill -9` at any moment: whoever waits is told, and the tree mounts again and is before or after each operation."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.crash.model import Model, Walk, read_model
from tests.support import trees
from tests.support.mounts import LOST, Mount, MountFailed, kernel_mount, our_mount
from tests.support.trees import Node

WALKERS = 4
ENOUGH = 20  # operations before the end may come
PATIENCE = 20.0  # seconds for a waiting process to be told
KERNEL_OPTIONS = "redirect_dir=on,index=on,metacopy=on"


def lower(walker: int) -> Iterator[Node]:
    """The directory of one walker."""
    base = b"w%d/" % walker
    for number in range(6):
        yield Node(base + b"f%d" % number, data=random.Random(number).randbytes(number * 20_000 + 10))
        yield Node(base + b"d%d/x" % number, data=b"x%d" % number)
        yield Node(base + b"d%d/sub/y" % number, data=b"y%d" % number)
    yield Node(base + b"h0", data=b"linked" * 1000)
    yield Node(base + b"h1", kind="link", data=base + b"h0")
    yield Node(base + b"d0/h2", kind="link", data=base + b"h0")


def build(layers: Layers) -> None:
    trees.build(os.fsencode(layers.lower), [node for walker in range(WALKERS) for node in lower(walker)])


@contextlib.contextmanager
def doomed_mount(layers: Layers, options: str = "") -> Iterator[Mount]:
    """A mount of ours whose daemon is killed inside the block."""
    try:
        with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options, limit=100) as live:
            yield live
    except MountFailed as failed:
        if f"status {-signal.SIGKILL}" not in str(failed):
            raise


def before_or_after(where: str, walk: Walk, shown: Model) -> list[str]:
    """What is wrong with the tree of a walk that was cut short: it may be without its last operation, or with it."""
    if shown.seen() in [model.seen() for model in (walk.done, walk.pending) if model is not None]:
        return []
    lines = [f"{where}, {walk.root.name}: neither before nor after {walk.last} (operation {walk.count})"]
    expected, found = walk.done.seen(), shown.seen()
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            lines.append(f"  {path}: before {short(expected.get(path))}, now {short(found.get(path))}")
    return lines


def short(seen: object) -> str:
    return repr(seen)[:150]


@pytest.mark.parametrize("options", ["", "metacopy=on", "timeout=0"])
@pytest.mark.parametrize("round_", range(2))
def test_a_daemon_killed_under_load_leaves_each_operation_done_or_not(
    layers: Layers, round_: int, options: str
) -> None:
    build(layers)
    seed = random.randrange(1 << 30)
    with doomed_mount(layers, options) as live:
        walks = [Walk(Path(layers.mnt, f"w{number}"), seed + number) for number in range(WALKERS)]
        threads = [threading.Thread(target=walk.run, daemon=True) for walk in walks]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE
        while sum(walk.count for walk in walks) < ENOUGH and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.7))
        os.kill(live.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads), "an operation still waits for the dead daemon"
    for walk in walks:
        assert walk.error is not None
        assert walk.error.errno in LOST, f"{walk.last}: {walk.error} (seed {seed})"
    assert sum(walk.count for walk in walks) >= ENOUGH
    wrong = []
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work, KERNEL_OPTIONS):
        for walk in walks:
            wrong += before_or_after("the kernel's mount", walk, read_model(walk.root))
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        assert os.listdir(layers.work / "work") == []
        for walk in walks:
            wrong += before_or_after("our mount", walk, read_model(walk.root))
    assert not wrong, "\n".join([f"seed {seed}", *wrong])


SIZE = 48 << 20


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a_daemon_killed_while_it_copies_leaves_the_old_file_or_the_new_one(layers: Layers, share: float) -> None:
    data = random.Random(1).randbytes(1 << 20)
    with open(layers.lower / "big", "wb") as file:
        for number in range(SIZE >> 20):
            file.write(number.to_bytes(4, "little") + data[4:])
    content = (layers.lower / "big").read_bytes()
    told: list[OSError | None] = []
    with doomed_mount(layers, "fsync=0") as live:
        started = time.monotonic()
        (layers.mnt / "copy").write_bytes(content)
        long = time.monotonic() - started

        def write() -> None:
            try:
                with open(layers.mnt / "big", "r+b") as file:
                    file.write(b"W")
                told.append(None)
            except OSError as error:
                told.append(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        time.sleep(long * share / 4)
        os.kill(live.pid, signal.SIGKILL)
        thread.join(PATIENCE)
        assert told, "the writer still waits for the dead daemon"
    for _ in range(2):
        with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work):
            assert os.listdir(layers.work / "work") == []
            now = (layers.mnt / "big").read_bytes()
        assert now == content or (now[:1] == b"W" and now[1:] == content[1:])
    assert (layers.lower / "big").read_bytes() == content
