"""A disk that is full: what does not fit is refused, and nothing else is lost."""

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.crash.model import Walk, read_model
from tests.support import trees
from tests.support.mounts import kernel_mount, our_mount
from tests.support.syscalls import mount, umount
from tests.support.trees import Node

SIZE = 12 << 20


@pytest.fixture(params=["tmpfs", "ext4"])
def small(layers: Layers, request: pytest.FixtureRequest) -> Iterator[Layers]:
    """Layers whose upper one is on a filesystem of 12 MiB."""
    place = layers.add("small")
    if request.param == "tmpfs":
        mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=%d,nr_inodes=400" % SIZE)
    else:
        image = layers.base / "image"
        subprocess.run(["truncate", "-s", str(SIZE), image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-N", "400", image], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", image, place], check=True, timeout=60)
    try:
        (place / "upper").mkdir()
        (place / "work").mkdir()
        yield Layers(layers.base, layers.lower, place / "upper", place / "work", layers.mnt)
    finally:
        umount(os.fsencode(place))


@pytest.mark.parametrize("options", ["", "fsync=0", "writeback=1"])
def test_a_copy_that_does_not_fit_changes_nothing(small: Layers, options: str) -> None:
    data = random.Random(2).randbytes(SIZE + (1 << 20))
    (small.lower / "d").mkdir()
    (small.lower / "d/big").write_bytes(data)
    (small.lower / "d/fits").write_bytes(data[: SIZE // 2])
    before = trees.read_tree(os.fsencode(small.lower), 0)
    big, fits = small.mnt / "d/big", small.mnt / "d/fits"
    with our_mount(small.mnt, [small.lower], small.upper, small.work, options):
        for _ in range(3):
            with pytest.raises(OSError) as raised:
                write(big)
            assert raised.value.errno == errno.ENOSPC
            with pytest.raises(OSError) as raised:
                os.truncate(big, SIZE + 1)
            assert raised.value.errno == errno.ENOSPC
            assert read_uncached(big) == data
            assert os.listdir(small.work / "work") == []
            assert not (small.upper / "d/big").exists()
        write(fits)
        with pytest.raises(OSError) as raised:
            os.rename(big, small.mnt / "moved")
        assert raised.value.errno == errno.ENOSPC
        os.truncate(big, 1000)
        assert big.read_bytes() == data[:1000]
        fits.unlink()
    for manner in (our_mount, kernel_mount):
        with manner(small.mnt, [small.lower], small.upper, small.work):
            assert big.read_bytes() == data[:1000]
            assert os.listdir(small.mnt / "d") == ["big"]
    assert trees.read_tree(os.fsencode(small.lower), 0) == before


@pytest.mark.parametrize("options", ["", "metacopy=on"])
def test_operations_on_a_full_disk_are_done_or_refused(small: Layers, options: str) -> None:
    nodes = []
    for number in range(20):
        nodes.append(Node(b"w/f%d" % number, data=random.Random(number).randbytes(number * 10_000 + 10)))
        nodes.append(Node(b"w/d%d/sub/y" % number, data=b"y" * 5000))
    nodes += [Node(b"w/h0", data=b"linked" * 1000), Node(b"w/h1", kind="link", data=b"w/h0")]
    trees.build(os.fsencode(small.lower), nodes)
    seed = random.randrange(1 << 30)
    refused = 0
    with our_mount(small.mnt, [small.lower], small.upper, small.work, options):
        walk = Walk(small.mnt / "w", seed)
        for turn in range(600):
            if turn % 100 == 50:
                fill(small.mnt / "filling")
            try:
                walk.step()
            except OSError as error:
                assert error.errno == errno.ENOSPC, f"{walk.last}: {error} (seed {seed})"
                refused += 1
            if turn % 100 == 95:
                (small.mnt / "filling").unlink()
        assert os.listdir(small.work / "work") == []
        shown = read_model(walk.root)
        assert shown.seen() == walk.done.seen(), f"seed {seed}"
    assert refused
    with our_mount(small.mnt, [small.lower], small.upper, small.work, options):
        assert read_model(walk.root).seen() == walk.done.seen(), f"after another mount, seed {seed}"
    kernel_options = "redirect_dir=on,index=on,metacopy=on"
    with kernel_mount(small.mnt, [small.lower], small.upper, small.work, kernel_options):
        assert read_model(walk.root).seen() == walk.done.seen(), f"the kernel's mount, seed {seed}"


def write(path: Path) -> None:
    """Write one byte, to the disk; when it is copied up, on opening or on writing, is the engine's affair."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.pwrite(descriptor, b"W", 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_uncached(path: Path) -> bytes:
    """What the filesystem has: with write-back caching, the kernel keeps a page whose writing has failed."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def fill(path: Path) -> None:
    """Leave no room at all."""
    with open(path, "ab", 0) as file:
        for size in (1 << 20, 1 << 12, 1 << 9, 1):
            try:
                while True:
                    file.write(b"f" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
