"""The FUSE wire without a kernel: a session served over a socket, whose other end a test writes requests into.

A socket of whole messages stands for /dev/fuse: one read is one request, one write is one answer. What is sent may be
anything; what comes back is checked as the kernel checks it. Source: include/uapi/linux/fuse.h, fs/fuse/dev.c.
"""

import contextlib
import functools
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from overlayfs_py.config import MountConfig
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.engines.native.device import Channel
from overlayfs_py.engines.native.session import Session
from overlayfs_py.engines.native.uring import Loopback

LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
CREATE: Final = 35
INTERRUPT: Final = 36
DESTROY: Final = 38
IOCTL: Final = 39
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
SYNCFS: Final = 50
TMPFILE: Final = 51
STATX: Final = 52
COPY_FILE_RANGE_64: Final = 53

UNANSWERED: Final = frozenset({FORGET, INTERRUPT, NOTIFY_REPLY, BATCH_FORGET})

# Bytes of the answers that have a size of their own, where they are no error. Any other opcode answers with nothing.
SIZES: Final = {
    LOOKUP: 128,
    GETATTR: 104,
    SETATTR: 104,
    SYMLINK: 128,
    MKNOD: 128,
    MKDIR: 128,
    LINK: 128,
    OPEN: 16,
    WRITE: 8,
    STATFS: 80,
    INIT: 64,
    OPENDIR: 16,
    CREATE: 144,
    LSEEK: 8,
    COPY_FILE_RANGE: 8,
    TMPFILE: 144,
    STATX: 288,
    COPY_FILE_RANGE_64: 8,
}
# Bytes of the structure in front of a request's names, which has a place of its own in a ring. The others have none.
STRUCTURES: Final = {
    FORGET: 8,
    GETATTR: 16,
    SETATTR: 88,
    MKNOD: 16,
    MKDIR: 8,
    RENAME: 8,
    LINK: 8,
    OPEN: 8,
    READ: 40,
    WRITE: 40,
    RELEASE: 24,
    FSYNC: 16,
    SETXATTR: 16,
    GETXATTR: 8,
    LISTXATTR: 8,
    INIT: 64,
    OPENDIR: 8,
    READDIR: 40,
    RELEASEDIR: 24,
    FSYNCDIR: 16,
    CREATE: 16,
    INTERRUPT: 8,
    IOCTL: 32,
    NOTIFY_REPLY: 40,
    BATCH_FORGET: 8,
    FALLOCATE: 32,
    READDIRPLUS: 40,
    RENAME2: 16,
    LSEEK: 24,
    COPY_FILE_RANGE: 56,
    SYNCFS: 8,
    TMPFILE: 16,
    STATX: 24,
    COPY_FILE_RANGE_64: 56,
}
# Where the request says how much may come, and where in its structure.
ASKED_AT: Final = {READ: 16, READDIR: 16, READDIRPLUS: 16, GETXATTR: 0, LISTXATTR: 0}
PAGE: Final = 4096
RING_HEADER: Final = 288

PATIENCE: Final = 20.0  # seconds for an answer
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_SOCKET_BUFFER: Final = 8 << 20
_MOST_ERRNO: Final = 512  # what the kernel takes for an error number is below


class WrongAnswer(AssertionError):
    """An answer that the kernel would refuse, one that is missing, or one that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: `error` is positive, or 0; `body` is what follows the header."""

    error: int
    body: bytes

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """The fields of a body without an error, in the machine's order and without padding."""
        assert self.error == 0, f"error {self.error}"
        return struct.unpack("=" + layout, self.body)


def is_invalidation(message: bytes | memoryview) -> bool:
    """Whether it is an INVAL_INODE, on which the kernel would send what it has in mappings alone."""
    return len(message) == 40 and message[:16] == struct.pack("=IiQ", 40, 2, 0)


