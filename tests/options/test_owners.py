"""Owners: mapped, squashed, kept in xattrs; and read and written as fuse-overlayfs does."""

import errno
import os
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.rig import error_of, mounted, python_as
from tests.support.mounts import fuse_overlayfs_mount
from tests.support.trees import ACL_ACCESS, ACL_DEFAULT, acl, compare_trees, read_tree, show_tree

_EVERYONE = 2**32 - 1
_OVERFLOW = 65534

Owner = tuple[int, int]


def owner(path: Path) -> Owner:
    status = path.stat(follow_symlinks=False)
    return status.st_uid, status.st_gid


def owner_of(fd: int) -> Owner:
    status = os.fstat(fd)
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


@pytest.mark.parametrize("format", [1, 2])
def test_nobody_gets_another_owner_by_the_xattr_that_holds_it(layers: Layers, engine: str, format: int) -> None:
    """Whoever may write a file may set its user.* xattrs: this one would make it root's, with set-user-ID."""
    (layers.lower / "theirs").write_text("lower")
    os.chown(layers.lower / "theirs", 42, 42)
    key = _KEYS[format]
    option = f"xattr_permissions={format}"
    with mounted(layers, option, engine):
        theirs = layers.mnt / "theirs"
        for state in ("lower", "copied up"):
            assert error_of(partial(os.getxattr, theirs, key)) == errno.ENODATA, state
            assert error_of(partial(os.setxattr, theirs, key, b"0:0:4755:file")) == errno.EPERM, state
            assert error_of(partial(os.removexattr, theirs, key)) == errno.EPERM, state
            if format == 2:
                script = f"os.setxattr(sys.argv[1], {key!r}, b'0:0:4755:file'); print('set')"
                assert python_as(42, script, theirs) == "EPERM", state
            os.utime(theirs)
        assert error_of(partial(os.setxattr, layers.mnt, key, b"42:42:0777:dir")) == errno.EPERM
        assert (owner(theirs), stat.S_IMODE(theirs.stat().st_mode)) == ((42, 42), 0o644)
    assert os.getxattr(layers.upper / "theirs", key) == b"42:42:0644:file"


@pytest.mark.parametrize("name", ["lower", "linked"])
@pytest.mark.parametrize("option", ["xattr_permissions=1", "xattr_permissions=2"])
def test_owner_and_mode_stay_with_a_file_whose_names_go(layers: Layers, engine: str, option: str, name: str) -> None:
    """A file that is copied up after its last name went, and one in the index."""
    owned(layers.lower / name, 42, 43, "lower")
    (layers.lower / name).chmod(0o2640)
    if name == "linked":
        os.link(layers.lower / name, layers.lower / "other")
    with mounted(layers, option, engine), (layers.mnt / name).open("r+b", buffering=0) as file:
        os.unlink(layers.mnt / name)
        file.write(b"upper")
        for _ in range(2):
            status = os.fstat(file.fileno())
            assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (42, 43, 0o2640)
            assert os.listxattr(file.fileno()) == []
            os.utime(file.fileno())
        os.fchmod(file.fileno(), 0o600)
        os.fchown(file.fileno(), 44, -1)
        status = os.fstat(file.fileno())
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (44, 43, 0o600)
        for key in _KEYS.values():
            if _KEYS[int(option[-1])] == key:
                assert error_of(partial(os.setxattr, file.fileno(), key, b"0:0:4755:file")) == errno.EPERM
        if name == "linked":
            assert owner(layers.mnt / "other") == (44, 43)


def test_a_file_that_has_lost_its_name_belongs_to_nobody_by_its_old_layers_xattr(layers: Layers, engine: str) -> None:
    key = "user.containers.override_stat"
    os.setxattr(layers.lower, key, b"0:0:0755:dir")
    (layers.lower / "theirs").write_text("lower")
    os.setxattr(layers.lower / "theirs", key, b"42:42:0644:file")
    with mounted(layers, engine), (layers.mnt / "theirs").open("r+b", buffering=0) as file:
        os.unlink(layers.mnt / "theirs")
        file.write(b"upper")
        assert owner_of(file.fileno()) == (42, 42)
        os.setxattr(file.fileno(), key, b"0:0:4755:file")
        status = os.fstat(file.fileno())
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (42, 0o644)
        assert os.getxattr(file.fileno(), key) == b"0:0:4755:file"


