"""Commands on what is in containers: cp, diff, commit, mount, umount."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from overlayfs_py.cli.container_base import ContainerCommand, containers, store
from overlayfs_py.cli.output import format_option, print_json
from overlayfs_py.runtime import copying, lifecycle, mounting
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import parse_signal
from overlayfs_py.runtime.state import Container, Containers, Status

_INSTRUCTIONS = ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")


@contextlib.contextmanager
def _steady(known: Containers, container: Container) -> Iterator[Status]:
    """The status of a container; one that does not run is not started meanwhile."""
    status = lifecycle.settle(known, container)
    if status.is_up:
        yield lifecycle.running(known, container)
        return
    with container.locked():
        status = lifecycle.settle_locked(known, container)
        if status.is_up:
            raise ContainerError(f"container {container.name} was started meanwhile")
        yield status


@click.command(cls=ContainerCommand)
@click.option("-a", "--archive", is_flag=True, help="Keep the owners.")
@click.option("-L", "--follow-link", "follow", is_flag=True, help="Copy what a link leads to.")
@click.argument("source")
@click.argument("target")
def cp(archive: bool, follow: bool, source: str, target: str) -> None:
    """Copy a file or directory between the host and a container; '-' is a tar stream.

    \b
    Examples:
      ovl cp web:/etc/nginx/nginx.conf .
      ovl cp site/. web:/usr/share/nginx/html
    """
    ends = [_split(source), _split(target)]
    inside = [name for name, _ in ends if name is not None]
    if len(inside) != 1:
        raise ContainerError("one of source and target must be CONTAINER:PATH, and the other a path of the host")
    known = containers()
    container = known.find(inside[0])
    with _steady(known, container) as status, copying.opened(container, status) as fd:
        places = [copying.Place(path, None if name is None else fd) for name, path in ends]
        if target == "-":
            copying.run(1, "wb", lambda out: copying.pack(places[0], _called(places[0]), out, follow=follow))
        elif source == "-":
            copying.run(0, "rb", lambda given: copying.unpack(places[1], given, owner=None if archive else (0, 0)))
        else:
            copying.copy(*places, follow=follow, archive=archive)


def _called(place: copying.Place) -> str:
    return os.path.basename(os.path.normpath(place.path)) or "."


def _split(word: str) -> tuple[str | None, str]:
    """The container, if one is named, and the path, absolute there."""
    name, colon, path = word.partition(":")
    if not colon or word.startswith(("/", ".")) or "/" in name:
        return None, word
    return name, path if path.startswith("/") else f"/{path}"


@click.command(cls=ContainerCommand)
@format_option
@click.argument("name", metavar="CONTAINER")
def diff(form: str, name: str) -> None:
    """List what a container has added (A), changed (C) and deleted (D) of its image.

    \b
    Example:
      ovl diff web
    """
    # It loads the overlay's core, which no other command here needs.
    from overlayfs_py.images.changes import changes

    known = containers()
    container = known.find(name)
    with _steady(known, container):
        mounting.flush(container)
        lowers = [Path(path) for path in container.lowers]
        found = list(changes(container.upper, lowers, userxattr=container.userxattr))
    if form == "json":
        print_json([{"Kind": change.kind, "Path": f"/{os.fsdecode(change.path)}"} for change in found])
        return
    for change in found:
        click.echo(change.kind.encode() + b" /" + change.path)


@click.command(cls=ContainerCommand)
@click.option("-a", "--author", default="", help="Who made it.")
@click.option("-m", "--message", default="", help="What for.")
@click.option("-c", "--change", "instructions", multiple=True, metavar="INSTRUCTION", help="Such as 'CMD [\"nginx\"]'.")
@click.option("-p", "--pause/--no-pause", default=True, show_default=True, help="Stop its processes meanwhile.")
@click.argument("name", metavar="CONTAINER")
@click.argument("reference", required=False)
def commit(
    author: str, message: str, instructions: tuple[str, ...], pause: bool, name: str, reference: str | None
) -> None:
    """Make an image of a container: the layers of its image, and its own as one more; prints its id.

    The configuration is that of the image, but for what -c changes: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL,
    USER, VOLUME and WORKDIR, written as in a Dockerfile.

    \b
    Example:
      ovl commit -c 'CMD ["nginx", "-g", "daemon off;"]' web my-nginx
    """
    known, images = containers(), store()
    container = known.find(name)
    base = images.image(container.image)
    replaced = _apply(instructions, dict(base.config.get("config") or {}))
    with _steady(known, container) as status, mounting.still(container, status, pause=pause):
        made = images.commit(
            container.upper,
            base,
            changes=replaced,
            name=reference,
            comment=message,
            author=author,
            created_by=shlex.join(container.spec.args),
        )
    click.echo(made.id)


def _apply(instructions: tuple[str, ...], config: dict[str, Any]) -> dict[str, Any]:
    """The members of an image's configuration that instructions set. Raises ContainerError."""
    changed: dict[str, Any] = {}
    for instruction in instructions:
        word, _, rest = instruction.strip().partition(" ")
        word, rest = word.upper(), rest.strip()
        if word not in _INSTRUCTIONS or not rest:
            raise ContainerError(f"-c {instruction!r}: write one of {', '.join(_INSTRUCTIONS)} and its value")
        if word in ("CMD", "ENTRYPOINT"):
            changed[word.capitalize()] = _words(rest, instruction)
        elif word == "ENV":
            taken = changed.get("Env", config.get("Env") or [])
            pairs = _pairs(rest)
            names = {key for key, _ in pairs}
            kept = [entry for entry in taken if entry.partition("=")[0] not in names]
            changed["Env"] = kept + [f"{key}={value}" for key, value in pairs]
        elif word == "LABEL":
            changed["Labels"] = {**changed.get("Labels", config.get("Labels") or {}), **dict(_pairs(rest))}
        elif word == "EXPOSE":
            ports: dict[str, Any] = {port if "/" in port else f"{port}/tcp": {} for port in rest.split()}
            changed["ExposedPorts"] = {**changed.get("ExposedPorts", config.get("ExposedPorts") or {}), **ports}
        elif word == "VOLUME":
            words = _words(rest, instruction) if rest.startswith("[") else rest.split()
            targets: dict[str, Any] = {target: {} for target in words}
            changed["Volumes"] = {**changed.get("Volumes", config.get("Volumes") or {}), **targets}
        elif word == "STOPSIGNAL":
            parse_signal(rest)
            changed["StopSignal"] = rest
        else:
            changed["User" if word == "USER" else "WorkingDir"] = rest
    return changed


