"""A filesystem of large files whose data comes slowly: `python -m tests.native.trickle DIRECTORY`.

Below another filesystem it makes the copying of each of them take as long as a test may need.
"""

import errno
import stat
import sys
from collections.abc import Sequence
from typing import Final

import pyfuse3
import trio

from tests.native.other import serve

SIZE: Final = 16 << 30
NAME: Final = b"large"
NAMES: Final = (NAME, *(b"large%d" % number for number in range(100)))
_FIRST: Final = 2  # the inode of the first of them, which the others follow
_PAUSE: Final = 0.02  # seconds before each piece, of 128 KiB at most


class Trickle(pyfuse3.Operations):
    """The root and the files."""

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        file = inode >= _FIRST
        entry.st_mode = stat.S_IFREG | 0o644 if file else stat.S_IFDIR | 0o755
        entry.st_nlink = 1 if file else 2
        entry.st_size = SIZE if file else 0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_FIRST + NAMES.index(name))

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for position, name in enumerate(NAMES[start_id:], start_id):
            if not pyfuse3.readdir_reply(token, name, await self.getattr(_FIRST + position), position + 1):
                break

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await trio.sleep(_PAUSE)
        return b"x" * max(0, min(size, SIZE - off))


def main(arguments: Sequence[str]) -> None:
    serve(Trickle(), arguments[0], "trickle")


if __name__ == "__main__":
    main(sys.argv[1:])
