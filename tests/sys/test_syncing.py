"""Many files synced at once: each of them, whatever the kernel has to give, and with an answer of its own."""

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from overlayfs_py.sys import syncing
from overlayfs_py.sys.syncing import Syncs

MANY = 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    opened = [os.open(tmp_path / f"{number}", os.O_RDWR | os.O_CREAT) for number in range(MANY)]
    for fd in opened:
        os.write(fd, b"data")
    yield opened
    for fd in opened:
        os.close(fd)


def numbers(outcome: Sequence[OSError | None]) -> list[int | None]:
    return [None if error is None else error.errno for error in outcome]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that are synced by a call for each."""
    synced: list[int] = []
    real = os.fsync

    def sync(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    return synced


@pytest.mark.parametrize("most", [MANY, 2 * MANY])
def test_all_are_handed_to_the_kernel_at_once(files: list[int], one_by_one: list[int], most: int) -> None:
    syncs = Syncs(most)
    for _ in range(3):
        assert numbers(syncs.sync(files)) == [None] * MANY
    assert numbers(syncs.sync([])) == []
    syncs.close()
    assert one_by_one == []


def test_more_than_the_queue_holds_are_synced_too(files: list[int], one_by_one: list[int]) -> None:
    syncs = Syncs(5)
    assert numbers(syncs.sync(files)) == [None] * MANY
    syncs.close()
    assert one_by_one == files[5:]


def test_each_file_has_its_own_answer(files: list[int]) -> None:
    reading, writing = os.pipe()
    closed = os.dup(reading)
    os.close(closed)
    syncs = Syncs(MANY)
    asked = [files[0], reading, files[1], closed, files[2]]
    try:
        assert numbers(syncs.sync(asked)) == [None, errno.EINVAL, None, errno.EBADF, None]
    finally:
        syncs.close()
        os.close(reading)
        os.close(writing)


def refused(number: int, *_arguments: Any) -> int:
    ctypes.set_errno(errno.EAGAIN)
    return -1


def test_without_a_queue_they_are_synced_one_by_one(
    files: list[int], one_by_one: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncing, "_syscall", refused)
    syncs = Syncs(MANY)
    assert numbers(syncs.sync(files)) == [None] * MANY
    syncs.close()
    assert one_by_one == files


def test_a_machine_whose_calls_have_other_numbers_is_asked_for_no_queue(
    files: list[int], one_by_one: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncing, "_NUMBERS", {})
    monkeypatch.setattr(syncing, "_syscall", None)
    syncs = Syncs(MANY)
    assert numbers(syncs.sync(files)) == [None] * MANY
    syncs.close()
    assert one_by_one == files


def test_an_interrupted_wait_goes_on(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(MANY)
    real = syncing._syscall
    interruptions = [1, 1]

    def call(number: ctypes.c_long, *arguments: Any) -> int:
        # only io_getevents(2) has five arguments
        if len(arguments) == 5 and interruptions:
            interruptions.pop()
            ctypes.set_errno(errno.EINTR)
            return -1
        return int(real(number, *arguments))

    monkeypatch.setattr(syncing, "_syscall", call)
    assert numbers(syncs.sync(files)) == [None] * MANY
    assert interruptions == []
    syncs.close()


def test_where_the_kernel_will_not_tell_what_became_of_them_none_counts_as_synced(
    files: list[int], one_by_one: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = Syncs(MANY)
    real = syncing._syscall

    def call(number: ctypes.c_long, *arguments: Any) -> int:
        return refused(0) if len(arguments) == 5 else int(real(number, *arguments))

    with monkeypatch.context() as patch:
        patch.setattr(syncing, "_syscall", call)
        assert numbers(syncs.sync(files)) == [errno.EIO] * MANY
    assert one_by_one == []
    # No answer of then is taken for one of now.
    assert numbers(syncs.sync(files[:3])) == [None] * 3
    assert one_by_one == files[:3]
    syncs.close()


def test_queues_are_given_back() -> None:
    in_use = Path("/proc/sys/fs/aio-nr")
    limit = int(Path("/proc/sys/fs/aio-max-nr").read_text())
    for _ in range(3):
        syncs = Syncs(limit // 2)
        assert syncs._numbers is not None
        syncs.close()
    assert int(in_use.read_text()) < limit // 2
