"""inotify: what a watcher on the mount is told of changes made on it."""

import os

import pytest

from tests.posix.calls import (
    IN_ACCESS,
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_MODIFY,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_OPEN,
    Watch,
)
from tests.posix.rig import Root, opened, prepared, read, write


def build() -> None:
    os.mkdir("d")
    write("d/f", b"data")
    write("f", b"data")


def seen(watch: Watch) -> list[tuple[int, bytes]]:
    """Kinds and names of the events so far; equal ones in a row are told once, inotify(7)."""
    return [(event.mask, event.name) for event in watch.events() if event.mask & 0xFFF]


@prepared(build)
def test_a_directory_tells_of_names_that_come_and_go(root: Root) -> None:
    with Watch("d", IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO) as watch:
        write("d/new")
        os.mkdir("d/sub")
        os.symlink("x", "d/link")
        os.link("f", "d/hard")
        os.unlink("d/f")
        os.rename("d/new", "d/newer")
        os.rename("f", "d/in")
        os.rename("d/in", "out")
        events = watch.events()
    assert [(event.mask & 0xFFF, event.name) for event in events] == [
        (IN_CREATE, b"new"),
        (IN_CREATE, b"sub"),
        (IN_CREATE, b"link"),
        (IN_CREATE, b"hard"),
        (IN_DELETE, b"f"),
        (IN_MOVED_FROM, b"new"),
        (IN_MOVED_TO, b"newer"),
        (IN_MOVED_TO, b"in"),
        (IN_MOVED_FROM, b"in"),
    ]
    assert events[5].cookie == events[6].cookie != 0


@prepared(build)
def test_a_directory_tells_of_the_use_of_its_files(root: Root) -> None:
    with Watch("d", IN_OPEN | IN_ACCESS | IN_MODIFY | IN_CLOSE_WRITE | IN_ATTRIB) as watch:
        with opened("d/f", os.O_RDWR) as descriptor:
            os.read(descriptor, 10)
            os.write(descriptor, b"x")
        os.chmod("d/f", 0o600)
        os.setxattr("d/f", "user.a", b"1")
        assert seen(watch) == [
            (IN_OPEN, b"f"),
            (IN_ACCESS, b"f"),
            (IN_MODIFY, b"f"),
            (IN_CLOSE_WRITE, b"f"),
            (IN_ATTRIB, b"f"),
        ]
        os.truncate("d/f", 1)
        assert (IN_MODIFY, b"f") in seen(watch)


@prepared(build)
def test_a_watched_file_tells_of_changes_after_it_was_first_written(root: Root) -> None:
    with Watch("f", IN_MODIFY | IN_ATTRIB | IN_MOVE_SELF | IN_DELETE_SELF) as watch:
        with opened("f", os.O_WRONLY | os.O_APPEND) as descriptor:
            os.write(descriptor, b"first")
        assert seen(watch) == [(IN_MODIFY, b"")]
        os.rename("f", "g")
        assert seen(watch) == [(IN_MOVE_SELF, b"")]
        with opened("g", os.O_WRONLY | os.O_APPEND) as descriptor:
            os.write(descriptor, b"second")
        assert seen(watch) == [(IN_MODIFY, b"")]
        os.unlink("g")
        assert seen(watch) == [(IN_ATTRIB, b""), (IN_DELETE_SELF, b"")]


@pytest.mark.parametrize("times", [1, 20])
@prepared(build)
def test_a_watched_file_tells_of_its_replacement(root: Root, times: int) -> None:
    with Watch("d", IN_MOVED_TO) as watch:
        for number in range(times):
            write("new", b"%d" % number)
            os.rename("new", "d/f")
            assert seen(watch) == [(IN_MOVED_TO, b"f")]
    assert read("d/f") == b"%d" % (times - 1)
