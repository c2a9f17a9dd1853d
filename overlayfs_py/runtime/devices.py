"""Device files of the host in a container. Source: the OCI runtime specification, config-linux.md."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import Device, Spec

# What each container has of its own there.
_OWN = frozenset(
    """
    pts shm mqueue fd console ptmx init stdin stdout stderr core null zero full random urandom tty
    """.split()
)


def of(spec: Spec) -> list[Device]:
    """The devices that a container is to have beside those that each has. Raises ContainerError."""
    asked = list(spec.devices)
    if spec.privileged:
        taken = {device.target for device in asked}
        names = sorted(set(os.listdir("/dev")) - _OWN)
        asked += [Device(path, path) for name in names if (path := f"/dev/{name}") not in taken]
    return [device for one in asked for device in _files(one, quietly=one not in spec.devices)]


def _files(device: Device, *, quietly: bool) -> Iterator[Device]:
    """The device itself, or those in a directory. Raises ContainerError where there is none, unless `quietly`."""
    found = False
    try:
        mode = os.stat(device.source).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            found = True
            yield device
        elif stat.S_ISDIR(mode):
            for name in sorted(os.listdir(device.source)):
                below = Device(f"{device.source}/{name}", f"{device.target}/{name}", device.access)
                for one in _files(below, quietly=True):
                    found = True
                    yield one
    except OSError as error:
        # One that goes meanwhile, or that nobody has named.
        if not quietly:
            raise ContainerError(f"--device {device.source}: {error.strerror}") from error
    if not found and not quietly:
        raise ContainerError(f"--device {device.source}: it is no device")


def nodes(devices: Sequence[Device]) -> list[dict[str, Any]]:
    """The `devices` member, which has the OCI runtime make them."""
    made = []
    for device in devices:
        info = os.stat(device.source)
        made.append(
            {
                "path": device.target,
                "type": "b" if stat.S_ISBLK(info.st_mode) else "c",
                "major": os.major(info.st_rdev),
                "minor": os.minor(info.st_rdev),
                "fileMode": stat.S_IMODE(info.st_mode),
                "uid": info.st_uid,
                "gid": info.st_gid,
            }
        )
    return made


def rules(spec: Spec, devices: Sequence[Device]) -> list[dict[str, Any]]:
    """What the control group of devices allows."""
    if spec.privileged:
        return [{"allow": True, "access": "rwm"}]
    allowed: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for node, device in zip(nodes(devices), devices, strict=True):
        kept = {key: node[key] for key in ("type", "major", "minor")}
        allowed.append({"allow": True, "access": device.access, **kept})
    return allowed
