"""The store of images: an OCI image layout, and beside it one unpacked directory for each layer."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from overlayfs_py.images import reference
from overlayfs_py.images.index import Record, image_of, in_use, manifest_of, read_records, write_records
from overlayfs_py.images.layout import Layout
from overlayfs_py.images.manifest import Manifest
from overlayfs_py.images.model import Image, ImageError

if TYPE_CHECKING:
    from overlayfs_py.images.publish import Incoming, Told

Found = TypeVar("Found")

_ID: Final = re.compile(r"(?:sha256:)?([0-9a-f]{1,64})")


def default_root() -> Path:
    """Where the store is unless one is named: for root the machine's, for others their own.

    Uid 0 of a user namespace is an other. Source: the XDG base directory specification.
    """
    named = os.environ.get("OVL_ROOT")
    if named:
        return Path(named)
    if os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
        return Path("/var/lib/ovl")
    data = os.environ.get("XDG_DATA_HOME")
    return Path(data) / "ovl" if data else Path.home() / ".local" / "share" / "ovl"


def ignore(_what: str, _diff_id: str) -> None:
    """Progress that no one looks at."""


class Store:
    """The images below one directory.

    What fails for a reason the user can mend raises ImageError, with one line; OSError means that the store itself
    can't be read or written.
    """

    __slots__ = ("layout",)

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @classmethod
    def open(cls, root: Path) -> Store:
        """The store at `root`, made where there is none."""
        try:
            return cls(Layout(root.absolute()))
        except OSError as error:
            raise ImageError(f"cannot use the store {root}: {error.strerror}") from error

    @property
    def root(self) -> Path:
        return self.layout.root

    @property
    def userxattr(self) -> bool:
        """Whether the layers are marked in user.overlay.* xattrs, so that mounts of them need the option userxattr."""
        return self.layout.userxattr

    def images(self) -> list[Image]:
        """All images, the latest first."""
        return self._consistent(
            lambda: [image_of(self.layout, record) for record in reversed(read_records(self.layout))]
        )

    def image(self, reference: str) -> Image:
        """The image of this name, ID or unique beginning of an ID; ImageError where there is none or several."""
        return self._consistent(lambda: image_of(self.layout, self._record(reference)))

    def _consistent(self, look: Callable[[], Found]) -> Found:
        """What is found, without a lock: again, should an image have gone in the middle of looking."""
        while True:
            before = self.layout.index_version()
            try:
                return look()
            except ImageError:
                if self.layout.index_version() == before:
                    raise

    def manifest(self, image: Image) -> Manifest:
        """The manifest of an image, as it came."""
        return manifest_of(self.layout, self._record(image.id))

    def manifest_digest(self, image: Image) -> str:
        """The digest of an image's manifest, by which registries know it."""
        return self._record(image.id).digest

    def blob(self, digest: str) -> Path:
        """Where a blob is."""
        return self.layout.blob(digest)

    def _record(self, text: str) -> Record:
        records = read_records(self.layout)
        try:
            name = reference.parse(text).full
        except ImageError:
            name = ""
        for record in records:
            if name in record.names:
                return record
        prefix = _ID.fullmatch(text)
        if prefix is None:
            if not name:
                reference.parse(text)
            raise ImageError(f"there is no image {text}")
        found = [
            record
            for record in records
            if manifest_of(self.layout, record).config.digest.startswith(f"sha256:{prefix[1]}")
        ]
        if not found:
            raise ImageError(f"there is no image {text}")
        if len(found) > 1:
            raise ImageError(f"{text} is the beginning of the IDs of {len(found)} images: give more of it")
        return found[0]

    @contextlib.contextmanager
    def locked(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the store: while anyone does no image goes, while someone does exclusively none comes either.

        Methods that change the store take it exclusively by themselves: never call one of them inside.
        """
        with self.layout.locked(exclusive=exclusive):
            yield

    def tag(self, image: Image, name: str) -> None:
        """Give an image a further name, which is taken from the image that has it."""
        full = reference.parse(name)
        if full.digest:
            raise ImageError(f"{name} names a manifest by its digest, which can't be given as a name")
        with self.layout.locked(exclusive=True):
            mine = self._record(image.id).digest
            records = read_records(self.layout)
            for record in records:
                record.names = [known for known in record.names if known != full.full]
                if record.digest == mine:
                    record.names.append(full.full)
            write_records(self.layout, records)

    def untag(self, name: str) -> Image:
        """Take a name away; the image, which may have no name left."""
        full = reference.parse(name).full
        with self.layout.locked(exclusive=True):
            records = read_records(self.layout)
            for record in records:
                if full in record.names:
                    record.names.remove(full)
                    write_records(self.layout, records)
                    return image_of(self.layout, record)
        raise ImageError(f"there is no image {name}")

    def remove(self, image: Image, *, in_use: Callable[[str], list[str]], force: bool = False) -> bool:
        """Remove an image with all its names, and the layers and blobs that no other image has.

        `in_use` tells the containers that use the image of an ID: then it is an ImageError, or with `force` only the
        names go. Returns whether the image has gone.
        """
        with self.layout.session() as session:
            with self.layout.locked(exclusive=True):
                users = in_use(image.id)
                if users and not force:
                    raise ImageError(f"image {image.short_id} is used by {', '.join(users)}: remove them first")
                mine = self._record(image.id).digest
                records = read_records(self.layout)
                if users:
                    for record in records:
                        record.names = [] if record.digest == mine else record.names
                write_records(self.layout, [record for record in records if users or record.digest != mine])
                self._sweep(session)
        return not users

    def clean(self) -> None:
        """Remove what no image has: what processes left that were killed while they changed the store."""
        with self.layout.session() as session, self.layout.locked(exclusive=True):
            self._sweep(session)

    def _sweep(self, session: Path) -> None:
        """Move blobs and layers of no image out of the store, to where they go with the session."""
        blobs, chains = in_use(self.layout)
        for directory, known in ((self.layout.blobs, blobs), (self.layout.layers, chains)):
            gone = session / f"gone-{directory.name}"
            gone.mkdir(exist_ok=True)
            for name in os.listdir(directory):
                if f"sha256:{name}" not in known:
                    os.rename(directory / name, gone / name)

    @contextlib.contextmanager
    def session(self) -> Iterator[Path]:
        """A directory in which to make what `add` puts into the store; gone afterwards."""
        self.clean()
        with self.layout.session() as session:
            yield session

    def add(
        self, session: Path, incoming: Incoming, names: Sequence[str], *, told: Told = ignore
    ) -> tuple[Image, list[str]]:
        """Bring in an image that was made ready in a session; it, and warnings of one line each."""
        # Whoever only looks images up does without what unpacks them.
        from overlayfs_py.images.publish import publish

        whole = [reference.parse(name).full for name in names]
        return publish(self.layout, session, incoming, whole, told)

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
        from overlayfs_py.images.make import commit

        return commit(
            self, upper, base, changes=changes, name=name, comment=comment, author=author, created_by=created_by
        )
