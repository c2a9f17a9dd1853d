"""A 90 MB database of a lower layer, changed by several processes during and after its copy-up."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.crash import database
from tests.support.mounts import REPOSITORY, kernel_mount, our_mount

WRITERS = 4
ROUNDS = 4
LIMIT = 100
SIZE = 90_000_000


@pytest.fixture(scope="module")
def original(scratch: Path) -> Path:
    path = scratch / "database"
    database.make(str(path), "delete")
    assert path.stat().st_size >= SIZE
    return path


@contextlib.contextmanager
def _writer(file: str, journal: str, number: int) -> Iterator[subprocess.Popen[str]]:
    """A process that changes rows of its own, which doesn't outlive the block."""
    command = [sys.executable, "-m", "tests.crash.database", file, journal, str(number), str(WRITERS), str(ROUNDS)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("journal", "options"), [("delete", ""), ("wal", ""), ("wal", "writeback=1")])
def test_no_row_of_a_database_is_lost_or_invented(layers: Layers, original: Path, journal: str, options: str) -> None:
    shutil.copyfile(original, layers.lower / "db")
    before = (layers.lower / "db").read_bytes()
    file = str(layers.mnt / "db")
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        reader = sqlite3.connect(file)
        assert reader.execute("SELECT count(*) FROM data").fetchone() == (database.ROWS,)
        expected: dict[int, int] = {}
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(_writer(file, journal, number)) for number in range(WRITERS)]
            for process in writers:
                output, errors = process.communicate(timeout=LIMIT)
                assert process.returncode == 0, errors
                expected |= {int(row): version for row, version in json.loads(output).items()}
        assert expected
        assert reader.execute("SELECT sum(version) FROM data").fetchone() == (sum(expected.values()),)
        reader.close()
        assert database.check(file, expected) == []
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work):
        assert database.check(file, expected) == []
    assert (layers.lower / "db").read_bytes() == before
    assert set(os.listdir(layers.lower)) == {"db"}
