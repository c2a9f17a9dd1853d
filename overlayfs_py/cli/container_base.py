"""What the commands on containers share: where the store is, how errors are told, how tables are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from overlayfs_py.cli.output import Failure, print_json, print_table, usage
from overlayfs_py.errors import OverlayError
from overlayfs_py.images import ImageError, Store
from overlayfs_py.images.store import default_root
from overlayfs_py.runtime.errors import ContainerError, NoContainerError
from overlayfs_py.runtime.state import Container, Containers

_TELLING = 6  # letters of an ID that nobody writes by chance


class Failed(Failure):
    """An error for the user, in one line, with an exit status of its own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = status


def complain(message: str) -> None:
    """One line on standard error, for what does not end the command."""
    Failure(message).show()


def _told(error: ContainerError) -> str:
    """What went wrong; more of it where an image was named for a container."""
    if isinstance(error, NoContainerError):
        try:
            image = store().image(error.word)
        except ImageError:
            return str(error)
        if len(error.word) < _TELLING and image.id.removeprefix("sha256:").startswith(error.word):
            # A letter or two begin many an ID.
            return str(error)
        return (
            f"{error.word} is an image, not a container: ovl run makes a container of it, "
            "and ovl layers shows what its layers change"
        )
    return str(error)


class ContainerCommand(click.Command):
    """A command whose failures are one line; the exit status is 1, or what the error says for those that run."""

    runs = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise Failed(usage(error, ctx.command_path), 125 if self.runs else 2) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ContainerError as error:
            raise Failed(_told(error), error.status if self.runs else 1) from error
        except (ImageError, OverlayError) as error:
            raise Failed(str(error), 125 if self.runs else 1) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f": {error.filename}" if error.filename else ""
            raise Failed(f"{error.strerror}{where}", 125 if self.runs else 1) from error


class RunningCommand(ContainerCommand):
    """A command whose exit status is that of a process in a container, or 125 to 127."""

    runs = True


def store_root() -> Path:
    """The directory that holds images and containers: --root, OVL_ROOT, or the user's default."""
    given = click.get_current_context().find_root().params.get("root")
    return Path(given).absolute() if given else default_root().absolute()


def containers() -> Containers:
    return Containers(store_root())


def store() -> Store:
    return Store.open(store_root())


def for_each(words: Iterable[str], act: Callable[[Containers, Container], None]) -> None:
    """As each, of containers that words name."""
    known = containers()
    each(words, lambda word: act(known, known.find(word)))


def each(words: Iterable[str], act: Callable[[str], None]) -> None:
    """Do it to what each word names, and print the word; failures don't keep the others from it."""
    failed = False
    for word in words:
        try:
            act(word)
        except ContainerError as error:
            complain(_told(error))
            failed = True
        else:
            click.echo(word)
    if failed:
        click.get_current_context().exit(1)


Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""The head of a column, and what it shows of a row."""


def print_rows(rows: Sequence[Row], columns: Sequence[Column], form: str) -> None:
    """Rows as JSON with all they hold, or as a table of these columns."""
    if form == "json":
        print_json(list(rows))
    else:
        print_table([head for head, _ in columns], [[show(row) for _, show in columns] for row in rows])
