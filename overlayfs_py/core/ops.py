"""Every operation the overlay knows, by the name of the request that asks for it.

One table: each engine handles each row, or declares it unsupported; a test holds them to it. Operations that may block
are generators (requests.Steps); the others answer at once. Row names are those of the FUSE protocol, in lower case.
"""

from __future__ import annotations

import os

from overlayfs_py.core import attrs, create, export, files, flags, lookup, readdir, remove, rename
from overlayfs_py.records import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from overlayfs_py.core.overlay import Overlay


def statfs(fs: Overlay) -> os.statvfs_result:
    """The upper layer's filesystem, or the topmost lower's in a mount without one (statvfs(3))."""
    return os.fstatvfs((fs.upper or fs.lower_roots[0].layer).fd)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "lookup": lookup.lookup_entry,
    "lookup_id": export.lookup_id,
    "lookup_parent": export.lookup_parent,
    "forget": lookup.forget,
    "getattr": attrs.getattr,
    "setattr": attrs.setattr,
    "readlink": attrs.readlink,
    "mknod": create.mknod,
    "mkdir": create.mkdir,
    "symlink": create.symlink,
    "link": create.link,
    "create": create.create,
    "unlink": remove.unlink,
    "rmdir": remove.rmdir,
    "rename": rename.rename,
    "open": files.open_file,
    "read": files.read,
    "write": files.write,
    "release": files.release,
    "fsync": files.fsync,
    "opendir": readdir.open_dir,
    "readdir": readdir.listing,
    "releasedir": readdir.release_dir,
    "fsyncdir": files.fsync_dir,
    "statfs": statfs,
    "getxattr": attrs.getxattr,
    "setxattr": attrs.setxattr,
    "listxattr": attrs.listxattr,
    "removexattr": attrs.removexattr,
    "tmpfile": create.tmpfile,
    "fallocate": files.allocate,
    "lseek": files.seek,
    "copy_file_range": files.copy_range,
    "syncfs": files.sync_fs,
    "get_flags": flags.get_flags,
    "set_flags": flags.set_flags,
}
