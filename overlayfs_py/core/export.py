"""Finding an object by its node id alone: a file handle outlives what kernel and daemon remember.

A node id is an inode number (see nodes.NodeTable), so the object has that number in some layer. No filesystem tells the
name of a number, and to keep names would cost memory for every object ever looked up. So layers are searched, outside
the lock, by the numbers that directories list. What is found is then looked up in the merged tree, where it has to have
the id. Where a layer above shows it under another name, that layer's marks say so: an origin, or a redirect on the way.

An object renamed while the layers are searched may be missed, and its handle is stale then. A search ends between two
directories, with EINTR, when nobody waits for it any more.
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import index, lookup
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.requests import Job, Steps, awaited
from overlayfs_py.records import TYPE_CHECKING, OrderedDict
from overlayfs_py.sys import files, paths

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from overlayfs_py.core.layers import Layer
    from overlayfs_py.core.overlay import Overlay

    # A layer and a path in it.
    _Place = tuple[Layer, bytes]
    _Unwanted = Callable[[], bool]

_BESIDE = 1024  # entries of a directory

_DT_UNKNOWN = 0
_DT_DIR = 4


class Reopened:
    """Where the objects last searched for were found, and what was beside them; `limit` at most.

    The kernel forgets a file as soon as what opened it by handle closes it, and who has opened one will open those
    beside it. A path that is wrong by now does no harm.
    """

    __slots__ = ("limit", "paths")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.paths: OrderedDict[int, bytes] = OrderedDict()

    def get(self, node_id: int) -> tuple[bytes, ...]:
        path = self.paths.get(node_id)
        if path is None:
            return ()
        self.paths.move_to_end(node_id)
        return (path,)

    def put(self, node_id: int, path: bytes) -> None:
        self.paths[node_id] = path
        self.paths.move_to_end(node_id)
        if len(self.paths) > self.limit:
            self.paths.popitem(last=False)


def lookup_id(fs: Overlay, node_id: int) -> Steps[Node]:
    """The node of this id, in the tree again if it was forgotten. Raises ESTALE where nothing has it any more."""
    known = fs.nodes.by_id.get(node_id)
    if known is not None:
        if known.removed:
            raise _stale()
        return known
    real = fs.numbers.split(node_id)
    if real is None:
        raise _stale()
    node = _visible(fs, node_id, fs.reopened.get(node_id))
    if node is None:
        node = yield from _search(fs, node_id, real)
        fs.reopened.put(node_id, _path(node))
    return node


def _search(fs: Overlay, node_id: int, real: tuple[int, int]) -> Steps[Node]:
    found: list[_Place] = []
    beside: dict[int, bytes] = {}
    yield from _run(lambda unwanted: found.extend(_named(fs, *real, beside, unwanted)))
    for other, path in beside.items():
        fs.reopened.put(other, path)
    node = _visible(fs, node_id, (path for _, path in found))
    if node is None and found:
        elsewhere: set[bytes] = set()
        yield from _run(lambda unwanted: elsewhere.update(_moved(fs, node_id, found, unwanted)))
        node = _visible(fs, node_id, elsewhere)
    if node is None:
        raise _stale()
    lower_names = sum(layer is not fs.upper for layer, _ in found)
    if lower_names > 1 and node.kind != stat.S_IFDIR and fs.work is not None and not index.covers(fs, node.kind):
        # The names of one lower file part on copy-up: which of them was meant can't be told.
        lookup.forget(fs, node, 0)
        raise _stale()
    return node


def lookup_parent(fs: Overlay, node_id: int) -> Node:
    """The directory that a known one is in; the root is in itself. Raises ESTALE for one that is removed."""
    node = fs.node(node_id)
    if node.removed:
        raise _stale()
    return node.parent or node


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def _run(search: Callable[[_Unwanted], None]) -> Steps[None]:
    job = Job(lambda: search(job.unwanted))
    yield from awaited(job)


def _path(node: Node) -> bytes:
    names = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        names.append(at.name)
        at = at.parent
    return b"/".join(reversed(names))


def _visible(fs: Overlay, node_id: int, candidates: Iterable[bytes]) -> Node | None:
    """The node with this id that one of the paths leads to in the merged tree."""
    for path in candidates:
        node, whole = _walk(fs, path)
        if whole and node.id == node_id:
            return node
        lookup.forget(fs, node, 0)
    return None


def _walk(fs: Overlay, path: bytes) -> tuple[Node, bool]:
    """The node that a path leads to in the merged tree, or gets to before it ends, and whether that is all of it."""
    node = fs.root
    for name in path.split(b"/"):
        if node.kind != stat.S_IFDIR:
            return node, False
        try:
            node = lookup.lookup(fs, node, name)
        except FileNotFoundError:
            # hidden by the layers above
            return node, False
        except OSError:
            lookup.forget(fs, node, 0)
            raise
    return node, True


def _named(fs: Overlay, dev: int, inode: int, beside: dict[int, bytes], unwanted: _Unwanted) -> Iterator[_Place]:
    """Where layers on the filesystem `dev` have an inode number; into `beside` goes what else is there, by node id."""
    for layer in fs.layers:
        if layer.dev != dev or layer.data_only:
            continue
        for path, _, entries in _directories(layer, unwanted):
            hits = [name for name, number, _ in entries if number == inode]
            if hits:
                others = entries[:_BESIDE]
                beside.update((fs.numbers.number(dev, number), _joined(path, name)) for name, number, _ in others)
                yield from ((layer, _joined(path, name)) for name in hits)


def _moved(fs: Overlay, node_id: int, found: list[_Place], unwanted: _Unwanted) -> set[bytes]:
    """Where else the merged tree may have what lower layers have at these places."""
    spots: set[bytes] = set()
    for layer in reversed(fs.layers):
        if spots and (layer is fs.upper or fs.follow_redirects):
            spots.update(_renamed(fs, layer, node_id, spots, unwanted))
        spots.update(path for where, path in found if where is layer)
    return spots


def _renamed(fs: Overlay, layer: Layer, node_id: int, spots: Collection[bytes], unwanted: _Unwanted) -> list[bytes]:
    """The paths at which a layer shows what the layers below have at `spots`, or in the upper has a copy of it."""
    renamed = []
    below = {b"": b""}
    for path, fd, entries in _directories(layer, unwanted):
        above, _, name = path.rpartition(b"/")
        redirect = fs.marks.read_dir(fd).redirect
        if path:
            below[path] = _joined(below[above], redirect or name)
        if redirect:
            if redirect.startswith(b"/"):
                below[path] = redirect[1:]
            under = below[path] + b"/"
            renamed += [path + spot[len(under) - 1 :] for spot in spots if (spot + b"/").startswith(under)]
        if layer is fs.upper:
            copies = (name for name, _, kind in entries if kind != _DT_DIR and _origin(fs, fd, name) == node_id)
            renamed += [_joined(path, name) for name in copies]
    return renamed


def _origin(fs: Overlay, dir_fd: int, name: bytes) -> int:
    try:
        return lookup.origin_number(fs, fs.marks.read_file(dir_fd, name).origin)
    except FileNotFoundError:
        # gone since it was listed
        return 0


def _directories(layer: Layer, unwanted: _Unwanted) -> Iterator[tuple[bytes, int, list[tuple[bytes, int, int]]]]:
    """Every directory of a layer: its path, a descriptor while the caller has it, and what files.list_dir says.

    Raises EINTR once `unwanted`, asked before each, says so.
    """
    pending = [b""]
    while pending:
        if unwanted():
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        path = pending.pop()
        try:
            fd = paths.open_beneath(layer.fd, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            # moved or removed since it was listed, or no directory
            continue
        try:
            if os.fstat(fd).st_dev != layer.dev:
                continue
            entries = files.list_dir(fd)
            yield path, fd, entries
        finally:
            os.close(fd)
        pending += [_joined(path, name) for name, _, kind in entries if kind in (_DT_UNKNOWN, _DT_DIR)]


def _joined(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name