def _words(text: str, instruction: str) -> list[str]:
    """A command as a JSON list, or a line for the shell."""
    if not text.startswith("["):
        return ["/bin/sh", "-c", text]
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ContainerError(f"-c {instruction!r}: that is no JSON list of strings")
    return words


def _pairs(text: str) -> list[tuple[str, str]]:
    """`K=V K=V`, with quotes as in a shell, or `K V`. Raises ContainerError."""
    if not re.match(r"[^\s=]+=", text):
        key, _, value = text.partition(" ")
        return [(key, value.strip())]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ContainerError(f"-c {text!r}: {error}") from error
    return [(word.partition("=")[0], word.partition("=")[2]) for word in words]


@click.command(cls=ContainerCommand)
@click.argument("name", metavar="IMAGE|CONTAINER")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
def mount(name: str, directory: Path) -> None:
    """Mount the tree of an image (read-only), or of a container with its own layer, on a directory.

    \b
    Example:
      ovl mount debian:12 /mnt
    """
    known = containers()
    container = known.seek(name)
    if container is None:
        images = store()
        with images.locked(exclusive=False):
            mounting.mount_image(images.image(name), directory, userxattr=images.userxattr)
        return
    with _steady(known, container) as status:
        mounting.mount_container(container, status, directory)


@click.command(cls=ContainerCommand)
@click.argument("directory", type=click.Path(path_type=Path))
def umount(directory: Path) -> None:
    """Undo a mount.

    \b
    Example:
      ovl umount /mnt
    """
    mounting.unmount(directory)


commands: list[click.Command] = [cp, diff, commit, mount, umount]
