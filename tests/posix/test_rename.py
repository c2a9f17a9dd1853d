"""rename and renameat2: types, replacement, directories with everything below, flags, permissions, times."""

import errno
import os
import stat

import pytest

from tests.posix import calls
from tests.posix.files import NOT_DIRECTORIES, TYPES, kind_of, make
from tests.posix.rig import MEMBER, OTHER, OWNER, Root, as_user, fails, inside, opened, prepared, read, write


def build_any(kind: str) -> None:
    make(kind, "f")
    os.mkdir("d")
    write("neighbour", b"stays")


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_a_renamed_file_is_the_same_file(root: Root, kind: str) -> None:
    before = os.lstat("f")
    for old, new in (("f", "g"), ("g", "d/h"), ("d/h", "f")):
        os.rename(old, new)
        assert kind_of(old) == "missing"
        after = os.lstat(new)
        assert (after.st_ino, after.st_mode, after.st_rdev, after.st_size, after.st_mtime_ns) == (
            before.st_ino,
            before.st_mode,
            before.st_rdev,
            before.st_size,
            before.st_mtime_ns,
        )
    assert sorted(os.listdir()) == ["d", "f", "neighbour"]


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_renaming_advances_the_times_of_both_directories_and_the_ctime(root: Root, kind: str) -> None:
    with root.touches(f="c", here="mc", d="mc", neighbour=""):
        os.rename("f", "d/f")
    with root.touches(here="", d="mc"):
        os.rename("d/f", "d/g")


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_renaming_to_the_same_name_changes_nothing(root: Root, kind: str) -> None:
    with root.touches(f="", here=""):
        os.rename("f", "f")
        os.rename("f", "d/../f")
    assert kind_of("f") == kind


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build_any)
def test_renaming_to_another_name_of_the_same_file_changes_nothing(root: Root, kind: str) -> None:
    os.link("f", "g", follow_symlinks=False)
    with root.touches(f="", here=""):
        os.rename("f", "g")
    assert sorted(os.listdir()) == ["d", "f", "g", "neighbour"]
    assert os.lstat("f").st_nlink == 2


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_a_file_renamed_back_and_forth_leaves_no_trace(root: Root, kind: str) -> None:
    for _ in range(3):
        os.rename("f", "d/g")
        assert os.listdir("d") == ["g"]
        os.rename("d/g", "f")
        assert os.listdir("d") == []
    os.rmdir("d")
    assert sorted(os.listdir()) == ["f", "neighbour"]


def build_pair(kind: str, other: str) -> None:
    make(kind, "f")
    make(other, "g")


def refusal(kind: str, other: str) -> int:
    """Why a file can't replace another one: they differ in being a directory."""
    if kind == "directory" and other != "directory":
        return errno.ENOTDIR
    if kind != "directory" and other == "directory":
        return errno.EISDIR
    return 0


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("other", TYPES)
@prepared(build_pair)
def test_a_file_replaces_another_unless_one_is_a_directory(root: Root, kind: str, other: str) -> None:
    inode = os.lstat("f").st_ino
    if refusal(kind, other):
        with root.touches(f="", g="", here=""), fails(refusal(kind, other)):
            os.rename("f", "g")
        assert (kind_of("f"), kind_of("g")) == (kind, other)
        return
    # A lower file that goes is not copied up for its ctime.
    with root.touches(f="c", g="" if root.may_copy_up else "c", here="mc"):
        os.rename("f", "g")
    assert os.listdir() == ["g"]
    assert (kind_of("g"), os.lstat("g").st_ino) == (kind, inode)


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(build_any)
def test_a_file_that_was_replaced_has_one_link_less(root: Root, kind: str) -> None:
    make(kind, "victim")
    os.link("victim", "survivor", follow_symlinks=False)
    with root.touches(survivor="c"):
        os.rename("f", "victim")
    assert os.lstat("survivor").st_nlink == 1
    assert not os.path.samestat(os.lstat("survivor"), os.lstat("victim"))


