"""Inode numbers: one space, stable across copy-up, rename and remount, whatever filesystems the layers are on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs_py.core.layers import Numbers
from overlayfs_py.core.nodes import ROOT_ID
from overlayfs_py.core.overlay import Overlay
from tests.core.conftest import Maker
from tests.core.rig import Rig, configure
from tests.support import trees
from tests.support.syscalls import mount, umount
from tests.support.trees import Node

LAYER = (
    Node(b"a", data=b"a"),
    Node(b"d/x", data=b"x"),
    Node(b"d/sub/y", data=b"y"),
    Node(b"s", kind="symlink", data=b"t"),
)
OTHER = (Node(b"other", data=b"o"), Node(b"d/z", data=b"z"))


def numbers(rig: Rig) -> dict[bytes, int]:
    return {path: rig.attr(path).ino for path in rig.tree()}


@pytest.fixture
def tmpfs(make: Maker) -> Iterator[Path]:
    """A filesystem besides the one of the upper layer."""
    path = make.layers.add("tmpfs")
    mount(b"tmpfs", os.fsencode(path), b"tmpfs")
    try:
        yield path
    finally:
        make.stack.close()
        umount(os.fsencode(path))


def test_copying_up_renaming_and_remounting_keep_the_number(make: Maker) -> None:
    rig = make(LAYER)
    before = numbers(rig)
    rig.write(b"a", b"A")
    rig.change(b"s", uid=3)
    rig.write(b"d/sub/y", b"Y")
    assert numbers(rig) == before
    rig.rename(b"d/sub", b"moved")
    rig.rename(b"a", b"d/a")
    moved = {b"moved": before[b"d/sub"], b"moved/y": before[b"d/sub/y"], b"d/a": before[b"a"], b"s": before[b"s"]}
    for _ in make.now_and_again(rig):
        now = numbers(rig)
        assert {path: now[path] for path in moved} == moved


@pytest.mark.parametrize("where", ["lower", "upper", "both"])
def test_layers_on_different_filesystems_share_one_number_space(make: Maker, tmpfs: Path, where: str) -> None:
    first, second = make.layers.add("first"), tmpfs / "second"
    second.mkdir()
    trees.build(os.fsencode(first), LAYER)
    trees.build(os.fsencode(second), OTHER)
    home = make.base if where == "lower" else tmpfs
    lowers = [first] if where == "upper" else [first, second]
    upper, work = home / "u", home / "w"
    upper.mkdir()
    work.mkdir()
    config = configure(lowers, upper, work)
    rig = Rig(Overlay.open(config))
    make.stack.callback(lambda: rig.fs.close())
    before = numbers(rig)
    assert len(set(before.values())) == len(before)
    for path in (b"a", b"d/x", b"d/sub/y") if where == "upper" else (b"a", b"d/x", b"other", b"d/z"):
        rig.write(path, b"W")
    rig.create(b"new")
    for _ in make.now_and_again(rig):
        after = numbers(rig)
        assert {path: after[path] for path in before} == before
        assert len(set(after.values())) == len(after)


def test_a_directory_has_the_number_of_its_topmost_lower_part(make: Maker) -> None:
    rig = make(LAYER, OTHER)
    before = rig.attr(b"d").ino
    assert before == os.stat(make.base / "lower0/d").st_ino
    rig.create(b"d/new")
    assert rig.attr(b"d").ino == make.again(rig).attr(b"d").ino == before


def test_the_root_is_node_one(make: Maker) -> None:
    assert make(LAYER).fs.root.id == ROOT_ID


def test_numbers_fit_into_32_bits_where_asked(make: Maker, tmpfs: Path) -> None:
    trees.build(os.fsencode(tmpfs), OTHER)
    first = make.layers.add("first")
    trees.build(os.fsencode(first), LAYER)
    rig = Rig(Overlay.open(configure([first, tmpfs], make.upper, make.layers.work, ino32=True)))
    make.stack.callback(lambda: rig.fs.close())
    found = numbers(rig)
    assert len(set(found.values())) == len(found)
    assert max(found.values()) < 1 << 32


def test_a_removed_and_a_new_object_are_different(make: Maker) -> None:
    rig = make(LAYER)
    with rig.opened(b"a") as file:
        rig.unlink(b"a")
        made = rig.create(b"a", b"new")
        assert made is not file.node
        assert made.id != file.node.id
        assert rig.read_file(file) == b"a"


def test_making_and_removing_a_file_again_and_again_leaves_no_node_behind(make: Maker) -> None:
    rig = make(LAYER)
    for round_ in range(50):
        node = rig.create(b"new", b"%d" % round_)
        rig.unlink(b"new")
        rig.forget(node)
    assert len(rig.fs.nodes.by_id) < 10


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("inode", [1, 0x7FFF_FFFF, 0x1234_5678_9ABC, 1 << 58])
def test_a_number_tells_the_filesystem_and_the_inode_it_stands_for(
    make: Maker, bits: int, devices: int, inode: int
) -> None:
    layers = make(LAYER).fs.layers
    numbers = Numbers(layers, bits=bits)
    first = layers[0].dev
    for device in range(first + 1, first + devices):
        numbers.number(device, 1)
    for device in range(first, first + devices):
        number = numbers.number(device, inode)
        assert 0 < number < 1 << bits
        if inode < 1 << bits // 2:
            assert numbers.split(number) == (device, inode)
