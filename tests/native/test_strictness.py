"""Names and numbers that no kernel sends, and that must do nothing: nothing outside the layers, and no traceback."""

import errno
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native import wire
from tests.native.messages import lay_out, setattr_body
from tests.native.test_malformed import NAMED, TWO_NAMED
from tests.native.wire import Wire, served

REFUSED = {errno.EINVAL, errno.EIO, errno.ENOENT, errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM}
NO_NAMES = (b"", b".", b"..", b"d/above", b"/", b"/etc", b"../lower/f", b"../../outside", b"d/../u", b"f/", b"./f")


@pytest.fixture
def client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Wire]:
    (tmp_path / "base").mkdir()
    lay_out(tmp_path / "base")
    (tmp_path / "outside").write_bytes(b"outside")
    caplog.set_level(logging.CRITICAL, "overlayfs_py.engines.native.device")
    with served(tmp_path / "base") as connected:
        yield connected
    assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


def everything(path: Path) -> list[str]:
    return sorted(str(found) for found in path.rglob("*"))


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_one_entry_leads_nowhere_and_makes_nothing(
    client: Wire, tmp_path: Path, name: bytes
) -> None:
    before = everything(tmp_path)
    for opcode, head in NAMED:
        answer = client.ask(opcode, 1, head + name + b"\0")
        # A look-up may also say that there is no such name, and for a file handle that the root is in itself.
        inside = (0, 1) if name in (b".", b"..") else (0,)
        nowhere = opcode == wire.LOOKUP and answer.error == 0 and answer.unpack("Q120x")[0] in inside
        assert nowhere or answer.error in REFUSED, (opcode, answer.error)
    for opcode, head in TWO_NAMED:
        assert client.ask(opcode, 1, head + name + b"\0new\0").error in REFUSED
        assert client.ask(opcode, 1, head + b"u\0" + name + b"\0").error in REFUSED
    assert client.ask(wire.SYMLINK, 1, name + b"\0target\0").error in REFUSED
    assert client.ask(wire.LINK, 1, struct.pack("=Q", client.look_up(b"u")) + name + b"\0").error in REFUSED
    assert everything(tmp_path) == before


def test_a_count_of_forgets_beyond_what_a_look_up_count_holds_forgets_the_node(client: Wire) -> None:
    f = client.look_up(b"f")
    for count in (1 << 63, (1 << 64) - 1):
        client.tell(wire.FORGET, f, struct.pack("=Q", count))
        assert client.ask(wire.GETATTR, f, bytes(16)).error == errno.ESTALE
        assert client.look_up(b"f") == f


def test_a_size_that_no_file_has_is_refused(client: Wire, tmp_path: Path) -> None:
    u = client.look_up(b"u")
    for size in (1 << 63, (1 << 64) - 1):
        assert client.ask(wire.SETATTR, u, setattr_body(valid=8, size=size)).error in (errno.EINVAL, errno.EFBIG)
    assert os.stat(tmp_path / "base" / "upper" / "u").st_size == 18


def test_a_kernel_before_7_33_sends_setxattr_with_a_structure_of_8_bytes(tmp_path: Path) -> None:
    lay_out(tmp_path)
    with served(tmp_path, greet=False) as client:
        assert client.ask(wire.INIT, 0, wire.init_body(31, 0x0FFFFFFF)[:16]).error == 0
        u = client.look_up(b"u")
        assert client.ask(wire.SETXATTR, u, struct.pack("=II", 5, 0) + b"user.new\0" + b"value").error == 0
    assert os.getxattr(tmp_path / "upper" / "u", "user.new") == b"value"