def build_directories() -> None:
    os.makedirs("full/sub/deep")
    write("full/f", b"in full")
    write("full/sub/g", b"in sub")
    write("full/sub/deep/h", b"in deep")
    os.symlink("sub/g", "full/link")
    os.makedirs("other/inner")
    write("other/o", b"in other")
    os.mkdir("empty")
    os.mkdir("empty2")
    write("file", b"data")
    os.symlink("empty", "linkdir")


def check_full(path: str) -> None:
    assert sorted(os.listdir(path)) == ["f", "link", "sub"]
    assert sorted(os.listdir(f"{path}/sub")) == ["deep", "g"]
    assert read(f"{path}/f") == b"in full"
    assert read(f"{path}/link") == b"in sub"
    assert read(f"{path}/sub/deep/h") == b"in deep"


@prepared(build_directories)
def test_a_directory_moves_with_all_that_is_in_it(root: Root) -> None:
    inode = os.stat("full").st_ino
    inside_inode = os.stat("full/sub/g").st_ino
    for old, new in (("full", "moved"), ("moved", "other/moved"), ("other/moved", "empty/a"), ("empty/a", "full")):
        os.rename(old, new)
        assert not os.path.exists(old)
        check_full(new)
        assert os.stat(new).st_ino == inode
        assert os.stat(f"{new}/sub/g").st_ino == inside_inode
        assert os.stat(f"{new}/..").st_ino == os.stat(os.path.dirname(new) or ".").st_ino
    assert sorted(os.listdir()) == ["empty", "empty2", "file", "full", "linkdir", "other"]


@prepared(build_directories)
def test_a_moved_directory_is_changed_like_any_other(root: Root) -> None:
    os.rename("full", "moved")
    write("moved/f", b"changed")
    os.unlink("moved/sub/g")
    write("moved/sub/new", b"new")
    os.rename("moved/sub/deep", "moved/deep")
    os.rename("moved", "again")
    assert sorted(os.listdir("again")) == ["deep", "f", "link", "sub"]
    assert os.listdir("again/sub") == ["new"]
    assert (read("again/f"), read("again/deep/h")) == (b"changed", b"in deep")


@prepared(build_directories)
def test_a_name_left_by_a_directory_is_free(root: Root) -> None:
    os.rename("full", "moved")
    os.mkdir("full")
    assert os.listdir("full") == []
    write("full/f", b"new")
    os.rename("moved/f", "moved/kept")
    assert os.listdir("full") == ["f"]
    assert sorted(os.listdir("moved")) == ["kept", "link", "sub"]
    os.unlink("full/f")
    os.rmdir("full")
    write("full", b"now a file")
    assert read("full") == b"now a file"


@prepared(build_directories)
def test_a_directory_replaces_an_empty_one(root: Root) -> None:
    inode = os.stat("full").st_ino
    os.rename("full", "empty")
    check_full("empty")
    assert os.stat("empty").st_ino == inode
    os.rename("empty", "empty2")
    check_full("empty2")
    assert sorted(os.listdir()) == ["empty2", "file", "linkdir", "other"]


@prepared(build_directories)
def test_a_directory_emptied_before_can_be_replaced(root: Root) -> None:
    os.unlink("other/o")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rename("full", "other")
    os.rmdir("other/inner")
    os.rename("full", "other")
    check_full("other")


