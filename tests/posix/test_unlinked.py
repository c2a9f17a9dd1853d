"""Files that are open and have no name any more stay whole: they are read, written and changed, and seen by no one."""

import errno
import os
import stat
import time

import pytest

from tests.posix.rig import OWNER, Root, as_user, child, fails, opened, prepared, read, read_all, write

DATA = bytes(range(256)) * 100


def build_file() -> None:
    write("f", DATA)
    write("neighbour", b"stays")


def by_unlink() -> None:
    os.unlink("f")


def by_replacement() -> None:
    os.rename("neighbour", "f")


def by_removal_of_the_tree() -> None:
    os.mkdir("d")
    os.rename("f", "d/f")
    os.unlink("d/f")
    os.rmdir("d")


def half_removed(root: Root) -> bool:
    """The file was in a lower layer, and its removal without a copy-up is one by halves there."""
    return root.place == "lower" and root.traits.half_removed


WAYS = {"unlink": by_unlink, "replacement": by_replacement, "tree": by_removal_of_the_tree}


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_an_open_file_is_read_and_written_after_its_name_went(root: Root, way: str) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        inode = os.fstat(descriptor).st_ino
        WAYS[way]()
        st = os.fstat(descriptor)
        assert (st.st_nlink, st.st_ino, st.st_size) == (0, inode, len(DATA))
        assert read_all(descriptor) == DATA
        os.write(descriptor, b"more")
        os.pwrite(descriptor, b"START", 0)
        assert os.pread(descriptor, 5, 0) == b"START"
        assert os.pread(descriptor, 10, len(DATA)) == b"more"
        assert os.fstat(descriptor).st_size == len(DATA) + 4


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_a_file_opened_read_only_is_read_after_its_name_went(root: Root, way: str) -> None:
    with opened("f") as descriptor:
        WAYS[way]()
        assert read_all(descriptor) == DATA
        assert os.fstat(descriptor).st_nlink == 0 or half_removed(root)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY], ids=["read-write", "read-only"])
@prepared(build_file)
def test_attributes_of_an_unlinked_file_still_change(root: Root, flags: int) -> None:
    with opened("f", flags) as descriptor:
        os.unlink("f")
        write("f", b"another")
        if flags == os.O_RDONLY and half_removed(root):
            with fails(errno.EEXIST, errno.ENOENT, errno.ESTALE):
                os.fchmod(descriptor, 0o604)
            return
        os.fchmod(descriptor, 0o604)
        os.fchown(descriptor, 11, 22)
        os.utime(descriptor, ns=(123, 456))
        os.setxattr(descriptor, "user.late", b"value")
        st = os.fstat(descriptor)
        assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns) == (0o604, 11, 22, 456)
        assert os.getxattr(descriptor, "user.late") == b"value"
        assert os.listxattr(descriptor) == ["user.late"]
        os.removexattr(descriptor, "user.late")
        with fails(errno.ENODATA):
            os.getxattr(descriptor, "user.late")
        assert st.st_nlink == 0
    st = os.stat("f")
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_size) == (0o644, 0, 7)


@prepared(build_file)
def test_an_unlinked_file_is_truncated_and_grown(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        os.unlink("f")
        os.ftruncate(descriptor, 100)
        assert read_all(descriptor) == DATA[:100]
        os.ftruncate(descriptor, 200)
        assert os.pread(descriptor, 1000, 0) == DATA[:100] + b"\0" * 100
        os.fsync(descriptor)
        assert os.fstat(descriptor).st_size == 200


@prepared(build_file)
def test_a_new_file_of_the_same_name_is_another_file(root: Root) -> None:
    with opened("f", os.O_RDWR) as old:
        os.unlink("f")
        write("f", b"new")
        with opened("f", os.O_RDWR) as new:
            os.pwrite(old, b"OLD", 0)
            os.pwrite(new, b"NEW", 0)
            assert os.pread(old, 3, 0) == b"OLD"
            assert os.pread(new, 3, 0) == b"NEW"
            assert not os.path.sameopenfile(old, new)
        assert read("f") == b"NEW"


@prepared(build_file)
def test_an_unlinked_file_is_reached_through_proc(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        os.unlink("f")
        assert read(f"/proc/self/fd/{descriptor}") == DATA
        with opened(f"/proc/self/fd/{descriptor}", os.O_WRONLY) as again:
            os.write(again, b"again")
        assert os.pread(descriptor, 5, 0) == b"again"
        os.truncate(f"/proc/self/fd/{descriptor}", 5)
        assert os.fstat(descriptor).st_size == 5
        assert os.readlink(f"/proc/self/fd/{descriptor}").endswith("/f (deleted)")


@prepared(build_file)
def test_an_unlinked_file_is_shared_with_a_child(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        os.unlink("f")
        as_user(OWNER, os.pwrite, descriptor, b"child", 0)
        assert os.pread(descriptor, 5, 0) == b"child"


@prepared(build_file)
def test_a_link_made_before_keeps_an_unlinked_file(root: Root) -> None:
    os.link("f", "other")
    with opened("f", os.O_RDWR) as descriptor:
        os.unlink("f")
        assert os.fstat(descriptor).st_nlink == 1
        os.pwrite(descriptor, b"SHARED", 0)
    assert read("other")[:6] == b"SHARED"


def build_many() -> None:
    for number in range(50):
        write(f"f{number}", b"%d" % number)


@prepared(build_many)
def test_many_unlinked_files_are_kept_apart(root: Root) -> None:
    descriptors = [os.open(f"f{number}", os.O_RDWR) for number in range(50)]
    try:
        for number in range(50):
            os.unlink(f"f{number}")
        assert os.listdir() == []
        for number, descriptor in enumerate(descriptors):
            os.pwrite(descriptor, b"+%d" % number, 10)
        for number, descriptor in enumerate(descriptors):
            data = os.pread(descriptor, 100, 0)
            assert (data.split(b"\0")[0], data[10:]) == (b"%d" % number, b"+%d" % number)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@prepared(build_file)
def test_room_of_an_unlinked_file_comes_back_with_its_last_close(root: Root) -> None:
    def free() -> int:
        found = os.statvfs(".")
        return found.f_bfree * found.f_frsize

    write("big", os.urandom(8 << 20))
    with opened("big", os.O_RDWR) as descriptor:
        os.fsync(descriptor)
        full = free()
        os.unlink("big")
        assert os.pread(descriptor, 4, 100) != b""
    with opened(".") as directory:
        os.fsync(directory)
    # The release of a FUSE file goes its way after close(2) has returned.
    for _ in range(100):
        if free() >= full + (7 << 20):
            return
        time.sleep(0.02)
    raise AssertionError("the room did not come back")


@prepared(build_file)
def test_a_process_that_dies_takes_its_unlinked_files_with_it(root: Root) -> None:
    def die() -> None:
        descriptor = os.open("f", os.O_RDWR)
        os.unlink("f")
        os.write(descriptor, b"last words")
        os.kill(os.getpid(), 9)

    with child(die) as process, pytest.raises(AssertionError, match="status 9 "):
        process.join()
    assert os.listdir() == ["neighbour"]
    write("f", b"new")
    assert read("f") == b"new"
