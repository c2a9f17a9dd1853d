"""Where in a FUSE mount the merged tree begins: at the root that the kernel makes, or at a directory in that.

The kernel makes the root before it has agreed with the daemon to keep ACLs, and remembers of an inode from before that
never to cache any. Linux 6.18.42, 6.12.101 and 6.6.148 hold to that (they preserve ACL_DONT_CACHE in
forget_cached_acl): who isn't the owner of the root has the daemon asked for its ACL with every path that begins there.
A directory that is looked up after that agreement is like any other. So the root shows itself once more under a name,
for as long as it takes to mount that in its place; nobody sees the first one any more.
"""

from __future__ import annotations

import errno
import os

from mount_helper.kernel import unescape
from overlayfs_py.core.nodes import BELOW_ID, ROOT_ID
from overlayfs_py.records import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayfs_py.core.nodes import Node
    from overlayfs_py.core.overlay import Overlay

FSTAB = "/etc/fstab"
NAME = b"merged"


def is_in_fstab(mountpoint: bytes) -> bool:
    """Whether fstab(5) has an entry for a mountpoint.

    A path that leads there through symbolic links is not told: to follow it might mean to wait for a server.
    """
    try:
        with open(FSTAB, "rb") as table:
            lines = table.read().splitlines()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES):
            raise
        # no table for this process
        return False
    entries = (line.split() for line in lines if not line.lstrip().startswith(b"#"))
    return any(len(fields) > 1 and _normal(fields[1]) == mountpoint for fields in entries)


def _normal(place: bytes) -> bytes:
    try:
        return os.path.normpath(unescape(place))
    except ValueError:
        # a backslash that stands for itself
        return os.path.normpath(place)


class Beginning:
    """Which root the kernel asks for, `name` in the first one or, if that is empty, the first one."""

    __slots__ = ("name", "root", "settled")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.settled = not name
        self.root: Node | None = None

    def leads_from_root(self, name: bytes) -> bool:
        """Whether a name looked up in the root is that of the root, as it is until the mount is made."""
        return not self.settled and name == self.name

    def begin_below(self, fs: Overlay) -> None:
        """Have the root known by its other id, which is its inode number, too."""
        self.root = fs.root
        self.root.id = BELOW_ID
        fs.nodes.by_id[BELOW_ID] = self.root

    def settle(self, name: bytes) -> None:
        """It is mounted: what is `name` in the first root, or that itself if it is empty."""
        if self.root is not None and not name:
            self.root.id = ROOT_ID
        self.settled = True
