"""What the commands on images share: where the store is, how errors are told, who uses an image."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from overlayfs_py.cli.output import Failure
from overlayfs_py.images import Image, ImageError, Store
from overlayfs_py.images.store import default_root


class ImageCommand(click.Command):
    """A command whose failures are one line, exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImageError as error:
            raise Failure(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise Failure(f"{error.strerror}{where}") from error


def open_store() -> Store:
    """The store that --root or the environment names."""
    root = click.get_current_context().find_root().params.get("root")
    return Store.open(Path(root) if root else default_root())


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        click.echo(f"ovl: warning: {warning}", err=True)


def in_use(store: Store) -> Callable[[str], list[str]]:
    """Which containers use an image, by what the runtime keeps of each."""

    def users(image_id: str) -> list[str]:
        found = []
        for state in sorted((store.root / "containers").glob("*/state.json")):
            # A container may go at any moment; one whose state can't be read can't be started either.
            with contextlib.suppress(FileNotFoundError, ValueError):
                values = json.loads(state.read_bytes())
                if isinstance(values, dict) and values.get("image") == image_id:
                    found.append(str(values.get("name") or state.parent.name))
        return found

    return users


def names_meant(image: Image, text: str) -> list[str]:
    """The names of an image that a user means: the one given, or all where an ID was given."""
    from overlayfs_py.images.reference import parse

    with contextlib.suppress(ImageError):
        short = parse(text).short
        if short in image.names:
            return [short]
    return list(image.names)
