"""The root of a container: its image's layers and its own upper layer, mounted by `overlayfs_py.mount`."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import mount_helper
from overlayfs_py.config import MountConfig, parse_options
from overlayfs_py.errors import OverlayError
from overlayfs_py.mounting import Mount, mount
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.process import Process
from overlayfs_py.runtime.state import Container, make_directory

_PATIENCE = 1.0  # seconds for a daemon to end once its mount is gone
_SKELETON = ("", "dev", "dev/pts", "dev/shm", "dev/mqueue", "proc", "sys", "etc")
_SKELETON_FILES = ("etc/hostname", "etc/hosts", "etc/resolv.conf")


def skeleton(root: Path) -> Path:
    """A layer to lie below every image, with the mountpoints that each container needs; made where it is missing.

    So the OCI runtime finds them there, and the container's own layer holds nothing that the container did not write.
    """
    layer = root / "skeleton"
    for name in _SKELETON:
        make_directory(layer / name, 0o755)
    for name in _SKELETON_FILES:
        (layer / name).touch()
    return layer


def config(
    lowers: Sequence[str | Path], mountpoint: Path, *, source: str, userxattr: bool, upper: Path | None = None
) -> MountConfig:
    """The mount of a stack, the topmost layer first; `upper` lies beside its `work`. Raises ContainerError."""
    options = [b"lowerdir=" + b":".join(_escape(path) for path in lowers), b"engine=native"]
    if upper is not None:
        options += [b"upperdir=" + _escape(upper), b"workdir=" + _escape(upper.parent / "work")]
    if userxattr:
        options.append(b"userxattr")
    try:
        return parse_options(
            options, mountpoint=os.fsencode(mountpoint), source=source.encode(), cwd=b"/", euid=os.geteuid()
        )
    except OverlayError as error:
        raise ContainerError(str(error)) from error


def mount_root(container: Container) -> Mount:
    """Mount it, by a daemon that is a child of this process. Raises ContainerError."""
    wanted = config(
        container.lowers,
        container.root,
        source=source_of(container),
        userxattr=container.userxattr,
        upper=container.upper,
    )
    return mount_stack(wanted)


def mount_stack(wanted: MountConfig) -> Mount:
    try:
        return mount(wanted)
    except OverlayError as error:
        raise ContainerError(str(error)) from error


def unmount(container: Container, mounted: Mount) -> None:
    """Unmount what this process has mounted. Raises ContainerError."""
    unmount_root(container, Process.of(mounted.pid))
    os.waitpid(mounted.pid, 0)


def unmount_root(container: Container, daemon: Process | None) -> None:
    """Unmount it if it is still mounted, and end its daemon. Raises ContainerError."""
    try:
        mount_helper.unmount(os.fsencode(os.path.realpath(container.root)), lazy=True)
    except mount_helper.HelperError as error:
        raise ContainerError(str(error)) from error
    if daemon is not None and not daemon.wait(_PATIENCE):
        # A mount namespace that was copied meanwhile holds a copy of the mount, and would keep it for ever.
        daemon.send(signal.SIGKILL)
        daemon.wait(_PATIENCE)


def source_of(container: Container) -> str:
    """What the table of mounts shows as the source of a mount of this container."""
    return f"ovl:{container.id}"


def mounts_of(container: Container) -> list[str]:
    """Where else than at its root the container's layer is mounted now."""
    home = os.path.realpath(container.root)
    wanted = source_of(container)
    return [mountpoint for source, mountpoint in table() if source == wanted and mountpoint != home]


def table() -> list[tuple[str, str]]:
    """Source and mountpoint of each mount of this namespace; proc_pid_mountinfo(5)."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            source, target = fields[fields.index("-") + 2], fields[4]
            found.append((source, re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), target)))
    return found


def _escape(path: str | Path) -> bytes:
    return re.sub(rb"([\\:,])", rb"\\\1", os.fsencode(path))
