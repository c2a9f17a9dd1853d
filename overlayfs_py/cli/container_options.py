"""The options of create and run, and the spec that they make."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from overlayfs_py.cli.completion import image_names
from overlayfs_py.runtime import seccomp, spec
from overlayfs_py.runtime.errors import ContainerError, NoContainerError
from overlayfs_py.runtime.names import check_hostname
from overlayfs_py.runtime.spec import Spec, Volume
from overlayfs_py.runtime.state import Container, Containers

_Function = TypeVar("_Function", bound=Callable[..., Any])

OPTIONS = (
    click.option("--name", help="A name for the container; else one is made up."),
    click.option("-i", "--interactive", is_flag=True, help="Keep standard input open."),
    click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
    click.option("-e", "--env", multiple=True, metavar="K[=V]", help="Set a variable, or pass on our own."),
    click.option("--env-file", multiple=True, metavar="FILE", help="Set the variables that a file lists."),
    click.option("-w", "--workdir", metavar="DIR", help="The working directory."),
    click.option("-u", "--user", metavar="USER[:GROUP]", help="Who it runs as; names are the image's."),
    click.option("-v", "--volume", multiple=True, metavar="SRC:DST[:ro]", help="A directory of the host, or a volume."),
    click.option("--tmpfs", multiple=True, metavar="DIR[:OPTIONS]", help="A directory in memory."),
    click.option("-p", "--publish", multiple=True, metavar="[IP:]HOST:CTR[/udp]", help="Make a port reachable."),
    click.option("-P", "--publish-all", is_flag=True, help="Publish all ports that the image exposes."),
    click.option("--mount", multiple=True, metavar="type=...,K=V", help="As -v and --tmpfs, in words."),
    click.option("--volumes-from", multiple=True, metavar="CONTAINER[:ro]", help="The volumes of another."),
    click.option(
        "--network",
        "--net",
        metavar="NETWORK",
        default="private",
        help="private, host, none, or container:NAME for that of another.  [default: private]",
    ),
    click.option("--dns", multiple=True, metavar="IP", help="A name server, in place of the host's."),
    click.option("--dns-search", multiple=True, metavar="DOMAIN", help="Where short names are looked up."),
    click.option("--dns-option", multiple=True, metavar="OPTION", help="An option of resolv.conf(5)."),
    click.option("--add-host", multiple=True, metavar="NAME:IP", help="A further line in its /etc/hosts."),
    click.option("--read-only", is_flag=True, help="Make the root read-only."),
    click.option("-m", "--memory", metavar="SIZE", help="The most memory it may use, such as 512m."),
    click.option("--cpus", metavar="N", help="The most CPU time it may use, in CPUs."),
    click.option("--memory-swap", metavar="SIZE", help="The most memory and swap together; -1 for any."),
    click.option("--cpuset-cpus", metavar="LIST", help="The CPUs it may use, such as 0-2,5."),
    click.option("-c", "--cpu-shares", type=click.IntRange(min=2), metavar="N", help="Its part of busy CPUs, of 1024."),
    click.option("--pids-limit", type=click.IntRange(min=-1), metavar="N", help="The most processes; -1 for any."),
    click.option("--ulimit", multiple=True, metavar="NAME=SOFT[:HARD]", help="A limit of each process."),
    click.option("--oom-score-adj", type=click.IntRange(-1000, 1000), metavar="N", help="From -1000 to 1000."),
    click.option("--shm-size", metavar="SIZE", help="The size of /dev/shm.  [default: 64m]"),
    click.option("-h", "--hostname", metavar="NAME", help="Its host name; else the beginning of its id."),
    click.option("--entrypoint", metavar="COMMAND", help="Replace the image's entrypoint and command."),
    click.option("--cap-add", multiple=True, metavar="CAP", help="Add a capability, or ALL."),
    click.option("--cap-drop", multiple=True, metavar="CAP", help="Drop a capability, or ALL."),
    click.option("--group-add", multiple=True, metavar="GROUP", help="A further group of the user."),
    click.option("--privileged", is_flag=True, help="All capabilities and devices, and nothing masked."),
    click.option("--device", multiple=True, metavar="SRC[:DST][:rwm]", help="A device of the host."),
    click.option(
        "--security-opt",
        multiple=True,
        metavar="OPTION",
        help="no-new-privileges, seccomp=unconfined or seccomp=FILE.",
    ),
    click.option("--sysctl", multiple=True, metavar="K=V", help="A setting of the kernel, in its namespaces."),
    click.option("--init", is_flag=True, help="Have a small program as PID 1, which collects orphans."),
    click.option("-l", "--label", multiple=True, metavar="K=V", help="Attach a word of your own."),
    click.option("--stop-signal", metavar="SIGNAL", help="The signal that asks it to end."),
    click.option(
        "--stop-timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="How long it has to end.  [default: 10]",
    ),
    click.option("--cidfile", metavar="FILE", help="Write its id to a file that is not there yet."),
    click.option("--platform", metavar="OS/ARCH", help="Which image to get where there are several."),
    click.option(
        "--pull",
        type=click.Choice(("missing", "always", "never")),
        default="missing",
        show_default=True,
        help="When to get the image from its registry.",
    ),
    click.option("--rm", "remove", is_flag=True, help="Remove the container when its process ends."),
    click.argument("image", shell_complete=image_names),
    click.argument("command", nargs=-1, type=click.UNPROCESSED),
)


def with_options(function: _Function) -> _Function:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def spec_of(known: Containers, *, stdin_once: bool, **given: Any) -> Spec:
    """What the options ask for. Raises ContainerError."""
    volumes, tmpfs = _places(known, given)
    network = _network(known, given["network"])
    ports = tuple(port for text in given["publish"] for port in spec.parse_ports(text))
    if (ports or given["publish_all"]) and network != "private":
        raise ContainerError(f"-p has no meaning with --network {given['network']}")
    if given["workdir"] and not given["workdir"].startswith("/"):
        raise ContainerError(f"-w: {given['workdir']!r} must be an absolute path in the container")
    pids = given["pids_limit"]
    if pids == 0:
        raise ContainerError("--pids-limit 0: write a number from 1, or -1 for any")
    seccomp_profile, no_new_privileges = _security(given["security_opt"])
    memory = spec.parse_memory(given["memory"]) if given["memory"] else None
    return Spec(
        args=given["command"],
        env=tuple(spec.parse_env(given["env"], given["env_file"], os.environ)),
        cwd=given["workdir"] or "",
        user=given["user"] or "",
        hostname=check_hostname(given["hostname"]) if given["hostname"] else None,
        terminal=given["tty"],
        interactive=given["interactive"],
        stdin_once=stdin_once,
        volumes=volumes,
        tmpfs=tmpfs,
        ports=ports,
        publish_all=given["publish_all"],
        network=network,
        read_only=given["read_only"],
        memory=memory,
        memory_swap=_swap(given["memory_swap"], memory),
        cpus=spec.parse_cpus(given["cpus"]) if given["cpus"] else None,
        cpu_shares=given["cpu_shares"],
        cpuset=spec.parse_cpuset(given["cpuset_cpus"]) if given["cpuset_cpus"] else "",
        pids_limit=None if pids == -1 else pids,
        ulimits=tuple(spec.parse_ulimit(text) for text in given["ulimit"]),
        oom_score_adj=given["oom_score_adj"],
        shm_size=spec.parse_size(given["shm_size"], "--shm-size") if given["shm_size"] else Spec(args=()).shm_size,
        cap_add=given["cap_add"],
        cap_drop=given["cap_drop"],
        groups=given["group_add"],
        privileged=given["privileged"],
        devices=tuple(spec.parse_device(text) for text in given["device"]),
        seccomp=seccomp_profile,
        no_new_privileges=no_new_privileges,
        sysctls=tuple(spec.parse_pair(text, "--sysctl") for text in given["sysctl"]),
        init=given["init"],
        dns=tuple(spec.check_address(text, "--dns") for text in given["dns"]),
        dns_search=given["dns_search"],
        dns_options=given["dns_option"],
        hosts=tuple(spec.parse_host(text) for text in given["add_host"]),
        remove=given["remove"],
        stop_signal=spec.parse_signal(given["stop_signal"]) if given["stop_signal"] else 0,
        stop_timeout=given["stop_timeout"],
        labels=tuple((key, value) for key, _, value in (label.partition("=") for label in given["label"])),
    )


def _places(known: Containers, given: dict[str, Any]) -> tuple[tuple[Volume, ...], tuple[tuple[str, str], ...]]:
    """The volumes and the tmpfs of all options that name some. Raises ContainerError."""
    volumes = [spec.parse_volume(text) for text in given["volume"]]
    tmpfs = [spec.parse_tmpfs(text) for text in given["tmpfs"]]
    for text in given["mount"]:
        one = spec.parse_mount(text)
        if isinstance(one, Volume):
            volumes.append(one)
        else:
            tmpfs.append(one)
    targets = [volume.target for volume in volumes] + [target for target, _ in tmpfs]
    if len(set(targets)) != len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise ContainerError(f"two volumes have the target {twice}")
    for text in given["volumes_from"]:
        name, _, mode = text.partition(":")
        if mode not in ("", "ro", "rw"):
            raise ContainerError(f"--volumes-from {text}: write CONTAINER[:ro]")
        for volume in _other(known, name, "--volumes-from").spec.volumes:
            if volume.target not in targets:
                targets.append(volume.target)
                read_only = volume.read_only or mode == "ro"
                volumes.append(dataclasses.replace(volume, read_only=read_only, anonymous=False))
    return tuple(volumes), tuple(tmpfs)


def _other(known: Containers, name: str, option: str) -> Container:
    """The container that an option names. Raises ContainerError, as without it the new one can't be started."""
    try:
        return known.find(name)
    except NoContainerError as error:
        raise ContainerError(f"{option}: {error}") from error


