"""A filesystem without room: the error is told, nothing is lost, and all goes on once there is room again."""

import errno
import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.posix.files import kind_of
from tests.posix.rig import Root, fails, in_lower, opened, prepared, read, write

pytestmark = pytest.mark.flavour("full")

LARGE = bytes(range(256)) * 4096 * 6  # six megabytes, more than the upper layer holds


def build() -> None:
    write("small", b"small", 0o644)
    os.mkdir("d")
    write("d/f", b"below")


def append(name: str) -> None:
    """Open for appending and write: either may be what takes the copy."""
    with open(name, "ab", buffering=0) as file:
        file.write(b"x")


COPYING: dict[str, Callable[[], object]] = {
    "chmod": lambda: os.chmod("large", 0o600),
    "truncate": lambda: os.truncate("large", len(LARGE) - 1),
    "append": lambda: append("large"),
    "rename": lambda: os.rename("large", "moved"),
}
NEW: dict[str, Callable[[], object]] = {
    "mkdir": lambda: os.mkdir("new"),
    "symlink": lambda: os.symlink("x", "new"),
    "mkfifo": lambda: os.mkfifo("new"),
    "open": lambda: os.open("new", os.O_WRONLY | os.O_CREAT),
    "mkdir-below": lambda: os.mkdir("d/new"),
}


def fill() -> Iterator[str]:
    """Take all room for data, then all inodes."""
    with opened("ballast", os.O_WRONLY | os.O_CREAT) as descriptor:
        for size in (65536, 4096, 512, 1):
            with fails(errno.ENOSPC):
                for _ in range(1000):
                    os.write(descriptor, b"b" * size)
    yield "data"
    with fails(errno.ENOSPC):
        for count in range(10_000):
            os.symlink("x", f"ballast{count}")
    yield "inodes"


def empty() -> None:
    for name in os.listdir():
        if name.startswith("ballast"):
            os.unlink(name)


def once_there_is_room(action: Callable[[], object]) -> None:
    """Do it once there is room again: as soon as the daemon has heard that the files are closed and forgotten.

    They may be those of an earlier test.
    """
    deadline = time.monotonic() + 10
    while True:
        try:
            action()
        except OSError as error:
            if error.errno != errno.ENOSPC or time.monotonic() > deadline:
                raise
        else:
            return


@prepared(build)
def test_writing_without_room_gives_enospc_and_keeps_what_was_there(root: Root) -> None:
    once_there_is_room(lambda: write("early", b"early"))
    for _ in fill():
        with opened("early", os.O_WRONLY | os.O_APPEND) as descriptor, fails(errno.ENOSPC):
            for _ in range(10):
                os.write(descriptor, b"x" * 4096)
        assert read("early")[:5] == b"early"
        assert read("small") == b"small"
        assert read("d/f") == b"below"
    empty()
    once_there_is_room(lambda: write("late", b"late" * 1000))
    assert read("late") == b"late" * 1000


@prepared(build)
def test_making_without_room_gives_enospc_and_leaves_nothing(root: Root) -> None:
    stages = fill()
    assert next(stages) == "data"
    assert next(stages) == "inodes"
    before = sorted(os.listdir())
    for action in NEW.values():
        with fails(errno.ENOSPC):
            action()
        assert kind_of("new") == kind_of("d/new") == "missing"
    assert sorted(os.listdir()) == before
    assert os.listdir("d") == ["f"]
    os.unlink("ballast0")
    os.unlink("ballast1")
    empty()
    once_there_is_room(lambda: os.mkdir("new"))
    os.mkdir("d/new")


@prepared(build)
def test_removing_works_without_room(root: Root) -> None:
    once_there_is_room(lambda: write("own", b"x" * 8192))
    for _ in fill():
        pass
    os.unlink("own")
    empty()
    os.unlink("small")
    os.unlink("d/f")
    os.rmdir("d")
    assert os.listdir() == []


def build_large() -> None:
    write("large", LARGE)


@pytest.mark.parametrize("change", COPYING)
@in_lower(build_large)
def test_a_copy_up_without_room_leaves_the_file_as_it_was(root: Root, change: str) -> None:
    with opened("large", os.O_RDONLY) as descriptor:
        before = os.fstat(descriptor)
        for _ in range(2):
            with fails(errno.ENOSPC):
                COPYING[change]()
        after = os.stat("large")
        assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
        assert os.listdir() == ["large"]
        assert os.pread(descriptor, 1 << 20, 3 << 20) == LARGE[3 << 20 : 4 << 20]
    assert read("large") == LARGE
    once_there_is_room(lambda: write("large", b"now small"))
    assert read("large") == b"now small"
