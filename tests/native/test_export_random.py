"""Random changes of two like trees, the kernel's overlayfs and ours: handles taken on the way open the same in both."""

import contextlib
import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from overlayfs_py.sys import handles
from tests.conftest import Layers
from tests.support.caches import drop_names
from tests.support.mounts import kernel_mount, our_mount

STEPS: Final = 25
NAMES: Final = ("f1", "f2", "c", "n1", "n2", "n3")
KERNEL: Final = "index=on,nfs_export=on,redirect_dir=on"

Handle = tuple[int, bytes]
Step = Callable[[Path], None]


def lay_out(base: Path) -> None:
    """Two lower layers with merged directories and a hard link, an empty upper, and where they are mounted."""
    for name in ("l1/a/c", "l2/a/c", "l1/b", "l2/b", "u", "w", "m"):
        (base / name).mkdir(parents=True)
    for number, name in enumerate(("l1/a/f1", "l2/a/f2", "l2/b/f3", "l1/a/c/f4", "l2/a/c/f5", "l2/f6")):
        (base / name).write_bytes(b"%d" % number)
    os.link(base / "l2" / "f6", base / "l2" / "b" / "f7")
    (base / "l2" / "s").symlink_to("f6")


def paths(top: Path) -> list[str]:
    return sorted(os.path.relpath(path, top) for path in top.rglob("*"))


def change(rng: random.Random, old: str, new: str) -> Step:
    """A change that may well fail: then it does so in both trees."""
    data = rng.randbytes(4)
    changes: tuple[Step, ...] = (
        lambda top: append(top / old, data),
        lambda top: append(top / new, data),
        lambda top: (top / new).mkdir(),
        lambda top: os.rename(top / old, top / new),
        lambda top: os.rename(top / old, top / new),
        lambda top: (top / old).unlink(),
        lambda top: (top / old).rmdir(),
        lambda top: os.link(top / old, top / new, follow_symlinks=False),
        lambda top: (top / new).symlink_to("f6"),
    )
    return rng.choice(changes)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def outcome(step: Step, top: Path) -> int | None:
    try:
        step(top)
    except OSError as error:
        return error.errno
    return None


def opened(top: Path, handle: Handle) -> tuple[object, int]:
    """What a handle opens, or the error, and the inode number."""
    root = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = handles.open_by_handle(root, *handle, os.O_PATH)
    except OSError as error:
        return error.errno, 0
    finally:
        os.close(root)
    try:
        st = os.fstat(fd)
        path = Path(f"/proc/self/fd/{fd}")
        if stat.S_ISREG(st.st_mode):
            return path.read_bytes(), st.st_ino
        return sorted(os.listdir(path)) if stat.S_ISDIR(st.st_mode) else st.st_mode, st.st_ino
    finally:
        os.close(fd)


@contextlib.contextmanager
def both(theirs: Path, ours: Path) -> Iterator[tuple[Path, Path]]:
    stacks = [([base / "l1", base / "l2"], base / "u", base / "w") for base in (theirs, ours)]
    with kernel_mount(theirs / "m", *stacks[0], KERNEL), our_mount(ours / "m", *stacks[1], "engine=native"):
        yield theirs / "m", ours / "m"


@pytest.mark.parametrize("seed", range(10))
def test_handles_taken_among_random_changes_open_what_the_kernels_do(layers: Layers, seed: int) -> None:
    rng = random.Random(seed)
    theirs, ours = layers.base / "theirs", layers.base / "ours"
    lay_out(theirs)
    lay_out(ours)
    taken: list[tuple[str, list[Handle]]] = []
    for _ in range(2):
        with both(theirs, ours) as tops:
            for _ in range(STEPS):
                found = paths(tops[0])
                assert found == paths(tops[1])
                old = rng.choice(found)
                directories = [name for name in found if stat.S_ISDIR((tops[0] / name).lstat().st_mode)]
                if rng.randrange(4) == 0:
                    taken.append((old, [handles.file_handle(-100, bytes(top / old)) for top in tops]))
                step = change(rng, old, os.path.join(rng.choice(["", *directories]), rng.choice(NAMES)))
                assert outcome(step, tops[0]) == outcome(step, tops[1])
            for _ in range(2):
                left = {(tops[0] / name).lstat().st_ino for name in paths(tops[0])}
                for name, made in taken:
                    (wanted, inode), (got, _) = (opened(top, one) for top, one in zip(tops, made, strict=True))
                    # What has lost its last name may live on in the kernel's index.
                    assert got == wanted or (got == errno.ESTALE and inode not in left), name
                drop_names()
