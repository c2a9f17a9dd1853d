"""Commands that look at containers and end them: ps, inspect, logs, stop, kill, restart, wait, rm, rename, port."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

import click

from overlayfs_py.cli.completion import any_names, container_names
from overlayfs_py.cli.container_base import (
    Column,
    ContainerCommand,
    Row,
    complain,
    containers,
    for_each,
    print_rows,
    store,
)
from overlayfs_py.cli.output import format_option, print_json
from overlayfs_py.images import ImageError
from overlayfs_py.runtime import lifecycle, logs
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.inspect import describe
from overlayfs_py.runtime.spec import parse_signal
from overlayfs_py.runtime.state import Container, Containers, Status
from overlayfs_py.runtime.times import isoformat, parse_moment, since

_LONGEST_COMMAND = 20

_grace_option = click.option(
    "-t",
    "--time",
    "seconds",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long it has before it is killed; else what --stop-timeout said, or 10.",
)


def _state(status: Status) -> str:
    """As Docker says it."""
    if status.phase == "running":
        return f"Up {since(status.started)}"
    if status.phase == "exited":
        return f"Exited ({status.exit_code}) {since(status.finished)} ago"
    return status.phase.capitalize()


def _row(container: Container, status: Status) -> Row:
    return {
        "Id": container.id,
        "Name": container.name,
        "Image": container.image_name,
        "ImageId": container.image,
        "Command": shlex.join(container.spec.args),
        "Created": isoformat(container.created),
        "State": status.phase,
        "Status": _state(status),
        "ExitCode": status.exit_code,
        "Ports": [str(port) for port in status.ports],
        "CreatedAgo": f"{since(container.created)} ago",
    }


def _short(text: str) -> str:
    return f'"{text[: _LONGEST_COMMAND - 1]}…"' if len(text) > _LONGEST_COMMAND else f'"{text}"'


@click.command(cls=ContainerCommand)
@click.option("-a", "--all", "everything", is_flag=True, help="Show those that don't run, too.")
@click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
@click.option("--no-trunc", is_flag=True, help="Print ids and commands in full.")
@click.option("-n", "--last", type=click.IntRange(min=1), metavar="N", help="Show the N made last, running or not.")
@click.option("-l", "--latest", is_flag=True, help="As -n 1.")
@click.option(
    "-f",
    "--filter",
    "filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only those whose name or id has VALUE in it, or whose status, exited (with that code), ancestor (image), "
    "label, volume or network is it.",
)
@format_option
def ps(
    everything: bool,
    quiet: bool,
    no_trunc: bool,
    last: int | None,
    latest: bool,
    filters: tuple[str, ...],
    form: str,
) -> None:
    """List the running containers.

    \b
    Examples:
      ovl ps -a
      ovl rm $(ovl ps -aq -f status=exited)
    """
    wanted = _wanted(filters)
    last = 1 if latest else last
    everything = everything or last is not None or bool({"status", "exited"} & wanted.keys())
    found = [
        (container, status)
        for container, status in lifecycle.settle_all(containers())
        if (everything or status.phase == "running") and _passes(container, status, wanted)
    ]
    rows = [_row(container, status) for container, status in found[:last]]
    if quiet:
        for row in rows:
            click.echo(row["Id"] if no_trunc else row["Id"][:12])
        return
    columns: list[Column] = [
        ("CONTAINER ID", lambda row: row["Id"] if no_trunc else row["Id"][:12]),
        ("IMAGE", lambda row: row["Image"]),
        ("COMMAND", lambda row: f'"{row["Command"]}"' if no_trunc else _short(row["Command"])),
        ("CREATED", lambda row: row["CreatedAgo"]),
        ("STATUS", lambda row: row["Status"]),
        ("PORTS", lambda row: ", ".join(row["Ports"])),
        ("NAMES", lambda row: row["Name"]),
    ]
    print_rows(rows, columns, form)


_FILTERS = ("name", "id", "status", "exited", "ancestor", "label", "volume", "network")


def _wanted(filters: tuple[str, ...]) -> dict[str, list[str]]:
    """The values of each kind of filter; one of them is to apply. Raises ContainerError."""
    wanted: dict[str, list[str]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if key not in _FILTERS or not equals:
            raise ContainerError(f"--filter {text}: write KEY=VALUE, with one of {', '.join(_FILTERS)}")
        wanted.setdefault(key, []).append(value)
    return wanted


def _passes(container: Container, status: Status, wanted: dict[str, list[str]]) -> bool:
    spec = container.spec
    places = [place for volume in spec.volumes for place in (volume.name, volume.source, volume.target)]
    labels = [label for key, value in spec.labels for label in (key, f"{key}={value}")]
    images = (container.image_name, container.image_name.removesuffix(":latest"))

    def applies(key: str, value: str) -> bool:
        if key == "name":
            return value in container.name
        if key == "id":
            return container.id.startswith(value)
        if key == "ancestor":
            return value.removesuffix(":latest") in images or container.image.removeprefix("sha256:").startswith(value)
        if key == "exited":
            return status.phase == "exited" and str(status.exit_code) == value
        values: dict[str, Sequence[str | None]] = {
            "status": [status.phase],
            "label": labels,
            "volume": places,
            "network": [spec.network],
        }
        return value in values[key]

    # Each label is to be there, as in Docker.
    return all(
        (all if key == "label" else any)(applies(key, value) for value in values) for key, values in wanted.items()
    )


@click.command(cls=ContainerCommand)
@click.option("-f", "--format", "template", metavar="TEMPLATE", help="Print this, with each {{.Key.Key}} filled in.")
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER|IMAGE...", shell_complete=any_names)
def inspect(template: str | None, names: tuple[str, ...]) -> None:
    """Print all there is to know of containers and images.

    It is JSON, with the keys of `docker inspect`.

    \b
    Examples:
      ovl inspect web debian:12
      ovl inspect -f '{{.State.Pid}} {{json .Mounts}}' web
    """
    known = containers()
    found = [_inspect(known, name) for name in names]
    if template is None or template == "json":
        print_json(found)
        return
    for one in found:
        click.echo(_FIELD.sub(lambda match, one=one: _field(one, match[1]), template))  # type: ignore[misc]


_FIELD = re.compile(r"\{\{(.*?)\}\}")


def _field(data: Any, text: str) -> str:
    """What a template's field stands for; of those of Docker's the plain ones. Raises ContainerError."""
    match = re.fullmatch(r"\s*(json\s+)?\.([\w.]*)\s*", text)
    if match is None:
        raise ContainerError(f"{{{{{text}}}}}: a field is written {{{{.Key.Key}}}} or {{{{json .Key}}}}")
    for key in filter(None, match[2].split(".")):
        if not isinstance(data, dict) or key not in data:
            raise ContainerError(f"there is no {key!r} in {match[2]!r}")
        data = data[key]
    return data if isinstance(data, str) and not match[1] else json.dumps(data, ensure_ascii=False)


def _inspect(known: Containers, name: str) -> dict[str, Any]:
    container = known.seek(name)
    if container is not None:
        return describe(container, lifecycle.settle(known, container))
    # The image commands' modules take longer than all else here.
    from overlayfs_py.cli.images import details

    images = store()
    try:
        return details(images, images.image(name))
    except ImageError as error:
        raise ContainerError(f"there is no container and no image {name}") from error


@click.command("logs", cls=ContainerCommand)
@click.option("-f", "--follow", is_flag=True, help="Go on until the container ends.")
@click.option("-t", "--timestamps", is_flag=True, help="Put its time before each line.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Print the last N lines only.")
@click.option("--since", "after", metavar="TIME", help="Leave out what is older than a time, or an age such as 10m.")
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
def logs_(follow: bool, timestamps: bool, tail: int | None, after: str | None, name: str) -> None:
    """Print what a container has written to standard output and error.

    \b
    Example:
      ovl logs -f --since 10m web
    """
    known = containers()
    container = known.find(name)
    earliest = isoformat(parse_moment(after)) if after else ""

    def ended() -> bool:
        return not container.directory.exists() or lifecycle.settle(known, container).phase not in (
            "starting",
            "running",
        )

    skip = 0
    if tail is not None:
        lines = sum(record.data.endswith(b"\n") for record in logs.read(container.directory / "log"))
        skip = max(0, lines - tail)
    fresh = {"stdout": True, "stderr": True}
    for record in logs.read(container.directory / "log", ended if follow else None):
        if skip:
            skip -= record.data.endswith(b"\n")
            continue
        if record.time < earliest:
            continue
        prefix = f"{record.time} ".encode() if timestamps and fresh[record.stream] else b""
        fresh[record.stream] = record.data.endswith(b"\n")
        _write_all(1 if record.stream == "stdout" else 2, prefix + record.data)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@click.command(cls=ContainerCommand)
@_grace_option
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=container_names)
def stop(seconds: float | None, names: tuple[str, ...]) -> None:
    """End containers by their stop signal, and kill those that don't.

    \b
    Example:
      ovl stop -t 30 web
    """
    for_each(names, lambda known, container: lifecycle.stop(known, container, seconds))


@click.command(cls=ContainerCommand)
@click.option("-s", "--signal", "name", default="KILL", show_default=True, metavar="SIGNAL", help="A name or a number.")
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=container_names)
def kill(name: str, names: tuple[str, ...]) -> None:
    """Send a signal to the first process of containers.

    \b
    Example:
      ovl kill -s HUP web
    """
    number = parse_signal(name)
    for_each(names, lambda known, container: lifecycle.kill(known, container, number))


@click.command(cls=ContainerCommand)
@_grace_option
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=container_names)
def restart(seconds: float | None, names: tuple[str, ...]) -> None:
    """Stop containers and start them again, with the layer they have.

    \b
    Example:
      ovl restart web
    """

    def one(known: Containers, container: Container) -> None:
        if container.spec.remove:
            raise ContainerError(f"container {container.name} was made with --rm, so nothing stays of it to restart")
        lifecycle.stop(known, container, seconds)
        lifecycle.start(known, container)

    for_each(names, one)


@click.command(cls=ContainerCommand)
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=container_names)
def wait(names: tuple[str, ...]) -> None:
    """Wait until containers end, and print the exit code of each.

    \b
    Example:
      ovl wait job
    """
    known = containers()
    for container in [known.find(name) for name in names]:
        click.echo(lifecycle.wait(known, container))


@click.command(cls=ContainerCommand)
@click.option("-f", "--force", is_flag=True, help="Kill those that run; those that are not there are no error.")
@click.option("-v", "--volumes", "with_volumes", is_flag=True, help="Remove their volumes that have no name, too.")
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=container_names)
def rm(force: bool, with_volumes: bool, names: tuple[str, ...]) -> None:
    """Remove containers, each with its own layer.

    Images and volumes that have a name stay.

    \b
    Example:
      ovl rm -f web
    """
    known = containers()
    if force:
        present = []
        for name in names:
            try:
                known.find(name)
            except ContainerError as error:
                complain(str(error))
            else:
                present.append(name)
        names = tuple(present)
    for_each(names, lambda known, container: lifecycle.remove(known, container, force=force, with_volumes=with_volumes))


@click.command(cls=ContainerCommand)
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
@click.argument("new")
def rename(name: str, new: str) -> None:
    """Give a container another name.

    \b
    Example:
      ovl rename web old-web
    """
    known = containers()
    lifecycle.rename(known, known.find(name), new)


@click.command(cls=ContainerCommand)
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
def port(name: str) -> None:
    """List the ports of a container that are published.

    \b
    Example:
      ovl port web
    """
    known = containers()
    for published in lifecycle.running(known, known.find(name)).ports:
        inside = f"{published.container}/{published.protocol}"
        address = f"[{published.address}]" if ":" in published.address else published.address
        click.echo(f"{inside} -> {address}:{published.host}")


commands: list[click.Command] = [ps, inspect, logs_, stop, kill, restart, wait, rm, rename, port]
