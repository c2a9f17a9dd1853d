"""The commands of `ovl` on images."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click

from overlayfs_py.cli.output import Failure, ago, format_option, human_size, print_json, print_table, progress
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


@contextlib.contextmanager
def binary_input(path: str | None) -> Iterator[Path | IO[bytes]]:
    """A path, or standard input for none and "-"."""
    if path is not None and path != "-":
        yield Path(path)
        return
    if sys.stdin.isatty():
        raise Failure("standard input is a terminal: name a file with -i, or redirect one")
    yield sys.stdin.buffer


@click.command(cls=ImageCommand)
@click.option("-i", "--input", "source", metavar="PATH", help="A tar file or directory; standard input without it.")
@click.option("--name", help="The name to give the image, instead of what the archive says.")
@click.option("--platform", metavar="OS/ARCH", help="Which image to take where there are several.")
@click.option("-q", "--quiet", is_flag=True, help="Print the ID only.")
def load(source: str | None, name: str | None, platform: str | None, quiet: bool) -> None:
    """Load images from an archive.

    docker-archive and OCI layout, as a tar file (plain, gzip or zstd), a directory or standard input.

    \b
    Examples:
      ovl load -i busybox.tar
      zcat busybox.tar.gz | ovl load
      ovl load -i oci-directory --name mine:1
    """
    from overlayfs_py.images.load import load as load_images

    store = open_store()
    with binary_input(source) as archive, progress() as shown:
        for image, warnings in load_images(store, archive, name=name, platform=platform, told=shown.told):
            warn(warnings)
            click.echo(image.id if quiet else f"Loaded {image.names[0] if image.names else image.id}")


@click.command(cls=ImageCommand)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-o", "--output", "target", metavar="PATH", help="A tar file or empty directory; else standard output.")
@click.option(
    "--format", "form", type=click.Choice(["docker-archive", "oci"]), default="docker-archive", show_default=True
)
@click.option(
    "--layers",
    type=click.Choice(["as-is", "plain", "gzip", "zstd"]),
    default="as-is",
    show_default=True,
    help="How layers of an OCI layout are compressed.",
)
def save(images: tuple[str, ...], target: str | None, form: Any, layers: Any) -> None:
    """Write images to an archive or directory.

    A file whose name ends with .gz, .tgz or .zst is compressed.

    \b
    Examples:
      ovl save -o both.tar debian:12 busybox
      ovl save --format oci -o layout/ debian:12
      ovl save busybox | docker load
    """
    from overlayfs_py.images.save import save as save_images

    store = open_store()
    chosen = []
    for text in images:
        image = store.image(text)
        chosen += [(image, name) for name in names_meant(image, text)] or [(image, "")]
    output: Path | IO[bytes]
    if target is None or target == "-":
        if sys.stdout.isatty():
            raise Failure("standard output is a terminal: name a file with -o, or redirect it")
        output = sys.stdout.buffer
    else:
        output = Path(target)
        if target.endswith("/"):
            output.mkdir(exist_ok=True)
    save_images(store, chosen, output, form=form, layers=layers)


def names_meant(image: Image, text: str) -> list[str]:
    """The names of an image that a user means: the one given, or all where an ID was given."""
    from overlayfs_py.images.reference import parse

    with contextlib.suppress(ImageError):
        short = parse(text).short
        if short in image.names:
            return [short]
    return list(image.names)


@click.command("import", cls=ImageCommand)
@click.argument("archive", metavar="FILE|-")
@click.argument("name", required=False)
@click.option("-c", "--change", "changes", multiple=True, metavar="LINE", help='Like those of a Dockerfile: "CMD sh".')
@click.option("-m", "--message", default="", help="A comment for the history.")
def import_(archive: str, name: str | None, changes: tuple[str, ...], message: str) -> None:
    """Make an image of the archive of a root filesystem.

    \b
    Examples:
      ovl import rootfs.tar.gz mine:1 -c 'CMD ["/bin/sh"]' -c 'ENV LANG=C.UTF-8'
      mmdebstrap bookworm - | ovl import - debian:12
    """
    from overlayfs_py.images.make import import_root

    store = open_store()
    with contextlib.ExitStack() as closing:
        source = closing.enter_context(binary_input(archive))
        stream = closing.enter_context(open(source, "rb")) if isinstance(source, Path) else source
        shown = closing.enter_context(progress())
        image, warnings = import_root(store, stream, name=name, changes=changes, comment=message, told=shown.told)
    warn(warnings)
    click.echo(image.id)


access_options = (
    click.option(
        "--authfile", type=click.Path(path_type=Path), metavar="FILE", help="Credentials; else the usual auth.json."
    ),
    click.option("--plain-http", is_flag=True, help="Without TLS; a registry on this machine is asked what it speaks."),
    click.option("--tls-verify/--no-tls-verify", default=True, help="Whether its certificate must be trusted."),
)


def with_access(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options on how a registry is reached."""
    for option in reversed(access_options):
        command = option(command)
    return command


