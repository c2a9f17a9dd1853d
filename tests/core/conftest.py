"""Stacks of layers built from descriptions, and overlays over them without FUSE."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from overlayfs_py.core.overlay import Overlay
from tests.conftest import Layers
from tests.core.rig import Rig, configure
from tests.support import trees
from tests.support.syscalls import mount, umount


class Maker:
    """Makes overlays; `base` has the layers: lower0 is the topmost lower one, upper and work."""

    def __init__(self, layers: Layers, stack: contextlib.ExitStack) -> None:
        self.layers = layers
        self.base = layers.base
        self.upper = layers.upper
        self.stack = stack

    def __call__(self, *lowers: trees.Layer, upper: trees.Layer | None = (), **options: Any) -> Rig:
        """An overlay over lower layers as described, topmost first; without an upper one where `upper` is None."""
        prefix = trees.USER if options.get("userxattr") else trees.TRUSTED
        paths = []
        for number, layer in enumerate(lowers):
            paths.append(self.layers.add(f"lower{number}"))
            trees.build(os.fsencode(paths[-1]), layer, prefix)
        if upper is None:
            return self._open(Overlay.open(configure(paths, **options)))
        trees.build(os.fsencode(self.layers.upper), upper, prefix)
        return self._open(Overlay.open(configure(paths, self.layers.upper, self.layers.work, **options)))

    def again(self, rig: Rig, **options: Any) -> Rig:
        """Close the overlay and open another over the same layers, with some options changed."""
        rig.fs.close()
        rig.fs = self._open(Overlay.open(rig.fs.config._replace(**options))).fs
        return rig

    def now_and_again(self, rig: Rig) -> Iterator[None]:
        """Once for the overlay as it is, once with another over the same layers in its place."""
        yield
        self.again(rig)
        yield

    def _open(self, fs: Overlay) -> Rig:
        self.stack.callback(fs.close)
        return Rig(fs)


@pytest.fixture
def make(layers: Layers) -> Iterator[Maker]:
    umask = os.umask(0o022)
    try:
        with contextlib.ExitStack() as stack:
            yield Maker(layers, stack)
    finally:
        os.umask(umask)


@pytest.fixture
def make_in_memory(layers: Layers) -> Iterator[Maker]:
    """As `make`, on a tmpfs, where many files are made and removed quickly."""
    base = layers.add("memory")
    mount(b"tmpfs", os.fsencode(base), b"tmpfs", 0, b"mode=755")
    umask = os.umask(0o022)
    try:
        inside = Layers(base, *(base / name for name in ("lower", "upper", "work", "mnt")))
        for path in (inside.upper, inside.work):
            path.mkdir()
        with contextlib.ExitStack() as stack:
            yield Maker(inside, stack)
    finally:
        os.umask(umask)
        umount(os.fsencode(base))


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """How many descriptors this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))
