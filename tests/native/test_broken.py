"""A name that can't be looked up breaks no listing, and what a listing tells is kept no longer than it has to be."""

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.overlay import Overlay
from tests.conftest import Layers
from tests.native import wire
from tests.native.faulty import BAD, GOOD, NAMES
from tests.native.messages import lay_out
from tests.native.other import served_by
from tests.native.wire import Wire, entries, served
from tests.support.mounts import our_mount


@pytest.fixture
def switch(layers: Layers) -> Iterator[Path]:
    """Names of the lower layer are broken while this file is there."""
    path = layers.base / "switch"
    with served_by("tests.native.faulty", layers.lower, path):
        yield path


def is_broken(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.EIO
    return False


@pytest.mark.parametrize("engine", ["native", "portable"])
@pytest.mark.parametrize("above", [False, True], ids=["alone", "merged"])
def test_a_broken_name_is_listed_and_whoever_uses_it_gets_the_error(
    layers: Layers, switch: Path, engine: str, above: bool
) -> None:
    switch.touch()
    lowers = [layers.add("top"), layers.lower] if above else [layers.lower]
    with our_mount(layers.mnt, lowers, layers.upper, layers.work, f"engine={engine}"):
        assert sorted(os.listdir(os.fsencode(layers.mnt))) == list(NAMES)
        assert [name for name in os.listdir(layers.mnt) if is_broken(layers.mnt / name)] == [
            name for name in os.listdir(layers.mnt) if name.encode() in BAD
        ]
        switch.unlink()
        assert not any(is_broken(layers.mnt / os.fsdecode(name)) for name in NAMES)


def test_a_name_that_breaks_once_it_is_known_is_listed(layers: Layers, switch: Path) -> None:
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native,timeout=0"):
        held = [os.open(layers.mnt / os.fsdecode(name), os.O_PATH) for name in BAD]
        switch.touch()
        assert sorted(os.listdir(os.fsencode(layers.mnt))) == list(NAMES)
        assert all(is_broken(layers.mnt / os.fsdecode(name)) for name in BAD)
        for fd in held:
            os.close(fd)


def read_on(client: Wire, opcode: int, size: int) -> list[wire.Entry]:
    """All that READDIR or READDIRPLUS tells of the root, in answers of `size` bytes."""
    found: list[wire.Entry] = []
    while True:
        at = found[-1].position if found else 0
        answer = client.ask(opcode, 1, struct.pack("=QQIIQII", 0, at, size, 0, 0, 0, 0))
        assert answer.error == 0
        if not answer.body:
            return found
        found += entries(answer.body, plus=opcode == wire.READDIRPLUS)


def forget(client: Wire, listed: list[wire.Entry]) -> None:
    for one in listed:
        if one.node:
            client.tell(wire.FORGET, one.node, struct.pack("=Q", 1))


@pytest.mark.parametrize("size", [400, 1000, 65536])
@pytest.mark.parametrize("known", [False, True])
def test_the_kernel_can_forget_all_that_a_listing_with_broken_names_told(
    layers: Layers, switch: Path, overlays: list[Overlay], size: int, known: bool
) -> None:
    with served(layers.base, timeout=0.0) as client:
        nodes = [client.look_up(name) for name in BAD] if known else []
        switch.touch()
        for opcode in (wire.READDIR, wire.READDIRPLUS):
            found = read_on(client, opcode, size)
            assert sorted(one.name for one in found if one.name not in (b".", b"..")) == list(NAMES)
        assert {one.name for one in found if one.node} == set(GOOD)
        forget(client, found)
        for node in nodes:
            client.tell(wire.FORGET, node, struct.pack("=Q", 1))
        assert set(overlays[0].nodes.by_id) == {1}


def failing_for(bad: bytes, lookup: Callable[..., object]) -> Callable[..., object]:
    def look_up(fs: Overlay, parent: object, name: bytes) -> object:
        if name == bad:
            raise RuntimeError(f"a defect met at {name!r}")
        return lookup(fs, parent, name)

    return look_up


def test_what_goes_wrong_in_an_unknown_way_is_met_behind_what_was_listed_before(
    tmp_path: Path, overlays: list[Overlay], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path)
    whole = struct.pack("=QQIIQII", 0, 0, 65536, 0, 0, 0, 0)
    # Squashed owners have core look up all names.
    with served(tmp_path, squash_uid=0, squash_gid=0) as client:
        listed = entries(client.ask(wire.READDIRPLUS, 1, whole).body, plus=True)
        forget(client, listed)
        *before, last = [one for one in listed if one.name not in (b".", b"..")]
        monkeypatch.setitem(OPERATIONS, "lookup", failing_for(last.name, OPERATIONS["lookup"]))
        answer = client.ask(wire.READDIRPLUS, 1, whole)
        assert answer.error == 0
        found = entries(answer.body, plus=True)
        assert [one.name for one in found] == [b".", b"..", *(one.name for one in before)]
        on = struct.pack("=QQIIQII", 0, found[-1].position, 65536, 0, 0, 0, 0)
        assert client.ask(wire.READDIRPLUS, 1, on).error == errno.EIO
        forget(client, found)
        assert set(overlays[0].nodes.by_id) == {1}
