"""What to mount, and how to say that it could not be done."""

from __future__ import annotations

import os

SUBTYPE = b"overlayfs-py"


class HelperError(Exception):
    """The mount, or the unmount, could not be done; the message is one line that says why."""


class Request:
    """One FUSE mount. `flags` are the MS_* flags of mount(2); `context` is an SELinux label for every file.

    What is to be seen at the mountpoint is `root_name` in the daemon's root where that can be done, unless it is empty.
    """

    __slots__ = ("allow_other", "context", "default_permissions", "flags", "mountpoint", "root_name", "source")

    def __init__(
        self,
        *,
        mountpoint: bytes,
        source: bytes,
        flags: int,
        allow_other: bool,
        default_permissions: bool,
        context: bytes | None = None,
        root_name: bytes = b"",
    ) -> None:
        self.mountpoint = mountpoint
        self.source = source
        self.flags = flags
        self.allow_other = allow_other
        self.default_permissions = default_permissions
        self.context = context
        self.root_name = root_name

    def fuse_options(self) -> list[bytes]:
        """The options that the kernel's FUSE and fusermount3 share; fuse(4)."""
        words = ((b"default_permissions", self.default_permissions), (b"allow_other", self.allow_other))
        return [word for word, wanted in words if wanted]


def show(path: bytes) -> str:
    """A path as it can stand inside one line of a message."""
    return "'" + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in os.fsdecode(path)) + "'"