class Wire:
    """The kernel's end of a connection."""

    unanswered = UNANSWERED

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.unique = 0
        self.room = memoryview(bytearray(_SOCKET_BUFFER))

    def send(self, message: bytes) -> None:
        """Send any bytes at all, as one message."""
        self.end.send(message)

    def receive(self, limit: float = PATIENCE) -> bytes:
        """The next message but INVAL_INODE; raises WrongAnswer where none comes within `limit` seconds."""
        self.end.settimeout(limit)
        while True:
            try:
                count = self.end.recv_into(self.room)
            except TimeoutError:
                raise WrongAnswer(f"no answer within {limit} s") from None
            if not is_invalidation(self.room[:count]):
                return bytes(self.room[:count])

    def pack(
        self,
        opcode: int,
        node: int,
        body: bytes,
        *,
        uid: int = 0,
        gid: int = 0,
        extensions: bytes = b"",
        length: int | None = None,
        units: int | None = None,
    ) -> bytes:
        """A request with the next number; `length` and `units` (of extensions, 8 bytes each) may be lies."""
        self.unique += 2
        total = 40 + len(body) + len(extensions)
        header = struct.pack(
            "=IIQQIIIHH",
            total if length is None else length,
            opcode,
            self.unique,
            node,
            uid,
            gid,
            1,
            len(extensions) // 8 if units is None else units,
            0,
        )
        return header + body + extensions

    def ask(self, opcode: int, node: int, body: bytes = b"", **header: Any) -> Answer:
        """Send a request and check its answer as the kernel does."""
        self.send(self.pack(opcode, node, body, **header))
        return self.answer_of(opcode, body)

    def answer_of(self, opcode: int, body: bytes) -> Answer:
        """The answer to the request sent last."""
        answer = parse(self.receive(), self.unique)
        check_size(opcode, body, answer)
        return answer

    def tell(self, opcode: int, node: int, body: bytes = b"", **header: Any) -> None:
        """Send a request that nobody answers; raises WrongAnswer where that, or the next request, goes wrong."""
        self.send(self.pack(opcode, node, body, **header))
        self.serves()

    def serves(self) -> None:
        """See that the session still serves, and owes no other answer."""
        answer = self.ask(GETATTR, 1, bytes(16))
        if answer.error:
            raise WrongAnswer(f"the root's attributes: error {answer.error}")

    def look_up(self, path: bytes) -> int:
        """The node id of a path below the root."""
        node = 1
        for name in path.split(b"/"):
            answer = self.ask(LOOKUP, node, name + b"\0")
            assert answer.error == 0, (path, answer.error)
            (node,) = struct.unpack_from("=Q", answer.body)
            assert node, f"{path!r} is not there"
        return node


class RingWire(Wire):
    """The kernel's end of a place in a ring, which has its own memory for headers and structures, and answers to all.

    What is there of an earlier request, behind the parts of the one sent, is not to be read: here it would be noticed.
    """

    unanswered: frozenset[int] = frozenset()

    def pack(self, opcode: int, node: int, body: bytes, *, length: int | None = None, **header: Any) -> bytes:
        """As of any wire, but that `length` is what the ring says of the bytes behind the structure."""
        message = super().pack(opcode, node, body, **header)
        size = STRUCTURES.get(opcode, 0)
        structure, payload = message[40:][:size], message[40:][size:]
        said = len(payload) if length is None else length
        return ring_message(message[:40], structure.ljust(size, b"\0"), said, payload + b"behind\0" * 9)

    def receive(self, limit: float = PATIENCE) -> bytes:
        """An answer as it would come over any wire."""
        return ring_answer(super().receive(limit))

    def tell(self, opcode: int, node: int, body: bytes = b"", **header: Any) -> None:
        self.ask(opcode, node, body, **header)
        self.serves()


def ring_message(head: bytes, structure: bytes, size: int, payload: bytes) -> bytes:
    """struct fuse_uring_req_header, 288 bytes, that says `size`, and what is in the memory for payloads."""
    return head.ljust(128, b"\xff") + structure.ljust(128, b"\xff") + struct.pack("=QQIIQ", 0, 0, size, 0, 0) + payload


def ring_answer(message: bytes) -> bytes:
    """Header and body of an answer that was found in a ring; raises WrongAnswer where their sizes don't agree."""
    (length,) = struct.unpack_from("=I", message)
    (size,) = struct.unpack_from("=I", message, 128 + 128 + 16)
    if (length - 16, len(message) - RING_HEADER) != (size, size):
        raise WrongAnswer(f"an answer of {length} bytes, of which {size} would be copied")
    return message[:16] + message[RING_HEADER:]


def parse(message: bytes, unique: int) -> Answer:
    """The parts of an answer to the request of that number; raises WrongAnswer where the kernel would refuse it."""
    if len(message) < 16:
        raise WrongAnswer(f"an answer of {len(message)} bytes")
    length, error, answered = struct.unpack_from("=IiQ", message)
    if length != len(message):
        raise WrongAnswer(f"an answer of {len(message)} bytes that says {length}")
    if answered != unique:
        raise WrongAnswer(f"an answer to request {answered} instead of {unique}")
    if not -_MOST_ERRNO < error <= 0:
        raise WrongAnswer(f"an error number of {error}")
    if error and length != 16:
        raise WrongAnswer(f"error {-error} with {length - 16} bytes behind it")
    return Answer(-error, message[16:])


