"""Operations whose jobs other threads execute: each is answered, whatever becomes of its job."""

import errno
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.requests import Job
from tests.native import wire
from tests.native.messages import lay_out
from tests.native.wire import Wire, served

FSYNC = struct.pack("=QII", 0, 0, 0)


@pytest.fixture(params=["device", "ring"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Wire]:
    lay_out(tmp_path)
    with served(tmp_path, ring=request.param == "ring") as connected:
        yield connected


@pytest.mark.parametrize("cleanup", [ValueError("a mistake"), OSError(errno.EIO, "a disk")])
def test_an_operation_that_fails_in_its_clean_up_is_answered(
    client: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cleanup: Exception
) -> None:
    def fail() -> None:
        raise ValueError("a job that fails in an unknown way")

    def fsync(*_arguments: object, **_named: object) -> Iterator[Job]:
        try:
            yield Job(fail)
        finally:
            raise cleanup

    u = client.look_up(b"u")
    with monkeypatch.context() as patched:
        patched.setitem(OPERATIONS, "fsync", fsync)
        assert client.ask(wire.FSYNC, u, FSYNC).error == errno.EIO
    assert str(cleanup) in caplog.text
    assert client.ask(wire.FSYNC, u, FSYNC).error == 0
