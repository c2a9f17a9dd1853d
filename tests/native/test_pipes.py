"""What the page cache has of a file is sent to the kernel by reference, and is the same data as ever."""

import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.rig import traced
from tests.support.mounts import Mount, our_mount

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LIMIT = 60.0
_SIZES = (32 << 10, (100 << 10) + 1, (1 << 20) - 1, (2 << 20) + 7)


@pytest.fixture
def live(layers: Layers) -> Iterator[Mount]:
    for size in _SIZES:
        (layers.lower / f"f{size}").write_bytes(expected(size))
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native,uring=off") as live:
        yield live


def expected(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def forget(path: Path) -> None:
    """Have the kernel ask for the data of a file again."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_all(layers: Layers) -> None:
    for size in _SIZES:
        path = layers.mnt / f"f{size}"
        forget(path)
        assert path.read_bytes() == expected(size), size


def test_what_is_cached_is_not_copied_by_the_daemon(layers: Layers, live: Mount) -> None:
    rounds = 4
    with traced(live.pid, ["splice", "pread64", "preadv2"], layers.base / "trace") as seen:
        for _ in range(rounds):
            for size in _SIZES:
                # One request after the other, which O_DIRECT has the kernel make as they are.
                fd = os.open(layers.mnt / f"f{size}", os.O_RDONLY | os.O_DIRECT)
                try:
                    for offset in range(0, size, 128 << 10):
                        assert os.pread(fd, 128 << 10, offset) == expected(size)[offset : offset + (128 << 10)]
                finally:
                    os.close(fd)
    lines = [line for line in seen() if "unfinished" not in line]
    spliced = sum(int(line.rpartition(" = ")[2]) for line in lines if "splice" in line)
    copied = sum(int(line.rpartition(" = ")[2]) for line in lines if "read" in line and " = -1" not in line)
    # Each byte goes once from the file and once to the kernel, but for the last pieces of files, which may be small.
    # Now and then one is copied: where a thread has answered and not yet put the pipe back, or pages were forgotten.
    assert spliced > 1.5 * rounds * sum(_SIZES)
    assert copied < 0.25 * rounds * sum(_SIZES)


@pytest.mark.parametrize("offset", [1, _PAGE - 1, _PAGE + 5, (1 << 20) - 3])
@pytest.mark.parametrize("length", [32 << 10, 300_001, 512 << 10, 1 << 20])
def test_any_part_of_a_file_is_read(layers: Layers, live: Mount, offset: int, length: int) -> None:
    size = _SIZES[-1]
    fd = os.open(layers.mnt / f"f{size}", os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.pread(fd, length, offset) == expected(size)[offset : offset + length]
    finally:
        os.close(fd)


@pytest.mark.parametrize("what", ["error=EINVAL", "error=EAGAIN", "error=ENOMEM", "retval=0"])
@pytest.mark.parametrize("which", ["1+2", "2+3", "3+2", "1", "2+2", "1+1"])
def test_what_can_not_be_sent_so_is_copied(layers: Layers, live: Mount, what: str, which: str) -> None:
    """Whichever step fails, nothing of it is left in the pipe for the next answer."""
    read_all(layers)
    with traced(live.pid, ["splice"], layers.base / "trace", f"{what}:when={which}") as seen:
        for _ in range(3):
            read_all(layers)
    assert any("INJECTED" in line for line in seen())
    read_all(layers)


def test_without_pipes_data_is_copied(layers: Layers, live: Mount) -> None:
    with traced(live.pid, ["pipe2"], layers.base / "trace", "error=EMFILE") as seen:
        read_all(layers)
    assert any("INJECTED" in line for line in seen())
    read_all(layers)


def test_a_file_that_changes_meanwhile_shows_nothing_but_its_own_data(layers: Layers, live: Mount) -> None:
    pattern = expected(1 << 20)
    path = layers.mnt / "changing"
    path.write_bytes(pattern)
    ended = threading.Event()
    wrong: list[int] = []

    def read(seed: int) -> None:
        chosen = random.Random(seed)
        with path.open("rb", buffering=0) as file:
            while not ended.is_set():
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                offset = chosen.randrange(0, len(pattern) - _PAGE)
                data = os.pread(file.fileno(), 512 << 10, offset)
                if any(byte not in (0, pattern[offset + at]) for at, byte in enumerate(data)):
                    wrong.append(offset)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    try:
        with path.open("r+b", buffering=0) as file:
            chosen = random.Random(1)
            for _ in range(150):
                file.truncate(chosen.randrange(len(pattern)))
                file.seek(0)
                file.write(pattern)
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert wrong == []


def test_who_is_killed_while_it_reads_leaves_nothing_to_others(layers: Layers, live: Mount) -> None:
    size = _SIZES[-1]
    script = 'while dd if="$1" of=/dev/null bs=1M iflag=direct status=none; do :; done'
    for _ in range(20):
        reader = subprocess.Popen(["sh", "-c", script, "sh", layers.mnt / f"f{size}"], start_new_session=True)
        try:
            read_all(layers)
        finally:
            os.killpg(reader.pid, signal.SIGKILL)
            reader.wait(_LIMIT)
    read_all(layers)
