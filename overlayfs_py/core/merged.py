"""Which lower layers have something to say of a name: learnt from one listing, instead of asking all of them each time.

Layers don't change while they are mounted, so what was learnt holds until it is dropped for room. It says only where to
look: what is found there is decided by lookup.
"""

from __future__ import annotations

import math
import os

from overlayfs_py.core.marks import DOT_WHITEOUT
from overlayfs_py.core.nodes import Node
from overlayfs_py.records import TYPE_CHECKING
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
# A name that is not there takes a look at the disk's directory, as 30 entries of a listing do.
_BYTES_A_MISS = 1024


class MergedNames:
    """What is known of the lower parts of directories, the least recently used ones dropped first."""

    __slots__ = ("by_node", "count", "enabled", "fs", "last", "last_masks", "patience")

    def __init__(self, fs: Overlay) -> None:
        self.fs = fs
        # The least recently used ones come first.
        self.by_node: dict[Node, Masks] = {}
        self.count = 0
        # The last of them once more: who works in a directory asks for it again and again.
        self.last: Node | None = None
        self.last_masks: Masks = {}
        # How many more names may be looked for in vain before a directory is listed.
        self.patience: dict[Node, int] = {}
        # With a timeout, changes behind the mount's back are to be seen.
        self.enabled = fs.config.timeout == math.inf

    def mask(self, parent: Node, name: bytes) -> int:
        """Which of the lower directories of `parent` to ask for `name`."""
        if parent is self.last:
            return self.last_masks.get(name, 0)
        if not self.enabled:
            return EVERYWHERE
        masks = self.by_node.pop(parent, None)
        if masks is not None:
            self.by_node[parent] = masks
            self.last, self.last_masks = parent, masks
        elif len(parent.lowers) >= _LIST_FROM:
            masks = self._list(parent)
        return EVERYWHERE if masks is None else masks.get(name, 0)

    def missed(self, parent: Node) -> None:
        """Note that a name was looked for in vain: after some of them a listing costs less than to go on asking."""
        if not self.enabled or parent is self.last or parent in self.by_node:
            return
        left = self.patience.get(parent)
        if left is None:
            if len(self.patience) >= _MOST_DIRS:
                self.patience.clear()
            sizes = [os.fstat(self.fs.dirs.fd(real)).st_size for real in parent.lowers]
            left = 1 + sum(sizes) // _BYTES_A_MISS
        self.patience[parent] = left - 1
        if left == 1:
            self._list(parent)

    def _list(self, parent: Node) -> Masks | None:
        """List the lower parts of `parent`; None where one may not be read, whose names may be asked for yet."""
        masks: Masks = {}
        for position, real in enumerate(parent.lowers):
            try:
                fd = paths.open_dir_read(self.fs.dirs.fd(real))
            except PermissionError:
                return None
            try:
                note(masks, position, [name for name, _, _ in files.list_dir(fd)])
            finally:
                os.close(fd)
        self.learn(parent, masks)
        return masks

    def learn(self, parent: Node, masks: Masks) -> None:
        """Remember what a listing of all lower parts of `parent` has shown."""
        if not self.enabled or not parent.lowers or len(masks) > _MOST_NAMES:
            return
        self.drop(parent)
        self.by_node[parent] = masks
        self.last, self.last_masks = parent, masks
        self.count += len(masks)
        while len(self.by_node) > _MOST_DIRS or self.count > _MOST_NAMES:
            self.drop(next(iter(self.by_node)))

    def drop(self, parent: Node) -> None:
        """Forget a directory that goes, or whose lower parts are others now."""
        self.patience.pop(parent, None)
        if parent is self.last:
            self.last, self.last_masks = None, {}
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
