"""Scripts that do everything to everything in a stack, in a fixed order."""

import itertools
import os
from collections.abc import Iterator

from tests.differential.script import (
    Access,
    Chmod,
    Chown,
    Copy,
    Create,
    HandleRead,
    HandleStat,
    HandleWrite,
    Link,
    ListXattr,
    Mkdir,
    Op,
    Open,
    Read,
    Readdir,
    Readlink,
    Remount,
    Rename,
    Rmdir,
    Rotate,
    SetXattr,
    Stat,
    Step,
    Symlink,
    Truncate,
    Unlink,
    Utimens,
    Write,
)
from tests.support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.support.trees import Stack


def sweep(stack: Stack) -> tuple[Step, ...]:
    """Look at all, change all, move all, remove all; with remounts between, and the upper made a lower layer once."""
    paths = _paths(stack)
    steps = [
        *_by_all(_looks(paths)),
        *map(Step, _changes(paths)),
        Step(Remount()),
        *_by_all(_looks(paths)),
        *map(Step, _moves(paths)),
        Step(Remount()),
        *_by_all(_looks([path + b".m" for path in paths])),
        Step(Rotate()),
        *map(Step, _changes([path + b".m" for path in paths])),
        *map(Step, _removals([path + b".m" for path in paths] + paths)),
        Step(Readdir(b"")),
    ]
    return tuple(steps)


def _paths(stack: Stack) -> list[bytes]:
    """All paths of all layers, those in directories after them."""
    paths: set[bytes] = set()
    for node in itertools.chain(*stack):
        path = node.path
        while path:
            paths.add(path)
            path = os.path.dirname(path)
    return sorted(paths)


def _by_all(operations: Iterator[Op]) -> Iterator[Step]:
    for number, operation in enumerate(operations):
        yield Step(operation, number % 3, look=False)


def _looks(paths: list[bytes]) -> Iterator[Op]:
    for path in paths:
        for who_does in range(1, 3):
            yield Access(path, who_does * 2)
        yield from (Stat(path), Stat(path, follow=True), ListXattr(path), Read(path), Readlink(path), Readdir(path))


def _changes(paths: list[bytes]) -> Iterator[Op]:
    """One change to each object, another one for the next; then some more to all."""
    kinds = itertools.cycle((_chmod, _chown, _touch, _mark, _append, _shorten, _overwrite, _copy))
    for path in paths:
        yield Open(0, path, os.O_RDONLY)
        yield next(kinds)(path)
        yield from (HandleRead(0), HandleStat(0), HandleWrite(0), Stat(path))
    for path in paths:
        yield from (Create(path + b"/new", 0o664, 0o002), Mkdir(path + b"/newdir"), Symlink(path + b"/newlink"))
        yield Link(path, path + b".l")
        yield Unlink(path + b".l")


def _chmod(path: bytes) -> Op:
    return Chmod(path, 0o2751)


def _chown(path: bytes) -> Op:
    return Chown(path, 1001, 2000)


def _touch(path: bytes) -> Op:
    return Utimens(path, 1_111_111_111_000_000_001, 1_222_222_222_000_000_002)


def _mark(path: bytes) -> Op:
    return SetXattr(path, "trusted.swept", b"yes")


def _append(path: bytes) -> Op:
    return Write(path, size=100, flags=os.O_APPEND)


def _shorten(path: bytes) -> Op:
    return Truncate(path, 3)


def _overwrite(path: bytes) -> Op:
    return Write(path, 1, 2)


def _copy(path: bytes) -> Op:
    return Copy(path, path)


def _moves(paths: list[bytes]) -> Iterator[Op]:
    """Each object to another name and in and out of another directory, what is in a directory before it."""
    yield Mkdir(b"elsewhere", 0o777)
    for path in reversed(paths):
        yield Rename(path, b"elsewhere/x", RENAME_NOREPLACE)
        yield Rename(b"elsewhere/x", path)
        yield Rename(path, path + b".m", RENAME_NOREPLACE)
    for path, other in itertools.pairwise(reversed(paths)):
        yield Rename(path + b".m", other + b".m", RENAME_EXCHANGE)
        yield Rename(path + b".m", other + b".m", RENAME_EXCHANGE)
        yield Readdir(os.path.dirname(path))


def _removals(paths: list[bytes]) -> Iterator[Op]:
    for path in reversed(paths):
        for inner in (b"/new", b"/newlink"):
            yield Unlink(path + inner)
        yield from (Rmdir(path + b"/newdir"), Rmdir(path), Unlink(path))
        yield Readdir(os.path.dirname(path))
