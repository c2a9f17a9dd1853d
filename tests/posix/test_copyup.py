"""What a copy-up must not show: everything but the change asked for stays as it was in the lower layer."""

import errno
import mmap
import os
import random
import shutil
import stat
from collections.abc import Callable
from functools import partial

import pytest

from tests.posix.files import NOT_SYMLINKS, TYPES, make
from tests.posix.rig import OTHER, OWNER, Root, as_user, child, fails, in_lower, in_parallel, opened, read, write

LARGE = random.Random(5).randbytes(3_000_017)


def build_rich() -> None:
    os.makedirs("a/b/c")
    for kind in TYPES:
        make(kind, f"a/b/c/{kind}")
    write("a/b/c/large", LARGE)
    write("a/b/c/set-id", b"program", 0o755)
    for path in ("a/b/c/regular", "a/b/c/directory", "a/b", "a/b/c/large"):
        os.setxattr(path, "user.note", path.encode())
        os.setxattr(path, "trusted.note", path.encode())
    for path in ("a/b/c/regular", "a/b/c/directory", "a/b/c/fifo", "a/b/c/symlink", "a/b/c/set-id", "a/b"):
        os.lchown(path, OWNER.uid, OTHER.gid)
    os.chmod("a/b/c/set-id", 0o6711)
    os.chmod("a/b", 0o3751)
    number = 0
    for where, directories, files in os.walk("a", topdown=False):
        for name in [*files, *directories]:
            number += 1
            os.utime(os.path.join(where, name), ns=(number * 10**9 + 7, number * 10**9 + 11), follow_symlinks=False)
    os.utime("a", ns=(5 * 10**9 + 7, 5 * 10**9 + 11))


def facts(path: str) -> dict[str, object]:
    """Whatever can be seen of a file but its ctime and, as copies show it as they like, its room on disk."""
    st = os.lstat(path)
    found: dict[str, object] = {
        "ino": st.st_ino,
        "dev": st.st_dev,
        "mode": st.st_mode,
        "owner": (st.st_uid, st.st_gid),
        "rdev": st.st_rdev,
        "mtime": st.st_mtime_ns,
        "xattrs": {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        },
    }
    if not stat.S_ISDIR(st.st_mode):
        found["size"] = st.st_size
        found["links"] = st.st_nlink
    if stat.S_ISREG(st.st_mode):
        found["data"] = read(path)
    elif stat.S_ISLNK(st.st_mode):
        found["target"] = os.readlink(path)
    elif stat.S_ISDIR(st.st_mode):
        found["names"] = sorted(os.listdir(path))
    return found


def everything() -> dict[str, dict[str, object]]:
    return {
        os.path.join(where, name): facts(os.path.join(where, name))
        for where, directories, files in os.walk(".")
        for name in [".", *directories, *files]
    }


def set_and_remove(path: str) -> None:
    os.setxattr(path, "trusted.x", b"", follow_symlinks=False)
    os.removexattr(path, "trusted.x", follow_symlinks=False)


CHANGES: dict[str, Callable[[str], object]] = {
    "chmod": lambda path: os.chmod(path, stat.S_IMODE(os.lstat(path).st_mode)),
    "chown": lambda path: os.lchown(path, os.lstat(path).st_uid, os.lstat(path).st_gid),
    "utime": lambda path: os.utime(
        path, ns=(os.lstat(path).st_atime_ns, os.lstat(path).st_mtime_ns), follow_symlinks=False
    ),
    "setxattr": set_and_remove,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [*TYPES, "large", "set-id"])
@in_lower(build_rich)
def test_a_change_that_changes_nothing_leaves_all_as_it_was(root: Root, kind: str, change: str) -> None:
    if change == "chmod" and kind == "symlink":
        change = "chown"
    before = everything()
    path = f"a/b/c/{kind}"
    CHANGES[change](path)
    if change == "chown" and kind == "set-id":
        before[f"./{path}"]["mode"] = stat.S_IFREG | 0o711
    assert everything() == before


@in_lower(build_rich)
def test_opening_for_writing_without_writing_leaves_all_as_it_was(root: Root) -> None:
    before = everything()
    for name in ("regular", "large", "set-id"):
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_CREAT):
            os.close(os.open(f"a/b/c/{name}", flags))
    assert everything() == before


@in_lower(build_rich)
def test_a_directory_that_gains_and_loses_a_name_changes_its_own_times_alone(root: Root) -> None:
    before = everything()
    write("a/b/c/new", b"")
    os.unlink("a/b/c/new")
    after = everything()
    for path in ("./a/b/c", "./a/b/c/."):
        assert after[path].pop("mtime") != before[path].pop("mtime")
    assert after == before


@in_lower(build_rich)
def test_a_partial_write_changes_the_bytes_written_alone(root: Root) -> None:
    before = facts("a/b/c/large")
    with opened("a/b/c/large", os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"HERE", 1_500_000)
    after = facts("a/b/c/large")
    assert after.pop("data") == LARGE[:1_500_000] + b"HERE" + LARGE[1_500_004:]
    assert after.pop("mtime") != before.pop("mtime")
    del before["data"]
    assert after == before