@prepared(build_directories)
def test_a_directory_with_entries_is_not_replaced(root: Root) -> None:
    for old in ("full", "empty"):
        with root.touches(full="", other="", empty="", here=""), fails(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(old, "other")
    for new in ("full", "full/sub"):
        with root.touches(full="", other="", empty="", here=""), fails(errno.ENOTEMPTY, errno.EEXIST):
            os.rename("empty", new)
    check_full("full")
    assert sorted(os.listdir("other")) == ["inner", "o"]


@prepared(build_directories)
def test_a_directory_and_a_file_do_not_replace_each_other(root: Root) -> None:
    with root.touches(full="", file="", here=""):
        with fails(errno.ENOTDIR):
            os.rename("full", "file")
        with fails(errno.EISDIR):
            os.rename("file", "empty")
        with fails(errno.EISDIR):
            os.rename("file", "full")
        with fails(errno.ENOTDIR):
            os.rename("empty", "linkdir")
        with fails(errno.ENOTDIR):
            os.rename("file", "empty3/")
    os.rename("linkdir", "full/link")
    assert os.readlink("full/link") == "empty"


@prepared(build_directories)
def test_a_directory_does_not_go_into_itself(root: Root) -> None:
    for new in ("full/new", "full/sub/new", "full/sub/deep", "full/sub/deep/new", "full/sub"):
        with root.touches(full="", here=""), fails(errno.EINVAL):
            os.rename("full", new)
    for old, new in (("full/sub", "full"), ("full/sub/deep", "full"), ("full/sub/deep", "full/sub")):
        with root.touches(full="", here=""), fails(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(old, new)
    check_full("full")


@prepared(build_directories)
def test_dot_and_dotdot_are_not_renamed(root: Root) -> None:
    with root.touches(full="", empty=""):
        for old, new in (("full/.", "new"), ("full/sub/..", "new"), ("empty", "full/."), ("empty", "full/sub/..")):
            with fails(errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY):
                os.rename(old, new)


@prepared(build_directories)
def test_a_trailing_slash_is_for_directories(root: Root) -> None:
    os.rename("full/", "moved/")
    check_full("moved")
    with fails(errno.ENOTDIR):
        os.rename("file/", "new")
    with fails(errno.ENOTDIR):
        os.rename("file", "new/")


@prepared(build_directories)
def test_moving_a_directory_keeps_the_link_counts(root: Root) -> None:
    root.check_dir_links("other", 3)
    root.check_dir_links("empty", 2)
    os.rename("full/sub", "empty/sub")
    root.check_dir_links("full", 2)
    root.check_dir_links("empty", 3)
    root.check_dir_links("empty/sub", 3)
    os.rename("empty/sub", "other/inner2")
    root.check_dir_links("other", 4)
    root.check_dir_links("empty", 2)


@prepared(build_directories)
def test_a_process_stays_in_a_directory_that_is_moved(root: Root) -> None:
    with opened("full/sub") as directory, inside("full/sub"):
        os.rename("../../full", "../../other/moved")
        assert read("g") == b"in sub"
        write("new", b"new")
        assert os.getcwd().endswith("/other/moved/sub")
        assert read("../f") == b"in full"
        with opened("../../o") as descriptor:
            assert os.read(descriptor, 10) == b"in other"
        assert sorted(os.listdir(directory)) == ["deep", "g", "new"]
    assert read("other/moved/sub/new") == b"new"


@prepared(build_directories)
def test_an_open_file_follows_its_directory(root: Root) -> None:
    with opened("full/sub/g", os.O_RDWR) as descriptor:
        os.rename("full", "other/full")
        os.write(descriptor, b"IN")
        os.rename("other/full/sub/g", "g")
        assert read("g") == b"IN sub"
        os.pwrite(descriptor, b"SUB", 3)
        assert read("g") == b"IN SUB"


@prepared(build_directories)
def test_renaming_over_an_open_file_leaves_it_to_its_holder(root: Root) -> None:
    write("new", b"replacement")
    with opened("file", os.O_RDWR) as descriptor:
        os.rename("new", "file")
        assert os.read(descriptor, 20) == b"data"
        os.write(descriptor, b" and more")
        assert os.fstat(descriptor).st_nlink == 0
        assert os.fstat(descriptor).st_size == 13
        assert read("file") == b"replacement"


@prepared(build_directories)
def test_renaming_over_an_open_empty_directory_leaves_it_empty(root: Root) -> None:
    with opened("empty", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.rename("full", "empty")
        assert os.listdir(directory) == []
        root.check_removed(directory)
        with fails(errno.ENOENT):
            os.mkdir("new", dir_fd=directory)
    check_full("empty")


def build_many() -> None:
    for number in range(30):
        write(f"f{number}", b"file %d" % number)
        os.makedirs(f"d{number}/sub")
        write(f"d{number}/sub/g", b"dir %d" % number)
        os.symlink(f"f{number}", f"s{number}")


@prepared(build_many)
def test_a_chain_of_renames_moves_everything_by_one(root: Root) -> None:
    for prefix in "fds":
        for number in reversed(range(30)):
            os.rename(f"{prefix}{number}", f"{prefix}{number + 1}")
    for number in range(30):
        assert read(f"f{number + 1}") == b"file %d" % number
        assert read(f"d{number + 1}/sub/g") == b"dir %d" % number
        assert os.readlink(f"s{number + 1}") == f"f{number}"
    assert not any(os.path.lexists(name) for name in ("f0", "d0", "s0"))
    assert len(os.listdir()) == 90


@prepared(build_many)
def test_each_file_can_replace_the_one_before_it(root: Root) -> None:
    for number in range(1, 30):
        os.rename(f"f{number}", f"f{number - 1}")
        os.rename(f"s{number}", f"s{number - 1}")
        assert read(f"f{number - 1}") == b"file %d" % number
    assert sorted(name for name in os.listdir() if name[0] in "fs") == sorted(
        [f"f{number}" for number in range(29)] + [f"s{number}" for number in range(29)]
    )


@prepared(build_many)
def test_directories_rotate_through_a_spare_name(root: Root) -> None:
    for _ in range(3):
        os.rename("d0", "spare")
        for number in range(1, 30):
            os.rename(f"d{number}", f"d{number - 1}")
        os.rename("spare", "d29")
    assert [read(f"d{number}/sub/g") for number in range(30)] == [
        b"dir %d" % ((number + 3) % 30) for number in range(30)
    ]


def build_new_directory_target() -> None:
    os.makedirs("old/sub")
    write("old/f", b"f")
    write("g", b"g")


@prepared(build_new_directory_target)
def test_old_files_move_into_a_new_directory_and_that_into_old_ones(root: Root) -> None:
    os.mkdir("new")
    os.rename("g", "new/g")
    os.rename("old/f", "new/f")
    os.rename("new", "old/new")
    assert sorted(os.listdir("old/new")) == ["f", "g"]
    os.rename("old/new", "old/newer")
    os.rename("old", "new")
    assert sorted(os.listdir("new")) == ["newer", "sub"]
    os.rename("new/newer/f", "new/sub/f")
    os.rename("new/sub", "sub")
    assert read("sub/f") == b"f"
    assert read("new/newer/g") == b"g"


def build_links() -> None:
    os.mkdir("d")
    write("f", b"data")
    os.link("f", "d/g")
    write("h", b"other")


@prepared(build_links)
def test_hard_links_survive_renames_of_either_name(root: Root) -> None:
    inode = os.stat("f").st_ino
    os.rename("f", "moved")
    os.rename("d/g", "d/moved")
    os.rename("d", "e")
    for name in ("moved", "e/moved"):
        assert (os.stat(name).st_ino, os.stat(name).st_nlink) == (inode, 2)
    os.rename("h", "moved")
    assert os.stat("e/moved").st_nlink == 1
    assert (read("moved"), read("e/moved")) == (b"other", b"data")


@prepared(build_links)
def test_renaming_one_name_over_the_other_keeps_both(root: Root) -> None:
    os.rename("f", "d/g")
    assert os.stat("f").st_nlink == 2
    os.unlink("f")
    assert os.stat("d/g").st_nlink == 1


def build_for_permissions() -> None:
    for name, mode in (("mine", 0o755), ("shared", 0o777), ("closed", 0o755)):
        os.mkdir(name)
        write(f"{name}/f", b"data")
        os.mkdir(f"{name}/d")
        os.mkdir(f"{name}/others")
        for one in (name, f"{name}/f", f"{name}/d"):
            os.chown(one, OWNER.uid, OWNER.gid)
        os.chown(f"{name}/others", OTHER.uid, OTHER.gid)
        os.chmod(name, mode)
    os.chown("closed", 0, 0)


@prepared(build_for_permissions)
def test_renaming_needs_the_right_to_write_both_directories(root: Root) -> None:
    cases = (
        (OWNER, "closed/f", "mine/g", errno.EACCES),
        (OWNER, "mine/f", "closed/g", errno.EACCES),
        (OTHER, "mine/f", "shared/g", errno.EACCES),
        (OTHER, "shared/f", "mine/g", errno.EACCES),
        (MEMBER, "mine/f", "mine/g", errno.EACCES),
    )
    with root.touches(mine="", shared="", closed=""):
        for user, old, new, number in cases:
            with fails(number):
                as_user(user, os.rename, old, new)
    as_user(OWNER, os.rename, "mine/f", "shared/g")
    as_user(OTHER, os.rename, "shared/g", "shared/f")
    assert read("shared/f") == b"data"


@prepared(build_for_permissions)
def test_moving_a_directory_elsewhere_needs_the_right_to_write_it(root: Root) -> None:
    with root.touches(mine="", shared=""), fails(errno.EACCES):
        as_user(OWNER, os.rename, "shared/others", "mine/new")
    # Within one directory its ".." stays what it is.
    as_user(OWNER, os.rename, "shared/others", "shared/renamed")
    as_user(OWNER, os.rename, "shared/d", "mine/new")
    assert sorted(os.listdir("mine")) == ["d", "f", "new", "others"]


def build_exchange(kind: str, other: str) -> None:
    build_pair(kind, other)
    if kind == "directory":
        write("f/below", b"below f")
    os.mkdir("d")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("other", ["regular", "directory", "symlink"])
@prepared(build_exchange)
def test_an_exchange_swaps_two_files_of_any_type(root: Root, kind: str, other: str) -> None:
    first, second = os.lstat("f").st_ino, os.lstat("g").st_ino
    with root.touches(f="c", g="c", here="mc"):
        calls.renameat2("f", "g", calls.RENAME_EXCHANGE)
    assert (os.lstat("f").st_ino, os.lstat("g").st_ino) == (second, first)
    assert (kind_of("f"), kind_of("g")) == (other, kind)
    assert sorted(os.listdir()) == ["d", "f", "g"]
    os.rename("g", "d/g")
    calls.renameat2("f", "d/g", calls.RENAME_EXCHANGE)
    assert (os.lstat("f").st_ino, os.lstat("d/g").st_ino) == (first, second)
    if kind == "directory":
        assert read("f/below") == b"below f"


@prepared(build_directories)
def test_an_exchange_needs_two_files(root: Root) -> None:
    with root.touches(here="", full="", file=""):
        with fails(errno.ENOENT):
            calls.renameat2("file", "missing", calls.RENAME_EXCHANGE)
        with fails(errno.ENOENT):
            calls.renameat2("missing", "file", calls.RENAME_EXCHANGE)
        with fails(errno.EINVAL):
            calls.renameat2("full", "full/sub", calls.RENAME_EXCHANGE)
        with fails(errno.EINVAL):
            calls.renameat2("full/sub/deep", "full", calls.RENAME_EXCHANGE)
    calls.renameat2("full", "other", calls.RENAME_EXCHANGE)
    check_full("other")
    assert sorted(os.listdir("full")) == ["inner", "o"]


@prepared(build_directories)
def test_an_exchange_of_a_directory_and_a_file_keeps_the_link_counts(root: Root) -> None:
    calls.renameat2("full/sub", "other/o", calls.RENAME_EXCHANGE)
    root.check_dir_links("full", 2)
    root.check_dir_links("other", 4)
    assert read("full/sub") == b"in other"
    assert read("other/o/g") == b"in sub"
    assert os.stat("other/o/..").st_ino == os.stat("other").st_ino


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_noreplace_renames_to_a_free_name_alone(root: Root, kind: str) -> None:
    with root.touches(f="", here="", neighbour=""), fails(errno.EEXIST):
        calls.renameat2("f", "neighbour", calls.RENAME_NOREPLACE)
    with root.touches(f="", here="", d=""), fails(errno.EEXIST):
        calls.renameat2("f", "d", calls.RENAME_NOREPLACE)
    with fails(errno.EEXIST):
        calls.renameat2("f", "f", calls.RENAME_NOREPLACE)
    with fails(errno.ENOENT):
        calls.renameat2("missing", "new", calls.RENAME_NOREPLACE)
    calls.renameat2("f", "d/g", calls.RENAME_NOREPLACE)
    assert (kind_of("f"), kind_of("d/g")) == ("missing", kind)
    os.unlink("neighbour")
    calls.renameat2("d/g", "neighbour", calls.RENAME_NOREPLACE)
    assert kind_of("neighbour") == kind


@prepared(build_directories)
def test_flags_that_contradict_or_are_unknown_give_einval(root: Root) -> None:
    for flags in (
        calls.RENAME_NOREPLACE | calls.RENAME_EXCHANGE,
        calls.RENAME_WHITEOUT | calls.RENAME_EXCHANGE,
        8,
        1 << 31,
    ):
        with root.touches(here="", file=""), fails(errno.EINVAL):
            calls.renameat2("file", "new", flags)


@prepared(build_directories)
def test_a_rename_may_leave_a_whiteout(root: Root) -> None:
    if not root.traits.rename_whiteout:
        with root.touches(here="", file=""), fails(errno.EINVAL):
            calls.renameat2("file", "new", calls.RENAME_WHITEOUT)
        return
    calls.renameat2("file", "new", calls.RENAME_WHITEOUT)
    assert read("new") == b"data"
    if root.traits.overlay:
        # What a whiteout says is that there is nothing.
        assert kind_of("file") == "missing"
    else:
        st = os.lstat("file")
        assert (stat.S_ISCHR(st.st_mode), st.st_rdev) == (True, 0)


def test_a_rename_to_another_filesystem_gives_exdev(root: Root) -> None:
    write("f", b"data")
    outside = os.path.dirname(root.mount)
    with root.touches(f="", here=""):
        with fails(errno.EXDEV):
            os.rename("f", f"{outside}/f")
        with fails(errno.EXDEV):
            os.link("f", f"{outside}/f")
    write(f"{outside}/g", b"outside")
    try:
        with fails(errno.EXDEV):
            os.rename(f"{outside}/g", "g")
    finally:
        os.unlink(f"{outside}/g")
    assert os.listdir() == ["f"]


@prepared(build_directories)
def test_a_missing_file_is_not_renamed(root: Root) -> None:
    with root.touches(here="", file="", other=""):
        for old, new in (("missing", "new"), ("missing", "file"), ("file", "missing/new"), ("missing/f", "new")):
            with fails(errno.ENOENT):
                os.rename(old, new)


@prepared(build_directories)
def test_a_name_too_long_is_no_target(root: Root) -> None:
    with root.touches(here="", file=""):
        for new in ("n" * 256, "other/" + "n" * 256):
            with fails(errno.ENAMETOOLONG):
                os.rename("file", new)
    os.rename("file", "n" * 255)
    assert read("n" * 255) == b"data"


def build_merge_of_removed() -> None:
    os.mkdir("d")
    for name in ("a", "b", "c"):
        write(f"d/{name}", name.encode())


@prepared(build_merge_of_removed)
def test_names_removed_before_a_directory_moves_stay_removed(root: Root) -> None:
    os.unlink("d/a")
    os.rename("d/b", "d/z")
    os.rename("d", "e")
    assert sorted(os.listdir("e")) == ["c", "z"]
    write("e/a", b"again")
    os.rename("e", "d")
    assert sorted(os.listdir("d")) == ["a", "c", "z"]
    assert read("d/a") == b"again"
    os.unlink("d/a")
    assert sorted(os.listdir("d")) == ["c", "z"]
