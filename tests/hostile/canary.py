"""A directory outside all layers that nobody may touch, and a witness that tells of every touch."""

import ctypes
import os
import struct
from pathlib import Path

from tests.support import trees
from tests.support.trees import Node

_ALL_EVENTS = 0xFFF
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)

CONTENT = (
    Node(b"secret", data=b"secret", mode=0o600),
    Node(b"sub/secret", data=b"secret below"),
    Node(b"etc/passwd", data=b"root"),
)


class Canary:
    """Files at `path`; inotify(7) reports whoever opens, reads, lists, changes or removes one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        trees.build(os.fsencode(path), CONTENT)
        self.tree = trees.read_tree(os.fsencode(path), 0)
        self.witness = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for folder, _, files in list(os.walk(path)):
            for name in (folder, *(os.path.join(folder, file) for file in files)):
                if _libc.inotify_add_watch(self.witness, os.fsencode(name), _ALL_EVENTS) < 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def touches(self) -> list[str]:
        """What has happened to the files since they were made, or since this was asked last."""
        found = []
        data = self._events()
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            found.append(f"event {mask:#x} {data[_EVENT.size : _EVENT.size + length].rstrip(bytes(1))!r}")
            data = data[_EVENT.size + length :]
        if trees.read_tree(os.fsencode(self.path), 0) != self.tree:
            found.append("the content has changed")
        self._events()
        return found

    def _events(self) -> bytes:
        try:
            return os.read(self.witness, 1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self.witness)
