"""A filesystem of small files whose reads take a while and are noted: `python -m tests.native.shelf DIRECTORY LOG`.

It has two directories of them. A line of the log is the name of a file that was read.
"""

import errno
import stat
import sys
from collections.abc import Sequence
from typing import Final

import pyfuse3
import trio

from tests.native.other import serve

DIRECTORIES: Final = (b"first", b"second")
COUNT: Final = 40  # files in each
_PAUSE: Final = 0.005  # seconds before each answer, far beyond what the page cache takes


def name_of(number: int) -> bytes:
    return b"%s-%02d" % (DIRECTORIES[number // COUNT], number % COUNT)


def data_of(name: bytes) -> bytes:
    return name * 100


_ROOT: Final = 1
_DIRECTORY: Final = 2  # the number of the first
_FILE: Final = 100


class Shelf(pyfuse3.Operations):
    """Directories are numbered from 2 on, files from 100."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self.log = log

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o644 if inode >= _FILE else stat.S_IFDIR | 0o755
        entry.st_nlink = 1
        entry.st_size = len(data_of(name_of(inode - _FILE))) if inode >= _FILE else 0
        entry.attr_timeout = entry.entry_timeout = 1000.0
        return entry

    def entries(self, inode: int) -> list[tuple[bytes, int]]:
        if inode == _ROOT:
            return [(name, _DIRECTORY + number) for number, name in enumerate(DIRECTORIES)]
        start = (inode - _DIRECTORY) * COUNT
        return [(name_of(number), _FILE + number) for number in range(start, start + COUNT)]

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        found = dict(self.entries(parent_inode)).get(name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(found)

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for number, (name, inode) in enumerate(self.entries(fh)):
            if number >= start_id and not pyfuse3.readdir_reply(token, name, await self.getattr(inode), number + 1):
                return

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        name = name_of(fh - _FILE)
        with open(self.log, "ab", buffering=0) as log:
            log.write(name + b"\n")
        await trio.sleep(_PAUSE)
        return data_of(name)[off : off + size]


def main(arguments: Sequence[str]) -> None:
    directory, log = arguments
    serve(Shelf(log), directory, "shelf")


if __name__ == "__main__":
    main(sys.argv[1:])
