"""Attributes, extended attributes, owners: what is shown, what is stored, what is hidden."""

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest

from overlayfs_py.config import IdRange
from overlayfs_py.core import ids
from tests.core.conftest import Maker
from tests.core.rig import ALICE, differences
from tests.support.trees import Node, acl

NONE = 0xFFFFFFFF
LOWER = (
    Node(b"file", data=b"file", mode=0o6755, uid=100005, gid=100006, xattrs=(("user.k", b"v"),)),
    Node(b"d/x", data=b"x", uid=100000, gid=100000),
    Node(b"sym", kind="symlink", data=b"file", uid=100001),
)
MAPPED: dict[str, Any] = {
    "uidmapping": (IdRange(100000, 0, 1000),),
    "gidmapping": (IdRange(100000, 0, 1000),),
}


def fails_with(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as raised:
        call()
    assert raised.value.errno == number, raised.value


@pytest.mark.parametrize("path", [b"file", b"sym", b"d", b"d/x"])
def test_owner_and_times_are_set_to_the_nanosecond(make: Maker, path: bytes) -> None:
    rig = make(LOWER)
    rig.change(path, uid=1, gid=2, atime_ns=1_000_000_000_000_000_007, mtime_ns=-5)
    for _ in make.now_and_again(rig):
        attr = rig.attr(path)
        assert (attr.uid, attr.gid) == (1, 2)
        assert (attr.atime_ns, attr.mtime_ns) == (1_000_000_000_000_000_007, -5)


def test_one_attribute_is_changed_without_the_others(make: Maker) -> None:
    rig = make(LOWER)
    before = rig.attr(b"file")
    after = rig.change(b"file", atime_ns=5)
    assert (after.atime_ns, after.mtime_ns, after.mode) == (5, before.mtime_ns, before.mode)
    assert rig.change(b"file", gid=9).uid == before.uid


def test_a_change_of_owner_takes_the_set_ids(make: Maker) -> None:
    rig = make(LOWER)
    assert rig.change(b"file", uid=3).mode & 0o7777 == 0o755


def test_a_truncation_without_the_capability_takes_the_set_ids(make: Maker) -> None:
    rig = make(LOWER)
    assert rig.change(b"file", size=1).mode & 0o7777 == 0o6755
    assert rig.change(b"file", size=2, clear_set_ids=True).mode & 0o7777 == 0o755


def test_a_symbolic_link_has_no_mode_to_change(make: Maker) -> None:
    fails_with(errno.EOPNOTSUPP, lambda: make(LOWER).change(b"sym", mode=0o600))


# Extended attributes.


@pytest.mark.parametrize("namespace", ["user", "trusted"])
def test_marks_of_the_overlay_are_hidden_and_those_set_through_it_are_escaped(make: Maker, namespace: str) -> None:
    """Two overlays nest: the outer one's marks are data to the inner one."""
    prefix = f"{namespace}.overlay.".encode()
    rig = make(LOWER, userxattr=namespace == "user")
    rig.setxattr(b"file", prefix + b"origin", b"nested")
    assert rig.getxattr(b"file", prefix + b"origin") == b"nested"
    assert os.getxattr(make.upper / "file", prefix + b"overlay.origin") == b"nested"
    assert os.getxattr(make.upper / "file", prefix + b"origin") != b"nested"
    assert set(rig.xattrs(b"file")) == {b"user.k", prefix + b"origin"}
    rig.removexattr(b"file", prefix + b"origin")
    assert set(rig.xattrs(b"file")) == {b"user.k"}
    assert prefix.decode() + "origin" in os.listxattr(make.upper / "file")
    fails_with(errno.ENODATA, lambda: rig.getxattr(b"file", prefix + b"origin"))


def test_the_other_namespace_of_marks_is_data(make: Maker) -> None:
    rig = make(LOWER)
    rig.setxattr(b"file", b"user.overlay.opaque", b"y")
    assert os.getxattr(make.upper / "file", "user.overlay.opaque") == b"y"
    assert b"user.overlay.opaque" in rig.xattrs(b"file")


def test_create_and_replace_are_obeyed_before_anything_is_copied(make: Maker) -> None:
    rig = make(LOWER)
    fails_with(errno.EEXIST, lambda: rig.setxattr(b"file", b"user.k", b"n", os.XATTR_CREATE))
    fails_with(errno.ENODATA, lambda: rig.setxattr(b"file", b"user.none", b"n", os.XATTR_REPLACE))
    fails_with(errno.ENODATA, lambda: rig.removexattr(b"file", b"user.none"))
    assert os.listdir(make.upper) == []
    rig.setxattr(b"file", b"user.none", b"n", os.XATTR_CREATE)
    rig.setxattr(b"file", b"user.k", b"n", os.XATTR_REPLACE)
    assert rig.xattrs(b"file") == {b"user.k": b"n", b"user.none": b"n"}


def test_acls_are_not_there_with_noacl(make: Maker) -> None:
    key = b"system.posix_acl_access"
    guarded = acl((1, 7, NONE), (2, 7, 5), (4, 5, NONE), (0x10, 7, NONE), (0x20, 5, NONE))
    rig = make((Node(b"f", xattrs=((key.decode(), guarded),)),), noacl=True)
    assert rig.xattrs(b"f") == {}
    fails_with(errno.EOPNOTSUPP, lambda: rig.getxattr(b"f", key))
    fails_with(errno.EOPNOTSUPP, lambda: rig.setxattr(b"f", key, guarded))


# Owners.


def test_owners_are_shown_through_the_mapping_and_stored_through_it(make: Maker) -> None:
    rig = make(LOWER, **MAPPED)
    assert (rig.attr(b"file").uid, rig.attr(b"file").gid) == (5, 6)
    rig.change(b"file", uid=7)
    assert (rig.attr(b"file").uid, os.stat(make.upper / "file").st_uid) == (7, 100007)
    rig.create(b"new", caller=ALICE._replace(uid=9, gid=10))
    st = os.stat(make.upper / "new")
    assert (st.st_uid, st.st_gid) == (100009, 100010)
    assert (rig.attr(b"new").uid, rig.attr(b"new").gid) == (9, 10)


def test_a_copy_keeps_its_owner_whatever_the_mapping(make: Maker) -> None:
    rig = make(LOWER, **MAPPED)
    rig.write(b"d/x", b"X")
    assert os.stat(make.upper / "d/x").st_uid == 100000
    assert rig.attr(b"d/x").uid == 0


def test_the_ids_of_acls_are_mapped_too(make: Maker) -> None:
    key = b"system.posix_acl_access"
    rig = make(LOWER, **MAPPED)
    shown = acl((1, 7, NONE), (2, 7, 5), (4, 5, NONE), (0x10, 7, NONE), (0x20, 5, NONE))
    rig.setxattr(b"file", key, shown)
    assert rig.getxattr(b"file", key) == shown
    assert os.getxattr(make.upper / "file", key) == shown.replace(b"\5\0\0\0", (100005).to_bytes(4, "little"))


def test_squashed_owners_are_shown_as_one(make: Maker) -> None:
    rig = make(LOWER, squash_uid=0, squash_gid=0)
    assert {(seen.uid, seen.gid) for seen in rig.tree().values()} == {(0, 0)}
    rig.write(b"file", b"F")
    assert os.stat(make.upper / "file").st_uid == 100005


@pytest.mark.parametrize("version", [1, 2])
def test_owners_and_modes_live_in_an_xattr_that_nobody_sees(make: Maker, version: Any) -> None:
    rig = make(LOWER, xattr_permissions=version)
    override = ids.override_key(version)
    before = rig.tree()
    rig.rename(b"sym", b"d/sym")
    rig.change(b"d/sym", uid=4)
    rig.write(b"d/x", b"X")
    rig.change(b"file", uid=1, gid=2, mode=0o4711)
    rig.create(b"new", mode=0o640, caller=ALICE)
    rig.mkdir(b"newdir", 0o700, caller=ALICE)
    rig.symlink(b"target", b"link", caller=ALICE)
    rig.mknod(b"device", stat.S_IFCHR | 0o600, os.makedev(5, 1), caller=ALICE)
    for _ in make.now_and_again(rig):
        attr = rig.attr(b"file")
        assert (attr.uid, attr.gid, attr.mode & 0o7777) == (1, 2, 0o4711)
        assert (rig.attr(b"new").uid, rig.attr(b"new").mode & 0o7777) == (1000, 0o640)
        assert (rig.attr(b"newdir").gid, rig.attr(b"newdir").mode & 0o7777) == (1000, 0o700)
        # No user.* xattr goes on a symbolic link.
        assert rig.attr(b"link").uid == (1000 if override.startswith(b"security.") else 0)
        device = rig.attr(b"device")
        assert (device.rdev, stat.S_ISCHR(device.mode)) == (os.makedev(5, 1), True)
        assert all(b"override" not in key for path in (b"file", b"new", b"d", b"") for key in rig.xattrs(path))
        assert (rig.attr(b"d/x").uid, rig.attr(b"").uid) == (before[b"d/x"].uid, before[b""].uid)
    st = os.stat(make.upper / "new")
    assert (st.st_uid, stat.S_IMODE(st.st_mode)) == (0, 0o755)
    assert override in map(os.fsencode, os.listxattr(make.upper / "new"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_lower_layer_that_keeps_owners_in_xattrs_is_read(make: Maker, version: Any) -> None:
    rig = make((), xattr_permissions=version)
    rig.create(b"a", b"data", mode=0o640, caller=ALICE)
    rig.mknod(b"device", stat.S_IFBLK | 0o600, os.makedev(7, 9), caller=ALICE)
    shown = rig.tree()
    rig.fs.close()
    lower = make.base / "lower0"
    lower.rmdir()
    make.upper.rename(lower)
    make.upper.mkdir()
    again = make.again(rig, xattr_permissions=0)
    assert not differences(shown, again.tree(), timeless={stat.S_IFDIR})
    again.write(b"a", b"DATA")
    assert os.stat(make.upper / "a").st_uid == 1000
    assert all(b"override" not in os.fsencode(key) for key in os.listxattr(make.upper / "a"))
