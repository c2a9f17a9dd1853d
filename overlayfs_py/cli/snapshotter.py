"""The program `overlayfs-py-snapshotter`, which containerd reaches through a Unix socket."""

import argparse
import importlib.util
import logging
import os
import sqlite3
import sys

from overlayfs_py import __version__
from overlayfs_py.drivers.containerd.configuration import ADDRESS, ROOT
from overlayfs_py.errors import OverlayError

_FAILED = 1


def main() -> int:
    """Run with the arguments of this process; returns the exit status."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="overlayfs-py-snapshotter: %(levelname)s: %(message)s")
    lacking = missing()
    if lacking:
        return _fail(lacking)
    if os.geteuid() != 0:
        return _fail("it makes layers that belong to any user: run it as root")
    from overlayfs_py.drivers.containerd.failures import SnapshotError
    from overlayfs_py.drivers.containerd.service import serve

    try:
        serve(arguments.root, arguments.address)
    except (OverlayError, SnapshotError, OSError, sqlite3.Error) as error:
        return _fail(str(error))
    return 0


def missing() -> str | None:
    """What this installation lacks to serve containerd, and how to get it; None when nothing."""
    names = [name for name in ("grpc", "google.protobuf") if not _installed(name)]
    return f"{' and '.join(names)} missing: {sys.executable} -m pip install grpcio protobuf" if names else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="overlayfs-py-snapshotter", description="The proxy snapshotter of containerd that mounts overlayfs-py."
    )
    parser.add_argument("--address", default=ADDRESS, help="the Unix socket to listen on (%(default)s)")
    parser.add_argument("--root", default=ROOT, help="the directory of the snapshots (%(default)s)")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # The package that holds it is missing too.
        return False


def _fail(message: str) -> int:
    line = "".join(char if char.isprintable() else " " for char in message)
    print(f"overlayfs-py-snapshotter: {line}", file=sys.stderr)
    return _FAILED
