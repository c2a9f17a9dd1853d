"""unlink and rmdir: what goes, what must not, whiteouts never seen, and the sticky bit."""

import errno
import os
import shutil
from collections.abc import Callable

import pytest

from tests.posix.files import NOT_DIRECTORIES, TYPES, kind_of, make, remove
from tests.posix.rig import OTHER, OWNER, ROOT, Root, User, as_user, fails, inside, opened, prepared, read, write


def build_any(kind: str) -> None:
    make(kind, "f")
    write("neighbour", b"stays")


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_a_removed_name_is_gone_everywhere(root: Root, kind: str) -> None:
    with root.touches(here="mc", neighbour=""):
        remove("f")
    assert kind_of("f") == "missing"
    assert os.listdir() == ["neighbour"]
    for action in (os.unlink, os.rmdir, os.lstat, os.readlink, os.listdir):
        with fails(errno.ENOENT):
            action("f")
    with fails(errno.ENOENT):
        os.rename("f", "g")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("other", TYPES)
@prepared(build_any)
def test_a_removed_name_can_be_made_again_as_anything(root: Root, kind: str, other: str) -> None:
    for _ in range(2):
        remove("f")
        make(other, "f")
        assert kind_of("f") == other
        assert sorted(os.listdir()) == ["f", "neighbour"]
        if other == "directory":
            assert os.listdir("f") == []
            write("f/g", b"below")
            os.unlink("f/g")


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build_any)
def test_rmdir_of_what_is_no_directory_gives_enotdir(root: Root, kind: str) -> None:
    with root.touches(here="", f=""), fails(errno.ENOTDIR):
        os.rmdir("f")


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build_any)
def test_removing_a_file_advances_its_ctime(root: Root, kind: str) -> None:
    os.link("f", "g", follow_symlinks=False)
    with root.touches(f="c", here="mc"):
        os.unlink("g")
    with root.touches(f="c", here="mc"):
        os.unlink("f")


def build_tree() -> None:
    os.makedirs("d/a/b")
    os.mkdir("d/empty")
    write("d/a/f", b"data")
    write("d/a/b/g", b"deep")
    os.symlink("d/a", "link")
    os.symlink("nowhere", "d/dangling")


@prepared(build_tree)
def test_unlink_of_a_directory_gives_eisdir(root: Root) -> None:
    for name in ("d", "d/empty"):
        with root.touches(d="", here=""), fails(errno.EISDIR):
            os.unlink(name)


@prepared(build_tree)
def test_a_directory_with_entries_stays(root: Root) -> None:
    for name in ("d", "d/a", "d/a/b"):
        with root.touches(d="", here=""), fails(errno.ENOTEMPTY):
            os.rmdir(name)
    assert read("d/a/b/g") == b"deep"


@prepared(build_tree)
def test_a_tree_is_removed_from_below(root: Root) -> None:
    os.unlink("d/a/b/g")
    os.rmdir("d/a/b")
    with fails(errno.ENOTEMPTY):
        os.rmdir("d/a")
    os.unlink("d/a/f")
    os.rmdir("d/a")
    root.check_dir_links("d", 3)
    os.rmdir("d/empty")
    root.check_dir_links("d", 2)
    os.unlink("d/dangling")
    with root.touches(here="mc"):
        os.rmdir("d")
    assert os.listdir() == ["link"]


@prepared(build_tree)
def test_a_tree_removed_and_made_again_holds_only_the_new(root: Root) -> None:
    for turn in range(2):
        shutil.rmtree("d")
        os.mkdir("d")
        assert os.listdir("d") == []
        os.makedirs("d/a/b")
        assert os.listdir("d/a") == ["b"]
        assert os.listdir("d/a/b") == []
        write("d/a/f", b"new%d" % turn)
        assert read("d/a/f") == b"new%d" % turn
        assert sorted(os.listdir("d/a")) == ["b", "f"]


@prepared(build_tree)
def test_rmdir_of_dot_and_dotdot(root: Root) -> None:
    with root.touches(d=""):
        with fails(errno.EINVAL):
            os.rmdir("d/empty/.")
        with fails(errno.ENOTEMPTY):
            os.rmdir("d/empty/..")
        for name in ("d/empty/.", "d/empty/.."):
            with fails(errno.EISDIR):
                os.unlink(name)


@prepared(build_tree)
def test_a_link_is_removed_and_never_its_target(root: Root) -> None:
    with root.touches(here="mc", d=""):
        os.unlink("link")
    assert sorted(os.listdir("d/a")) == ["b", "f"]
    os.unlink("d/dangling")
    assert sorted(os.listdir("d")) == ["a", "empty"]


def test_rmdir_of_a_mount_point_gives_ebusy(root: Root) -> None:
    with fails(errno.EBUSY):
        os.rmdir(root.mount)
    with fails(errno.EBUSY):
        os.rename(root.mount, f"{root.mount}.moved")


@prepared(build_tree)
def test_the_current_directory_can_be_removed(root: Root) -> None:
    inode = os.stat("d/empty").st_ino
    with inside("d/empty") as before, opened(".") as here:
        os.rmdir("../empty")
        assert os.listdir(".") == []
        assert os.stat(".").st_ino == inode
        root.check_removed(here)
        with fails(errno.ENOENT):
            os.getcwd()
        with fails(errno.ENOENT):
            os.mkdir("new")
        assert os.path.samestat(os.stat("../../d"), os.stat("d", dir_fd=before))


