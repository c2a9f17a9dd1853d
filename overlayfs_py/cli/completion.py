"""What a shell offers for the names of containers, images and volumes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from overlayfs_py.images import ImageError, Store
from overlayfs_py.images.store import default_root
from overlayfs_py.runtime import volumes
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.state import Containers

_SHORT = 12


def container_names(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Containers by name, and by id for who has begun to write one."""
    return _offered(begun, *_containers(_root(context, "containers")))


def image_names(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Images by name, and by ID for who has begun to write one."""
    return _offered(begun, *_images(_root(context, "blobs")))


def any_names(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Containers and images."""
    return container_names(context, parameter, begun) + image_names(context, parameter, begun)


def volume_names(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Volumes by name."""
    root = _root(context, "volumes")
    return _offered(begun, [one.name for one in volumes.all_volumes(Containers(root))] if root else [], [])


def places(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Containers to copy from or to; else files of the host."""
    names, _ = _containers(_root(context, "containers"))
    return _offered(begun, [f"{name}:" for name in names], []) or [CompletionItem(begun, type="file")]


def _offered(begun: str, names: Iterable[str], ids: Iterable[str]) -> list[CompletionItem]:
    words = [*names, *(ids if begun else ())]
    return [CompletionItem(word) for word in words if word.startswith(begun)]


def _root(context: click.Context, part: str) -> Path | None:
    """Where the store is; None where this user can't read that part of one, as nothing is made here."""
    given = context.find_root().params.get("root")
    root = (Path(given) if given else default_root()).absolute()
    return root if os.access(root / part, os.R_OK | os.X_OK) else None


def _containers(root: Path | None) -> tuple[list[str], list[str]]:
    """Names and ids; none of a store that is damaged, which is for a command to tell."""
    try:
        found = Containers(root).all() if root else []
    except ContainerError:
        found = []
    return [one.name for one in found], [one.id[:_SHORT] for one in found]


def _images(root: Path | None) -> tuple[list[str], list[str]]:
    try:
        found = Store.open(root).images() if root else []
    except ImageError:
        found = []
    names = [name.removesuffix(":latest") for image in found for name in image.names]
    return names, [image.id.removeprefix("sha256:")[:_SHORT] for image in found]
