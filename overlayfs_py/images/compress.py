"""Compressing layers, so that equal content gives equal bytes: no name and no time in the header."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import IO, Final, Protocol

import zstandard

from overlayfs_py.images.manifest import OCI_LAYER, Descriptor
from overlayfs_py.images.streams import CHUNK, Compression, decompressed

_GZIP_LEVEL: Final = 6
_GZIP_WINDOW: Final = 31
_ZSTD_LEVEL: Final = 3
SUFFIX: Final[dict[Compression, str]] = {"": "", "gzip": "+gzip", "zstd": "+zstd"}


class Compressor(Protocol):
    """What zlib and zstandard both have."""

    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def compressor(kind: Compression) -> Compressor:
    """What compresses one stream."""
    if kind == "gzip":
        return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    if kind == "zstd":
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    return _Plain()


class Output:
    """A file written compressed, with the digests of what went in and of what came out, and the size of that."""

    __slots__ = ("_compressor", "_file", "_in", "_out", "size")

    def __init__(self, file: IO[bytes], kind: Compression) -> None:
        self._file = file
        self._compressor = compressor(kind)
        self._in = hashlib.sha256()
        self._out = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._in.update(data)
        self._put(self._compressor.compress(data))
        return len(data)

    def _put(self, data: bytes) -> None:
        self._out.update(data)
        self._file.write(data)
        self.size += len(data)

    def finish(self) -> tuple[str, str]:
        """The digest of what was written, and that of the file."""
        self._put(self._compressor.flush())
        self._file.flush()
        return f"sha256:{self._in.hexdigest()}", f"sha256:{self._out.hexdigest()}"


def recompress(source: Path, target: Path, kind: Compression) -> tuple[str, Descriptor]:
    """Write a blob compressed otherwise; its diff ID and the new blob's descriptor."""
    with open(source, "rb") as blob, open(target, "xb") as file:
        output = Output(file, kind)
        for chunk in decompressed(blob.read):
            output.write(chunk)
        diff_id, digest = output.finish()
    return diff_id, Descriptor(OCI_LAYER + SUFFIX[kind], digest, output.size)


def copy_hashed(source: IO[bytes], target: Path) -> tuple[str, int]:
    """Copy a stream to a new file; its digest and size."""
    with open(target, "xb") as file:
        output = Output(file, "")
        while chunk := source.read(CHUNK):
            output.write(chunk)
        return output.finish()[1], output.size
