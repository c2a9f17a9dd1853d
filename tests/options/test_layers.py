"""Naming layers: escapes, relative paths, symbolic links, many of them, data-only ones."""

import os
import time
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.conftest import PORTABLE
from tests.options.rig import holds_data, mounted
from tests.support.mounts import MountFailed, escape, kernel_mount, our_mount
from tests.support.trees import read_tree


def words(*options: str | bytes, engine: str) -> bytes:
    """One `-o` argument; `our_mount` gets it whole as its options, behind a first lowerdir that it replaces."""
    return b",".join((*(os.fsencode(option) for option in options), engine.encode()))


def test_escapes_take_away_the_meaning_of_colons_and_commas(layers: Layers, engine: str) -> None:
    odd = [layers.add(name) for name in ("a:b", "c,d", "e\\f", "g\\:h", "up:per,x", "wo,rk:y", "plus:one")]
    for number, path in enumerate([*odd[:4], odd[6]]):
        (path / f"in-{number}").write_text(str(number))
    unescaped = os.fsencode(odd[6])  # lowerdir+ takes its colons as they are
    options = words(b"lowerdir+=" + unescaped, engine=engine)
    with our_mount(layers.mnt, odd[:4], odd[4], odd[5], options):
        assert sorted(os.listdir(layers.mnt)) == [f"in-{number}" for number in range(5)]
        (layers.mnt / "new").write_text("new")
    assert (odd[4] / "new").read_text() == "new"


def test_relative_paths_start_at_the_callers_directory(
    layers: Layers, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layers.lower / "a").write_text("lower")
    (layers.base / "sub").mkdir()
    monkeypatch.chdir(layers.base / "sub")
    with our_mount(layers.mnt, ["../lower", "../sub"], "../upper", "../work", engine):
        (layers.mnt / "a").write_text("upper")
    assert (layers.upper / "a").read_text() == "upper"


def test_links_to_layers_are_followed_once_when_mounting(layers: Layers, engine: str) -> None:
    other = layers.add("other")
    (layers.lower / "a").write_text("first")
    (other / "a").write_text("second")
    (layers.base / "link").symlink_to("chain")
    (layers.base / "chain").symlink_to(layers.lower)
    (layers.base / "up").symlink_to("upper")
    (layers.base / "wk").symlink_to("work")
    with our_mount(layers.mnt, [layers.base / "link"], layers.base / "up", layers.base / "wk", engine):
        (layers.base / "chain").unlink()
        (layers.base / "chain").symlink_to(other)
        assert (layers.mnt / "a").read_text() == "first"
        (layers.mnt / "b").write_text("")
    assert (layers.upper / "b").exists()


def test_five_hundred_layers_are_merged_the_topmost_first(layers: Layers, engine: str) -> None:
    store = layers.add("l")
    for number in range(500):
        layer = store / str(number)
        layer.mkdir()
        (layer / "same").write_text(str(number))
        (layer / f"only-{number}").write_text(str(number))
        (layer / "d").mkdir()
        (layer / "d" / str(number)).write_text("")
    lowers = [store / str(number) for number in range(500)]
    with our_mount(layers.mnt, lowers, layers.upper, layers.work, engine):
        assert (layers.mnt / "same").read_text() == "0"
        assert len(os.listdir(layers.mnt)) == 502
        assert len(os.listdir(layers.mnt / "d")) == 500
        assert (layers.mnt / "only-499").read_text() == "499"
        (layers.mnt / "d" / "499").unlink()
        (layers.mnt / "only-250").write_text("changed")
        assert len(os.listdir(layers.mnt / "d")) == 499
    assert (layers.upper / "only-250").read_text() == "changed"
    with pytest.raises(MountFailed, match="501 lower layers are too many; the limit is 500"):
        with our_mount(layers.mnt, [*lowers, layers.lower], options=engine):
            pass


