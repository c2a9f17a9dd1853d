"""What the overlay knows of each object: where it lives in the layers, what leads to it, who refers to it."""

from __future__ import annotations

from overlayfs_py.records import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayfs_py.core.layers import Layer

ROOT_ID = 1
BELOW_ID = 2
"""The root once more, for an engine whose mount begins below the root that the kernel makes."""


class Real:
    """An object in one layer, named by the chain of names that leads to it from the layer's root.

    The chain holds objects, not strings: when a directory of the upper layer moves, everything below it has moved.
    """

    __slots__ = ("layer", "name", "parent")

    def __init__(self, layer: Layer, parent: Real | None, name: bytes) -> None:
        self.layer = layer
        self.parent = parent
        self.name = name

    def path(self) -> bytes:
        """Its path below the layer's root, empty for the root itself."""
        names = []
        real: Real | None = self
        while real is not None and real.parent is not None:
            names.append(real.name)
            real = real.parent
        names.reverse()
        return b"/".join(names)


class Node:
    """One object of the merged tree: what the kernel knows by one node id.

    A directory merges `upper` and all of `lowers`, topmost first. Any other object is `upper`, or else `lowers[0]`;
    where `metacopy` is set, its data is still that of `lowers[-1]`.
    """

    __slots__ = (
        "aliases",
        "below",
        "children",
        "generation",
        "id",
        "indexed",
        "kind",
        "lookups",
        "markless",
        "metacopy",
        "name",
        "nlink",
        "opens",
        "parent",
        "pinned",
        "protection",
        "redirect",
        "removed",
        "upper",
        "upper_ino",
    )

    def __init__(
        self, kind: int, parent: Node | None, name: bytes, upper: Real | None, lowers: tuple[Real, ...]
    ) -> None:
        self.id = 0
        self.kind = kind
        self.parent = parent
        self.name = name
        self.upper = upper
        self.lowers = lowers
        self.children: dict[bytes, Node] | None = None
        # Further names of a hard-linked object, a set in a dict; one is (parent, name). There may be 65,000.
        self.aliases: dict[tuple[Node, bytes], None] | None = None
        self.lookups = 0
        self.opens = 0
        # An object that no name of the upper layer leads to, but that is still referred to, keeps a descriptor.
        self.pinned = -1
        self.removed = False
        self.redirect: bytes | None = None
        # The link count of an object in the index counts names in all layers, so the disk's own doesn't serve.
        self.indexed = False
        self.nlink = 0
        self.upper_ino = 0
        # What an engine has told the kernel beside the id, where that could be another object's later; 0: nothing.
        self.generation = 0
        self.metacopy = False
        # The upper part of a directory is known to hold no name that begins like an AUFS-style mark.
        self.markless = False
        # What protection knows of its flags; 0: nothing.
        self.protection = 0

    @property
    def lowers(self) -> tuple[Real, ...]:
        """What the lower layers have of it, topmost first."""
        if isinstance(self.below, tuple):
            return self.below
        return () if self.below is None else (self.below,)

    @lowers.setter
    def lowers(self, reals: tuple[Real, ...]) -> None:
        # Most have one: a tuple for it would be an eighth of all the memory that a node takes.
        self.below: Real | tuple[Real, ...] | None = reals if len(reals) > 1 else reals[0] if reals else None

    def names(self) -> list[tuple[Node, bytes]]:
        """Every (parent, name) known to lead here; empty when removed."""
        if self.removed or self.parent is None:
            return []
        return [(self.parent, self.name), *(self.aliases or ())]

    def has_other_name(self, parent: Node, name: bytes) -> bool:
        """Whether a name besides this one is known to lead here."""
        if self.removed or self.parent is None:
            return False
        return bool(self.aliases) or self.parent is not parent or self.name != name

    def add_name(self, parent: Node, name: bytes) -> None:
        if self.removed:
            self.removed = False
            self.parent, self.name = parent, name
        elif self.parent is not parent or self.name != name:
            if self.aliases is None:
                self.aliases = {}
            self.aliases[parent, name] = None
        if parent.children is None:
            parent.children = {}
        parent.children[name] = self

    def drop_name(self, parent: Node, name: bytes) -> None:
        """Forget that this name leads here; with the last one the node counts as removed."""
        if parent.children is not None and parent.children.get(name) is self:
            del parent.children[name]
        if self.parent is not parent or self.name != name:
            if self.aliases is not None:
                self.aliases.pop((parent, name), None)
        elif self.aliases:
            (self.parent, self.name), _ = self.aliases.popitem()
        else:
            self.removed = True
        self.aliases = self.aliases or None


class NodeTable:
    """Every node the kernel may name, by node id; the one place where ids come from.

    The id is the object's inode number wherever it is free, as an engine may have to show one as the other.
    """

    __slots__ = ("by_id", "fresh", "limit")

    def __init__(self, *, bits: int) -> None:
        self.by_id: dict[int, Node] = {}
        self.limit = 1 << bits
        self.fresh = self.limit - 1

    def add(self, node: Node, number: int) -> None:
        """Give `node` the id `number`, or one nobody has where that is taken or reserved."""
        while number <= BELOW_ID or number >= self.limit or number in self.by_id:
            number = self.fresh
            self.fresh -= 1
        node.id = number
        self.by_id[number] = node

    def discard(self, node: Node) -> None:
        if self.by_id.get(node.id) is node:
            del self.by_id[node.id]
