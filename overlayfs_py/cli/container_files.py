"""Commands on what is in containers: cp, diff, commit, mount, umount."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from overlayfs_py.cli import rootless
from overlayfs_py.cli.completion import any_names, container_names, places
from overlayfs_py.cli.container_base import ContainerCommand, containers, store
from overlayfs_py.cli.output import Failure, format_option, print_json
from overlayfs_py.images.settings import apply_lines
from overlayfs_py.runtime import copying, lifecycle, mounting
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import parse_signal
from overlayfs_py.runtime.state import Container, Containers, Status


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
@click.argument("source", shell_complete=places)
@click.argument("target", shell_complete=places)
def cp(archive: bool, follow: bool, source: str, target: str) -> None:
    """Copy files between the host and a container.

    '-' for the path of the host is a tar stream on standard input or output.

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
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
def diff(form: str, name: str) -> None:
    """List what a container adds (A), changes (C) and deletes (D).

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
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
@click.argument("reference", required=False)
def commit(
    author: str, message: str, instructions: tuple[str, ...], pause: bool, name: str, reference: str | None
) -> None:
    """Make an image of a container and its layer; prints its id.

    The layers are those of its image, and its own as one more. The configuration is that of the image, but for what -c
    changes: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR, written as in a Dockerfile.

    \b
    Example:
      ovl commit -c 'CMD ["nginx", "-g", "daemon off;"]' web my-nginx
    """
    known, images = containers(), store()
    container = known.find(name)
    base = images.image(container.image)
    settings = apply_lines(base.config.get("config") or {}, instructions)
    if instructions and settings.get("StopSignal"):
        parse_signal(settings["StopSignal"])
    with _steady(known, container) as status, mounting.still(container, status, pause=pause):
        made = images.commit(
            container.upper,
            base,
            changes=settings,
            name=reference,
            comment=message,
            author=author,
            created_by=shlex.join(container.spec.args),
        )
    click.echo(made.id)


@click.command(cls=ContainerCommand)
@click.argument("name", metavar="IMAGE|CONTAINER", shell_complete=any_names)
@click.argument("directory", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
def mount(name: str, directory: Path) -> None:
    """Mount the tree of an image or container on a directory.

    That of an image is read-only; what is written to that of a container is in its own layer. It takes root, which one
    is in a shell of unshare --user --map-root-user --map-auto --mount, too: nobody else would see the mount.

    \b
    Example:
      ovl mount debian:12 /mnt
    """
    if rootless.entered():
        raise Failure(
            "only ovl itself would see a mount that is made without root; call it as root, or in a shell of "
            "unshare --user --map-root-user --map-auto --mount"
        )
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
