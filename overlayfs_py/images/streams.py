"""Layer archives as streams of bytes: decompressed, hashed, and a little ahead of who reads them."""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Literal, Protocol

import zstandard

from overlayfs_py.images.model import ImageError

Compression = Literal["", "gzip", "zstd"]

CHUNK: Final = 1 << 20
"""Bytes that are read, decompressed or hashed at once."""

_AHEAD = 8
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_MAGIC_SIZE: Final = 4
_GZIP_WINDOW: Final = 31
_ZSTD_PIECE: Final = 4 << 10
# The largest piece a reader may ask for whole: headers need a few kilobytes, and an archive may claim any size.
_MOST_AT_ONCE: Final = 16 << 20

Readable = Callable[[int], bytes]


class Source(Protocol):
    """What has a stream of bytes."""

    def read(self, size: int, /) -> bytes: ...


def compression_of(head: bytes) -> Compression:
    """How a blob that begins with these bytes (4 are enough) is compressed."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head.startswith(_ZSTD_MAGIC):
        return "zstd"
    return ""


def decompressed(read: Readable) -> Iterator[bytes]:
    """The chunks of a stream, decompressed by what its first bytes say; several members in a row are one stream.

    Raises ImageError for data that is damaged or ends early.
    """
    head = read(CHUNK)
    while 0 < len(head) < _MAGIC_SIZE:
        more = read(CHUNK)
        if not more:
            break
        head += more
    kind = compression_of(head)
    members = {"": _plain, "gzip": _gunzipped, "zstd": _unzstd}[kind]
    try:
        yield from members(head, read)
    except (zlib.error, zstandard.ZstdError) as error:
        raise ImageError(f"the {kind} stream is damaged") from error


def _plain(data: bytes, read: Readable) -> Iterator[bytes]:
    while data:
        yield data
        data = read(CHUNK)


def _gunzipped(data: bytes, read: Readable) -> Iterator[bytes]:
    while data:
        member = zlib.decompressobj(wbits=_GZIP_WINDOW)
        while not member.eof:
            if not data:
                raise ImageError("the gzip stream ends too early")
            out = member.decompress(data, CHUNK)
            data = member.unused_data if member.eof else member.unconsumed_tail
            if out:
                yield out
            if not data:
                data = read(CHUNK)
        data = _next_member(data, read)


def _unzstd(data: bytes, read: Readable) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor()
    while data:
        frame = decompressor.decompressobj()
        while not frame.eof:
            if not data:
                raise ImageError("the zstd stream ends too early")
            # There is no bound on what comes out but by what goes in.
            out = frame.decompress(data[:_ZSTD_PIECE])
            data = frame.unused_data + data[_ZSTD_PIECE:]
            if out:
                yield out
            if not data:
                data = read(CHUNK)
        data = _next_member(data, read)


def _next_member(data: bytes, read: Readable) -> bytes:
    """What follows a member; zeros, to which tar pads what it writes, are not the beginning of one."""
    while not data.lstrip(b"\0"):
        data = read(CHUNK)
        if not data:
            break
    return data.lstrip(b"\0")


class TarSource:
    """An uncompressed archive read once from its start, as tarfile wants a file to be, with the digest of all of it.

    A thread decompresses and hashes ahead; neither needs the interpreter's lock. To be closed, or used with `with`.
    """

    __slots__ = ("_at", "_buffer", "_chunks", "_failure", "_hash", "_position", "_stop", "_thread")

    def __init__(self, file: Source) -> None:
        self._hash = hashlib.sha256()
        self._chunks: queue.Queue[bytes] = queue.Queue(_AHEAD)
        self._failure: Exception | None = None
        self._stop = False
        self._buffer = b""
        self._at = 0
        self._position = 0
        self._thread = threading.Thread(target=self._run, args=(file.read,), daemon=True)
        self._thread.start()

    def _run(self, read: Readable) -> None:
        try:
            for chunk in decompressed(read):
                self._hash.update(chunk)
                self._chunks.put(chunk)
                if self._stop:
                    return
        except (ImageError, OSError) as error:
            self._failure = error
        self._chunks.put(b"")

    def _fill(self) -> bool:
        """Get the next chunk into the buffer, which is used up; False at the end."""
        chunk = self._chunks.get()
        if not chunk:
            # The end stays there for whoever asks again.
            self._chunks.put(b"")
            if self._failure is not None:
                raise self._failure
            return False
        self._buffer = chunk
        self._at = 0
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end only."""
        if size < 0 or size > _MOST_AT_ONCE:
            raise ImageError(f"the archive has a header of {size} bytes")
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            self._position += size
            return data
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces as they come; fewer at the end."""
        while size > 0:
            if self._at == len(self._buffer) and not self._fill():
                return
            piece = self._buffer[self._at : self._at + size]
            self._at += len(piece)
            self._position += len(piece)
            size -= len(piece)
            yield piece

    def skip_to(self, position: int) -> bool:
        """Go forward to a position; False where the archive ends before it."""
        for _ in self.pieces(position - self._position):
            pass
        return self._position == position

    def finish(self) -> str:
        """Read what is left; the digest of the whole archive."""
        while self._fill():
            self._position += len(self._buffer)
        self._thread.join()
        return f"sha256:{self._hash.hexdigest()}"

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._stop = True
        while self._thread.is_alive():
            try:
                self._chunks.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> TarSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
