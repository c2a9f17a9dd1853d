"""What an upper layer changes of the layers below it, as `docker diff` tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple


class Change(NamedTuple):
    """A path, relative to the root and without a leading slash, that was added, changed or deleted."""

    kind: Literal["A", "C", "D"]
    path: bytes


def changes(upper: Path, lowers: Sequence[Path], *, userxattr: bool = False) -> Iterator[Change]:
    """What `upper` changes of the stack `lowers` (topmost first), parents before what is in them, sorted by name.

    It costs what the upper layer holds, whatever the size of the layers below.
    """
    raise NotImplementedError
