"""The flags of files and directories that chattr(1) shows and sets. Source: ioctl_iflags(2)."""

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_IOC_FSSETXATTR: Final = 0x401C5820

SYNC: Final = 0x08
IMMUTABLE: Final = 0x10
APPEND: Final = 0x20
NODUMP: Final = 0x40
NOATIME: Final = 0x80
NOCOW: Final = 0x800000


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4)))[0])
    finally:
        os.close(fd)


def set_flags(path: Path, value: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("i", value))
    finally:
        os.close(fd)


def change_flags(path: Path, *, add: int = 0, take: int = 0) -> None:
    set_flags(path, flags_of(path) & ~take | add)
