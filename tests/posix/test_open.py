"""open: flags, permissions, types of file, and what opening does to times."""

import errno
import fcntl
import mmap
import os
import stat

import pytest

from tests.posix.files import NOT_DIRECTORIES, TYPES, make
from tests.posix.rig import (
    BY_ROLE,
    MEMBER,
    OTHER,
    OWNER,
    ROOT,
    Root,
    as_user,
    fails,
    opened,
    prepared,
    read,
    umask,
    write,
)

ACCESS = {"reading": os.O_RDONLY, "writing": os.O_WRONLY, "both": os.O_RDWR}
NEEDS = {"reading": 0o4, "writing": 0o2, "both": 0o6}
SHIFT = {"owner": 6, "member": 3, "other": 0}


def build_modes() -> None:
    for bits in range(8):
        for shift in SHIFT.values():
            write(f"{shift}-{bits}", b"data")
            os.chown(f"{shift}-{bits}", OWNER.uid, OWNER.gid)
            # All other classes may do the opposite, so that the wrong class gives the wrong answer.
            os.chmod(f"{shift}-{bits}", (0o777 ^ (7 << shift)) & ~(bits * 0o111) | bits << shift)


@pytest.mark.parametrize("role", BY_ROLE)
@prepared(build_modes)
def test_opening_needs_the_permission_of_ones_class(root: Root, role: str) -> None:
    shift = SHIFT[role]

    def outcomes() -> dict[tuple[int, str], int]:
        found = {}
        for bits in range(8):
            for access, flags in ACCESS.items():
                try:
                    os.close(os.open(f"{shift}-{bits}", flags))
                    found[bits, access] = 0
                except OSError as error:
                    found[bits, access] = error.errno or -1
        return found

    expected = {
        (bits, access): 0 if bits & need == need else errno.EACCES
        for bits in range(8)
        for access, need in NEEDS.items()
    }
    assert as_user(BY_ROLE[role], outcomes) == expected


def open_and_close(path: str, flags: int) -> None:
    os.close(os.open(path, flags))


@pytest.mark.parametrize("role", BY_ROLE)
@prepared(build_modes)
def test_truncating_at_open_needs_write_permission(root: Root, role: str) -> None:
    shift = SHIFT[role]
    for bits in range(8):
        name = f"{shift}-{bits}"
        for flags in (os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC):
            if bits & 2 and (bits & 4 or flags & os.O_WRONLY):
                as_user(BY_ROLE[role], open_and_close, name, flags)
                assert os.stat(name).st_size == 0
            else:
                size = os.stat(name).st_size
                with fails(errno.EACCES):
                    as_user(BY_ROLE[role], os.open, name, flags)
                assert os.stat(name).st_size == size


@prepared(build_modes)
def test_root_opens_everything(root: Root) -> None:
    for name in os.listdir():
        os.close(os.open(name, os.O_RDWR))


def build_file() -> None:
    write("f", b"data")
    write("empty")
    os.mkdir("d")
    os.symlink("f", "link")
    os.symlink("missing", "dangling")
    os.symlink("d", "dirlink")


@prepared(build_file)
def test_opening_with_o_creat_what_exists_changes_no_time(root: Root) -> None:
    with root.touches(here="", f="", empty=""):
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            os.close(os.open("f", flags | os.O_CREAT, 0o600))
            os.close(os.open("empty", flags | os.O_CREAT, 0o600))
    assert read("f") == b"data"
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o644


