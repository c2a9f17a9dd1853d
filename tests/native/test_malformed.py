"""Requests that no kernel sends: each is refused, by one answer or by none, and the session serves on."""

import errno
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native import wire
from tests.native.messages import lay_out, setattr_body, valid
from tests.native.wire import UNANSWERED, Wire, served

# What a request may be refused with that is wrong in its form.
FORM = {errno.EIO, errno.EINVAL}


OVER_DEVICE = pytest.mark.parametrize("client", ["device"], indirect=True)


@pytest.fixture(params=["device", "ring"])
def client(request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Wire]:
    """A served session on a few layers, in whose log no traceback may be at the end."""
    lay_out(tmp_path)
    for transport in ("device", "uring"):
        caplog.set_level(logging.CRITICAL, f"overlayfs_py.engines.native.{transport}")
    with served(tmp_path, ring=request.param == "ring") as connected:
        yield connected
    assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


def listed(client: Wire, node: int = 1) -> set[bytes]:
    answer = client.ask(wire.READDIR, node, struct.pack("=QQIIQII", 0, 0, 8192, 0, 0, 0, 0))
    assert answer.error == 0
    return {entry.name for entry in wire.entries(answer.body)}


def test_a_request_cut_off_anywhere_is_answered_if_its_kind_is(client: Wire) -> None:
    for message in valid(client):
        for end in range(len(message.body)):
            if message.opcode in client.unanswered:
                client.tell(message.opcode, message.node, message.body[:end])
            else:
                # With what is left the request may still be a valid one; that it has the right size is checked.
                client.ask(message.opcode, message.node, message.body[:end])


@OVER_DEVICE
def test_a_request_shorter_or_longer_than_it_says_is_refused(client: Wire) -> None:
    for message in valid(client):
        total = 40 + len(message.body)
        for lie in (0, 16, 39, 40, total - 1, total + 1, total + 8, 1 << 31, 0xFFFFFFFF):
            if lie == total:
                continue
            if message.opcode in client.unanswered:
                client.tell(message.opcode, message.node, message.body, length=lie)
            else:
                assert client.ask(message.opcode, message.node, message.body, length=lie).error == errno.EIO


@OVER_DEVICE
def test_a_message_without_a_whole_header_gets_no_answer(client: Wire) -> None:
    whole = client.pack(wire.GETATTR, 1, bytes(16))
    for end in range(1, 40):
        client.send(whole[:end])
    client.serves()


def test_more_bytes_than_an_opcode_has_are_passed_over(client: Wire) -> None:
    rest = b"\0" + bytes(range(256)) * 16
    for message in valid(client):
        if message.opcode in client.unanswered:
            client.tell(message.opcode, message.node, message.body + rest)
        else:
            client.ask(message.opcode, message.node, message.body + rest)


def test_extensions_behind_the_names_are_passed_over(client: Wire) -> None:
    mkdir = struct.pack("=II", 0o755, 0)
    # FUSE_EXT_GROUPS with one group, as CREATE_SUPP_GROUP has it.
    groups = struct.pack("=IIII", 16, 32, 1, 7)
    for extensions in (groups, groups + bytes(8), bytes(4096)):
        name = b"with-%d" % len(extensions)
        assert client.ask(wire.MKDIR, 1, mkdir + name + b"\0", extensions=extensions).error == 0
        assert name in listed(client)


def test_extensions_that_reach_into_the_structure_are_refused(client: Wire) -> None:
    body = struct.pack("=II", 0o755, 0) + b"abcdefg\0"
    for units in (2, 3, 6, 7, 8, 1000, 0xFFFF):
        assert client.ask(wire.MKDIR, 1, body, units=units).error in FORM
    assert b"abcdefg" not in listed(client)


def test_a_name_that_is_not_ended_is_refused(client: Wire) -> None:
    d = client.look_up(b"d")
    before = listed(client), listed(client, d)
    for opcode, head in NAMED:
        assert client.ask(opcode, 1, head.replace(b"DDDDDDDD", struct.pack("=Q", d)) + b"name").error in FORM
        assert client.ask(opcode, 1, head.replace(b"DDDDDDDD", struct.pack("=Q", d))).error in FORM
    for opcode, head in (*TWO_NAMED, (wire.SYMLINK, b"")):
        assert client.ask(opcode, 1, head + b"f\0").error in FORM
        assert client.ask(opcode, 1, head + b"f\0g").error in FORM
    assert before == (listed(client), listed(client, d))


NAMED = (
    (wire.LOOKUP, b""),
    (wire.MKNOD, struct.pack("=IIII", 0o100644, 0, 0, 0)),
    (wire.MKDIR, struct.pack("=II", 0o755, 0)),
    (wire.UNLINK, b""),
    (wire.RMDIR, b""),
)
TWO_NAMED = (
    (wire.RENAME, struct.pack("=Q", 1)),
    (wire.RENAME2, struct.pack("=QII", 1, 0, 0)),
)


