"""Commands that start processes in containers: create, run, start, attach, exec."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from overlayfs_py.cli.completion import container_names
from overlayfs_py.cli.container_base import ContainerCommand, RunningCommand, complain, containers, for_each, store
from overlayfs_py.cli.container_options import spec_of, with_options
from overlayfs_py.cli.output import progress
from overlayfs_py.images import ImageError, Store
from overlayfs_py.runtime import client, lifecycle
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.signals import FORWARDED
from overlayfs_py.runtime.spec import Spec, parse_env
from overlayfs_py.runtime.state import Container, Containers

_SIGPIPE_STATUS = 128 + signal.SIGPIPE


def _create(known: Containers, *, stdin_once: bool, **given: Any) -> Container:
    """Make the container that the options ask for."""
    spec = spec_of(known, stdin_once=stdin_once, **given)
    entrypoint = given["entrypoint"]
    with _id_file(given["cidfile"]) as tell:
        container = _make(known, spec, entrypoint, given)
        tell(container.id)
    return container


def _make(known: Containers, spec: Spec, entrypoint: str | None, given: dict[str, Any]) -> Container:
    words = None if entrypoint is None else [entrypoint] if entrypoint else []
    images = store()
    _fetch(images, given["image"], given["pull"], given["platform"])
    # From here on they are for the container, also those that come before it runs.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    return lifecycle.create(known, images, given["image"], spec, name=given["name"], entrypoint=words)


@contextlib.contextmanager
def _id_file(path: str | None) -> Iterator[Callable[[str], None]]:
    """Something to tell the id, which a file takes that is there only if all goes well. Raises ContainerError."""
    if path is None:
        yield lambda _: None
        return
    try:
        file = open(path, "x", encoding="ascii")
    except OSError as error:
        raise ContainerError(f"--cidfile {path}: {error.strerror}") from error
    try:
        with file:
            yield lambda text: print(text, end="", file=file)
    except BaseException:
        os.unlink(path)
        raise


def _fetch(images: Store, name: str, when: str, platform: str | None) -> None:
    """Get an image from its registry, if `when` says so. Raises ImageError."""
    try:
        images.image(name)
    except ImageError as error:
        if when == "never":
            raise
        missing = str(error)
    else:
        if when != "always":
            return
        missing = ""
    # Loaded only when needed, as a run of what is here is not to wait for it.
    from overlayfs_py.images.registry.transfer import Access, pull

    try:
        with progress() as shown:
            _, warnings = pull(
                images, name, access=Access(None, False, True), platform=platform, told=shown.told, moved=shown.moved
            )
    except ImageError as error:
        raise ImageError(f"{missing}, and it can't be pulled: {error}" if missing else str(error)) from error
    for warning in warnings:
        complain(f"warning: {warning}")


_SETTINGS = {"allow_interspersed_args": False}


@click.command(cls=RunningCommand, context_settings=_SETTINGS)
@with_options
def create(**given: Any) -> None:
    """Make a container of IMAGE, without starting it; prints its id.

    \b
    Example:
      ovl create --name web -p 8080:80 nginx
    """
    click.echo(_create(containers(), stdin_once=False, **given).id)


@click.command(cls=RunningCommand, context_settings=_SETTINGS)
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background, and print its id.")
@with_options
def run(detach: bool, **given: Any) -> None:
    """Run COMMAND, or the image's own, in a new container of IMAGE.

    The exit status is the command's, or 125 (not started), 126 (can't be run), 127 (not there).

    \b
    Examples:
      ovl run --rm busybox echo hello
      ovl run -it --rm -v $PWD:/work -w /work debian bash
      ovl run -d --name web -p 8080:80 nginx
    """
    if not detach:
        _check_terminal(given["tty"], given["interactive"])
    known = containers()
    container = _create(known, stdin_once=given["interactive"] and not detach, **given)
    try:
        if detach:
            lifecycle.start(known, container)
            click.echo(container.id)
            return
        code = _start_attached(known, container)
    except ContainerError:
        # It never ran, so nothing of it stays.
        lifecycle.remove(known, container, force=True, with_volumes=True)
        raise
    click.get_current_context().exit(code)


def _check_terminal(tty: bool, interactive: bool) -> None:
    if tty and interactive and not os.isatty(0):
        raise ContainerError("-t with -i needs a terminal as standard input; leave out -t")


def _start_attached(known: Containers, container: Container) -> int:
    """Start it with this process as its client; returns the exit status for this process."""
    spec = container.spec
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            lifecycle.start(known, container, theirs)
        return _follow(known, container, ours, stdin=spec.interactive)


def _follow(known: Containers, container: Container, connection: socket.socket, *, stdin: bool) -> int:
    def forward(number: int) -> None:
        status = container.status()
        if status.process is not None:
            status.process.send(number)

    sys.stdout.flush()
    try:
        code = client.attach(connection, stdin=stdin, terminal=container.spec.terminal, forward=forward)
    except client.Detached:
        return 0
    except client.OutputClosed:
        return _SIGPIPE_STATUS
    except client.HungUp:
        return 128 + signal.SIGHUP
    if code is None:
        complain(lifecycle.LOST)
        lifecycle.settle_lost(known, container)
        return lifecycle.KILLED
    return code


@click.command(cls=ContainerCommand)
@click.option("-a", "--attach", "attached", is_flag=True, help="Stay with it, and pass on its output and signals.")
@click.option("-i", "--interactive", is_flag=True, help="As -a, and feed it our standard input.")
@click.argument("names", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=container_names)
def start(attached: bool, interactive: bool, names: tuple[str, ...]) -> None:
    """Start containers that don't run, with the layer they had.

    \b
    Example:
      ovl start -a work
    """
    if not (attached or interactive):
        for_each(names, _start_one)
        return
    if len(names) > 1:
        raise ContainerError("-a and -i take one container")
    known = containers()
    container = known.find(names[0])
    if interactive and not container.spec.interactive:
        raise ContainerError(f"container {container.name} was made without -i, so it takes no input")
    _check_terminal(container.spec.terminal, interactive)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            lifecycle.start(known, container, theirs)
        click.get_current_context().exit(_follow(known, container, ours, stdin=interactive))


def _start_one(known: Containers, container: Container) -> None:
    if not lifecycle.settle(known, container).is_up:
        lifecycle.start(known, container)


@click.command(cls=ContainerCommand)
@click.option("--no-stdin", is_flag=True, help="Leave our standard input alone.")
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
def attach(no_stdin: bool, name: str) -> None:
    """Join a running container's standard streams with ours.

    Ctrl-P Ctrl-Q leaves one that has a terminal, and it goes on.

    \b
    Example:
      ovl attach shell
    """
    known = containers()
    container = known.find(name)
    lifecycle.running(known, container)
    stdin = container.spec.interactive and not no_stdin
    _check_terminal(container.spec.terminal, stdin)
    connection = client.connect(container)
    if connection is None:
        raise ContainerError(f"container {container.name} is not running")
    with connection:
        click.get_current_context().exit(_follow(known, container, connection, stdin=stdin))


@click.command("exec", cls=RunningCommand, context_settings=_SETTINGS)
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background.")
@click.option("-i", "--interactive", is_flag=True, help="Feed it our standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-e", "--env", multiple=True, metavar="K[=V]", help="Set a variable, or pass on our own.")
@click.option("--env-file", multiple=True, metavar="FILE", help="Set the variables that a file lists.")
@click.option("-w", "--workdir", metavar="DIR", help="The working directory.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who it runs as; names are the image's.")
@click.argument("name", metavar="CONTAINER", shell_complete=container_names)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute_(
    detach: bool,
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    name: str,
    command: tuple[str, ...],
) -> None:
    """Run a further command in a running container.

    The exit status is the command's, or 125 (not started), 126 (can't be run), 127 (not there).

    \b
    Example:
      ovl exec -it web sh
    """
    if tty and not detach and not (os.isatty(0) and os.isatty(1)):
        raise ContainerError("-t needs a terminal as standard input and output; leave out -t")
    known = containers()
    container = known.find(name)
    lifecycle.running(known, container)
    spec = dataclasses.replace(
        container.spec,
        args=command,
        env=(*container.spec.env, *parse_env(env, env_file, os.environ)),
        cwd=workdir or container.spec.cwd,
        user=container.spec.user if user is None else user,
        terminal=tty and not detach,
        interactive=interactive,
    )
    # Loaded only here, as a run is not to wait for it.
    from overlayfs_py.runtime import execute

    code = execute.execute(container, spec, detach=detach)
    click.get_current_context().exit(code)


commands: list[click.Command] = [create, run, start, attach, execute_]
