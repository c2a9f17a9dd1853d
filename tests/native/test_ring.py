"""Requests in the memory of a ring, byte by byte as no kernel writes them: none is served by what it doesn't have.

Source: struct fuse_uring_req_header in include/uapi/linux/fuse.h, fs/fuse/dev_uring.c.
"""

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native import wire
from tests.native.messages import LOWER_DATA, Message, lay_out, setattr_body, valid
from tests.native.wire import Wire, ring_answer, ring_message, served

ROOM = 128 << 10  # bytes for a payload where writes are of one page
MKDIR = struct.pack("=II", 0o755, 0)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Wire]:
    lay_out(tmp_path)
    with served(tmp_path, ring=True, max_write=4096) as connected:
        yield connected


def head(opcode: int, *, node: int = 1, unique: int = 77, extensions: int = 0) -> bytes:
    """struct fuse_in_header of 40 bytes, whose length says nothing in a ring; `extensions` in 8 bytes."""
    return struct.pack("=IIQQIIIHH", 0, opcode, unique, node, 0, 0, 1, extensions, 0)


def raw(client: Wire, message: bytes) -> bytes:
    """All that is in the ring's memory after a request: the header, and what the payload is said to be."""
    client.end.send(message)
    client.end.settimeout(wire.PATIENCE)
    while wire.is_invalidation(found := client.end.recv(2 * ROOM)):
        pass
    return found


def error(client: Wire, message: bytes) -> int:
    """The error of an answer, which then has nothing behind it."""
    answer = wire.parse(ring_answer(raw(client, message)), 77)
    assert answer.body == b""
    return answer.error


def test_an_answer_is_two_headers_and_a_payload(client: Wire) -> None:
    found = raw(client, ring_message(head(wire.LOOKUP), b"", 2, b"f\0"))
    assert struct.unpack_from("=IiQ", found) == (16 + 128, 0, 77)
    assert struct.unpack_from("=I", found, 272) == (128,)
    assert len(found) == 288 + 128
    (node,) = struct.unpack_from("=Q", found, 288)
    structure = struct.pack("=QQIIQII", 0, 0, 5, 0, 0, 0, 0)
    found = raw(client, ring_message(head(wire.READ, node=node), structure, 0, b""))
    assert (found[:16], found[288:]) == (struct.pack("=IiQ", 21, 0, 77), LOWER_DATA[:5])


def test_what_the_kernel_is_to_find_its_request_by_stays(client: Wire) -> None:
    message = bytearray(ring_message(head(wire.LOOKUP), b"", 2, b"f\0"))
    struct.pack_into("=QQ", message, 256, 0, 123_456_789)
    assert struct.unpack_from("=QQ", raw(client, bytes(message)), 256) == (0, 123_456_789)


def test_an_answer_that_comes_later_is_in_the_same_place(client: Wire, tmp_path: Path) -> None:
    # A file of the lower layer is copied up by another thread.
    f = client.look_up(b"f")
    found = raw(client, ring_message(head(wire.SETATTR, node=f), setattr_body(valid=1, mode=0o640), 0, b""))
    assert struct.unpack_from("=IiQ", found) == (16 + 104, 0, 77)
    assert (tmp_path / "upper" / "f").read_bytes() == LOWER_DATA


@pytest.mark.parametrize("size", [ROOM + 1, ROOM + 4096, (1 << 31) - 1, 1 << 31, 0xFFFFFFFF])
def test_a_payload_longer_than_its_place_is_refused(client: Wire, tmp_path: Path, size: int) -> None:
    assert error(client, ring_message(head(wire.MKDIR), MKDIR, size, b"new\0")) == errno.EIO
    assert not (tmp_path / "upper" / "new").exists()
    assert error(client, ring_message(head(wire.GETATTR), bytes(16), size, b"")) == errno.EIO


@pytest.mark.parametrize("units", [1, 2, 3, 0x7FFF, 0xFFFF])
def test_extensions_longer_than_the_payload_are_refused(client: Wire, tmp_path: Path, units: int) -> None:
    message = ring_message(head(wire.MKDIR, extensions=units), MKDIR, 7, b"newname\0" + bytes(ROOM - 8))
    assert error(client, message) == errno.EIO
    assert error(client, ring_message(head(wire.GETATTR, extensions=units), bytes(16), 0, b"")) == errno.EIO
    assert not (tmp_path / "upper" / "newname").exists()


def test_a_payload_of_extensions_alone_has_no_name(client: Wire) -> None:
    for units in (1, 2, ROOM // 8, 1000):
        message = ring_message(head(wire.MKDIR, extensions=units), MKDIR, 8 * units, b"abcdefg\0" * units)
        assert error(client, message) == errno.EIO


def test_a_name_ends_with_its_payload_whatever_is_behind(client: Wire, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path / "upper"))
    names = {wire.LOOKUP: 1, wire.UNLINK: 1, wire.RMDIR: 1, wire.MKNOD: 1, wire.MKDIR: 1, wire.LINK: 1}
    names |= {wire.SYMLINK: 2, wire.RENAME: 2, wire.RENAME2: 2}
    for opcode, count in names.items():
        (structure,) = {m.body[: wire.STRUCTURES.get(opcode, 0)] for m in valid(client) if m.opcode == opcode}
        payload = b"name\0" * count
        # One byte less than they need, down to none; the rest of them is there, but not theirs.
        for size in range(len(payload)):
            assert error(client, ring_message(head(opcode), structure, size, payload)) == errno.EIO, (opcode, size)
    for opcode in (wire.GETXATTR, wire.SETXATTR, wire.REMOVEXATTR):
        u, structure = client.look_up(b"u"), struct.pack("=II", 5, 0) + bytes(8)
        for size in range(9):
            message = ring_message(head(opcode, node=u), structure, size, b"user.key\0value")
            assert error(client, message) == errno.EIO, (opcode, size)
    assert sorted(os.listdir(tmp_path / "upper")) == before


