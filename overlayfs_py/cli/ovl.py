"""`ovl`: images made of layers, and containers with a writable layer each."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Final

import click

from overlayfs_py import __version__
from overlayfs_py.cli import rootless

# The modules that have commands, each with a list of them; where two have one of the same name, the first counts.
MODULES: Final = ("overlayfs_py.cli.images", "overlayfs_py.cli.drivers")

EPILOG: Final = """\b
Examples:
  ovl pull debian:12                     get an image from a registry
  ovl load -i image.tar                  or from an archive (docker-archive, OCI layout)
  ovl images                             what there is
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
        return self._all().get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # Other engines make a namespace of their own, or need the machine's root.
        if not ctx.resilient_parsing and args[:1] != ["driver"]:
            # Before any command does anything: it goes on in a user namespace, where it may.
            rootless.enter(ctx.params.get("root"))
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("prog_name", "ovl")
        return super().main(*args, **kwargs)


@click.command(
    cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.option("--root", metavar="DIR", help="Where images and containers are kept.  [env var: OVL_ROOT]")
@click.version_option(__version__, message="ovl %(version)s")
def main(root: str | None) -> None:
    """Images made of layers, and containers with a writable layer each."""


if __name__ == "__main__":
    main()
