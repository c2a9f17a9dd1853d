"""Access times, on a mount that keeps them as `relatime` does: when they are older than the last change or a day."""

import os

import pytest

from tests.posix import calls
from tests.posix.rig import Root, Times, next_tick, opened, prepared, read, write

pytestmark = pytest.mark.flavour("relatime")


def build() -> None:
    write("f", b"data")
    os.mkdir("d")
    write("d/g", b"below")
    os.symlink("f", "link")
    for name in ("f", "d"):
        os.utime(name, (1, 2))
    os.utime("link", (1, 2), follow_symlinks=False)


@prepared(build)
def test_reading_advances_an_access_time_that_is_old(root: Root) -> None:
    if root.may_copy_up:
        # A file of the lower layer keeps its times while it is only read: the layer is not ours to change.
        read("f")
        assert Times.of("f").m == 2_000_000_000
        os.chmod("f", 0o600)
    before = Times.of("f")
    assert read("f") == b"data"
    after = Times.of("f")
    assert after.a > before.a or after.a > 1_000_000_000
    assert after.m == before.m


@prepared(build)
def test_an_access_time_newer_than_the_last_change_stays(root: Root) -> None:
    os.chmod("f", 0o600)
    next_tick()
    read("f")
    with root.touches(f=""):
        read("f")


@prepared(build)
def test_o_noatime_leaves_the_access_time(root: Root) -> None:
    os.chmod("f", 0o600)
    calls.utimensat("f", ((1, 0), (2, 0)))
    with opened("f", os.O_RDONLY | os.O_NOATIME) as descriptor:
        assert os.read(descriptor, 10) == b"data"
    assert Times.of("f").a == 1_000_000_000


@prepared(build)
def test_listing_and_following_change_no_other_time(root: Root) -> None:
    before = Times.of("d"), Times.of("link")
    os.listdir("d")
    read("link")
    after = Times.of("d"), Times.of("link")
    assert [(times.m, times.c) for times in before] == [(times.m, times.c) for times in after]
