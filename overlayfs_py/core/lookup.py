"""Which object a name leads to: whiteouts, opaque directories, redirects, metacopies and hard links decided.

Source: Documentation/filesystems/overlayfs.rst, fs/overlayfs/namei.c.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from overlayfs_py.core import index, marks, nameless
from overlayfs_py.core.merged import EVERYWHERE, positions
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.records import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overlayfs_py.core.overlay import Overlay

NAME_MAX = 255
_REDIRECT_MAX = 256


class _Whiteout:
    """What `entry` answers where a whiteout hides the name."""


WHITEOUT = _Whiteout()


class Found(NamedTuple):
    """What a name leads to, before it is a node."""

    st: os.stat_result
    upper: Real | None
    lowers: tuple[Real, ...]
    number: int
    redirect: bytes | None = None
    metacopy: bool = False
    indexed: bool = False
    nlink: int = 0


def lookup(fs: Overlay, parent: Node, name: bytes) -> Node:
    """The node that `name` in `parent` leads to.

    Raises ENOENT, ENAMETOOLONG; EPERM for a redirect that may not be followed; EIO for a metacopy without its data.
    """
    return lookup_entry(fs, parent, name)[0]


def lookup_entry(fs: Overlay, parent: Node, name: bytes) -> tuple[Node, os.stat_result | None]:
    """As lookup, with the node's real attributes where looking for it has told them."""
    if parent.children is not None:
        known = parent.children.get(name)
        if known is not None:
            return known, None
    found = find(fs, parent, name)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return node_for(fs, parent, name, found), found.st


def find(fs: Overlay, parent: Node, name: bytes) -> Found | None:
    """Look `name` up in the layers of the directory `parent`; None where nothing is visible."""
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
    if parent.removed:
        return None
    if parent.upper is not None:
        st = entry(fs, parent.upper, name)
        if isinstance(st, _Whiteout):
            return None
        if st is not None:
            upper = Real(parent.upper.layer, parent.upper, name)
            if stat.S_ISDIR(st.st_mode):
                return _upper_dir(fs, parent, upper, st)
            return _upper_file(fs, parent, upper, st)
    lowers, st = lower_entries(fs, parent.lowers, name, fs.merged.mask(parent, name))
    if st is None:
        fs.merged.missed(parent)
        return None
    found = Found(st, None, lowers, fs.numbers.number(st.st_dev, st.st_ino))
    if st.st_nlink > 1 and index.covers(fs, stat.S_IFMT(st.st_mode)):
        return index.find(fs, found) or found
    return found


def _upper_dir(fs: Overlay, parent: Node, upper: Real, st: os.stat_result) -> Found:
    own = fs.marks.read_dir(fs.dirs.fd(upper))
    lowers: tuple[Real, ...] = ()
    lower_st = None
    redirect = None
    if not own.opaque and not _dot_opaque(fs, upper):
        if own.redirect and (parent.lowers or fs.follow_redirects):
            redirect = _checked_redirect(fs, own.redirect)
            trail = _Trail(parent.lowers, upper.name)
            trail.turn(fs, redirect, above=0)
            lowers, lower_st = _merged(fs, trail)
        else:
            lowers, lower_st = lower_entries(fs, parent.lowers, upper.name, fs.merged.mask(parent, upper.name))
            if lower_st is not None and not stat.S_ISDIR(lower_st.st_mode):
                lowers, lower_st = (), None
    shown = lower_st or st
    return Found(st, upper, lowers, fs.numbers.number(shown.st_dev, shown.st_ino), redirect)


def _upper_file(fs: Overlay, parent: Node, upper: Real, st: os.stat_result) -> Found:
    own = fs.marks.read_file(fs.dirs.fd(upper.parent or upper), upper.name)
    lowers: tuple[Real, ...] = ()
    metacopy = own.metacopy and stat.S_ISREG(st.st_mode)
    if metacopy:
        lowers = (_metacopy_data(fs, parent.lowers, upper, own.redirect),)
    number = origin_number(fs, own.origin) or fs.numbers.number(st.st_dev, st.st_ino)
    found = Found(st, upper, lowers, number, own.redirect if metacopy else None, metacopy)
    if own.nlink is not None and own.origin is not None and fs.index is not None:
        return index.find_upper(fs, found, own)
    return found


