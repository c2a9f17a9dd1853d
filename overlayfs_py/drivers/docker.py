"""Docker: its driver fuse-overlayfs runs the program of that name that is first on the daemon's PATH."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Final

from overlayfs_py.drivers.asking import answer
from overlayfs_py.drivers.changes import Change, DriverError, read

DRIVER: Final = "fuse-overlayfs"
DIRECTORY: Final = Path("/usr/local/lib/overlayfs-py")
_PROGRAM: Final = DIRECTORY / DRIVER
_SETTINGS: Final = Path("/etc/docker/daemon.json")
_UNIT: Final = Path("/etc/systemd/system/docker.service.d/overlayfs-py.conf")
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def changes(program: Path) -> list[Change]:
    """What makes Docker mount with `program`. Raises DriverError where daemon.json is no JSON object."""
    before = read(_SETTINGS)
    try:
        settings = json.loads(before) if before else {}
    except ValueError as error:
        raise DriverError(f"{_SETTINGS} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise DriverError(f"{_SETTINGS} is no JSON object")
    settings["storage-driver"] = DRIVER
    return [
        Change(_PROGRAM, f'#!/bin/sh\nexec {shlex.quote(str(program))} "$@"\n', 0o755),
        Change(_UNIT, f"[Service]\nEnvironment=PATH={DIRECTORY}:{_PATH}\n"),
        Change(_SETTINGS, json.dumps(settings, indent=2) + "\n"),
    ]


def paths() -> list[Path]:
    """The files that `changes` may write."""
    return [_PROGRAM, _UNIT, _SETTINGS]


def check() -> str | None:
    """Why Docker does not mount with us; None when it does. Raises DriverError."""
    used = answer("docker", "info", "--format", "{{.Driver}}").strip()
    if not used:
        raise DriverError("docker info names no driver: is its daemon running?")
    if used != DRIVER:
        return f"Docker uses the driver {used}"
    return None if _PROGRAM.exists() else f"Docker uses the driver {DRIVER}, but there is no {_PROGRAM}"
