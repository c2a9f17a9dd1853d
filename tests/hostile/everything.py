"""Every request there is, on every name of a tree, whatever comes of it."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.syscalls import RENAME_EXCHANGE, renameat2


def walk(root: bytes) -> Iterator[bytes]:
    """All paths below, no link followed."""
    pending = [root]
    while pending:
        folder = pending.pop()
        names: list[bytes] = []
        with contextlib.suppress(OSError):
            names = sorted(os.listdir(folder))
        for name in names:
            path = os.path.join(folder, name)
            yield path
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    pending.append(path)


def _read(path: bytes) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


def _write(path: bytes) -> None:
    if stat.S_ISREG(os.lstat(path).st_mode):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.pwrite(descriptor, b"W", 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(path: bytes) -> None:
    os.rename(path, path + b".moved")
    os.rename(path + b".moved", path)


def _exchange(path: bytes) -> None:
    other = path + b".other"
    os.mkdir(other)
    renameat2(path, other, RENAME_EXCHANGE)
    renameat2(path, other, RENAME_EXCHANGE)
    os.rmdir(other)


def _link(path: bytes) -> None:
    os.link(path, path + b".linked", follow_symlinks=False)


def _inside(path: bytes) -> None:
    """Make something in it."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.close(os.open(os.path.join(path, b"made"), os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        os.mkdir(os.path.join(path, b"made dir"))


def _remove(path: bytes) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)


LOOKING: tuple[Callable[[bytes], object], ...] = (
    os.lstat,
    os.readlink,
    lambda path: os.listxattr(path, follow_symlinks=False),
    lambda path: os.getxattr(path, "trusted.overlay.redirect", follow_symlinks=False),
    _read,
)
CHANGING: tuple[Callable[[bytes], object], ...] = (
    lambda path: os.setxattr(path, "trusted.new", b"v", follow_symlinks=False),
    lambda path: os.chown(path, 1, 1, follow_symlinks=False),
    lambda path: os.utime(path, (1, 1), follow_symlinks=False),
    _write,
    _inside,
    _link,
    _rename,
    _exchange,
)


def do(root: Path, *calls: Callable[[bytes], object]) -> set[int]:
    """Make each call on each name; the numbers of the errors met."""
    errors = set()
    for path in list(walk(os.fsencode(root))):
        for call in calls:
            try:
                call(path)
            except OSError as error:
                errors.add(error.errno or 0)
    return errors


def remove_all(root: Path) -> set[int]:
    errors = set()
    for path in reversed(list(walk(os.fsencode(root)))):
        try:
            _remove(path)
        except OSError as error:
            errors.add(error.errno or 0)
    return errors