@prepared(build_file)
def test_truncating_at_open_advances_mtime_and_ctime(root: Root) -> None:
    with root.touches(here="", f="mc", empty="mc"):
        os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))
        os.close(os.open("empty", os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    assert os.stat("f").st_size == 0


@prepared(build_file)
def test_o_creat_follows_a_dangling_link(root: Root) -> None:
    with opened("dangling", os.O_WRONLY | os.O_CREAT) as descriptor:
        os.write(descriptor, b"made")
    assert read("missing") == b"made"
    assert os.readlink("dangling") == "missing"


@prepared(build_file)
def test_o_excl_follows_no_link(root: Root) -> None:
    with root.touches(here="", f=""):
        for name in ("link", "dangling", "dirlink"):
            with fails(errno.EEXIST):
                os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    assert not os.path.lexists("missing")


@prepared(build_file)
def test_o_nofollow_gives_eloop_for_a_link(root: Root) -> None:
    for name in ("link", "dangling", "dirlink"):
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT):
            with fails(errno.ELOOP):
                os.open(name, flags | os.O_NOFOLLOW)
    with opened("f", os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
        assert os.read(descriptor, 10) == b"data"


@prepared(build_file)
def test_o_directory_gives_enotdir_for_all_else(root: Root) -> None:
    for name in ("f", "link"):
        with fails(errno.ENOTDIR):
            os.open(name, os.O_RDONLY | os.O_DIRECTORY)
    with fails(errno.ENOENT):
        os.open("dangling", os.O_RDONLY | os.O_DIRECTORY)
    os.close(os.open("dirlink", os.O_RDONLY | os.O_DIRECTORY))


@prepared(build_file)
def test_a_directory_cant_be_opened_for_writing(root: Root) -> None:
    with root.touches(here="", d=""):
        for name in ("d", "dirlink", "d/.", "."):
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC):
                with fails(errno.EISDIR):
                    os.open(name, flags)
            for flags in (os.O_RDONLY | os.O_CREAT, os.O_RDWR | os.O_CREAT):
                with fails(errno.EISDIR):
                    os.open(name, flags)
    with opened("d") as descriptor, fails(errno.EISDIR):
        os.read(descriptor, 10)


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
@prepared(make)
def test_o_path_opens_every_type_without_any_right_to_it(root: Root, kind: str) -> None:
    if kind != "symlink":
        os.chmod("f", 0)

    def look() -> int:
        with opened("f", os.O_PATH | os.O_NOFOLLOW) as descriptor:
            with fails(errno.EBADF):
                os.read(descriptor, 1)
            return os.fstat(descriptor).st_ino

    assert as_user(OTHER, look) == os.lstat("f").st_ino


@prepared(lambda: make("fifo"))
def test_writing_to_a_fifo_without_a_reader_gives_enxio(root: Root) -> None:
    with root.touches(f=""), fails(errno.ENXIO):
        os.open("f", os.O_WRONLY | os.O_NONBLOCK)
    with opened("f", os.O_RDONLY | os.O_NONBLOCK) as reader, opened("f", os.O_WRONLY | os.O_NONBLOCK) as writer:
        os.write(writer, b"through")
        assert os.read(reader, 10) == b"through"


@prepared(lambda: make("socket"))
def test_a_socket_cant_be_opened(root: Root) -> None:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        with root.touches(f=""), fails(errno.ENXIO):
            os.open("f", flags)


@prepared(build_file)
def test_a_descriptor_does_only_what_it_was_opened_for(root: Root) -> None:
    with opened("f", os.O_WRONLY) as descriptor, fails(errno.EBADF):
        os.read(descriptor, 1)
    with opened("f", os.O_RDONLY) as descriptor:
        with fails(errno.EBADF):
            os.write(descriptor, b"x")
        with fails(errno.EINVAL):
            os.ftruncate(descriptor, 1)


def build_private() -> None:
    os.mkdir("d")
    os.chmod("d", 0o777)


@pytest.mark.parametrize("mode", [0o000, 0o200, 0o400, 0o444, 0o777], ids=oct)
@prepared(build_private)
def test_the_maker_of_a_file_uses_it_whatever_mode_it_gave(root: Root, mode: int) -> None:
    def use() -> bytes:
        with umask(0), opened("d/f", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode) as descriptor:
            os.write(descriptor, b"data")
            os.ftruncate(descriptor, 3)
            return os.pread(descriptor, 10, 0)

    assert as_user(OTHER, use) == b"dat"
    st = os.stat("d/f")
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_size) == (mode, OTHER.uid, 3)


@prepared(build_file)
def test_o_append_writes_at_the_end_wherever_the_offset_is(root: Root) -> None:
    with opened("f", os.O_RDWR | os.O_APPEND) as descriptor:
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b"+one")
        os.lseek(descriptor, 1, os.SEEK_SET)
        os.write(descriptor, b"+two")
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 12
        # pwrite appends too on Linux (pwrite(2), bugs).
        os.pwrite(descriptor, b"+three", 0)
        assert os.pread(descriptor, 100, 0) == b"data+one+two+three"