def metacopy_without_data(path: Path, size: int, where: str) -> None:
    """A file that has its metadata here, and its data at `where` in a data-only layer."""
    path.touch()
    os.truncate(path, size)
    path.chmod(0o640)
    os.setxattr(path, "trusted.overlay.metacopy", b"")
    os.setxattr(path, "trusted.overlay.redirect", where.encode())


@pytest.mark.parametrize("metacopy", ["metacopy=on", ""])
def test_data_only_layers_hold_contents_and_show_no_names(layers: Layers, engine: str, metacopy: str) -> None:
    data, more = layers.add("data"), layers.add("more")
    (data / "blobs").mkdir()
    (data / "blobs" / "one").write_text("contents")
    (more / "two").write_text("further")
    metacopy_without_data(layers.lower / "a", 8, "/blobs/one")
    metacopy_without_data(layers.lower / "b", 7, "/two")

    def check() -> None:
        assert sorted(os.listdir(layers.mnt)) == ["a", "b"]
        assert ((layers.mnt / "a").read_text(), (layers.mnt / "b").read_text()) == ("contents", "further")
        assert (layers.mnt / "a").stat().st_mode & 0o777 == 0o640

    joined = b"%s::%s::%s" % (escape(layers.lower), escape(data), escape(more))
    upper = f"upperdir={layers.upper},workdir={layers.work}"
    options = words(b"lowerdir=" + joined, upper, metacopy, engine=engine)
    with our_mount(layers.mnt, [layers.lower], options=options):
        check()
        (layers.mnt / "a").chmod(0o600)
        with (layers.mnt / "b").open("a") as file:
            file.write(" and more")
        assert ((layers.mnt / "a").read_text(), (layers.mnt / "b").read_text()) == ("contents", "further and more")
    assert (data / "blobs" / "one").read_text() == "contents"
    assert holds_data(layers.upper / "a") == (metacopy != "metacopy=on")


def test_data_only_layers_look_as_they_do_to_the_kernel(layers: Layers, engine: str) -> None:
    data = layers.add("data")
    (data / "one").write_text("contents")
    metacopy_without_data(layers.lower / "a", 8, "/one")
    started = time.time_ns()
    both = b"lowerdir=%s::%s" % (escape(layers.lower), escape(data))
    with kernel_mount(layers.mnt, [layers.lower], options=both + b",metacopy=on"):
        kernel = read_tree(os.fsencode(layers.mnt), started)
    with our_mount(layers.mnt, [layers.lower], options=words(both, engine=engine)):
        ours = read_tree(os.fsencode(layers.mnt), started)
    assert ours == kernel


def test_layers_are_appended_one_by_one(layers: Layers, engine: str) -> None:
    middle, lowest, data = layers.add("middle"), layers.add("lowest"), layers.add("data")
    for number, path in enumerate((layers.lower, middle, lowest)):
        (path / "same").write_text(str(number))
        (path / str(number)).write_text("")
    (data / "x").write_text("contents")
    metacopy_without_data(lowest / "m", 8, "/x")
    options = f"lowerdir+={middle},lowerdir+={lowest},datadir+={data},{engine}"
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        assert sorted(os.listdir(layers.mnt)) == ["0", "1", "2", "m", "same"]
        assert (layers.mnt / "same").read_text() == "0"
        assert (layers.mnt / "m").read_text() == "contents"


def test_empty_segments_are_skipped_and_the_last_of_two_counts(layers: Layers, engine: str) -> None:
    (layers.lower / "a").write_text("")
    with mounted(layers, "", "", "redirect_dir=on", "", "redirect_dir=off", "lowerdir=/nonexistent", "",
                 f"lowerdir={layers.lower}", "", engine, ""):  # fmt: skip
        assert os.listdir(layers.mnt) == ["a"]


def test_upper_and_work_mean_nothing_alone(layers: Layers) -> None:
    (layers.lower / "a").write_text("")
    with our_mount(layers.mnt, [layers.lower], options=f"workdir={layers.work},index=on,volatile,{PORTABLE}"):
        assert os.listdir(layers.mnt) == ["a"]
    assert os.listdir(layers.work) == []
