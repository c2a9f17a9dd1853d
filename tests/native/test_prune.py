"""max_nodes: the kernel is asked to forget what was looked up longest ago, so that the daemon's memory stays bounded.

Source: struct fuse_notify_prune_out in include/uapi/linux/fuse.h, fuse_notify_prune in fs/fuse/dev.c.
"""

import struct
from pathlib import Path

import pytest

from tests.native.messages import lay_out
from tests.native.wire import Wire, served

FORGET = 2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lay_out(tmp_path)
    for number in range(400):
        (tmp_path / "lower" / f"f{number}").touch()
    return tmp_path


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
