"""Hard links: names of one file, their count, and what may be linked by whom."""

import errno
import os
import stat

import pytest

from tests.posix import calls
from tests.posix.files import NOT_DIRECTORIES, make
from tests.posix.rig import OTHER, OWNER, Root, as_user, fails, inside, opened, prepared, read, write


def build_any(kind: str) -> None:
    make(kind, "f")
    os.mkdir("d")


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build_any)
def test_every_type_but_directories_gets_further_names(root: Root, kind: str) -> None:
    os.link("f", "g", follow_symlinks=False)
    os.link("g", "d/h", follow_symlinks=False)
    first = os.lstat("f")
    assert first.st_nlink == 3
    for name in ("g", "d/h"):
        assert os.lstat(name) == first
    os.unlink("f")
    assert os.lstat("g").st_nlink == 2
    assert os.lstat("d/h").st_ino == first.st_ino
    os.unlink("d/h")
    assert os.lstat("g").st_nlink == 1
    assert os.lstat("g").st_mode == first.st_mode


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build_any)
def test_linking_advances_the_ctime_of_the_file_and_the_times_of_the_directory(root: Root, kind: str) -> None:
    with root.touches(f="c", here="", d="mc"):
        os.link("f", "d/g", follow_symlinks=False)
    with root.touches(f="c", here="mc", d=""):
        os.unlink("f")


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build_any)
def test_all_names_share_what_is_changed_through_one(root: Root, kind: str) -> None:
    os.link("f", "g", follow_symlinks=False)
    os.chown("f", 11, 22, follow_symlinks=False)
    os.utime("g", ns=(10, 20), follow_symlinks=False)
    if kind != "symlink":
        os.chmod("g", 0o611)
    assert os.lstat("f") == os.lstat("g")
    assert (os.lstat("g").st_uid, os.lstat("f").st_mtime_ns) == (11, 20)


def build_linked() -> None:
    os.mkdir("d")
    write("f", b"data")
    for name in ("g", "d/h"):
        os.link("f", name)
    os.symlink("f", "s")
    os.link("s", "t", follow_symlinks=False)


@prepared(build_linked)
def test_links_made_before_stay_links_when_one_is_written(root: Root) -> None:
    inode = os.stat("f").st_ino
    assert os.stat("f").st_nlink == 3
    with opened("g", os.O_WRONLY | os.O_APPEND) as descriptor:
        os.write(descriptor, b" and more")
    for name in ("f", "g", "d/h"):
        assert read(name) == b"data and more"
        st = os.stat(name)
        assert (st.st_ino, st.st_nlink, st.st_size) == (inode, 3, 13)


@prepared(build_linked)
def test_links_made_before_stay_links_when_one_is_renamed(root: Root) -> None:
    inode = os.stat("f").st_ino
    os.rename("f", "renamed")
    write("d/h", b"changed")
    for name in ("renamed", "g", "d/h"):
        assert read(name) == b"changed"
        assert (os.stat(name).st_ino, os.stat(name).st_nlink) == (inode, 3)


@prepared(build_linked)
def test_links_made_before_are_counted_down_to_none(root: Root) -> None:
    with opened("f") as descriptor:
        for name, left in (("g", 2), ("f", 1), ("d/h", 0)):
            os.unlink(name)
            assert os.fstat(descriptor).st_nlink == left
        assert os.read(descriptor, 10) == b"data"


@prepared(build_linked)
def test_links_made_before_get_more_links(root: Root) -> None:
    inode = os.stat("f").st_ino
    os.link("d/h", "i")
    os.chmod("f", 0o600)
    for name in ("f", "g", "d/h", "i"):
        st = os.stat(name)
        assert (st.st_ino, st.st_nlink, stat.S_IMODE(st.st_mode)) == (inode, 4, 0o600)
    os.unlink("g")
    os.unlink("i")
    write("f", b"new")
    assert read("d/h") == b"new"
    assert os.stat("f").st_nlink == 2


