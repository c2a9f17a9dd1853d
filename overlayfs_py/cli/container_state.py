"""Commands that look at containers and end them: ps, inspect, logs, stop, kill, restart, wait, rm, rename, port."""

from __future__ import annotations

import os
import shlex
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
@format_option
def ps(everything: bool, quiet: bool, no_trunc: bool, form: str) -> None:
    """List the running containers.

    \b
    Example:
      ovl ps -a
    """
    rows = [
        _row(container, status)
        for container, status in lifecycle.settle_all(containers())
        if everything or status.phase == "running"
    ]
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


@click.command(cls=ContainerCommand)
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER|IMAGE...", shell_complete=any_names)
def inspect(names: tuple[str, ...]) -> None:
    """Print all there is to know of containers and images.

    It is JSON, with the keys of `docker inspect`.

    \b
    Example:
      ovl inspect web debian:12
    """
    known = containers()
    print_json([_inspect(known, name) for name in names])


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
