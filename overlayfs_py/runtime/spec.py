"""What a container is asked to be: its options, parsed and frozen. Pure, but for the paths of bind mounts."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import posixpath
import re
import signal
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from overlayfs_py.runtime import names
from overlayfs_py.runtime.errors import ContainerError

Network = str
"""`private`, `host`, `none`, or `container:` and the id of one whose network it is."""

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LEAST_MEMORY = 6 << 20  # as in Docker: with less no process starts
_ULIMITS = "CORE CPU DATA FSIZE MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK AS".split()
_ULIMIT_VALUE = re.compile(r"\d{1,18}|-1|unlimited")
_NO_EFFECT = frozenset(("z", "Z", "cached", "delegated", "consistent", "nocopy", "rprivate", "private"))
_MOUNT_KEYS = {
    "type": "type",
    **dict.fromkeys(("source", "src"), "source"),
    **dict.fromkeys(("target", "dst", "destination"), "target"),
    **dict.fromkeys(("readonly", "ro"), "readonly"),
    **dict.fromkeys(("bind-propagation",), "propagation"),
    "tmpfs-size": "size",
    "tmpfs-mode": "mode",
}
_PROPAGATIONS = frozenset(("shared", "rshared", "slave", "rslave"))
_TMPFS_DEFAULTS = ("noexec", "nosuid", "nodev")


@dataclasses.dataclass(frozen=True, slots=True)
class Volume:
    """A directory or file of the host in the container: a bind mount of `source`, or the volume of this `name`."""

    target: str
    source: str | None = None
    name: str | None = None
    anonymous: bool = False
    read_only: bool = False
    propagation: str = "rprivate"


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    """A port of the host, 0 for any that is free, that leads to one of the container."""

    host: int
    container: int
    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = ""
    """Empty: every one of the host's, of IPv4 and of IPv6."""

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address or "0.0.0.0"
        return f"{address}:{self.host}->{self.container}/{self.protocol}"


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A device file of the host that the container may use; `access` is of r, w and m (make it with mknod)."""

    source: str
    target: str
    access: str = "rwm"


@dataclasses.dataclass(frozen=True, slots=True)
class Ulimit:
    """A limit of each process, such as nofile; -1 is none. Source: getrlimit(2)."""

    name: str
    soft: int
    hard: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Everything that a start of the container needs to know beside its image."""

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = ""
    """Empty: the image's, else /; so for the user, and 0 for the signal."""
    user: str = ""
    hostname: str | None = None
    terminal: bool = False
    interactive: bool = False
    """Keep standard input open; else it is /dev/null."""
    stdin_once: bool = False
    """The first end of input from a client is the end of it."""
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[tuple[str, str], ...] = ()
    """Mountpoint, options between commas."""
    ports: tuple[Port, ...] = ()
    network: Network = "private"
    publish_all: bool = False
    """Publish the ports that the image exposes, each at any that is free."""
    read_only: bool = False
    memory: int | None = None
    """Bytes."""
    cpus: float | None = None
    pids_limit: int | None = None
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    remove: bool = False
    """Remove the container when its process ends."""
    stop_signal: int = 0
    stop_timeout: float | None = None
    """Seconds until one that does not end is killed."""
    labels: tuple[tuple[str, str], ...] = ()
    init: bool = False
    """Have a small program as PID 1, which collects orphans and passes on signals."""
    privileged: bool = False
    no_new_privileges: bool = False
    seccomp: str | None = None
    """None: the default profile; empty: none; else the profile itself."""
    ulimits: tuple[Ulimit, ...] = ()
    devices: tuple[Device, ...] = ()
    groups: tuple[str, ...] = ()
    """Further groups of the user, names or numbers."""
    sysctls: tuple[tuple[str, str], ...] = ()
    shm_size: int = 64 << 20
    """Bytes."""
    memory_swap: int | None = None
    """Bytes of memory and swap together; -1 for any."""
    cpu_shares: int | None = None
    cpuset: str = ""
    oom_score_adj: int | None = None
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    hosts: tuple[tuple[str, str], ...] = ()
    """Name and address of further lines in /etc/hosts."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spec:
        fields: dict[str, Any] = dict(data)
        for key in ("args", "env", "cap_add", "cap_drop"):
            fields[key] = tuple(data[key])
        fields["volumes"] = tuple(Volume(**volume) for volume in data["volumes"])
        fields["ports"] = tuple(Port(**port) for port in data["ports"])
        fields["tmpfs"] = tuple((target, options) for target, options in data["tmpfs"])
        # Those that a container of an earlier version does not have keep their defaults.
        for key in ("groups", "dns", "dns_search", "dns_options"):
            fields[key] = tuple(data.get(key, ()))
        for key in ("labels", "sysctls", "hosts"):
            fields[key] = tuple((name, value) for name, value in data.get(key, ()))
        fields["ulimits"] = tuple(Ulimit(**limit) for limit in data.get("ulimits", ()))
        fields["devices"] = tuple(Device(**device) for device in data.get("devices", ()))
        return cls(**fields)


def parse_size(text: str, option: str) -> int:
    """Bytes in `512m` and the like. Raises ContainerError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([bkmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ContainerError(f"{option} {text!r}: write a number with b, k, m or g, such as 512m")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_memory(text: str) -> int:
    """Bytes that are enough for a process. Raises ContainerError."""
    size = parse_size(text, "--memory")
    if size < _LEAST_MEMORY:
        raise ContainerError(f"--memory {text}: the least is 6m")
    return size


def parse_cpus(text: str) -> float:
    """A number of CPUs. Raises ContainerError."""
    try:
        count = float(text)
    except ValueError:
        count = math.nan
    if not 0.01 <= count <= (os.cpu_count() or 1):
        raise ContainerError(f"--cpus {text!r}: write a number from 0.01 to {os.cpu_count()}")
    return count


def parse_cpuset(text: str) -> str:
    """A list of CPUs such as `0-2,5`. Raises ContainerError. Source: cpuset(7)."""
    most = os.cpu_count() or 1
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or not int(first) <= int(last or first) < most:
            raise ContainerError(f"--cpuset-cpus {text!r}: write CPUs from 0 to {most - 1}, such as 0-2,5")
    return text


def parse_ulimit(text: str) -> Ulimit:
    """`NAME=SOFT[:HARD]`, where -1 or `unlimited` is no limit. Raises ContainerError."""
    name, _, values = text.partition("=")
    words = values.split(":")
    if name.upper() not in _ULIMITS or len(words) > 2 or not all(_ULIMIT_VALUE.fullmatch(word) for word in words):
        raise ContainerError(
            f"--ulimit {text!r}: write NAME=SOFT[:HARD], such as nofile=1024:4096; "
            f"the names are {' '.join(_ULIMITS).lower()}"
        )
    soft, *rest = (-1 if word == "unlimited" else int(word) for word in words)
    hard = rest[0] if rest else soft
    if hard != -1 and (soft == -1 or soft > hard):
        raise ContainerError(f"--ulimit {text}: the soft limit is above the hard one")
    return Ulimit(name.lower(), soft, hard)


def parse_device(text: str) -> Device:
    """`SOURCE[:TARGET][:ACCESS]`. Raises ContainerError."""
    option = f"--device {text}"
    source, *rest = text.split(":")
    access = rest.pop() if rest and re.fullmatch("[rwm]+", rest[-1]) else "rwm"
    if len(rest) > 1:
        raise ContainerError(f"{option}: write SOURCE[:TARGET][:rwm]")
    return Device(parse_target(source, option), parse_target(rest[0] if rest else source, option), access)


def parse_pair(text: str, option: str, separator: str = "=") -> tuple[str, str]:
    """`NAME=VALUE`. Raises ContainerError."""
    name, found, value = text.partition(separator)
    if not name or not found:
        raise ContainerError(f"{option} {text!r}: write NAME{separator}VALUE")
    return name, value


def parse_host(text: str) -> tuple[str, str]:
    """`NAME:ADDRESS` of --add-host. Raises ContainerError."""
    name, address = parse_pair(text, "--add-host", ":")
    return name, check_address(address.strip("[]"), f"--add-host {text}")


def check_address(text: str, option: str) -> str:
    """An IP address. Raises ContainerError."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ContainerError(f"{option}: {text!r} is no IP address") from None


def parse_signal(text: str) -> int:
    """The number of a signal given as number or name, with or without SIG. Raises ContainerError."""
    if text.isdigit() and 1 <= int(text) <= signal.NSIG - 1:
        return int(text)
    name = text.upper().removeprefix("SIG")
    try:
        return signal.Signals[f"SIG{name}"].value
    except KeyError:
        pass
    match = re.fullmatch(r"RTMIN(?:\+(\d+))?|RTMAX(?:-(\d+))?", name)
    if match is not None:
        number = signal.SIGRTMIN + int(match[1] or 0) if name[2:5] == "MIN" else signal.SIGRTMAX - int(match[2] or 0)
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
    raise ContainerError(f"there is no signal {text!r}")


def parse_env(given: Iterable[str], files: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """The variables of env files, then those given; a bare name takes the value it has in `environ`, if any.

    Raises ContainerError. Source: docker-run(1), --env and --env-file.
    """
    words: list[str] = []
    for path in files:
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as lines:
                for number, line in enumerate(lines, 1):
                    text = line.strip("\r\n").lstrip()
                    if text and not text.startswith("#"):
                        name = text.partition("=")[0]
                        if not name or re.search(r"\s", name):
                            raise ContainerError(f"{path}, line {number}: {name!r} is no name for a variable")
                        words.append(text)
        except OSError as error:
            raise ContainerError(f"cannot read the env file {path}: {error.strerror}") from error
    words += given
    found = []
    for word in words:
        name, equals, _ = word.partition("=")
        if not name or "\0" in word:
            raise ContainerError(f"{word!r} sets no variable: write NAME=VALUE")
        if equals:
            found.append(word)
        elif name in environ:
            found.append(f"{name}={environ[name]}")
    return found


def merge_env(*parts: Iterable[str]) -> tuple[str, ...]:
    """Each variable once, with the value set last, where it was set first."""
    merged: dict[str, str] = {}
    for part in parts:
        for word in part:
            merged[word.partition("=")[0]] = word
    return tuple(merged.values())


def parse_target(text: str, option: str) -> str:
    """An absolute path inside the container, in its plain form. Raises ContainerError."""
    if not text.startswith("/") or "\0" in text:
        raise ContainerError(f"{option}: {text!r} must be an absolute path in the container")
    path = "/" + posixpath.normpath(text).lstrip("/")
    if path == "/":
        raise ContainerError(f"{option}: the root of the container can't be replaced")
    return path


def parse_volume(text: str) -> Volume:
    """`SRC:DST[:OPTIONS]`, `NAME:DST[:OPTIONS]` or `DST`. Raises ContainerError. Source: docker-run(1), --volume."""
    option = f"-v {text}"
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise ContainerError(f"{option}: write SOURCE:TARGET[:ro], or a TARGET alone")
    if len(parts) == 1:
        return Volume(parse_target(text, option), name=names.new_id(), anonymous=True)
    read_only = False
    propagation = "rprivate"
    for word in parts[2].split(",") if len(parts) == 3 else ():
        if word in ("ro", "rw"):
            read_only = word == "ro"
        elif word in _PROPAGATIONS:
            propagation = word
        elif word not in _NO_EFFECT:
            raise ContainerError(f"{option}: there is no volume option {word!r}; ro and rw are the ones")
    source, target = parts[0], parse_target(parts[1], option)
    if "/" not in source and not source.startswith("."):
        return Volume(target, name=names.check(source, "volume"), read_only=read_only, propagation=propagation)
    path = os.path.abspath(os.path.expanduser(source))
    if not os.path.exists(path):
        raise ContainerError(f"{option}: there is no {path}")
    return Volume(target, source=path, read_only=read_only, propagation=propagation)


def parse_mount(text: str) -> Volume | tuple[str, str]:
    """The volume, or mountpoint and options of the tmpfs, that `type=...,source=...,target=...[,readonly]` means.

    Raises ContainerError. Source: docker-run(1), --mount.
    """
    option = f"--mount {text}"
    given: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        key = _MOUNT_KEYS.get(key.strip().lower(), "")
        if not key or key in given or (not equals and key != "readonly"):
            raise ContainerError(f"{option}: there is no {word!r} here; write type=bind,source=/a,target=/b,readonly")
        given[key] = value if equals else "true"
    kind = given.pop("type", "volume")
    target = parse_target(given.pop("target", ""), option)
    source = given.pop("source", "")
    read_only = given.pop("readonly", "false").lower() in ("true", "1")
    if kind == "tmpfs":
        if source or "propagation" in given:
            raise ContainerError(f"{option}: a tmpfs has no source and no propagation")
        words = [f"{key}={given[key]}" for key in ("size", "mode") if key in given] + ["ro"] * read_only
        return parse_tmpfs(f"{target}:{','.join(words)}")
    if "size" in given or "mode" in given:
        raise ContainerError(f"{option}: only a tmpfs has a size and a mode")
    propagation = given.pop("propagation", "rprivate")
    if propagation not in (*_PROPAGATIONS, "private", "rprivate"):
        raise ContainerError(f"{option}: there is no propagation {propagation!r}")
    if kind == "bind":
        if not os.path.isabs(source) or not os.path.exists(source):
            raise ContainerError(f"{option}: there is no {source or 'source'}")
        return Volume(target, source=source, read_only=read_only, propagation=propagation)
    if kind != "volume":
        raise ContainerError(f"{option}: the type is bind, volume or tmpfs")
    if not source:
        return Volume(target, name=names.new_id(), anonymous=True, read_only=read_only)
    return Volume(target, name=names.check(source, "volume"), read_only=read_only)


def parse_tmpfs(text: str) -> tuple[str, str]:
    """`DIR[:OPTIONS]`, the options those of tmpfs(5). Raises ContainerError."""
    target, _, given = text.partition(":")
    words = [word for word in given.split(",") if word]
    for word in words:
        if not re.fullmatch(
            r"(?:size|mode|uid|gid|nr_inodes|nr_blocks|huge)=\w+%?|(?:no)?(?:exec|suid|dev|atime)|r[ow]", word
        ):
            raise ContainerError(f"--tmpfs {text}: there is no tmpfs option {word!r}")
    names_given = {word.partition("=")[0] for word in words}
    kept = [word for word in _TMPFS_DEFAULTS if word.removeprefix("no") not in names_given and word not in names_given]
    return parse_target(target, f"--tmpfs {text}"), ",".join([*kept, *words])


def parse_ports(text: str) -> list[Port]:
    """`[[IP:]HOST:]CONTAINER[/tcp|/udp]`, where ports may be ranges. Raises ContainerError."""
    wrong = ContainerError(f"-p {text}: write [IP:]HOST:CONTAINER[/udp], such as 8080:80 or 127.0.0.1:5353:53/udp")
    match = re.fullmatch(r"(?:(?:\[([^]]*)\]|([^:]*)):(?=.*:))?(?:([\d-]*):)?([\d-]+)(?:/(tcp|udp))?", text)
    if match is None:
        raise wrong
    address = match[1] or match[2] or ""
    if address:
        address = check_address(address, f"-p {text}")
    inside = _port_range(match[4], wrong)
    # 0 is any port that is free, as is none.
    outside = _port_range(match[3], wrong) if (match[3] or "0").strip("0") else [0] * len(inside)
    if len(outside) != len(inside):
        raise ContainerError(f"-p {text}: the two ranges are of different length")
    protocol: Literal["tcp", "udp"] = "udp" if match[5] == "udp" else "tcp"
    return [Port(host, port, protocol, address) for host, port in zip(outside, inside, strict=True)]


def _port_range(text: str, wrong: ContainerError) -> list[int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise wrong
    low, high = int(first), int(last or first)
    if not 1 <= low <= high <= 65535:
        raise wrong
    return list(range(low, high + 1))
