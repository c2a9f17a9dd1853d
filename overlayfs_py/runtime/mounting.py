"""Trees of images and containers mounted where the user wants them, and layers that hold still while they are read."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mount_helper
from overlayfs_py.images import Image
from overlayfs_py.runtime import oci, root, usage
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.process import Process
from overlayfs_py.runtime.state import Container, Status
from overlayfs_py.runtime.userns import is_rootless
from overlayfs_py.sys.files import sync_filesystem

_OURS = re.compile(r"ovl(-image)?:")


def mount_image(image: Image, directory: Path, *, userxattr: bool) -> None:
    """Mount what the image holds, read-only. Raises ContainerError."""
    if not image.layers:
        raise ContainerError("the image has no layers, so there is nothing to mount")
    layers = [layer.path for layer in reversed(image.layers)]
    root.mount_stack(root.config(layers, directory, source=f"ovl-image:{image.id}", userxattr=userxattr))


def mount_container(container: Container, status: Status, directory: Path) -> None:
    """Mount what the container sees, without its volumes; what is written there is in its own layer.

    Raises ContainerError.
    """
    if status.process is not None:
        done = subprocess.run(
            ["mount", "--bind", "--", container.root, directory],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ContainerError(f"cannot mount: {done.stderr.strip()}")
        return
    if root.mounts_of(container):
        raise ContainerError(f"container {container.name} is mounted on {root.mounts_of(container)[0]} already")
    wanted = root.config(
        container.lowers,
        directory,
        source=root.source_of(container),
        userxattr=container.userxattr,
        upper=container.upper,
    )
    root.mount_stack(wanted)


def unmount(directory: Path) -> None:
    """Undo either of these. Raises ContainerError where no such mount is, or it is in use."""
    target = os.path.realpath(directory)
    sources = [source for source, mountpoint in root.table() if mountpoint == target]
    if not sources or not _OURS.match(sources[-1]):
        raise ContainerError(f"no image and no container is mounted on {target}")
    try:
        mount_helper.unmount(os.fsencode(target))
    except mount_helper.HelperError as error:
        raise ContainerError(str(error)) from error


def mounts_of_image(image: str) -> list[str]:
    """Where the image with this ID is mounted."""
    return [mountpoint for source, mountpoint in root.table() if source == f"ovl-image:{image}"]


def flush(container: Container) -> None:
    """See that the container's layer holds what its processes have written, also through memory that is mapped."""
    if not os.path.ismount(container.root):
        return
    fd = os.open(container.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_filesystem(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def still(container: Container, status: Status, *, pause: bool) -> Iterator[None]:
    """Keep the container's processes from writing until the block ends, if `pause`."""
    first = status.process
    with contextlib.ExitStack() as stack:
        if first is not None and pause:
            if is_rootless():
                # Without control groups there is no freezer.
                stack.callback(_signal, first, signal.SIGCONT)
                _stop(first)
            else:
                oci.pause(container)
                stack.callback(oci.resume, container)
        flush(container)
        yield


def _stop(first: Process) -> None:
    """Stop every process of the container, also those that are made meanwhile."""
    stopped: set[int] = set()
    while new := set(usage.processes(first)) - stopped:
        _signal(first, signal.SIGSTOP)
        stopped |= new


def _signal(first: Process, number: int) -> None:
    for pid in usage.processes(first):
        # It ended meanwhile.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
