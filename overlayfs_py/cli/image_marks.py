"""The commands of `ovl` on the marks in layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from overlayfs_py.cli.image_base import ImageCommand, in_use, open_store
from overlayfs_py.cli.output import format_option, print_json, print_table
from overlayfs_py.images import ImageError


@contextlib.contextmanager
def layer_paths(words: tuple[str, ...], *, change: bool) -> Iterator[tuple[list[Path], bool]]:
    """The directories that are named, or the layers of an image; and whether their marks are user.overlay.*.

    Those of an image are in no use until the block ends, if they are to `change`.
    """
    if all(Path(word).is_dir() for word in words):
        yield [Path(word) for word in words], False
        return
    if len(words) > 1:
        missing = next(word for word in words if not Path(word).is_dir())
        raise ImageError(f"{missing} is no directory")
    store = open_store()
    with store.locked(exclusive=change):
        paths = [layer.path for layer in reversed(store.image(words[0]).layers)]
        if change:
            sharing = [image for image in store.images() if {layer.path for layer in image.layers} & set(paths)]
            if users := [user for image in sharing for user in in_use(store)(image.id)]:
                raise ImageError(f"layers of {words[0]} are used by {', '.join(users)}: remove them first")
        yield paths, store.userxattr


@click.command(cls=ImageCommand)
@click.argument("layers", nargs=-1, required=True, metavar="DIR...|IMAGE")
@click.option("--work", type=click.Path(path_type=Path), metavar="DIR", help="A work directory to look at, too.")
@click.option("--repair", is_flag=True, help="Mend what can be mended, in place.")
@click.option("--userxattr", is_flag=True, help="The marks are user.overlay.* xattrs.")
@format_option
def check(layers: tuple[str, ...], work: Path | None, repair: bool, userxattr: bool, form: str) -> None:
    """Find, and mend, marks in layers that make no sense.

    The layers are directories, topmost first, or those of an IMAGE. Marks that make no sense are whiteouts of nothing,
    redirects to nothing, metacopies without data, whiteouts that the kernel does not see, and what a mount has left in
    its work directory. Exit status 1 where something is left to mend. Nothing may be mounted of them.

    \b
    Examples:
      ovl check upper lower1 lower2 --work work
      ovl check --repair debian:12
    """
    from overlayfs_py.images.check import check as check_layers
    from overlayfs_py.images.check import check_work

    with layer_paths(layers, change=repair) as (paths, stored_user):
        findings = list(check_layers(paths, userxattr=userxattr or stored_user, repair=repair))
    if work is not None:
        findings += check_work(work, repair=repair)
    described = [
        {
            "Layer": str(finding.layer),
            "Path": finding.path.decode(errors="backslashreplace"),
            "Problem": finding.kind,
            "Mended": finding.mended,
        }
        for finding in findings
    ]
    if form == "json":
        print_json(described)
    elif described:
        rows = [
            (str(row["Problem"]), str(row["Path"]), str(row["Layer"]), "yes" if row["Mended"] else "no")
            for row in described
        ]
        print_table(("PROBLEM", "PATH", "LAYER", "MENDED"), rows)
    if not all(finding.mended for finding in findings):
        click.get_current_context().exit(1)


@click.command(cls=ImageCommand)
@click.argument("layers", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option("--to", "style", type=click.Choice(["kernel", "aufs"]), required=True, help="The style of the new marks.")
@click.option("--userxattr", is_flag=True, help="The kernel's marks are user.overlay.* xattrs.")
def convert(layers: tuple[Path, ...], style: Any, userxattr: bool) -> None:
    """Turn marks of the kernel's into AUFS-style ones, or back.

    AUFS-style ones are files named .wh.NAME. The layers are changed in place.

    \b
    Example:
      ovl convert --to aufs upper
    """
    from overlayfs_py.images.convert import convert as convert_layer

    for layer in layers:
        click.echo(f"{layer}: {convert_layer(layer, style, userxattr=userxattr)} marks converted")
