"""What the commands on containers share: where the store is, how errors are told, how tables are printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import click

from overlayfs_py.errors import OverlayError
from overlayfs_py.images import ImageError, Store
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.state import Container, Containers

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Failure(click.ClickException):
    """An error for the user, in one line, with an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = status

    def show(self, file: IO[Any] | None = None) -> None:
        complain(self.message)


def complain(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    line = "".join(char if char.isprintable() else " " for char in message)
    sys.stdout.flush()
    os.write(2, f"ovl: {line}\n".encode(errors="backslashreplace"))


class ContainerCommand(click.Command):
    """A command whose failures are one line; the exit status is 1, or what the error says for those that run."""

    runs = False

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ContainerError as error:
            raise Failure(str(error), error.status if self.runs else 1) from error
        except (ImageError, OverlayError) as error:
            raise Failure(str(error), 125 if self.runs else 1) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f": {error.filename}" if error.filename else ""
            raise Failure(f"{error.strerror}{where}", 125 if self.runs else 1) from error


class RunningCommand(ContainerCommand):
    """A command whose exit status is that of a process in a container, or 125 to 127."""

    runs = True


def store_root() -> Path:
    """The directory that holds images and containers: --root, OVL_ROOT, or the user's default."""
    context = click.get_current_context()
    given = context.find_root().params.get("root") or os.environ.get("OVL_ROOT")
    if given:
        return Path(os.path.abspath(given))
    if os.geteuid() == 0:
        return Path("/var/lib/ovl")
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "ovl"


def containers() -> Containers:
    return Containers(store_root())


def store() -> Store:
    return Store.open(store_root())


def for_each(words: Iterable[str], act: Callable[[Containers, Container], None]) -> None:
    """Do it to each container, and print the word that named it; failures don't keep the others from it."""
    known = containers()
    failed = False
    for word in words:
        try:
            act(known, known.find(word))
        except ContainerError as error:
            complain(str(error))
            failed = True
        else:
            click.echo(word)
    if failed:
        click.get_current_context().exit(1)


def print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=4))


Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""The head of a column, and what it shows of a row."""


def print_rows(rows: Sequence[Row], columns: Sequence[Column], how: str) -> None:
    """Rows as JSON with all they hold, or as a table of these columns."""
    if how == "json":
        print_json(list(rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    for head, _ in columns:
        table.add_column(head, no_wrap=sys.stdout.isatty() is False)
    for row in rows:
        table.add_row(*(Text(show(row)) for _, show in columns))
    console = Console(width=None if sys.stdout.isatty() else 100_000, highlight=False)
    console.print(table)


format_option = click.option(
    "--format", "how", type=click.Choice(("table", "json")), default="table", show_default=True, help="How to print it."
)


def human_size(size: int | None, base: int = 1000) -> str:
    """Bytes with a unit; base 1024 has KiB and so on."""
    if size is None:
        return "--"
    value = float(size)
    for unit in _UNITS:
        if value < base or unit == _UNITS[-1]:
            break
        value /= base
    if base == 1024 and unit != "B":
        unit = f"{unit[0].upper()}iB"
    return f"{value:.4g}{unit}" if unit != "B" else f"{int(value)}B"
