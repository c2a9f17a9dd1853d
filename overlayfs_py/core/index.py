"""Hard links kept across copy-up, as the kernel's index=on keeps them.

A hard-linked lower object that is copied up gets a link in `index/` of the work directory, named after its file handle
in hexadecimal; all its names, in whatever layer, lead to that one. How many names it has is noted in its `nlink` mark:
the difference to the upper object's own count (`U+1`), or to the lower one's (`L-1`).
Source: fs/overlayfs/namei.c (ovl_get_index_name), fs/overlayfs/inode.c (ovl_get_nlink).
"""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.core import marks, objects
from overlayfs_py.core.marks import FileMarks
from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.work import Work
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import handles, xattrs

if TYPE_CHECKING:
    from overlayfs_py.core.lookup import Found
    from overlayfs_py.core.overlay import Overlay

log = Journal(__name__)


def covers(fs: Overlay, kind: int) -> bool:
    """Whether hard links of objects of this type are kept. Marks in `user.*` go on regular files and directories alone
    (xattr(7)); the names of other objects part on copy-up then."""
    if fs.index is None or kind == stat.S_IFDIR:
        return False
    return kind == stat.S_IFREG or not fs.marks.prefix.startswith(b"user.")


def origin_of(fs: Overlay, real: Real) -> bytes | None:
    """The value of the `origin` mark for a copy of `real`; None where its filesystem gives no handles we know."""
    if real.layer.inode_of is None or real.parent is None:
        return None
    kind, handle = handles.file_handle(fs.dirs.fd(real.parent), real.name)
    return marks.pack_handle(kind, handle, real.layer.uuid)


def entry_name(origin: bytes) -> bytes:
    """The name in the index of the object with this origin."""
    return origin.hex().encode()


def find(fs: Overlay, found: Found) -> Found | None:
    """The copy in the index of a hard-linked lower object, or None while it has none."""
    assert fs.index is not None
    origin = origin_of(fs, found.lowers[0])
    if origin is None:
        return None
    upper = Real(fs.index, fs.index.root, entry_name(origin))
    try:
        st = objects.stat_real(fs, upper)
    except FileNotFoundError:
        return None
    if stat.S_IFMT(st.st_mode) != stat.S_IFMT(found.st.st_mode):
        # not a copy of this object: the lower layer changed under the index
        return None
    own = fs.marks.read_file(fs.index.fd, upper.name)
    nlink = _parse_nlink(own.nlink, st.st_nlink, found.st.st_nlink)
    lowers = found.lowers[-1:] if own.metacopy else ()
    return found._replace(st=st, upper=upper, lowers=lowers, metacopy=own.metacopy, indexed=True, nlink=nlink)


def find_upper(fs: Overlay, found: Found, own: FileMarks) -> Found:
    """The indexed object behind an upper file with an `nlink` mark; `found` itself where the index has none."""
    assert fs.index is not None and own.origin is not None
    upper = Real(fs.index, fs.index.root, entry_name(own.origin))
    try:
        st = objects.stat_real(fs, upper)
    except FileNotFoundError:
        return found
    if st.st_ino != found.st.st_ino:
        return found
    lower_nlink = _lower_nlink(fs, own.origin)
    nlink = _parse_nlink(own.nlink, st.st_nlink, lower_nlink)
    return found._replace(upper=upper, indexed=True, nlink=nlink)


def _lower_nlink(fs: Overlay, origin: bytes) -> int:
    """The link count of the lower object with this origin; 0 where it can't be opened by its handle."""
    unpacked = marks.unpack_handle(origin)
    if unpacked is None:
        return 0
    kind, handle, uuid = unpacked
    layer = fs.origins.get(uuid)
    if layer is None:
        return 0
    try:
        root = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=layer.fd)
        try:
            fd = handles.open_by_handle(root, kind, handle, os.O_PATH)
        finally:
            os.close(root)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ESTALE, errno.EOPNOTSUPP):
            raise
        # without the capability, or with the lower object gone, the upper count alone has to serve
        return 0
    try:
        return os.fstat(fd).st_nlink
    finally:
        os.close(fd)


def _split_nlink(mark: bytes | None) -> tuple[bytes, int] | None:
    """What an `nlink` mark counts from, U or L, and how many more; None for one that is not sound."""
    if not mark or mark[:1] not in (b"U", b"L") or mark[1:2] not in (b"+", b"-"):
        return None
    digits = mark[2:]
    return (mark[:1], int(mark[1:])) if digits.isdigit() and len(digits) <= 9 else None


def _parse_nlink(mark: bytes | None, upper: int, lower: int) -> int:
    """The link count an `nlink` mark stands for; without a sound one, the upper count less the index's own link."""
    found = _split_nlink(mark)
    if found is None or (found[0] == b"L" and not lower):
        return max(upper - 1, 1)
    count = (upper if found[0] == b"U" else lower) + found[1]
    return count if count > 0 else max(upper - 1, 1)


def note_before_change(fs: Overlay, node: Node) -> None:
    """Write the link count relative to the upper object's, which an operation is about to change in step with it."""
    with objects.reached(fs, node) as fd:
        difference = node.nlink - os.fstat(fd).st_nlink
        xattrs.fset(fd, fs.marks.nlink, b"U%+d" % difference)


def link_up(fs: Overlay, node: Node, parent: Node, name: bytes, *, lower_nlink: int) -> None:
    """Give an indexed object its name in the upper layer, where only a lower layer has it so far.

    The upper object's own count grows by this without the mount's: until it has, the lower one's is the reference.
    """
    assert fs.index is not None and node.upper is not None and parent.upper is not None
    with objects.reached(fs, node) as fd:
        xattrs.fset(fd, fs.marks.nlink, b"L%+d" % (node.nlink - lower_nlink))
    os.link(
        node.upper.name,
        name,
        src_dir_fd=fs.index.fd,
        dst_dir_fd=fs.dir_fd(parent),
        follow_symlinks=False,
    )


def drop_if_unused(fs: Overlay, node: Node) -> None:
    """Remove the index entry of an object that has lost its last name.

    That name is gone already, so a failure is noted and no more; the next mount tries again.
    """
    if node.indexed and node.nlink <= 0 and fs.index is not None and node.upper is not None:
        try:
            os.unlink(node.upper.name, dir_fd=fs.index.fd)
        except OSError as error:
            log.warning("%s stays in the index: %s", os.fsdecode(node.upper.name), error.strerror)


def clean(fs: Overlay) -> None:
    """Remove the index entries of objects that have lost their last name when a mount ended before it could."""
    assert fs.index is not None
    for name, _, _ in Work.listing(fs.index.fd, b"."):
        st = os.stat(name, dir_fd=fs.index.fd, follow_symlinks=False)
        if st.st_nlink != 1 or stat.S_ISDIR(st.st_mode):
            continue
        found = _split_nlink(fs.marks.read_file(fs.index.fd, name).nlink)
        if found is not None and found[0] == b"U" and st.st_nlink + found[1] <= 0:
            os.unlink(name, dir_fd=fs.index.fd)
