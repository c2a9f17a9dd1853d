"""A layer changed behind the overlay's back: errors perhaps, but no hanging, no crash, nothing outside touched."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.core.conftest import Maker
from tests.core.rig import Rig
from tests.hostile.canary import Canary
from tests.hostile.everything import CHANGING, LOOKING, do, remove_all
from tests.hostile.test_marks import fairly, use
from tests.support import trees
from tests.support.mounts import our_mount
from tests.support.trees import Node

LAYER = (
    Node(b"d/f", data=b"data"),
    Node(b"d/sub/secret", data=b"inside"),
    Node(b"file", data=b"data"),
    Node(b"one", data=b"linked"),
    Node(b"two", "link", data=b"one"),
    Node(b"link", "symlink", data=b"file"),
)
PATHS = (b"d/f", b"d/sub/secret", b"d/sub", b"d", b"file", b"one", b"two", b"link")


def replace_by_link(path: Path, outside: Path) -> None:
    remove(path)
    path.symlink_to(outside)


def replace_by_link_to_file(path: Path, outside: Path) -> None:
    remove(path)
    path.symlink_to(outside / "secret")


def replace_by_fifo(path: Path, outside: Path) -> None:
    remove(path)
    os.mkfifo(path)


def replace_by_device(path: Path, outside: Path) -> None:
    remove(path)
    os.mknod(path, 0o20666, os.makedev(1, 5))


def replace_by_file(path: Path, outside: Path) -> None:
    remove(path)
    path.write_bytes(b"another")


def replace_by_directory(path: Path, outside: Path) -> None:
    remove(path)
    path.mkdir()
    (path / "secret").write_bytes(b"another inside")


def remove(path: Path, outside: Path | None = None) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


HOW: tuple[Callable[[Path, Path], None], ...] = (
    replace_by_link,
    replace_by_link_to_file,
    replace_by_fifo,
    replace_by_device,
    replace_by_file,
    replace_by_directory,
    remove,
)
WHAT = ("d/f", "d/sub", "d", "file", "one", "link")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layer", ["lower0", "upper"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_change_behind_its_back_is_no_way_out(
    make: Maker, canary: Canary, how: Callable[[Path, Path], None], layer: str, cached: bool
) -> None:
    rig = make(LAYER, (Node(b"d/sub/deepest", data=b"d"),), upper=LAYER if layer == "upper" else ())
    for what in WHAT:
        look(rig)
        how(make.base / layer / what, canary.path)
        if not cached:
            rig.fs.dirs.close()
            rig.fs.files.close()
        for path in PATHS:
            use(rig, path)
        make.again(rig)


def look(rig: Rig) -> None:
    """Have everything known and cached that there is."""
    for path in PATHS:
        with fairly():
            rig.attr(path)
            rig.xattrs(path)
        with fairly():
            rig.read(path)
        with fairly():
            rig.names(path)


def test_a_directory_of_the_upper_layer_turned_into_a_link_is_not_written_through(make: Maker, canary: Canary) -> None:
    rig = make(LAYER)
    rig.create(b"d/new")
    rig.node(b"d/sub")
    shutil.rmtree(make.upper / "d")
    (make.upper / "d").symlink_to(canary.path)
    rig.fs.dirs.close()
    calls: tuple[Callable[[], object], ...] = (
        lambda: rig.create(b"d/another"),
        lambda: rig.mkdir(b"d/another"),
        lambda: rig.write(b"d/sub/secret", b"W"),
        lambda: rig.unlink(b"d/new"),
        lambda: rig.rename(b"file", b"d/secret"),
    )
    for call in calls:
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENOENT, errno.ESTALE)


@pytest.mark.parametrize("how", HOW)
def test_a_mount_goes_on_when_its_layer_is_changed(
    layers: Layers, canary: Canary, how: Callable[[Path, Path], None]
) -> None:
    trees.build(os.fsencode(layers.lower), LAYER)
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "timeout=0", limit=60):
        held = [os.open(layers.mnt / name, os.O_RDONLY) for name in ("d", "d/f", "file", "one")]
        for what in WHAT:
            how(layers.lower / what, canary.path)
            do(layers.mnt, *LOOKING)
        for descriptor in held[1:]:
            with fairly():
                os.pread(descriptor, 10, 0)
        do(layers.mnt, *CHANGING)
        remove_all(layers.mnt)
        (layers.mnt / "still alive").write_bytes(b"yes")
        assert (layers.mnt / "still alive").read_bytes() == b"yes"
        for descriptor in held:
            with fairly():
                os.close(descriptor)


def test_a_layer_moved_away_is_still_the_layer(layers: Layers) -> None:
    trees.build(os.fsencode(layers.lower), LAYER)
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work):
        layers.lower.rename(layers.base / "elsewhere")
        layers.lower.mkdir()
        assert (layers.mnt / "d/f").read_bytes() == b"data"
        (layers.mnt / "d/f").write_bytes(b"new")
    assert (layers.base / "elsewhere/d/f").read_bytes() == b"data"
