"""Becoming root of a user namespace where one is not root: owners of all kinds can be had there, and mounts made."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from pathlib import Path
from typing import Final

from overlayfs_py.cli.output import Failure
from overlayfs_py.runtime import userns

_ENTERED: Final = "_OVL_ROOTLESS"
_RANGES: Final = ("/etc/subuid", "/etc/subgid")

_entered = False


def entered() -> bool:
    """Whether this process is in a namespace that enter() has made or joined: what it mounts, only such ones see."""
    return _entered


def enter(root: str | None) -> None:
    """Go on as uid 0 of a user and mount namespace, with the ids of /etc/subuid; nothing to do for root.

    It is the one that a running container or another command has, or a new one. Without such ids uid 0 is the only one.

    The process is replaced by one that does the same there. Raises Failure where there is no such namespace to be had.
    Source: unshare(1), --map-auto; subuid(5).
    """
    global _entered
    claim = os.environ.pop(_ENTERED, None)
    if os.geteuid() == 0:
        if claim is not None:
            os.close(int(claim))
            _entered = True
        return
    if claim is not None:
        raise Failure("the user namespace does not make this user root: look at /etc/subuid and newuidmap(1)")
    many = _has_ranges()
    for program, package in (("unshare", "util-linux"), *((("newuidmap", "uidmap"),) if many else ())):
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
        namespace = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "slave"]
        command = [*namespace, *(["--map-auto"] if many else []), "--", *command]
    os.execvp(command[0], command)


def _has_ranges() -> bool:
    """Whether the machine gives this user further ids, of users and of groups. Source: subuid(5), subgid(5)."""
    try:
        owners = (pwd.getpwuid(os.getuid()).pw_name, str(os.getuid()))
    except KeyError:
        # unshare(1) looks for the ranges of users that the machine knows.
        return False
    for table in _RANGES:
        try:
            lines = Path(table).read_text(errors="surrogateescape").splitlines()
        except FileNotFoundError:
            return False
        if not any(line.partition(":")[0] in owners for line in lines):
            return False
    return True
