"""The commands of `ovl` that bring images in from files and registries, and take them there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click

from overlayfs_py.cli.completion import image_names
from overlayfs_py.cli.image_base import ImageCommand, names_meant, open_store, warn
from overlayfs_py.cli.output import Failure, progress
from overlayfs_py.images import Image


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
    done: list[Image] = []
    notes: list[str] = []
    with binary_input(source) as archive, progress() as shown:
        loaded = load_images(store, archive, name=name, platform=platform, told=shown.told)
        try:
            for image, warnings in loaded:
                done.append(image)
                notes += warnings
        finally:
            # Those before a bad one are there.
            shown.stop()
            warn(notes)
            for image in done:
                click.echo(image.id if quiet else f"Loaded {image.names[0] if image.names else image.id}")


@click.command(cls=ImageCommand)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=image_names)
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
    done: list[tuple[str, str]] = []
    notes: list[str] = []
    with progress() as shown:
        try:
            for name in names:
                image, warnings = pull_image(
                    store, name, access=access, platform=platform, told=shown.told, moved=shown.moved
                )
                done.append((name, image.id))
                notes += warnings
        finally:
            # Those before a bad one are there.
            shown.stop()
            warn(notes)
            for name, identifier in done:
                click.echo(identifier if quiet else f"Pulled {name}\n{identifier}")


@click.command(cls=ImageCommand)
@click.argument("image", shell_complete=image_names)
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
        digest = push_image(store, store.image(image), name or image, access=access, told=shown.told, moved=shown.moved)
    click.echo(f"Pushed {name or image}\n{digest}")
