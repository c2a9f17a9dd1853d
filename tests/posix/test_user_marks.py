"""Overlays with their marks in `user.*` xattrs, as rootless ones: symbolic links and special files take none."""

import os
import stat

import pytest

from tests.posix.files import NOT_DIRECTORIES, kind_of, make
from tests.posix.rig import Root, prepared, read, write

pytestmark = pytest.mark.flavour("user-marks")


def build(kind: str) -> None:
    make(kind, "f")
    os.link("f", "g", follow_symlinks=False)
    os.mkdir("d")


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build)
def test_a_hard_linked_file_of_any_type_is_removed_and_replaced(root: Root, kind: str) -> None:
    os.unlink("f")
    assert (kind_of("f"), kind_of("g")) == ("missing", kind)
    make("regular", "f")
    os.rename("f", "g")
    assert kind_of("g") == "regular"
    assert sorted(os.listdir()) == ["d", "g"]


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build)
def test_a_hard_linked_file_of_any_type_is_changed_renamed_and_linked(root: Root, kind: str) -> None:
    before = os.lstat("f")
    os.chown("f", 5, 6, follow_symlinks=False)
    os.rename("f", "d/moved")
    os.link("d/moved", "d/third", follow_symlinks=False)
    os.utime("d/third", ns=(7, 8), follow_symlinks=False)
    for name in ("d/moved", "d/third"):
        after = os.lstat(name)
        assert (after.st_mode, after.st_rdev, after.st_size) == (before.st_mode, before.st_rdev, before.st_size)
        assert (after.st_uid, after.st_gid, after.st_mtime_ns) == (5, 6, 8)
    assert kind_of("g") == kind


def build_tree() -> None:
    os.makedirs("d/sub")
    write("d/f", b"data", 0o640)
    os.setxattr("d/f", "user.note", b"value")
    os.setxattr("d", "user.note", b"dir")


@prepared(build_tree)
def test_marks_are_not_seen_among_user_xattrs(root: Root) -> None:
    write("d/new", b"new")
    os.chmod("d/f", 0o600)
    os.unlink("d/new")
    os.rmdir("d/sub")
    os.mkdir("d/sub")
    assert os.listxattr("d/f") == ["user.note"]
    assert os.listxattr("d") == ["user.note"]
    assert os.listxattr("d/sub") == []
    assert os.listdir("d/sub") == []
    assert read("d/f") == b"data"
    assert stat.S_IMODE(os.stat("d/f").st_mode) == 0o600
