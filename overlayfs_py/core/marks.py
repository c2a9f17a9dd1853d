"""The overlay's marks on disk: whiteouts, opaque directories, redirects, and which xattrs are ours.

The format is the kernel's (Documentation/filesystems/overlayfs.rst, fs/overlayfs/overlayfs.h). Understood when reading,
besides: the AUFS-style `.wh.NAME` and `.wh..wh..opq` of OCI layers, and fuse-overlayfs's `user.fuseoverlayfs.opaque`.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from overlayfs_py.records import NamedTuple
from overlayfs_py.sys import xattrs

DOT_WHITEOUT = b".wh."
DOT_META = b".wh..wh."
DOT_OPAQUE = b".wh..wh..opq"
FOREIGN_PREFIX = b"user.fuseoverlayfs."
FOREIGN_OPAQUE = b"user.fuseoverlayfs.opaque"
# Between the prefix of a mark and its name: what a mount has been asked to store, for an overlay on top of it.
_ESCAPE = b"overlay."
WHITEOUT_DEVICE = os.makedev(0, 0)

# struct ovl_fb: version 0, magic, length in all, flags, handle type, uuid of the filesystem, handle.
_HANDLE = struct.Struct("<BBBBB16s")
_HANDLE_MAGIC = 0xFB
_HANDLE_ANY_ENDIAN_FLAGS = 0b11
# struct ovl_metacopy: version, length, flags, digest algorithm.
_METACOPY_MINIMUM = 4


class DirMarks(NamedTuple):
    """What the xattrs of a directory in a layer say."""

    opaque: bool
    redirect: bytes | None
    xattr_whiteouts: bool
    origin: bytes | None


class FileMarks(NamedTuple):
    """What the xattrs of anything but a directory say."""

    metacopy: bool
    redirect: bytes | None
    origin: bytes | None
    nlink: bytes | None


NO_DIR_MARKS = DirMarks(False, None, False, None)
NO_FILE_MARKS = FileMarks(False, None, None, None)


def is_whiteout(st: os.stat_result) -> bool:
    """Whether this is a whiteout device: a character device 0/0."""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == WHITEOUT_DEVICE


def is_dot_name(name: bytes) -> bool:
    """Whether a layer's entry of this name may be an AUFS-style mark."""
    return name.startswith(DOT_WHITEOUT)


class Marks:
    """The xattr names of one mount: `trusted.overlay.*`, or `user.overlay.*` where the mount has no privilege."""

    __slots__ = (
        "_prefixes",
        "impure",
        "literal",
        "metacopy",
        "nlink",
        "opaque",
        "origin",
        "prefix",
        "protattr",
        "redirect",
        "upper",
        "whiteout",
    )

    def __init__(self, *, user: bool) -> None:
        self.prefix = b"user.overlay." if user else b"trusted.overlay."
        self._prefixes = (self.prefix, FOREIGN_PREFIX)
        self.opaque = self.prefix + b"opaque"
        self.redirect = self.prefix + b"redirect"
        self.origin = self.prefix + b"origin"
        self.impure = self.prefix + b"impure"
        self.nlink = self.prefix + b"nlink"
        self.upper = self.prefix + b"upper"
        self.metacopy = self.prefix + b"metacopy"
        self.whiteout = self.prefix + b"whiteout"
        self.protattr = self.prefix + b"protattr"
        # Says that a file whose name looks like an AUFS-style mark is none; no other overlay knows it, all hide it.
        self.literal = self.prefix + b"literal"

    def hidden(self, key: bytes) -> bool:
        """Whether an xattr of a layer is not shown: it is a mark, not one escaped for a nested overlay."""
        return any(key.startswith(prefix) and not key.startswith(prefix + _ESCAPE) for prefix in self._prefixes)

    def to_disk(self, key: bytes) -> bytes:
        """The name in the layer of an xattr the mount shows: marks are escaped, so that overlays nest."""
        for prefix in self._prefixes:
            if key.startswith(prefix):
                return prefix + _ESCAPE + key[len(prefix) :]
        return key

    def to_shown(self, key: bytes) -> bytes:
        for prefix in self._prefixes:
            if key.startswith(prefix + _ESCAPE):
                return prefix + key[len(prefix) + len(_ESCAPE) :]
        return key

    def read_dir(self, fd: int) -> DirMarks:
        """The marks of the directory open at `fd` (O_PATH serves)."""
        keys = _list(fd)
        if not keys:
            return NO_DIR_MARKS
        opaque = xattrs.fget(fd, self.opaque) if self.opaque in keys else b""
        foreign = xattrs.fget(fd, FOREIGN_OPAQUE) if FOREIGN_OPAQUE in keys else b""
        redirect = xattrs.fget(fd, self.redirect) if self.redirect in keys else None
        origin = xattrs.fget(fd, self.origin) if self.origin in keys else None
        return DirMarks(opaque == b"y" or foreign == b"y", redirect, opaque == b"x", origin)

    def read_file(self, dir_fd: int, name: bytes) -> FileMarks:
        """The marks of `name` in the directory open at `dir_fd`, which is no directory itself."""
        try:
            keys = xattrs.list(dir_fd, name)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # a filesystem without xattrs has no marks
            return NO_FILE_MARKS
        if not keys:
            return NO_FILE_MARKS
        return FileMarks(
            self.metacopy in keys,
            xattrs.get(dir_fd, name, self.redirect) if self.redirect in keys else None,
            xattrs.get(dir_fd, name, self.origin) if self.origin in keys else None,
            xattrs.get(dir_fd, name, self.nlink) if self.nlink in keys else None,
        )

    def is_literal(self, dir_fd: int, name: bytes) -> bool:
        """Whether the file at a name that looks like an AUFS-style mark was made through a mount of ours."""
        return self._has(dir_fd, name, self.literal)

    def is_xattr_whiteout(self, dir_fd: int, name: bytes) -> bool:
        """Whether an empty file is a whiteout (kernel 6.7); a directory that lists such is marked opaque=x."""
        return self._has(dir_fd, name, self.whiteout)

    def _has(self, dir_fd: int, name: bytes, key: bytes) -> bool:
        try:
            xattrs.get(dir_fd, name, key)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            # no such xattr, or a layer that can't hold any: no mark
            return False
        return True


def _list(fd: int) -> list[bytes]:
    try:
        return xattrs.flist(fd)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # a filesystem without xattrs has no marks
        return []


def pack_handle(kind: int, handle: bytes, uuid: bytes) -> bytes:
    """A file handle as the `origin` xattr holds it (struct ovl_fb): 21 bytes of head, then the handle.

    Handles are in this machine's byte order, which the kernel notes in the flags; ours is little-endian or says so.
    """
    flags = 0 if struct.pack("=H", 1) == b"\x01\x00" else 1
    return _HANDLE.pack(0, _HANDLE_MAGIC, _HANDLE.size + len(handle), flags, kind, uuid) + handle


def unpack_handle(data: bytes) -> tuple[int, bytes, bytes] | None:
    """(type, handle, uuid) of an `origin` xattr, or None where it is empty, damaged or another machine's."""
    if len(data) <= _HANDLE.size:
        return None
    version, magic, length, flags, kind, uuid = _HANDLE.unpack_from(data)
    if version != 0 or magic != _HANDLE_MAGIC or length != len(data) or flags & ~_HANDLE_ANY_ENDIAN_FLAGS:
        return None
    return kind, data[_HANDLE.size :], uuid
