"""Small filesystems of every kind that layers live on, each gone when its `with` block ends."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support.mounts import kernel_mount, our_mount
from tests.support.syscalls import mount, umount

# How an empty one is made, and its least size.
_MAKERS: Final = {
    "ext4": (["mkfs.ext4", "-q", "-O", "^has_journal"], "64M"),
    "xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], "300M"),
    "btrfs": (["mkfs.btrfs", "-q"], "120M"),
}
WRITABLE: Final = ("ext4", "xfs", "btrfs", "tmpfs")
IMAGES: Final = ("squashfs", "erofs")
STACKED: Final = ("overlay", "ours")


@contextlib.contextmanager
def writable(kind: str, base: Path) -> Iterator[Path]:
    """An empty filesystem mounted below `base`; its mountpoint."""
    point = base / f"fs-{kind}"
    point.mkdir()
    if kind == "tmpfs":
        mount(b"tmpfs", os.fsencode(point), b"tmpfs", 0, b"size=64m")
    else:
        command, size = _MAKERS[kind]
        image = base / f"image-{kind}"
        subprocess.run(["truncate", "-s", size, image], check=True)
        subprocess.run([*command, image], check=True, timeout=60)
        _mount_image(image, point, kind)
    try:
        yield point
    finally:
        umount(os.fsencode(point))


@contextlib.contextmanager
def holding(kind: str, tree: Path, base: Path) -> Iterator[Path]:
    """A filesystem of any kind that shows what the directory `tree` holds, unchanged."""
    if kind in WRITABLE:
        with writable(kind, base) as point:
            copy = point / "layer"
            subprocess.run(["cp", "-a", tree, copy], check=True, timeout=60)
            yield copy
        return
    point, empty = base / f"fs-{kind}", base / f"empty-{kind}"
    point.mkdir()
    empty.mkdir()
    if kind == "overlay":
        with kernel_mount(point, [tree, empty]):
            yield point
    elif kind == "ours":
        with our_mount(point, [tree, empty]):
            yield point
    else:
        image = base / f"image-{kind}"
        squash = ["mksquashfs", str(tree), str(image), "-quiet"]
        command = squash if kind == "squashfs" else ["mkfs.erofs", str(image), str(tree)]
        subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _mount_image(image, point, kind)
        try:
            yield point
        finally:
            umount(os.fsencode(point))


def _mount_image(image: Path, point: Path, kind: str) -> None:
    # The loop device goes with the mount.
    subprocess.run(["mount", "-t", kind, "-o", "loop", image, point], check=True, timeout=60)
