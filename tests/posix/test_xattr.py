"""Extended attributes: namespaces, flags, sizes, which files have them, and for whom."""

import ctypes
import errno
import os
import stat
from functools import partial

import pytest

from tests.posix import calls
from tests.posix.calls import XATTR_CREATE, XATTR_REPLACE
from tests.posix.files import NODES, TYPES, make
from tests.posix.rig import MEMBER, OTHER, OWNER, Root, as_user, fails, in_parallel, opened, prepared, read, write

NAMESPACES = ("user", "trusted", "security")


def build_file() -> None:
    write("f", b"data")
    os.mkdir("d")
    for path in ("f", "d"):
        for space in NAMESPACES:
            os.setxattr(path, f"{space}.old", b"old value")


@pytest.mark.parametrize("space", NAMESPACES)
@pytest.mark.parametrize("path", ["f", "d"])
@prepared(build_file)
def test_an_attribute_is_set_read_replaced_and_removed(root: Root, path: str, space: str) -> None:
    name = f"{space}.new"
    with fails(errno.ENODATA):
        os.getxattr(path, name)
    for value in (b"first", b"", b"\0\xff" * 100, b"last"):
        os.setxattr(path, name, value)
        assert os.getxattr(path, name) == value
        assert sorted(os.listxattr(path)).count(name) == 1
    assert os.getxattr(path, f"{space}.old") == b"old value"
    os.removexattr(path, name)
    os.removexattr(path, f"{space}.old")
    for gone in (name, f"{space}.old"):
        with fails(errno.ENODATA):
            os.getxattr(path, gone)
        with fails(errno.ENODATA):
            os.removexattr(path, gone)
        assert gone not in os.listxattr(path)


@prepared(build_file)
def test_a_listing_names_every_attribute_once(root: Root) -> None:
    for path in ("f", "d"):
        for number in range(20):
            os.setxattr(path, f"user.n{number}", b"%d" % number)
        expected = [f"{space}.old" for space in NAMESPACES] + [f"user.n{number}" for number in range(20)]
        assert sorted(os.listxattr(path)) == sorted(expected)
        for number in range(20):
            assert os.getxattr(path, f"user.n{number}") == b"%d" % number


@prepared(build_file)
def test_create_and_replace_look_at_what_is_there(root: Root) -> None:
    with root.touches(f=""):
        with fails(errno.EEXIST):
            os.setxattr("f", "user.old", b"again", XATTR_CREATE)
        with fails(errno.ENODATA):
            os.setxattr("f", "user.new", b"value", XATTR_REPLACE)
    os.setxattr("f", "user.new", b"value", XATTR_CREATE)
    os.setxattr("f", "user.old", b"again", XATTR_REPLACE)
    assert (os.getxattr("f", "user.old"), os.getxattr("f", "user.new")) == (b"again", b"value")
    with fails(errno.EINVAL):
        os.setxattr("f", "user.old", b"x", 8)


@pytest.mark.parametrize("size", [0, 1, 255, 4000, 5000, 60_000, 65_536], ids=str)
@prepared(build_file)
def test_a_value_holds_up_to_64_kilobytes(root: Root, size: int) -> None:
    value = os.urandom(size)
    os.setxattr("f", "user.big", value)
    assert os.getxattr("f", "user.big") == value
    os.chmod("f", 0o600)
    os.rename("f", "g")
    assert os.getxattr("g", "user.big") == value


def build_large() -> None:
    write("f", b"data")
    os.setxattr("f", "user.big", b"v" * 65_536)
    os.setxattr("f", "user.small", b"s")
    os.setxattr("f", "user.empty", b"")


@prepared(build_large)
def test_large_and_empty_values_survive_a_change_of_the_file(root: Root) -> None:
    with opened("f", os.O_WRONLY | os.O_APPEND) as descriptor:
        os.write(descriptor, b" more")
    assert os.getxattr("f", "user.big") == b"v" * 65_536
    assert os.getxattr("f", "user.small") == b"s"
    assert os.getxattr("f", "user.empty") == b""
    assert sorted(os.listxattr("f")) == ["user.big", "user.empty", "user.small"]


@prepared(build_file)
def test_a_value_or_name_too_large_is_refused(root: Root) -> None:
    with root.touches(f=""):
        with fails(errno.E2BIG):
            os.setxattr("f", "user.big", b"x" * 65_537)
        with fails(errno.ERANGE):
            os.setxattr("f", "user." + "n" * 251, b"x")
        with fails(errno.ERANGE):
            os.getxattr("f", "user." + "n" * 300)
        with fails(errno.ERANGE):
            os.removexattr("f", "")
    name = "user." + "n" * 250
    os.setxattr("f", name, b"x")
    assert os.getxattr("f", name) == b"x"
    assert name in os.listxattr("f")


