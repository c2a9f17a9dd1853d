"""Files are read whole and right, whatever part of them is in the page cache of their layer."""

import contextlib
import errno
import mmap
import os
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.filesystems.disks import holding
from tests.options.rig import error_of, traced
from tests.support.mounts import our_mount
from tests.support.uring import switch_kept
from tests.support.waiting import wait_until

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SIZES = (0, 1, _PAGE - 1, _PAGE, _PAGE + 1, 5 * _PAGE + 7, 128 << 10, (1 << 20) - 1, (1 << 20) + 3, (3 << 20) + 5)


@pytest.fixture
def mnt(layers: Layers, uring: str) -> Iterator[Path]:
    for size in _SIZES:
        (layers.lower / f"f{size}").write_bytes(random.Random(size).randbytes(size))
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine=native,uring={uring}"):
        yield layers.mnt


def forget(path: Path, offset: int = 0, length: int = 0) -> None:
    """Have the page cache of a file's own filesystem let go of a part, of all for a length of 0."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if not os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            os.fsync(fd)
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def expected(name: str) -> bytes:
    size = int(name[1:])
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("missing", ["nothing", "all", "the beginning", "the end", "the middle", "every other part"])
def test_what_the_layer_has_not_cached_comes_from_its_disk(layers: Layers, mnt: Path, missing: str) -> None:
    for turn in range(3):
        for size in _SIZES:
            name = f"f{size}"
            (layers.lower / name).read_bytes()
            forget(mnt / name)
            part = max(size // 3 // _PAGE * _PAGE, _PAGE)
            for at in {
                "nothing": [],
                "all": range(0, size, part),
                "the beginning": [0],
                "the end": [2 * part],
                "the middle": [part],
                "every other part": range(0, size, 2 * part),
            }[missing]:
                forget(layers.lower / name, at, part)
            assert (mnt / name).read_bytes() == expected(name), (turn, name)


def test_a_file_of_the_upper_layer_is_read_to_its_end(layers: Layers, mnt: Path) -> None:
    for size in _SIZES:
        name = f"f{size}"
        with (mnt / name).open("ab") as file:
            file.write(b"and more")
        forget(mnt / name)
        forget(layers.upper / name)
        assert (mnt / name).read_bytes() == expected(name) + b"and more"


def removed_files(pid: int) -> int:
    """How many descriptors a process has of files that have no name any more."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        # It may be closed just now.
        with contextlib.suppress(FileNotFoundError):
            count += "(deleted)" in os.readlink(path)
    return count


def test_a_removed_file_is_closed_whichever_thread_had_it(layers: Layers, uring: str) -> None:
    data = random.Random(1).randbytes(4 << 20)
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine=native,uring={uring}") as live:
        with (layers.mnt / "gone").open("w+b", buffering=0) as file:
            file.write(data)
            forget(layers.upper / "gone")
            forget(layers.mnt / "gone")
            assert file.read() == b"" and os.pread(file.fileno(), len(data), 0) == data
            os.unlink(layers.mnt / "gone")
        wait_until(lambda: removed_files(live.pid) == 0)


def test_many_who_wait_for_the_disk_get_what_is_theirs(layers: Layers, mnt: Path) -> None:
    wrong: list[str] = []

    def read(turn: int) -> None:
        sizes = list(_SIZES)
        random.Random(turn).shuffle(sizes)
        for size in sizes * 3:
            name = f"f{size}"
            forget(layers.lower / name)
            forget(mnt / name)
            if (mnt / name).read_bytes() != expected(name):
                wrong.append(name)

    readers = [threading.Thread(target=read, args=(turn,)) for turn in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert not wrong


@pytest.mark.parametrize("cached", [False, True])
def test_a_ring_s_thread_waits_for_no_disk_of_a_filesystem_that_can_t_be_asked(layers: Layers, cached: bool) -> None:
    """squashfs has no reads that may not wait (RWF_NOWAIT), but tells what it has cached."""
    tree, trace = layers.add("tree"), layers.base / "trace"
    # Those of one request each: while one is served, the filesystem may read what comes next.
    sizes = [size for size in _SIZES if size <= 128 << 10]
    for size in sizes:
        (tree / f"f{size}").write_bytes(expected(f"f{size}"))
    with (
        switch_kept(),
        holding("squashfs", tree, layers.base) as lower,
        our_mount(layers.mnt, [lower], layers.upper, layers.work, "engine=native,uring=on") as live,
        traced(live.pid, ["pread64", "io_uring_enter"], trace) as seen,
    ):
        for size in sizes:
            name = f"f{size}"
            if cached:
                (lower / name).read_bytes()
            else:
                forget(lower / name)
            forget(layers.mnt / name)
            assert (layers.mnt / name).read_bytes() == expected(name)
    rings = {line.split()[0] for line in seen() if "io_uring_enter" in line}
    readers = {line.split()[0] for line in seen() if "pread64" in line}
    assert rings
    assert readers
    assert readers <= rings if cached else not readers & rings


def test_an_error_of_the_disk_is_the_reader_s(layers: Layers, mnt: Path) -> None:
    """What is no file any more behind the mount's back can't be read; nobody gets other data for it."""
    name = f"f{_SIZES[-1]}"
    (layers.lower / name).unlink()
    (layers.lower / name).mkdir()
    with pytest.raises(OSError) as caught, (mnt / name).open("rb", buffering=0) as file:
        file.read(1)
    assert caught.value.errno in (errno.EISDIR, errno.ESTALE, errno.EIO, errno.EINVAL)


@pytest.mark.parametrize("engine", ["native", "portable"])
@pytest.mark.parametrize("own", [1, _PAGE + 1, 3 * _PAGE, (256 << 10) + 1])
def test_a_metacopy_shorter_than_its_data_ends_where_it_says(layers: Layers, engine: str, own: int) -> None:
    """Such as a crash leaves of one that was to be truncated; what is behind its end must not come back."""
    data = random.Random(own).randbytes(1 << 20)
    (layers.lower / "f").write_bytes(data)
    (layers.upper / "f").touch()
    os.truncate(layers.upper / "f", own)
    os.setxattr(layers.upper / "f", "trusted.overlay.metacopy", b"")
    with (
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"metacopy=on,engine={engine}"),
        contextlib.ExitStack() as opened,
    ):
        direct = os.open(layers.mnt / "f", os.O_RDONLY | os.O_DIRECT)
        opened.callback(os.close, direct)
        assert os.fstat(direct).st_size == own
        room = mmap.mmap(-1, 2 << 20)
        for offset in (0, own // _PAGE * _PAGE, (own // _PAGE + 1) * _PAGE, len(data), 1 << 40):
            there = max(0, own - offset)
            assert os.preadv(direct, [room], offset) == there
            assert room[:there] == data[offset:own]
        assert (layers.mnt / "f").read_bytes() == data[:own]
        assert os.lseek(direct, 0, os.SEEK_DATA) == 0
        assert os.lseek(direct, 0, os.SEEK_HOLE) == own
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            assert error_of(partial(os.lseek, direct, own, whence)) == errno.ENXIO
        with (layers.mnt / "copy").open("wb") as copy:
            assert os.copy_file_range(direct, copy.fileno(), len(data), 0) == own
        assert (layers.mnt / "copy").read_bytes() == data[:own]
        # The last page is in the cache by now, and what was behind the end with it.
        os.truncate(layers.mnt / "f", own + 100)
        assert (layers.mnt / "f").read_bytes() == data[:own] + bytes(100)
    assert (layers.upper / "f").read_bytes() == data[:own] + bytes(100)
