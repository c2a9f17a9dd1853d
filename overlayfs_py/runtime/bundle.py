"""The bundle of a container: what the OCI runtime is told.

Source: the OCI runtime specification, config.md and config-linux.md; the defaults are Docker's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlayfs_py.runtime import devices, seccomp
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import Spec, merge_env
from overlayfs_py.runtime.state import Container
from overlayfs_py.runtime.users import User

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# linux/capability.h, by number.
CAPABILITIES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
""".split()
_DEFAULT_CAPABILITIES = """
    CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL
    AUDIT_WRITE
""".split()

_MASKED = """
    /proc/asound /proc/acpi /proc/interrupts /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list
    /proc/timer_stats /proc/sched_debug /proc/scsi /sys/firmware /sys/devices/virtual/powercap
""".split()
_READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()

_NO_LIMIT = 1 << 64
"""The number of limits there are: -1 is the last one, as in getrlimit(2)."""

_INIT = "/dev/init"
_INITS = ("docker-init", "catatonit", "tini-static")

_FILES = ("hostname", "hosts", "resolv.conf")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What only the start of a container decides."""

    user: User
    volumes: Sequence[tuple[Path, str, bool, str]]
    """Source on the host, target, whether read-only, propagation."""
    network_namespace: str | None
    """A path that leads to it, empty for a fresh one; None for the host's."""
    addresses: Sequence[str]
    """Those that the container has, of IPv4 and IPv6."""
    rootless: bool
    cgroup: str | None


def capabilities(spec: Spec) -> list[str]:
    """Those of the container's root, by the rules of docker-run(1). Raises ContainerError."""
    add, drop = (_known(words) for words in (spec.cap_add, spec.cap_drop))
    chosen = set(CAPABILITIES if "ALL" in add or spec.privileged else [] if "ALL" in drop else _DEFAULT_CAPABILITIES)
    chosen |= add - {"ALL"}
    chosen -= drop - add
    available = _bounding_set()
    missing = sorted(add - {"ALL"} - available)
    if missing:
        raise ContainerError(f"--cap-add {missing[0]}: this process may not use that capability itself")
    return [f"CAP_{name}" for name in CAPABILITIES if name in chosen & available]


def _known(words: Iterable[str]) -> set[str]:
    known = set()
    for word in words:
        name = word.upper().removeprefix("CAP_")
        if name != "ALL" and name not in CAPABILITIES:
            raise ContainerError(f"there is no capability {word!r}")
        known.add(name)
    return known


def _bounding_set() -> set[str]:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        bits = next(int(line.split()[1], 16) for line in status if line.startswith("CapBnd:"))
    return {name for number, name in enumerate(CAPABILITIES) if bits >> number & 1}


def process(spec: Spec, user: User, *, args: Sequence[str], extra_env: Sequence[str] = ()) -> dict[str, Any]:
    """The `process` member, for the container's own process and for those of exec."""
    defaults = [DEFAULT_PATH, f"HOME={user.home}", *(["TERM=xterm"] if spec.terminal else [])]
    chosen = capabilities(spec)
    described: dict[str, Any] = {
        "terminal": spec.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": list(args),
        "env": list(merge_env(defaults, spec.env, extra_env)),
        "cwd": spec.cwd,
        "capabilities": {"bounding": chosen, "effective": chosen, "permitted": chosen},
        "noNewPrivileges": spec.no_new_privileges,
    }
    if spec.ulimits:
        described["rlimits"] = [
            {"type": f"RLIMIT_{limit.name.upper()}", "soft": limit.soft % _NO_LIMIT, "hard": limit.hard % _NO_LIMIT}
            for limit in spec.ulimits
        ]
    if spec.oom_score_adj is not None:
        described["oomScoreAdj"] = spec.oom_score_adj
    return described


def write(container: Container, around: Surroundings) -> None:
    """Write config.json and the files that are mounted over the image's. Raises ContainerError."""
    hostname = container.spec.hostname or (os.uname().nodename if _on_host(container.spec) else container.short_id)
    (container.bundle / "hostname").write_text(f"{hostname}\n")
    (container.bundle / "hosts").write_bytes(_hosts(container.spec, hostname, around.addresses))
    (container.bundle / "resolv.conf").write_bytes(resolv_conf(container.spec))
    for name in _FILES:
        (container.bundle / name).chmod(0o644)
    spec = container.spec
    args = (_INIT, "--", *spec.args) if spec.init else spec.args
    config = {
        "ociVersion": "1.0.2",
        "process": process(spec, around.user, args=args, extra_env=[f"HOSTNAME={hostname}"]),
        "root": {"path": str(container.root), "readonly": spec.read_only},
        "hostname": hostname,
        "mounts": _mounts(container, around),
        "linux": _linux(spec, around),
    }
    # Each start writes it anew, so it need not outlive a crash.
    (container.bundle / "config.json").write_text(json.dumps(config))


def _on_host(spec: Spec) -> bool:
    return spec.network == "host"


