"""Every system call of overlayfs_py.sys and overlayfs_py.core goes through here: counted, and made to fail at will."""

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Final

import xattr

from overlayfs_py.sys import files, flags, handles, paths, rename, syncing

READING: Final = "stat fstat fstatvfs readlink listxattr getxattr pread preadv lseek dup".split()
CHANGING: Final = (
    "mkdir mknod symlink link rename unlink rmdir chmod fchmod chown utime setxattr ftruncate fsync fdatasync pwrite "
    "copy_file_range"
).split()
# Calls that can't fail for want of space or by a broken disk, and functions of `os` that are none.
HARMLESS: Final = frozenset(
    (
        "close umask geteuid getegid fsencode fsdecode strerror makedev major minor urandom closerange listdir uname"
    ).split()
)
# Functions of the C library, which tell of failure by -1 and errno.
FOREIGN: Final = (
    (files, "_utimensat", True),
    (files, "_fchmodat2", True),
    (files, "_getdents64", False),
    (files, "_linkat", True),
    (files, "_fallocate", True),
    (files, "_syncfs", False),
    (flags, "_statx", False),
    (handles, "_name_to_handle_at", False),
    (handles, "_open_by_handle_at", False),
    (paths, "_openat2", False),
    (rename, "_renameat2", True),
    (syncing, "_sync_file_range", False),
    (syncing, "_syscall", False),
)
_CREATES: Final = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)


class Crash(BaseException):
    """The end of the process: no clean-up reaches the disk after it."""


class Calls:
    """The system calls of the operation that runs inside `watched`.

    The `fail_at`-th of them, counted from 1, fails with `number`; with `crash`, the `fail_at`-th changing one and all
    calls after it raise Crash instead, and only changing ones count.
    """

    def __init__(self) -> None:
        self.watching = False
        self.crash = False
        self.fail_at = 0
        self.number = 0
        self.names: list[str] = []
        self.changing: list[bool] = []

    @contextlib.contextmanager
    def watched(self, *, fail_at: int = 0, number: int = errno.EIO, crash: bool = False) -> Iterator[None]:
        self.names, self.changing = [], []
        self.fail_at, self.number, self.crash = fail_at, number, crash
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    def fails(self, name: str, changing: bool) -> bool:
        """Count a call; whether it is the one to fail."""
        if not self.watching:
            return False
        if self.crash:
            if self.fail_at and len(self.names) >= self.fail_at:
                raise Crash
            if not changing:
                return False
        self.names.append(name)
        self.changing.append(changing)
        if len(self.names) != self.fail_at:
            return False
        if self.crash:
            raise Crash
        return True

    @contextlib.contextmanager
    def installed(self) -> Iterator["Calls"]:
        """Put every call under watch."""
        with contextlib.ExitStack() as stack:
            for name in READING:
                stack.enter_context(self._wrap(os, name, False))
            for name in CHANGING:
                stack.enter_context(self._wrap(os, name, True))
            stack.enter_context(self._wrap(os, "open", None))
            stack.enter_context(self._wrap(fcntl, "ioctl", True))
            stack.enter_context(self._wrap(fcntl, "fcntl", False))
            stack.enter_context(self._wrap(fcntl, "flock", False))
            stack.enter_context(self._wrap(xattr, "setxattr", True))
            stack.enter_context(self._wrap(xattr, "removexattr", True))
            for module, name, changing in FOREIGN:
                stack.enter_context(self._wrap_foreign(module, name, changing))
            yield self

    @contextlib.contextmanager
    def _wrap(self, module: ModuleType, name: str, changing: bool | None) -> Iterator[None]:
        real = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            alters = bool(arguments[1] & _CREATES) if changing is None else changing
            if self.fails(name, alters):
                raise OSError(self.number, os.strerror(self.number))
            return real(*arguments, **named)

        with replaced(module, name, call):
            yield

    @contextlib.contextmanager
    def _wrap_foreign(self, module: ModuleType, name: str, changing: bool) -> Iterator[None]:
        real = getattr(module, name)

        def call(*arguments: Any) -> int:
            if self.fails(name, changing):
                ctypes.set_errno(self.number)
                return -1
            result: int = real(*arguments)
            return result

        with replaced(module, name, call):
            yield


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
