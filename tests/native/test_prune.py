"""max_nodes: the kernel is asked to forget what was looked up longest ago, so that the daemon's memory stays bounded.

Source: struct fuse_notify_prune_out in include/uapi/linux/fuse.h, fuse_notify_prune in fs/fuse/dev.c.
"""

import os
import struct
from pathlib import Path

import pytest

from tests.native.messages import lay_out
from tests.native.wire import Wire, served
from tests.support.mounts import Mount, our_mount

FORGET = 2
FILES = 20_000


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lay_out(tmp_path)
    (tmp_path / "mnt").mkdir()
    for number in range(400):
        (tmp_path / "lower" / f"f{number}").touch()
    return tmp_path


@pytest.fixture
def many(base: Path) -> Path:
    """FILES files in directories of a hundred."""
    for number in range(FILES // 100):
        directory = base / "lower" / "many" / f"d{number}"
        directory.mkdir(parents=True)
        for file in range(100):
            (directory / f"f{file}").touch()
    return base


def asked_for(message: bytes) -> tuple[int, ...]:
    """The nodes that a message asks the kernel to forget."""
    length, code, unique, count, padding, spare = struct.unpack_from("=IiQIIQ", message)
    assert (length, code, unique, padding, spare) == (len(message), 9, 0, 0, 0)
    return struct.unpack_from(f"={count}Q", message, 32)


def look_up(client: Wire, names: range) -> list[int]:
    return [client.look_up(b"f%d" % number) for number in names]


def test_nodes_beyond_the_bound_are_asked_for_the_oldest_first(base: Path) -> None:
    with served(base, max_nodes=200) as client:
        d = client.look_up(b"d")
        below = client.ask(1, d, b"below\0").unpack("Q120x")[0]
        # With the root these are 200.
        known = look_up(client, range(197))
        client.send(client.pack(1, 1, b"f197\0"))
        answers = [client.receive(), client.receive()]
        (asked,) = (asked_for(message) for message in answers if message[8:16] == bytes(8))
        # Neither the root nor the directory that has something below it.
        assert asked == (below, *known[:63])
        for node in asked:
            client.tell(FORGET, node, struct.pack("=Q", 1))
        # What had its turn doesn't get it again before the others: now the directory has nothing below it.
        look_up(client, range(198, 261))
        client.send(client.pack(1, 1, b"f261\0"))
        answers = [client.receive(), client.receive()]
        (asked,) = (asked_for(message) for message in answers if message[8:16] == bytes(8))
        assert asked[:3] == tuple(known[63:66]) and d not in asked[:60]


def test_without_a_bound_nothing_is_asked_for(base: Path) -> None:
    with served(base) as client:
        look_up(client, range(400))
        client.serves()


def private(live: Mount) -> int:
    """KiB of memory that the daemon has for itself."""
    for line in Path(f"/proc/{live.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")


def walked(base: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(base / "mnt" / "many"))


def test_a_file_that_the_kernel_knows_takes_some_four_hundred_bytes(many: Path) -> None:
    """At a million, 380; with as few as here the dict of nodes has more room to spare."""
    with our_mount(many / "mnt", [many / "lower"], many / "upper", many / "work", "engine=native") as live:
        before = private(live)
        assert walked(many) == FILES
        assert (private(live) - before) * 1024 / (FILES + FILES // 100) < 420


def test_memory_stays_bounded_while_many_files_are_walked(many: Path, uring: str) -> None:
    base = many
    options = f"engine=native,max_nodes=2000,uring={uring}"
    with our_mount(base / "mnt", [base / "lower"], base / "upper", base / "work", options) as live:
        before = private(live)
        for _ in range(2):
            assert walked(base) == FILES
        # 400 bytes for each of 20,000 would be 7,800 KiB; what is open or in use is never forgotten.
        assert private(live) - before < 4_000
        with (base / "mnt" / "u").open("rb") as held:
            os.chdir(base / "mnt" / "many" / "d7")
            try:
                assert walked(base) == FILES
                assert held.read() == b"of the upper layer"
                assert len(os.listdir(".")) == 100
                Path("f3").write_bytes(b"written")
            finally:
                os.chdir("/")
        assert (base / "upper" / "many" / "d7" / "f3").read_bytes() == b"written"