@click.command(cls=ImageCommand)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--platform", metavar="OS/ARCH", help="Which image to take where there are several.")
@click.option("-q", "--quiet", is_flag=True, help="Print the ID only.")
@with_access
def pull(
    names: tuple[str, ...],
    platform: str | None,
    quiet: bool,
    authfile: Path | None,
    plain_http: bool,
    tls_verify: bool,
) -> None:
    """Get images from a registry.

    What is here is not fetched again, and a download that was cut off goes on where it was.

    \b
    Examples:
      ovl pull debian:12
      ovl pull localhost:5000/mine@sha256:...
    """
    from overlayfs_py.images.registry.transfer import Access
    from overlayfs_py.images.registry.transfer import pull as pull_image

    store = open_store()
    access = Access(authfile, plain_http, tls_verify)
    with progress() as shown:
        for name in names:
            image, warnings = pull_image(
                store, name, access=access, platform=platform, told=shown.told, moved=shown.moved
            )
            warn(warnings)
            click.echo(image.id if quiet else f"Pulled {name}\n{image.id}")


@click.command(cls=ImageCommand)
@click.argument("image")
@click.argument("name", required=False)
@with_access
def push(image: str, name: str | None, authfile: Path | None, plain_http: bool, tls_verify: bool) -> None:
    """Put an IMAGE into a registry, under NAME where that is given.

    \b
    Examples:
      ovl push localhost:5000/mine:1
      ovl push debian:12 registry.example.org/debian:12
    """
    from overlayfs_py.images.registry.transfer import Access
    from overlayfs_py.images.registry.transfer import push as push_image

    store = open_store()
    with progress() as shown:
        access = Access(authfile, plain_http, tls_verify)
        digest = push_image(store, store.image(image), name or image, access=access, moved=shown.moved)
    click.echo(f"Pushed {name or image}\n{digest}")


def created(image: Image) -> object:
    return image.config.get("created")


@click.command(cls=ImageCommand)
@click.argument("name", required=False)
@click.option("-q", "--quiet", is_flag=True, help="Print IDs only.")
@format_option
def images(name: str | None, quiet: bool, form: str) -> None:
    """List images, the latest first; those of one NAME without a tag, or with it.

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
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
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
@click.argument("image")
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
@click.argument("image")
@format_option
def history(image: str, form: str) -> None:
    """How an image was made, the last step first; sizes are those of the blobs.

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
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
def inspect(images: tuple[str, ...]) -> None:
    """Everything about images, as JSON.

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
@click.argument("image")
@format_option
def layers(image: str, form: str) -> None:
    """The stack of an image, top first: what each layer adds, changes and deletes.

    A directory in which something changes counts as changed.

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
            str(layer["DiffId"]).removeprefix("sha256:")[:12],
            human_size(layer["Size"]),
            str(layer["Added"]),
            str(layer["Changed"]),
            str(layer["Deleted"]),
            str(layer["CreatedBy"]),
        )
        for layer in described
    ]
    print_table(("LAYER", "SIZE", "ADDED", "CHANGED", "DELETED", "CREATED BY"), rows)


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


commands: list[click.Command] = [load, save, import_, pull, push, images, rmi, tag, history, inspect, layers]
