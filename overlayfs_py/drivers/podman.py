"""podman, buildah and skopeo: `mount_program` in storage.conf; see containers-storage.conf(5)."""

from __future__ import annotations

import json
import os
import shutil
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
    """Why podman, or buildah where there is no podman, does not mount with `program` for this user; None when it does.

    Raises DriverError.
    """
    engine, driver, used = _asked()
    if driver != "overlay":
        return f"{engine} uses the driver {driver}: empty its store with `podman system reset` first"
    if used != str(program):
        return (
            f"{engine} mounts with {used or 'the kernel'}: not what {settings_file(user=os.geteuid() != 0)} is to say"
        )
    if not os.access(_FUSE, os.R_OK | os.W_OK):
        return f"{engine} would use it, but this user may not open {_FUSE}: its mode is to be 666"
    return None


def _asked() -> tuple[str, str, str | None]:
    """An engine that is there, and the storage driver and mount program it names."""
    if shutil.which("podman") is None and shutil.which("buildah") is not None:
        store = json.loads(answer("buildah", "info"))["store"]
        options = dict(option.partition("=")[::2] for option in store["GraphOptions"] or ())
        return "buildah", store["GraphDriverName"], options.get("overlay.mount_program")
    store = json.loads(answer("podman", "info", "--format", "json"))["store"]
    used = store["graphOptions"].get("overlay.mount_program", {})
    return "podman", store["graphDriverName"], used.get("Executable")
