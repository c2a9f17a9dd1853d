"""POSIX ACLs: enforced for other users, tied to the mode, inherited from directories; see acl(5)."""

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.posix.acl import ACCESS, DEFAULT, encode, get_acl, set_acl
from tests.posix.rig import MEMBER, OTHER, OWNER, Root, User, as_user, fails, prepared, read, umask, write


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def has(path: str, kind: str) -> bool:
    return kind in os.listxattr(path)


STRANGER = User(50001, 50001)
NAMED = f"user::rw-,user:{OTHER.uid}:rw-,group::r--,group:{MEMBER.gid}:---,mask::rw-,other::r--"


def build_listed() -> None:
    write("f", b"data")
    os.chown("f", OWNER.uid, 0)
    set_acl("f", NAMED)


@prepared(build_listed)
def test_an_access_list_reads_back_and_shows_its_mask_in_the_mode(root: Root) -> None:
    assert get_acl("f") == NAMED
    assert mode_of("f") == 0o664
    assert has("f", ACCESS)


def allowed(user: User, path: str) -> str:
    def probe() -> str:
        found = ""
        for letter, flags in (("r", os.O_RDONLY), ("w", os.O_WRONLY)):
            try:
                os.close(os.open(path, flags))
                found += letter
            except PermissionError:
                found += "-"
        return found

    return as_user(user, probe)


@prepared(build_listed)
def test_entries_of_users_and_groups_are_enforced(root: Root) -> None:
    assert allowed(OWNER, "f") == "rw"
    assert allowed(OTHER, "f") == "rw"
    assert allowed(MEMBER, "f") == "--"
    assert allowed(STRANGER, "f") == "r-"
    assert allowed(User(50001, 50001, (0,)), "f") == "r-"


CASES = {
    "user-beyond-mask": (f"user::rw-,user:{OTHER.uid}:rw-,group::rw-,mask::r--,other::---", OTHER, "r-"),
    "group-beyond-mask": (f"user::rw-,group::---,group:{OTHER.gid}:rw-,mask::-w-,other::rw-", OTHER, "-w"),
    "owner-ignores-mask": ("user::rw-,user:1:r--,group::---,mask::---,other::---", OWNER, "rw"),
    "owner-ignores-own-entry": (f"user::---,user:{OWNER.uid}:rw-,group::rw-,mask::rw-,other::rw-", OWNER, "--"),
    "user-entry-comes-before-groups": (f"user::rw-,user:{OTHER.uid}:---,group::rw-,mask::rw-,other::rw-", OTHER, "--"),
    "one-of-several-groups-is-enough": (
        f"user::rw-,group::---,group:{MEMBER.gid}:---,group:{MEMBER.groups[0]}:rw-,mask::rw-,other::---",
        MEMBER,
        "rw",
    ),
    "a-matching-group-excludes-other": (
        f"user::rw-,group::---,group:{OTHER.gid}:---,mask::rw-,other::rw-",
        OTHER,
        "--",
    ),
    "other-ignores-mask": ("user::rw-,user:1:rwx,group::---,mask::---,other::rw-", OTHER, "rw"),
}


@pytest.mark.parametrize("name", CASES)
@prepared(build_listed)
def test_who_may_do_what_goes_by_the_first_entry_that_fits(root: Root, name: str) -> None:
    text, user, expected = CASES[name]
    set_acl("f", text)
    assert allowed(user, "f") == expected
    os.chmod("f", mode_of("f"))
    assert allowed(user, "f") == expected


@prepared(build_listed)
def test_chmod_of_the_group_bits_sets_the_mask(root: Root) -> None:
    os.chmod("f", 0o640)
    assert get_acl("f") == NAMED.replace("mask::rw-", "mask::r--").replace("other::r--", "other::---")
    assert allowed(OTHER, "f") == "r-"
    os.chmod("f", 0o467)
    assert get_acl("f") == NAMED.replace("user::rw-", "user::r--").replace("other::r--", "other::rwx")
    assert allowed(OTHER, "f") == "rw"
    assert mode_of("f") == 0o467


def build_plain() -> None:
    write("f", b"data")
    os.mkdir("d")
    os.chmod("d", 0o777)
    os.chown("f", OWNER.uid, 0)


@prepared(build_plain)
def test_a_list_that_says_no_more_than_a_mode_becomes_the_mode(root: Root) -> None:
    with root.touches(f="c"):
        set_acl("f", "user::rwx,group::r-x,other::--x")
    assert mode_of("f") == 0o751
    assert not has("f", ACCESS)
    with fails(errno.ENODATA):
        get_acl("f")


