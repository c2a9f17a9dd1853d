"""Owners: mapped, squashed, kept in xattrs; and read and written as fuse-overlayfs does."""

import errno
import os
import stat
import time
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.rig import error_of, mounted, python_as
from tests.support.mounts import fuse_overlayfs_mount
from tests.support.trees import ACL_ACCESS, acl, compare_trees, read_tree, show_tree

_EVERYONE = 2**32 - 1
_OVERFLOW = 65534

Owner = tuple[int, int]


def owner(path: Path) -> Owner:
    status = path.stat(follow_symlinks=False)
    return status.st_uid, status.st_gid


def owned(path: Path, uid: int, gid: int, text: str = "") -> None:
    path.write_text(text)
    os.chown(path, uid, gid)


_MAPS = "uidmapping=:0:100000:1:1:5:10,gidmapping=0:7:1:1000:2000:500"


def test_mapped_owners_are_shown_and_stored(layers: Layers, engine: str) -> None:
    owned(layers.lower / "root", 0, 0)
    owned(layers.lower / "user", 3, 1499)
    owned(layers.lower / "outside", 11, 1500)
    (layers.lower / "link").symlink_to("root")
    (layers.lower / "d").mkdir(mode=0o777)
    (layers.lower / "d").chmod(0o777)
    (layers.lower / "setgid").mkdir()
    (layers.lower / "setgid").chmod(0o2777)
    with mounted(layers, _MAPS, engine):
        shown = {name: owner(layers.mnt / name) for name in ("root", "user", "outside", "link", "d")}
        assert shown == {
            "root": (100000, 7),
            "user": (7, 2499),
            "outside": (_OVERFLOW, _OVERFLOW),
            "link": (100000, 7),
            "d": (100000, 7),
        }
        os.chown(layers.mnt / "root", 14, 2000)
        assert owner(layers.mnt / "root") == (14, 2000)
        os.chown(layers.mnt / "link", 5, -1, follow_symlinks=False)
        for uid, gid in ((0, -1), (15, -1), (-1, 8), (-1, 2500)):
            assert error_of(partial(os.chown, layers.mnt / "user", uid, gid)) == errno.EOVERFLOW
        assert not (layers.upper / "user").exists() or owner(layers.upper / "user") == (3, 1499)
        create = "open(sys.argv[1], 'x').close(); print('made')"
        assert python_as(100000, create, layers.mnt / "d" / "root", gid=7) == "made"
        assert python_as(5, create, layers.mnt / "d" / "user", gid=2000) == "made"
        assert python_as(5, create, layers.mnt / "setgid" / "user", gid=2001) == "made"
        assert [owner(layers.mnt / "d" / name) for name in ("root", "user")] == [(100000, 7), (5, 2000)]
        assert owner(layers.mnt / "setgid" / "user") == (5, 7)
        # container engines put files there as a user that is not mapped, and change the owner then
        (layers.mnt / "d" / "unmapped").write_text("")
        assert owner(layers.mnt / "d" / "unmapped") == (_OVERFLOW, _OVERFLOW)
        os.chown(layers.mnt / "d" / "unmapped", 6, 7)
    assert owner(layers.upper / "root") == (10, 1000)
    assert owner(layers.upper / "link") == (1, 0)
    assert owner(layers.upper / "d" / "root") == (0, 0)
    assert owner(layers.upper / "d" / "user") == (1, 1000)
    assert owner(layers.upper / "d" / "unmapped") == (2, 0)
    with mounted(layers, _MAPS, engine):
        assert owner(layers.mnt / "d" / "user") == (5, 2000)


def test_users_in_acls_are_mapped(layers: Layers, engine: str) -> None:
    def for_user(uid: int) -> bytes:
        return acl((1, 6, _EVERYONE), (2, 4, uid), (4, 0, _EVERYONE), (16, 4, _EVERYONE), (32, 0, _EVERYONE))

    (layers.lower / "f").write_text("")
    os.setxattr(layers.lower / "f", ACL_ACCESS, for_user(3))
    with mounted(layers, _MAPS, engine):
        assert os.getxattr(layers.mnt / "f", ACL_ACCESS) == for_user(7)
        assert python_as(7, "os.open(sys.argv[1], os.O_RDONLY); print('opened')", layers.mnt / "f") == "opened"
        os.setxattr(layers.mnt / "f", ACL_ACCESS, for_user(8))
        assert os.getxattr(layers.mnt / "f", ACL_ACCESS) == for_user(8)
    assert os.getxattr(layers.upper / "f", ACL_ACCESS) == for_user(4)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("squash_to_root", (0, 0)),
        ("squash_to_root,squash_to_uid=9", (9, 0)),
        ("squash_to_gid=10", (7, 10)),
    ],
)
def test_squashed_owners_are_all_one(layers: Layers, engine: str, options: str, shown: Owner) -> None:
    owned(layers.lower / "f", 7, 8)
    (layers.lower / "d").mkdir()
    os.chown(layers.lower / "d", 7, 8)
    (layers.lower / "d").chmod(0o777)
    with mounted(layers, options, engine):
        assert [owner(layers.mnt / name) for name in ("f", "d")] == [shown] * 2
        os.chown(layers.mnt / "f", 20, 21)
        assert owner(layers.mnt / "f") == (shown[0] if shown[0] != 7 else 20, shown[1])
        (layers.mnt / "d" / "new").write_text("")
        (layers.mnt / "d" / "new").chmod(0o604)
        assert stat.S_IMODE((layers.mnt / "d" / "new").stat().st_mode) == 0o604
    # what is stored is what was asked for
    assert owner(layers.upper / "f") == (20, 21)
    assert owner(layers.upper / "d" / "new") == (0, 0)


