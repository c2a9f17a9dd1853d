"""Renaming: everything that can fail first, then one renameat2, then memory.

A directory with lower parts keeps them through a redirect; one without is made opaque where lower layers would show
through at its new name. Source: fs/overlayfs/dir.c (ovl_rename, ovl_set_redirect).
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import copyup, lookup, marks, nameless, objects, protection, readdir, remove
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.requests import Steps
from overlayfs_py.core.work import Staged
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import xattrs
from overlayfs_py.sys.rename import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

log = Journal(__name__)

_FLAGS = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT
# The kernel makes no redirect longer than this, and we follow suit: its mounts must be able to read it.
_REDIRECT_MAX = 256


class _Place:
    """One end of a rename: a name in a directory, and the node it leads to, if any."""

    __slots__ = ("name", "node", "parent")

    def __init__(self, parent: Node, name: bytes, node: Node | None) -> None:
        self.parent = parent
        self.name = name
        self.node = node


def rename(
    fs: Overlay, old_parent: Node, old_name: bytes, new_parent: Node, new_name: bytes, flags: int = 0
) -> Steps[None]:
    """renameat2(2) with its flags. RENAME_WHITEOUT leaves a whiteout, which an overlay shows as nothing.

    Raises what renameat2 does; EXDEV for a directory with lower parts where redirects are not written.
    """
    if flags & ~_FLAGS or (flags & RENAME_EXCHANGE and flags & (RENAME_NOREPLACE | RENAME_WHITEOUT)):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), new_name)
    fs.writable()
    exchange = bool(flags & RENAME_EXCHANGE)
    ready = False
    while not ready:
        old = _Place(old_parent, old_name, lookup.lookup(fs, old_parent, old_name))
        new = _Place(new_parent, new_name, _lookup_or_none(fs, new_parent, new_name))
        if old.node is not new.node:
            _check_protection(fs, old, new)
        _check(fs, old, new, flags)
        if old.node is new.node:
            # Two names of one object: nothing to do, says rename(2).
            return
        yield from _prepare(fs, old, new, exchange=exchange)
        # Another operation may have come between while data was copied.
        ready = _holds(old) and _holds(new)
    if exchange:
        _exchange(fs, old, new)
    else:
        _move(fs, old, new, whiteout=bool(flags & RENAME_WHITEOUT))


def _holds(place: _Place) -> bool:
    """Whether a name still leads to what it led to."""
    return (place.parent.children or {}).get(place.name) is place.node


def _lookup_or_none(fs: Overlay, parent: Node, name: bytes) -> Node | None:
    try:
        return lookup.lookup(fs, parent, name)
    except FileNotFoundError:
        return None


def _check(fs: Overlay, old: _Place, new: _Place, flags: int) -> None:
    assert old.node is not None
    if new.parent.removed:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), new.name)
    if flags & RENAME_NOREPLACE and new.node is not None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new.name)
    if flags & RENAME_EXCHANGE:
        if new.node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), new.name)
        _check_movable(fs, new.node)
    _check_movable(fs, old.node)
    if new.node is not None and new.node is not old.node and not flags & RENAME_EXCHANGE:
        _check_replaceable(fs, old.node, new.node)
        _check_one_step(fs, old, flags)


def _check_protection(fs: Overlay, old: _Place, new: _Place) -> None:
    assert old.node is not None
    protection.check_removal(fs, old.parent, old.node)
    if new.node is None:
        protection.check(fs, new.parent, protection.IMMUTABLE)
    else:
        protection.check_removal(fs, new.parent, new.node)


def _check_movable(fs: Overlay, node: Node) -> None:
    if node.kind == stat.S_IFDIR and node.lowers and not fs.write_redirects:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), node.name)


def _check_one_step(fs: Overlay, old: _Place, flags: int) -> None:
    """A merged directory can't both leave a whiteout and replace another in one step without RENAME_WHITEOUT."""
    assert old.node is not None
    work = fs.writable()
    if old.node.kind != stat.S_IFDIR or not old.node.lowers or (work.whiteouts == "device" and work.rename_whiteout):
        return
    if flags & RENAME_WHITEOUT or lookup.lower_positive(fs, old.parent, old.name):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), old.name)


def _check_replaceable(fs: Overlay, node: Node, replaced: Node) -> None:
    if replaced.kind == stat.S_IFDIR:
        if node.kind != stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), replaced.name)
        if not readdir.is_empty(fs, replaced):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), replaced.name)
    elif node.kind == stat.S_IFDIR:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), replaced.name)


