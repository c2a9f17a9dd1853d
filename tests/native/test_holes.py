"""Where a file has data and where it has holes, while some of it is in a mapping only."""

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.mounts import our_mount

_SIZE = 1 << 20
_AT = 500_000
_CLIENTS = 12
_LIMIT = 60.0


@pytest.fixture(params=["cached", "passthrough"])
def mnt(request: pytest.FixtureRequest, layers: Layers, uring: str) -> Iterator[Path]:
    for number in range(_CLIENTS):
        with (layers.lower / f"hole{number}").open("wb") as file:
            file.truncate(_SIZE)
    (layers.lower / "whole").write_bytes(b"x" * _SIZE)
    (layers.upper / "upper").touch()
    os.truncate(layers.upper / "upper", _SIZE)
    options = f"engine=native,uring={uring},io={request.param}"
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        yield layers.mnt


@pytest.mark.parametrize("name", ["hole0", "upper"])
def test_data_that_was_stored_through_a_mapping_is_no_hole(mnt: Path, name: str) -> None:
    fd = os.open(mnt / name, os.O_RDWR)
    try:
        with pytest.raises(OSError) as caught:
            os.lseek(fd, 0, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        assert os.lseek(fd, 5, os.SEEK_HOLE) == 5
        with mmap.mmap(fd, _SIZE) as stored:
            stored[_AT : _AT + 4] = b"DATA"
            assert os.lseek(fd, 0, os.SEEK_DATA) <= _AT
            assert os.lseek(fd, _AT, os.SEEK_DATA) == _AT
            assert os.lseek(fd, _AT, os.SEEK_HOLE) > _AT + 3
            stored[_SIZE - 1 :] = b"!"
            assert os.lseek(fd, _AT + 65536, os.SEEK_DATA) <= _SIZE - 1
            subprocess.run(["cp", "--sparse=always", mnt / name, mnt / "copy"], check=True, timeout=_LIMIT)
            assert (mnt / "copy").read_bytes() == stored[:]
        with pytest.raises(OSError) as caught:
            os.lseek(fd, _SIZE, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
    finally:
        os.close(fd)


def test_a_file_without_holes_is_data_to_its_end(mnt: Path) -> None:
    with (mnt / "whole").open("rb") as file:
        assert os.lseek(file.fileno(), 7, os.SEEK_DATA) == 7
        assert os.lseek(file.fileno(), 7, os.SEEK_HOLE) == _SIZE


def test_many_who_seek_at_once_wait_for_nobody_for_ever(mnt: Path) -> None:
    script = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "stored = mmap.mmap(fd, 0)\n"
        "for at in range(0, len(stored), 65536):\n"
        "    stored[at] = 1\n"
        "    assert os.lseek(fd, at, os.SEEK_DATA) == at\n"
    )
    command = ("/usr/bin/python3", "-c", script)
    clients = [subprocess.Popen([*command, mnt / f"hole{number}"]) for number in range(_CLIENTS)]
    try:
        assert [client.wait(_LIMIT) for client in clients] == _CLIENTS * [0]
    finally:
        for client in clients:
            client.kill()
            client.wait(_LIMIT)
