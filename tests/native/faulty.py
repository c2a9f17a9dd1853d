"""A filesystem in which some names can't be looked up: `python -m tests.native.faulty DIRECTORY SWITCH`.

While the file SWITCH is there, they are listed but answer EIO. A listing tells no type of those in ODD.
"""

import errno
import os
import stat
import sys
from collections.abc import Sequence
from typing import Final

import pyfuse3

from tests.native.other import serve

GOOD: Final = tuple(b"good-%02d" % number for number in range(30))
ODD: Final = (b"odd",)
BAD: Final = (b"bad", *ODD)
NAMES: Final = tuple(sorted((*GOOD, *BAD)))
_FIRST: Final = 2  # the number of the first name


class Faulty(pyfuse3.Operations):
    """The root and files in it, numbered from 2 on."""

    def __init__(self, switch: str) -> None:
        super().__init__()
        self.switch = switch

    def entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o644 if inode >= _FIRST else stat.S_IFDIR | 0o755
        entry.st_nlink = 1
        # The kernel is to ask each time.
        entry.entry_timeout = entry.attr_timeout = 0.0
        return entry

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        if inode >= _FIRST and NAMES[inode - _FIRST] in BAD and os.path.exists(self.switch):
            raise pyfuse3.FUSEError(errno.EIO)
        return self.entry(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(NAMES.index(name) + _FIRST)

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for number in range(start_id, len(NAMES)):
            entry = self.entry(number + _FIRST)
            if NAMES[number] in ODD:
                entry.st_mode = 0
            if not pyfuse3.readdir_reply(token, NAMES[number], entry, number + 1):
                return


def main(arguments: Sequence[str]) -> None:
    directory, switch = arguments
    serve(Faulty(switch), directory, "faulty")


if __name__ == "__main__":
    main(sys.argv[1:])
