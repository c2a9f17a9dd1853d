"""The store on disk: an OCI image layout, and beside it the unpacked layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from overlayfs_py.images.model import Image


class Store:
    """The images below one directory. Everything that fails raises ImageError, with one line for the user."""

    root: Path
    userxattr: bool
    """Whether the layers are marked in user.overlay.* xattrs, so that mounts of them need the option `userxattr`."""

    @classmethod
    def open(cls, root: Path) -> Store:
        """The store at `root`, made where there is none."""
        raise NotImplementedError

    def images(self) -> list[Image]:
        """All images, those with a name first."""
        raise NotImplementedError

    def image(self, reference: str) -> Image:
        """The image of this name, ID or unique beginning of an ID."""
        raise NotImplementedError

    @contextlib.contextmanager
    def locked(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the store: while it is held by anyone no image goes, while it is held exclusively none comes either.

        Methods that change the store take it exclusively by themselves: never call one of them inside.
        """
        raise NotImplementedError

    def tag(self, image: Image, name: str) -> None:
        """Give an image a further name, which is taken from the image that has it."""
        raise NotImplementedError

    def remove(self, image: Image, *, in_use: Callable[[str], list[str]], force: bool = False) -> None:
        """Remove an image with all its names, and the layers and blobs that no other image has.

        `in_use` tells the containers that use the image of an ID: then it is an ImageError, or with `force` only the
        names go.
        """
        raise NotImplementedError

    def commit(
        self,
        upper: Path,
        base: Image,
        *,
        changes: Mapping[str, Any] | None = None,
        name: str | None = None,
        comment: str = "",
        author: str = "",
        created_by: str = "",
    ) -> Image:
        """Make an image of `base` and one more layer with what the overlay's upper directory `upper` holds.

        `changes` replace members of the configuration's "config" (Cmd, Env, ...); None as a value removes one.
        """
        raise NotImplementedError