@prepared(build_tree)
def test_an_open_directory_that_was_removed_is_empty(root: Root) -> None:
    with opened("d/a/b", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.unlink("g", dir_fd=directory)
        os.rmdir("d/a/b")
        assert os.listdir(directory) == []
        with fails(errno.ENOENT):
            os.mkdir("new", dir_fd=directory)
        with fails(errno.ENOENT):
            os.stat("g", dir_fd=directory)
        root.check_removed(directory)
        os.mkdir("d/a/b")
        write("d/a/b/new", b"new")
        assert os.listdir(directory) == []
        with fails(errno.ENOENT):
            os.open("new", os.O_RDONLY, dir_fd=directory)


# Who may remove a file of whom from a sticky directory of whom: its owner, the directory's owner, root.
STICKY = [
    (user, directory_owner, file_owner)
    for user in (ROOT, OWNER, OTHER)
    for directory_owner in (ROOT, OWNER, OTHER)
    for file_owner in (ROOT, OWNER, OTHER)
]
ROLE = {ROOT: "root", OWNER: "owner", OTHER: "other"}
STICKY_IDS = ["-".join(ROLE[user] for user in case) for case in STICKY]


def build_sticky(case: tuple[User, User, User]) -> None:
    _, directory_owner, file_owner = case
    os.mkdir("sticky")
    os.mkdir("free")
    for kind in TYPES:
        make(kind, f"sticky/{kind}")
        os.lchown(f"sticky/{kind}", file_owner.uid, file_owner.gid)
    for name, mode in (("sticky", 0o1777), ("free", 0o777)):
        os.chown(name, directory_owner.uid, directory_owner.gid)
        os.chmod(name, mode)


@pytest.mark.parametrize("case", STICKY, ids=STICKY_IDS)
@prepared(build_sticky)
def test_a_sticky_directory_lets_owners_alone_rename_within(root: Root, case: tuple[User, User, User]) -> None:
    user, directory_owner, file_owner = case
    allowed = user in (ROOT, directory_owner, file_owner)
    found = attempts(user, lambda kind: os.rename(f"sticky/{kind}", f"sticky/{kind}.new"))
    assert found == dict.fromkeys(TYPES, 0 if allowed else errno.EPERM)
    assert sorted(os.listdir("sticky")) == sorted(f"{kind}.new" if allowed else kind for kind in TYPES)


def attempts(user: User, action: Callable[[str], None]) -> dict[str, int]:
    """Type of file → the error number of the action on it, 0 for success."""

    def run() -> dict[str, int]:
        found = dict.fromkeys(TYPES, 0)
        for kind in TYPES:
            try:
                action(kind)
            except OSError as error:
                found[kind] = error.errno or -1
        return found

    return as_user(user, run)


@pytest.mark.parametrize("case", STICKY, ids=STICKY_IDS)
@prepared(build_sticky)
def test_a_sticky_directory_lets_owners_alone_remove(root: Root, case: tuple[User, User, User]) -> None:
    user, directory_owner, file_owner = case
    if user in (ROOT, directory_owner, file_owner):
        assert attempts(user, lambda kind: remove(f"sticky/{kind}")) == dict.fromkeys(TYPES, 0)
        assert os.listdir("sticky") == []
        return
    with root.touches(sticky=""):
        assert attempts(user, lambda kind: remove(f"sticky/{kind}")) == dict.fromkeys(TYPES, errno.EPERM)
    assert sorted(os.listdir("sticky")) == sorted(TYPES)


@pytest.mark.parametrize("case", STICKY, ids=STICKY_IDS)
@prepared(build_sticky)
def test_a_sticky_directory_lets_owners_alone_rename_away(root: Root, case: tuple[User, User, User]) -> None:
    user, directory_owner, file_owner = case
    expected = dict.fromkeys(TYPES, 0 if user in (ROOT, directory_owner, file_owner) else errno.EPERM)
    if user not in (ROOT, file_owner) and user == directory_owner:
        # A directory that changes its parent is written to as well: rename(2), EACCES.
        expected["directory"] = errno.EACCES
    assert attempts(user, lambda kind: os.rename(f"sticky/{kind}", f"free/{kind}")) == expected
    for kind, number in expected.items():
        assert kind_of(f"sticky/{kind}" if number else f"free/{kind}") == kind


@pytest.mark.parametrize("case", STICKY, ids=STICKY_IDS)
@prepared(build_sticky)
def test_a_sticky_directory_lets_owners_alone_rename_over(root: Root, case: tuple[User, User, User]) -> None:
    user, directory_owner, file_owner = case
    allowed = user in (ROOT, directory_owner, file_owner)
    for kind in TYPES:
        make("directory" if kind == "directory" else "regular", f"free/{kind}")
        os.chown(f"free/{kind}", user.uid, user.gid)
    with root.touches(sticky="mc" if allowed else "", free="mc" if allowed else ""):
        found = attempts(user, lambda kind: os.rename(f"free/{kind}", f"sticky/{kind}"))
    assert found == dict.fromkeys(TYPES, 0 if allowed else errno.EPERM)
    for kind in TYPES:
        survivor = kind if kind == "directory" or not allowed else "regular"
        assert kind_of(f"sticky/{kind}") == survivor