def test_a_name_longer_than_255_bytes_is_too_long(client: Wire) -> None:
    for length in (256, 257, 1024, 4096, 100_000):
        for opcode, head in NAMED:
            assert client.ask(opcode, 1, head + b"n" * length + b"\0").error == errno.ENAMETOOLONG
        for opcode, head in TWO_NAMED:
            assert client.ask(opcode, 1, head + b"f\0" + b"n" * length + b"\0").error == errno.ENAMETOOLONG


def test_an_xattr_value_shorter_than_it_says_is_refused(client: Wire) -> None:
    u = client.look_up(b"u")
    for size in (6, 7, 65536, 65537, 1 << 31, 0xFFFFFFFF):
        body = struct.pack("=IIII", size, 0, 0, 0) + b"user.lie\0" + b"value"
        assert client.ask(wire.SETXATTR, u, body).error in {*FORM, errno.E2BIG}
    assert client.ask(wire.GETXATTR, u, struct.pack("=II", 100, 0) + b"user.lie\0").error == errno.ENODATA


def test_a_write_of_more_than_is_there_writes_nothing_that_was_not_sent(client: Wire, tmp_path: Path) -> None:
    u = client.look_up(b"u")
    for size in (6, 100, 1 << 20, 1 << 31, 0xFFFFFFFF):
        answer = client.ask(wire.WRITE, u, struct.pack("=QQIIQII", 0, 0, size, 0, 0, 0, 0) + b"WROTE")
        assert answer.error in FORM or answer.unpack("II") == (5, 0)
    assert (tmp_path / "upper" / "u").read_bytes() in (b"of the upper layer", b"WROTEe upper layer")


def test_a_read_never_gives_more_than_was_asked_or_is_there(client: Wire) -> None:
    f = client.look_up(b"f")
    for size in (0, 1, 17, 18, 19, 1 << 20, 1 << 31, 0xFFFFFFFF):
        answer = client.ask(wire.READ, f, struct.pack("=QQIIQII", 0, 0, size, 0, 0, 0, 0))
        assert (answer.error, answer.body) == (0, b"of the lower layer"[:size])


def test_offsets_below_nought_are_invalid(client: Wire) -> None:
    f, u = client.look_up(b"f"), client.look_up(b"u")
    for offset in (1 << 63, (1 << 64) - 1, (1 << 64) - 4096):
        assert client.ask(wire.READ, f, struct.pack("=QQIIQII", 0, offset, 10, 0, 0, 0, 0)).error == errno.EINVAL
        body = struct.pack("=QQIIQII", 0, offset, 5, 0, 0, 0, 0) + b"01234"
        assert client.ask(wire.WRITE, u, body).error == errno.EINVAL
        assert client.ask(wire.LSEEK, f, struct.pack("=QQII", 0, offset, 0, 0)).error in (errno.EINVAL, errno.ENXIO)
    # Any position of a listing is one to go on behind.
    for offset in (1 << 63, (1 << 64) - 1):
        for opcode in (wire.READDIR, wire.READDIRPLUS):
            answer = client.ask(opcode, 1, struct.pack("=QQIIQII", 0, offset, 4096, 0, 0, 0, 0))
            assert (answer.error, answer.body) == (0, b"")


def test_a_listing_fits_any_room(client: Wire) -> None:
    for opcode in (wire.READDIR, wire.READDIRPLUS):
        for size in (*range(700), 1 << 20, 0xFFFFFFFF):
            answer = client.ask(opcode, 1, struct.pack("=QQIIQII", 0, 0, size, 0, 0, 0, 0))
            found = wire.entries(answer.body, plus=opcode == wire.READDIRPLUS)
            assert [entry.name for entry in found][:2] == [b".", b".."][: len(found)]


def test_a_listing_read_entry_by_entry_is_whole(client: Wire) -> None:
    for opcode, room in ((wire.READDIR, 32), (wire.READDIRPLUS, 160)):
        names: list[bytes] = []
        position = 0
        while (answer := client.ask(opcode, 1, struct.pack("=QQIIQII", 0, position, room, 0, 0, 0, 0))).body:
            (entry,) = wire.entries(answer.body, plus=opcode == wire.READDIRPLUS)
            names.append(entry.name)
            position = entry.position
        assert len(names) == len(set(names))
        assert set(names) == {b".", b"..", b"f", b"d", b"l", b"u", b"p", b"c"}


def test_a_batch_of_forgets_that_says_too_many_forgets_those_there_are(client: Wire) -> None:
    f = client.look_up(b"f")
    for count in (0, 1, 2, 1000, 0xFFFFFFFF):
        client.tell(wire.BATCH_FORGET, 0, struct.pack("=II", count, 0) + struct.pack("=QQ", f, 0))
        client.tell(wire.BATCH_FORGET, 0, struct.pack("=II", count, 0))
        client.tell(wire.BATCH_FORGET, 0, struct.pack("=II", count, 0) + bytes(15))
    assert client.ask(wire.GETATTR, f, bytes(16)).error == 0
    client.tell(wire.BATCH_FORGET, 0, struct.pack("=II", 1000, 0) + struct.pack("=QQ", f, 1))
    assert client.ask(wire.GETATTR, f, bytes(16)).error == errno.ESTALE


