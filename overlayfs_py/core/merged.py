"""Which lower layers have something to say of a name: learnt from one listing, instead of asking all of them each time.

Layers don't change while they are mounted, so what was learnt holds until it is dropped for room. It says only where to
look: what is found there is decided by lookup.
"""

from __future__ import annotations

import math
import os

from overlayfs_py.core.marks import DOT_WHITEOUT
from overlayfs_py.core.nodes import Node
from overlayfs_py.records import TYPE_CHECKING, OrderedDict
from overlayfs_py.sys import files, paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from overlayfs_py.core.overlay import Overlay

Masks = dict[bytes, int]
"""For each name, the positions in Node.lowers of the directories that have an entry for it, as bits."""

EVERYWHERE = -1
"""The mask of a name of which nothing is known."""

# From so many layers on, listing them all costs less than asking them all for a few names.
_LIST_FROM = 8
_MOST_DIRS = 256
_MOST_NAMES = 50_000


class MergedNames:
    """What is known of the lower parts of directories, the least recently used ones dropped first."""

    __slots__ = ("by_node", "count", "enabled", "fs")

    def __init__(self, fs: Overlay) -> None:
        self.fs = fs
        self.by_node: OrderedDict[Node, Masks] = OrderedDict()
        self.count = 0
        # With a timeout, changes behind the mount's back are to be seen.
        self.enabled = fs.config.timeout == math.inf

    def mask(self, parent: Node, name: bytes) -> int:
        """Which of the lower directories of `parent` to ask for `name`."""
        if not self.enabled:
            return EVERYWHERE
        masks = self.by_node.get(parent)
        if masks is None:
            if len(parent.lowers) < _LIST_FROM:
                return EVERYWHERE
            masks = self._list(parent)
        else:
            self.by_node.move_to_end(parent)
        return masks.get(name, 0)

    def _list(self, parent: Node) -> Masks:
        masks: Masks = {}
        for position, real in enumerate(parent.lowers):
            fd = paths.open_dir_read(self.fs.dirs.fd(real))
            try:
                note(masks, position, (name for name, _, _ in files.list_dir(fd)))
            finally:
                os.close(fd)
        self.learn(parent, masks)
        return masks

    def learn(self, parent: Node, masks: Masks) -> None:
        """Remember what a listing of all lower parts of `parent` has shown."""
        if not self.enabled or len(parent.lowers) < 2 or len(masks) > _MOST_NAMES:
            return
        self.drop(parent)
        self.by_node[parent] = masks
        self.count += len(masks)
        while len(self.by_node) > _MOST_DIRS or self.count > _MOST_NAMES:
            _, dropped = self.by_node.popitem(last=False)
            self.count -= len(dropped)

    def drop(self, parent: Node) -> None:
        """Forget a directory that goes, or whose lower parts are others now."""
        masks = self.by_node.pop(parent, None)
        if masks is not None:
            self.count -= len(masks)


def positions(mask: int, count: int) -> Iterable[int]:
    """The positions below `count` whose bits are in `mask`, lowest first."""
    if mask == EVERYWHERE:
        return range(count)
    return _bits(mask)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def note(masks: Masks, position: int, names: Iterable[bytes]) -> None:
    """Add the entries of the lower directory at `position`; an AUFS-style mark speaks of the name it hides, too."""
    bit = 1 << position
    for name in names:
        masks[name] = masks.get(name, 0) | bit
        if name.startswith(DOT_WHITEOUT):
            hidden = name[len(DOT_WHITEOUT) :]
            masks[hidden] = masks.get(hidden, 0) | bit
