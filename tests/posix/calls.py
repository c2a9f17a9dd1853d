"""System calls that the standard library lacks or blurs; each raises OSError with the kernel's errno."""

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_SYMLINK_FOLLOW: Final = 0x400
AT_EACCESS: Final = 0x200
AT_EMPTY_PATH: Final = 0x1000
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
FALLOC_FL_COLLAPSE_RANGE: Final = 8
FALLOC_FL_ZERO_RANGE: Final = 16
FALLOC_FL_INSERT_RANGE: Final = 32
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4
XATTR_CREATE: Final = 1
XATTR_REPLACE: Final = 2
SYS_FACCESSAT2: Final = 439
IN_ACCESS: Final = 0x1
IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4
IN_CLOSE_WRITE: Final = 0x8
IN_OPEN: Final = 0x20
IN_MOVED_FROM: Final = 0x40
IN_MOVED_TO: Final = 0x80
IN_CREATE: Final = 0x100
IN_DELETE: Final = 0x200
IN_DELETE_SELF: Final = 0x400
IN_MOVE_SELF: Final = 0x800
IN_NONBLOCK: Final = os.O_NONBLOCK

BAD_ADDRESS: Final = ctypes.c_void_p(1)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.restype = ctypes.c_void_p
_libc.telldir.restype = ctypes.c_long


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


def call(name: str, *arguments: object) -> int:
    """A function of the C library by name; -1 raises OSError."""
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def access(path: str, mode: int, flags: int = 0) -> None:
    """faccessat2(2), which tells why, unlike `os.access`."""
    call("syscall", ctypes.c_long(SYS_FACCESSAT2), AT_FDCWD, os.fsencode(path), mode, flags)


def utimensat(path: str, times: tuple[tuple[int, int], tuple[int, int]] | None, flags: int = 0) -> None:
    """utimensat(2) with (seconds, nanoseconds) of atime and mtime, where UTIME_NOW and UTIME_OMIT may stand."""
    pair = None if times is None else (_Timespec * 2)(*(_Timespec(*one) for one in times))
    call("utimensat", AT_FDCWD, os.fsencode(path), pair, flags)


def futimens(descriptor: int, times: tuple[tuple[int, int], tuple[int, int]] | None) -> None:
    """futimens(3), see `utimensat`."""
    pair = None if times is None else (_Timespec * 2)(*(_Timespec(*one) for one in times))
    call("futimens", descriptor, pair)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    call("fallocate", descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length))


def renameat2(old: str, new: str, flags: int) -> None:
    """renameat2(2)."""
    call("renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags))


def link_following(old: str, new: str) -> None:
    """linkat(2) with AT_SYMLINK_FOLLOW, which `os.link` does not pass on Python 3.11."""
    call("linkat", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW)


def link_descriptor(descriptor: int, new: str) -> None:
    """linkat(2) with AT_EMPTY_PATH: give an open file a name."""
    call("linkat", descriptor, b"", AT_FDCWD, os.fsencode(new), AT_EMPTY_PATH)


def syncfs(descriptor: int) -> None:
    """syncfs(2)."""
    call("syncfs", descriptor)


class Entry(NamedTuple):
    """What readdir(3) says of one name."""

    ino: int
    offset: int
    kind: int
    name: bytes


class Directory:
    """A directory stream of the C library, with the positions that Python's own hide."""

    def __init__(self, path: str) -> None:
        self._stream = ctypes.c_void_p(_libc.opendir(os.fsencode(path)))
        if not self._stream:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, *_: object) -> None:
        call("closedir", self._stream)

    def read(self) -> Entry | None:
        """readdir(3): the next entry, None at the end."""
        ctypes.set_errno(0)
        address = _libc.readdir(self._stream)
        if not address:
            if number := ctypes.get_errno():
                raise OSError(number, os.strerror(number))
            return None
        ino, offset, length, kind = struct.unpack("=QqHB", ctypes.string_at(address, 19))
        name = ctypes.string_at(address + 19, length - 19).partition(b"\0")[0]
        return Entry(ino, offset, kind, name)

    def tell(self) -> int:
        """telldir(3)."""
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        """seekdir(3)."""
        _libc.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        """rewinddir(3)."""
        _libc.rewinddir(self._stream)

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self.read()) is not None:
            yield entry


class Event(NamedTuple):
    """One inotify event."""

    mask: int
    cookie: int
    name: bytes


class Watch:
    """An inotify(7) instance with one watch."""

    def __init__(self, path: str, mask: int) -> None:
        self._descriptor = call("inotify_init1", IN_NONBLOCK)
        call("inotify_add_watch", self._descriptor, os.fsencode(path), ctypes.c_uint32(mask))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def events(self) -> list[Event]:
        """The events so far."""
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return []
        found = []
        while data:
            _, mask, cookie, length = struct.unpack_from("=iIII", data)
            found.append(Event(mask, cookie, data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
        return found
