"""chown, lchown and fchown."""

import errno
import os

import pytest

from tests.posix.files import NOT_SYMLINKS, TYPES, make
from tests.posix.rig import MEMBER, OTHER, OWNER, Root, as_user, fails, opened, prepared, write


def ids_of(path: str) -> tuple[int, int]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid


def build_file(kind: str) -> None:
    make(kind, "f")
    os.symlink("f", "link")


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_file)
def test_root_gives_a_file_to_anyone(root: Root, kind: str) -> None:
    before = os.lstat("f")
    for ids in ((123, 456), (2**32 - 2, 2**32 - 2), (65535, 65536), (0, 0)):
        with root.touches(f="c", here=""):
            os.lchown("f", *ids)
        assert ids_of("f") == ids
    after = os.lstat("f")
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_file)
def test_each_id_can_be_left_as_it_is(root: Root, kind: str) -> None:
    os.lchown("f", 11, -1)
    assert ids_of("f") == (11, 0)
    os.lchown("f", -1, 22)
    assert ids_of("f") == (11, 22)
    os.lchown("f", -1, -1)
    assert ids_of("f") == (11, 22)


@pytest.mark.parametrize("kind", NOT_SYMLINKS)
@prepared(build_file)
def test_chown_follows_a_link_and_lchown_does_not(root: Root, kind: str) -> None:
    with root.touches(f="c", link=""):
        os.chown("link", 11, 22)
    assert (ids_of("f"), ids_of("link")) == ((11, 22), (0, 0))
    with root.touches(f="", link="c"):
        os.lchown("link", 33, 44)
    assert (ids_of("f"), ids_of("link")) == ((11, 22), (33, 44))


def build_owned(kind: str) -> None:
    make(kind, "f")
    os.lchown("f", MEMBER.uid, MEMBER.gid)


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_owned)
def test_an_owner_gives_a_file_to_their_own_groups_alone(root: Root, kind: str) -> None:
    with root.touches(f="c", here=""):
        as_user(MEMBER, os.lchown, "f", -1, MEMBER.groups[0])
    assert ids_of("f") == (MEMBER.uid, MEMBER.groups[0])
    as_user(MEMBER, os.lchown, "f", MEMBER.uid, MEMBER.gid)
    assert ids_of("f") == (MEMBER.uid, MEMBER.gid)
    for ids in ((-1, OTHER.gid), (MEMBER.uid, 0), (OTHER.uid, -1), (0, MEMBER.gid)):
        with root.touches(f=""), fails(errno.EPERM):
            as_user(MEMBER, os.lchown, "f", *ids)
    assert ids_of("f") == (MEMBER.uid, MEMBER.gid)


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_owned)
def test_others_change_no_owner(root: Root, kind: str) -> None:
    for ids in ((OTHER.uid, -1), (-1, OTHER.gid), (OTHER.uid, OTHER.gid), (MEMBER.uid, MEMBER.gid)):
        with root.touches(f=""), fails(errno.EPERM):
            as_user(OTHER, os.lchown, "f", *ids)
    assert ids_of("f") == (MEMBER.uid, MEMBER.gid)


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_owned)
def test_anyone_may_change_nothing(root: Root, kind: str) -> None:
    as_user(OTHER, os.lchown, "f", -1, -1)
    assert ids_of("f") == (MEMBER.uid, MEMBER.gid)


def build_regular() -> None:
    write("f", b"data")
    os.mkdir("d")
    write("d/g", b"below")


@prepared(build_regular)
def test_fchown_works_on_a_read_only_descriptor(root: Root) -> None:
    with opened("f") as descriptor:
        os.fchown(descriptor, 11, 22)
        assert (os.fstat(descriptor).st_uid, os.fstat(descriptor).st_gid) == (11, 22)
    assert ids_of("f") == (11, 22)
    with opened("d") as descriptor:
        os.fchown(descriptor, 33, 44)
    assert ids_of("d") == (33, 44)
    assert ids_of("d/g") == (0, 0)


@prepared(build_regular)
def test_a_new_owner_has_the_rights_of_the_owner_at_once(root: Root) -> None:
    os.chmod("f", 0o600)
    with fails(errno.EACCES):
        as_user(OWNER, os.open, "f", os.O_RDONLY)
    os.chown("f", OWNER.uid, OWNER.gid)
    as_user(OWNER, os.chmod, "f", 0o400)
    as_user(OWNER, lambda: os.close(os.open("f", os.O_RDONLY)))
    with fails(errno.EACCES):
        as_user(OWNER, os.open, "f", os.O_WRONLY)
    os.chown("f", 0, 0)
    with fails(errno.EACCES):
        as_user(OWNER, os.open, "f", os.O_RDONLY)
