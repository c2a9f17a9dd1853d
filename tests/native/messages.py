"""A small stack of layers, and a valid request of every opcode about it: where broken requests start from."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.native import wire
from tests.native.wire import Wire

LOWER_DATA: Final = b"of the lower layer"
UPPER_DATA: Final = b"of the upper layer"


def lay_out(base: Path) -> None:
    """Make the directories `lower`, `upper` and `work`: files, a link, a directory in both, a FIFO and a device."""
    for name in ("lower", "upper", "work", "lower/d", "upper/d"):
        (base / name).mkdir()
    (base / "lower" / "f").write_bytes(LOWER_DATA)
    (base / "lower" / "d" / "below").write_bytes(b"below")
    (base / "lower" / "l").symlink_to("d/below")
    (base / "upper" / "u").write_bytes(UPPER_DATA)
    (base / "upper" / "d" / "above").write_bytes(b"above")
    os.setxattr(base / "upper" / "u", "user.key", b"value")
    os.mkfifo(base / "upper" / "p")
    os.mknod(base / "upper" / "c", 0o020600, os.makedev(1, 3))


@dataclass(frozen=True, slots=True)
class Message:
    """A request without its header."""

    opcode: int
    node: int
    body: bytes


def valid(client: Wire) -> list[Message]:
    """A request of each opcode that is right for the layers of `lay_out`."""
    f, u, d, link = (client.look_up(name) for name in (b"f", b"u", b"d", b"l"))
    pack = struct.pack
    copy = pack("=QQQQQQQ", 0, 0, f, 0, 0, 10, 0)
    return [
        Message(wire.LOOKUP, 1, b"f\0"),
        # As for a file handle: a node, and what it is in.
        Message(wire.LOOKUP, u, b".\0"),
        Message(wire.LOOKUP, d, b"..\0"),
        Message(wire.FORGET, f, pack("=Q", 0)),
        Message(wire.GETATTR, f, pack("=IIQ", 0, 0, 0)),
        Message(wire.SETATTR, f, setattr_body(valid=1, mode=0o640)),
        Message(wire.READLINK, link, b""),
        Message(wire.SYMLINK, 1, b"s\0some/where\0"),
        Message(wire.MKNOD, 1, pack("=IIII", 0o100644, 0, 0o022, 0) + b"n\0"),
        Message(wire.MKDIR, 1, pack("=II", 0o755, 0o022) + b"m\0"),
        Message(wire.UNLINK, d, b"above\0"),
        Message(wire.RMDIR, 1, b"m\0"),
        Message(wire.RENAME, 1, pack("=Q", d) + b"n\0r\0"),
        Message(wire.LINK, 1, pack("=Q", u) + b"h\0"),
        Message(wire.OPEN, f, pack("=II", 0, 0)),
        Message(wire.CREATE, 1, pack("=IIII", 0o102, 0o100644, 0o022, 0) + b"o\0"),
        Message(wire.READ, f, pack("=QQIIQII", 0, 0, 100, 0, 0, 0, 0)),
        Message(wire.WRITE, u, pack("=QQIIQII", 0, 0, 5, 0, 0, 0, 0) + b"01234"),
        Message(wire.STATFS, 1, b""),
        Message(wire.RELEASE, u, pack("=QIIQ", 0, 0, 0, 0)),
        Message(wire.FSYNC, u, pack("=QII", 0, 1, 0)),
        Message(wire.SETXATTR, u, pack("=IIII", 5, 0, 0, 0) + b"user.new\0" + b"value"),
        Message(wire.GETXATTR, u, pack("=II", 100, 0) + b"user.key\0"),
        Message(wire.LISTXATTR, u, pack("=II", 100, 0)),
        Message(wire.REMOVEXATTR, u, b"user.new\0"),
        Message(wire.INIT, 0, wire.init_body()),
        Message(wire.OPENDIR, d, pack("=II", 0o200000, 0)),
        Message(wire.READDIR, 1, pack("=QQIIQII", 0, 0, 4096, 0, 0, 0, 0)),
        Message(wire.RELEASEDIR, d, pack("=QIIQ", 0, 0, 0, 0)),
        Message(wire.FSYNCDIR, d, pack("=QII", 0, 0, 0)),
        Message(wire.INTERRUPT, 0, pack("=Q", 2)),
        Message(wire.DESTROY, 0, b""),
        Message(wire.IOCTL, f, pack("=QIIQII", 0, 0, 0x5401, 0, 0, 0)),
        # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS
        Message(wire.IOCTL, f, pack("=QIIQII", 0, 0, 0x80086601, 0, 0, 8)),
        Message(wire.IOCTL, u, pack("=QIIQII", 0, 0, 0x40086602, 0, 8, 0) + bytes(8)),
        Message(wire.NOTIFY_REPLY, f, pack("=QQIIQQ", 0, 0, 0, 0, 0, 0)),
        Message(wire.BATCH_FORGET, 0, pack("=II", 2, 0) + pack("=QQQQ", f, 0, 999_999_999, 1)),
        Message(wire.FALLOCATE, u, pack("=QQQII", 0, 0, 100, 0, 0)),
        Message(wire.READDIRPLUS, d, pack("=QQIIQII", 0, 0, 4096, 0, 0, 0, 0)),
        Message(wire.RENAME2, 1, pack("=QII", d, 1, 0) + b"n\0r2\0"),
        Message(wire.LSEEK, f, pack("=QQII", 0, 0, 3, 0)),
        Message(wire.COPY_FILE_RANGE, u, copy),
        Message(wire.SYNCFS, 1, bytes(8)),
        Message(wire.TMPFILE, 1, pack("=IIII", 0o20200002, 0o100600, 0o022, 0) + b"t\0"),
        Message(wire.STATX, f, pack("=IIQII", 0, 0, 0, 0, 0xFFF)),
        Message(wire.COPY_FILE_RANGE_64, u, copy),
    ]


def label(key: bytes, value: bytes) -> bytes:
    """struct fuse_secctx with its key and value."""
    packed = struct.pack("=II", len(value), 0) + key + b"\0" + value
    return packed + bytes(-len(packed) % 8)


def labels(*packed: bytes) -> bytes:
    """The extension that holds some labels: struct fuse_secctx_header and what follows it."""
    together = b"".join(packed)
    return struct.pack("=II", 8 + len(together), len(packed)) + together


def setattr_body(
    *,
    valid: int,
    size: int = 0,
    atime: int = 0,
    mtime: int = 0,
    ctime: int = 0,
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
) -> bytes:
    """SETATTR's structure; times in whole seconds."""
    head = struct.pack("=IIQQQQQQ", valid, 0, 0, size, 0, atime, mtime, ctime)
    return head + struct.pack("=IIIIIIII", 0, 0, 0, mode, 0, uid, gid, 0)