def origin_number(fs: Overlay, origin: bytes | None) -> int:
    """The inode number of the lower object an `origin` mark names; 0 where it can't be told."""
    unpacked = marks.unpack_handle(origin) if origin else None
    if unpacked is None:
        return 0
    _, handle, uuid = unpacked
    layer = fs.origins.get(uuid)
    if layer is None or layer.inode_of is None:
        return 0
    try:
        return fs.numbers.number(layer.dev, layer.inode_of(handle))
    except struct.error:
        # a handle too short for this filesystem: junk
        return 0


def entry(fs: Overlay, base: Real, name: bytes) -> os.stat_result | _Whiteout | None:
    """What one layer's directory `base` says of `name`: its attributes, a whiteout, or nothing."""
    dir_fd = fs.dirs.fd(base)
    try:
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return WHITEOUT if has_dot_whiteout(fs, dir_fd, name) else None
    if marks.is_whiteout(st):
        return WHITEOUT
    if marks.is_dot_name(name) and stat.S_ISREG(st.st_mode) and not fs.marks.is_literal(dir_fd, name):
        return None
    if st.st_size == 0 and stat.S_ISREG(st.st_mode) and fs.marks.is_xattr_whiteout(dir_fd, name):
        return WHITEOUT
    return st


def has_dot_whiteout(fs: Overlay, dir_fd: int, name: bytes) -> bool:
    """Whether an AUFS-style whiteout of `name` is in the directory open at `dir_fd`."""
    mark = marks.DOT_WHITEOUT + name
    if len(mark) > NAME_MAX:
        return False
    try:
        st = os.stat(mark, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(st.st_mode) and not fs.marks.is_literal(dir_fd, mark)


def _dot_opaque(fs: Overlay, real: Real) -> bool:
    """Whether an AUFS-style mark ends the stack at the directory `real`: opaque within, or a whiteout beside it."""
    assert real.parent is not None
    try:
        os.stat(marks.DOT_OPAQUE, dir_fd=fs.dirs.fd(real), follow_symlinks=False)
        return True
    except FileNotFoundError:
        return has_dot_whiteout(fs, fs.dirs.fd(real.parent), real.name)


def lower_entries(
    fs: Overlay, dirs: Sequence[Real], name: bytes, mask: int = EVERYWHERE
) -> tuple[tuple[Real, ...], os.stat_result | None]:
    """What `name` is in the lower directories `dirs`, topmost first, with the attributes of the topmost.

    A directory is all the directories it merges; anything else is itself and, where it is a metacopy, its data. Only
    the directories whose bits are in `mask` can have anything of this name.
    """
    found: list[Real] = []
    first: os.stat_result | None = None
    for position in positions(mask, len(dirs)):
        base = dirs[position]
        st = entry(fs, base, name)
        if st is None:
            continue
        if isinstance(st, _Whiteout):
            break
        real = Real(base.layer, base, name)
        if not stat.S_ISDIR(st.st_mode):
            if not found:
                return _lower_file(fs, dirs[position + 1 :], real, st), st
            break
        found.append(real)
        first = first or st
        if position + 1 == len(dirs) and (base.layer is fs.lower_roots[-1].layer or not fs.follow_redirects):
            # Nothing is below, or nothing that a redirect would be followed to.
            break
        own = fs.marks.read_dir(fs.dirs.fd(real))
        if own.opaque or _dot_opaque(fs, real):
            break
        if own.redirect:
            trail = _Trail(dirs[position + 1 :], name)
            trail.turn(fs, _checked_redirect(fs, own.redirect), above=base.layer.index)
            found.extend(_merged(fs, trail)[0])
            break
    return tuple(found), first


class _Trail:
    """The way down the lower layers to one object: a name in each of some directories, or a path in each of the layers.

    A redirect on the way, of a directory on the path too, rewrites it for the layers below. So each layer is looked at
    once, however they refer to one another (ovl_lookup_layer, ovl_check_redirect).
    """

    __slots__ = ("absolute", "at", "dirs", "ended", "names")

    def __init__(self, dirs: Sequence[Real], name: bytes) -> None:
        self.dirs = dirs
        self.at = 0
        self.names = [name]
        self.absolute = False
        self.ended = False

    def turn(self, fs: Overlay, redirect: bytes, *, above: int, rest: int = 0) -> None:
        """Obey a redirect met in the layer `above`, of the directory on the path that `rest` names come after."""
        kept = self.names[len(self.names) - rest :]
        if not redirect.startswith(b"/"):
            self.names = [*self.names[: len(self.names) - rest - 1], redirect, *kept]
            return
        self.names = [*redirect[1:].split(b"/"), *kept]
        if not self.absolute:
            self.absolute = True
            self.dirs = [root for root in fs.lower_roots if root.layer.index > above]
            self.at = 0

    def next(self, fs: Overlay) -> tuple[Real, os.stat_result] | None:
        """The object in the next layer that has it, None where nothing more is to be found."""
        while not self.ended and self.at < len(self.dirs):
            base = self.dirs[self.at]
            self.at += 1
            found = self._in_layer(fs, base)
            if found is not None:
                return found
        return None

    def _in_layer(self, fs: Overlay, base: Real) -> tuple[Real, os.stat_result] | None:
        real, found = base, None
        rest = len(self.names)
        for name in self.names:
            rest -= 1
            st = entry(fs, real, name)
            if st is None:
                return None
            if isinstance(st, _Whiteout) or (rest and not stat.S_ISDIR(st.st_mode)):
                self.ended = True
                return None
            real = Real(base.layer, real, name)
            found = real, st
            if not stat.S_ISDIR(st.st_mode) or base.layer is fs.lower_roots[-1].layer:
                continue
            own = fs.marks.read_dir(fs.dirs.fd(real))
            if own.opaque or _dot_opaque(fs, real):
                self.ended = True
            elif own.redirect:
                self.turn(fs, _checked_redirect(fs, own.redirect), above=base.layer.index, rest=rest)
        return found


def _merged(fs: Overlay, trail: _Trail) -> tuple[tuple[Real, ...], os.stat_result | None]:
    """The directories a trail leads to, and the attributes of the topmost; nothing if that is no directory."""
    found: list[Real] = []
    first: os.stat_result | None = None
    while (step := trail.next(fs)) is not None:
        real, st = step
        if not stat.S_ISDIR(st.st_mode):
            break
        found.append(real)
        first = first or st
    return tuple(found), first


def lower_path(node: Node, parent: Node, name: bytes) -> bytes:
    """The path from the root at which the lower layers, merged, have a node that is `name` in `parent`.

    It is what an absolute redirect holds: the names the mount shows, but for those that upper redirects replace.
    """
    names = [node.redirect or name]
    at: Node | None = parent
    while at is not None and at.parent is not None and not names[-1].startswith(b"/"):
        names.append(at.redirect or at.name)
        at = at.parent
    names.reverse()
    path = b"/".join(names)
    return path if path.startswith(b"/") else b"/" + path


def _checked_redirect(fs: Overlay, redirect: bytes) -> bytes:
    """Refuse a redirect that may not be followed (EPERM) or makes no sense (EIO)."""
    if not fs.follow_redirects:
        raise OSError(errno.EPERM, "refusing to follow a redirect: redirect_dir=nofollow", redirect)
    _check_path(redirect)
    return redirect


def _check_path(redirect: bytes) -> None:
    parts = redirect[1:].split(b"/") if redirect.startswith(b"/") else [redirect]
    if b"\0" in redirect or any(part in (b"", b".", b"..") or b"/" in part or len(part) > NAME_MAX for part in parts):
        raise OSError(errno.EIO, "a redirect that is no path", redirect)


def _lower_file(fs: Overlay, below: Sequence[Real], real: Real, st: os.stat_result) -> tuple[Real, ...]:
    own = _file_marks(fs, real, st)
    if not own.metacopy:
        return (real,)
    return (real, _metacopy_data(fs, below, real, own.redirect))


def _file_marks(fs: Overlay, real: Real, st: os.stat_result) -> marks.FileMarks:
    """The marks of a lower file, as far as they matter: an empty one is no metacopy."""
    if not stat.S_ISREG(st.st_mode) or not st.st_size:
        return marks.NO_FILE_MARKS
    assert real.parent is not None
    return fs.marks.read_file(fs.dirs.fd(real.parent), real.name)


def _metacopy_data(fs: Overlay, below: Sequence[Real], real: Real, redirect: bytes | None) -> Real:
    """Where the data of the metacopy `real` lives: in a lower layer, or by an absolute redirect in a data-only one.

    Without metacopy=on only a lower layer's redirect is followed, and only to a data-only layer, as in the kernel since
    Linux 6.16. Raises EPERM for any other then, EIO where there is no such file.
    """
    name = real.name
    trail = _Trail(below, name)
    while True:
        if redirect:
            absolute = redirect.startswith(b"/")
            if not fs.metacopy and (real.layer.index == 0 or not fs.data_layers or not absolute):
                raise OSError(errno.EPERM, "refusing to follow a metacopy's redirect without metacopy=on", redirect)
            _check_path(redirect)
            trail.turn(fs, redirect, above=real.layer.index)
        step = trail.next(fs) if fs.metacopy or not redirect else None
        if step is None and trail.absolute:
            step = _data_only_entry(fs, trail.names)
        if step is None or not stat.S_ISREG(step[1].st_mode):
            raise OSError(errno.EIO, "a metacopy without data below it", name)
        real, st = step
        own = marks.NO_FILE_MARKS if real.layer.data_only else _file_marks(fs, real, st)
        if not own.metacopy:
            return real
        # Its data is below even where an opaque directory on the way hides all that is.
        trail.ended = False
        redirect = own.redirect


def _data_only_entry(fs: Overlay, path: Sequence[bytes]) -> tuple[Real, os.stat_result] | None:
    *parents, name = path
    for layer in fs.data_layers:
        base = layer.root
        for part in parents:
            base = Real(layer, base, part)
        try:
            st = os.stat(name, dir_fd=fs.dirs.fd(base), follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            # not in this layer
            continue
        return Real(layer, base, name), st
    return None


def node_for(fs: Overlay, parent: Node, name: bytes, found: Found) -> Node:
    """The node of what was found: the one another name of the same object already has, or a new one."""
    kind = stat.S_IFMT(found.st.st_mode)
    upper_ino = found.st.st_ino if found.upper is not None else 0
    if kind != stat.S_IFDIR:
        known = fs.nodes.by_id.get(found.number)
        if known is not None and _same_object(fs, known, kind, upper_ino, found):
            known.add_name(parent, name)
            if found.upper is not None and (known.pinned >= 0 or nameless.named_in_work(fs, known)):
                before, known.upper = known.upper, found.upper
                nameless.let_go(fs, known)
                nameless.let_go_of_name(fs, before)
            return known
    node = Node(kind, parent, name, found.upper, found.lowers)
    node.upper_ino = upper_ino
    node.redirect = found.redirect
    node.metacopy = found.metacopy
    node.indexed = found.indexed
    node.nlink = found.nlink
    fs.nodes.add(node, found.number)
    if parent.children is None:
        parent.children = {}
    parent.children[name] = node
    return node


def _same_object(fs: Overlay, known: Node, kind: int, upper_ino: int, found: Found) -> bool:
    """Whether a node with the number of what was found is the same hard-linked object, and may be one node with it."""
    if known.kind != kind:
        return False
    if found.indexed and known.indexed:
        return True
    if known.upper is not None or found.upper is not None:
        # The inode of a pinned node can't be another object's by now, were this its last name.
        return known.upper_ino == upper_ino and (found.st.st_nlink > 1 or known.pinned >= 0)
    # Without an index these names part on copy-up, so they are one object only while nothing can be copied up.
    return found.st.st_nlink > 1 and (index.covers(fs, kind) or fs.work is None)


def lower_positive(fs: Overlay, parent: Node, name: bytes) -> bool:
    """Whether `name` would show something of the lower layers if the upper layer had nothing there."""
    for position in positions(fs.merged.mask(parent, name), len(parent.lowers)):
        st = entry(fs, parent.lowers[position], name)
        if isinstance(st, _Whiteout):
            return False
        if st is not None:
            return True
    return False


def forget(fs: Overlay, node: Node, count: int) -> None:
    """Take back `count` of the kernel's references; a node without any, and with nothing below it, goes."""
    node.lookups -= count
    while node.lookups <= 0 and not node.opens and not node.children and node.parent is not None:
        parent = node.parent
        for above, name in node.names():
            if above.children is not None and above.children.get(name) is node:
                del above.children[name]
        release(fs, node)
        node = parent


def release(fs: Overlay, node: Node) -> None:
    """Let go of what a node holds; it must be out of every directory."""
    fs.nodes.discard(node)
    fs.files.drop(node)
    fs.merged.drop(node)
    fs.drafts.drop(node)
    nameless.let_go(fs, node)
    nameless.let_go_of_name(fs, node.upper)
    if node.kind == stat.S_IFDIR:
        for real in (node.upper, *node.lowers):
            if real is not None:
                fs.dirs.drop(real)
