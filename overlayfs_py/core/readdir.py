"""Listing a directory: the names of all its layers, each once, without marks and what they hide."""

from __future__ import annotations

import os
import stat

from overlayfs_py.core import lookup, marks, merged
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import files, paths

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayfs_py.core.overlay import Overlay

    Merge = Callable[["Overlay", Real, dict[bytes, None], set[bytes]], list[bytes]]

_DT_CHR = 2
_DT_REG = 8
_DT_UNKNOWN = 0


class Dir:
    """A directory that a process has open: a listing taken at its beginning, so that positions in it stay good while
    entries come and go."""

    __slots__ = ("names", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.names: list[bytes] | None = None


def open_dir(fs: Overlay, node: Node) -> Dir:
    """Open a directory for listing."""
    node.opens += 1
    return Dir(node)


def release_dir(fs: Overlay, opened: Dir) -> None:
    opened.node.opens -= 1


def listing(fs: Overlay, opened: Dir, offset: int) -> list[bytes]:
    """All names of the open directory; read anew at offset 0 (rewinddir(3)), else as they were then."""
    if opened.names is None or offset == 0:
        opened.names = names(fs, opened.node)
    return opened.names


def names(fs: Overlay, node: Node, merge: Merge | None = None) -> list[bytes]:
    """The names a directory shows, those of the upper layer first; without `.` and `..`.

    `merge` does what merge_layer does, in less time.
    """
    if node.removed:
        return []
    merge = merge or merge_layer
    shown: dict[bytes, None] = {}
    hidden: set[bytes] = set()
    if node.upper is not None:
        merge(fs, node.upper, shown, hidden)
    masks: merged.Masks = {}
    for position, real in enumerate(node.lowers):
        merged.note(masks, position, merge(fs, real, shown, hidden))
    if len(node.lowers) > 1:
        fs.merged.learn(node, masks)
    return list(shown)


def kind_of(fs: Overlay, node: Node, name: bytes) -> int:
    """The type (S_IFMT) of the topmost object of this name, whatever else is wrong; 0 where that can't be told."""
    for real in (node.upper, *node.lowers):
        if real is None:
            continue
        try:
            return stat.S_IFMT(os.stat(name, dir_fd=fs.dirs.fd(real), follow_symlinks=False).st_mode)
        except FileNotFoundError:
            # in a layer further down
            continue
        except OSError:
            # What breaks a name, be it a bad block, breaks no listing of the others: whoever uses it gets the error.
            return 0
    return 0


def is_empty(fs: Overlay, node: Node) -> bool:
    """Whether a directory shows nothing; raises what keeps that from being told."""
    return not names(fs, node, _merge_known)


def merge_layer(fs: Overlay, real: Real, shown: dict[bytes, None], hidden: set[bytes]) -> list[bytes]:
    """Add what one layer's directory shows below those before it, and note what it hides in those after it.

    What can't be looked at is shown: whoever uses it gets the error. Returns all its entries.
    """
    return _merge(fs, real, shown, hidden, _may_show)


def _merge_known(fs: Overlay, real: Real, shown: dict[bytes, None], hidden: set[bytes]) -> list[bytes]:
    return _merge(fs, real, shown, hidden, _shows)


def _merge(
    fs: Overlay,
    real: Real,
    shown: dict[bytes, None],
    hidden: set[bytes],
    shows: Callable[[Overlay, Real, bytes], bool],
) -> list[bytes]:
    dir_fd = fs.dirs.fd(real)
    fd = paths.open_dir_read(dir_fd)
    try:
        entries = files.list_dir(fd)
    finally:
        os.close(fd)
    # Only a directory so marked can hold them, which spares a look at each file of all others.
    xattr_whiteouts = fs.marks.read_dir(dir_fd).xattr_whiteouts
    hides: list[bytes] = []
    for name, _, kind in entries:
        if name in shown or name in hidden:
            continue
        if marks.is_dot_name(name) and _is_dot_mark(fs, dir_fd, name):
            hides.append(name[len(marks.DOT_WHITEOUT) :])
        elif kind in (_DT_CHR, _DT_UNKNOWN) or (xattr_whiteouts and kind == _DT_REG):
            if shows(fs, real, name):
                shown[name] = None
            else:
                hidden.add(name)
        else:
            shown[name] = None
    # A mark hides what is in the layers below, not what is beside it.
    hidden.update(name for name in hides if name not in shown)
    return [name for name, _, _ in entries]


def _is_dot_mark(fs: Overlay, dir_fd: int, name: bytes) -> bool:
    st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    return stat.S_ISREG(st.st_mode) and not fs.marks.is_literal(dir_fd, name)


def _shows(fs: Overlay, real: Real, name: bytes) -> bool:
    st = lookup.entry(fs, real, name)
    return isinstance(st, os.stat_result)


def _may_show(fs: Overlay, real: Real, name: bytes) -> bool:
    try:
        return _shows(fs, real, name)
    except OSError:
        # a disk that can't be read there, which is no reason not to list the rest
        return True
