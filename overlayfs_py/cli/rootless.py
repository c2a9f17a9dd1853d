"""Becoming root of a user namespace where one is not root: owners of all kinds can be had there, and mounts made."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

from overlayfs_py.cli.output import Failure
from overlayfs_py.runtime import userns

_ENTERED: Final = "_OVL_ROOTLESS"


def enter(root: str | None) -> None:
    """Go on as uid 0 of a user and mount namespace, with the ids of /etc/subuid; nothing to do for root.

    It is the one that a running container or another command has, or a new one.

    The process is replaced by one that does the same there. Raises Failure where there is no such namespace to be had.
    Source: unshare(1), --map-auto; subuid(5).
    """
    claim = os.environ.pop(_ENTERED, None)
    if os.geteuid() == 0:
        if claim is not None:
            os.close(int(claim))
        return
    if claim is not None:
        raise Failure("the user namespace does not make this user root: look at /etc/subuid and newuidmap(1)")
    for program, package in (("unshare", "util-linux"), ("newuidmap", "uidmap")):
        if shutil.which(program) is None:
            raise Failure(f"{program} is missing, which it takes to run without root: install {package}")
    data = os.environ.get("XDG_DATA_HOME")
    default = Path(data) if data else Path.home() / ".local" / "share"
    store = Path(root or os.environ.get("OVL_ROOT") or default / "ovl").absolute()
    os.environ["OVL_ROOT"] = str(store)
    sys.stdout.flush()
    command = [sys.executable, "-m", "overlayfs_py.cli.ovl", *sys.argv[1:]]
    os.environ[_ENTERED] = str(userns.claim(store))
    if not userns.join(store):
        userns.announce(store)
        namespace = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--propagation", "slave"]
        command = [*namespace, "--", *command]
    os.execvp(command[0], command)