def test_more_forgets_than_look_ups_are_survived(client: Wire) -> None:
    f = client.look_up(b"f")
    for count in (2, 1 << 32, (1 << 63) - 1):
        client.tell(wire.FORGET, f, struct.pack("=Q", count))
        assert client.ask(wire.GETATTR, f, bytes(16)).error == errno.ESTALE
        assert client.look_up(b"f") == f
    for _ in range(3):
        client.tell(wire.FORGET, 1, struct.pack("=Q", 1 << 62))
    assert client.ask(wire.LOOKUP, 1, b"f\0").error == 0


def test_a_node_that_nobody_knows_is_stale(client: Wire) -> None:
    for message in valid(client):
        for node in (0, 999_999_999, 1 << 63, (1 << 64) - 1):
            if message.opcode in client.unanswered:
                client.tell(message.opcode, node, message.body)
                continue
            error = client.ask(message.opcode, node, message.body).error
            if message.opcode in NAMELESS | UNANSWERED:
                continue
            assert error in (errno.ESTALE, errno.ENOSYS, errno.ENOTTY, errno.EROFS), (message, error)


# They are about the whole mount, or about nothing.
NAMELESS = {wire.INIT, wire.DESTROY, wire.STATFS, wire.SYNCFS, wire.RELEASE, wire.RELEASEDIR, wire.OPENDIR}


def test_a_second_node_that_nobody_knows_is_stale(client: Wire) -> None:
    f = client.look_up(b"f")
    for node in (0, 999_999_999, (1 << 64) - 1):
        assert client.ask(wire.RENAME, 1, struct.pack("=Q", node) + b"f\0g\0").error == errno.ESTALE
        assert client.ask(wire.RENAME2, 1, struct.pack("=QII", node, 0, 0) + b"f\0g\0").error == errno.ESTALE
        assert client.ask(wire.LINK, 1, struct.pack("=Q", node) + b"g\0").error == errno.ESTALE
        copy = struct.pack("=QQQQQQQ", 0, 0, node, 0, 0, 10, 0)
        assert client.ask(wire.COPY_FILE_RANGE, f, copy).error == errno.ESTALE
        assert client.ask(wire.COPY_FILE_RANGE_64, f, copy).error == errno.ESTALE


def test_what_is_for_directories_is_refused_for_files(client: Wire) -> None:
    f = client.look_up(b"f")
    for opcode, head in NAMED:
        assert client.ask(opcode, f, head + b"x\0").error in (errno.ENOTDIR, errno.EIO)
    for opcode in (wire.READDIR, wire.READDIRPLUS):
        body = struct.pack("=QQIIQII", 0, 0, 4096, 0, 0, 0, 0)
        assert client.ask(opcode, f, body).error == errno.ENOTDIR


def test_what_is_for_files_is_refused_for_anything_else(client: Wire) -> None:
    for name in (b"d", b"p", b"c", b"l"):
        node = client.look_up(name)
        read = client.ask(wire.READ, node, struct.pack("=QQIIQII", 0, 0, 10, 0, 0, 0, 0))
        assert read.error in NO_FILE
        body = struct.pack("=QQIIQII", 0, 0, 5, 0, 0, 0, 0) + b"01234"
        assert client.ask(wire.WRITE, node, body).error in NO_FILE
        if name != b"l":
            assert client.ask(wire.READLINK, node).error in (errno.EINVAL, errno.ENOENT)


NO_FILE = {errno.EISDIR, errno.ESTALE, errno.EINVAL, errno.ELOOP}


def test_times_that_no_clock_shows_are_refused_or_kept_as_far_as_the_layer_can(client: Wire) -> None:
    u = client.look_up(b"u")
    for seconds in (1 << 62, 1 << 63, (1 << 63) - 1, (1 << 64) - 1):
        error = client.ask(wire.SETATTR, u, setattr_body(valid=0x30, atime=seconds, mtime=seconds)).error
        assert error in (0, errno.EINVAL, errno.EOVERFLOW)


def test_ranges_that_no_file_has_are_refused(client: Wire, tmp_path: Path) -> None:
    u = client.look_up(b"u")
    for size in (1 << 63, (1 << 64) - 1):
        for body in (struct.pack("=QQQII", 0, size, 10, 0, 0), struct.pack("=QQQII", 0, 0, size, 0, 0)):
            assert client.ask(wire.FALLOCATE, u, body).error in (errno.EINVAL, errno.EFBIG)
    assert os.stat(tmp_path / "upper" / "u").st_size == 18


def test_unknown_opcodes_are_enosys(client: Wire) -> None:
    for opcode in (0, 7, 19, 48, 49, 54, 63, 64, 65, 255, 1000, 4096, 1 << 31, 0xFFFFFFFF):
        for body in (b"", bytes(8), bytes(200)):
            assert client.ask(opcode, 1, body).error == errno.ENOSYS
