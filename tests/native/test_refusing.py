"""Whatever system call of the daemon fails, the mount shows what was there before or what was asked for.

So does the next mount, and the same request succeeds after it. As in tests/faults, where all calls are core's: here are
those of the compiled modules, too, of a daemon that serves.
"""

import ctypes
import errno
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Layers
from tests.support.mounts import our_mount
from tests.support.trees import Tree, compare_trees, read_tree, show_tree

_MOST: Final = 90  # calls of the daemon for one operation
_OLD: Final = 10**18  # ns


class Control(ctypes.Structure):
    """What the daemon's C library goes by, see refusing.c."""

    _fields_ = (
        ("armed", ctypes.c_int),
        ("fail_at", ctypes.c_int),
        ("fail_to", ctypes.c_int),
        ("number", ctypes.c_int),
        ("count", ctypes.c_int),
        ("name", ctypes.c_char * 32),
    )


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Control:
    """Of what is mounted from here on."""
    library = tmp_path / "refusing.so"
    source = Path(__file__).with_name("refusing.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-fno-builtin", "-o", library, source, "-ldl"], check=True)
    path = tmp_path / "control"
    path.write_bytes(bytes(mmap.PAGESIZE))
    monkeypatch.setenv("REFUSING", str(path))
    monkeypatch.setenv("LD_PRELOAD", " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(library)]))
    with path.open("r+b") as file:
        return Control.from_buffer(mmap.mmap(file.fileno(), mmap.PAGESIZE))


def write(path: Path, data: bytes, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def copy(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as reading:
        fd = os.open(target, os.O_WRONLY)
        try:
            os.copy_file_range(reading.fileno(), fd, 6)
        finally:
            os.close(fd)


def list_and_look(directory: Path) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            entry.stat()


def with_open(path: Path, flags: int, act: Callable[[int], object]) -> None:
    fd = os.open(path, flags)
    try:
        act(fd)
    finally:
        os.close(fd)


# In a directory of both layers: `up`, `up2`, `updir` are the upper one's, `low`, `link`, `lowdir` the lower one's.
OPERATIONS: Final[dict[str, Callable[[Path], object]]] = {
    "look up": lambda d: (d / "up").stat(),
    "look up below": lambda d: (d / "low").stat(),
    "look up in vain": lambda d: (d / "none").exists(),
    "list": os.listdir,
    "list a part": lambda d: os.listdir(d / "lowdir"),
    "list and look": list_and_look,
    "read": lambda d: (d / "up").read_bytes(),
    "read below": lambda d: (d / "low").read_bytes(),
    "read a link": lambda d: os.readlink(d / "link"),
    "read an xattr": lambda d: os.getxattr(d / "up", "user.y"),
    "list xattrs": lambda d: os.listxattr(d / "up"),
    "ask for the room": os.statvfs,
    "make": lambda d: os.close(os.open(d / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)),
    "make a directory": lambda d: (d / "new").mkdir(0o750),
    "make a link": lambda d: (d / "new").symlink_to("up"),
    "make a fifo": lambda d: os.mkfifo(d / "new", 0o620),
    "link": lambda d: os.link(d / "up", d / "new"),
    "link below": lambda d: os.link(d / "low", d / "new"),
    "write": lambda d: write(d / "up", b"new"),
    "write below": lambda d: write(d / "low", b"new"),
    "empty": lambda d: os.close(os.open(d / "up", os.O_WRONLY | os.O_TRUNC)),
    "empty below": lambda d: os.close(os.open(d / "low", os.O_WRONLY | os.O_TRUNC)),
    "truncate": lambda d: os.truncate(d / "up", 3),
    "truncate below": lambda d: os.truncate(d / "low", 3),
    "allocate": lambda d: with_open(d / "up", os.O_WRONLY, lambda fd: os.posix_fallocate(fd, 0, 9000)),
    "copy a part": lambda d: copy(d / "low", d / "up"),
    "copy a part below": lambda d: copy(d / "up", d / "low"),
    "find a hole": lambda d: with_open(d / "up", os.O_RDONLY, lambda fd: os.lseek(fd, 0, os.SEEK_HOLE)),
    "sync": lambda d: with_open(d / "up", os.O_WRONLY, os.fsync),
    "sync a directory": lambda d: with_open(d, os.O_RDONLY, os.fsync),
    "chmod": lambda d: (d / "up").chmod(0o600),
    "chmod below": lambda d: (d / "low").chmod(0o600),
    "chown": lambda d: os.chown(d / "up", 7, 8),
    "chown below": lambda d: os.chown(d / "low", 7, 8),
    "touch": lambda d: os.utime(d / "up", ns=(_OLD // 2, _OLD // 2)),
    "touch below": lambda d: os.utime(d / "low", ns=(_OLD // 2, _OLD // 2)),
    "set an xattr": lambda d: os.setxattr(d / "up", "user.x", b"x"),
    "set an xattr below": lambda d: os.setxattr(d / "low", "user.x", b"x"),
    "remove an xattr": lambda d: os.removexattr(d / "up", "user.y"),
    "unlink": lambda d: (d / "up").unlink(),
    "unlink below": lambda d: (d / "low").unlink(),
    "rmdir": lambda d: (d / "updir").rmdir(),
    "rmdir below": lambda d: (d / "lowdir").rmdir(),
    "rename": lambda d: os.rename(d / "up", d / "new"),
    "rename over": lambda d: os.rename(d / "up", d / "up2"),
    "rename over what is below": lambda d: os.rename(d / "up", d / "low"),
    "rename below": lambda d: os.rename(d / "low", d / "new"),
    "rename a directory": lambda d: os.rename(d / "updir", d / "new"),
    "rename a directory over": lambda d: os.rename(d / "updir", d / "lowdir"),
}


@dataclass(slots=True)
class Directories:
    """As many alike as there may be calls, two more to compare with, and what each is to show."""

    layers: Layers
    since: int

    def build(self) -> None:
        for number in range(_MOST + 2):
            lower, upper = self.layers.lower / f"d{number}", self.layers.upper / f"d{number}"
            (lower / "lowdir").mkdir(parents=True)
            (upper / "updir").mkdir(parents=True)
            (lower / "low").write_bytes(b"of the lower layer")
            (lower / "link").symlink_to("low")
            for name in ("up", "up2"):
                (upper / name).write_bytes(b"of the upper layer")
            os.setxattr(upper / "up", "user.y", b"y")
            for root in (lower, upper):
                for path in (*root.iterdir(), root):
                    os.utime(path, ns=(_OLD, _OLD), follow_symlinks=False)

    def look(self, number: int) -> Tree:
        tree = read_tree(os.fsencode(self.layers.mnt / f"d{number}"), self.since)
        # What merely was looked at may count as read.
        return {path: replace(entry, atime=0) for path, entry in tree.items()}


@pytest.fixture
def directories(layers: Layers) -> Iterator[Directories]:
    made = Directories(layers, time.time_ns())
    made.build()
    yield made
    assert os.listdir(layers.work / "work") == []


READS: Final = ("look up", "look up below", "list and look", "read", "read below", "read a link", "list xattrs")


@pytest.mark.parametrize(
    ("act", "lasts"),
    [
        *(pytest.param(act, 1, id=name) for name, act in OPERATIONS.items()),
        # What is read in another way where the first one fails, fails as well.
        *(pytest.param(OPERATIONS[name], 2, id=f"{name}, two calls") for name in READS),
    ],
)
def test_a_call_that_fails_leaves_what_was_there_or_what_was_asked_for(
    layers: Layers, control: Control, directories: Directories, act: Callable[[Path], object], lasts: int
) -> None:
    options = "engine=native,uring=off"
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        before = directories.look(0)
        act(layers.mnt / "d1")
        after = directories.look(1)
        failed = 0
        for number in range(1, _MOST):
            control.fail_at, control.fail_to, control.number = number, number + lasts - 1, errno.EIO
            control.count, control.armed = 0, 1
            raised = None
            try:
                act(layers.mnt / f"d{number + 1}")
            except OSError as error:
                raised = error.errno
            control.armed = 0
            at = f"call {number}, {os.fsdecode(control.name)}"
            assert raised in (None, errno.EIO), at
            seen = directories.look(number + 1)
            if raised is None:
                assert not compare_trees(after, seen), f"{at}: {show_tree(after)}\n\n{show_tree(seen)}"
            else:
                failed += 1
                # Where it is the answer that can't be made, all is done; it can be done once more then.
                assert seen in (before, after), f"{at}: {show_tree(before)}\n\n{show_tree(seen)}"
                act(layers.mnt / f"d{number + 1}")
                seen = directories.look(number + 1)
                assert not compare_trees(after, seen), f"{at}, again: {show_tree(after)}\n\n{show_tree(seen)}"
            if control.count < number:
                break
        else:
            raise AssertionError("more calls than directories")
        assert failed
        last = number + 1
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        for number in range(1, last + 1):
            seen = directories.look(number)
            # That a directory keeps its times when something in it is copied up is tried, and given up where it fails.
            seen[b"."] = replace(seen[b"."], mtime=after[b"."].mtime)
            assert not compare_trees(after, seen), f"d{number}: {show_tree(after)}\n\n{show_tree(seen)}"
