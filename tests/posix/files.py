"""Files of every type, and every call that takes a path, as tables for the tests."""

import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.posix import calls
from tests.posix.rig import write

NOTHING: Final = "missing"


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


MAKERS: Final[dict[str, Callable[[str], None]]] = {
    "regular": lambda path: write(path, b"data"),
    "directory": lambda path: os.mkdir(path, 0o755),
    "fifo": lambda path: os.mkfifo(path, 0o644),
    "block": lambda path: os.mknod(path, stat.S_IFBLK | 0o644, os.makedev(1, 2)),
    "char": lambda path: os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 3)),
    "socket": _socket,
    "symlink": lambda path: os.symlink("target", path),
}
TYPES: Final = tuple(MAKERS)
NOT_SYMLINKS: Final = tuple(kind for kind in TYPES if kind != "symlink")
NOT_DIRECTORIES: Final = tuple(kind for kind in TYPES if kind != "directory")
NODES: Final = ("fifo", "block", "char", "socket")
FORMATS: Final = {
    "regular": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "fifo": stat.S_IFIFO,
    "block": stat.S_IFBLK,
    "char": stat.S_IFCHR,
    "socket": stat.S_IFSOCK,
    "symlink": stat.S_IFLNK,
}


def make(kind: str, path: str = "f") -> None:
    """Make a file of this type."""
    MAKERS[kind](path)


def remove(path: str) -> None:
    """Remove a file of any type; a directory must be empty."""
    (os.rmdir if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink)(path)


def kind_of(path: str) -> str:
    """The type of a file, as named in the tables; "missing" if there is none."""
    try:
        found = stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return NOTHING
    return next(kind for kind, value in FORMATS.items() if value == found)


@dataclass(frozen=True, slots=True)
class Call:
    """One call with a path to vary; it leaves no descriptor and, where it fails, no trace."""

    name: str
    run: Callable[[str], object]
    follows: bool = True
    """A final symbolic link is followed."""
    changes: bool = False
    """It would change the filesystem."""

    def __str__(self) -> str:
        return self.name


def _open(path: str, flags: int) -> None:
    os.close(os.open(path, flags | os.O_NONBLOCK, 0o644))


def _chdir(path: str) -> None:
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(path)
        os.fchdir(before)
    finally:
        os.close(before)


def _bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


LOOKUPS: Final = (
    Call("stat", os.stat),
    Call("lstat", os.lstat, follows=False),
    Call("access", lambda path: calls.access(path, os.F_OK)),
    Call("open-for-reading", lambda path: _open(path, os.O_RDONLY)),
    Call("open-for-writing", lambda path: _open(path, os.O_RDWR), changes=True),
    Call("open-to-truncate", lambda path: _open(path, os.O_WRONLY | os.O_TRUNC), changes=True),
    Call("open-as-directory", lambda path: _open(path, os.O_RDONLY | os.O_DIRECTORY)),
    Call("chdir", _chdir),
    Call("statvfs", os.statvfs),
    Call("readlink", os.readlink, follows=False),
    Call("chmod", lambda path: os.chmod(path, 0o640), changes=True),
    Call("chown", lambda path: os.chown(path, 65534, 65533), changes=True),
    Call("lchown", lambda path: os.lchown(path, 65534, 65533), follows=False, changes=True),
    Call("utimensat", lambda path: calls.utimensat(path, ((1, 2), (3, 4))), changes=True),
    Call(
        "utimensat-of-link",
        lambda path: calls.utimensat(path, ((1, 2), (3, 4)), calls.AT_SYMLINK_NOFOLLOW),
        follows=False,
        changes=True,
    ),
    Call("truncate", lambda path: os.truncate(path, 123), changes=True),
    Call("getxattr", lambda path: os.getxattr(path, "user.test")),
    Call("listxattr", os.listxattr),
    Call("setxattr", lambda path: os.setxattr(path, "user.test", b"value"), changes=True),
    Call("removexattr", lambda path: os.removexattr(path, "user.test"), changes=True),
    Call("unlink", os.unlink, follows=False, changes=True),
    Call("rmdir", os.rmdir, follows=False, changes=True),
    Call("link-from", lambda path: os.link(path, "new", follow_symlinks=False), follows=False, changes=True),
    Call("rename-from", lambda path: os.rename(path, "new"), follows=False, changes=True),
)
"""Calls on a path where something must be."""

CREATIONS: Final = (
    Call("mkdir", lambda path: os.mkdir(path, 0o755), follows=False, changes=True),
    Call("mkfifo", lambda path: os.mkfifo(path, 0o644), follows=False, changes=True),
    Call("mknod-regular", lambda path: os.mknod(path, stat.S_IFREG | 0o644), follows=False, changes=True),
    Call(
        "mknod-char", lambda path: os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 3)), follows=False, changes=True
    ),
    Call(
        "mknod-block", lambda path: os.mknod(path, stat.S_IFBLK | 0o644, os.makedev(1, 2)), follows=False, changes=True
    ),
    Call("symlink", lambda path: os.symlink("anything", path), follows=False, changes=True),
    Call("link-to", lambda path: os.link("source", path), follows=False, changes=True),
    Call(
        "rename-to", lambda path: calls.renameat2("source", path, calls.RENAME_NOREPLACE), follows=False, changes=True
    ),
    Call("create", lambda path: _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), follows=False, changes=True),
    Call("bind", _bind, follows=False, changes=True),
)
"""Calls that make something at a path where nothing must be; "source" is a regular file for two of them."""

CALLS: Final = LOOKUPS + CREATIONS
UNPRIVILEGED_CREATIONS: Final = tuple(one for one in CREATIONS if one.name not in ("mknod-char", "mknod-block"))
