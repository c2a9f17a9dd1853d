"""Other filesystems to have as a layer, each served by a daemon of its own."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from tests.support.mounts import REPOSITORY, AnyPath, connections_made, mounted_at, unmount

_PATIENCE: Final = 30.0  # seconds


@contextlib.contextmanager
def served_by(module: str, directory: Path, *arguments: AnyPath) -> Iterator[None]:
    """The filesystem of a module that is run with a mount point and further arguments, until the end of the block."""
    command = [sys.executable, "-m", module, directory, *arguments]
    daemon = subprocess.Popen([os.fsencode(part) for part in command], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while (device := mounted_at(directory)) is None:
            assert time.monotonic() < deadline, f"{module} does not mount"
            time.sleep(0.01)
        connections_made.add(device.partition(":")[2])
        yield
        unmount(directory)
        assert daemon.wait(_PATIENCE) == 0
    finally:
        daemon.kill()
        daemon.wait(_PATIENCE)
        if mounted_at(directory):
            unmount(directory)


def serve(operations: pyfuse3.Operations, directory: str | bytes, name: str) -> None:
    """What such a module does: serve a filesystem of that name until it is unmounted."""
    pyfuse3.init(operations, os.fsdecode(directory), {*pyfuse3.default_options, f"fsname={name}"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()
