"""Files that the disk is asked for before they are read: which, and that nothing but that changes."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.native import shelf
from tests.native.other import served_by
from tests.support.caches import names_kept
from tests.support.mounts import our_mount

_PATIENCE = 30.0  # seconds


@pytest.fixture
def log(layers: Layers) -> Path:
    return layers.base / "log"


@pytest.fixture
def mnt(layers: Layers, log: Path, uring: str) -> Iterator[Path]:
    options = f"engine=native,uring={uring}"
    log.touch()
    with (
        names_kept(),
        served_by("tests.native.shelf", layers.lower, log),
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options),
    ):
        yield layers.mnt


def read(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        assert (directory / name).read_bytes() == shelf.data_of(os.fsencode(name))


def asked_for(log: Path) -> list[str]:
    return log.read_text().splitlines()


def until_asked_for(log: Path, names: Sequence[str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not set(names) <= set(asked_for(log)):
        assert time.monotonic() < deadline, asked_for(log)
        time.sleep(0.01)


def test_who_reads_one_file_after_the_other_finds_them_read_from_the_disk(mnt: Path, log: Path) -> None:
    names = os.listdir(mnt / "first")
    read(mnt / "first", names[:10])
    until_asked_for(log, names[:15])
    read(mnt / "first", names[10:])
    assert sorted(asked_for(log)) == sorted(names), "each is read once"


def test_the_first_files_of_the_next_directory_are_asked_for_when_it_is_listed(mnt: Path, log: Path) -> None:
    read(mnt / "first", os.listdir(mnt / "first"))
    names = os.listdir(mnt / "second")
    until_asked_for(log, names[:4])
    read(mnt / "second", names)
    assert len(asked_for(log)) == 2 * shelf.COUNT


def test_who_reads_here_and_there_has_nothing_else_read(mnt: Path, log: Path) -> None:
    some = []
    for place in ("first", "second"):
        names = os.listdir(mnt / place)[::-3]
        read(mnt / place, names)
        some += names
    time.sleep(0.1)
    assert asked_for(log) == some


def test_who_only_looks_has_nothing_read(mnt: Path, log: Path) -> None:
    for directory in shelf.DIRECTORIES:
        for entry in os.scandir(mnt / os.fsdecode(directory)):
            entry.stat()
    time.sleep(0.1)
    assert asked_for(log) == []


def test_what_was_changed_or_removed_meanwhile_is_read_as_it_is_now(mnt: Path) -> None:
    names = os.listdir(mnt / "first")
    read(mnt / "first", names[:6])
    (mnt / "first" / names[7]).unlink()
    (mnt / "first" / names[8]).write_bytes(b"written")
    (mnt / "first" / names[9]).rename(mnt / "second" / "moved")
    (mnt / "first" / names[10]).unlink()
    (mnt / "first" / names[10]).write_bytes(b"another")
    read(mnt / "first", names[6:7])
    assert (mnt / "first" / names[8]).read_bytes() == b"written"
    assert (mnt / "first" / names[10]).read_bytes() == b"another"
    assert (mnt / "second" / "moved").read_bytes() == shelf.data_of(os.fsencode(names[9]))
    read(mnt / "first", names[11:])
