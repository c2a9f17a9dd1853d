"""`ovl`: images made of layers, and containers with a writable layer each."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final

import click

from overlayfs_py import __version__
from overlayfs_py.cli import rootless
from overlayfs_py.cli.output import Failure, usage

# The modules that have commands, each with a list of them; where two have one of the same name, the first counts.
MODULES: Final = (
    "overlayfs_py.cli.container_run",
    "overlayfs_py.cli.container_state",
    "overlayfs_py.cli.container_files",
    "overlayfs_py.cli.container_usage",
    "overlayfs_py.cli.images",
    "overlayfs_py.cli.drivers",
)

EPILOG: Final = """\b
Examples:
  ovl pull debian:12                     get an image from a registry
  ovl load -i image.tar                  or from an archive (docker-archive, OCI layout)
  ovl images                             what there is
  ovl run -it --rm debian:12 bash        work in a container of it
  ovl run -d --name web -p 8080:80 nginx leave one in the background, and publish its port
  ovl ps, ovl logs web, ovl exec web sh  look after it
  ovl diff web                           what it has changed
  ovl commit web my-nginx                make an image of that
  ovl rm -f web                          remove it, with its layer
  ovl layers debian:12                   what each layer adds, changes and deletes
  ovl save -o image.tar debian:12        write it for docker, podman and others
  ovl rmi debian:12                      remove it

Shell completion: eval "$(_OVL_COMPLETE=bash_source ovl)"; zsh_source and fish_source for these shells.
"""


class Commands(click.Group):
    """The group of all commands, loaded when one is asked for."""

    def _all(self) -> dict[str, click.Command]:
        found: dict[str, click.Command] = {}
        for module in MODULES:
            for command in importlib.import_module(module).commands:
                found.setdefault(str(command.name), command)
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._all())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # Most of the time that a short command takes is that of loading modules.
        for module in MODULES:
            for command in importlib.import_module(module).commands:
                if command.name == cmd_name:
                    return command  # type: ignore[no-any-return]
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # Other engines make a namespace of their own, or need the machine's root.
        if not ctx.resilient_parsing and args[:1] != ["driver"]:
            # Before any command does anything: it goes on in a user namespace, where it may.
            rootless.enter(ctx.params.get("root"))
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _in_one_line(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            failure = Failure("interrupted")
            vars(failure)["exit_code"] = 128 + signal.SIGINT
            raise failure from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_streams()
        kwargs.setdefault("prog_name", "ovl")
        return super().main(*args, **kwargs)


def _open_streams() -> None:
    """Have something behind standard input, output and error, also for who runs us without; else files that we open
    would take their places."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            # The lowest number that is free is the one that is missing.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))


@contextlib.contextmanager
def _in_one_line(ctx: click.Context) -> Iterator[None]:
    """Have wrong usage told as all that goes wrong is; the exit status stays 2."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        failure = Failure(usage(error, (error.ctx or ctx).command_path))
        vars(failure)["exit_code"] = error.exit_code
        raise failure from error


@click.command(
    cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.option("--root", metavar="DIR", help="Where images and containers are kept.  [env var: OVL_ROOT]")
@click.version_option(__version__, message="ovl %(version)s")
def main(root: str | None) -> None:
    """Images made of layers, and containers with a writable layer each."""


if __name__ == "__main__":
    main()