@prepared(build_plain)
def test_setting_a_list_changes_the_mode(root: Root) -> None:
    os.chmod("f", 0o4711)
    set_acl("f", "user::r--,user:7:rwx,group::-w-,mask::rwx,other::--x")
    assert mode_of("f") == 0o4471
    os.removexattr("f", ACCESS)
    assert mode_of("f") & 0o707 == 0o401
    assert not has("f", ACCESS)


@prepared(build_plain)
def test_setting_a_list_outside_ones_group_loses_the_setgid_bit(root: Root) -> None:
    os.chown("f", OWNER.uid, OTHER.gid)
    os.chmod("f", 0o2755)
    as_user(OWNER, set_acl, "f", "user::rwx,user:7:rwx,group::r-x,mask::rwx,other::r-x")
    assert mode_of("f") == 0o775


@prepared(build_plain)
def test_only_owners_set_lists(root: Root) -> None:
    with root.touches(f="", d=""):
        for path in ("f", "d"):
            with fails(errno.EPERM):
                as_user(OTHER, set_acl, path, NAMED)
        with fails(errno.EPERM):
            as_user(OTHER, set_acl, "d", NAMED, DEFAULT)
    as_user(OWNER, set_acl, "f", NAMED)
    with fails(errno.EPERM):
        as_user(OTHER, os.removexattr, "f", ACCESS)
    assert as_user(OTHER, get_acl, "f") == NAMED


BAD = {
    "no-owner": encode("group::r--,other::r--"),
    "no-mask": encode("user::r--,user:5:r--,group::r--,other::r--"),
    "twice": encode("user::r--,user::r--,group::r--,other::r--"),
    "short": b"\x02\x00\x00\x00\x01",
    "version": b"\x09" + encode("user::r--,group::r--,other::r--")[1:],
}


@pytest.mark.parametrize("name", BAD)
@prepared(build_plain)
def test_a_broken_list_is_refused(root: Root, name: str) -> None:
    with root.touches(f="", d=""):
        for path, kind in (("f", ACCESS), ("d", ACCESS), ("d", DEFAULT)):
            with fails(errno.EINVAL, errno.EOPNOTSUPP):
                os.setxattr(path, kind, BAD[name])
    assert mode_of("f") == 0o644


@prepared(build_plain)
def test_only_directories_have_default_lists(root: Root) -> None:
    with root.touches(f=""), fails(errno.EACCES):
        set_acl("f", NAMED, DEFAULT)
    os.symlink("f", "link")
    for kind in (ACCESS, DEFAULT):
        with fails(errno.EOPNOTSUPP, errno.EPERM):
            os.setxattr("link", kind, encode(NAMED), follow_symlinks=False)


INHERITED = f"user::rwx,user:{OTHER.uid}:rwx,group::r-x,mask::rwx,other::r--"


def build_inheriting() -> None:
    os.mkdir("d")
    os.chmod("d", 0o777)
    set_acl("d", INHERITED, DEFAULT)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777], ids=oct)
@prepared(build_inheriting)
def test_a_default_list_takes_the_place_of_the_umask(root: Root, mask: int) -> None:
    with umask(mask):
        write_new = os.open("d/f", os.O_WRONLY | os.O_CREAT, 0o640)
        os.close(write_new)
        os.mkdir("d/sub", 0o750)
        os.mkfifo("d/fifo", 0o666)
        os.mknod("d/node", stat.S_IFREG | 0o604)
    # The mode asked for bounds owner, mask and other (acl(5), object creation and default ACLs).
    assert get_acl("d/f") == f"user::rw-,user:{OTHER.uid}:rwx,group::r-x,mask::r--,other::---"
    assert get_acl("d/sub") == f"user::rwx,user:{OTHER.uid}:rwx,group::r-x,mask::r-x,other::---"
    assert get_acl("d/fifo") == f"user::rw-,user:{OTHER.uid}:rwx,group::r-x,mask::rw-,other::r--"
    assert get_acl("d/node") == f"user::rw-,user:{OTHER.uid}:rwx,group::r-x,mask::---,other::r--"
    assert [mode_of(f"d/{name}") for name in ("f", "sub", "fifo", "node")] == [0o640, 0o750, 0o664, 0o604]
    assert get_acl("d/sub", DEFAULT) == INHERITED
    for name in ("f", "fifo", "node"):
        assert not has(f"d/{name}", DEFAULT)


