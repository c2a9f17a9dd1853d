"""Directories read ahead of a walk show what the kernel's overlayfs shows, whatever is in them or changes meanwhile."""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.mounts import kernel_mount, our_mount

SHOWN = "%P %y %m %U:%G %s %T@ %l %n\\n"


def build(base: Path, depth: int = 3) -> None:
    """A tree whose directories hold other directories, files, links and devices."""
    for number in range(5):
        (base / f"f{number}").write_bytes(b"x" * number)
    (base / "link").symlink_to("f1")
    os.mkfifo(base / "fifo")
    if depth:
        for name in ("a", "b", "c", "empty"):
            (base / name).mkdir()
        for name in ("a", "b", "c"):
            build(base / name, depth - 1)


@pytest.fixture
def stack(layers: Layers) -> list[Path]:
    """Two lower layers with all that hides and joins, topmost first."""
    build(layers.lower)
    above = layers.add("above")
    os.link(layers.lower / "a" / "f1", layers.lower / "b" / "other")
    (above / "a" / "b").mkdir(parents=True)
    os.mknod(above / "a" / "b" / "f1", 0o020000, 0)
    os.mknod(above / "a" / "b" / "c", 0o020000, 0)
    (above / "b" / "a").mkdir(parents=True)
    (above / "b" / "a" / "alone").write_bytes(b"alone")
    os.setxattr(above / "b" / "a", "trusted.overlay.opaque", b"y")
    build(above / "b" / "a", 2)
    (above / "of one layer").mkdir()
    build(above / "of one layer")
    return [above, layers.lower]


def shown(mnt: Path) -> list[bytes]:
    """All that a walk shows; not the link counts of directories, which count what is merged."""
    found = subprocess.run(["find", mnt, "-printf", SHOWN], stdout=subprocess.PIPE, check=True, timeout=60).stdout
    lines = [line for line in found.split(b"\n") if line]
    return sorted(line.rsplit(b" ", 1)[0] if b" d " in line else line for line in lines)


def test_a_walk_shows_what_the_kernel_shows(stack: list[Path], layers: Layers, uring: str) -> None:
    with kernel_mount(layers.mnt, stack, layers.upper, layers.work):
        expected = shown(layers.mnt)
    with our_mount(layers.mnt, stack, layers.upper, layers.work, f"engine=native,uring={uring}"):
        assert shown(layers.mnt) == expected
        assert shown(layers.mnt) == expected


def test_walks_side_by_side_show_the_same(stack: list[Path], layers: Layers) -> None:
    with our_mount(layers.mnt, stack, layers.upper, layers.work, "engine=native"):
        with ThreadPoolExecutor(6) as pool:
            walks = list(pool.map(shown, [layers.mnt] * 6))
        assert all(walk == walks[0] for walk in walks)
        assert len(walks[0]) > 500


def test_marks_of_nothing_in_directories_read_ahead_are_not_shown(layers: Layers) -> None:
    build(layers.lower)
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native"):
        expected = list(everything(layers.mnt))
    for directory in [path for path in layers.lower.rglob("*") if path.is_dir()]:
        (directory / ".wh.f2").touch()
        os.mknod(directory / "whiteout", 0o020000, 0)
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native"):
        assert list(everything(layers.mnt)) == expected


def everything(base: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(base.rglob("*")):
        yield str(path.relative_to(base)), path.lstat().st_mode


def test_what_changes_while_it_is_walked_is_seen(stack: list[Path], layers: Layers) -> None:
    with our_mount(layers.mnt, stack, layers.upper, layers.work, "engine=native"):
        for number, (top, directories, files) in enumerate(os.walk(layers.mnt)):
            if number % 3 == 0 and "f0" in files:
                # In directories that are read ahead by now, or being read.
                for name in directories:
                    Path(top, name, "new").write_bytes(b"new")
                    Path(top, name, "f4").unlink(missing_ok=True)
            elif number % 3 == 1 and "f0" in files:
                os.chmod(Path(top, "f0"), 0o600)
                os.rename(Path(top, "f2"), Path(top, "moved"))
        now = list(everything(layers.mnt))
    with our_mount(layers.mnt, stack, layers.upper, layers.work, "engine=native"):
        assert list(everything(layers.mnt)) == now
        assert any(name.endswith("/new") for name, _ in now)
        assert any(name.endswith("/moved") for name, _ in now)


MANY = 3000


@pytest.fixture
def large(layers: Layers) -> Layers:
    """A directory that takes many answers to list, with some of everything in it."""
    directory = layers.lower / "large"
    directory.mkdir()
    for number in range(MANY):
        path = directory / (f"{number}-" + "n" * (number % 40))
        if number % 50 == 1:
            path.mkdir()
        elif number % 50 == 2:
            path.symlink_to(f"to-{number}")
        elif number % 50 == 3:
            os.mknod(path, 0o020600, os.makedev(1, 3))
        elif number % 50 == 4:
            os.link(directory / f"{number - 4}-{'n' * ((number - 4) % 40)}", path)
        else:
            path.write_bytes(b"x" * number)
    return layers


def test_a_directory_of_many_answers_is_shown_as_the_kernel_shows_it(large: Layers, uring: str) -> None:
    directory = large.mnt / "large"
    with kernel_mount(large.mnt, [large.lower], large.upper, large.work):
        expected = shown(directory)[1:]
    assert len(expected) == MANY
    for marked in (False, True):
        if marked:
            for number in range(10, MANY, 500):
                (large.lower / "large" / f".wh.{number}").touch()
            os.mknod(large.lower / "large" / "whiteout", 0o020000, 0)
        with our_mount(large.mnt, [large.lower], large.upper, large.work, f"engine=native,uring={uring}"):
            with ThreadPoolExecutor(3) as pool:
                assert [found[1:] == expected for found in pool.map(shown, [directory] * 3)] == [True] * 3
            assert shown(directory)[1:] == expected


def test_what_changes_in_a_directory_of_many_answers_while_it_is_listed_is_seen(large: Layers) -> None:
    with our_mount(large.mnt, [large.lower], large.upper, large.work, "engine=native"):
        directory = large.mnt / "large"
        listed: list[str] = []
        changed = {f"{number}-{'n' * (number % 40)}" for number in range(10, MANY, 50)}
        gone = {f"{number}-{'n' * (number % 40)}" for number in range(20, MANY, 50)}
        with os.scandir(directory) as entries:
            for number, entry in enumerate(entries):
                listed.append(entry.name)
                if number == 500:
                    for name in changed:
                        os.chmod(directory / name, 0o600)
                    for name in gone:
                        (directory / name).unlink()
        left = {path.name for path in (large.lower / "large").iterdir()} - gone
        # Names that went after they were asked for may still be told.
        assert left <= set(listed) <= left | gone and len(listed) == len(set(listed))
        for name in left:
            now, below = (directory / name).lstat(), (large.lower / "large" / name).lstat()
            mode = 0o600 if name in changed else below.st_mode & 0o777
            assert (now.st_size, now.st_mode & 0o777) == (below.st_size, mode)
        assert {entry.name for entry in directory.iterdir()} == left