@pytest.mark.parametrize("size", [0, 1, 1_000_000, len(LARGE), len(LARGE) + 10])
@in_lower(build_rich)
def test_a_truncation_keeps_the_bytes_before_the_new_end(root: Root, size: int) -> None:
    os.truncate("a/b/c/large", size)
    assert read("a/b/c/large") == LARGE[:size].ljust(size, b"\0")
    assert os.getxattr("a/b/c/large", "user.note") == b"a/b/c/large"


@in_lower(build_rich)
def test_a_handle_opened_before_sees_what_is_written_after(root: Root) -> None:
    with opened("a/b/c/large") as reader, opened("a/b/c/regular") as small:
        assert os.pread(reader, 10, 0) == LARGE[:10]
        with opened("a/b/c/large", os.O_RDWR) as writer:
            os.pwrite(writer, b"changed", 0)
            os.pwrite(writer, b"far", 2_000_000)
        with opened("a/b/c/regular", os.O_WRONLY | os.O_APPEND) as writer:
            os.write(writer, b" and more")
        assert os.pread(reader, 7, 0) == b"changed"
        assert os.pread(reader, 3, 2_000_000) == b"far"
        assert os.pread(reader, 3, 2_500_000) == LARGE[2_500_000:2_500_003]
        assert os.pread(small, 100, 0) == b"data and more"
        os.truncate("a/b/c/large", 5)
        assert os.pread(reader, 100, 0) == b"chang"
        assert os.lseek(reader, 0, os.SEEK_END) == 5


@in_lower(build_rich)
def test_a_map_made_before_sees_what_is_written_after(root: Root) -> None:
    with opened("a/b/c/large") as descriptor, mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as area:
        assert area[100:110] == LARGE[100:110]
        with opened("a/b/c/large", os.O_RDWR) as writer:
            os.pwrite(writer, b"changed", 100)
            os.pwrite(writer, b"unseen page", 2_000_000)
        if not root.traits.stale_maps:
            assert area[100:107] == b"changed"
            assert area[2_000_000:2_000_011] == b"unseen page"
            assert area[2_500_000:2_500_100] == LARGE[2_500_000:2_500_100]


@in_lower(build_rich)
def test_attributes_of_a_handle_opened_before_follow_the_file(root: Root) -> None:
    with opened("a/b/c/regular") as descriptor:
        os.chmod("a/b/c/regular", 0o600)
        os.truncate("a/b/c/regular", 100)
        os.setxattr("a/b/c/regular", "user.new", b"new")
        st = os.fstat(descriptor)
        assert (stat.S_IMODE(st.st_mode), st.st_size) == (0o600, 100)
        assert os.getxattr(descriptor, "user.new") == b"new"
        os.fchmod(descriptor, 0o640)
        assert stat.S_IMODE(os.stat("a/b/c/regular").st_mode) == 0o640


@in_lower(build_rich)
def test_many_first_writers_at_once_make_one_copy(root: Root) -> None:
    inode = os.stat("a/b/c/large").st_ino

    def patch(writer: int) -> int:
        with opened("a/b/c/large", os.O_RDWR) as descriptor:
            os.pwrite(descriptor, bytes([writer]) * 1000, writer * 100_000)
            return os.fstat(descriptor).st_ino

    assert set(in_parallel([partial(patch, writer) for writer in range(8)])) == {inode}
    expected = bytearray(LARGE)
    for writer in range(8):
        expected[writer * 100_000 : writer * 100_000 + 1000] = bytes([writer]) * 1000
    assert read("a/b/c/large") == bytes(expected)


@in_lower(build_rich)
def test_reading_goes_on_while_others_write_first(root: Root) -> None:
    def look() -> None:
        for _ in range(20):
            data = read("a/b/c/large")
            assert len(data) == len(LARGE)
            assert data[1_000_000:] == LARGE[1_000_000:]

    with child(look) as process:
        for turn in range(20):
            with opened("a/b/c/large", os.O_RDWR) as descriptor:
                os.pwrite(descriptor, b"%d" % turn, turn * 1000)
        process.join()


@in_lower(build_rich)
def test_a_user_copies_up_files_of_others(root: Root) -> None:
    os.chmod("a/b", 0o755)
    before = {kind: os.lstat(f"a/b/c/{kind}") for kind in NOT_SYMLINKS}
    write("a/b/c/regular", b"x" * 10)
    os.chmod("a/b/c/regular", 0o666)
    as_user(OTHER, write_into, "a/b/c/regular")
    st = os.stat("a/b/c/regular")
    assert (st.st_uid, st.st_gid) == (before["regular"].st_uid, before["regular"].st_gid)


def write_into(path: str) -> None:
    with opened(path, os.O_WRONLY) as descriptor:
        os.write(descriptor, b"by other")


