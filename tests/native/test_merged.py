"""Directories of several layers are listed alike whichever layer hides a name, and in which way."""

import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.mounts import Mount, our_mount

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


@pytest.mark.parametrize("engine", ["native", "portable"])
@pytest.mark.parametrize("key", ["user.fuseoverlayfs.opaque", "trusted.overlay.opaque"])
@pytest.mark.parametrize("opaque", [("upper",), ("top",), ("upper", "top")], ids="-".join)
@pytest.mark.parametrize("first", ["names", "listing"])
def test_an_opaque_directory_hides_what_is_below_it_whoever_marked_it(
    layers: Layers, engine: str, key: str, opaque: tuple[str, ...], first: str
) -> None:
    at = {"upper": layers.upper, "top": layers.add("top"), "bottom": layers.lower}
    for name, layer in at.items():
        (layer / "d" / "deep").mkdir(parents=True)
        (layer / "d" / f"of-{name}").write_text(name)
        (layer / "d" / "deep" / f"of-{name}").write_text(name)
    for name in opaque:
        os.setxattr(at[name] / "d", key, b"y")
    hides = list(at).index(opaque[0]) + 1
    shown, hidden = {f"of-{name}" for name in list(at)[:hides]}, {f"of-{name}" for name in list(at)[hides:]}

    def check(directory: Path, further: set[str]) -> None:
        def names() -> None:
            assert all((directory / name).exists() for name in shown | further)
            assert not any((directory / name).exists() for name in hidden)

        def listing() -> None:
            assert set(os.listdir(directory)) == shown | further

        for look in (names, listing) if first == "names" else (listing, names):
            look()

    def mounted() -> AbstractContextManager[Mount]:
        return our_mount(layers.mnt, [at["top"], at["bottom"]], layers.upper, layers.work, f"engine={engine}")

    d = layers.mnt / "d"
    with mounted():
        check(d, {"deep"})
        check(d / "deep", set())
        for name in shown:
            (d / name).chmod(0o600)
            (d / "deep" / name).write_text("changed")
        check(d, {"deep"})
        check(d / "deep", set())
    with mounted():
        check(d, {"deep"})
        check(d / "deep", set())
        (d / next(iter(hidden))).write_text("new")
        assert set(os.listdir(d)) == {*shown, "deep", next(iter(hidden))}


@pytest.mark.parametrize("engine", ["native", "portable"])
def test_a_directory_stays_opaque_when_it_is_copied_up(layers: Layers, engine: str) -> None:
    top = layers.add("top")
    for layer in (top, layers.lower):
        (layer / "d").mkdir()
    os.setxattr(top / "d", "user.fuseoverlayfs.opaque", b"y")
    (layers.lower / "d" / "x").write_text("below")
    for turn in range(2):
        with our_mount(layers.mnt, [top, layers.lower], layers.upper, layers.work, f"engine={engine}"):
            assert not (layers.mnt / "d" / "x").exists()
            (layers.mnt / "d").chmod(0o700 + turn)
            (layers.mnt / "d" / str(turn)).touch()
            assert set(os.listdir(layers.mnt / "d")) == {str(number) for number in range(turn + 1)}
            assert not (layers.mnt / "d" / "x").exists()


@pytest.mark.parametrize("engine", ["native", "portable"])
@pytest.mark.parametrize("mark", [".wh.d", "d/.wh..wh..opq"], ids=["beside", "inside"])
@pytest.mark.parametrize("where", ["upper", "top"])
@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("first", ["names", "listing"])
def test_a_mark_ends_a_directory_whatever_was_asked_before(
    layers: Layers, engine: str, mark: str, where: str, count: int, first: str
) -> None:
    lowers = [layers.add(f"lower-{number}") for number in range(count)]
    marked = {"upper": layers.upper, "top": lowers[0]}[where]
    for number, layer in enumerate((layers.upper, *lowers)):
        for name in ("d", "whole"):
            (layer / name).mkdir()
            (layer / name / f"of-{number}").touch()
    (marked / mark).touch()
    shown = {"of-0"} if where == "upper" else {"of-0", "of-1"}
    with our_mount(layers.mnt, lowers, layers.upper, layers.work, f"engine={engine}"):
        if first == "listing":
            assert set(os.listdir(layers.mnt)) == {"d", "whole"}
        assert not (layers.mnt / "d" / f"of-{count}").exists()
        assert set(os.listdir(layers.mnt / "d")) == shown
        assert len(os.listdir(layers.mnt / "whole")) == count + 1
