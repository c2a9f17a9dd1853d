"""Copy-up: what a copy keeps, what it may not touch, and what is there meanwhile."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlayfs_py.sys import copying, files
from tests.core.conftest import Maker
from tests.core.rig import Rig, Tree, differences
from tests.support import trees
from tests.support.trees import Node, acl

GUARDED = acl((1, 7, 0xFFFFFFFF), (2, 5, 12), (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF))
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
EVERYTHING = (
    Node(
        b"d/file",
        data=b"0123456789" * 20_000,
        mode=0o4751,
        uid=7,
        gid=8,
        xattrs=(("user.k", b"v"), ("trusted.t", b"t"), ("system.posix_acl_access", GUARDED)),
    ),
    Node(b"d/able", data=b"x", uid=3, gid=4, xattrs=(("security.capability", CAPABILITY),)),
    Node(b"d/sparse", data=b"head", size=3_000_000),
    Node(b"d/empty", mode=0o400),
    Node(b"d/sub", kind="dir", mode=0o2770, uid=9, gid=10, xattrs=(("system.posix_acl_default", GUARDED),)),
    Node(b"d/sym", kind="symlink", data=b"a/b/../c", uid=11, gid=12, xattrs=(("trusted.s", b"s"),)),
    Node(b"d/fifo", kind="fifo", mode=0o622, uid=13),
    Node(b"d/socket", kind="socket", mode=0o640),
    Node(b"d/chr", kind="chr", mode=0o606, rdev=(1, 3), uid=14),
    Node(b"d/blk", kind="blk", mode=0o660, rdev=(7, 999)),
)
PATHS = [node.path for node in EVERYTHING]


def copied_up(rig: Rig, path: bytes) -> bool:
    return rig.node(path).upper is not None


def copy_up(rig: Rig, path: bytes) -> None:
    """Copy up by a change that leaves no trace: an xattr set and removed."""
    key = b"trusted.touch"
    rig.setxattr(path, key, b"")
    rig.removexattr(path, key)


def on_disk(path: Path) -> Tree | trees.Tree:
    return trees.read_tree(os.fsencode(path), 0)


@pytest.mark.parametrize("path", PATHS)
def test_a_copy_is_like_the_original_and_the_lower_layer_stays(make: Maker, path: bytes) -> None:
    rig = make(EVERYTHING)
    before, lower = rig.tree(), on_disk(make.base / "lower0")
    inode = rig.attr(path).ino
    copy_up(rig, path)
    assert copied_up(rig, path)
    assert copied_up(rig, b"d")
    assert not differences(before, rig.tree())
    assert rig.attr(path).ino == inode
    assert on_disk(make.base / "lower0") == lower
    assert not differences(before, make.again(rig).tree())


def test_a_copy_keeps_holes(make: Maker) -> None:
    rig = make(EVERYTHING)
    copy_up(rig, b"d/sparse")
    st = os.stat(make.upper / "d/sparse")
    assert st.st_size == 3_000_000
    assert st.st_blocks * 512 < 100_000


def test_the_marks_of_a_lower_object_are_not_copied(make: Maker) -> None:
    foreign = (("user.fuseoverlayfs.opaque", b"n"), ("user.fuseoverlayfs.overlay.x", b"y"))
    mine = (("@origin", b"junk"), ("@impure", b"y"), ("@overlay.opaque", b"y"), ("user.overlay.origin", b"mine"))
    marked = (*mine, *foreign, ("user.containers.override_stat", b"z"))
    rig = make((Node(b"d/f", xattrs=marked), Node(b"d", kind="dir", xattrs=marked)))
    copy_up(rig, b"d/f")
    for path in ("d", "d/f"):
        keys = set(os.listxattr(make.upper / path))
        assert os.getxattr(make.upper / path, "trusted.overlay.origin") != b"junk"
        assert {"trusted.overlay.overlay.opaque", "user.overlay.origin", "user.fuseoverlayfs.overlay.x"} <= keys
        assert "user.fuseoverlayfs.opaque" not in keys
        # Here it says nothing of owners, as the root has none.
        assert os.getxattr(make.upper / path, "user.containers.override_stat") == b"z"
    assert rig.xattrs(b"d/f")[b"trusted.overlay.opaque"] == b"y"
    assert rig.xattrs(b"d/f")[b"user.fuseoverlayfs.x"] == b"y"


def test_reading_copies_nothing(make: Maker) -> None:
    rig = make(EVERYTHING)
    rig.tree()
    assert list(make.upper.iterdir()) == []


def test_opening_for_writing_copies_and_the_times_of_the_parent_stay(make: Maker) -> None:
    rig = make(EVERYTHING)
    before = rig.attr(b"d")
    with rig.opened(b"d/file", os.O_RDWR):
        assert copied_up(rig, b"d/file")
    after = rig.attr(b"d")
    assert (before.mtime_ns, before.atime_ns) == (after.mtime_ns, after.atime_ns)


def test_a_handle_opened_before_the_copy_shows_what_is_written_after_it(make: Maker) -> None:
    rig = make((Node(b"a", data=b"old data"),))
    with rig.opened(b"a") as early:
        assert rig.read_file(early) == b"old data"
        rig.write(b"a", b"NEW")
        assert rig.read_file(early) == b"NEW data"
        rig.unlink(b"a")
        assert rig.read_file(early) == b"NEW data"


def test_truncation_copies_only_what_stays(make: Maker) -> None:
    rig = make(EVERYTHING)
    attr = rig.change(b"d/file", size=10)
    assert attr.size == 10
    assert rig.read(b"d/file") == b"0123456789"
    assert os.stat(make.upper / "d/file").st_blocks * 512 <= 65536


def test_opening_with_truncation_copies_no_data_and_sets_the_time(make: Maker) -> None:
    rig = make(EVERYTHING)
    before = rig.attr(b"d/file").mtime_ns
    with rig.opened(b"d/file", os.O_WRONLY | os.O_TRUNC):
        assert rig.attr(b"d/file").size == 0
    assert rig.attr(b"d/file").mtime_ns > before
    assert make.again(rig).read(b"d/file") == b""


def test_a_file_is_extended_with_zeros(make: Maker) -> None:
    rig = make((Node(b"a", data=b"abc"),))
    rig.change(b"a", size=6)
    assert rig.read(b"a") == b"abc\0\0\0"


def test_changing_attributes_makes_a_metacopy_which_gets_its_data_when_written(make: Maker) -> None:
    rig = make(EVERYTHING, metacopy=True)
    data = rig.read(b"d/file")
    rig.change(b"d/file", mode=0o600)
    assert os.stat(make.upper / "d/file").st_blocks * 512 <= 4096
    assert rig.read(b"d/file") == data
    rig = make.again(rig)
    assert rig.read(b"d/file") == data
    before = rig.attr(b"d/file").mtime_ns
    with rig.opened(b"d/file", os.O_RDWR):
        assert rig.attr(b"d/file").mtime_ns == before
    assert "trusted.overlay.metacopy" not in os.listxattr(make.upper / "d/file")
    rig.write(b"d/file", b"XX")
    assert make.again(rig).read(b"d/file") == b"XX" + data[2:]


def test_an_empty_file_is_never_a_metacopy(make: Maker) -> None:
    rig = make(EVERYTHING, metacopy=True)
    rig.change(b"d/empty", mode=0o600)
    assert "trusted.overlay.metacopy" not in os.listxattr(make.upper / "d/empty")


def test_a_truncated_metacopy_keeps_what_stays(make: Maker) -> None:
    rig = make(EVERYTHING, metacopy=True)
    rig.change(b"d/file", mode=0o600)
    rig.change(b"d/file", size=4)
    assert rig.read(b"d/file") == b"0123"
    assert make.again(rig).read(b"d/file") == b"0123"


def test_a_removed_but_open_lower_file_can_still_be_written(make: Maker) -> None:
    rig = make((Node(b"a", data=b"old data"),))
    with rig.opened(b"a") as file:
        node = file.node
        rig.unlink(b"a")
        writer = rig.call("open", node, os.O_RDWR)
        rig.call("write", writer, 0, b"NEW")
        assert rig.read_file(file) == b"NEW data"
        assert rig.call("getattr", node).nlink == 0
        rig.call("release", writer)
    assert set(os.listdir(make.upper)) == {"a"}
    assert stat.S_ISCHR(os.lstat(make.upper / "a").st_mode)


def test_a_file_of_a_layer_changed_into_something_else_is_not_opened(make: Maker) -> None:
    rig = make((Node(b"a", data=b"data"),))
    rig.node(b"a")
    (make.base / "lower0/a").unlink()
    os.mkfifo(make.base / "lower0/a")
    with pytest.raises(OSError, match="Stale"):
        rig.open(b"a")
    with pytest.raises(OSError, match="Stale"):
        rig.open(b"a", os.O_WRONLY)
    assert list(make.upper.iterdir()) == []


def test_a_read_only_overlay_changes_nothing(make: Maker) -> None:
    rig = make(EVERYTHING, upper=None)
    for change in (
        lambda: rig.open(b"d/file", os.O_WRONLY),
        lambda: rig.change(b"d/file", mode=0o600),
        lambda: rig.create(b"new"),
        lambda: rig.mkdir(b"new"),
        lambda: rig.unlink(b"d/file"),
        lambda: rig.rmdir(b"d/sub"),
        lambda: rig.rename(b"d/file", b"new"),
        lambda: rig.link(b"d/file", b"new"),
        lambda: rig.setxattr(b"d/file", b"user.a", b""),
        lambda: rig.removexattr(b"d/file", b"user.k"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()


def noted(log: list[str], what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which notes each call."""

    def call(*arguments: Any) -> Any:
        log.append(what)
        return function(*arguments)

    return call