def build_unwritable() -> None:
    os.chmod(".", 0o755)
    write("f", b"data", 0o644)
    os.mkdir("d")
    write("d/g", b"below")
    os.mkdir("closed", 0o700)
    os.symlink("f", "link")
    os.setxattr("f", "user.old", b"value")


REFUSED: dict[str, tuple[int, Callable[[], object]]] = {
    "open-for-writing": (errno.EACCES, lambda: os.open("f", os.O_WRONLY)),
    "open-truncating": (errno.EACCES, lambda: os.open("link", os.O_WRONLY | os.O_TRUNC)),
    "open-appending": (errno.EACCES, lambda: os.open("f", os.O_RDWR | os.O_APPEND | os.O_CREAT)),
    "create-below": (errno.EACCES, lambda: os.open("d/new", os.O_WRONLY | os.O_CREAT)),
    "truncate": (errno.EACCES, lambda: os.truncate("f", 1)),
    "utime": (errno.EACCES, lambda: os.utime("f")),
    "utime-to-a-time": (errno.EPERM, lambda: os.utime("f", (1, 1))),
    "chmod": (errno.EPERM, lambda: os.chmod("f", 0o666)),
    "chown": (errno.EPERM, lambda: os.chown("f", OTHER.uid, OTHER.gid)),
    "setxattr": (errno.EACCES, lambda: os.setxattr("f", "user.new", b"")),
    "removexattr": (errno.EACCES, lambda: os.removexattr("f", "user.old")),
    "unlink": (errno.EACCES, lambda: os.unlink("d/g")),
    "rename": (errno.EACCES, lambda: os.rename("d/g", "d/h")),
    "rename-over": (errno.EACCES, lambda: os.rename("f", "d/g")),
    "link": (errno.EPERM, lambda: os.link("f", "d/new")),
    "rmdir": (errno.EACCES, lambda: os.rmdir("closed")),
    "mkdir-over": (errno.EEXIST, lambda: os.mkdir("d/g")),
    "symlink-over": (errno.EEXIST, lambda: os.symlink("x", "f")),
    "missing": (errno.ENOENT, lambda: os.unlink("d/missing")),
    "read-unreadable": (errno.EACCES, lambda: os.listdir("closed")),
}


@in_lower(build_unwritable)
def test_what_is_refused_or_only_looked_at_copies_nothing_up(root: Root) -> None:
    before = everything()

    def attempt() -> list[str]:
        wrong = []
        for name, (number, action) in REFUSED.items():
            try:
                action()
                wrong.append(f"{name} succeeded")
            except OSError as error:
                if error.errno != number:
                    wrong.append(f"{name}: {error}")
        return wrong

    assert as_user(OTHER, attempt) == []
    assert root.upper is not None
    assert not os.path.lexists(root.upper)
    assert everything() == before
    assert not os.path.lexists(root.upper)
    write("f", b"changed")
    assert os.listdir(root.upper) == ["f"]


def build_shared() -> None:
    os.mkdir("d")
    write("d/theirs", b"theirs", 0o666)
    os.chown("d/theirs", OWNER.uid, OWNER.gid)
    os.mkdir("d/closed")
    write("d/closed/open-to-all", b"x", 0o666)
    os.chown("d/closed", OWNER.uid, OWNER.gid)
    write("mine", b"mine", 0o600)
    os.chown("mine", OTHER.uid, OTHER.gid)


@in_lower(build_shared)
def test_a_copy_up_by_a_user_needs_no_right_but_to_the_file(root: Root) -> None:
    as_user(OTHER, write_into, "d/theirs")
    as_user(OTHER, write_into, "d/closed/open-to-all")
    as_user(OTHER, os.chmod, "mine", 0o640)
    assert (os.stat("d/theirs").st_uid, os.stat("d/theirs").st_gid) == (OWNER.uid, OWNER.gid)
    assert read("d/closed/open-to-all") == b"by other"
    assert os.stat("d/closed").st_uid == OWNER.uid
    assert stat.S_IMODE(os.stat("d/closed").st_mode) == 0o755
    with fails(errno.EACCES):
        as_user(OTHER, write, "d/new")
    with fails(errno.EACCES):
        as_user(OTHER, os.unlink, "d/theirs")


@in_lower(build_rich)
def test_a_tree_is_moved_aside_and_replaced(root: Root) -> None:
    inode = os.stat("a/b/c/large").st_ino
    os.rename("a", "old")
    shutil.copytree("old/b/c/directory", "a")
    assert os.listdir("a") == []
    assert os.stat("old/b/c/large").st_ino == inode
    write("old/b/c/large", b"rewritten")
    os.rename("old/b/c", "a/c")
    assert read("a/c/large") == b"rewritten"
    assert os.stat("a/c/large").st_ino == inode
    shutil.rmtree("old")
    assert sorted(os.listdir()) == ["a"]
    assert sorted(os.listdir("a/c")) == sorted([*TYPES, "large", "set-id"])
