"""Commands on what is used: top, stats, volume, system df, system prune."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from overlayfs_py.cli.completion import container_names, volume_names
from overlayfs_py.cli.container_base import (
    Column,
    ContainerCommand,
    Row,
    complain,
    containers,
    each,
    print_rows,
    store,
)
from overlayfs_py.cli.image_base import in_use
from overlayfs_py.cli.output import format_option, human_size, print_json
from overlayfs_py.images import Image, ImageError, Store
from overlayfs_py.runtime import lifecycle, limits, names, usage, volumes
from overlayfs_py.runtime.process import Process
from overlayfs_py.runtime.state import Container, Containers
from overlayfs_py.runtime.times import isoformat


@click.command(cls=ContainerCommand, context_settings={"ignore_unknown_options": True})
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[PS OPTIONS]")
def top(name: str, options: tuple[str, ...]) -> None:
    """List the processes of a container, as ps(1) does.

    \b
    Example:
      ovl top web -eo pid,args
    """
    known = containers()
    first = lifecycle.running(known, known.find(name)).process
    assert first is not None
    for line in usage.top(first, options):
        click.echo(line)


def _sample(container: Container, first: Process) -> tuple[float, dict[str, int | None], tuple[int, int]]:
    return time.monotonic(), limits.usage(container), usage.traffic(first)


def _stats(known: Containers, chosen: list[str], seconds: float) -> list[Row]:
    """What each running container uses, its CPU time measured over so many seconds."""
    running = []
    for container, status in lifecycle.settle_all(known):
        if status.process is not None and (not chosen or container.id in chosen):
            running.append((container, status.process, _sample(container, status.process)))
    time.sleep(seconds if running else 0)
    rows = []
    total = limits.total_memory()
    for container, first, before in running:
        after = _sample(container, first)
        was, used = before[1]["cpu"], after[1]
        cpu = None if was is None or used["cpu"] is None else (used["cpu"] - was) / 1e9 / (after[0] - before[0]) * 100
        memory, limit = used["memory"], used["memory_limit"]
        if limit is None or limit > total:
            limit = total
        rows.append(
            {
                "Id": container.id,
                "Name": container.name,
                "CPUPercent": cpu,
                "Memory": memory,
                "MemoryLimit": limit,
                "MemoryPercent": None if memory is None else memory / limit * 100,
                "Received": after[2][0],
                "Sent": after[2][1],
                "Pids": used["pids"],
            }
        )
    return rows


_STATS: list[Column] = [
    ("CONTAINER ID", lambda row: row["Id"][:12]),
    ("NAME", lambda row: row["Name"]),
    ("CPU %", lambda row: _percent(row["CPUPercent"])),
    ("MEM USAGE / LIMIT", lambda row: f"{_size(row['Memory'])} / {_size(row['MemoryLimit'])}"),
    ("MEM %", lambda row: _percent(row["MemoryPercent"])),
    ("NET I/O", lambda row: f"{human_size(row['Received'])} / {human_size(row['Sent'])}"),
    ("PIDS", lambda row: "--" if row["Pids"] is None else str(row["Pids"])),
]


def _percent(value: float | None) -> str:
    return "--" if value is None else f"{value:.2f}%"


def _size(size: int | None) -> str:
    return "--" if size is None else human_size(size)


@click.command(cls=ContainerCommand)
@click.option("--no-stream", is_flag=True, help="Print it once.")
@format_option
@click.argument("words", nargs=-1, metavar="[CONTAINER...]", shell_complete=container_names)
def stats(no_stream: bool, form: str, words: tuple[str, ...]) -> None:
    """Show what running containers use, anew each second.

    \b
    Example:
      ovl stats --no-stream
    """
    known = containers()
    chosen = [known.find(word).id for word in words]
    try:
        while True:
            rows = _stats(known, chosen, 1.0)
            if sys.stdout.isatty() and not no_stream:
                click.clear()
            print_rows(rows, _STATS, form)
            if no_stream:
                return
            sys.stdout.flush()
    except KeyboardInterrupt:
        return


@click.group()
def volume() -> None:
    """Manage volumes: data that outlives containers.

    \b
    Example:
      ovl volume ls
    """


@volume.command("ls", cls=ContainerCommand)
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
@format_option
def volume_ls(quiet: bool, form: str) -> None:
    """List the volumes.

    \b
    Example:
      ovl volume ls -q
    """
    found = volumes.all_volumes(containers())
    if quiet:
        for one in found:
            click.echo(one.name)
        return
    columns: list[Column] = [("VOLUME NAME", lambda row: row["Name"]), ("MOUNTPOINT", lambda row: row["Mountpoint"])]
    print_rows([_describe(one) for one in found], columns, form)


def _describe(one: volumes.NamedVolume) -> Row:
    created = isoformat(one.created)
    return {"Name": one.name, "Mountpoint": str(one.path), "Anonymous": one.anonymous, "CreatedAt": created}


@volume.command("create", cls=ContainerCommand)
@click.argument("name", required=False)
def volume_create(name: str | None) -> None:
    """Make a volume; prints its name.

    \b
    Example:
      ovl volume create data
    """
    known = containers()
    with known.naming():
        click.echo(volumes.ensure(known, name or names.new_id(), anonymous=name is None).name)


@volume.command("inspect", cls=ContainerCommand)
@click.argument("words", nargs=-1, required=True, metavar="VOLUME...", shell_complete=volume_names)
def volume_inspect(words: tuple[str, ...]) -> None:
    """Print all there is to know of volumes.

    \b
    Example:
      ovl volume inspect data
    """
    known = containers()
    print_json([{**_describe(one := volumes.find(known, word)), "Size": usage.disk(one.path)} for word in words])


@volume.command("rm", cls=ContainerCommand)
@click.argument("words", nargs=-1, required=True, metavar="VOLUME...", shell_complete=volume_names)
def volume_rm(words: tuple[str, ...]) -> None:
    """Remove volumes that no container has, with their data.

    \b
    Example:
      ovl volume rm data
    """
    known = containers()
    each(words, lambda word: volumes.remove(known, word))


@volume.command("prune", cls=ContainerCommand)
@click.option("-a", "--all", "everything", is_flag=True, help="Those that have a name, too.")
@click.option("-f", "--force", is_flag=True, help="Don't ask.")
def volume_prune(everything: bool, force: bool) -> None:
    """Remove volumes without a name that no container has.

    \b
    Example:
      ovl volume prune -f
    """
    if not force:
        click.confirm("Remove unused volumes with their data?", abort=True)
    for name in _prune_volumes(containers(), everything=everything):
        click.echo(name)


def _prune_volumes(known: Containers, *, everything: bool) -> list[str]:
    gone = []
    for one in volumes.all_volumes(known):
        if (one.anonymous or everything) and not volumes.users_of(known, one.name):
            volumes.remove(known, one.name)
            gone.append(one.name)
    return gone


@click.group()
def system() -> None:
    """Show and free the space that all of it takes.

    \b
    Example:
      ovl system df
    """


@system.command("df", cls=ContainerCommand)
@format_option
def system_df(form: str) -> None:
    """Show what images, containers and volumes take on disk.

    \b
    Example:
      ovl system df --format json
    """
    known, images = containers(), store()
    found = lifecycle.settle_all(known)
    made = images.images()
    used = {container.image for container, _ in found}
    layers: dict[Path, bool] = {}
    for image in made:
        for layer in image.layers:
            layers[layer.path] = layers.get(layer.path, False) or image.id in used
    sizes = {path: usage.disk(path) for path in layers}
    active = [container for container, status in found if status.is_up]
    own = {container.id: usage.disk(container.directory / "upper") for container, _ in found}
    kept = {volume.name for container, _ in found for volume in container.spec.volumes}
    stored = {one.name: usage.disk(one.path) for one in volumes.all_volumes(known)}
    rows = [
        _share("Images", len(made), len({image.id for image in made} & used), sizes, {p for p in layers if layers[p]}),
        _share("Containers", len(found), len(active), own, {container.id for container in active}),
        _share("Volumes", len(stored), len(stored.keys() & kept), stored, stored.keys() & kept),
    ]
    columns: list[Column] = [
        ("TYPE", lambda row: row["Type"]),
        ("TOTAL", lambda row: str(row["Total"])),
        ("ACTIVE", lambda row: str(row["Active"])),
        ("SIZE", lambda row: human_size(row["Size"])),
        ("RECLAIMABLE", lambda row: human_size(row["Reclaimable"])),
    ]
    print_rows(rows, columns, form)


def _share(kind: str, total: int, active: int, sizes: dict[Any, int], kept: Any) -> Row:
    size = sum(sizes.values())
    needed = sum(sizes[key] for key in kept)
    return {"Type": kind, "Total": total, "Active": active, "Size": size, "Reclaimable": size - needed}


@system.command("prune", cls=ContainerCommand)
@click.option("-a", "--all", "everything", is_flag=True, help="Images that have a name but no container, too.")
@click.option("--volumes", "with_volumes", is_flag=True, help="Volumes that no container has, too.")
@click.option("-f", "--force", is_flag=True, help="Don't ask.")
def system_prune(everything: bool, with_volumes: bool, force: bool) -> None:
    """Remove containers that don't run and images without a name.

    Images that a container is made of stay.

    \b
    Example:
      ovl system prune -a --volumes
    """
    if not force:
        click.confirm("Remove all containers that don't run, and unused images?", abort=True)
    known, images = containers(), store()
    known.sweep()
    for container, status in lifecycle.settle_all(known):
        if not status.is_up:
            lifecycle.remove(known, container, force=False, with_volumes=True)
            click.echo(f"container {container.name}")
    users = in_use(images)
    for image in images.images():
        if (everything or not image.names) and not users(image.id):
            _remove_image(images, image)
    for name in _prune_volumes(known, everything=True) if with_volumes else ():
        click.echo(f"volume {name}")


def _remove_image(images: Store, image: Image) -> None:
    try:
        images.remove(image, in_use=in_use(images))
    except ImageError as error:
        # A container was made of it meanwhile.
        complain(str(error))
    else:
        click.echo(f"image {image.names[0] if image.names else image.short_id}")


# `prune` without `system` is the same command.
commands: list[click.Command] = [top, stats, volume, system, system_prune]