@pytest.mark.parametrize("key", [*_KEYS.values(), "user.fuseoverlayfs.override_stat"])
def test_where_owners_are_the_real_ones_such_an_xattr_is_as_any_other(layers: Layers, engine: str, key: str) -> None:
    (layers.lower / "f").write_text("lower")
    if not key.startswith("user.fuseoverlayfs"):
        os.setxattr(layers.lower / "f", key, b"42:42:0777:file")
    with mounted(layers, engine):
        os.setxattr(layers.mnt / "f", "user.x", b"")
        if not key.startswith("user.fuseoverlayfs"):
            assert os.getxattr(layers.mnt / "f", key) == b"42:42:0777:file"
        os.setxattr(layers.mnt / "f", key, b"43:43:0777:file")
        # In the root it would say that the whole layer is of the other kind.
        assert error_of(partial(os.setxattr, layers.mnt, key, b"0:0:0755:dir")) == errno.EPERM
    with mounted(layers, engine):
        assert os.getxattr(layers.mnt / "f", key) == b"43:43:0777:file"
        assert sorted(os.listxattr(layers.mnt / "f")) == sorted([key, "user.x"])
        assert owner(layers.mnt / "f") == (0, 0)
        os.removexattr(layers.mnt / "f", key)
        assert os.listxattr(layers.mnt / "f") == ["user.x"]


def test_a_mark_of_fuse_overlayfs_is_stored_as_an_xattr_and_nothing_else(layers: Layers, engine: str) -> None:
    """A fuse-overlayfs whose upper directory is in our mount marks it so."""
    mark = "user.fuseoverlayfs.opaque"
    (layers.lower / "d").mkdir()
    (layers.lower / "d" / "f").touch()
    with mounted(layers, engine):
        os.setxattr(layers.mnt / "d", mark, b"y")
    with mounted(layers, engine):
        assert os.listdir(layers.mnt / "d") == ["f"]
        assert os.listxattr(layers.mnt / "d") == [mark]
        assert os.getxattr(layers.mnt / "d", mark) == b"y"
    assert mark not in os.listxattr(layers.upper / "d")


_WRITES = {
    "write": "os.pwrite(os.open(sys.argv[1], os.O_WRONLY), b'x', 0)",
    "truncate": "os.truncate(sys.argv[1], 1)",
    "open": "os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC)",
    "allocate": "os.posix_fallocate(os.open(sys.argv[1], os.O_RDWR), 0, 100)",
    "copy": "fd = os.open(sys.argv[1], os.O_RDWR); os.copy_file_range(fd, fd, 10, 0, 50)",
}


@pytest.mark.parametrize("way", _WRITES)
@pytest.mark.parametrize("option", ["", "xattr_permissions=1", "xattr_permissions=2"])
def test_whoever_writes_takes_set_ids_wherever_the_mode_is_kept(
    layers: Layers, engine: str, option: str, way: str
) -> None:
    (layers.lower / "f").write_bytes(bytes(100))
    (layers.lower / "f").chmod(0o6777)
    with mounted(layers, option, engine):
        for name in ("f", "new"):
            (layers.mnt / name).write_bytes(bytes(100))
            (layers.mnt / name).chmod(0o6777)
            assert stat.S_IMODE((layers.mnt / name).stat().st_mode) == 0o6777
            assert python_as(42, f"{_WRITES[way]}; print('done')", layers.mnt / name) == "done"
            assert stat.S_IMODE((layers.mnt / name).stat().st_mode) == 0o777, name


@pytest.mark.parametrize("option", ["xattr_permissions=1", "xattr_permissions=2"])
def test_mode_and_acl_agree_as_on_any_filesystem(layers: Layers, engine: str, option: str) -> None:
    def for_42(user: int, named: int, group: int, other: int) -> bytes:
        others = ((4, group, _EVERYONE), (16, 7, _EVERYONE), (32, other, _EVERYONE))
        return acl((1, user, _EVERYONE), (2, named, 42), *others)

    def look(path: Path) -> tuple[str, bytes | None]:
        mode = oct(path.stat().st_mode)
        return mode, os.getxattr(path, ACL_ACCESS) if ACL_ACCESS in os.listxattr(path) else None

    def play(root: Path) -> Iterator[object]:
        for name in ("lower", "new", "d"):
            path = root / name
            if name == "d":
                path.mkdir()
            elif name == "new":
                path.touch()
            path.chmod(0o2640)
            os.chown(path, -1, 7)
            os.setxattr(path, ACL_ACCESS, for_42(6, 7, 5, 1))
            yield look(path)
            path.chmod(0o750)
            yield look(path)
            os.setxattr(path, ACL_ACCESS, acl((1, 4, _EVERYONE), (4, 2, _EVERYONE), (32, 1, _EVERYONE)))
            yield look(path)
        os.setxattr(root / "d", ACL_DEFAULT, for_42(7, 6, 5, 5))
        (root / "d").chmod(0o2775)
        (root / "d" / "f").touch(0o640)
        (root / "d" / "d").mkdir()
        for name in ("f", "d"):
            yield look(root / "d" / name)

    plain = layers.add("plain")
    for root in (layers.lower, plain):
        (root / "lower").touch()
    expected = list(play(plain))
    with mounted(layers, option, engine):
        assert list(play(layers.mnt)) == expected


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
