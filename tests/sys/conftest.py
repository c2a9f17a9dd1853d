"""Real directories on the filesystems that matter."""

import contextlib
import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.syscalls import mount, umount

KERNEL = tuple(int(number) for number in re.findall("[0-9]+", os.uname().release)[:2])
"""The version of the running kernel, as (6, 1)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A directory to work in, and an O_PATH descriptor of it."""

    path: Path
    fd: int


@contextlib.contextmanager
def mounted(source: bytes, target: Path, fstype: bytes, data: bytes | None = None) -> Iterator[Path]:
    """A filesystem mounted for the length of the block."""
    target.mkdir()
    mount(source, os.fsencode(target), fstype, 0, data)
    try:
        yield target
    finally:
        umount(os.fsencode(target))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Place]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield Place(path, fd)
    finally:
        os.close(fd)


@pytest.fixture
def disk(layers: Layers) -> Iterator[Place]:
    """A directory on a disk filesystem."""
    with opened(layers.add("disk")) as place:
        yield place


@pytest.fixture
def tmpfs(layers: Layers) -> Iterator[Place]:
    """A small tmpfs."""
    with mounted(b"tmpfs", layers.base / "tmpfs", b"tmpfs", b"size=64m") as path, opened(path) as place:
        yield place


@pytest.fixture(params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest) -> Place:
    """A directory on each kind of filesystem in turn."""
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def xfs(layers: Layers) -> Iterator[Place]:
    """An xfs, which shares extents, on a loop device."""
    image = layers.base / "xfs.img"
    subprocess.run(["truncate", "-s", "400M", image], check=True)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, timeout=60)
    target = layers.add("xfs")
    subprocess.run(["mount", "-o", "loop", image, target], check=True, timeout=60)
    try:
        with opened(target) as place:
            yield place
    finally:
        subprocess.run(["umount", target], check=True, timeout=60)
