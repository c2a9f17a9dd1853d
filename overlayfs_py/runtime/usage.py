"""What is used: processes, traffic, and space on disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.process import Process


def processes(first: Process) -> list[int]:
    """The pids, as the host sees them, of all that is in the PID namespace of a process."""
    wanted = _namespace(first.pid)
    found = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in sorted(found) if wanted is not None and _namespace(pid) == wanted]


def _namespace(pid: int) -> tuple[int, int] | None:
    try:
        info = os.stat(f"/proc/{pid}/ns/pid")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # It has ended, or is another user's and so none of ours.
        return None
    return info.st_dev, info.st_ino


def top(first: Process, options: Sequence[str]) -> list[str]:
    """The lines that ps(1) with these options prints of a container's processes. Raises ContainerError."""
    try:
        done = subprocess.run(["ps", *(options or ("-ef",))], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise ContainerError("there is no ps on PATH; install procps") from None
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise ContainerError(f"ps: {(done.stderr.strip().splitlines() or ['it printed nothing'])[0]}")
    heads = lines[0].split()
    if "PID" not in heads:
        raise ContainerError("the ps options must keep the column PID")
    column = heads.index("PID")
    pids = {str(pid) for pid in processes(first)}
    return [lines[0], *(line for line in lines[1:] if line.split()[column] in pids)]


def traffic(first: Process) -> tuple[int, int]:
    """Bytes received and sent in the network namespace of a process, the loopback left out."""
    received = sent = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{first.pid}/net/dev").read_text().splitlines()[2:]:
            name, _, numbers = line.partition(":")
            fields = numbers.split()
            if name.strip() != "lo":
                received += int(fields[0])
                sent += int(fields[8])
    return received, sent


def disk(path: Path) -> int:
    """Bytes that a directory takes on disk, each hard-linked file counted once."""
    total = 0
    seen: set[tuple[int, int]] = set()
    pending = [path]
    while pending:
        here = pending.pop()
        # A container at work removes what we look at.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(here) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat(follow_symlinks=False)
                    if info.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                        if (info.st_dev, info.st_ino) in seen:
                            continue
                        seen.add((info.st_dev, info.st_ino))
                    total += info.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
    return total