@prepared(build_linked)
def test_a_name_unlinked_and_linked_again_is_the_same_file(root: Root) -> None:
    inode = os.stat("f").st_ino
    os.unlink("g")
    os.link("f", "g")
    write("g", b"again")
    assert read("f") == read("d/h") == b"again"
    assert os.stat("d/h").st_ino == inode
    assert os.stat("d/h").st_nlink == 3


@prepared(build_linked)
def test_a_link_to_a_symbolic_link_is_not_a_link_to_its_target(root: Root) -> None:
    assert os.lstat("s").st_ino == os.lstat("t").st_ino != os.stat("f").st_ino
    assert os.lstat("t").st_nlink == 2
    os.link("t", "u", follow_symlinks=False)
    assert os.readlink("u") == "f"
    assert os.lstat("s").st_nlink == 3
    calls.link_following("s", "followed")
    assert os.lstat("followed").st_ino == os.stat("f").st_ino
    os.lchown("u", 5, 6)
    assert os.lstat("s").st_uid == 5
    os.unlink("s")
    assert os.lstat("t").st_nlink == 2


@prepared(build_linked)
def test_a_directory_gets_no_further_name(root: Root) -> None:
    with root.touches(d="", here=""), fails(errno.EPERM):
        os.link("d", "e")
    with root.touches(d="", here=""), fails(errno.EPERM):
        as_user(OTHER, os.link, "d", "e")
    assert not os.path.exists("e")


def build_errors() -> None:
    write("f", b"data")
    os.mkdir("d")
    os.mkdir("closed")
    write("closed/g", b"")
    os.chown("f", OWNER.uid, OWNER.gid)
    os.chown("d", OWNER.uid, OWNER.gid)
    os.chmod("closed", 0o700)


@prepared(build_errors)
def test_linking_needs_the_right_to_write_the_directory(root: Root) -> None:
    as_user(OWNER, os.link, "f", "d/g")
    for target in ("g", "closed/h"):
        with root.touches(f="", here="", closed=""), fails(errno.EACCES):
            as_user(OWNER, os.link, "f", target)
    with root.touches(d=""), fails(errno.EACCES):
        as_user(OWNER, os.link, "closed/g", "d/h")
    assert os.stat("f").st_nlink == 2


@prepared(build_errors)
def test_linking_over_any_name_gives_eexist(root: Root) -> None:
    for name in ("d", "closed/g", "f"):
        with root.touches(f="", here="", d="", closed=""), fails(errno.EEXIST):
            os.link("f", name)


def test_too_many_links_give_emlink(root: Root) -> None:
    # Making and removing them one by one through a mount would only test patience.
    root.kept = True
    write("f", b"x")
    with inside(root.upper or "."):
        os.mkdir("many")
        for number in range(64_998):
            os.link("f", f"many/{number}")
    os.link("f", "last")
    with root.touches(f="", here=""), fails(errno.EMLINK):
        os.link("f", "one-too-many")
    assert not os.path.exists("one-too-many")
    os.unlink("last")
    os.link("f", "again")


@prepared(build_errors)
def test_a_removed_file_gets_no_new_name_by_its_descriptor_path(root: Root) -> None:
    with opened("f") as descriptor:
        os.unlink("f")
        with fails(errno.ENOENT):
            calls.link_following(f"/proc/self/fd/{descriptor}", "back")
    assert not os.path.exists("back")


@prepared(build_errors)
def test_an_open_file_is_linked_by_its_descriptor_path(root: Root) -> None:
    with opened("f") as descriptor:
        os.rename("f", "moved")
        calls.link_following(f"/proc/self/fd/{descriptor}", "second")
        assert os.fstat(descriptor).st_nlink == 2
    assert os.path.samestat(os.stat("moved"), os.stat("second"))


@prepared(build_linked)
def test_an_open_file_is_linked_by_its_descriptor_path_once_one_of_its_names_is_gone(root: Root) -> None:
    with opened("f") as descriptor:
        os.unlink("f")
        calls.link_following(f"/proc/self/fd/{descriptor}", "back")
        assert os.fstat(descriptor).st_nlink == 3
        for name in ("g", "d/h", "back"):
            assert os.path.samestat(os.stat(name), os.fstat(descriptor))
    assert read("back") == b"data"