def _network(known: Containers, text: str) -> str:
    """As a spec has it. Raises ContainerError."""
    kind, _, name = text.partition(":")
    if kind == "container" and name:
        return f"container:{_other(known, name, '--network').id}"
    # Those who come from Docker or podman call the private kind by what it is made with there.
    text = {"bridge": "private", "default": "private", "pasta": "private"}.get(text, text)
    if text not in ("private", "host", "none"):
        raise ContainerError(f"--network {text}: there are private, host, none and container:NAME")
    return text


def _security(options: Sequence[str]) -> tuple[str | None, bool]:
    """The seccomp profile as a spec has it, and whether there is to be no way to new privileges."""
    profile: str | None = None
    no_new_privileges = False
    for text in options:
        key, separator, value = text.replace(":", "=", 1).partition("=") if "=" not in text else text.partition("=")
        if key == "seccomp" and value:
            profile = "" if value == "unconfined" else None if value == "builtin" else seccomp.read(value)
        elif key == "no-new-privileges" and value in ("", "true", "false"):
            no_new_privileges = value != "false"
        elif (key, value) not in (("apparmor", "unconfined"), ("label", "disable")) or not separator:
            raise ContainerError(f"--security-opt {text}: there are no-new-privileges and seccomp=unconfined|FILE")
    return profile, no_new_privileges


def _swap(text: str | None, memory: int | None) -> int | None:
    if not text:
        return None
    if memory is None:
        raise ContainerError("--memory-swap counts the memory too, so it needs --memory")
    size = -1 if text == "-1" else spec.parse_size(text, "--memory-swap")
    if 0 <= size < memory:
        raise ContainerError(f"--memory-swap {text}: it counts the memory too, so it is not less than --memory")
    return size