@prepared(build_inheriting)
def test_default_lists_go_on_from_directory_to_directory(root: Root) -> None:
    os.makedirs("d/a/b/c")
    for path in ("d/a", "d/a/b", "d/a/b/c"):
        assert get_acl(path, DEFAULT) == INHERITED
    os.symlink("x", "d/a/link")
    assert os.listxattr("d/a/link", follow_symlinks=False) == []
    write("outside", b"")
    os.rename("outside", "d/outside")
    assert not has("d/outside", ACCESS)


@prepared(build_inheriting)
def test_an_inherited_list_is_enforced(root: Root) -> None:
    as_user(OWNER, lambda: os.close(os.open("d/f", os.O_WRONLY | os.O_CREAT, 0o660)))
    assert allowed(OTHER, "d/f") == "rw"
    assert allowed(MEMBER, "d/f") == "r-"
    assert allowed(STRANGER, "d/f") == "--"
    as_user(OWNER, os.mkdir, "d/sub", 0o770)
    as_user(OTHER, write, "d/sub/new", b"by other")
    with fails(errno.EACCES):
        as_user(STRANGER, os.listdir, "d/sub")
    with fails(errno.EACCES):
        as_user(MEMBER, write, "d/sub/new2")
    assert read("d/sub/new") == b"by other"


@prepared(build_inheriting)
def test_a_minimal_default_list_sets_modes_alone(root: Root) -> None:
    set_acl("d", "user::rwx,group::r-x,other::---", DEFAULT)
    with umask(0):
        os.close(os.open("d/f", os.O_WRONLY | os.O_CREAT, 0o666))
        os.mkdir("d/sub", 0o777)
    assert (mode_of("d/f"), mode_of("d/sub")) == (0o640, 0o750)
    assert not has("d/f", ACCESS)
    assert get_acl("d/sub", DEFAULT) == "user::rwx,group::r-x,other::---"
    os.removexattr("d", DEFAULT)
    with umask(0o022):
        os.close(os.open("d/g", os.O_WRONLY | os.O_CREAT, 0o666))
    assert mode_of("d/g") == 0o644


def build_directory_list() -> None:
    os.mkdir("d")
    write("d/f", b"data")
    set_acl("d", f"user::rwx,user:{OTHER.uid}:r-x,user:{MEMBER.uid}:-wx,group::---,mask::rwx,other::---")


@prepared(build_directory_list)
def test_lists_of_directories_rule_searching_listing_and_making(root: Root) -> None:
    def attempt(user: User, action: Callable[[], object]) -> int:
        try:
            as_user(user, action)
        except OSError as error:
            return error.errno or -1
        return 0

    for user, can_list, can_search, can_change in (
        (OTHER, True, True, False),
        (OWNER, False, False, False),
        (MEMBER, False, True, True),
    ):
        for action, expected in (
            (lambda: os.listdir("d"), can_list),
            (lambda: os.stat("d/f"), can_search),
            (lambda: write("d/new"), can_change),
            (lambda: os.unlink("d/f"), can_change),
        ):
            assert attempt(user, action) == (0 if expected else errno.EACCES)


def build_for_copying() -> None:
    os.mkdir("d")
    write("d/f", b"data")
    set_acl("d/f", NAMED)
    set_acl("d", INHERITED, DEFAULT)
    set_acl("d", INHERITED)


@prepared(build_for_copying)
def test_lists_survive_every_change_of_the_file(root: Root) -> None:
    write("d/new", b"")
    with open("d/f", "ab") as stream:
        stream.write(b"more")
    os.chown("d/f", OWNER.uid, 0)
    os.rename("d/f", "d/g")
    os.rename("d", "e")
    os.link("e/g", "h")
    assert get_acl("h") == get_acl("e/g") == NAMED
    assert get_acl("e") == get_acl("e", DEFAULT) == INHERITED
    os.chmod("e/g", 0o600)
    assert get_acl("h") == NAMED.replace("mask::rw-", "mask::---").replace("other::r--", "other::---")


@prepared(build_plain)
def test_a_list_may_have_hundreds_of_entries(root: Root) -> None:
    users = ",".join(f"user:{number}:rw-" for number in range(1000, 1400))
    text = f"user::rw-,{users},group::r--,mask::rw-,other::---"
    set_acl("f", text)
    assert get_acl("f") == text
    assert allowed(User(1399, 1), "f") == "rw"
    assert allowed(User(1400, 1), "f") == "--"