def _mounts(container: Container, around: Surroundings) -> list[dict[str, Any]]:
    plain = ["nosuid", "noexec", "nodev"]
    guarded = "rw" if container.spec.privileged else "ro"
    # Only who owns the network namespace may mount a sysfs of it.
    sys_is_bound = around.rootless and around.network_namespace is None
    mounts: list[dict[str, Any]] = [
        _mount("/proc", "proc", "proc", plain),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] + ([] if around.rootless else ["gid=5"]),
        ),
        _mount("/dev/shm", "tmpfs", "shm", [*plain, "mode=1777", f"size={container.spec.shm_size}"]),
        _mount("/dev/mqueue", "mqueue", "mqueue", plain),
        _mount("/sys", "none", "/sys", ["rbind", *plain, guarded])
        if sys_is_bound
        else _mount("/sys", "sysfs", "sysfs", [*plain, guarded]),
    ]
    if not around.rootless:
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", [*plain, "relatime", guarded]))
    for name in _FILES:
        mounts.append(_mount(f"/etc/{name}", "bind", str(container.bundle / name), ["bind", "rprivate"]))
    if container.spec.init:
        mounts.append(_mount(_INIT, "bind", find_init(), ["bind", "rprivate", "ro"]))
    own: list[dict[str, Any]] = []
    for source, target, read_only, propagation in around.volumes:
        own.append(_mount(target, "bind", str(source), ["rbind", propagation, "ro" if read_only else "rw"]))
    for target, options in container.spec.tmpfs:
        own.append(_mount(target, "tmpfs", "tmpfs", options.split(",")))
    if around.rootless:
        # Nobody else than root may make one, but what is there can be shown.
        for device in devices.of(container.spec):
            own.append(_mount(device.target, "bind", device.source, ["bind", "rprivate"]))
    # Parents first, so that none hides what was mounted below it.
    own.sort(key=lambda mount: str(mount["destination"]).count("/"))
    covered = {mount["destination"] for mount in own}
    return [mount for mount in mounts if mount["destination"] not in covered] + own


def find_init() -> str:
    """The path of a program for --init, which must need no libraries. Raises ContainerError."""
    for name in _INITS:
        path = shutil.which(name)
        if path is not None:
            return os.path.realpath(path)
    raise ContainerError(f"--init: there is no {', '.join(_INITS[:-1])} or {_INITS[-1]} on PATH; install catatonit")


def _mount(target: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": options}


def _linux(spec: Spec, around: Surroundings) -> dict[str, Any]:
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    if around.network_namespace is not None:
        namespaces.append({"type": "network", "path": around.network_namespace})
        if not around.network_namespace:
            del namespaces[-1]["path"]
    resources: dict[str, Any] = {}
    if not around.rootless:
        namespaces.append({"type": "cgroup"})
        given = devices.of(spec)
        resources["devices"] = devices.rules(spec, given)
    memory: dict[str, Any] = {}
    if spec.memory is not None:
        memory["limit"] = spec.memory
    if spec.memory_swap is not None:
        memory["swap"] = spec.memory_swap
    cpu: dict[str, Any] = {}
    if spec.cpus is not None:
        cpu |= {"period": 100_000, "quota": int(spec.cpus * 100_000)}
    if spec.cpu_shares is not None:
        cpu["shares"] = spec.cpu_shares
    if spec.cpuset:
        cpu["cpus"] = spec.cpuset
    for key, value in (("memory", memory), ("cpu", cpu)):
        if value:
            resources[key] = value
    if spec.pids_limit is not None:
        resources["pids"] = {"limit": spec.pids_limit}
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        "resources": resources,
        "maskedPaths": [] if spec.privileged else _MASKED,
        "readonlyPaths": [] if spec.privileged else _READ_ONLY,
    }
    if not around.rootless:
        linux["devices"] = devices.nodes(given)
    had = {name.removeprefix("CAP_") for name in capabilities(spec)}
    if spec.seccomp:
        linux["seccomp"] = seccomp.chosen(spec.seccomp, had)
    elif spec.seccomp is None and not spec.privileged:
        linux["seccomp"] = seccomp.default(had)
    if around.cgroup is not None:
        linux["cgroupsPath"] = around.cgroup
    if spec.network in ("private", "none"):
        # As in Docker: a container's own network has no privileged ports, and everyone may ping.
        linux["sysctl"] = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 0"}
        if not around.rootless:
            linux["sysctl"]["net.ipv4.ping_group_range"] = "0 2147483647"
    if spec.sysctls:
        linux["sysctl"] = {**linux.get("sysctl", {}), **dict(spec.sysctls)}
    return linux


def _hosts(spec: Spec, hostname: str, addresses: Sequence[str]) -> bytes:
    more = "".join(f"{place}\t{name}\n" for name, place in spec.hosts).encode()
    if _on_host(spec):
        try:
            return Path("/etc/hosts").read_bytes() + more
        except FileNotFoundError:
            return more
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{address}\t{hostname}" for address in addresses or ("127.0.1.1",)]
    return ("\n".join(lines) + "\n").encode() + more


def resolv_conf(spec: Spec) -> bytes:
    """The host's, with what was given in its place; in a network of its own without the servers that listen on the
    host's loopback only. Source: resolv.conf(5), docker-run(1) on --dns."""
    given = {"nameserver": spec.dns, "search": spec.dns_search, "options": spec.dns_options}
    kept = [] if spec.network == "none" else _host_resolv_conf()
    if not _on_host(spec):
        kept = [line for line in kept if line.split()[:1] != [b"nameserver"] or not _is_local(line.split()[1:2])]
    replaced = {key.encode() for key, values in given.items() if values}
    if b"search" in replaced:
        replaced.add(b"domain")
    kept = [line for line in kept if not line.split() or line.split()[0] not in replaced]
    lines = [f"nameserver {server}\n" for server in spec.dns]
    # A single dot is the wish for none.
    for key, words in (("search", [word for word in spec.dns_search if word != "."]), ("options", spec.dns_options)):
        if words:
            lines.append(f"{key} {' '.join(words)}\n")
    return b"".join(kept) + "".join(lines).encode()


def _host_resolv_conf() -> list[bytes]:
    try:
        text = Path("/etc/resolv.conf").read_bytes()
    except FileNotFoundError:
        return []
    return (text if not text or text.endswith(b"\n") else text + b"\n").splitlines(keepends=True)


def _is_local(server: list[bytes]) -> bool:
    return not server or server[0].startswith(b"127.") or server[0] == b"::1"
