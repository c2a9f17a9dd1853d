"""Mounts on the mount: a directory bound elsewhere or mounted over, and what that forbids."""

import contextlib
import errno
import os
from collections.abc import Iterator

from tests.posix.rig import Root, fails, inside, opened, prepared, read, write
from tests.support.mounts import unmount
from tests.support.syscalls import MS_BIND, MS_RDONLY, MS_REMOUNT, mount


def build() -> None:
    os.makedirs("d/sub")
    write("d/f", b"data")
    write("f", b"file")
    os.mkdir("point")
    os.mkdir("other")


@contextlib.contextmanager
def bound(source: str, target: str, flags: int = 0) -> Iterator[None]:
    """The target shows the source while the block runs."""
    mount(source.encode(), target.encode(), None, MS_BIND)
    try:
        if flags:
            mount(b"none", target.encode(), None, MS_REMOUNT | MS_BIND | flags)
        yield
    finally:
        unmount(os.path.abspath(target))


@prepared(build)
def test_a_bound_directory_is_the_directory(root: Root) -> None:
    with bound("d", "point"):
        assert os.path.samestat(os.stat("d"), os.stat("point"))
        assert read("point/f") == b"data"
        write("point/new", b"new")
        assert read("d/new") == b"new"
        os.rename("point/f", "point/g")
        assert sorted(os.listdir("d")) == ["g", "new", "sub"]
        with fails(errno.EXDEV):
            os.rename("point/g", "other/g")
        with fails(errno.EXDEV):
            os.link("d/g", "point/h")
    assert os.listdir("point") == []


@prepared(build)
def test_a_mounted_over_directory_is_busy(root: Root) -> None:
    with bound("d", "point"):
        with fails(errno.EBUSY):
            os.rmdir("point")
        with fails(errno.EBUSY):
            os.rename("point", "moved")
        with fails(errno.EBUSY):
            os.rename("other", "point")
    os.rename("point", "moved")
    os.rmdir("moved")


@prepared(build)
def test_a_file_is_bound_over_a_file(root: Root) -> None:
    with bound("d/f", "f"):
        assert read("f") == b"data"
        with opened("f", os.O_WRONLY | os.O_APPEND) as descriptor:
            os.write(descriptor, b" and more")
        with fails(errno.EBUSY):
            os.unlink("f")
        os.unlink("d/f")
        assert read("f") == b"data and more"
    assert read("f") == b"file"


@prepared(build)
def test_a_read_only_bind_refuses_changes(root: Root) -> None:
    with bound("d", "point", MS_RDONLY):
        for name in ("point/new", "point/f"):
            with fails(errno.EROFS):
                os.open(name, os.O_WRONLY | os.O_CREAT)
        write("d/f", b"changed")
        assert read("point/f") == b"changed"


@prepared(build)
def test_a_filesystem_is_mounted_on_a_directory(root: Root) -> None:
    mount(b"tmpfs", b"point", b"tmpfs", 0, b"size=1m")
    try:
        write("point/f", b"elsewhere")
        assert os.stat("point").st_dev != os.stat("d").st_dev
        with inside("point"):
            assert os.stat("..").st_ino == os.stat(root.path).st_ino
    finally:
        unmount(f"{root.path}/point")
    assert os.listdir("point") == []
