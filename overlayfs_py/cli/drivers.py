"""`ovl driver`: let other container engines use overlayfs-py, see whether they do, and take it back."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Final

import click

from overlayfs_py.cli.output import Failure
from overlayfs_py.cli.snapshotter import missing
from overlayfs_py.drivers import changes, docker, podman
from overlayfs_py.drivers.changes import Change, DriverError
from overlayfs_py.drivers.containerd import configuration as containerd

_ENGINES: Final = ("podman", "docker", "containerd")
_engine = click.argument("engine", type=click.Choice(_ENGINES))
_user = click.option("--user", is_flag=True, help="The configuration of this user, not of the system (podman).")

_INSTALLED: Final = {
    "podman": "Images made with another driver than overlay are not seen; `podman system reset` empties a store.",
    "docker": "Images made with another driver are not seen.",
    "containerd": "Images are unpacked for each snapshotter anew.",
}
_UNINSTALLED: Final = {
    "podman": "Images and containers made meanwhile need a mount program, fuse-overlayfs if it is installed;"
    " `podman system reset` removes them.",
    "docker": "Images and containers made meanwhile are seen with the driver fuse-overlayfs alone.",
    "containerd": "Containers made with this snapshotter don't start any more.",
}
_RELOAD: Final = "systemctl daemon-reload && "
_RESTART: Final = {"docker": "systemctl restart docker", "containerd": "systemctl restart containerd"}
_ENABLE: Final = {"containerd": f"systemctl enable --now {containerd.PROGRAM} && "}
_BY_HAND: Final = {
    "docker": f"dockerd, with {docker.DIRECTORY} first on its PATH",
    "containerd": f"{containerd.PROGRAM}, as root, and then containerd",
}


class DriverCommand(click.Command):
    """A command whose failures are one line, exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DriverError as error:
            raise Failure(str(error)) from error
        except BrokenPipeError:
            raise
        except PermissionError as error:
            hint = ", or with --user" if ctx.params.get("engine") == "podman" else ""
            raise Failure(f"{error.strerror}: {error.filename}: run it as root{hint}") from error
        except OSError as error:
            raise Failure(f"{error.strerror}: {error.filename}") from error


def _program(name: str) -> Path:
    beside = Path(sys.executable).parent / name
    found = beside if beside.exists() else shutil.which(name)
    if found is None:
        raise DriverError(f"the program {name} is not installed")
    return Path(found)


def _mount_program() -> Path:
    return _program("overlayfs-py")


def _refuse_user(engine: str, *, user: bool) -> None:
    if user and engine != "podman":
        raise DriverError(f"--user is for podman alone: {engine} is configured for the whole system")


def _wanted(engine: str, *, user: bool) -> list[Change]:
    if engine == "podman":
        return podman.changes(_mount_program(), user=user)
    if engine == "docker":
        return docker.changes(_mount_program())
    lacking = missing()
    if lacking:
        raise DriverError(lacking)
    return containerd.changes(_mount_program(), _program(containerd.PROGRAM))


@click.group()
def driver() -> None:
    """Let podman, buildah, skopeo, Docker and containerd use overlayfs-py.

    \b
    Example:
      ovl driver install podman
    """


@driver.command(cls=DriverCommand)
@_engine
@_user
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would change.")
def install(engine: str, user: bool, dry_run: bool) -> None:
    """Configure an engine; shows what changes, and keeps a backup beside each file.

    What is set for podman is for buildah and skopeo, too.

    \b
    Examples:
      ovl driver install podman --user
      ovl driver install -n docker
      ovl driver install containerd
    """
    _refuse_user(engine, user=user)
    wanted = _wanted(engine, user=user)
    shown = "".join(changes.difference(change) for change in wanted)
    click.echo(shown, nl=False)
    if not shown:
        click.echo("nothing to change")
    elif not dry_run:
        changes.make(wanted)
        click.echo(_INSTALLED[engine])
        if engine in _RESTART and not shutil.which("systemctl"):
            click.echo(f"Now start {_BY_HAND[engine]}.")
        elif engine in _RESTART:
            click.echo(f"Now: {_RELOAD}{_ENABLE.get(engine, '')}{_RESTART[engine]}")
        click.echo(f"To take it back: ovl driver uninstall {engine}{' --user' if user else ''}")


@driver.command(cls=DriverCommand)
@_engine
def check(engine: str) -> None:
    """Say whether an engine, as this user runs it, uses overlayfs-py; exit status 1 when not.

    \b
    Example:
      ovl driver check podman
    """
    if engine == "podman":
        why = podman.check(_mount_program())
    else:
        why = docker.check() if engine == "docker" else containerd.check()
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
    _refuse_user(engine, user=user)
    paths = {"podman": lambda: podman.paths(user=user), "docker": docker.paths, "containerd": containerd.paths}
    restored = changes.undo(paths[engine]())
    for path in restored:
        click.echo(f"restored {path}" if path.exists() else f"removed {path}")
    if not restored:
        click.echo("nothing to take back")
        return
    click.echo(_UNINSTALLED[engine])
    if engine in _RESTART and shutil.which("systemctl"):
        click.echo(f"Now: {_RELOAD}{_RESTART[engine]}")
    if engine == "containerd" and (kept := containerd.kept()):
        click.echo(f"Snapshots are left in {kept}.")


commands: list[click.Command] = [driver]
