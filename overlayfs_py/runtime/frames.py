"""What a client and a monitor say to each other over a container's socket: frames of a kind and some bytes.

A frame is one byte for the kind, the length of the rest as four bytes with the highest first, and the rest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, Final

# From clients.
HELLO: Final = b"h"
"""JSON: whether the client wants the `output`, and feeds the `stdin`."""
STDIN: Final = b"i"
END_OF_STDIN: Final = b"e"
WINDOW: Final = b"w"
"""The terminal's rows and columns, two bytes each."""

# From the monitor.
STDOUT: Final = b"o"
STDERR: Final = b"r"
ENDED: Final = b"x"
"""JSON: the exit `code`; all is cleaned up."""

WINDOW_SIZE: Final = struct.Struct("!HH")
_HEADER = struct.Struct("!cI")
_LONGEST = 1 << 20


class BadFrame(Exception):
    """The other side doesn't speak this protocol."""


def frame(kind: bytes, data: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(data)) + data


def json_frame(kind: bytes, data: dict[str, Any]) -> bytes:
    return frame(kind, json.dumps(data).encode())


class Reader:
    """Puts frames together from the pieces they come in."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The frames that are whole with these further bytes. Raises BadFrame."""
        self._pending += data
        while len(self._pending) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._pending)
            if length > _LONGEST:
                raise BadFrame
            end = _HEADER.size + length
            if len(self._pending) < end:
                return
            content = bytes(self._pending[_HEADER.size : end])
            del self._pending[:end]
            yield kind, content