def _prepare(fs: Overlay, old: _Place, new: _Place, *, exchange: bool) -> Steps[None]:
    """Copy up all that moves or is moved into, and write what its new place needs; nothing visible changes."""
    assert old.node is not None
    yield from copyup.copy_up_name(fs, old.node, old.parent, old.name)
    copyup.copy_up_dirs(fs, new.parent)
    if new.node is not None and exchange:
        yield from copyup.copy_up_name(fs, new.node, new.parent, new.name)
    elif new.node is not None:
        yield from remove.prepare_linked(fs, new.node, new.parent, new.name)
    if old.node.lowers:
        _settle_dot_whiteout(fs, new)
    if exchange and new.node is not None and new.node.lowers:
        _settle_dot_whiteout(fs, old)
    _mark_for_place(fs, old.node, old, new)
    if exchange:
        assert new.node is not None
        _mark_for_place(fs, new.node, new, old)
    if old.parent is not new.parent:
        copyup.mark_impure(fs, new.parent)
        if exchange:
            copyup.mark_impure(fs, old.parent)


def _settle_dot_whiteout(fs: Overlay, place: _Place) -> None:
    """Put the upper layer's own kind of mark in the place of an AUFS-style whiteout.

    Beside a directory such a whiteout ends the stack, which must not happen to one that moves there.
    """
    dir_fd = fs.dir_fd(place.parent)
    if not lookup.has_dot_whiteout(fs, dir_fd, place.name):
        return
    node = place.node
    if node is None and not remove.is_in_upper(fs, place.parent, place.name):
        staged = remove.stage_whiteout(fs, place.parent)
        try:
            staged.publish(fs.dir_fd(place.parent), place.name)
        finally:
            staged.close()
    elif node is not None and node.kind == stat.S_IFDIR:
        with objects.reached(fs, node) as fd:
            xattrs.fset(fd, fs.marks.opaque, b"y")
    os.unlink(marks.DOT_WHITEOUT + place.name, dir_fd=fs.dir_fd(place.parent))


def _mark_for_place(fs: Overlay, node: Node, source: _Place, target: _Place) -> None:
    """Write the marks a node needs to mean the same at `target` as it does at `source`."""
    if node.kind == stat.S_IFDIR:
        if node.lowers:
            _set_redirect(fs, node, source, target)
        elif target.parent.lowers:
            with objects.reached(fs, node) as fd:
                if not fs.marks.read_dir(fd).opaque:
                    xattrs.fset(fd, fs.marks.opaque, b"y")
    elif node.metacopy:
        _set_redirect(fs, node, source, target)
    if marks.is_dot_name(target.name) and node.kind == stat.S_IFREG:
        with objects.reached(fs, node) as fd:
            xattrs.fset(fd, fs.marks.literal, b"y")


def _set_redirect(fs: Overlay, node: Node, source: _Place, target: _Place) -> None:
    """Note where a node's lower parts are: a name where it stays in its directory, a path from the root elsewhere."""
    # Other names of an indexed object, in other directories, share its marks.
    same_directory = source.parent is target.parent and node.aliases is None and not node.indexed
    if node.redirect is not None and (same_directory or node.redirect.startswith(b"/")):
        return
    if same_directory and not node.metacopy:
        redirect = source.name
    elif same_directory and node.lowers[-1].name == source.name:
        redirect = source.name
    else:
        redirect = lookup.lower_path(node, source.parent, source.name)
    if len(redirect) > _REDIRECT_MAX:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source.name)
    with objects.reached(fs, node) as fd:
        xattrs.fset(fd, fs.marks.redirect, redirect)
    node.redirect = redirect


def _move(fs: Overlay, old: _Place, new: _Place, *, whiteout: bool) -> None:
    assert old.node is not None
    work = fs.writable()
    hidden_below = lookup.lower_positive(fs, old.parent, old.name)
    needs_whiteout = whiteout or hidden_below
    replaced = new.node
    if replaced is not None and replaced.kind == stat.S_IFDIR and replaced.upper is not None:
        _empty_for_replacement(fs, replaced, new)
    in_upper = remove.is_in_upper(fs, new.parent, new.name)
    swap_whiteout = in_upper and replaced is None and old.node.kind == stat.S_IFDIR
    kept = nameless.Kept() if replaced is None else remove.keep(fs, replaced, new.parent, new.name)
    try:
        if swap_whiteout:
            # A directory can't replace a whiteout by a plain rename; exchanged, it is where it may be needed.
            assert fs.upper is not None
            if fs.upper.xattr_whiteouts:
                remove.allow_xattr_whiteouts(fs, old.parent)
            _renameat(fs, old, new, RENAME_EXCHANGE)
            if not needs_whiteout:
                _drop_whiteout(fs, old.parent, old.name)
        elif not needs_whiteout:
            _renameat(fs, old, new, 0)
        elif work.whiteouts == "device" and work.rename_whiteout:
            _renameat(fs, old, new, RENAME_WHITEOUT)
        else:
            _move_then_whiteout(fs, old, new, in_upper=in_upper)
    except OSError:
        nameless.undo(fs, kept)
        raise
    if replaced is not None:
        remove.after_removal(fs, replaced, new.parent, new.name, kept.fd, kept.name)
    moved(old.node, old.parent, old.name, new.parent, new.name)