def check_size(opcode: int, body: bytes, answer: Answer) -> None:
    """See that an answer has the size the kernel has room for."""
    if answer.error:
        return
    size = len(answer.body)
    at = ASKED_AT.get(opcode)
    if at is not None:
        # In a ring, what is cut off a structure is nought.
        (asked,) = struct.unpack_from("=I", body.ljust(at + 4, b"\0"), at)
        fits = size == 8 if asked == 0 and opcode in (GETXATTR, LISTXATTR) else size <= asked
    elif opcode == READLINK:
        fits = size < PAGE
    elif opcode == IOCTL:
        # The answer's own structure, and what the command writes.
        fits = 16 <= size <= 16 + struct.unpack_from("=I", body.ljust(32, b"\0"), 28)[0]
    else:
        fits = size == SIZES.get(opcode, 0)
    if not fits:
        raise WrongAnswer(f"{size} bytes in answer to opcode {opcode} {body[:64]!r}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry of READDIR; of READDIRPLUS with the node id, 0 where none is given."""

    name: bytes
    position: int
    kind: int
    inode: int
    node: int = 0


def entries(body: bytes, *, plus: bool = False) -> list[Entry]:
    """The entries of a READDIR or READDIRPLUS answer, as the kernel takes them apart."""
    found = []
    at = 0
    while at < len(body):
        node = 0
        start = at
        if plus:
            (node,) = struct.unpack_from("=Q", body, at)
            at += 128
        inode, position, length, kind = struct.unpack_from("=QQII", body, at)
        name = body[at + 24 : at + 24 + length]
        if not 0 < length <= 1024 or len(name) != length or b"/" in name or b"\0" in name:
            raise WrongAnswer(f"an entry named {name!r}, {length} bytes long")
        found.append(Entry(name, position, kind, inode, node))
        at = start + (at - start + 24 + length + 7) // 8 * 8
    if at != len(body):
        raise WrongAnswer(f"{len(body)} bytes of entries that end at {at}")
    return found


def init_body(minor: int = 45, flags: int = 0xFFFFFFFF, flags2: int = 1, *, major: int = 7) -> bytes:
    """INIT's structure as of 7.36, 64 bytes; of the second word of flags only FUSE_SECURITY_CTX, unless it is given."""
    return struct.pack("=IIIII44x", major, minor, 131072, flags, flags2)


def _serve_as_ring(session: Session, end: socket.socket) -> None:
    """Serve INIT, which never comes over a ring, then what a place in one would hold."""
    Channel(session, end.fileno()).greet()
    loopback = Loopback(session)
    while message := end.recv(_SOCKET_BUFFER):
        end.send(b"".join(loopback.exchange(message[:RING_HEADER], message[RING_HEADER:])))


@contextlib.contextmanager
def served(base: Path, *, greet: bool = True, ring: bool = False, flags2: int = 1, **options: Any) -> Iterator[Wire]:
    """A session on the directories `lower`, `upper` and `work` in `base`; with `greet`, INIT has been answered.

    `ring` has further requests come through a place in a ring. `flags2` is the second word of flags that INIT offers.
    Raises WrongAnswer where the session doesn't end when the connection does.
    """
    config = MountConfig(
        lowerdirs=(bytes(base / "lower"),),
        upperdir=bytes(base / "upper"),
        workdir=bytes(base / "work"),
        mountpoint=b"/nowhere",
        **options,
    )
    fs = Overlay(config)
    # An engine has it for itself, as those who ask bring their own.
    umask = os.umask(0)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = Session(fs, far.fileno())
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
        end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER)
    loop = functools.partial(_serve_as_ring, session, far) if ring else Channel(session, far.fileno()).serve
    thread = threading.Thread(target=loop, name="served", daemon=True)
    thread.start()
    try:
        wire = Wire(near)
        if greet:
            assert wire.ask(INIT, 0, init_body(flags2=flags2)).error == 0
        yield RingWire(near) if ring else wire
    finally:
        near.close()
        thread.join(PATIENCE)
        if thread.is_alive():
            # Whatever it holds stays open: closing it would pull it away from under the thread.
            raise WrongAnswer("the session goes on after the connection's end")
        session.close()
        far.close()
        fs.close()
        os.umask(umask)
