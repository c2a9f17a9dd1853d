"""The OCI runtime: runc, or crun, which takes the same command line.

Source: runc(8), runc-run(8), runc-exec(8), runc-delete(8).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from overlayfs_py.runtime import limits
from overlayfs_py.runtime.errors import CANNOT_INVOKE, FAILED, NOT_FOUND, ContainerError
from overlayfs_py.runtime.state import Container
from overlayfs_py.runtime.userns import is_rootless

_NAMES = ("runc", "crun")

_ABSENT = re.compile(r"executable file not found|exec: .*: no such file or directory|executable file .* not found")
_UNUSABLE = re.compile(r"permission denied|exec format error|is a directory", re.IGNORECASE)


def find() -> str:
    """The path of the runtime: the program that OVL_RUNTIME names, else runc or crun. Raises ContainerError."""
    asked = os.environ.get("OVL_RUNTIME")
    for name in (asked,) if asked else _NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    raise ContainerError(f"there is no OCI runtime {asked or 'runc or crun'} on PATH; install runc, or set OVL_RUNTIME")


def command(container: Container, *words: str, log: str) -> list[str]:
    """A command line of the runtime, whose own state is kept with the container."""
    options = ["--root", str(container.directory / "runtime"), "--log", log, "--log-format", "json"]
    return [find(), *options, *words]


def run(
    container: Container,
    *,
    stdio: tuple[int, int, int],
    console: str | None,
    kept: Sequence[int],
) -> int:
    """Start the container, detached; returns the pid of its process, a child of this process if it is a subreaper.

    `console` is the path of a socket, relative to the bundle, that is sent the terminal; `kept` are descriptors for
    the runtime to keep open while it works. Raises ContainerError.
    """
    pid_file = container.directory / "pid"
    pid_file.unlink(missing_ok=True)
    words = ["run", "--detach", "--pid-file", str(pid_file)]
    if console is not None:
        words += ["--console-socket", console]
    Path(_log(container)).unlink(missing_ok=True)
    done = subprocess.run(
        command(container, *words, container.id, log=_log(container)),
        stdin=stdio[0],
        stdout=stdio[1],
        stderr=stdio[2],
        cwd=container.bundle,
        pass_fds=kept,
    )
    if done.returncode != 0:
        raise explain(_log(container), container.spec.args[0])
    return int(pid_file.read_text())


def delete(container: Container) -> None:
    """Kill what is left of the container and remove what the runtime keeps of it. Raises ContainerError."""
    kept = container.directory / "runtime" / container.id
    if not kept.exists():
        return
    # With its first process all others of its PID namespace have ended, and that is most of what the runtime would
    # see to; its start takes as long as that of the container.
    if is_rootless() or not limits.remove(container):
        _quietly(container, "delete", "--force")
    else:
        shutil.rmtree(kept)


def pause(container: Container) -> None:
    """Stop all its processes. Raises ContainerError."""
    _quietly(container, "pause")


def resume(container: Container) -> None:
    """Let them go on. Raises ContainerError."""
    _quietly(container, "resume")


def _quietly(container: Container, *words: str) -> None:
    null = subprocess.DEVNULL
    line = command(container, *words, container.id, log=_log(container))
    if subprocess.run(line, stdin=null, stdout=null, stderr=null, cwd="/").returncode != 0:
        raise explain(_log(container), "")


def explain(path: str, program: str) -> ContainerError:
    """What the runtime logged last in this file, for the user."""
    message = ""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as log:
            for line in log:
                entry = json.loads(line)
                if entry.get("level") == "error":
                    message = str(entry.get("msg"))
    except (FileNotFoundError, ValueError):
        message = ""
    message = " ".join(message.split())
    if _ABSENT.search(message):
        return ContainerError(f"there is no program {program!r} in the container", NOT_FOUND)
    if "exec" in message and _UNUSABLE.search(message):
        return ContainerError(f"cannot run {program!r}: {message.rpartition(': ')[2]}", CANNOT_INVOKE)
    return ContainerError(f"the OCI runtime failed: {message or 'it does not say why'}", FAILED)


def _log(container: Container) -> str:
    return str(container.directory / "runtime.log")