@prepared(build_file)
def test_a_buffer_too_small_gives_erange_and_none_gives_the_size(root: Root) -> None:
    buffer = ctypes.create_string_buffer(100)
    assert calls.call("getxattr", b"f", b"user.old", None, 0) == len(b"old value")
    assert calls.call("getxattr", b"f", b"user.old", buffer, 9) == 9
    with fails(errno.ERANGE):
        calls.call("getxattr", b"f", b"user.old", buffer, 8)
    length = calls.call("listxattr", b"f", None, 0)
    assert length == sum(len(name) + 1 for name in os.listxattr("f"))
    with fails(errno.ERANGE):
        calls.call("listxattr", b"f", buffer, length - 1)


@prepared(build_file)
def test_unknown_namespaces_are_refused(root: Root) -> None:
    for name in ("other.name", "nodot", "User.x", "system.unknown"):
        with root.touches(f=""), fails(errno.EOPNOTSUPP):
            os.setxattr("f", name, b"x")
        with fails(errno.EOPNOTSUPP):
            os.getxattr("f", name)
    for name in ("user.", "trusted."):
        with fails(errno.EINVAL):
            os.setxattr("f", name, b"x")


def build_types() -> None:
    for kind in TYPES:
        make(kind, kind)


@prepared(build_types)
def test_user_attributes_are_for_files_and_directories_alone(root: Root) -> None:
    for kind in TYPES:
        if kind in ("regular", "directory"):
            os.setxattr(kind, "user.a", b"value", follow_symlinks=False)
            assert os.getxattr(kind, "user.a", follow_symlinks=False) == b"value"
        else:
            with fails(errno.EPERM):
                os.setxattr(kind, "user.a", b"value", follow_symlinks=False)
            with fails(errno.ENODATA, errno.EPERM):
                os.getxattr(kind, "user.a", follow_symlinks=False)


@prepared(build_types)
def test_trusted_and_security_attributes_are_for_every_type(root: Root) -> None:
    for kind in TYPES:
        for name in ("trusted.a", "security.a"):
            os.setxattr(kind, name, b"value", follow_symlinks=False)
            assert os.getxattr(kind, name, follow_symlinks=False) == b"value"
        assert sorted(os.listxattr(kind, follow_symlinks=False)) == ["security.a", "trusted.a"]
        os.removexattr(kind, "trusted.a", follow_symlinks=False)
        assert os.listxattr(kind, follow_symlinks=False) == ["security.a"]


def build_linked() -> None:
    write("f", b"data")
    os.symlink("f", "link")
    os.symlink("missing", "dangling")


@prepared(build_linked)
def test_attributes_of_a_link_are_not_those_of_its_target(root: Root) -> None:
    os.setxattr("link", "trusted.a", b"target")
    os.setxattr("link", "trusted.a", b"link", follow_symlinks=False)
    assert os.getxattr("f", "trusted.a") == b"target"
    assert os.getxattr("link", "trusted.a") == b"target"
    assert os.getxattr("link", "trusted.a", follow_symlinks=False) == b"link"
    assert os.readlink("link") == "f"
    with fails(errno.ENOENT):
        os.getxattr("dangling", "trusted.a")
    with fails(errno.ENODATA):
        os.getxattr("dangling", "trusted.a", follow_symlinks=False)


def build_owned() -> None:
    write("f", b"data", 0o640)
    os.setxattr("f", "user.a", b"value")
    os.setxattr("f", "trusted.t", b"secret")
    os.setxattr("f", "security.s", b"label")
    os.chown("f", OWNER.uid, OWNER.gid)


@prepared(build_owned)
def test_user_attributes_go_by_the_permissions_of_the_file(root: Root) -> None:
    assert as_user(OWNER, os.getxattr, "f", "user.a") == b"value"
    assert as_user(MEMBER, os.getxattr, "f", "user.a") == b"value"
    as_user(OWNER, os.setxattr, "f", "user.b", b"new")
    with root.touches(f=""):
        for user in (MEMBER, OTHER):
            with fails(errno.EACCES):
                as_user(user, os.setxattr, "f", "user.c", b"new")
            with fails(errno.EACCES):
                as_user(user, os.removexattr, "f", "user.a")
        with fails(errno.EACCES):
            as_user(OTHER, os.getxattr, "f", "user.a")
    as_user(OWNER, os.removexattr, "f", "user.a")
    assert "user.a" not in os.listxattr("f")


@prepared(build_owned)
def test_trusted_attributes_are_hidden_from_users(root: Root) -> None:
    with root.touches(f=""):
        with fails(errno.EPERM):
            as_user(OWNER, os.setxattr, "f", "trusted.t", b"x")
        with fails(errno.ENODATA):
            as_user(OWNER, os.getxattr, "f", "trusted.t")
        with fails(errno.EPERM):
            as_user(OWNER, os.setxattr, "f", "security.s", b"x")
    assert as_user(OWNER, os.getxattr, "f", "security.s") == b"label"
    assert sorted(as_user(OWNER, os.listxattr, "f")) == ["security.s", "user.a"]
    assert sorted(os.listxattr("f")) == ["security.s", "trusted.t", "user.a"]


