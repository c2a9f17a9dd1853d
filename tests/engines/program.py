"""Our mount program as a file that container engines can be told to run."""

import os
import sys
from pathlib import Path

from tests.support.mounts import REPOSITORY


def write_program(path: Path, checkout: Path = REPOSITORY, python: Path | None = None) -> Path:
    """A program that runs the mount program of a checkout, at a new path, which is returned."""
    lines = ["#!/bin/sh", f"export PYTHONPATH={checkout} PYTHONDONTWRITEBYTECODE=1"]
    lines += [f'exec {python or sys.executable} -m overlayfs_py "$@"', ""]
    path.write_text("\n".join(lines))
    os.chmod(path, 0o755)
    return path
