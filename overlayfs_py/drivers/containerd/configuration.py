"""What makes containerd use our snapshotter: its configuration, a systemd unit, and the mount program on the PATH."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from pathlib import Path
from typing import Final

import tomlkit
from tomlkit.exceptions import TOMLKitError

from overlayfs_py.drivers.asking import answer
from overlayfs_py.drivers.changes import Change, DriverError, is_made, read

NAME: Final = "overlayfs-py"
"""The snapshotter, as containerd and its clients call it."""

PROGRAM: Final = "overlayfs-py-snapshotter"
ADDRESS: Final = f"/run/{PROGRAM}/snapshotter.sock"
ROOT: Final = f"/var/lib/{PROGRAM}"

UNIT: Final = """[Unit]
Description=Snapshotter of containerd that mounts overlayfs-py
Documentation=https://github.com/containerd/containerd/blob/main/docs/PLUGINS.md
Before=containerd.service
After=local-fs.target

[Service]
Type=notify
RuntimeDirectory={program}
ExecStart={executable} --root {root} --address {address}
Restart=always
RestartSec=1

[Install]
# Not RequiredBy: containerd, and its containers on other snapshotters, work without this one.
WantedBy=multi-user.target containerd.service
"""

_SETTINGS: Final = Path("/etc/containerd/config.toml")
_UNITS: Final = Path("/etc/systemd/system")
_UNIT: Final = _UNITS / f"{PROGRAM}.service"
_MOUNT_PROGRAM: Final = Path("/usr/local/bin") / NAME
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # systemd's default for services


def changes(program: Path, snapshotter: Path) -> list[Change]:
    """What makes containerd ask `snapshotter`, and `program` mount.

    Raises DriverError where config.toml is no right TOML.
    """
    found = [Change(_SETTINGS, _settings())]
    if shutil.which("systemctl"):
        found.append(Change(_UNIT, unit(snapshotter)))
    if shutil.which(NAME, path=_PATH) is None or is_made(_MOUNT_PROGRAM):
        found.append(Change(_MOUNT_PROGRAM, f'#!/bin/sh\nexec {shlex.quote(str(program))} "$@"\n', 0o755))
    return found


def unit(snapshotter: Path) -> str:
    """The unit that runs `snapshotter`, see systemd.service(5)."""
    return UNIT.format(program=PROGRAM, executable=snapshotter, root=ROOT, address=ADDRESS)


def paths() -> list[Path]:
    """The files that `changes` may write. Raises DriverError while systemd still starts the unit."""
    links = sorted(_UNITS.glob(f"*.wants/{_UNIT.name}"))
    if links and is_made(_UNIT):
        raise DriverError(f"the unit is enabled, by {links[0]}: first, systemctl disable --now {PROGRAM}")
    return [_SETTINGS, _UNIT, _MOUNT_PROGRAM]


def check() -> str | None:
    """Why containerd can't use our snapshotter; None when it can. Raises DriverError where ctr can't ask it."""
    plugins = [line.split() for line in answer("ctr", "plugins", "ls").splitlines()]
    if not any(words[:2] == ["io.containerd.snapshotter.v1", NAME] for words in plugins):
        return f"containerd knows no snapshotter {NAME}: is it in {_SETTINGS}, and was it started again since?"
    # The plugin is listed, and said to be well, even where nobody serves.
    with socket.socket(socket.AF_UNIX) as probe:
        failed = probe.connect_ex(ADDRESS)
    if failed:
        return f"no snapshotter answers on {ADDRESS}: {os.strerror(failed)}"
    for needed in (NAME, "mount.fuse3"):
        if shutil.which(needed, path=_PATH) is None:
            return f"{needed}, which containerd mounts with, is not on the PATH of services, {_PATH}"
    return None


def kept() -> str | None:
    """The directory that holds snapshots; None where there are none."""
    snapshots = Path(ROOT) / "snapshots"
    return ROOT if snapshots.is_dir() and os.listdir(snapshots) else None


def _settings() -> str:
    before = read(_SETTINGS)
    try:
        document = tomlkit.parse("version = 2\n" if before is None else before)
        plugins = document.setdefault("proxy_plugins", tomlkit.table(is_super_table=True))
        ours = plugins.setdefault(NAME, tomlkit.table())
        ours["type"] = "snapshot"
        ours["address"] = ADDRESS
        return tomlkit.dumps(document)
    except (TOMLKitError, TypeError, AttributeError) as error:
        raise DriverError(f"{_SETTINGS} is not what containerd-config.toml(5) says: {error}") from error