def test_a_name_may_fill_the_payload_to_its_last_byte(client: Wire) -> None:
    for opcode, structure in ((wire.LOOKUP, b""), (wire.MKDIR, MKDIR), (wire.RENAME, struct.pack("=Q", 1))):
        unended = ring_message(head(opcode), structure, ROOM, b"n" * ROOM)
        assert error(client, unended) == errno.EIO
        first = b"f\0" if opcode == wire.RENAME else b""
        ended = ring_message(head(opcode), structure, ROOM, (first + b"n" * ROOM)[: ROOM - 1] + b"\0")
        assert error(client, ended) == errno.ENAMETOOLONG
        assert error(client, ended[:-1] + b"n") == errno.EIO


def test_a_value_ends_with_its_payload(client: Wire) -> None:
    u = client.look_up(b"u")
    for size, there in ((6, 5), (5, 4), (ROOM, ROOM - 10), (0xFFFFFFFF, 5)):
        structure = struct.pack("=IIII", size, 0, 0, 0)
        message = ring_message(head(wire.SETXATTR, node=u), structure, 9 + there, b"user.new\0" + b"v" * (ROOM - 9))
        assert error(client, message) == errno.EIO
    found = raw(client, ring_message(head(wire.LISTXATTR, node=u), struct.pack("=II", 100, 0), 0, b""))
    assert found[288:] == b"user.key\0"


def test_a_write_is_of_what_is_in_the_payload(client: Wire, tmp_path: Path) -> None:
    for name in (b"u", b"f"):  # in place, and after a copy that another thread makes
        for size in (6, ROOM, 1 << 31, 0xFFFFFFFF):
            structure = struct.pack("=QQIIQII", 0, 0, size, 0, 0, 0, 0)
            message = ring_message(head(wire.WRITE, node=client.look_up(name)), structure, 5, b"WROTE and no more")
            assert raw(client, message)[288:] == struct.pack("=II", 5, 0)
        assert (tmp_path / "upper" / os.fsdecode(name)).read_bytes()[:6] == b"WROTEe"


def test_an_answer_is_never_longer_than_its_place(client: Wire) -> None:
    f = client.look_up(b"f")
    for size in (ROOM - 1, ROOM, ROOM + 1, 0xFFFFFFFF):
        structure = struct.pack("=QQIIQII", 0, 0, size, 0, 0, 0, 0)
        assert raw(client, ring_message(head(wire.READ, node=f), structure, 0, b""))[288:] == LOWER_DATA
        for opcode in (wire.READDIR, wire.READDIRPLUS):
            found = ring_answer(raw(client, ring_message(head(opcode), structure, 0, b"")))
            assert wire.entries(found[16:], plus=opcode == wire.READDIRPLUS)


def test_a_structure_of_any_numbers_is_answered(client: Wire) -> None:
    for message in valid(client):
        size = wire.STRUCTURES.get(message.opcode, 0)
        names = message.body[size:]
        for structure in (b"\xff" * 128, bytes(128), b"\x00\x00\x00\x80" * 32, b"\xff\xff\xff\x7f" * 32):
            for payload in (names, b""):
                sent = ring_message(head(message.opcode, node=message.node), structure, len(payload), payload)
                answer = wire.parse(ring_answer(raw(client, sent)), 77)
                wire.check_size(message.opcode, structure, answer)


def test_what_is_behind_a_structure_is_not_read(client: Wire) -> None:
    for message in valid(client):
        if message.opcode in CHANGING:
            continue
        size = wire.STRUCTURES.get(message.opcode, 0)
        answers = {answer_with(client, message, size, filler) for filler in (b"\0", b"\xff", b"\x01")}
        assert len(answers) == 1, message


def answer_with(client: Wire, message: Message, size: int, filler: bytes) -> bytes:
    structure = message.body[:size].ljust(128, filler)
    payload = message.body[size:]
    sent = ring_message(head(message.opcode, node=message.node), structure, len(payload), payload + 99 * filler)
    return raw(client, sent)[288:]


# What is not the same twice, and what sets times.
CHANGING = {
    *(wire.SYMLINK, wire.MKNOD, wire.MKDIR, wire.UNLINK, wire.RENAME, wire.LINK, wire.CREATE, wire.TMPFILE),
    *(wire.RENAME2, wire.REMOVEXATTR, wire.SETATTR, wire.FALLOCATE, wire.COPY_FILE_RANGE, wire.COPY_FILE_RANGE_64),
    *(wire.FORGET, wire.BATCH_FORGET, wire.STATFS),
}


def test_every_opcode_there_may_be_is_answered_once(client: Wire) -> None:
    known = {message.opcode for message in valid(client)}
    for opcode in (*range(64), 64, 65, 255, 256, 4096, 1 << 16, 1 << 31, 0xFFFFFFFF):
        for payload in (b"", bytes(8), bytes(200), b"\xff" * ROOM):
            sent = ring_message(head(opcode, node=999_999_999), bytes(128), len(payload), payload)
            answer = wire.parse(ring_answer(raw(client, sent)), 77)
            if opcode not in known:
                assert (answer.error, answer.body) == (errno.ENOSYS, b""), opcode
    client.serves()
