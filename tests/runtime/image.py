"""An image of a static busybox, as an OCI layout that `load` takes."""

import os
import subprocess
import tarfile
from pathlib import Path

from tests.images.rig import Item, archive, folder, symlink, write_layout

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/var/www:/bin/sh\n"
GROUP = b"root:x:0:\nwww:x:33:\nextra:x:44:www\n"


def write(target: Path) -> None:
    """Two layers: busybox with its links, and above it files for the tests."""
    busybox = Path("/bin/busybox").read_bytes()
    names = subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout.split()
    links = [symlink(f"bin/{name}", "busybox") for name in names if name != "busybox"]
    base = [
        folder("bin"),
        Item("bin/busybox", busybox, mode=0o755),
        *links,
        folder("tmp", 0o1777),
        folder("root", 0o700),
    ]
    above = [
        folder("etc"),
        Item("etc/passwd", PASSWD),
        Item("etc/group", GROUP),
        Item("file", b"of the image\n"),
        folder("data", 0o750, uid=33),
        Item("data/seed", b"seed\n", uid=33),
        Item("out", kind=tarfile.SYMTYPE, target="../../../../etc"),
        Item("script", b'#!/bin/sh\necho entry "$@"\n', mode=0o755),
    ]
    target.mkdir(parents=True)
    write_layout(
        target,
        [archive(base), archive(above)],
        Cmd=["sh", "-c", "echo default $GREETING $(pwd) $(id -u)"],
        Env=["PATH=/bin", "GREETING=hello"],
        WorkingDir="/data",
        User="www",
        Labels={"kind": "test"},
        StopSignal="SIGINT",
    )


def entries(path: Path) -> list[str]:
    """The names of all that is below a directory, without the directories that hold others only."""
    return sorted(os.path.relpath(os.path.join(top, name), path) for top, _, names in os.walk(path) for name in names)
