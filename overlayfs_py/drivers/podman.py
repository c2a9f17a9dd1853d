"""podman, buildah and skopeo: `mount_program` in storage.conf; see containers-storage.conf(5)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import tomlkit
from tomlkit.exceptions import TOMLKitError

from overlayfs_py.drivers.asking import answer
from overlayfs_py.drivers.changes import Change, DriverError, read

_SYSTEM: Final = Path("/etc/containers/storage.conf")
_FUSE: Final = "/dev/fuse"


def settings_file(*, user: bool) -> Path:
    """Where the engines look: of the system, or of this user."""
    if not user:
        return _SYSTEM
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "containers" / "storage.conf"


def changes(program: Path, *, user: bool) -> list[Change]:
    """What makes the engines mount with `program`. Raises DriverError where the file there is no right TOML."""
    path = settings_file(user=user)
    before = read(path)
    try:
        document = tomlkit.parse(before or "")
        storage = document.setdefault("storage", tomlkit.table())
        storage["driver"] = "overlay"
        if not user:
            # Without these, which have no default in a file, podman refuses to start.
            storage.setdefault("runroot", "/run/containers/storage")
            storage.setdefault("graphroot", "/var/lib/containers/storage")
        options = storage.setdefault("options", tomlkit.table(is_super_table=True))
        options.setdefault("overlay", tomlkit.table())["mount_program"] = str(program)
        return [Change(path, tomlkit.dumps(document))]
    except (TOMLKitError, TypeError, AttributeError) as error:
        raise DriverError(f"{path} is not what containers-storage.conf(5) says: {error}") from error


def paths(*, user: bool) -> list[Path]:
    """The files that `changes` may write."""
    return [settings_file(user=user)]


def check(program: Path) -> str | None:
    """Why podman, as this user runs it, does not mount with `program`; None when it does. Raises DriverError."""
    store = json.loads(answer("podman", "info", "--format", "json"))["store"]
    if store["graphDriverName"] != "overlay":
        return f"podman uses the driver {store['graphDriverName']}: empty its store with `podman system reset` first"
    used = store["graphOptions"].get("overlay.mount_program", {}).get("Executable")
    if used != str(program):
        return f"podman mounts with {used or 'the kernel'}, by {store['configFile']}"
    if not os.access(_FUSE, os.R_OK | os.W_OK):
        return f"podman would use it, but this user may not open {_FUSE}: its mode is to be 666"
    return None
