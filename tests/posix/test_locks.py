"""Locks: flock, those of processes (fcntl) and those of open files (OFD), between processes and across copy-up."""

import contextlib
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.posix.rig import Root, child, fails, in_parallel, opened, prepared, read, write

F_OFD_SETLK = 37
F_OFD_GETLK = 36
F_OFD_SETLKW = 38
_FLOCK = "hhxxxxqqixxxx"  # struct flock: type, whence, start, length, pid


def record_lock(descriptor: int, command: int, kind: int, start: int = 0, length: int = 0) -> tuple[int, int, int, int]:
    """fcntl(2) with a struct flock; returns type, start, length and pid as the kernel left them."""
    answer = fcntl.fcntl(descriptor, command, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
    found_kind, _, found_start, found_length, pid = struct.unpack(_FLOCK, answer)
    return found_kind, found_start, found_length, pid


@contextlib.contextmanager
def holding(take: Callable[[int], object], flags: int = os.O_RDWR) -> Iterator[None]:
    """A process has taken a lock on "f" while the block runs."""
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()

    def hold() -> None:
        os.close(done_write)
        with opened("f", flags) as descriptor:
            take(descriptor)
            os.write(ready_write, b"x")
            os.read(done_read, 1)

    with child(hold) as process:
        os.close(ready_write)
        os.close(done_read)
        try:
            assert os.read(ready_read, 1) == b"x"
            yield
        finally:
            os.close(done_write)
            os.close(ready_read)
        process.join()


def build_file() -> None:
    write("f", b"0123456789")


WAYS: dict[str, tuple[Callable[[int], object], Callable[[int], object], int]] = {
    "flock": (
        lambda fd: fcntl.flock(fd, fcntl.LOCK_EX),
        lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
        errno.EWOULDBLOCK,
    ),
    "fcntl": (
        lambda fd: record_lock(fd, fcntl.F_SETLKW, fcntl.F_WRLCK),
        lambda fd: record_lock(fd, fcntl.F_SETLK, fcntl.F_WRLCK),
        errno.EAGAIN,
    ),
    "open-file": (
        lambda fd: record_lock(fd, F_OFD_SETLKW, fcntl.F_WRLCK),
        lambda fd: record_lock(fd, F_OFD_SETLK, fcntl.F_WRLCK),
        errno.EAGAIN,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_a_lock_keeps_others_out_until_its_holder_is_gone(root: Root, way: str) -> None:
    take, try_take, number = WAYS[way]
    with opened("f", os.O_RDWR) as descriptor:
        with holding(take), fails(number):
            try_take(descriptor)
        try_take(descriptor)


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_waiting_for_a_lock_ends_when_it_is_free(root: Root, way: str) -> None:
    take, _, _ = WAYS[way]

    def increment() -> None:
        for _ in range(25):
            with opened("f", os.O_RDWR) as descriptor:
                take(descriptor)
                value = int(os.pread(descriptor, 10, 0))
                os.pwrite(descriptor, b"%010d" % (value + 1), 0)

    write("f", b"0" * 10)
    in_parallel([increment] * 4)
    assert int(read("f")) == 100


@prepared(build_file)
def test_shared_locks_go_together_and_exclusive_ones_alone(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        with holding(lambda fd: fcntl.flock(fd, fcntl.LOCK_SH), os.O_RDONLY):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with fails(errno.EWOULDBLOCK):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        with holding(lambda fd: record_lock(fd, fcntl.F_SETLK, fcntl.F_RDLCK), os.O_RDONLY):
            record_lock(descriptor, fcntl.F_SETLK, fcntl.F_RDLCK)
            with fails(errno.EAGAIN):
                record_lock(descriptor, fcntl.F_SETLK, fcntl.F_WRLCK)


@prepared(build_file)
def test_record_locks_cover_the_bytes_they_name(root: Root) -> None:
    with holding(lambda fd: record_lock(fd, fcntl.F_SETLK, fcntl.F_WRLCK, 4, 2)), opened("f", os.O_RDWR) as descriptor:
        record_lock(descriptor, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 4)
        record_lock(descriptor, fcntl.F_SETLK, fcntl.F_WRLCK, 6, 0)
        for start, length in ((4, 1), (5, 1), (0, 0), (3, 2)):
            with fails(errno.EAGAIN):
                record_lock(descriptor, fcntl.F_SETLK, fcntl.F_WRLCK, start, length)
        kind, start, length, pid = record_lock(descriptor, fcntl.F_GETLK, fcntl.F_RDLCK, 0, 0)
        assert (kind, start, length) == (fcntl.F_WRLCK, 4, 2)
        assert pid > 0


@prepared(build_file)
def test_a_process_loses_its_record_locks_when_it_closes_the_file(root: Root) -> None:
    with opened("f", os.O_RDWR) as first, opened("f", os.O_RDWR) as third:
        record_lock(first, fcntl.F_SETLK, fcntl.F_WRLCK)
        with fails(errno.EAGAIN):
            record_lock(third, F_OFD_SETLK, fcntl.F_WRLCK)
        os.close(os.open("f", os.O_RDONLY))
        record_lock(third, F_OFD_SETLK, fcntl.F_WRLCK)


@prepared(build_file)
def test_locks_of_open_files_belong_to_the_open_file(root: Root) -> None:
    with opened("f", os.O_RDWR) as first, opened("f", os.O_RDWR) as second:
        record_lock(first, F_OFD_SETLK, fcntl.F_WRLCK)
        with fails(errno.EAGAIN):
            record_lock(second, F_OFD_SETLK, fcntl.F_WRLCK)
        kind, _, _, pid = record_lock(second, F_OFD_GETLK, fcntl.F_WRLCK)
        assert (kind, pid) == (fcntl.F_WRLCK, -1)
        duplicate = os.dup(first)
        record_lock(duplicate, F_OFD_SETLK, fcntl.F_UNLCK)
        os.close(duplicate)
        record_lock(second, F_OFD_SETLK, fcntl.F_WRLCK)


@pytest.mark.parametrize("way", WAYS)
@prepared(build_file)
def test_a_lock_taken_before_a_change_of_the_file_still_holds(root: Root, way: str) -> None:
    take, try_take, number = WAYS[way]

    def take_then_change(descriptor: int) -> None:
        take(descriptor)
        os.chmod("f", 0o600)
        os.rename("f", "g")
        os.rename("g", "f")

    with holding(take_then_change), opened("f", os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"written", 0)
        with fails(number):
            try_take(descriptor)


@prepared(build_file)
def test_a_lock_taken_by_a_reader_of_an_old_file_keeps_out_its_writers(root: Root) -> None:
    with holding(lambda fd: fcntl.flock(fd, fcntl.LOCK_EX), os.O_RDONLY), opened("f", os.O_RDWR) as descriptor:
        os.write(descriptor, b"copied up")
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@prepared(build_file)
def test_locking_needs_a_descriptor_fit_for_it(root: Root) -> None:
    with opened("f") as descriptor, fails(errno.EBADF):
        record_lock(descriptor, fcntl.F_SETLK, fcntl.F_WRLCK)
    with opened("f", os.O_WRONLY) as descriptor, fails(errno.EBADF):
        record_lock(descriptor, fcntl.F_SETLK, fcntl.F_RDLCK)
    with opened("f") as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with opened(".") as directory:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)


@prepared(build_file)
def test_a_lease_is_broken_by_a_writer(root: Root) -> None:
    # A read lease is for a file that nobody writes; the kernel tells its holder by SIGIO when someone wants to.
    seen: list[int] = []
    before = signal.signal(signal.SIGIO, lambda number, _: seen.append(number))
    try:
        with opened("f") as descriptor:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            assert fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
            with fails(errno.EWOULDBLOCK):
                os.open("f", os.O_WRONLY | os.O_NONBLOCK)
            assert seen == [signal.SIGIO]
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.close(os.open("f", os.O_WRONLY | os.O_NONBLOCK))
    finally:
        signal.signal(signal.SIGIO, before)


@prepared(build_file)
def test_a_deadlock_of_record_locks_is_seen(root: Root) -> None:
    go_read, go_write = os.pipe()

    def other() -> None:
        with opened("f", os.O_RDWR) as descriptor:
            record_lock(descriptor, fcntl.F_SETLKW, fcntl.F_WRLCK, 1, 1)
            os.write(go_write, b"x")
            record_lock(descriptor, fcntl.F_SETLKW, fcntl.F_WRLCK, 0, 1)

    outcomes = []
    with opened("f", os.O_RDWR) as descriptor:
        record_lock(descriptor, fcntl.F_SETLKW, fcntl.F_WRLCK, 0, 1)
        with child(other) as process:
            os.read(go_read, 1)
            for wait in (lambda: record_lock(descriptor, fcntl.F_SETLKW, fcntl.F_WRLCK, 1, 1), process.join):
                try:
                    wait()
                    outcomes.append(0)
                except OSError as error:
                    outcomes.append(error.errno or -1)
                    record_lock(descriptor, fcntl.F_SETLK, fcntl.F_UNLCK, 0, 0)
    os.close(go_read)
    os.close(go_write)
    assert sorted(outcomes) == [0, errno.EDEADLK]
