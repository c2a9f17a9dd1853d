"""Directories of several layers are listed alike whichever layer hides a name, and in which way."""

import os
import stat
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.mounts import our_mount

_STACK = ("upper", "top", "middle", "bottom")


def hide(directory: Path, name: str, how: str) -> None:
    if how == "device":
        os.mknod(directory / name, stat.S_IFCHR, os.makedev(0, 0))
    elif how == "xattr":
        (directory / name).touch()
        os.setxattr(directory / name, "trusted.overlay.whiteout", b"")
        os.setxattr(directory, "trusted.overlay.opaque", b"x")
        # What tells that a layer may hold such.
        os.setxattr(directory.parent, "trusted.overlay.opaque", b"x")
    else:
        (directory / f".wh.{name}").touch()


@pytest.mark.parametrize("engine", ["native", "portable"])
@pytest.mark.parametrize("how", ["device", "xattr", "mark"])
@pytest.mark.parametrize("where", _STACK[:-1])
def test_a_layer_hides_what_is_below_it_alone(layers: Layers, engine: str, how: str, where: str) -> None:
    at = {"upper": layers.upper, "bottom": layers.lower, "top": layers.add("top"), "middle": layers.add("middle")}
    place = _STACK.index(where)
    shown = {"shared"}
    for index, name in enumerate(_STACK):
        directory = at[name] / "d"
        directory.mkdir()
        names = {"shared", f"of-{name}"}
        shown |= names
        if index < place:
            names.add("above")
            shown.add("above")
        if index > place:
            names |= {"gone", "above"}
        for each in names:
            (directory / each).write_text(name)
    for name in ("gone", "above"):
        hide(at[where] / "d", name, how)
    lowers = [at[name] for name in _STACK[1:]]
    with our_mount(layers.mnt, lowers, layers.upper, layers.work, f"engine={engine}"):
        assert set(os.listdir(layers.mnt / "d")) == shown
        assert (layers.mnt / "d" / "shared").read_text() == "upper"
        assert (layers.mnt / "d" / "above").exists() == (place > 0)
        assert not (layers.mnt / "d" / "gone").exists()
        (layers.mnt / "d" / "gone").write_text("back")
        (layers.mnt / "d" / "of-bottom").unlink()
        assert set(os.listdir(layers.mnt / "d")) == (shown | {"gone"}) - {"of-bottom"}
