"""The one user and mount namespace that all commands and monitors of a user share.

Mounts are seen, and processes signalled, only where they were made. So a command joins the namespace of a container
that runs, or of another command; only where there is none is a new one made. Source: user_namespaces(7), setns(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from overlayfs_py.runtime.process import Process
from overlayfs_py.sys import namespaces
from overlayfs_py.sys.credentials import in_initial_user_namespace

_KINDS = (("user", namespaces.CLONE_NEWUSER), ("mnt", namespaces.CLONE_NEWNS))


def is_rootless() -> bool:
    """Whether this process is root of a user namespace only."""
    return not in_initial_user_namespace()


def has_groups() -> bool:
    """Whether a process here may have further groups; not so where only its own group is mapped.

    Source: user_namespaces(7), /proc/PID/setgroups.
    """
    return Path("/proc/self/setgroups").read_text().strip() == "allow"


def claim(root: Path) -> int:
    """Keep others from joining or making namespaces of this store; returns the descriptor to close, kept over exec."""
    root.mkdir(0o711, parents=True, exist_ok=True)
    fd = os.open(root / "namespace.lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(fd, True)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def announce(root: Path) -> None:
    """Say that this process will have made a namespace once the claim is given up."""
    process = Process.of(os.getpid())
    assert process is not None
    (root / "namespace").write_text(json.dumps(asdict(process)))


def join(root: Path) -> bool:
    """Enter the namespace there is, as its root; False where there is none. Exec a program afterwards.

    Without that /proc/self is not ours to use; proc_pid(5) on "dumpable".
    """
    for process, shares_mounts in _members(root):
        kinds = _KINDS if shares_mounts else _KINDS[:1]
        with contextlib.ExitStack() as stack:
            opened = []
            try:
                if os.stat(f"/proc/{process.pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino:
                    continue
                for name, kind in kinds:
                    fd = os.open(f"/proc/{process.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, fd)
                    opened.append((fd, kind))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                # It has ended, or its pid is another user's now.
                continue
            here = os.getcwd()
            for fd, kind in opened:
                namespaces.setns(fd, kind)
        if not shares_mounts:
            namespaces.unshare(namespaces.CLONE_NEWNS)
        if has_groups():
            os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.chdir(here)
        return True
    return False


def _members(root: Path) -> Iterator[tuple[Process, bool]]:
    """The processes that may be in the namespace, and whether in its mount namespace too."""
    states = [_read(path) for path in sorted((root / "containers").glob("*/status.json"))]
    found: list[tuple[Any, bool]] = [(_read(root / "namespace"), True)]
    found += [(state.get(key), True) for key in ("monitor", "daemon") for state in states]
    # A container's own mounts are no others', but who is to end it needs its user namespace.
    found += [(state.get("process"), False) for state in states]
    for data, shares_mounts in found:
        if data and (process := Process(**data)).alive():
            yield process, shares_mounts


def _read(path: Path) -> dict[str, Any]:
    # What a command that was killed left half written, or a container that goes meanwhile, tells nothing.
    with contextlib.suppress(FileNotFoundError, ValueError):
        data = json.loads(path.read_bytes())
        if isinstance(data, dict):
            return data
    return {}
