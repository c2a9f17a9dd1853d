"""A directory's listing with positions that need no handle: they depend on the names alone.

Opening a directory costs no message, so a READDIR request says only from where to go on. A position is a hash of the
name: it stays good while entries come and go, after a rewind, and after the listing was dropped and taken anew.
"""

from __future__ import annotations

from bisect import bisect_right, insort

from overlayfs_py.records import TYPE_CHECKING, OrderedDict

if TYPE_CHECKING:
    from collections.abc import Iterable

_FIRST = 3  # behind the positions of "." and ".."
_MASK = (1 << 63) - 1  # telldir(3) answers with a long


def position_of(name: bytes) -> int:
    """Where `name` stands in any listing of this process; nobody outside can make two names stand in one place."""
    return max(hash(name) & _MASK, _FIRST)


class Listing:
    """The names of one directory, by position."""

    __slots__ = ("entries", "known", "prepared", "queued", "removed")

    def __init__(self, names: Iterable[bytes], prepared: object = None) -> None:
        """`prepared`: what was read ahead of the entries."""
        self.entries = sorted([(position_of(name), name) for name in names])
        self.prepared = prepared
        # Entries before `known` are prepared, or never will be; those from `queued` on are being read ahead (-1: none).
        self.known = 0 if prepared is None else len(self.entries)
        self.queued = -1
        # Taking a name out would move all behind it; it is passed over instead.
        self.removed: set[bytes] = set()

    def after(self, position: int) -> int:
        """The index of the first entry behind `position`."""
        return bisect_right(self.entries, (position, b"\xff" * 256))

    def add(self, name: bytes) -> None:
        if name in self.removed:
            self.removed.discard(name)
        else:
            insort(self.entries, (position_of(name), name))

    def remove(self, name: bytes) -> None:
        self.removed.add(name)


class Listings:
    """The listings in use, by node id; at most `limit` of them, the least recently used ones dropped first."""

    __slots__ = ("by_id", "limit")

    def __init__(self, limit: int) -> None:
        self.by_id: OrderedDict[int, Listing] = OrderedDict()
        self.limit = limit

    def get(self, node_id: int) -> Listing | None:
        listing = self.by_id.get(node_id)
        if listing is not None:
            self.by_id.move_to_end(node_id)
        return listing

    def put(self, node_id: int, listing: Listing) -> None:
        self.by_id[node_id] = listing
        if len(self.by_id) > self.limit:
            self.by_id.popitem(last=False)

    def added(self, node_id: int, name: bytes) -> None:
        listing = self.by_id.get(node_id)
        if listing is not None:
            listing.add(name)

    def removed(self, node_id: int, name: bytes) -> None:
        listing = self.by_id.get(node_id)
        if listing is not None:
            listing.remove(name)

    def drop(self, node_id: int) -> None:
        self.by_id.pop(node_id, None)
