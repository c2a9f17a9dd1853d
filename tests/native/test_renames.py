"""Files that are given other names, as the kernel's overlayfs gives them: what is to be seen, and what is stored."""

import errno
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from overlayfs_py.core.ops import OPERATIONS
from tests.conftest import Layers
from tests.native import messages, wire
from tests.native.test_whiteouts import shown
from tests.native.wire import served
from tests.support.mounts import Mount, kernel_mount, our_mount

_SOURCES = ("new", "copied", "lower", "link", "linked", "removed")
_TARGETS = ("free", "new2", "copied2", "lower2", "linked", "gone", "link2", "other/free", "other/lower", "made/free")


def lay_out(lower: Path) -> None:
    for place in ("d", "d/other"):
        (lower / place).mkdir()
        for name in ("copied", "copied2", "lower", "lower2", "linked", "gone"):
            (lower / place / name).write_text(f"{place}/{name} below")
        os.link(lower / place / "linked", lower / place / "linked2")


def prepare(top: Path) -> None:
    """Files of every kind, new ones known by the kernel, and a directory made here."""
    (top / "made").mkdir()
    for name in ("new", "new2", "removed", "other/new"):
        (top / name).write_text(f"{name} made here")
    for name in ("copied", "copied2", "other/copied"):
        with (top / name).open("a") as file:
            file.write(", and changed")
    for name in ("link", "link2"):
        os.symlink("new", top / name)
    (top / "gone").unlink()


def rename(top: Path, source: str, target: str) -> list[object]:
    """Rename, and what is to be seen then: of both names, of what was replaced, and in the listings."""
    seen: list[object] = []
    held = [os.open(top / name, os.O_RDONLY) for name in (source, target) if (top / name).exists()]
    if source == "removed":
        # Open, and without a name.
        (top / source).unlink()
    try:
        os.rename(top / source, top / target)
    except OSError as error:
        seen.append(error.errno)
    for fd in held:
        seen.append(os.read(fd, 100))
        os.close(fd)
    for name in (source, target):
        seen.append(os.path.lexists(top / name))
    seen += [sorted(os.listdir(directory)) for directory in (top, top / "other", top / "made")]
    return seen


def outcome(
    base: Path, mounted: Callable[..., AbstractContextManager[Mount]], options: str, source: str, target: str
) -> list[object]:
    layers = Layers(base, *(base / part for part in ("lower", "upper", "work", "mnt")))
    for part in (base, layers.lower, layers.upper, layers.work, layers.mnt):
        part.mkdir()
    lay_out(layers.lower)
    seen: list[object] = []
    with mounted(layers.mnt, [layers.lower], layers.upper, layers.work, f"index=on{options}"):
        prepare(layers.mnt / "d")
        seen += rename(layers.mnt / "d", source, target)
        # And back again, over a name that is free, or hides one.
        seen += rename(layers.mnt / "d", target, source)
        seen.append(shown(layers.mnt))
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "index=on"):
        seen.append(shown(layers.mnt))
    upper = shown(layers.upper)
    # A copy of ours gets all its known names in the upper layer.
    upper.pop("d/linked2", None)
    return [*seen, upper, shown(layers.lower)]


@pytest.mark.parametrize("target", _TARGETS)
def test_a_file_is_renamed_as_in_the_kernel(tmp_path: Path, uring: str, target: str) -> None:
    for source in _SOURCES:
        if source != target:
            expected = outcome(tmp_path / f"kernel-{source}", kernel_mount, "", source, target)
            ours = outcome(tmp_path / f"ours-{source}", our_mount, f",engine=native,uring={uring}", source, target)
            assert ours == expected, source


def test_what_a_rename_replaces_can_be_read_and_written_on(layers: Layers, uring: str) -> None:
    (layers.lower / "below").write_text("below")
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine=native,uring={uring}") as live:
        for name in ("below", "made"):
            (layers.mnt / "made").write_text("made")
            with (layers.mnt / name).open("r+b") as replaced:
                (layers.mnt / "new").write_text("new")
                os.rename(layers.mnt / "new", layers.mnt / name)
                assert (layers.mnt / name).read_text() == "new"
                assert replaced.read() == name.encode()
                replaced.write(b", written")
                replaced.flush()
                replaced.seek(0)
                assert replaced.read() == name.encode() + b", written"
                assert os.fstat(replaced.fileno()).st_nlink == 0
            assert (layers.mnt / name).read_text() == "new"
        assert live.problems == []


def test_files_of_the_upper_layer_are_renamed_without_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages.lay_out(tmp_path)

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EDOM, os.strerror(errno.EDOM))

    with served(tmp_path) as client:
        for name in (b"old", b"replaced"):
            assert client.ask(wire.MKNOD, 1, struct.pack("=IIII", 0o100644, 0, 0, 0) + name + b"\0").error == 0
        monkeypatch.setitem(OPERATIONS, "rename", refuse)
        for source, target in ((b"old", b"free"), (b"free", b"replaced"), (b"replaced", b"old")):
            assert client.ask(wire.RENAME, 1, struct.pack("=Q", 1) + source + b"\0" + target + b"\0").error == 0
        assert client.ask(wire.RENAME, 1, struct.pack("=Q", 1) + b"none\0free\0").error == errno.EDOM


def test_a_name_made_behind_our_back_is_replaced(layers: Layers, uring: str) -> None:
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine=native,uring={uring}"):
        (layers.mnt / "new").write_text("new")
        assert not (layers.mnt / "target").exists()
        (layers.upper / "target").write_text("unbeknown")
        os.rename(layers.mnt / "new", layers.mnt / "target")
        assert (layers.mnt / "target").read_text() == "new"
        assert os.listdir(layers.mnt) == ["target"]


def test_marks_of_other_filesystems_are_names_like_others(layers: Layers, uring: str) -> None:
    options = f"engine=native,uring={uring}"
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        (layers.mnt / "new").write_text("new")
        os.rename(layers.mnt / "new", layers.mnt / ".wh.target")
        assert os.listdir(layers.mnt) == [".wh.target"]
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        assert (layers.mnt / ".wh.target").read_text() == "new"
        os.rename(layers.mnt / ".wh.target", layers.mnt / "new")
        assert os.listdir(layers.mnt) == ["new"]