@prepared(build_file)
def test_o_noatime_is_for_the_owner(root: Root) -> None:
    os.chown("f", OWNER.uid, OWNER.gid)
    as_user(OWNER, lambda: os.close(os.open("f", os.O_RDONLY | os.O_NOATIME)))
    with fails(errno.EPERM):
        as_user(OTHER, os.open, "f", os.O_RDONLY | os.O_NOATIME)


@prepared(build_file)
def test_duplicates_share_an_offset_and_separate_opens_do_not(root: Root) -> None:
    with opened("f") as first, opened("f") as second:
        duplicate = os.dup(first)
        assert os.read(first, 2) == b"da"
        assert os.read(duplicate, 1) == b"t"
        assert os.lseek(first, 0, os.SEEK_CUR) == 3
        assert os.read(second, 4) == b"data"
        assert as_user(OTHER, os.read, first, 10) == b"a"
        assert os.lseek(duplicate, 0, os.SEEK_CUR) == 4
        os.close(duplicate)


def build_any(kind: str) -> None:
    make(kind, "f")
    os.symlink("f", "link")


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_opening_an_existing_file_exclusively_gives_eexist(root: Root, kind: str) -> None:
    with root.touches(here="", f="", link=""):
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
            for name in ("f", "link"):
                with fails(errno.EEXIST):
                    os.open(name, flags | os.O_CREAT | os.O_EXCL)


@prepared(build_file)
def test_an_unknown_user_reads_a_file_made_for_all(root: Root) -> None:
    assert as_user(MEMBER, read, "f") == b"data"
    assert as_user(MEMBER, read, "link") == b"data"


def build_direct() -> None:
    write("f", bytes(range(256)) * 64)


@prepared(build_direct)
def test_o_direct_reads_and_writes_what_others_see(root: Root) -> None:
    with opened("f", os.O_RDWR | os.O_DIRECT) as descriptor, mmap.mmap(-1, 4096) as buffer:
        assert os.preadv(descriptor, [buffer], 4096) == 4096
        assert buffer[:] == bytes(range(256)) * 16
        buffer[:] = b"D" * 4096
        assert os.pwritev(descriptor, [buffer], 8192) == 4096
    data = read("f")
    assert data[8192:12288] == b"D" * 4096
    assert data[:8192] + data[12288:] == bytes(range(256)) * 48


@prepared(build_file)
def test_access_mode_three_is_neither_for_reading_nor_for_writing(root: Root) -> None:
    # Linux keeps it for ioctl(2) and asks for both permissions (open(2), notes).
    os.chmod("f", 0o666)
    for user in (ROOT, OTHER):
        as_user(user, check_neither, "f")
    os.chmod("f", 0o644)
    with fails(errno.EACCES):
        as_user(OTHER, check_neither, "f")
    assert read("f") == b"data"


def check_neither(path: str) -> None:
    with opened(path, os.O_ACCMODE) as descriptor:
        with fails(errno.EBADF):
            os.read(descriptor, 1)
        with fails(errno.EBADF):
            os.write(descriptor, b"x")
        assert os.fstat(descriptor).st_size == 4


@prepared(build_file)
def test_flags_of_an_open_file_are_told_and_changed(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        os.write(descriptor, b"+end")
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
        os.write(descriptor, b"D")
    assert read("f") == b"Data+end"


@prepared(build_file)
def test_a_directory_has_a_size_and_an_offset(root: Root) -> None:
    with opened("d", os.O_RDONLY | os.O_DIRECTORY) as directory:
        assert os.lseek(directory, 0, os.SEEK_CUR) == 0
        with fails(errno.EBADF):
            os.write(directory, b"x")
        with fails(errno.EBADF):
            os.pwrite(directory, b"x", 0)
        with fails(errno.EINVAL):
            os.ftruncate(directory, 0)


@prepared(build_file)
def test_closing_twice_gives_ebadf(root: Root) -> None:
    descriptor = os.open("f", os.O_RDONLY)
    os.close(descriptor)
    with fails(errno.EBADF):
        os.close(descriptor)