def _empty_for_replacement(fs: Overlay, replaced: Node, new: _Place) -> None:
    """A directory that shows nothing may still hold whiteouts, over which nothing can be renamed."""
    assert replaced.upper is not None
    fd = objects.open_path(fs, replaced.upper)
    try:
        holds = bool(fs.writable().listing(fd, b"."))
    finally:
        os.close(fd)
    if holds:
        remove.clear_empty(fs, replaced)


def _renameat(fs: Overlay, old: _Place, new: _Place, flags: int) -> None:
    renameat2(fs.dir_fd(old.parent), old.name, fs.dir_fd(new.parent), new.name, flags)


def _move_then_whiteout(fs: Overlay, old: _Place, new: _Place, *, in_upper: bool) -> None:
    """Rename and leave a whiteout where the filesystem can't do both in one step.

    Where the new name is free, the whiteout is put there first, where it changes nothing, and then both are exchanged.
    """
    work = fs.writable()
    staged: Staged = remove.stage_whiteout(fs, old.parent)
    try:
        if in_upper or new.node is not None:
            _move_over_then_whiteout(fs, old, new, staged)
            return
        before = os.fstat(fs.dir_fd(new.parent))
        if old.parent is not new.parent and work.whiteouts == "xattr":
            remove.allow_xattr_whiteouts(fs, new.parent)
        staged.publish(fs.dir_fd(new.parent), new.name)
        try:
            _renameat(fs, old, new, RENAME_EXCHANGE)
        except OSError:
            _drop_whiteout(fs, new.parent, new.name)
            copyup.restore_times(fs, new.parent, before)
            raise
    finally:
        staged.close()


def _move_over_then_whiteout(fs: Overlay, old: _Place, new: _Place, whiteout: Staged) -> None:
    """Rename over something. An AUFS-style mark, which needs a name of its own, hides what is below meanwhile."""
    dir_fd = fs.dir_fd(old.parent)
    mark = marks.DOT_WHITEOUT + old.name
    if len(mark) > lookup.NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), old.name)
    before = os.fstat(dir_fd)
    old.parent.markless = False
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(mark, flags, 0o600, dir_fd=dir_fd))
    try:
        _renameat(fs, old, new, 0)
    except OSError:
        _drop_whiteout(fs, old.parent, mark)
        copyup.restore_times(fs, old.parent, before)
        raise
    try:
        whiteout.publish(fs.dir_fd(old.parent), old.name)
    except OSError as error:
        log.warning("%s is hidden by an AUFS-style whiteout: %s", os.fsdecode(old.name), error.strerror)
        return
    _drop_whiteout(fs, old.parent, mark)


def _drop_whiteout(fs: Overlay, parent: Node, name: bytes) -> None:
    """Remove a whiteout that hides nothing; if it can't be removed, it does no harm."""
    try:
        os.unlink(name, dir_fd=fs.dir_fd(parent))
    except OSError as error:
        log.warning("the whiteout %s stays: %s", os.fsdecode(name), error.strerror)


def _exchange(fs: Overlay, old: _Place, new: _Place) -> None:
    assert old.node is not None and new.node is not None
    _renameat(fs, old, new, RENAME_EXCHANGE)
    one, other = old.node, new.node
    one.drop_name(old.parent, old.name)
    other.drop_name(new.parent, new.name)
    _settle(one, new.parent, new.name)
    _settle(other, old.parent, old.name)


def moved(node: Node, old_parent: Node, old_name: bytes, new_parent: Node, new_name: bytes) -> None:
    """Tell memory that an object of the upper layer has been renamed."""
    node.drop_name(old_parent, old_name)
    _settle(node, new_parent, new_name)


def _settle(node: Node, parent: Node, name: bytes) -> None:
    """Tell memory that `node` is `name` in `parent` now."""
    node.add_name(parent, name)
    if node.indexed:
        return
    assert parent.upper is not None
    if node.kind == stat.S_IFDIR:
        # The descriptors of everything below stay good: the Real moves, its identity doesn't change.
        assert node.upper is not None
        node.upper.parent = parent.upper
        node.upper.name = name
    else:
        node.upper = Real(parent.upper.layer, parent.upper, name)
