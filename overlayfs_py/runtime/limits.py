"""Control groups: where those of a container are, whether a limit can be set, what was used.

A container's groups are named ovl-ID, in every hierarchy of version 1 and in version 2's; cgroups(7).
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import Spec
from overlayfs_py.runtime.state import Container
from overlayfs_py.sys.credentials import in_initial_user_namespace

_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "pids")
_CAP_SYS_RESOURCE = 24


def hierarchies() -> dict[str, tuple[Path, int]]:
    """Where the groups of each controller are mounted, and the version of cgroups there."""
    found: dict[str, tuple[Path, int]] = {}
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            _, target, kind, options, *_ = line.split(" ")
            if kind == "cgroup":
                for name in set(options.split(",")) & set(_CONTROLLERS):
                    found.setdefault(name, (Path(target), 1))
            elif kind == "cgroup2":
                for name in (Path(target) / "cgroup.controllers").read_text().split():
                    found.setdefault(name, (Path(target), 2))
    return found


def remove(container: Container) -> bool:
    """Remove the container's groups, in which nothing runs any more; whether that is done."""
    for home in _mounted():
        try:
            os.rmdir(home / cgroup_of(container)[1:])
        except FileNotFoundError:
            # Not every hierarchy has one.
            continue
        except OSError as error:
            # EBUSY: a process or a group of its own is in it. The rest: who may not, or it is read-only.
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return False
    return True


def _mounted() -> list[Path]:
    """Where the hierarchies are mounted, those without a controller too."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        rows = [line.split(" ") for line in table]
    return [Path(row[1]) for row in rows if row[2] in ("cgroup", "cgroup2")]


def cgroup_of(container: Container) -> str:
    """Its path in each hierarchy."""
    return f"/ovl-{container.id}"


def check(spec: Spec) -> None:
    """Raises ContainerError for a limit that can't be set here."""
    asked = [
        ("memory", "--memory", spec.memory),
        ("cpu", "--cpus", spec.cpus),
        ("pids", "--pids-limit", spec.pids_limit),
        ("memory", "--memory-swap", spec.memory_swap),
        ("cpu", "--cpu-shares", spec.cpu_shares),
        ("cpuset", "--cpuset-cpus", spec.cpuset or None),
    ]
    for limit in spec.ulimits:
        ours = resource.getrlimit(getattr(resource, f"RLIMIT_{limit.name.upper()}"))[1]
        if ours != resource.RLIM_INFINITY and not 0 <= limit.hard <= ours and not _may_raise_limits():
            raise ContainerError(f"--ulimit {limit.name}: this user may have {ours} at most")
    if all(value is None for _, _, value in asked):
        return
    known = hierarchies()
    for controller, option, value in asked:
        if value is not None and (controller not in known or not os.access(known[controller][0], os.W_OK)):
            raise ContainerError(
                f"{option} cannot be set: the cgroup controller {controller!r} is not ours to use here"
            )


def _may_raise_limits() -> bool:
    """Whether this process may have more than its hard limits; capabilities(7), CAP_SYS_RESOURCE."""
    if not in_initial_user_namespace():
        return False
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        bits = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return bool(bits >> _CAP_SYS_RESOURCE & 1)


def ran_out_of_memory(container: Container) -> bool:
    """Whether the kernel killed a process of the container for lack of memory."""
    place = hierarchies().get("memory")
    if place is None:
        return False
    name = "memory.oom_control" if place[1] == 1 else "memory.events"
    return _fields(place[0] / cgroup_of(container)[1:] / name).get("oom_kill", 0) > 0


def usage(container: Container) -> dict[str, int | None]:
    """Of a running container: `memory` and `memory_limit` in bytes, `cpu` in nanoseconds, `pids`; None: unknown."""
    known = hierarchies()
    group = cgroup_of(container)[1:]
    used: dict[str, int | None] = dict.fromkeys(("memory", "memory_limit", "cpu", "pids"))
    if "memory" in known:
        home, version = known["memory"][0] / group, known["memory"][1]
        used["memory"] = _number(home / ("memory.usage_in_bytes" if version == 1 else "memory.current"))
        cache = _fields(home / "memory.stat").get("total_inactive_file" if version == 1 else "inactive_file", 0)
        if used["memory"] is not None:
            # What the kernel can drop at once is no use of the container's; as docker stats counts.
            used["memory"] = max(0, used["memory"] - cache)
        used["memory_limit"] = _number(home / ("memory.limit_in_bytes" if version == 1 else "memory.max"))
    if "cpuacct" in known:
        used["cpu"] = _number(known["cpuacct"][0] / group / "cpuacct.usage")
    elif "cpu" in known:
        microseconds = _fields(known["cpu"][0] / group / "cpu.stat").get("usage_usec")
        used["cpu"] = None if microseconds is None else microseconds * 1000
    if "pids" in known:
        used["pids"] = _number(known["pids"][0] / group / "pids.current")
    return used


def total_memory() -> int:
    """Bytes of memory that the machine has, which bounds a container without a limit."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:
        # The group went between opening and reading.
        if error.errno != errno.ENODEV:
            raise
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """A file of a name and a number in each line."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