def build_sticky() -> None:
    os.mkdir("d")
    os.chmod("d", 0o1777)
    os.chown("d", OWNER.uid, OWNER.gid)


@prepared(build_sticky)
def test_user_attributes_of_a_sticky_directory_are_for_its_owner(root: Root) -> None:
    with root.touches(d=""), fails(errno.EPERM):
        as_user(OTHER, os.setxattr, "d", "user.a", b"x")
    as_user(OWNER, os.setxattr, "d", "user.a", b"x")
    assert os.getxattr("d", "user.a") == b"x"


@prepared(build_file)
def test_attributes_are_reached_through_descriptors(root: Root) -> None:
    for path in ("f", "d"):
        with opened(path) as descriptor:
            os.rename(path, f"{path}.moved")
            os.setxattr(descriptor, "user.fd", b"by descriptor")
            assert os.getxattr(f"{path}.moved", "user.fd") == b"by descriptor"
            os.removexattr(descriptor, "user.old")
            assert "user.old" not in os.listxattr(descriptor)


@prepared(build_file)
def test_attributes_belong_to_all_names_of_a_file(root: Root) -> None:
    os.link("f", "g")
    os.setxattr("g", "user.shared", b"yes")
    assert os.getxattr("f", "user.shared") == b"yes"
    os.unlink("g")
    assert os.getxattr("f", "user.shared") == b"yes"


@prepared(build_file)
def test_a_new_file_in_place_of_another_has_no_attributes_of_it(root: Root) -> None:
    os.unlink("f")
    write("f", b"new")
    assert os.listxattr("f") == []
    os.rmdir("d")
    os.mkdir("d")
    assert os.listxattr("d") == []
    for kind in NODES:
        make(kind, kind)
        assert os.listxattr(kind) == []


@prepared(build_file)
def test_many_attributes_fit_a_file(root: Root) -> None:
    for number in range(60):
        os.setxattr("f", f"user.name{number}", b"v" * 20)
    assert len(os.listxattr("f")) == 63
    os.chmod("f", 0o600)
    for number in range(0, 60, 2):
        os.removexattr("f", f"user.name{number}")
    assert len(os.listxattr("f")) == 33


@prepared(build_file)
def test_names_and_values_of_attributes_are_bytes(root: Root) -> None:
    name = b"user.\xff\xfe \n"
    os.setxattr(b"f", name, b"\0\1\2")
    assert os.getxattr(b"f", name) == b"\0\1\2"
    assert os.fsdecode(name) in os.listxattr("f")


@prepared(build_file)
def test_the_name_of_an_attribute_may_look_like_a_path(root: Root) -> None:
    for name in ("user.a/b", "user.../..", "user./", "user.overlay", "trusted.overlayed", "user.fuse"):
        os.setxattr("f", name, b"value")
        assert os.getxattr("f", name) == b"value"
        assert name in os.listxattr("f")
        os.removexattr("f", name)
    assert sorted(os.listxattr("f")) == sorted(f"{space}.old" for space in NAMESPACES)


@prepared(build_file)
def test_attributes_set_at_the_same_time_are_all_there(root: Root) -> None:
    def work(worker: int) -> None:
        for number in range(5):
            os.setxattr("f", f"user.{worker}-{number}", b"%d" % number)
            assert os.getxattr("f", f"user.{worker}-{number}") == b"%d" % number
            os.listxattr("f")

    in_parallel([partial(work, worker) for worker in range(5)])
    assert len(os.listxattr("f")) == 25 + len(NAMESPACES)


def capability() -> bytes:
    """cap_net_raw=ep, as linux/capability.h lays out version 2."""
    return b"\x01\x00\x00\x02" + (1 << 13).to_bytes(4, "little") + b"\0" * 12


def build_capable() -> None:
    write("f", b"data", 0o777)
    os.setxattr("f", "security.capability", capability())


@pytest.mark.parametrize("change", ["write", "truncate", "chown"])
@prepared(build_capable)
def test_capabilities_of_a_program_go_when_it_changes(root: Root, change: str) -> None:
    os.chmod("f", 0o755)
    assert os.getxattr("f", "security.capability") == capability()
    os.chmod("f", 0o777)

    def alter() -> None:
        if change == "write":
            with opened("f", os.O_WRONLY) as descriptor:
                os.write(descriptor, b"x")
        elif change == "truncate":
            os.truncate("f", 1)

    as_user(OTHER, alter)
    if change == "chown":
        os.chown("f", OWNER.uid, OWNER.gid)
    with fails(errno.ENODATA):
        os.getxattr("f", "security.capability")
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o777
    assert read("f")[:1] in (b"x", b"d")
