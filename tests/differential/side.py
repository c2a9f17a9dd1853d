"""One implementation over its own copy of the layers."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.differential.script import Handle
from tests.support.mounts import AnyPath, Mount, fuse_overlayfs_mount, kernel_mount, our_mount
from tests.support.syscalls import MS_NOATIME
from tests.support.trees import TRUSTED, USER, Stack, Tree, build, read_tree

Mounter = Callable[[AnyPath, list[bytes], bytes, bytes], contextlib.AbstractContextManager[Mount]]


@dataclass(frozen=True, slots=True)
class Profile:
    """What is compared: the options of both, the namespace of their marks, and whether it runs in a user namespace."""

    name: str
    kernel_options: str
    our_options: str
    prefix: str = TRUSTED
    user_namespace: bool = False
    metacopy: bool = False

    @property
    def keeps_inode_numbers(self) -> bool:
        """Whether the kernel keeps inode numbers when it copies up; see ACCEPTED in known.py."""
        return not self.user_namespace

    @property
    def atimes(self) -> bool:
        """Whether access times are compared; see UNCOMPARED in known.py."""
        return not self.user_namespace


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("privileged", "redirect_dir=on,index=on,xino=on,metacopy=off", ""),
        Profile("metacopy", "redirect_dir=on,index=on,xino=on,metacopy=on", "metacopy=on", metacopy=True),
        Profile("userxattr", "userxattr,index=on,xino=on", "userxattr", prefix=USER),
        Profile("portable", "redirect_dir=on,index=on,xino=on,metacopy=off", "engine=portable"),
        Profile("passthrough", "redirect_dir=on,index=on,xino=on,metacopy=off", "engine=native,io=passthrough"),
        Profile("uring", "redirect_dir=on,index=on,xino=on,metacopy=off", "engine=native,uring=on"),
        Profile("rootless", "userxattr,xino=on", "", prefix=USER, user_namespace=True),
    )
}


def kernel(options: str) -> Mounter:
    """Mounts the kernel's overlayfs, without access times as ours does by default."""
    return lambda target, lowers, upper, work: kernel_mount(target, lowers, upper, work, options, MS_NOATIME)


def ours(options: str) -> Mounter:
    return lambda target, lowers, upper, work: our_mount(target, lowers, upper, work, options)


def fuse_overlayfs(options: str) -> Mounter:
    """To see that the comparison finds differences."""
    return lambda target, lowers, upper, work: fuse_overlayfs_mount(target, lowers, upper, work, options)


class Side:
    """Layers, a mount of them, and the files a script holds open there.

    Built with `stack`; each lower is read back then, so that `lowers_changed` can tell whether any was touched.
    """

    def __init__(
        self, base: Path, stack: Stack, mounter: Mounter, profile: Profile, since: int, *, stale_handles: bool
    ) -> None:
        self.base = os.fsencode(base)
        self.name = base.name
        self.mounter = mounter
        self.since = since
        self.stale_handles = stale_handles
        self.atimes = profile.atimes
        self.handles: dict[int, Handle] = {}
        self.lowers: list[bytes] = []
        self._kept: list[Tree] = []
        self._rotations = 0
        self._mount = contextlib.ExitStack()
        self._log: Path | None = None
        self.mnt = self._directory(b"mnt")
        for number, layer in enumerate(stack):
            lower = self._directory(b"lower%d" % number)
            build(lower, layer, profile.prefix)
            self.lowers.append(lower)
            self._kept.append(read_tree(lower, since))
        self._new_upper()

    def _directory(self, name: bytes) -> bytes:
        path = os.path.join(self.base, name)
        os.makedirs(path)
        return path

    def _new_upper(self) -> None:
        self.upper = self._directory(b"upper%d" % self._rotations)
        self.work = self._directory(b"work%d" % self._rotations)

    def at(self, path: bytes) -> bytes:
        return self.mnt + b"/" + path

    def mount(self, mounter: Mounter | None = None) -> None:
        live = (mounter or self.mounter)(self.mnt, self.lowers, self.upper, self.work)
        self._log = self._mount.enter_context(live).log

    def unmount(self) -> None:
        """Close what is held and unmount; raises MountFailed when the mount or its daemon misbehaves."""
        for handle in self.handles.values():
            os.close(handle.descriptor)
        self.handles.clear()
        self._mount.close()

    def log(self) -> str:
        """What the daemon of the present mount has logged."""
        if self._log is None or not self._log.exists():
            return ""
        return self._log.read_text(errors="backslashreplace")

    def remount(self) -> None:
        self.unmount()
        self.mount()

    def rotate(self) -> None:
        self.unmount()
        self.lowers.insert(0, self.upper)
        self._kept.insert(0, read_tree(self.upper, self.since))
        self._rotations += 1
        self._new_upper()
        self.mount()

    def would_lose_links(self) -> bool:
        index = os.path.join(self.work, b"index")
        return os.path.isdir(index) and bool(os.listdir(index))

    def visible(self) -> Tree:
        return read_tree(self.mnt, self.since)

    def on_disk(self, directory: bytes) -> Tree:
        return read_tree(directory, self.since)

    def lowers_before_and_now(self) -> list[tuple[Tree, Tree]]:
        return [(kept, read_tree(lower, self.since)) for kept, lower in zip(self._kept, self.lowers, strict=True)]
