"""What a directory of the upper layer hands down to what is made in it, as the kernel's overlayfs has it: the flags and
the project id that its filesystem knows of. Source: ioctl_iflags(2), ioctl_xfs_fsgetxattr(2)."""

import errno
import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.filesystems.disks import writable
from tests.support.inode_flags import FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, NOATIME, NOCOW, change_flags, flags_of
from tests.support.mounts import kernel_mount, our_mount

PROJINHERIT = 0x200
FSXATTR = struct.Struct("=IIIII8s")

# Made in each directory: by root or somebody else, through a name or without one.
MAKING = """
import os, sys
for directory in sys.argv[1:]:
    os.chdir(directory)
    open("file", "x").close()
    os.mkdir("directory")
    os.symlink("target", "link")
    os.mkfifo("fifo")
    os.mknod("node")
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
    # Without a directory's descriptor Python calls link(2), which doesn't follow.
    os.link(f"/proc/self/fd/{fd}", "nameless", dst_dir_fd=os.open(".", os.O_RDONLY), follow_symlinks=True)
"""
DIRECTORIES = ("merged", "plain")


def with_project(path: Path, project: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        flags, *rest = FSXATTR.unpack(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(FSXATTR.size)))
        rest[2] = project
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, FSXATTR.pack(flags | PROJINHERIT, *rest))
    finally:
        os.close(fd)


def handed_down(path: Path) -> tuple[int, int, int, int]:
    """(flags, project id, owner, mode) of a file or directory as its filesystem has it."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            project = FSXATTR.unpack(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(FSXATTR.size)))[3]
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            project = 0
        st = os.fstat(fd)
        return flags_of(path) & (NOATIME | NOCOW), project, st.st_uid, st.st_mode
    finally:
        os.close(fd)


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("engine", ["native", "portable"])
def test_a_directory_hands_down_what_the_kernel_lets_it_hand_down(
    layers: Layers, kind: str, uid: int, engine: str
) -> None:
    (layers.lower / "merged").mkdir()
    found = {}
    with writable(kind, layers.base) as disk:
        for who in ("ours", "kernel"):
            upper, work = disk / f"upper-{who}", disk / f"work-{who}"
            for path in (upper, work, *(upper / name for name in DIRECTORIES)):
                path.mkdir()
            for name in DIRECTORIES:
                (upper / name).chmod(0o2777)
                if kind == "xfs":
                    with_project(upper / name, 42)
                change_flags(upper / name, add=NOCOW if kind == "btrfs" else NOATIME)
            mount = (
                kernel_mount(layers.mnt, [layers.lower], upper, work)
                if who == "kernel"
                else our_mount(layers.mnt, [layers.lower], upper, work, f"engine={engine}")
            )
            script = MAKING if engine == "native" else MAKING[: MAKING.index("    fd =")]
            with mount:
                subprocess.run(
                    ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", script]
                    + [str(layers.mnt / name) for name in DIRECTORIES],
                    check=True,
                    timeout=60,
                )
            names = ["file", "directory", "node", *(["nameless"] if engine == "native" else [])]
            found[who] = {
                (directory, name): handed_down(upper / directory / name) for directory in DIRECTORIES for name in names
            }
    assert found["ours"] == found["kernel"]
    expected = (NOCOW if kind == "btrfs" else NOATIME, 42 if kind == "xfs" else 0, uid)
    assert all(one[:3] == expected for one in found["ours"].values())
