"""What the commands of `ovl` print: tables for people, JSON for programs, errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any, Final
from unicodedata import combining, east_asian_width

import click

_UNITS: Final = ("kB", "MB", "GB", "TB")
_SPANS: Final = (
    ("year", 31_536_000),
    ("month", 2_592_000),
    ("week", 604_800),
    ("day", 86_400),
    ("hour", 3_600),
    ("minute", 60),
)
_GAP: Final = 3

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table for people, or JSON.",
)


class Failure(click.ClickException):
    """What went wrong, in one line: `ovl: ...`, exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"ovl: {one_line(self.message)}", err=True)


def usage(error: click.UsageError, command: str) -> str:
    """What is wrong with a command line, and where the right one is told."""
    return f"{error.format_message().rstrip('.')} (see {command} --help)"


def one_line(text: str) -> str:
    """A message without anything that would break its line."""
    return "".join(char if char.isprintable() else " " for char in text)


def print_json(value: object) -> None:
    """JSON on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings on standard output; long cells are cut to a terminal's width, but nowhere else."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_plainly(columns, cells)
        return
    # Loaded only here, as it takes longer than most commands.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(highlight=False, soft_wrap=False).print(table)


def _print_plainly(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [columns, *rows]
    widths = [max(_width(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        padded = (cell + " " * (width + _GAP - _width(cell)) for cell, width in zip(line, widths, strict=True))
        click.echo("".join(padded).rstrip(" "))


def _width(text: str) -> int:
    """The columns that a terminal gives to a text."""
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def human_size(size: int) -> str:
    """Bytes as 12.3MB, in powers of a thousand."""
    if size < 1000:
        return f"{size}B"
    value = float(size)
    for unit in _UNITS:
        value /= 1000
        if value < 999.5 or unit == _UNITS[-1]:
            break
    return f"{value:.3g}{unit}" if value < 1000 else f"{value:.0f}{unit}"


def ago(moment: object) -> str:
    """How long a time, as RFC 3339 writes it, is past; "-" for what is none."""
    try:
        then = datetime.fromisoformat(str(moment))
    except ValueError:
        return "-"
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    seconds = int((datetime.now(UTC) - then).total_seconds())
    for name, span in _SPANS:
        if seconds >= 2 * span or (span == 3_600 and seconds >= span):
            count = seconds // span
            return f"{count} {name}{'s' if count != 1 else ''} ago"
    return f"{max(0, seconds)} second{'s' if seconds != 1 else ''} ago"


Told = Callable[[str, str], None]
Moved = Callable[[str, int, int], None]


class Progress:
    """What happens to layers and blobs, on standard error while it does, where that is a terminal."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def stop(self) -> None:
        """Leave what is shown as it is, so that other lines can follow."""
        if self._bars is not None:
            self._bars.stop()

    def told(self, what: str, diff_id: str) -> None:
        """A layer is in another state."""
        self._show(f"layer {diff_id}", _label(diff_id, what), int(what == "unpacked"), 1, "")

    def moved(self, digest: str, done: int, size: int) -> None:
        """So many bytes of a blob are over."""
        text = _label(digest, "done" if done >= size else "moving")
        self._show(f"blob {digest}", text, done, size, f"{human_size(done)} of {human_size(size)}")

    def _show(self, key: str, text: str, done: int, size: int, detail: str) -> None:
        if self._bars is None:
            return
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task("", detail="")
        self._bars.update(self._tasks[key], description=text, completed=done, total=size, detail=detail)


def _label(digest: str, what: str) -> str:
    return f"{digest.removeprefix('sha256:')[:12]}: {what}"


@contextmanager
def progress() -> Iterator[Progress]:
    """Shown while the block runs."""
    if not sys.stderr.isatty():
        yield Progress(None)
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.fields[detail]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
        yield Progress(bars)
