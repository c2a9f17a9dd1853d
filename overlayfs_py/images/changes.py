"""What an upper layer changes of the layers below it, as `docker diff` tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from overlayfs_py.images.archive import shown
from overlayfs_py.images.model import ImageError
from overlayfs_py.images.walk import Walk


class Change(NamedTuple):
    """A path, relative to the root and without a leading slash, that was added, changed or deleted."""

    kind: Literal["A", "C", "D"]
    path: bytes


def changes(upper: Path, lowers: Sequence[Path], *, userxattr: bool = False) -> Iterator[Change]:
    """What `upper` changes of the stack `lowers` (topmost first), parents before what is in them, sorted by name.

    A directory counts as changed when something in it is. It costs what the upper layer holds, whatever the size of the
    layers below. Raises ImageError where a layer can't be read.
    """
    path = b""
    try:
        with Walk(upper, lowers, userxattr=userxattr) as walk:
            for visit in walk.visits():
                path = visit.path
                if path:
                    yield Change("D" if visit.node is None else "A" if visit.below is None else "C", path)
    except OSError as error:
        raise ImageError(f"cannot read {shown(path) or 'the layer'} of {upper}: {error.strerror}") from error
