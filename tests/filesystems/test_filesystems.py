"""Layers on every filesystem there is to be had, alone and mixed."""

import contextlib
import os
import random
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.filesystems import scenario
from tests.filesystems.disks import IMAGES, STACKED, WRITABLE, holding, writable
from tests.support import trees
from tests.support.caches import names_kept
from tests.support.mounts import MountFailed, kernel_mount, our_mount
from tests.support.syscalls import mount, umount
from tests.support.trees import Node

# Files of an overlay can't be told by their handles: hard links break, and numbers change when a copy is mounted again.
NAMELESS = {"overlay"}


def prepared(layers: Layers) -> Path:
    trees.build(os.fsencode(layers.lower), scenario.LAYER)
    return layers.lower


# A copy that can't be marked loses its number and its links when it is forgotten; and to the kernel's overlayfs what it
# copied from a mount that gives handles is stale then.
@names_kept()
def play(
    layers: Layers, lowers: list[Path], upper: Path, work: Path, *, linked: bool = True, stable: bool = True
) -> None:
    """The scenario over these layers, mounted again after it; at the end the kernel's overlayfs looks at it.

    `linked` says whether hard links survive a copy-up, `stable` whether the inode numbers of copies survive a remount.
    """
    before = [scenario.shown(lower) for lower in lowers]
    with our_mount(layers.mnt, lowers, upper, work):
        scenario.read(layers.mnt)
        old = scenario.identities(layers.mnt)
        moves = scenario.change(layers.mnt)
        scenario.changed(layers.mnt, linked=linked)
        new = scenario.identities(layers.mnt)
        tree = scenario.shown(layers.mnt)
    kept = moves if linked else {path: to for path, to in moves.items() if path != "two"}
    assert {path: new[to].ino for path, to in kept.items()} == {path: old[path].ino for path in kept}
    with our_mount(layers.mnt, lowers, upper, work):
        scenario.changed(layers.mnt, linked=linked)
        now = scenario.identities(layers.mnt)
        if stable:
            assert {path: found.ino for path, found in now.items()} == {path: found.ino for path, found in new.items()}
        assert len({found.dev for found in now.values()}) == 1
        assert not trees.compare_trees(tree, scenario.shown(layers.mnt), ["atime"])
    with kernel_mount(layers.mnt, lowers, upper, work, "redirect_dir=on,index=on" if linked else "redirect_dir=on"):
        scenario.changed(layers.mnt, linked=linked)
        assert set(scenario.identities(layers.mnt)) == set(now)
    assert [scenario.shown(lower) for lower in lowers] == before


def upper_on(place: Path) -> tuple[Path, Path]:
    (place / "upper").mkdir()
    (place / "work").mkdir()
    return place / "upper", place / "work"


@pytest.mark.parametrize("kind", WRITABLE)
def test_an_upper_layer_works_on(layers: Layers, kind: str) -> None:
    with writable(kind, layers.base) as place:
        play(layers, [prepared(layers)], *upper_on(place))


@pytest.mark.parametrize("kind", [*WRITABLE, *IMAGES, *STACKED])
def test_a_lower_layer_works_on(layers: Layers, kind: str) -> None:
    with holding(kind, prepared(layers), layers.base) as lower:
        play(layers, [lower], layers.upper, layers.work, linked=kind not in NAMELESS, stable=kind not in NAMELESS)


@pytest.mark.parametrize("kind", WRITABLE)
def test_all_layers_work_on(layers: Layers, kind: str) -> None:
    with holding(kind, prepared(layers), layers.base) as lower:
        play(layers, [lower], *upper_on(lower.parent))


@pytest.mark.parametrize("kind", WRITABLE)
def test_layers_on_many_filesystems_make_one(layers: Layers, kind: str) -> None:
    """Objects of the same real inode number are told apart, and all directories merge."""
    tree = prepared(layers)
    with contextlib.ExitStack() as stack:
        lowers = [layers.add("top")]
        trees.build(os.fsencode(lowers[0]), (Node(b"other/top", data=b"top"),))
        for other in ("ext4", "xfs", "btrfs", "tmpfs", "erofs"):
            if other != kind:
                lowers.append(stack.enter_context(holding(other, tree, layers.base)))
        place = stack.enter_context(writable(kind, layers.base))
        play(layers, lowers, *upper_on(place))


def test_layers_whose_filesystems_have_no_name_merge_though_hard_links_break(layers: Layers) -> None:
    tree = prepared(layers)
    with holding("squashfs", tree, layers.base) as one, holding("ours", tree, layers.base) as other:
        play(layers, [one, other], layers.upper, layers.work, linked=False, stable=False)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_copy_shares_its_extents_with_the_original_on(layers: Layers, kind: str) -> None:
    size = 24 << 20
    with writable(kind, layers.base) as place:
        lower = place / "lower"
        lower.mkdir()
        (lower / "big").write_bytes(random.Random(3).randbytes(size))
        os.sync()
        before = os.statvfs(place)
        with our_mount(layers.mnt, [lower], *upper_on(place)):
            with open(layers.mnt / "big", "r+b") as file:
                file.write(b"W")
            os.sync()
            after = os.statvfs(place)
            data = (layers.mnt / "big").read_bytes()
        assert (before.f_bfree - after.f_bfree) * before.f_frsize < size // 4
        assert data == b"W" + (lower / "big").read_bytes()[1:]


def test_an_upper_layer_on_a_filesystem_without_xattrs_is_refused_with_one_line(layers: Layers) -> None:
    place, log = layers.add("ramfs"), layers.base / "log"
    mount(b"ramfs", os.fsencode(place), b"ramfs")
    try:
        upper, work = upper_on(place)
        with (
            pytest.raises(MountFailed, match="was not mounted"),
            our_mount(layers.mnt, [layers.lower], upper, work, log=log),
        ):
            pass
        assert os.listdir(upper) == []
    finally:
        umount(os.fsencode(place))
    (line,) = log.read_text().splitlines()
    assert "cannot hold trusted.overlay.* xattrs" in line
    assert "use another one" in line


def test_a_work_directory_on_another_filesystem_is_refused_with_one_line(layers: Layers) -> None:
    log = layers.base / "log"
    with writable("tmpfs", layers.base) as place:
        _, work = upper_on(place)
        with (
            pytest.raises(MountFailed, match="was not mounted"),
            our_mount(layers.mnt, [layers.lower], layers.upper, work, log=log),
        ):
            pass
    (line,) = log.read_text().splitlines()
    assert "workdir" in line
    assert "upperdir" in line