_KEYS = {1: "security.fuseoverlayfs.override_stat", 2: "user.containers.override_stat"}


@pytest.mark.parametrize("format", [1, 2])
def test_owner_and_mode_live_in_an_xattr(layers: Layers, engine: str, format: int) -> None:
    key = _KEYS[format]
    option = f"xattr_permissions={format}"
    owned(layers.lower / "f", 7, 8, "lower")
    (layers.lower / "f").chmod(0o4751)
    (layers.lower / "open").mkdir()
    (layers.lower / "open").chmod(0o777)
    started = time.time_ns()
    with mounted(layers, option, engine):
        os.utime(layers.mnt / "f")
        assert (owner(layers.mnt / "f"), stat.S_IMODE((layers.mnt / "f").stat().st_mode)) == ((7, 8), 0o4751)
        (layers.mnt / "new").write_text("new")
        os.chown(layers.mnt / "new", 20, 21)
        (layers.mnt / "new").chmod(0o640)
        (layers.mnt / "d").mkdir(mode=0o700)
        os.chown(layers.mnt / "d", 22, 23)
        os.mkfifo(layers.mnt / "fifo", 0o601)
        os.mknod(layers.mnt / "device", stat.S_IFBLK | 0o640, os.makedev(7, 9))
        (layers.mnt / "link").symlink_to("new")
        made = "open(sys.argv[1], 'x').close(); print('made')"
        assert python_as(42, made, layers.mnt / "open" / "theirs", gid=43) == "made"
        assert owner(layers.mnt / "open" / "theirs") == (42, 43)
        for name in ("f", "new", "d", "open", "fifo"):
            assert os.listxattr(layers.mnt / name) == [], name
        status = (layers.mnt / "device").stat()
        assert (stat.S_ISBLK(status.st_mode), status.st_rdev) == (True, os.makedev(7, 9))
        assert python_as(43, "os.open(sys.argv[1], os.O_RDONLY)", layers.mnt / "new") == "EACCES"
        before = read_tree(os.fsencode(layers.mnt), started)
    for name, value in {
        "f": b"7:8:4751:file",
        "new": b"20:21:0640:file",
        "d": b"22:23:0700:dir",
        "fifo": b"0:0:0601:pipe",
        "device": b"0:0:0640:block-7-9",
        "open/theirs": b"42:43:0644:file",
    }.items():
        assert os.getxattr(layers.upper / name, key) == value, name
        assert owner(layers.upper / name) == (0, 0)
        assert stat.S_IMODE((layers.upper / name).stat().st_mode) & 0o7022 == 0
    assert os.getxattr(layers.upper, key).startswith(b"0:0:0755")
    with mounted(layers, option, engine):
        after = read_tree(os.fsencode(layers.mnt), started)
    assert not compare_trees(before, after), f"{show_tree(before)}\n\n{show_tree(after)}"


def change_much(root: Path, *, fifo: bool) -> None:
    """What fuse-overlayfs can do to a mount of this kind."""
    owned(root / "new", 20, 21, "new")
    (root / "new").chmod(0o4711)
    (root / "d").mkdir()
    (root / "d").chmod(0o1770)
    os.chown(root / "d", 22, 23)
    (root / "lower").chmod(0o600)
    if fifo:
        os.mkfifo(root / "fifo")
        (root / "fifo").chmod(0o601)


@pytest.mark.parametrize("format", [1, 2])
def test_owners_in_xattrs_are_shared_with_fuse_overlayfs(layers: Layers, engine: str, format: int) -> None:
    owned(layers.lower / "lower", 7, 8, "lower")
    option = f"xattr_permissions={format}"
    started = time.time_ns()
    with fuse_overlayfs_mount(layers.mnt, [layers.lower], layers.upper, layers.work, option):
        change_much(layers.mnt, fifo=format == 2)
        theirs = read_tree(os.fsencode(layers.mnt), started)
    with mounted(layers, option, engine):
        ours = read_tree(os.fsencode(layers.mnt), started)
        os.chown(layers.mnt / "new", 30, 31)
        (layers.mnt / "d" / "more").write_text("")
        (layers.mnt / "d" / "more").chmod(0o604)
        os.chown(layers.mnt / "d" / "more", 32, 33)
        changed = read_tree(os.fsencode(layers.mnt), started)
    # fuse-overlayfs shows the privileged xattr
    ignored = ("nlink", "atime", "xattrs")
    assert not compare_trees(theirs, ours, ignored), f"{show_tree(theirs)}\n\n{show_tree(ours)}"
    with fuse_overlayfs_mount(layers.mnt, [layers.lower], layers.upper, layers.work, option):
        theirs = read_tree(os.fsencode(layers.mnt), started)
    assert not compare_trees(changed, theirs, ignored), f"{show_tree(changed)}\n\n{show_tree(theirs)}"
