"""Becoming root of a user namespace where one is not root: owners of all kinds can be had there, and mounts made."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

from overlayfs_py.cli.output import Failure

_ENTERED: Final = "_OVL_ROOTLESS"


def enter(root: str | None) -> None:
    """Go on as uid 0 of a new user and mount namespace, with the ids of /etc/subuid; nothing to do for root.

    The process is replaced by one that does the same there. Raises Failure where there is no such namespace to be had.
    Source: unshare(1), --map-auto; subuid(5).
    """
    if os.geteuid() == 0:
        return
    if os.environ.get(_ENTERED):
        raise Failure("the user namespace does not make this user root: look at /etc/subuid and newuidmap(1)")
    for program, package in (("unshare", "util-linux"), ("newuidmap", "uidmap")):
        if shutil.which(program) is None:
            raise Failure(f"{program} is missing, which it takes to run without root: install {package}")
    data = os.environ.get("XDG_DATA_HOME")
    default = Path(data) if data else Path.home() / ".local" / "share"
    os.environ["OVL_ROOT"] = os.path.abspath(root or os.environ.get("OVL_ROOT") or default / "ovl")
    os.environ[_ENTERED] = "1"
    sys.stdout.flush()
    namespace = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--propagation", "slave"]
    command = [sys.executable, "-m", "overlayfs_py.cli.ovl", *sys.argv[1:]]
    os.execvp(namespace[0], [*namespace, "--", *command])
