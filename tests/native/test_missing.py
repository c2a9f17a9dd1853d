"""Names that are not there, of which the engine asks the layers no more than it must."""

import os
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.caches import drop_names
from tests.support.mounts import our_mount

SOME = 50


def look_in_vain(directory: Path) -> None:
    for number in range(SOME):
        assert not (directory / f"missing{number}").exists()


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_marks_hide_names_however_many_were_looked_for_in_vain(layers: Layers, where: str) -> None:
    for name in ("hidden", "shown"):
        (layers.lower / name).write_bytes(b"below")
    marked = layers.upper if where == "upper" else layers.add("above")
    (marked / ".wh.hidden").touch()
    lowers = [layers.lower] if where == "upper" else [marked, layers.lower]
    with our_mount(layers.mnt, lowers, layers.upper, layers.work, "engine=native"):
        look_in_vain(layers.mnt)
        assert not (layers.mnt / "hidden").exists()
        assert (layers.mnt / "shown").read_bytes() == b"below"


@pytest.mark.parametrize("where", ["upper", "new", "lower"])
def test_names_made_after_many_were_looked_for_in_vain_are_there(layers: Layers, where: str) -> None:
    (layers.lower / "lower").mkdir()
    (layers.lower / "lower" / "old").write_bytes(b"below")
    (layers.upper / "upper").mkdir()
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native"):
        directory = layers.mnt / where
        directory.mkdir(exist_ok=True)
        look_in_vain(directory)
        (directory / "missing0").write_bytes(b"made")
        (directory / "missing1").mkdir()
        os.rename(directory / "missing0", directory / "missing2")
        os.link(directory / "missing2", directory / "missing3")
        os.symlink("missing2", directory / ".wh.missing4")
        (directory / ".wh.missing1").write_bytes(b"of this name")
        look = {"missing1", "missing2", "missing3", ".wh.missing4", ".wh.missing1"}
        for _ in range(2):
            assert {entry.name for entry in directory.iterdir()} - {"old"} == look
            assert all((directory / name).exists() for name in look)
            assert not (directory / "missing0").exists()
            assert not (directory / "missing4").exists()
            drop_names()


def test_a_removed_name_is_missing_where_a_listing_has_told_of_it(layers: Layers) -> None:
    (layers.lower / "d").mkdir()
    for name in ("a", "b"):
        (layers.lower / "d" / name).write_bytes(b"below")
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native"):
        look_in_vain(layers.mnt / "d")
        (layers.mnt / "d" / "a").unlink()
        drop_names()
        assert not (layers.mnt / "d" / "a").exists()
        assert (layers.mnt / "d" / "b").read_bytes() == b"below"
