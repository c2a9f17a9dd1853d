"""truncate and ftruncate."""

import errno
import os
import resource
import signal

import pytest

from tests.posix.files import NODES, make
from tests.posix.rig import MEMBER, OTHER, OWNER, ROOT, Root, as_user, fails, opened, prepared, read, write

DATA = bytes(range(1, 251)) * 50


def build_file() -> None:
    write("f", DATA)
    os.symlink("f", "link")


def by_path(name: str, size: int) -> None:
    os.truncate(name, size)


def by_descriptor(name: str, size: int) -> None:
    with opened(name, os.O_RDWR) as descriptor:
        os.ftruncate(descriptor, size)


WAYS = {"truncate": by_path, "ftruncate": by_descriptor}


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, len(DATA), len(DATA) + 1, 100_000, 1 << 32], ids=str)
@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_a_file_gets_the_size_asked_for(root: Root, way: str, size: int) -> None:
    WAYS[way]("f", size)
    assert os.stat("f").st_size == size
    with opened("f") as descriptor:
        assert os.read(descriptor, len(DATA)) == DATA[:size].ljust(min(size, len(DATA)), b"\0")
        if size > len(DATA):
            assert os.pread(descriptor, 4096, size - 1) == b"\0"


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_bytes_cut_off_come_back_as_zeros(root: Root, way: str) -> None:
    for size in (5000, 4096, 100, 1):
        WAYS[way]("f", size)
        WAYS[way]("f", len(DATA))
        assert read("f") == DATA[:size].ljust(len(DATA), b"\0")


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_truncating_advances_mtime_and_ctime(root: Root, way: str) -> None:
    for size in (100, 0, 5000):
        with root.touches(here="", link="", f="mc"):
            WAYS[way]("link", size)


@prepared(build_file)
def test_ftruncate_to_the_same_size_advances_times(root: Root) -> None:
    with root.touches(here="", f="mc"):
        by_path("f", len(DATA))
    with root.touches(here="", f="mc"):
        by_descriptor("f", len(DATA))


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_a_negative_size_gives_einval(root: Root, way: str) -> None:
    with root.touches(f=""), fails(errno.EINVAL):
        WAYS[way]("f", -1)
    assert read("f") == DATA


@prepared(build_file)
def test_truncating_needs_write_permission(root: Root) -> None:
    os.chown("f", OWNER.uid, OWNER.gid)
    os.chmod("f", 0o620)
    as_user(OWNER, os.truncate, "f", 3000)
    as_user(MEMBER, os.truncate, "f", 2000)
    with root.touches(f=""), fails(errno.EACCES):
        as_user(OTHER, os.truncate, "f", 1000)
    assert os.stat("f").st_size == 2000
    os.chmod("f", 0o026)
    with fails(errno.EACCES):
        as_user(OWNER, os.truncate, "f", 10)
    os.truncate("f", 10)


def build_others() -> None:
    for kind in NODES:
        make(kind, kind)
    os.mkdir("d")


@prepared(build_others)
def test_only_regular_files_can_be_truncated(root: Root) -> None:
    for kind in NODES:
        with fails(errno.EINVAL):
            os.truncate(kind, 0)
    with root.touches(d=""), fails(errno.EISDIR):
        os.truncate("d", 0)
    with opened("d") as descriptor, fails(errno.EINVAL):
        os.ftruncate(descriptor, 0)


@prepared(build_file)
def test_a_size_over_the_limit_of_the_process_gives_efbig(root: Root) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for way in WAYS.values():
            with fails(errno.EFBIG):
                way("f", 20_001)
            way("f", 20_000)
        with opened("f", os.O_WRONLY | os.O_APPEND) as descriptor, fails(errno.EFBIG):
            os.write(descriptor, b"x")
        os.truncate("f", 19_990)
        with opened("f", os.O_WRONLY | os.O_APPEND) as descriptor:
            assert os.write(descriptor, b"x" * 100) == 10

    as_user(ROOT, limited)
    assert os.stat("f").st_size == 20_000


@prepared(build_file)
def test_a_size_beyond_the_largest_gives_efbig(root: Root) -> None:
    with root.touches(f=""), fails(errno.EFBIG, errno.EINVAL):
        os.truncate("f", 2**63 - 1)
    assert os.stat("f").st_size == len(DATA)


@prepared(build_file)
def test_truncating_is_seen_by_open_descriptors(root: Root) -> None:
    with opened("f", os.O_RDWR) as first, opened("f", os.O_RDWR) as second:
        assert os.pread(first, 3, 100) == DATA[100:103]
        os.ftruncate(second, 100)
        assert os.fstat(first).st_size == 100
        assert os.pread(first, 3, 100) == b""
        os.truncate("f", 103)
        assert os.pread(second, 10, 99) == DATA[99:100] + b"\0\0\0"


@prepared(build_file)
def test_writing_past_the_end_leaves_zeros_between(root: Root) -> None:
    with opened("f", os.O_WRONLY) as descriptor:
        os.pwrite(descriptor, b"end", 1_000_000)
    data = read("f")
    assert data == DATA.ljust(1_000_000, b"\0") + b"end"
