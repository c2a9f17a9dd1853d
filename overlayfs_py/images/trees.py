"""Removing trees of any depth, and putting the overlay's marks on directories that are no mount's."""

from __future__ import annotations

import os
import secrets
import stat
from typing import Final

from overlayfs_py.core.marks import WHITEOUT_DEVICE, Marks
from overlayfs_py.sys import files, paths, xattrs
from overlayfs_py.sys.rename import renameat2

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def temporary_name() -> bytes:
    """A name that no one else has."""
    return b"#" + secrets.token_hex(8).encode()


def remove_tree(dir_fd: int, name: bytes) -> None:
    """Remove `name` with all below it, following no links.

    Directories are moved up beside `name` as they are met: neither depth nor descriptors grow with the tree. So
    `dir_fd` must be a directory in which names of ours mean nothing.
    """
    try:
        os.unlink(name, dir_fd=dir_fd)
        return
    except IsADirectoryError:
        pass
    pending = [name]
    while pending:
        top = pending.pop()
        fd = paths.open_dir_read(dir_fd, top)
        try:
            for child, _, _ in files.list_dir(fd):
                try:
                    os.unlink(child, dir_fd=fd)
                except IsADirectoryError:
                    moved = temporary_name()
                    renameat2(fd, child, dir_fd, moved)
                    pending.append(moved)
        finally:
            os.close(fd)
        os.rmdir(top, dir_fd=dir_fd)


def put_whiteout(root_fd: int, dir_fd: int, name: bytes, marks: Marks) -> None:
    """Hide `name`, which must be free, in the directory `dir_fd` of the layer `root_fd`."""
    try:
        files.make_node(dir_fd, name, stat.S_IFCHR, WHITEOUT_DEVICE)
        return
    except PermissionError:
        # no device nodes here, not even 0/0: an xattr whiteout, which the kernel looks for where opaque=x says so
        pass
    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=dir_fd)
    try:
        xattrs.fset(fd, marks.whiteout, b"y")
    finally:
        os.close(fd)
    for holder in (dir_fd, root_fd):
        xattrs.fset(holder, marks.opaque, b"x")
