"""The commands of `ovl` on images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from overlayfs_py.cli.completion import image_names
from overlayfs_py.cli.image_base import ImageCommand, in_use, names_meant, open_store
from overlayfs_py.cli.image_files import import_, load, pull, push, save
from overlayfs_py.cli.image_marks import check, convert
from overlayfs_py.cli.output import Failure, ago, format_option, human_size, print_json, print_table
from overlayfs_py.images import Image, ImageError, Store


def created(image: Image) -> object:
    return image.config.get("created")


@click.command(cls=ImageCommand)
@click.argument("name", required=False)
@click.option("-q", "--quiet", is_flag=True, help="Print IDs only.")
@format_option
def images(name: str | None, quiet: bool, form: str) -> None:
    """List images, the latest first.

    NAME, without a tag or with it, leaves out the others.

    \b
    Examples:
      ovl images
      ovl images debian --format json
    """
    found = []
    for image in open_store().images():
        names = [known for known in image.names or ("",) if not name or name in (known, known.rpartition(":")[0])]
        if names:
            found.append((image, names))
    if quiet:
        for image, _ in found:
            click.echo(image.id)
    elif form == "json":
        print_json([summary(image) for image, _ in found])
    else:
        rows = []
        for image, names in found:
            for known in names:
                repository, _, tag = known.rpartition("@" if "@" in known else ":")
                cells = (repository or "<none>", tag or "<none>", image.short_id)
                rows.append((*cells, ago(created(image)), human_size(image.size)))
        print_table(("REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"), rows)


def summary(image: Image) -> dict[str, Any]:
    """An image in a list, as JSON has it; sizes in bytes."""
    return {
        "Id": image.id,
        "Names": list(image.names),
        "Created": created(image),
        "Size": image.size,
        "Layers": len(image.layers),
    }


@click.command(cls=ImageCommand)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=image_names)
@click.option("-f", "--force", is_flag=True, help="Also one that has several names or is used; then its names go.")
def rmi(images: tuple[str, ...], force: bool) -> None:
    """Remove images by name or ID.

    A name of several is only taken away. Layers that other images have stay.

    \b
    Examples:
      ovl rmi debian:12
      ovl rmi -f 3f5a
    """
    store = open_store()
    failed = False
    for text in images:
        try:
            remove_one(store, text, force)
        except ImageError as error:
            Failure(str(error)).show()
            failed = True
    if failed:
        click.get_current_context().exit(1)


def remove_one(store: Store, text: str, force: bool) -> None:
    image = store.image(text)
    meant = names_meant(image, text)
    if len(meant) < len(image.names):
        for name in meant:
            store.untag(name)
            click.echo(f"Untagged {name}")
        return
    if len(meant) > 1 and not force:
        raise ImageError(f"image {image.short_id} has the names {', '.join(meant)}: name one, or use -f for all")
    gone = store.remove(image, in_use=in_use(store), force=force)
    for name in meant:
        click.echo(f"Untagged {name}")
    if gone:
        click.echo(f"Deleted {image.id}")


@click.command(cls=ImageCommand)
@click.argument("image", shell_complete=image_names)
@click.argument("name")
def tag(image: str, name: str) -> None:
    """Give an IMAGE a further NAME.

    \b
    Example:
      ovl tag debian:12 localhost:5000/debian:mine
    """
    store = open_store()
    store.tag(store.image(image), name)


@click.command(cls=ImageCommand)
@click.argument("image", shell_complete=image_names)
@format_option
def history(image: str, form: str) -> None:
    """Tell how an image was made, the last step first.

    Sizes are those of the blobs.

    \b
    Example:
      ovl history debian:12
    """
    steps = history_of(open_store().image(image))
    if form == "json":
        print_json(steps)
        return
    rows = [
        (
            str(step["Layer"] or "").removeprefix("sha256:")[:12] or "<none>",
            ago(step["Created"]),
            str(step["CreatedBy"]),
            human_size(step["Size"]),
            str(step["Comment"]),
        )
        for step in steps
    ]
    print_table(("LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT"), rows)


def history_of(image: Image) -> list[dict[str, Any]]:
    """The steps an image was made in, the last first; those without a layer have size 0."""
    layers = list(image.layers)
    steps = []
    recorded = image.config.get("history")
    for entry in recorded if isinstance(recorded, list) else []:
        if not isinstance(entry, dict):
            continue
        layer = None if entry.get("empty_layer") or not layers else layers.pop(0)
        steps.append(_step(entry, layer.digest if layer else None, layer.size if layer else 0))
    steps += [_step({}, layer.digest, layer.size) for layer in layers]
    return steps[::-1]


def _step(entry: dict[str, Any], digest: str | None, size: int) -> dict[str, Any]:
    return {
        "Layer": digest,
        "Created": entry.get("created"),
        "CreatedBy": entry.get("created_by") or "",
        "Size": size,
        "Comment": entry.get("comment") or "",
    }


@click.command(cls=ImageCommand)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=image_names)
def inspect(images: tuple[str, ...]) -> None:
    """Print all there is to know of images, as JSON.

    \b
    Example:
      ovl inspect debian:12
    """
    store = open_store()
    print_json([details(store, store.image(text)) for text in images])


def details(store: Store, image: Image) -> dict[str, Any]:
    """All there is to tell of an image; sizes in bytes, layers bottom first."""
    config = image.config
    return {
        **summary(image),
        "Author": config.get("author") or "",
        "Os": config.get("os"),
        "Architecture": config.get("architecture"),
        "Digest": store.manifest_digest(image),
        "Config": config.get("config") or {},
        "Layers": [
            {
                "Digest": layer.digest,
                "DiffId": layer.diff_id,
                "ChainId": layer.chain_id,
                "Size": layer.size,
                "Path": str(layer.path),
            }
            for layer in image.layers
        ],
    }


@click.command(cls=ImageCommand)
@click.argument("image", shell_complete=image_names)
@format_option
def layers(image: str, form: str) -> None:
    """Show the layers of an image, top first, and what each changes.

    DIRECTORY is the name of the layer's directory in the store: its chain ID, the digest of it and all below it. DIFF
    ID is the digest of its content, by which other programs know it. Sizes are those of the blobs. A directory in which
    something changes counts as changed.

    \b
    Example:
      ovl layers debian:12
    """
    store = open_store()
    found = store.image(image)
    described = layers_of(store, found)
    if form == "json":
        print_json(described)
        return
    rows = [
        (
            str(layer["ChainId"]).removeprefix("sha256:")[:12],
            str(layer["DiffId"]).removeprefix("sha256:")[:12],
            human_size(layer["Size"]),
            str(layer["Added"]),
            str(layer["Changed"]),
            str(layer["Deleted"]),
            str(layer["CreatedBy"]),
        )
        for layer in described
    ]
    print_table(("DIRECTORY", "DIFF ID", "SIZE", "ADDED", "CHANGED", "DELETED", "CREATED BY"), rows)


def layers_of(store: Store, image: Image) -> list[dict[str, Any]]:
    """Each layer, top first, with how many paths it adds, changes and deletes; sizes are those of the blobs."""
    from overlayfs_py.images.changes import changes

    made_by = {step["Layer"]: step["CreatedBy"] for step in history_of(image)}
    described = []
    for at, layer in enumerate(image.layers):
        below = [lower.path for lower in reversed(image.layers[:at])]
        counts = Counter(change.kind for change in changes(layer.path, below, userxattr=store.userxattr))
        described.append(
            {
                "ChainId": layer.chain_id,
                "DiffId": layer.diff_id,
                "Digest": layer.digest,
                "Size": layer.size,
                "Added": counts["A"],
                "Changed": counts["C"],
                "Deleted": counts["D"],
                "CreatedBy": made_by.get(layer.digest, ""),
                "Path": str(layer.path),
            }
        )
    return described[::-1]


commands: list[click.Command] = [
    load,
    save,
    import_,
    pull,
    push,
    images,
    rmi,
    tag,
    history,
    inspect,
    layers,
    check,
    convert,
]
