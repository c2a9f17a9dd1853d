"""Reading a layer's archive: each entry with its path made safe, its times exact, its xattrs as bytes.

tarfile parses headers of every format; here is what it leaves to others. Source: tar(5), the OCI image
specification's layer.md, and the PAX keys SCHILY.xattr (star(5)) and LIBARCHIVE.xattr (libarchive).
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import IO, Final, cast

from overlayfs_py.images.model import ImageError
from overlayfs_py.images.streams import TarSource

_SCHILY: Final = "SCHILY.xattr."
_LIBARCHIVE: Final = "LIBARCHIVE.xattr."
_NANOSECONDS: Final = 1_000_000_000
_ID_MAX: Final = (1 << 32) - 2
_MAJOR_MAX: Final = (1 << 12) - 1
_MINOR_MAX: Final = (1 << 20) - 1
_TIME_LIMIT: Final = 1 << 62  # nanoseconds; the filesystem clamps what it can't hold
_TIME_DIGITS: Final = 15
_FORMATS: Final[Mapping[bytes, int]] = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


@dataclass(slots=True)
class Attributes:
    """Owner, permission bits, times (nanoseconds since the epoch) and xattrs of one object."""

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(slots=True)
class Entry:
    """One entry: what it is (`format`, S_IFMT, or 0 for a hard link), where, and what it holds.

    `path` is relative, without `.` or empty parts; the root is b"". `target` is a symbolic link's, or the path a hard
    link is to. `segments` are the (offset, length) of a regular file's data, in bytes, as it comes in the archive.
    """

    path: bytes
    format: int
    attributes: Attributes
    target: bytes
    size: int
    rdev: int
    segments: tuple[tuple[int, int], ...]


def entries(source: TarSource) -> Iterator[Entry]:
    """All entries of an archive; the data of each may be read from `source` before going on to the next.

    Raises ImageError for what is no archive, ends early or holds a name or number that can't be.
    """
    try:
        # The first header is read here.
        tar = tarfile.TarFile(fileobj=cast(IO[bytes], source), mode="r", encoding="utf-8", errors="surrogateescape")
        info = tar.next()
    except tarfile.ReadError as error:
        if source.tell() == 0:
            # Not one byte: the archive of a layer without changes may be that.
            return
        raise ImageError(f"not a tar archive: {error}") from error
    except tarfile.TarError as error:
        raise ImageError(f"not a tar archive: {error}") from error
    while info is not None:
        yield _entry(info)
        if tar.offset < source.tell() or not source.skip_to(tar.offset):
            raise ImageError(f"the archive ends within {shown(_encoded(info.name))}")
        info = _next(tar)


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.fromtarfile(tar)
    except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
        # two blocks of zeros, or nothing: the end
        return None
    except tarfile.TarError as error:
        raise ImageError(f"the archive is damaged at byte {tar.offset}: {error}") from error


def _entry(info: tarfile.TarInfo) -> Entry:
    path = clean_path(_encoded(info.name))
    if info.type == tarfile.LNKTYPE:
        form = 0
        target = clean_path(_encoded(info.linkname))
    else:
        form = _FORMATS.get(info.type, -1)
        if form < 0:
            raise ImageError(f"{shown(path)} is of a type that is not known: {info.type!r}")
        target = _encoded(info.linkname) if form == stat.S_IFLNK else b""
    segments: tuple[tuple[int, int], ...] = ()
    if form == stat.S_IFREG and info.size:
        if info.size < 0:
            raise ImageError(f"{shown(path)} has a size of {info.size} bytes")
        segments = _segments(info, path)
    rdev = _device(info, path) if form in (stat.S_IFCHR, stat.S_IFBLK) else 0
    return Entry(path, form, _attributes(info, path), target, info.size, rdev, segments)


def _device(info: tarfile.TarInfo, path: bytes) -> int:
    if not (0 <= info.devmajor <= _MAJOR_MAX and 0 <= info.devminor <= _MINOR_MAX):
        raise ImageError(f"{shown(path)} is the device {info.devmajor}:{info.devminor}, which can't be")
    return os.makedev(info.devmajor, info.devminor)


def _segments(info: tarfile.TarInfo, path: bytes) -> tuple[tuple[int, int], ...]:
    segments = cast("list[tuple[int, int]] | None", info.sparse)
    if segments is None:
        return ((0, info.size),)
    at = 0
    # The old format pads its map with zeros.
    segments = [segment for segment in segments if segment[1]]
    for offset, length in segments:
        if offset < at or length < 0 or offset + length > info.size:
            raise ImageError(f"{shown(path)} has a map of its data that makes no sense")
        at = offset + length
    return tuple(segments)


def clean_path(name: bytes) -> bytes:
    """A name of an archive as a path below the root: without leading slashes, `.` and empty parts.

    Raises ImageError where it leads out, or can't be a name.
    """
    if b"\0" in name:
        raise ImageError(f"{shown(name)} is no name: it holds a NUL byte")
    if name.startswith(b"./"):
        name = name[2:]
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ImageError(f"{shown(name)} leads out of the layer")
    return b"/".join(parts)


def _attributes(info: tarfile.TarInfo, path: bytes) -> Attributes:
    for owner in (info.uid, info.gid):
        if not 0 <= owner <= _ID_MAX:
            raise ImageError(f"{shown(path)} has the owner {info.uid}:{info.gid}, which can't be")
    headers = info.pax_headers
    if not headers:
        mtime = _in_range(int(info.mtime) * _NANOSECONDS)
        return Attributes(info.mode & 0o7777, info.uid, info.gid, mtime, mtime)
    # tarfile's own number is a float where a PAX header has one.
    mtime = _time(headers["mtime"], path) if "mtime" in headers else _in_range(int(info.mtime) * _NANOSECONDS)
    atime = _time(headers["atime"], path) if "atime" in headers else mtime
    return Attributes(info.mode & 0o7777, info.uid, info.gid, atime, mtime, _xattrs(headers, path))


def _time(text: str, path: bytes) -> int:
    try:
        seconds = Decimal(text)
    except InvalidOperation:
        seconds = Decimal("NaN")
    if not seconds.is_finite() or seconds.adjusted() > _TIME_DIGITS:
        raise ImageError(f"{shown(path)} has a time that is none: {text[:40]!r}")
    return _in_range(int((seconds * _NANOSECONDS).to_integral_value(rounding="ROUND_FLOOR")))


def _in_range(nanoseconds: int) -> int:
    return max(-_TIME_LIMIT, min(_TIME_LIMIT, nanoseconds))


def _xattrs(headers: Mapping[str, str], path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    found: dict[bytes, bytes] = {}
    for key, value in headers.items():
        if key.startswith(_SCHILY):
            found[_encoded(key[len(_SCHILY) :])] = _encoded(value)
        elif key.startswith(_LIBARCHIVE):
            name = _encoded(key[len(_LIBARCHIVE) :])
            try:
                found.setdefault(name, base64.b64decode(value + "=" * (-len(value) % 4)))
            except binascii.Error as error:
                raise ImageError(f"{shown(path)} has an xattr that is damaged: {shown(name)}") from error
    for name in found:
        if not name or b"\0" in name:
            raise ImageError(f"{shown(path)} has an xattr without a name")
    return tuple(sorted(found.items()))


def _encoded(text: str) -> bytes:
    """The bytes that tarfile has decoded, whatever the locale."""
    return text.encode("utf-8", "surrogateescape")


def shown(name: bytes) -> str:
    """A name for a message: one line whatever it holds, and not too long."""
    text = repr(name.decode(errors="surrogateescape"))[1:-1]
    return text if len(text) <= 120 else f"{text[:117]}..."
