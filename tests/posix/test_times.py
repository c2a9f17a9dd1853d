"""Times: setting them to the nanosecond, who may, and which calls advance which."""

import errno
import os
import stat
import time

import pytest

from tests.posix import calls
from tests.posix.calls import AT_SYMLINK_NOFOLLOW, UTIME_NOW, UTIME_OMIT
from tests.posix.files import TYPES, make
from tests.posix.rig import MEMBER, OTHER, OWNER, Root, Times, as_user, fails, next_tick, opened, prepared, read, write

NOW = (0, UTIME_NOW)
OMIT = (0, UTIME_OMIT)
SECOND = 1_000_000_000
FAR = 15_000_000_000  # in 2445, later than 64 bits of nanoseconds can say


def build_any(kind: str) -> None:
    make(kind, "f")
    os.symlink("f", "link")


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_times_are_set_to_the_nanosecond(root: Root, kind: str) -> None:
    with root.touches(here=""):
        calls.utimensat("f", ((1_234_567_890, 123_456_789), (987_654_321, 999_999_999)), AT_SYMLINK_NOFOLLOW)
    times = Times.of("f")
    assert (times.a, times.m) == (1_234_567_890_123_456_789, 987_654_321_999_999_999)
    assert abs(times.c - time.time_ns()) < 10 * SECOND


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_each_time_may_be_left_or_set_to_now(root: Root, kind: str) -> None:
    calls.utimensat("f", ((100, 1), (200, 2)), AT_SYMLINK_NOFOLLOW)
    calls.utimensat("f", (OMIT, (300, 3)), AT_SYMLINK_NOFOLLOW)
    assert (Times.of("f").a, Times.of("f").m) == (100 * SECOND + 1, 300 * SECOND + 3)
    calls.utimensat("f", ((400, 4), OMIT), AT_SYMLINK_NOFOLLOW)
    assert (Times.of("f").a, Times.of("f").m) == (400 * SECOND + 4, 300 * SECOND + 3)
    before = time.time_ns() - SECOND // 10
    calls.utimensat("f", (NOW, OMIT), AT_SYMLINK_NOFOLLOW)
    assert before <= Times.of("f").a <= time.time_ns()
    assert Times.of("f").m == 300 * SECOND + 3
    calls.utimensat("f", (OMIT, NOW), AT_SYMLINK_NOFOLLOW)
    assert before <= Times.of("f").m <= time.time_ns()
    calls.utimensat("f", ((1, 1), (1, 1)), AT_SYMLINK_NOFOLLOW)
    calls.utimensat("f", None, AT_SYMLINK_NOFOLLOW)
    times = Times.of("f")
    assert before <= times.a == times.m <= time.time_ns()


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_any)
def test_setting_times_advances_the_ctime_and_omitting_both_changes_nothing(root: Root, kind: str) -> None:
    with root.touches(f="", here=""):
        calls.utimensat("f", (OMIT, OMIT), AT_SYMLINK_NOFOLLOW)
    times = Times.of("f")
    next_tick()
    calls.utimensat("f", ((times.a // SECOND, times.a % SECOND), OMIT), AT_SYMLINK_NOFOLLOW)
    after = Times.of("f")
    assert (after.a, after.m) == (times.a, times.m)
    assert after.c > times.c


def build_linked_file() -> None:
    write("f", b"data")
    os.symlink("f", "link")
    os.mkdir("d")


@prepared(build_linked_file)
def test_a_link_has_times_of_its_own(root: Root) -> None:
    with root.touches(f=""):
        calls.utimensat("link", ((10, 0), (20, 0)), AT_SYMLINK_NOFOLLOW)
    assert Times.of("link").m == 20 * SECOND
    calls.utimensat("link", ((30, 0), (40, 0)))
    assert Times.of("link").m == 20 * SECOND
    assert Times.of("f").m == 40 * SECOND


@pytest.mark.parametrize("seconds", [0, 1, 2**31 - 1, 2**31, 2**32, 2**33, -1, 1 - 2**31, FAR], ids=str)
@prepared(build_linked_file)
def test_times_before_1970_and_after_2038_are_kept(root: Root, seconds: int) -> None:
    for name in ("f", "d"):
        calls.utimensat(name, ((seconds, 5), (seconds, 6)))
        st = os.stat(name)
        assert (st.st_atime_ns, st.st_mtime_ns) == (seconds * SECOND + 5, seconds * SECOND + 6)


def build_from_the_far_future() -> None:
    os.mkdir("d")
    write("d/f", b"data")
    write("one", b"linked")
    os.link("one", "other")
    os.symlink("f", "d/link")
    for name in ("d/f", "one", "d/link", "d"):
        calls.utimensat(name, ((FAR, 7), (FAR, 8)), AT_SYMLINK_NOFOLLOW)


@prepared(build_from_the_far_future)
def test_times_of_the_far_future_stay_through_changes(root: Root) -> None:
    os.chmod("d/f", 0o600)
    os.chmod("other", 0o600)
    os.chown("d/link", OWNER.uid, OWNER.gid, follow_symlinks=False)
    os.chmod("d", 0o700)
    os.rename("one", "moved")
    os.rename("d", "e")
    for name in ("e/f", "e/link", "moved", "other", "e"):
        assert os.lstat(name).st_mtime_ns == FAR * SECOND + 8, name
    assert {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns for entry in os.scandir("e")} == {
        "f": FAR * SECOND + 8,
        "link": FAR * SECOND + 8,
    }


@prepared(build_linked_file)
def test_nanoseconds_out_of_range_give_einval(root: Root) -> None:
    with root.touches(f=""):
        for bad in (SECOND, -1, UTIME_NOW + 5):
            with fails(errno.EINVAL):
                calls.utimensat("f", ((0, bad), (0, 0)))
            with fails(errno.EINVAL):
                calls.utimensat("f", ((0, 0), (0, bad)))
        with fails(errno.EINVAL):
            calls.utimensat("f", ((0, 0), (0, 0)), 0x8000)


@prepared(build_linked_file)
def test_times_are_set_through_a_descriptor(root: Root) -> None:
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with opened("f", flags) as descriptor:
            calls.futimens(descriptor, ((5, 6), (7, 8 + flags)))
            assert os.fstat(descriptor).st_mtime_ns == 7 * SECOND + 8 + flags
    with opened("d") as descriptor:
        calls.futimens(descriptor, ((5, 6), (7, 8)))
    assert Times.of("d").m == 7 * SECOND + 8


def build_owned() -> None:
    write("f", b"data", 0o664)
    os.chown("f", OWNER.uid, OWNER.gid)
    os.chmod("f", 0o664)


@prepared(build_owned)
def test_writers_set_times_to_now_and_owners_to_anything(root: Root) -> None:
    as_user(OWNER, lambda: calls.utimensat("f", ((1, 0), (2, 0))))
    assert Times.of("f").m == 2 * SECOND
    as_user(MEMBER, calls.utimensat, "f", None)
    assert Times.of("f").m > 2 * SECOND
    as_user(OWNER, lambda: calls.utimensat("f", ((1, 0), (2, 0))))
    as_user(MEMBER, lambda: calls.utimensat("f", (NOW, NOW)))
    assert Times.of("f").m > 2 * SECOND
    with root.touches(f=""):
        for times in (((1, 0), (2, 0)), (NOW, OMIT), (OMIT, NOW), (NOW, (2, 0))):
            with fails(errno.EPERM):
                as_user(MEMBER, calls.utimensat, "f", times)
            with fails(errno.EPERM):
                as_user(OTHER, calls.utimensat, "f", times)
        for now in (None, (NOW, NOW)):
            with fails(errno.EACCES):
                as_user(OTHER, calls.utimensat, "f", now)
        as_user(OTHER, lambda: calls.utimensat("f", (OMIT, OMIT)))


@prepared(build_owned)
def test_an_owner_without_write_permission_sets_any_time(root: Root) -> None:
    os.chmod("f", 0o444)
    as_user(OWNER, calls.utimensat, "f", None)
    as_user(OWNER, lambda: calls.utimensat("f", ((1, 0), (2, 0))))
    assert Times.of("f").m == 2 * SECOND


def build_busy() -> None:
    write("f", b"data")
    os.mkdir("d")
    write("d/g", b"below")


@prepared(build_busy)
def test_writing_advances_mtime_and_ctime(root: Root) -> None:
    with opened("f", os.O_WRONLY) as descriptor:
        with root.touches(f="mc", here=""):
            os.write(descriptor, b"x")
        with root.touches(f="mc", here=""):
            os.pwrite(descriptor, b"y", 100)
        with root.touches(f=""):
            os.write(descriptor, b"")


@prepared(build_busy)
def test_times_after_writing_outlast_the_close(root: Root) -> None:
    with opened("f", os.O_WRONLY) as descriptor:
        os.write(descriptor, b"x")
        during = os.fstat(descriptor)
        next_tick()
    with root.touches(f=""):
        read("f")
    assert os.stat("f").st_mtime_ns == during.st_mtime_ns


@prepared(build_busy)
def test_a_time_set_while_a_file_is_open_is_not_undone_by_its_close(root: Root) -> None:
    with opened("f", os.O_WRONLY) as descriptor:
        os.write(descriptor, b"written")
        calls.utimensat("f", ((11, 12), (13, 14)))
    assert os.stat("f").st_mtime_ns == 13 * SECOND + 14
    with opened("f", os.O_WRONLY) as descriptor:
        os.write(descriptor, b"written again")
        calls.futimens(descriptor, ((21, 22), (23, 24)))
    assert os.stat("f").st_mtime_ns == 23 * SECOND + 24
    assert read("f") == b"written again"


@prepared(build_busy)
def test_looking_advances_no_time_on_a_mount_without_atimes(root: Root) -> None:
    with root.touches(f="", d="", here=""):
        read("f")
        os.listdir("d")
        os.stat("d/g")
        os.listxattr("f")
        calls.access("f", os.R_OK)
        os.statvfs("f")
        with opened("f") as descriptor:
            os.fsync(descriptor)
            os.lseek(descriptor, 0, os.SEEK_END)


@prepared(build_busy)
def test_setting_xattrs_advances_the_ctime(root: Root) -> None:
    with root.touches(f="c", here=""):
        os.setxattr("f", "user.a", b"1")
    with root.touches(f="c", here=""):
        os.removexattr("f", "user.a")
    with root.touches(d="c", here=""):
        os.setxattr("d", "user.a", b"1")


@prepared(build_busy)
def test_a_change_below_is_not_a_change_of_the_directories_above(root: Root) -> None:
    with root.touches(d="", here=""):
        write("d/g", b"changed")
        os.chmod("d/g", 0o600)
        os.truncate("d/g", 1)
    with root.touches(d="mc", here=""):
        write("d/new", b"new")


@prepared(build_busy)
def test_times_only_go_forward_through_a_series_of_changes(root: Root) -> None:
    last = os.stat("f").st_ctime_ns
    for number in range(20):
        if number % 2:
            os.chmod("f", 0o600 + number)
        else:
            with opened("f", os.O_WRONLY | os.O_APPEND) as descriptor:
                os.write(descriptor, b"x")
        now = os.stat("f").st_ctime_ns
        assert now >= last
        last = now
    assert stat.S_ISREG(os.stat("f").st_mode)