def test_the_data_of_a_copy_is_synced_before_it_gets_its_name(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(
        (Node(b"one", data=b"1"), Node(b"two", data=b"2" * 5000), Node(b"big", data=b"3" * 200_000), Node(b"empty"))
    )
    log: list[str] = []
    monkeypatch.setattr(os, "fsync", noted(log, "sync", os.fsync))
    monkeypatch.setattr(files, "link_fd", noted(log, "name", files.link_fd))
    for name in (b"one", b"two", b"big", b"empty"):
        rig.change(name, mode=0o600)
    assert log == ["sync", "name"] * 3 + ["name"]
    assert rig.read(b"two") == b"2" * 5000


def test_what_a_copy_shares_with_the_original_is_not_synced(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make((Node(b"small", data=b"1"), Node(b"big", data=b"3" * 200_000)))
    log: list[str] = []
    real = copying.copy_data

    def share(*arguments: Any, **named: Any) -> bool:
        real(*arguments, **named)
        return True

    monkeypatch.setattr(copying, "copy_data", share)
    monkeypatch.setattr(os, "fsync", noted(log, "sync", os.fsync))
    for name in (b"small", b"big"):
        rig.change(name, mode=0o600)
        assert copied_up(rig, name)
    assert log == []


def test_small_files_keep_their_holes(make: Maker) -> None:
    rig = make((Node(b"first", data=b"1"), Node(b"sparse", data=b"head", size=60_000)))
    for name in (b"first", b"sparse"):
        rig.change(name, mode=0o600)
    copied = os.stat(make.upper / "sparse")
    assert copied.st_size == 60_000
    assert copied.st_blocks * 512 < 60_000
