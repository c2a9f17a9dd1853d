"""`ovl driver`: let other container engines use overlayfs-py, see whether they do, and take it back."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Final

import click

from overlayfs_py.cli.output import Failure
from overlayfs_py.drivers import changes, docker, podman
from overlayfs_py.drivers.changes import Change, DriverError

_RESTART: Final = {
    "podman": "Images made with another driver are not seen; `podman system reset` empties a store.",
    "docker": "Now: systemctl daemon-reload && systemctl restart docker",
}
_engine = click.argument("engine", type=click.Choice(list(_RESTART)))
_user = click.option("--user", is_flag=True, help="The configuration of this user, not of the system (podman).")


class DriverCommand(click.Command):
    """A command whose failures are one line, exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DriverError as error:
            raise Failure(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failure(f"{error.strerror}: {error.filename}") from error


def _program() -> Path:
    beside = Path(sys.executable).parent / "overlayfs-py"
    found = beside if beside.exists() else shutil.which("overlayfs-py")
    if found is None:
        raise DriverError("the program overlayfs-py is not installed")
    return Path(found)


def _wanted(engine: str, *, user: bool) -> list[Change]:
    if engine == "podman":
        return podman.changes(_program(), user=user)
    if user:
        raise DriverError("--user is for podman alone")
    return docker.changes(_program())


@click.group()
def driver() -> None:
    """Let podman, buildah, skopeo and Docker use overlayfs-py."""


@driver.command(cls=DriverCommand)
@_engine
@_user
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would change.")
def install(engine: str, user: bool, dry_run: bool) -> None:
    """Configure an engine; shows what changes, and keeps a backup beside each file.

    \b
    Examples:
      ovl driver install podman --user
      ovl driver install -n docker
    """
    wanted = _wanted(engine, user=user)
    shown = "".join(changes.difference(change) for change in wanted)
    click.echo(shown, nl=False)
    if not shown:
        click.echo("nothing to change")
    elif not dry_run:
        changes.make(wanted)
        click.echo(_RESTART[engine])
        click.echo(f"To take it back: ovl driver uninstall {engine}{' --user' if user else ''}")


@driver.command(cls=DriverCommand)
@_engine
def check(engine: str) -> None:
    """Say whether an engine, as this user runs it, uses overlayfs-py; exit status 1 when not.

    \b
    Example:
      ovl driver check podman
    """
    why = podman.check(_program()) if engine == "podman" else docker.check()
    if why:
        raise Failure(why)
    click.echo(f"{engine} uses overlayfs-py")


@driver.command(cls=DriverCommand)
@_engine
@_user
def uninstall(engine: str, user: bool) -> None:
    """Take the configuration of an engine back.

    \b
    Example:
      ovl driver uninstall podman --user
    """
    if user and engine != "podman":
        raise DriverError("--user is for podman alone")
    restored = changes.undo(podman.paths(user=user) if engine == "podman" else docker.paths())
    for path in restored:
        click.echo(f"restored {path}" if path.exists() else f"removed {path}")
    if not restored:
        click.echo("nothing to take back")


commands: list[click.Command] = [driver]
