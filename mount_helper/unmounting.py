"""Unmounting, by whichever of umount2(2) and fusermount3 the caller may use."""

import errno
import os

from mount_helper import fusermount, kernel
from mount_helper.request import HelperError, show


def unmount(mountpoint: bytes, device: bytes | None = None, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount the topmost mount on `mountpoint`; with `device` (`major:minor`), only if it is that one.

    `lazy` detaches a mount that is in use, and all others of that `device` there; `force` aborts its connection first,
    so that no request waits any longer.
    Does nothing where nothing is mounted any more. Raises HelperError, also for a mount that is in use.
    """
    if device is not None and kernel.topmost(mountpoint) != device:
        return
    flags = (kernel.MNT_DETACH if lazy else 0) | (kernel.MNT_FORCE if force else 0)
    try:
        kernel.unmount(mountpoint, flags)
    except OSError as error:
        if error.errno == errno.EPERM:
            fusermount.unmount(mountpoint, lazy=lazy)
        elif error.errno not in (errno.EINVAL, errno.ENOENT):
            # those two mean that it is no mountpoint now
            raise HelperError(f"cannot unmount {show(mountpoint)}: {error.strerror}") from error
        return
    if lazy and device is not None and kernel.topmost(mountpoint) == device:
        # Where it ended while one was being put in the place of another.
        unmount(mountpoint, device, lazy=True, force=force)


def unmount_if_dead(mountpoint: bytes) -> None:
    """Unmount a FUSE mount that nobody serves, which is how a helper that is killed in the middle leaves it.

    Raises HelperError.
    """
    try:
        os.stat(mountpoint)
    except OSError as error:
        # The second is the answer to a request that waited while the last descriptor was closed.
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            unmount(mountpoint, lazy=True)
